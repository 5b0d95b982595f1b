"""The results of a segmentation evaluation: records, data classes, result files, and reading them back.

The folder of a configuration (weights, protocol, engine, precision) contains `metrics.json`, `per_class.csv`,
`predictions.csv` (one row per image), `confusion.csv` (pixels of each image by label and predicted class), `worst.png`
and `best.png`. With the `report` extra it also contains `confusion.png`, and the run folder contains `report.html`.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from fcvit import run_folder as runs
from fcvit.data.classes import Classes
from fcvit.errors import BadImages, counted
from fcvit.evaluation.comparison import SavedResult, read_csv, read_metrics, reading
from fcvit.evaluation.report import Agreement, ConfigurationResult
from fcvit.evaluation.results import METRICS, result_folder
from fcvit.metrics import segmentation as metrics
from fcvit.report.image_grid import png
from fcvit.report.label_grid import LabelRow, label_grid
from fcvit.text import csv_text, csv_value

PREDICTIONS, PER_CLASS, CONFUSION = "predictions.csv", "per_class.csv", "confusion.csv"
WORST, BEST = "worst.png", "best.png"
_DIGEST = 8  # bytes
_SHOWN = 6  # images in worst.png and in best.png

RECORD = np.dtype([("pixels", "<i8"), ("differing", "<i8"), ("label", "u1", (_DIGEST,))])
"""The record of an image: its pixels, those predicted otherwise than by the reference, and a digest of its label."""


def record(prediction: np.ndarray, label: np.ndarray, reference: np.ndarray | None = None) -> tuple[np.ndarray, bytes]:
    """Return the record of an image, a scalar of `RECORD`, and its encoded pairs (see `fcvit.metrics.segmentation`).

    Args:
        prediction: Predicted class of each pixel, uint8 (H, W), at the size of the label map.
        label: Label of each pixel, uint8 (H, W), in the numbering of the network's classes, 255 where it is ignored.
        reference: Prediction of the reference configuration, or None for the reference itself.

    Raises:
        DoesNotFit: The sizes are different.
    """
    content = metrics.encode(metrics.confusion(prediction, label))
    result = np.zeros((), RECORD)
    result["pixels"] = label.size
    result["differing"] = 0 if reference is None else np.count_nonzero(prediction != reference)
    digest = hashlib.sha256(repr(label.shape).encode() + np.ascontiguousarray(label).tobytes()).digest()
    result["label"] = np.frombuffer(digest[:_DIGEST], np.uint8)
    return result, content


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image (RGB) with its label map (255 where it is ignored) and the predicted classes, uint8 (H, W)."""

    image: Image.Image
    label: np.ndarray
    prediction: np.ndarray


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of one configuration for all readable images, in the order of the data set.

    Attributes:
        names: Image names.
        digests, labels: First hexadecimal digits of the SHA-256 of each image file and of each label map.
        encoded: Encoded pairs of each image (see `fcvit.metrics.segmentation.encode`).
        classes: Classes of the network.
    """

    names: tuple[str, ...]
    digests: tuple[str, ...]
    labels: tuple[str, ...]
    encoded: Sequence[bytes]
    classes: Classes

    def counts(self) -> Iterator[np.ndarray]:
        """Yield the counts of each image, int64 (3, C)."""
        for content in self.encoded:
            yield metrics.class_counts(metrics.decode(content), len(self.classes))


@dataclasses.dataclass(frozen=True)
class Sums:
    """The sums over all images, and the metrics of each image.

    Attributes:
        counts: Correct, predicted and labeled pixels of each class, int64 (3, C).
        matrix: Pixels of each label (row) and predicted class (column), int64 (C, C).
        images: Number of images in which each class is labeled, (C,).
        outside: Pixels of each label that is not a class.
        miou, aacc: mIoU and pixel accuracy of each image in percent, (N,). NaN for an image without labeled pixels.
        labeled, correct: Labeled and correct pixels of each image, (N,).
    """

    counts: np.ndarray
    matrix: np.ndarray
    images: np.ndarray
    outside: Mapping[int, int]
    miou: np.ndarray
    aacc: np.ndarray
    labeled: np.ndarray
    correct: np.ndarray


def add_up(records: Records) -> Sums:
    """Compute the sums of all images in one pass."""
    classes, number = len(records.classes), len(records.names)
    total, matrix = np.zeros((3, classes), np.int64), np.zeros((classes, classes), np.int64)
    images = np.zeros(classes, np.int64)
    outside: dict[int, int] = {}
    miou, aacc = np.full(number, np.nan), np.full(number, np.nan)
    labeled, correct = np.zeros(number, np.int64), np.zeros(number, np.int64)
    for row, content in enumerate(records.encoded):
        pairs = metrics.decode(content)
        counts = metrics.class_counts(pairs, classes)
        metrics.add_confusion(matrix, pairs)
        total += counts
        images += counts[metrics.LABELED] > 0
        for label, _, pixels in pairs[pairs["label"] >= classes].tolist():
            outside[label] = outside.get(label, 0) + pixels
        labeled[row], correct[row] = counts[metrics.LABELED].sum(), counts[metrics.INTERSECT].sum()
        if labeled[row]:
            figures = metrics.figures(counts)
            miou[row], aacc[row] = figures.miou, figures.aacc
    return Sums(total, matrix, images, dict(sorted(outside.items())), miou, aacc, labeled, correct)


@dataclasses.dataclass(frozen=True)
class ClassFigures:
    """The metrics of one class.

    Attributes:
        index, id, name: The class.
        images: Number of images in which it is labeled.
        labeled, predicted: Number of pixels with this label, and with this predicted class.
        iou, acc: IoU and accuracy in percent, or NaN if undefined.
        iou_interval: 95% confidence interval of the IoU in percent (bootstrap over images).
        mistaken_for: Id of the class that is most often predicted for its pixels by mistake, or an empty string.
        mistaken: Percentage of its labeled pixels for which that class is predicted.
    """

    index: int
    id: str
    name: str
    images: int
    labeled: int
    predicted: int
    iou: float
    acc: float
    iou_interval: tuple[float, float]
    mistaken_for: str
    mistaken: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(ConfigurationResult):
    """The results of one configuration, with the attributes of `fcvit.evaluation.report.ConfigurationResult`.

    Undefined values are NaN, and null in `metrics.json`.

    Attributes:
        pixels: Number of labeled pixels.
        outside: Number of pixels whose label is neither a class nor ignored, by label.
        classes, absent: Number of classes, and of those that are neither labeled nor predicted. Absent classes are left
            out of the mIoU.
        miou, macc, aacc: mIoU, mean class accuracy and pixel accuracy in percent, as mmsegmentation computes them.
        miou_interval, macc_interval, aacc_interval: 95% confidence intervals in percent (bootstrap over images).
        per_class: Metrics of each class.
    """

    pixels: int
    outside: Mapping[int, int]
    classes: int
    absent: int
    miou: float
    macc: float
    aacc: float
    miou_interval: tuple[float, float]
    macc_interval: tuple[float, float]
    aacc_interval: tuple[float, float]
    per_class: tuple[ClassFigures, ...]


@dataclasses.dataclass(frozen=True)
class PixelAgreement(Agreement):
    """Agreement of two engines: pixels with the same predicted class, in percent."""

    COLUMNS: ClassVar = {"pixel_agreement": ("pixels with the same predicted class (%)", ".4f")}

    pixel_agreement: float


def bounds(values: np.ndarray) -> tuple[float, float]:
    """Return the 95% interval of resampled values (resamples,)."""
    low, high = metrics.interval(values)
    return float(low), float(high)


def class_figures(sums: Sums, classes: Classes, resampled: metrics.Figures) -> tuple[ClassFigures, ...]:
    """Return the metrics of each class.

    Args:
        sums: Sums over all images.
        classes: Classes of the network.
        resampled: Metrics of the bootstrap resamples.
    """
    figures = metrics.figures(sums.counts)
    low, high = metrics.interval(resampled.iou)
    rows = []
    for index, named in enumerate(classes):
        wrong = sums.matrix[index].copy()
        wrong[index] = 0
        worst, labeled = int(wrong.argmax()), int(sums.counts[metrics.LABELED, index])
        rows.append(
            ClassFigures(
                index=index,
                id=named.id,
                name=named.name,
                images=int(sums.images[index]),
                labeled=labeled,
                predicted=int(sums.counts[metrics.PREDICTED, index]),
                iou=float(figures.iou[index]),
                acc=float(figures.acc[index]),
                iou_interval=(float(low[index]), float(high[index])),
                mistaken_for=classes[worst].id if wrong[worst] else "",
                mistaken=100 * int(wrong[worst]) / labeled if labeled else 0.0,
            )
        )
    return tuple(rows)


def write_result(
    folder: Path,
    result: Result,
    records: Records,
    sums: Sums,
    palette: np.ndarray,
    about: Mapping[str, object],
    sample: Callable[[int], Sample],
) -> None:
    """Write all files of a configuration except the charts.

    Args:
        folder: Folder to write to. It is created if necessary, and existing files are replaced.
        result, records, sums: Result to write, and the records and sums of the images.
        palette: Color of each class, uint8 (C, 3).
        about: Additional content of `metrics.json`.
        sample: Function that returns the image, label and prediction of a row of the records, for `worst.png` and
            `best.png`. It is called for a few rows, one after the other.
    """
    folder.mkdir(exist_ok=True)
    runs.write_text(folder / PREDICTIONS, _predictions(records, sums), "surrogateescape")
    runs.write_text(folder / CONFUSION, _confusion(records))
    header = ["index", "class", "name", "images", "labeled", "predicted", "iou", "iou_low", "iou_high", "acc"]
    rows = [
        [
            *(c.index, c.id, c.name, c.images, c.labeled, c.predicted),
            *map(_cell, (c.iou, *c.iou_interval, c.acc)),
            *(c.mistaken_for, _cell(c.mistaken)),
        ]
        for c in result.per_class
    ]
    runs.write_text(folder / PER_CLASS, csv_text([[*header, "mistaken_for", "mistaken"], *rows]))
    (scored,) = np.nonzero(~np.isnan(sums.miou))
    order = scored[np.lexsort((sums.aacc[scored], sums.miou[scored]))]
    names = [named.name for named in records.classes]
    for file, chosen, which in ((WORST, order[:_SHOWN], "lowest"), (BEST, order[::-1][:_SHOWN], "highest")):
        title = f"the {len(chosen)} of {counted(result.images, 'image')} with the {which} mIoU"
        images = _label_rows(chosen, records, sums, sample)
        runs.write_bytes(folder / file, png(label_grid(images, title, names, palette)))
    runs.write_json(folder / METRICS, dataclasses.asdict(result) | dict(about))  # last, as it marks a complete result


def _label_rows(
    chosen: np.ndarray, records: Records, sums: Sums, sample: Callable[[int], Sample]
) -> Iterator[LabelRow]:
    """Yield the rows of a grid. Images that can no longer be read are left out."""
    for row in map(int, chosen):
        try:
            found = sample(row)
        except (OSError, BadImages):
            continue
        scores = f"mIoU {sums.miou[row]:.1f}%, pixel accuracy {sums.aacc[row]:.1f}%"
        yield LabelRow(f"{records.names[row]}: {scores}", found.image, found.label, found.prediction)


def _cell(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.4f}"


def _predictions(records: Records, sums: Sums) -> str:
    rows: list[list[object]] = [["path", "image", "label", "miou", "aacc", "labeled", "correct"]]
    for row, identity in enumerate(zip(records.names, records.digests, records.labels, strict=True)):
        scores = [_cell(sums.miou[row]), _cell(sums.aacc[row]), int(sums.labeled[row]), int(sums.correct[row])]
        rows.append([*identity, *scores])
    return csv_text(rows)


def _confusion(records: Records) -> str:
    rows: list[Sequence[object]] = [("row", "label", "predicted", "pixels")]
    for row, content in enumerate(records.encoded):
        rows += [(row, *pair) for pair in metrics.decode(content).tolist()]
    return csv_text(rows)


@dataclasses.dataclass(frozen=True)
class SavedCounts(SavedResult):
    """A result that was read from its folder. `truth` has the first digits of the SHA-256 of each label map.

    Attributes:
        pairs: Array of `fcvit.metrics.segmentation.PAIR` of each image.
    """

    pairs: tuple[np.ndarray, ...]


def read_result(folder: Path) -> SavedCounts:
    """Read the result in a folder, or the only result of a run.

    Images are sorted by the SHA-256 of their content, then by label and path.

    Raises:
        UnreadableFile: The folder does not contain a finished result, or its files are damaged.
        UsageError: The run contains several results.
    """
    folder = result_folder(folder)
    figures = read_metrics(folder)
    with reading(folder / METRICS):
        classes = [(row["index"], row["id"], row["name"]) for row in figures["per_class"]]
        if [index for index, *_ in classes] != list(range(figures["classes"])):
            raise ValueError(f"{len(classes)} rows for {figures['classes']} classes")
    with reading(folder / PREDICTIONS) as path:
        rows = [(row["image"], row["label"], csv_value(row["path"])) for row in read_csv(path)]
        if not rows or figures["images"] != len(rows):
            raise ValueError(f"{len(rows)} rows for {figures['images']} images")
    with reading(folder / CONFUSION) as path:
        pairs = _read_confusion(path, len(rows), len(classes))
        labeled = sum(int(each["pixels"][each["label"] < len(classes)].sum()) for each in pairs)
        if labeled != figures["pixels"]:
            raise ValueError(f"{labeled} labeled pixels, expected {figures['pixels']}")
    order = sorted(range(len(rows)), key=rows.__getitem__)
    images, labels, names = zip(*(rows[row] for row in order), strict=True)
    return SavedCounts(folder, figures, names, images, labels, tuple(pairs[row] for row in order))


def _read_confusion(path: Path, images: int, classes: int) -> list[np.ndarray]:
    """Read the pairs of each image from `confusion.csv`.

    Raises:
        ValueError, KeyError, TypeError: The file is damaged.
    """
    table: list[list[tuple[int, int, int]]] = [[] for _ in range(images)]
    for row in read_csv(path):
        image, label, predicted, pixels = (int(row[key]) for key in ("row", "label", "predicted", "pixels"))
        if not (0 <= image < images and 0 <= label < 256 and 0 <= predicted < classes and 0 < pixels < 1 << 32):
            raise ValueError(f"row {image}, label {label}, class {predicted}, {pixels} pixels are out of range")
        table[image].append((label, predicted, pixels))
    return [np.array(pairs, metrics.PAIR) for pairs in table]
