"""Compute the results of a segmentation evaluation from all records, in the order of the data set."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fcvit.data.classes import Classes
from fcvit.errors import counted
from fcvit.evaluation.published import Validation
from fcvit.evaluation.report import EvaluationReport, published_cells, published_columns
from fcvit.evaluation.settings import Configuration
from fcvit.metrics import segmentation as metrics
from fcvit.tasks.base import Evaluated
from fcvit.tasks.segmentation import page, results
from fcvit.tasks.segmentation.published import compare_with_published
from fcvit.tasks.segmentation.results import PixelAgreement, Records, Result, Sample, Sums, bounds
from fcvit.text import interval, some

if TYPE_CHECKING:
    from rich.table import Table

    from fcvit.data.loader import Dataset


class LabeledData(Protocol):
    """The attributes of the evaluator that the report uses.

    Attributes:
        dataset: Samples, in the order of the records.
        rule: A readable description of how labels were read.
        classes: Classes of the network.
        palette: RGB color of each class, uint8 (C, 3).
        validation: Kind of the images (see `fcvit.tasks.segmentation.published.validation_of`).
        about: Further information about the data for `metrics.json`.
    """

    dataset: "Dataset"
    rule: str
    classes: Classes
    palette: np.ndarray
    validation: Validation
    about: Mapping[str, Any]

    def sample(self, configuration: Configuration, index: int, /) -> Sample:
        """Return the image at a position in the data set with its label map and its prediction, computed again.

        The journal has only counts. The report calls this for a few images of each configuration, one after the other,
        so that the memory does not depend on the number of images.

        Raises:
            OSError, BadImages: The image can no longer be read.
        """
        ...


class SegmentationReport(EvaluationReport):
    """The results and files of an evaluation of segmentation networks (see `fcvit.tasks.base.Report`).

    Args:
        evaluator: Data and classes.
        evaluated: Records of the dtype `fcvit.tasks.segmentation.results.RECORD`, with the encoded pairs as bytes.

    Attributes:
        records, sums, resampled: Records, sums, and metrics of bootstrap resamples, of each configuration.
    """

    evaluator: LabeledData
    metric = "mIoU"

    def __init__(self, evaluator: LabeledData, evaluated: Evaluated):
        super().__init__(evaluator, evaluated)
        labels = tuple(digest.tobytes().hex() for digest in evaluated.records["label"][:, 0])
        count, rows = range(len(evaluated.configurations)), range(len(self.names))
        encoded = ([evaluated.bytes_of[row, position] for row in rows] for position in count)
        known = (self.names, self.digests, labels)
        self.records = tuple(Records(*known, content, evaluator.classes) for content in encoded)
        self.sums = tuple(map(results.add_up, self.records))
        self.resampled = tuple(
            metrics.figures(metrics.resample(records.counts(), len(rows))) for records in self.records
        )

    def result(self, position: int) -> Result:
        configuration = self.evaluated.configurations[position]
        records, sums, resampled = self.records[position], self.sums[position], self.resampled[position]
        figures, classes = metrics.figures(sums.counts), len(records.classes)
        miou, miou_interval = float(figures.miou), bounds(resampled.miou)
        measured = (self.evaluator.validation, miou, miou_interval, len(records.names))
        return Result(
            **self.common(position),
            pixels=int(sums.labeled.sum()),
            outside=sums.outside,
            classes=classes,
            absent=int(np.isnan(figures.iou).sum()),
            miou=miou,
            macc=float(figures.macc),
            aacc=float(figures.aacc),
            miou_interval=miou_interval,
            macc_interval=bounds(resampled.macc),
            aacc_interval=bounds(resampled.aacc),
            published=compare_with_published(
                configuration.weights.spec.variant, classes, configuration.protocol, *measured
            ),
            per_class=results.class_figures(sums, records.classes, resampled),
            fingerprint=_fingerprint(records),
            hint=_hint(sums, classes),
        )

    def agreement(
        self, position: int, reference: int, names: tuple[str, str], engines: tuple[str, str]
    ) -> PixelAgreement:
        rows = self.evaluated.records[:, position]
        pixels = int(rows["pixels"].sum())
        return PixelAgreement(names, engines, 100 * (pixels - int(rows["differing"].sum())) / pixels)

    def effect(self, before: int, after: int) -> tuple[float, tuple[float, float]]:
        difference = self.results[after].miou - self.results[before].miou
        return difference, bounds(self.resampled[after].miou - self.resampled[before].miou)

    def write_result(self, folder: Path, position: int, about: Mapping[str, Any]) -> None:
        configuration = self.evaluated.configurations[position]

        def sample(row: int) -> Sample:
            return self.evaluator.sample(configuration, int(self.evaluated.index[row]))

        files = (self.records[position], self.sums[position], self.evaluator.palette, about, sample)
        results.write_result(folder, self.results[position], *files)

    def write_page(self, folder: Path, about: Mapping[str, Any]) -> None:
        page.write_page(self, folder, about)

    def tables(self) -> "Iterator[Table]":
        """Yield tables of the metrics and published figures, of the classes, and of protocols and engines."""
        from fcvit.report.tables import SHOWN, table

        printed = metrics.printed
        figures = ("images", "mIoU (%)", "95% CI", "mAcc (%)", "aAcc (%)")
        published = published_columns(self.results, "published (%)")
        result = table("configuration", *figures, *published, right=(*figures, "published (%)"))
        about = table()
        for row in self.results:
            scores = (printed(row.miou), interval(row.miou_interval), printed(row.macc), printed(row.aacc))
            result.add_row(row.name, f"{row.images:,}", *scores, *published_cells(row, published))
            computed = f"engine {row.engine} ({row.device}), {row.precision}, batch size {row.batch_size}"
            about.add_row(row.name, f"protocol {row.protocol.name}, {computed}")
            present = f"{row.classes - row.absent:,} of {counted(row.classes, 'class')} in the mean"
            about.add_row("", f"{present}, {counted(row.pixels, 'labeled pixel')}")
            for note in self.notes_of(row):
                about.add_row("", note)
        yield result
        yield about
        for row in self.results:
            columns = ("IoU (%)", "95% CI", "accuracy (%)", "labeled pixels")
            ranked = sorted(row.per_class, key=lambda c: (-c.labeled, c.index))
            rows = [
                (c.name, *page.scores(c.iou, c.iou_interval, c.acc), f"{c.labeled:,}" if c.labeled else "no pixels")
                for c in ranked
            ]
            title = f"{row.name}: classes, most labeled pixels first"
            more = ("... and {} more in per_class.csv", "", "", "", "")
            yield table("class", *columns, rows=rows, title=title, right=columns, limit=SHOWN, more=more)
        yield from self.comparison_tables()


def _hint(sums: Sums, classes: int) -> str:
    """Return a warning about likely errors in the labels, or an empty string."""
    if sums.outside:
        return (
            f"{counted(sum(sums.outside.values()), 'pixel')} have labels that are not one of the {classes} classes "
            f"({some(sums.outside)}) and count as wrong predictions; check the class list and the ignore index"
        )
    shift = metrics.shift_of_labels(sums.matrix)
    if not shift:
        return ""
    high = "high; the label maps may count from 1 (reduce_zero_label), or begin with a background class"
    low = "low; reduce_zero_label may be set for label maps that count from 0"
    return f"the labels seem to be one too {high if shift == 1 else low}"


def _fingerprint(records: Records) -> str:
    """Return the SHA-256 of all image and label contents. Names and order do not change it."""
    pairs = sorted(f"{digest} {label}" for digest, label in zip(records.digests, records.labels, strict=True))
    return hashlib.sha256("\n".join(pairs).encode()).hexdigest()
