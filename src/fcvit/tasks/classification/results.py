"""The results of a classifier evaluation: data classes, result files, and reading them back.

The folder of a configuration (weights, protocol, engine, precision) contains `metrics.json`, `predictions.csv`,
`per_class.csv` and `worst.png`. With the `report` extra it also contains `confusion.png` and `reliability.png`, and the
run folder contains `report.html`, which shows all results.
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
from fcvit.errors import BadImages, UnreadableFile
from fcvit.evaluation.protocols import Protocol
from fcvit.evaluation.results import METRICS, result_folder
from fcvit.metrics import classification as metrics
from fcvit.report.image_grid import Tile, image_grid, png
from fcvit.tasks.classification.published import PublishedComparison
from fcvit.text import csv_text, csv_value

PREDICTIONS, PER_CLASS, PAGE = "predictions.csv", "per_class.csv", "report.html"
_WORST = 24


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of one configuration for all readable images, in the order of the data set.

    Attributes:
        names: Image names.
        digests: First hexadecimal digits of the SHA-256 of each file.
        truth: Index of the true class among the candidate classes, (N,).
        rank: Number of classes ranked above the true class, (N,).
        loss: Cross-entropy, (N,).
        top, probability: The k most probable classes and their probabilities, best first, (N, k).
        classes: Candidate classes, to which predictions are restricted.
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
        """Return a Boolean array that marks correct top-1 predictions, (N,)."""
        return self.rank == 0


@dataclasses.dataclass(frozen=True)
class ClassFigures:
    """Metrics of one class: images, top-1 and top-k accuracy in percent, the class that it is most often mistaken for,
    and the number of such images.
    """

    id: str
    name: str
    images: int
    top1: float
    top_k: float
    mistaken_for: str
    times: int


@dataclasses.dataclass(frozen=True)
class Real:
    """ImageNet-ReaL: images with labels, top-1 accuracy on them in percent, and its 95% confidence interval."""

    images: int
    top1: float
    interval: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Result:
    """The results of one configuration.

    Attributes:
        name: Name of the configuration and its folder.
        weights, weights_sha256, network: Path, SHA-256 and description of the evaluated weights.
        engine, device, precision, batch_size: Engine, device, precision and batch size of the computation.
        protocol: Preprocessing protocol.
        images, unreadable: Number of evaluated images, and of unreadable images, which are excluded.
        classes: Number of candidate classes, to which predictions are restricted.
        top1, top_k: Top-1 and top-k accuracy in percent. `k` is 5, or `classes` if that is smaller.
        top1_interval, top_k_interval: 95% confidence intervals of the accuracies (Wilson score intervals), in percent.
        loss: Mean cross-entropy over the images.
        calibration: Expected calibration error and its bins (see `fcvit.metrics.classification.Calibration`).
        real: Accuracy with ImageNet-ReaL labels, or None if they were not given.
        published: Comparison with the published figure, or None if there is none.
        per_class: Metrics of each class with images.
        fingerprint: SHA-256 of the contents and classes of the images. It does not depend on their names and order.
        seconds: Computing time of the engine over all processes, without image decoding.
        hint: Warning about a likely wrong order of the classes, or an empty string.
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
    """Agreement of two engines on the same images: equal top-1 predictions in percent, absolute logit differences."""

    configurations: tuple[str, str]
    engines: tuple[str, str]
    top1_agreement: float
    max_difference: float
    mean_difference: float


MAPS = "maps.png"
EFFECTS = ("protocol", "precision")


@dataclasses.dataclass(frozen=True)
class Effect:
    """The effect of the protocol or the precision on top-1 accuracy, for the same weights, engine and images.

    Attributes:
        of: The setting that differs between the two configurations, "protocol" or "precision".
        configurations: Names of the two configurations.
        difference, interval: Second minus first top-1 accuracy and its 95% confidence interval, in percentage points
            (see `fcvit.metrics.classification.paired_difference`).
        p_value: p-value of the exact McNemar test.
    """

    of: str
    configurations: tuple[str, str]
    difference: float
    interval: tuple[float, float]
    p_value: float


def class_figures(records: Records, k: int) -> tuple[ClassFigures, ...]:
    """Return the metrics of each class that has at least one image, in the model's order."""
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
    """Write all files of a configuration except the charts.

    Args:
        folder: Folder to write to. It is created if necessary, and existing files are replaced.
        result: Result to write.
        records: Records of the images.
        about: Additional content of `metrics.json`.
        read: Function that reads an image by its name, for `worst.png`.
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
    title = f"{len(wrong)} of {result.images} images misclassified"
    title += f"; the {len(tiles)} most confident errors" if len(tiles) < len(wrong) else ""
    runs.write_bytes(folder / "worst.png", png(image_grid(tiles, title)))
    runs.write_json(folder / METRICS, dataclasses.asdict(result) | dict(about))  # last, as it marks a complete result


def _readable(read: Callable[[str], Image.Image], name: str) -> Image.Image:
    """Read an image. Return a gray image if it can no longer be read."""
    try:
        return read(name)
    except (OSError, BadImages):
        return Image.new("RGB", (8, 8), "#cccccc")


def _predictions(records: Records) -> str:
    k = records.top.shape[1]
    ranked = [f"{column}_{rank}" for rank in range(1, k + 1) for column in ("class", "probability")]
    rows: list[list[object]] = [["path", "image", "truth", *ranked]]
    for i, name in enumerate(records.names):
        row: list[object] = [name, records.digests[i], records.classes[records.truth[i]].id]
        for index, probability in zip(records.top[i], records.probability[i], strict=True):
            row += [records.classes[index].id, f"{probability:.6f}"]
        rows.append(row)
    return csv_text(rows)


@dataclasses.dataclass(frozen=True)
class SavedResult:
    """A result that was read from its folder.

    Attributes:
        folder: Folder of the configuration.
        metrics: Content of `metrics.json`.
        images: First digits of the SHA-256, and name, of each image.
        truth, predicted: True and predicted class id of each image.
        confidence: Probability of the predicted class of each image.
        names: Class names by class id.
    """

    folder: Path
    metrics: dict[str, Any]
    images: tuple[tuple[str, str], ...]
    truth: tuple[str, ...]
    predicted: tuple[str, ...]
    confidence: tuple[float, ...]
    names: Mapping[str, str]


def read_result(folder: Path) -> SavedResult:
    """Read the result in a folder, or the only result of a run.

    Images are sorted by the SHA-256 of their content, then by class and path.

    Raises:
        UnreadableFile: The folder does not contain a finished result, or its files are damaged.
        UsageError: The run contains several results.
    """
    folder = result_folder(folder)
    path = folder / METRICS
    try:
        figures = json.loads(path.read_bytes())
        names = {row["id"]: row["name"] for row in figures["per_class"]} | dict(figures.get("predicted", {}))
        if not isinstance(figures["fingerprint"], str) or not isinstance(figures["name"], str):
            raise ValueError("fingerprint and name must be text")
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
        raise UnreadableFile(
            f"{path}: damaged or written by another version ({error!s:.80}); run fcvit eval again"
        ) from error
    images, paths, truth, predicted = columns
    return SavedResult(folder, figures, tuple(zip(images, paths, strict=True)), truth, predicted, confidence, names)


def file_and_hash(path: str | None) -> "dict[str, str] | str | None":
    """Return the path and SHA-256 of a file. Return the argument unchanged if it is not a file."""
    if path is None or not Path(path).is_file():
        return path
    return {"path": path, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
