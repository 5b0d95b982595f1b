"""Compute the results of a segmentation evaluation from all records, in the order of the data set."""

import dataclasses
import functools
import hashlib
import logging
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fcvit.data.classes import Classes
from fcvit.errors import MissingExtra, counted
from fcvit.evaluation.settings import Configuration
from fcvit.metrics import segmentation as metrics
from fcvit.tasks.base import Evaluated
from fcvit.tasks.segmentation import page, results
from fcvit.tasks.segmentation.published import Validation, compare_with_published
from fcvit.tasks.segmentation.results import EFFECTS, Agreement, Effect, Records, Result, Sample, Sums, bounds
from fcvit.text import some

if TYPE_CHECKING:
    from rich.table import Table

    from fcvit.data.loader import Dataset

logger = logging.getLogger("fcvit")


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


class SegmentationReport:
    """The results and files of an evaluation of segmentation networks (see `fcvit.tasks.base.Report`).

    Args:
        evaluator: Data and classes.
        evaluated: Records of the dtype `fcvit.tasks.segmentation.results.RECORD`, with the encoded pairs as bytes.

    Attributes:
        results, records, sums: Result, records and sums of each configuration.
        agreements: Comparison of each further engine with the first.
        effects: Differences between protocols and between precisions.
        hints: Warnings about likely errors in the labels.
    """

    def __init__(self, evaluator: LabeledData, evaluated: Evaluated):
        self.evaluator, self.evaluated = evaluator, evaluated
        names = tuple(evaluator.dataset.names[index] for index in evaluated.index)
        digests, labels = _hex(evaluated.digests), _hex(evaluated.records["label"][:, 0])
        count = range(len(evaluated.configurations))
        self.records = tuple(
            Records(
                names,
                digests,
                labels,
                [evaluated.bytes_of[row, position] for row in range(len(names))],
                evaluator.classes,
            )
            for position in count
        )
        self.sums = tuple(map(results.add_up, self.records))
        self.resampled = tuple(
            metrics.figures(metrics.resample(records.counts(), len(names))) for records in self.records
        )
        self.results = tuple(map(self._result, count))
        self.agreements, self.effects = tuple(self._agreements()), tuple(self._effects())
        self.hints = [result.hint for result in self.results if result.hint]

    def _result(self, position: int) -> Result:
        configuration = self.evaluated.configurations[position]
        records, sums = self.records[position], self.sums[position]
        evaluator, evaluated, resampled = self.evaluator, self.evaluated, self.resampled[position]
        figures, count, classes = metrics.figures(sums.counts), len(records.names), len(records.classes)
        weights, miou, interval = configuration.weights, float(figures.miou), bounds(resampled.miou)
        return Result(
            name=configuration.name,
            weights=str(weights.source.path),
            weights_sha256=weights.source.sha256,
            network=str(weights.spec),
            engine=configuration.engine,
            device=evaluated.devices[position],
            precision=configuration.precision,
            batch_size=evaluated.batch_size,
            protocol=configuration.protocol,
            images=count,
            unreadable=len(evaluated.left_out),
            pixels=int(sums.labeled.sum()),
            outside=sums.outside,
            classes=classes,
            absent=int(np.isnan(figures.iou).sum()),
            miou=miou,
            macc=float(figures.macc),
            aacc=float(figures.aacc),
            miou_interval=interval,
            macc_interval=bounds(resampled.macc),
            aacc_interval=bounds(resampled.aacc),
            published=compare_with_published(
                weights.spec.variant, classes, configuration.protocol, evaluator.validation, miou, interval, count
            ),
            per_class=results.class_figures(sums, records.classes, resampled),
            fingerprint=_fingerprint(records),
            seconds=evaluated.seconds[position],
            hint=_hint(sums, classes),
        )

    def _agreements(self) -> Iterator[Agreement]:
        """Compare each further engine or precision with the first one for the same weights and protocol."""
        rows, configurations = self.evaluated.records, self.evaluated.configurations
        for position, configuration in enumerate(configurations):
            if configuration.reference is None:
                continue
            reference = configurations[configuration.reference]
            pixels, differing = (int(rows[name][:, position].sum()) for name in ("pixels", "differing"))
            yield Agreement(
                (reference.name, configuration.name),
                (self._computed(reference), self._computed(configuration)),
                100 * (pixels - differing) / pixels,
            )

    def _computed(self, configuration: Configuration) -> str:
        """Return the name of the engine, with the precision if there are several precisions."""
        engine, several = configuration.engine, len(self.evaluated.precisions) > 1
        return f"{engine} ({configuration.precision})" if several else engine

    def _effects(self) -> Iterator[Effect]:
        """Compare configurations that differ only in the protocol or only in the precision."""
        configurations = self.evaluated.configurations
        for after, later in enumerate(configurations):
            for before, earlier in enumerate(configurations[:after]):
                if (id(earlier.weights), earlier.engine) != (id(later.weights), later.engine):
                    continue
                differing = [name for name in EFFECTS if getattr(earlier, name) != getattr(later, name)]
                if len(differing) == 1:
                    difference = self.results[after].miou - self.results[before].miou
                    interval = bounds(self.resampled[after].miou - self.resampled[before].miou)
                    yield Effect(differing[0], (earlier.name, later.name), difference, interval)

    def write(self, folder: Path) -> None:
        """Write the folder of each configuration, then the charts and the report page."""
        about = self._about()
        for position, result in enumerate(self.results):
            sample = functools.partial(self._sample, self.evaluated.configurations[position])
            files = (self.records[position], self.sums[position], self.evaluator.palette, about, sample)
            results.write_result(folder / result.name, result, *files)
        try:
            classes = self.evaluator.classes
            page.write_page(folder, self.results, self.sums, classes, self.agreements, self.effects, about)
        except MissingExtra as error:
            again = f"fcvit resume {shlex.quote(str(folder))}"
            logger.info(f"charts and {results.PAGE} were not written: {error}, then run: {again}")

    def _sample(self, configuration: Configuration, row: int) -> Sample:
        return self.evaluator.sample(configuration, int(self.evaluated.index[row]))

    def _about(self) -> dict[str, Any]:
        """Return the information about the run that the files contain in addition to the metrics."""
        left_out = [{"path": name, "reason": reason} for name, reason in self.evaluated.left_out]
        return (
            dict(self.evaluated.about)
            | {"rule": self.evaluator.rule, "left_out": left_out}
            | dict(self.evaluator.about)
        )

    def to_json(self) -> dict[str, Any]:
        parts = {"results": self.results, "agreements": self.agreements, "effects": self.effects}
        return {name: [dataclasses.asdict(row) for row in rows] for name, rows in parts.items()}

    def tables(self) -> "Iterator[Table]":
        """Yield tables of the metrics and published figures, of the classes, and of protocols and engines."""
        from fcvit.report.tables import SHOWN, interval, table

        printed = metrics.printed
        figures = ("images", "mIoU (%)", "95% CI", "mAcc (%)", "aAcc (%)")
        published = ("published (%)", "comparison") if any(row.published for row in self.results) else ()
        result = table("configuration", *figures, *published, right=(*figures, "published (%)"))
        about = table()
        for row in self.results:
            scores = (printed(row.miou), interval(row.miou_interval), printed(row.macc), printed(row.aacc))
            cells = [f"{row.images:,}", *scores]
            if published:
                cells += [f"{row.published.figure:.1f}", row.published.verdict] if row.published else ["", ""]
            result.add_row(row.name, *cells)
            computed = f"engine {row.engine} ({row.device}), {row.precision}, batch size {row.batch_size}"
            about.add_row(row.name, f"protocol {row.protocol.name}, {computed}")
            present = f"{counted(row.classes - row.absent, 'class')} of {row.classes:,} in the mean"
            about.add_row("", f"{present}, {counted(row.pixels, 'labeled pixel')}")
            if row.hint:
                about.add_row("", row.hint)
            if row.unreadable:
                about.add_row("", f"{counted(row.unreadable, 'image')} excluded")
            if row.published:
                about.add_row("", f"published by the authors: {row.published.reason}")
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
        for effect in self.effects:
            pair = table(title=f"effect of the {effect.of} on mIoU, same images")
            earlier, later = effect.configurations
            pair.add_row(f"{later} minus {earlier}", f"{effect.difference:+.2f} percentage points")
            pair.add_row("95% confidence interval", interval(effect.interval))
            yield pair
        for both in self.agreements:
            pair = table(title=f"agreement of {both.engines[0]} and {both.engines[1]}, same images")
            pair.add_row("pixels with the same predicted class", f"{both.pixel_agreement:.4f}%")
            yield pair


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


def _hex(digests: np.ndarray) -> tuple[str, ...]:
    return tuple(digest.tobytes().hex() for digest in digests)


def _fingerprint(records: Records) -> str:
    """Return the SHA-256 of all image and label contents. Names and order do not change it."""
    pairs = sorted(f"{digest} {label}" for digest, label in zip(records.digests, records.labels, strict=True))
    return hashlib.sha256("\n".join(pairs).encode()).hexdigest()
