"""Compute the results of a detection evaluation from all records, in the order of the data set."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fcvit import run_folder as runs
from fcvit.errors import counted
from fcvit.evaluation.report import EvaluationReport, published_cells, published_columns
from fcvit.evaluation.results import METRICS
from fcvit.metrics.detection import Detections, Figures, entries, evaluate, matches
from fcvit.tasks.base import Evaluated
from fcvit.tasks.detection import page, pictures, results
from fcvit.tasks.detection.published import compare_with_published
from fcvit.tasks.detection.results import DETECTIONS, DetectionAgreement, Result

if TYPE_CHECKING:
    from rich.table import Table

    from fcvit.tasks.detection.evaluation import DetectionEvaluator


class Outcome(NamedTuple):
    """The detections of a configuration in each image, and their metrics: of boxes, and of masks or None."""

    found: list[Detections]
    box: Figures
    mask: Figures | None


class DetectionReport(EvaluationReport):
    """The results and files of an evaluation of detectors (see `fcvit.tasks.base.Report`).

    Attributes:
        targets: Annotated objects of each readable image.
    """

    evaluator: "DetectionEvaluator"

    def __init__(self, evaluator: "DetectionEvaluator", evaluated: Evaluated):
        super().__init__(evaluator, evaluated)
        self.images = evaluator.dataset.take(evaluated.index.tolist())
        self.targets = self.images.targets
        self.metric = "mask AP" if evaluator.with_masks else "box AP"

    @functools.cached_property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Return the detections and the metrics of each configuration."""
        kinds = ("bbox", "segm") if self.evaluator.with_masks else ("bbox",)
        truths = {kind: self.images.ground_truth(kind == "segm") for kind in kinds}
        ids, limit = self.images.category_ids, self.evaluator.network.max_detections
        outcomes = []
        for position in range(len(self.evaluated.configurations)):
            found = [results.decode(self.evaluated.bytes_of[row, position]) for row in range(len(self.names))]
            figures = {
                kind: evaluate(truths[kind], entries(found, self.images.ids, ids, kind), ids, kind, limit)
                for kind in kinds
            }
            outcomes.append(Outcome(found, figures["bbox"], figures.get("segm")))
        return tuple(outcomes)

    def result(self, position: int) -> Result:
        found, box, mask = self.outcomes[position]
        classes, spec = self.evaluator.classes, self.evaluated.configurations[position].weights.spec
        per_class = results.class_figures(self.targets, found, classes, box, mask)
        aps = (box.ap, math.nan if mask is None else mask.ap)
        known = (spec.variant, len(classes), self.evaluator.validation, len(self.names))
        published, published_mask = compare_with_published(*known, *aps)
        return Result(
            **self.common(position),
            objects=sum(row.objects for row in per_class),
            detections=sum(len(one.scores) for one in found),
            classes=len(classes),
            absent=sum(not row.objects for row in per_class),
            max_detections=box.max_detections,
            box=box.means,
            mask=mask.means if mask is not None else None,
            published=published,
            published_mask=published_mask,
            per_class=per_class,
            fingerprint=self._fingerprint(),
            hint=next(iter(self.images.hints), ""),
        )

    def _fingerprint(self) -> str:
        """Return the SHA-256 of all image contents and annotations. Names and order do not change it."""
        pairs = sorted(
            f"{digest} {results.annotations_digest(target)}"
            for digest, target in zip(self.digests, self.targets, strict=True)
        )
        return hashlib.sha256("\n".join(pairs).encode()).hexdigest()

    def agreement(
        self, position: int, reference: int, names: tuple[str, str], engines: tuple[str, str]
    ) -> DetectionAgreement:
        rows, before = self.evaluated.records[:, position], self.evaluated.records[:, reference]
        # A detection of only one of the two engines is a difference, whichever has it.
        total = int(np.maximum(rows["detections"], before["detections"]).sum())
        common = 100 * int(rows["agreeing"].sum()) / total if total else 100.0
        return DetectionAgreement(names, engines, common, float(rows["largest"].max(initial=0)))

    def effect(self, before: int, after: int) -> tuple[float, tuple[float, float]]:
        earlier, later = ((one.mask or one.box).ap for one in (self.outcomes[before], self.outcomes[after]))
        return later - earlier, (math.nan, math.nan)

    def found_objects(self, position: int) -> list[np.ndarray]:
        """Return the index of the object that each detection matches, or -1, for each image of a configuration."""
        return [
            matches(one, target.corners(), target.labels, crowd=target.crowd)
            for one, target in zip(self.outcomes[position].found, self.targets, strict=True)
        ]

    def write_result(self, folder: Path, position: int, about: Mapping[str, Any]) -> None:
        folder.mkdir(exist_ok=True)
        result, found = self.results[position], self.outcomes[position].found
        matched = self.found_objects(position)
        rows = [
            (
                results.annotations_digest(target),
                int((~target.crowd).sum()),
                len({index for index in pairs.tolist() if index >= 0 and not target.crowd[index]}),
                len(pairs),
            )
            for target, pairs in zip(self.targets, matched, strict=True)
        ]
        results.write_tables(folder, result, self.names, self.digests, rows)
        for kind, file in DETECTIONS.items():
            if kind == "bbox" or self.evaluator.with_masks:
                listed = entries(found, self.images.ids, self.images.category_ids, kind)
                runs.write_text(folder / file, json.dumps(listed))
        pictures.write_pictures(folder, self, position, matched)
        runs.write_json(folder / METRICS, dataclasses.asdict(result) | dict(about))  # last: it marks a complete result

    def write_page(self, folder: Path, about: Mapping[str, Any]) -> None:
        page.write_page(self, folder, about)

    def tables(self) -> "Iterator[Table]":
        """Yield tables of the metrics and published figures, of the classes, and of precisions and engines."""
        from fcvit.report.tables import SHOWN, table

        figures = ("images", *page.titles(self.results[0]))
        published = published_columns(self.results, "published (%)")
        result = table("configuration", *figures, *published, right=(*figures, "published (%)"))
        about = table()
        for row in self.results:
            cells = (f"{row.images:,}", *page.values(row))
            result.add_row(row.name, *cells, *published_cells(row, published))
            computed = f"engine {row.engine} ({row.device}), {row.precision}"
            about.add_row(row.name, f"protocol {row.protocol.name}, {computed}")
            counts = f"{counted(row.objects, 'object')}, {counted(row.detections, 'detection')}"
            present = f"{row.classes - row.absent:,} of {counted(row.classes, 'class')} in the mean"
            limit = "" if row.max_detections == 100 else f", {row.max_detections} detections per class and image count"
            about.add_row("", f"{counts}, {present}{limit}")
            for note in self.notes_of(row):
                about.add_row("", note)
            if row.published_mask:
                about.add_row("", f"published by {row.published_mask.whose}: {row.published_mask.reason}")
        yield result
        yield about
        for row in self.results:
            columns = page.class_titles(row)
            ranked = sorted(row.per_class, key=lambda c: (-c.objects, c.index))
            rows = [(c.name, f"{c.objects:,}", f"{c.detections:,}", *page.class_values(row, c)) for c in ranked]
            title = f"{row.name}: classes, most objects first"
            more = ("... and {} more in per_class.csv", *[""] * (len(columns) - 1))
            yield table(*columns, rows=rows, title=title, right=columns[1:], limit=SHOWN, more=more)
        yield from self.comparison_tables()
