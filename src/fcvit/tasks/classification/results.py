"""The results of an evaluation of classifiers: figures, the files of each configuration, and how they are read again.

The folder of a configuration (weights, protocol, engine, precision) holds
`metrics.json`, `predictions.csv`, `per_class.csv`, `worst.png` and, with the extra `report`,
`confusion.png` and `reliability.png`; `report.html` beside the folders shows them all.
"""

import csv
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fcvit import run_folder as runs
from fcvit.data.classes import Classes
from fcvit.errors import BadImages, UnreadableFile, UsageError
from fcvit.evaluation.protocols import Protocol
from fcvit.metrics import classification as metrics
from fcvit.report.image_grid import Tile, image_grid, png
from fcvit.tasks.classification.published import PublishedComparison
from fcvit.text import csv_text, csv_value

METRICS, PREDICTIONS, PER_CLASS, PAGE = "metrics.json", "predictions.csv", "per_class.csv", "report.html"
_WORST = 24


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of one configuration for every image that could be read, in the order of the data set.

    Attributes:
        names: of the images.
        digests: the beginning of the SHA-256 of each file, in hexadecimal digits.
        truth: index of the true class, (N,), among those that were told apart.
        rank: how many classes came before it, (N,).
        loss: cross-entropy, (N,).
        top, probability: the best classes, best first, (N, k).
        classes: those that were told apart.
    """

    names: tuple[str, ...]
    digests: tuple[str, ...]
    truth: np.ndarray
    rank: np.ndarray
    loss: np.ndarray
    top: np.ndarray
    probability: np.ndarray
    classes: Classes

    @property
    def correct(self) -> np.ndarray:
        """Tell for each image whether the best class is the true one, (N,)."""
        return self.rank == 0


@dataclasses.dataclass(frozen=True)
class ClassFigures:
    """One class: images, per cent right at first and among the best k, and what it was most often taken for."""

    id: str
    name: str
    images: int
    top1: float
    top_k: float
    mistaken_for: str
    times: int


@dataclasses.dataclass(frozen=True)
class Real:
    """ImageNet-ReaL: per cent of the images with labels whose best class is one of them, with its interval."""

    images: int
    top1: float
    interval: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Result:
    """The figures of one configuration.

    Attributes:
        name: of the configuration and its folder.
        weights, weights_sha256, network: what was evaluated.
        engine, device, precision, batch_size: what computed it, and how.
        protocol: how images were prepared.
        images, unreadable: how many were evaluated, and left out.
        classes: how many were told apart.
        top1, top_k: per cent; `k` is 5, or the class count where that is smaller.
        top1_interval, top_k_interval: Wilson's, 95 %.
        loss: cross-entropy, mean over the images.
        calibration: see `fcvit.metrics.classification.Calibration`.
        real: with ImageNet-ReaL's labels, else None.
        published: the comparison with the published figure, where there is one.
        per_class: of every class with images.
        fingerprint: SHA-256 over contents and classes of the images, whatever their names and order.
        seconds: that the configuration's engine computed, in all processes, decoding aside.
        hint: what looks wrong with the order of the classes; "" where nothing does.
    """

    name: str
    weights: str
    weights_sha256: str
    network: str
    engine: str
    device: str
    precision: str
    batch_size: int
    protocol: Protocol
    images: int
    unreadable: int
    classes: int
    top1: float
    top_k: float
    k: int
    top1_interval: tuple[float, float]
    top_k_interval: tuple[float, float]
    loss: float
    calibration: metrics.Calibration
    real: Real | None
    published: PublishedComparison | None
    per_class: tuple[ClassFigures, ...]
    fingerprint: str
    seconds: float
    hint: str = ""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Two engines on the same images: share of equal top-1 in per cent, absolute logit differences."""

    configurations: tuple[str, str]
    engines: tuple[str, str]
    top1_agreement: float
    max_difference: float
    mean_difference: float


MAPS = "maps.png"
EFFECTS = ("protocol", "precision")


@dataclasses.dataclass(frozen=True)
class Effect:
    """The change of top-1, in points, by a protocol or a precision on the same weights, engine and images.

    Attributes:
        of: one of `EFFECTS`.
        configurations: the names of the two; the difference is the second less the first.
        difference, interval: see `fcvit.metrics.classification.paired_difference`.
        p_value: of the exact McNemar test.
    """

    of: str
    configurations: tuple[str, str]
    difference: float
    interval: tuple[float, float]
    p_value: float


def class_figures(records: Records, k: int) -> tuple[ClassFigures, ...]:
    """Return the figures of every class with images, in the model's order."""
    matrix = metrics.confusion(records.truth, records.top[:, 0], len(records.classes))
    in_k = np.bincount(records.truth[records.rank < k], minlength=len(records.classes))
    figures = []
    for index, (row, named) in enumerate(zip(matrix, records.classes, strict=True)):
        images = int(row.sum())
        if not images:
            continue
        right, row = int(row[index]), row.copy()
        row[index] = 0
        worst = int(row.argmax())
        figures.append(
            ClassFigures(
                named.id,
                named.name,
                images,
                metrics.share(right, images),
                metrics.share(int(in_k[index]), images),
                records.classes[worst].id if row[worst] else "",
                int(row[worst]),
            )
        )
    return tuple(figures)


def write_result(
    folder: Path, result: Result, records: Records, about: Mapping[str, object], read: Callable[[str], Image.Image]
) -> None:
    """Write everything of a configuration but the charts.

    Args:
        folder: is made; files of the same names are replaced.
        about: what `metrics.json` holds besides the result.
        read: gives an image by its name, for the pictures.
    """
    folder.mkdir(exist_ok=True)
    runs.write_text(folder / PREDICTIONS, _predictions(records), "surrogateescape")
    rows = [
        [c.id, c.name, c.images, f"{c.top1:.4f}", f"{c.top_k:.4f}", c.mistaken_for, c.times] for c in result.per_class
    ]
    header = ["class", "name", "images", "top1", f"top{result.k}", "mistaken_for", "times"]
    runs.write_text(folder / PER_CLASS, csv_text([header, *rows]))
    wrong = np.flatnonzero(~records.correct)
    worst = wrong[np.argsort(-records.probability[wrong, 0], kind="stable")][:_WORST]
    tiles = [
        Tile(
            _readable(read, records.names[i]),
            records.classes[records.top[i, 0]].name,
            float(records.probability[i, 0]),
            records.classes[records.truth[i]].name,
        )
        for i in worst
    ]
    title = f"{len(wrong)} of {result.images} wrong" + (f", the {len(tiles)} surest of them" if tiles else "")
    runs.write_bytes(folder / "worst.png", png(image_grid(tiles, title)))
    runs.write_json(folder / METRICS, dataclasses.asdict(result) | dict(about))  # last: a folder with it is whole


def _readable(read: Callable[[str], Image.Image], name: str) -> Image.Image:
    """Read an image; return a gray one if it was deleted after it was evaluated."""
    try:
        return read(name)
    except (OSError, BadImages):
        return Image.new("RGB", (8, 8), "#cccccc")


def _predictions(records: Records) -> str:
    k = records.top.shape[1]
    ranked = [f"{what}_{place}" for place in range(1, k + 1) for what in ("class", "probability")]
    rows: list[list[object]] = [["path", "image", "truth", *ranked]]
    for i, name in enumerate(records.names):
        row: list[object] = [name, records.digests[i], records.classes[records.truth[i]].id]
        for index, probability in zip(records.top[i], records.probability[i], strict=True):
            row += [records.classes[index].id, f"{probability:.6f}"]
        rows.append(row)
    return csv_text(rows)


@dataclasses.dataclass(frozen=True)
class SavedResult:
    """A result that was read again.

    Attributes:
        folder: of the configuration.
        metrics: the content of `metrics.json`.
        images: of each image the beginning of its SHA-256 and its name.
        truth, predicted: class ids.
        confidence: probability of the predicted class.
        names: class id -> name.
    """

    folder: Path
    metrics: dict[str, Any]
    images: tuple[tuple[str, str], ...]
    truth: tuple[str, ...]
    predicted: tuple[str, ...]
    confidence: tuple[float, ...]
    names: Mapping[str, str]


def read_result(folder: Path) -> SavedResult:
    """Read the folder of a result, or the only result of a run, ordered by the content of the images.

    Raises:
        UnreadableFile: it is no such folder, or its files are damaged or not finished.
        UsageError: a run with several results.
    """
    if not (folder / METRICS).is_file():
        folders = sorted(path.parent for path in folder.glob(f"*/{METRICS}"))
        if len(folders) > 1:
            listed = ", ".join(str(path) for path in folders)
            raise UsageError(f"{folder} holds several results; name one of them: {listed}")
        if not folders:
            raise UnreadableFile(f"{folder}: no {METRICS} there; expected a finished run of fcvit eval")
        folder = folders[0]
    path = folder / METRICS
    try:
        figures = json.loads(path.read_bytes())
        names = {row["id"]: row["name"] for row in figures["per_class"]} | dict(figures.get("predicted", {}))
        if not isinstance(figures["fingerprint"], str) or not isinstance(figures["name"], str):
            raise ValueError("no fingerprint")
        path = folder / PREDICTIONS
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = sorted(csv.DictReader(file), key=lambda row: (row["image"], row["truth"], row["path"]))
        columns = [
            tuple(row[key] and csv_value(row[key]) for row in rows) for key in ("image", "path", "truth", "class_1")
        ]
        confidence = tuple(float(row["probability_1"]) for row in rows)
        if not rows or None in columns[3] or figures["images"] != len(rows):
            raise ValueError(f"{len(rows)} rows for {figures['images']} images")
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, csv.Error, RecursionError) as error:
        raise UnreadableFile(f"{path}: damaged, or of another version ({error!s:.80})") from error
    images, paths, truth, predicted = columns
    return SavedResult(folder, figures, tuple(zip(images, paths, strict=True)), truth, predicted, confidence, names)


def file_and_hash(path: str | None) -> "dict[str, str] | str | None":
    """Return which file was used, and its hash; a word that names no file as it is."""
    if path is None or not Path(path).is_file():
        return path
    return {"path": path, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
