"""The results of a detection evaluation: records, data classes, result files, and reading them back.

The folder of a configuration (weights, engine, precision) contains `metrics.json`, `per_class.csv`, `predictions.csv`
(one row per image), `detections.bbox.json` and `detections.segm.json` in COCO's format for results,
`false_positives.png`, `misses.png` and `best.png`. With the `report` extra it also contains `precision_recall.png`, and
the run folder contains `report.html`.
"""

import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fcvit import run_folder as runs
from fcvit.data.classes import Classes
from fcvit.data.coco import Instances
from fcvit.evaluation.comparison import SavedResult, read_csv, read_metrics, reading
from fcvit.evaluation.published import PublishedComparison
from fcvit.evaluation.report import Agreement, ConfigurationResult
from fcvit.evaluation.results import METRICS, result_folder
from fcvit.metrics.detection import Detections, Figures, Kind, Precision, matches
from fcvit.text import csv_text, csv_value

PREDICTIONS, PER_CLASS = "predictions.csv", "per_class.csv"
DETECTIONS: dict[Kind, str] = {"bbox": "detections.bbox.json", "segm": "detections.segm.json"}
FALSE_POSITIVES, MISSES, BEST = "false_positives.png", "misses.png", "best.png"
SAME = 0.95
"""IoU from which detections of two engines are the same object."""

RECORD = np.dtype([("detections", "<i4"), ("agreeing", "<i4"), ("largest", "<f8")])
"""The record of an image: its detections, those that the reference also has, and the largest difference of scores."""


def record(found: Detections, reference: Detections | None = None) -> tuple[np.ndarray, bytes]:
    """Return the record of an image, a scalar of `RECORD`, and its encoded detections.

    Args:
        found: Detections in pixels of the original image.
        reference: Detections of the reference configuration, or None for the reference itself.
    """
    result = np.zeros((), RECORD)
    result["detections"] = result["agreeing"] = len(found.scores)
    if reference is not None:
        pairs = matches(found, reference.boxes, reference.labels, SAME)
        both = pairs >= 0
        result["agreeing"] = both.sum()
        if both.any():
            result["largest"] = np.abs(found.scores[both] - reference.scores[pairs[both]]).max()
    return result, encode(found)


def encode(found: Detections) -> bytes:
    """Encode detections as compressed JSON, without a loss."""
    masks = None if found.masks is None else [[*mask["size"], mask["counts"]] for mask in found.masks]
    content = [found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), masks]
    return zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 1)


def decode(content: bytes) -> Detections:
    """Invert `encode`. Numbers are float64."""
    boxes, scores, labels, masks = json.loads(zlib.decompress(content))
    rows = None if masks is None else [{"size": [height, width], "counts": text} for height, width, text in masks]
    return Detections(np.array(boxes, float).reshape(-1, 4), np.array(scores, float), np.array(labels, int), rows)


@dataclasses.dataclass(frozen=True)
class ClassFigures:
    """The metrics of one class.

    Attributes:
        index, id, name: The class.
        images, objects: Number of images with annotated objects, and of these objects, without crowds.
        detections: Number of detections.
        box_ap, box_ap50: AP and AP50 of boxes in percent, or NaN without annotated objects.
        mask_ap, mask_ap50: The same for masks, or NaN without masks.
    """

    index: int
    id: str
    name: str
    images: int
    objects: int
    detections: int
    box_ap: float
    box_ap50: float
    mask_ap: float
    mask_ap50: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(ConfigurationResult):
    """The results of one configuration, with the attributes of `fcvit.evaluation.report.ConfigurationResult`.

    Undefined values are NaN, and null in `metrics.json`.

    Attributes:
        objects: Number of annotated objects, without crowds.
        detections: Number of detections.
        classes, absent: Number of classes, and of those without annotated objects, which have no AP.
        max_detections: Number of detections of a class in an image that count, the most confident ones.
        box: Metrics of boxes.
        mask: Metrics of masks, or None for a network or annotations without masks.
        published_mask: Comparison with the published mask AP, or None. `published` is that of the box AP.
        per_class: Metrics of each class.
    """

    objects: int
    detections: int
    classes: int
    absent: int
    max_detections: int
    box: Precision
    mask: Precision | None
    published_mask: PublishedComparison | None
    per_class: tuple[ClassFigures, ...]

    @property
    def box_ap(self) -> float:
        return self.box.ap

    @property
    def mask_ap(self) -> float:
        return math.nan if self.mask is None else self.mask.ap


@dataclasses.dataclass(frozen=True)
class DetectionAgreement(Agreement):
    """Agreement of two engines: detections of both engines in percent, and the largest difference of their scores."""

    COLUMNS: ClassVar = {
        "common": (f"detections of both (%, same class, IoU of at least {SAME})", ".3f"),
        "largest": ("largest score difference", ".2e"),
    }

    common: float
    largest: float


def class_figures(
    targets: Sequence[Instances], found: Sequence[Detections], classes: Classes, box: Figures, mask: Figures | None
) -> tuple[ClassFigures, ...]:
    """Return the metrics of each class.

    Args:
        targets: Annotated objects of each image.
        found: Detections in each image.
        classes: Classes of the network.
        box, mask: Metrics of boxes and of masks.
    """
    count = len(classes)
    labels = [target.labels[~target.crowd] for target in targets]
    objects = np.bincount(np.concatenate([*labels, np.zeros(0, int)]), minlength=count)
    images = np.bincount(np.concatenate([*map(np.unique, labels), np.zeros(0, int)]), minlength=count)
    detections = np.bincount(np.concatenate([*(one.labels for one in found), np.zeros(0, int)]), minlength=count)
    unknown = np.full(count, np.nan)
    aps = (box.class_ap, box.class_ap50, *((mask.class_ap, mask.class_ap50) if mask else (unknown, unknown)))
    return tuple(
        ClassFigures(
            *(index, named.id, named.name),
            *(int(values[index]) for values in (images, objects, detections)),
            *(float(values[index]) for values in aps),
        )
        for index, named in enumerate(classes)
    )


def write_tables(folder: Path, result: Result, names: Sequence[str], digests: Sequence[str], rows: Any) -> None:
    """Write `predictions.csv` and `per_class.csv`.

    Args:
        folder: Folder of the configuration.
        result: Its result.
        names, digests: Name and digest of each image.
        rows: Digest of the annotations, annotated objects, found objects and detections of each image.
    """
    header = ("path", "image", "annotations", "objects", "found", "detections")
    lines = [(name, digest, *row) for name, digest, row in zip(names, digests, rows, strict=True)]
    runs.write_text(folder / PREDICTIONS, csv_text([header, *lines]), "surrogateescape")
    fields = [field.name for field in dataclasses.fields(ClassFigures)]
    cells = [[_cell(value) for value in dataclasses.astuple(row)] for row in result.per_class]
    runs.write_text(folder / PER_CLASS, csv_text([fields, *cells]))


def _cell(value: object) -> object:
    return ("" if math.isnan(value) else f"{value:.4f}") if isinstance(value, float) else value


def annotations_digest(target: Instances) -> str:
    """Return the first digits of the SHA-256 of the boxes, labels and crowd marks of an image."""
    content = b"".join(array.tobytes() for array in (target.boxes, target.labels, target.crowd))
    return hashlib.sha256(repr(target.size).encode() + content).hexdigest()[:16]


def read_result(folder: Path) -> SavedResult:
    """Read the result in a folder, or the only result of a run. `truth` has the digest of the annotations.

    Images are sorted by the SHA-256 of their content, then by annotations and path.

    Raises:
        UnreadableFile: The folder does not contain a finished result, or its files are damaged.
        UsageError: The run contains several results.
    """
    folder = result_folder(folder)
    figures = read_metrics(folder)
    with reading(folder / METRICS):
        for row in figures["per_class"]:
            for name in ("id", "name", "objects", "box_ap", "mask_ap"):
                _ = row[name]
        _ = figures["box"]["ap"], figures["mask"] and figures["mask"]["ap"]
    with reading(folder / PREDICTIONS) as path:
        rows = sorted((row["image"], row["annotations"], csv_value(row["path"])) for row in read_csv(path))
        if not rows or figures["images"] != len(rows):
            raise ValueError(f"{len(rows)} rows for {figures['images']} images")
    images, truth, names = zip(*rows, strict=True)
    return SavedResult(folder, figures, names, images, truth)
