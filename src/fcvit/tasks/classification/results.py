"""The results of a classifier evaluation: data classes, result files, and reading them back.

The folder of a configuration (weights, protocol, engine, precision) contains `metrics.json`, `predictions.csv`,
`per_class.csv` and `worst.png`. With the `report` extra it also contains `confusion.png` and `reliability.png`, and the
run folder contains `report.html`, which shows all results.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from fcvit import run_folder as runs
from fcvit.data.classes import Classes
from fcvit.errors import BadImages
from fcvit.evaluation.comparison import SavedResult, read_csv, read_metrics, reading
from fcvit.evaluation.report import Agreement, ConfigurationResult
from fcvit.evaluation.results import METRICS, result_folder
from fcvit.metrics import classification as metrics
from fcvit.report.image_grid import Tile, image_grid, png
from fcvit.text import csv_text, csv_value

PREDICTIONS, PER_CLASS, MAPS = "predictions.csv", "per_class.csv", "maps.png"
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(ConfigurationResult):
    """The results of one configuration, with the attributes of `fcvit.evaluation.report.ConfigurationResult`.

    Attributes:
        classes: Number of candidate classes, to which predictions are restricted.
        top1, top_k: Top-1 and top-k accuracy in percent. `k` is 5, or `classes` if that is smaller.
        top1_interval, top_k_interval: 95% confidence intervals of the accuracies (Wilson score intervals), in percent.
        loss: Mean cross-entropy over the images.
        calibration: Expected calibration error and its bins (see `fcvit.metrics.classification.Calibration`).
        real: Accuracy with ImageNet-ReaL labels, or None if they were not given.
        per_class: Metrics of each class with images.
    """

    classes: int
    top1: float
    top_k: float
    k: int
    top1_interval: tuple[float, float]
    top_k_interval: tuple[float, float]
    loss: float
    calibration: metrics.Calibration
    real: Real | None
    per_class: tuple[ClassFigures, ...]


@dataclasses.dataclass(frozen=True)
class LogitAgreement(Agreement):
    """Agreement of two engines: equal top-1 predictions in percent, and absolute logit differences."""

    COLUMNS: ClassVar = {
        "top1_agreement": ("same top-1 prediction (%)", ".2f"),
        "max_difference": ("largest logit difference", ".2e"),
        "mean_difference": ("mean logit difference", ".2e"),
    }

    top1_agreement: float
    max_difference: float
    mean_difference: float


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
class SavedPredictions(SavedResult):
    """A result that was read from its folder. `truth` has the class id of each image.

    Attributes:
        predicted: Predicted class id of each image.
        confidence: Probability of the predicted class of each image.
        class_names: Class names by class id.
    """

    predicted: tuple[str, ...]
    confidence: tuple[float, ...]
    class_names: Mapping[str, str]


def read_result(folder: Path) -> SavedPredictions:
    """Read the result in a folder, or the only result of a run.

    Images are sorted by the SHA-256 of their content, then by class and path.

    Raises:
        UnreadableFile: The folder does not contain a finished result, or its files are damaged.
        UsageError: The run contains several results.
    """
    folder = result_folder(folder)
    figures = read_metrics(folder)
    with reading(folder / METRICS):
        class_names = {row["id"]: row["name"] for row in figures["per_class"]} | dict(figures.get("predicted", {}))
    with reading(folder / PREDICTIONS) as path:
        rows = sorted(read_csv(path), key=lambda row: (row["image"], row["truth"], row["path"]))
        images, names, truth, predicted = (
            tuple(row[key] and csv_value(row[key]) for row in rows) for key in ("image", "path", "truth", "class_1")
        )
        confidence = tuple(float(row["probability_1"]) for row in rows)
        if not rows or None in predicted or figures["images"] != len(rows):
            raise ValueError(f"{len(rows)} rows for {figures['images']} images")
    return SavedPredictions(folder, figures, names, images, truth, predicted, confidence, class_names)


def file_and_hash(path: str | None) -> "dict[str, str] | str | None":
    """Return the path and SHA-256 of a file. Return the argument unchanged if it is not a file."""
    if path is None or not Path(path).is_file():
        return path
    return {"path": path, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
