"""Compute the results of a classifier evaluation from all records, in the order of the data set."""

import bisect
import collections
import hashlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fcvit.data.transforms.preprocess import decode
from fcvit.errors import counted
from fcvit.evaluation.report import EvaluationReport, published_cells, published_columns
from fcvit.metrics import classification as metrics
from fcvit.tasks.base import Evaluated
from fcvit.tasks.classification import page, results
from fcvit.tasks.classification.published import compare_with_published
from fcvit.tasks.classification.results import LogitAgreement, Real, Records, Result
from fcvit.text import interval

if TYPE_CHECKING:
    from rich.table import Table

    from fcvit.tasks.classification.evaluation import ClassificationEvaluator


class ClassificationReport(EvaluationReport):
    """The results and files of an evaluation of classifiers (see `fcvit.tasks.base.Report`).

    Attributes:
        records: Records of each configuration.
    """

    evaluator: "ClassificationEvaluator"
    metric = "top-1 accuracy"

    def __init__(self, evaluator: "ClassificationEvaluator", evaluated: Evaluated):
        super().__init__(evaluator, evaluated)
        truth, classes = evaluator.labels[evaluated.index], evaluator.candidates
        self.records = tuple(
            Records(
                self.names, self.digests, truth, part["rank"], part["loss"], part["top"], part["probability"], classes
            )
            for part in evaluated.records.T
        )

    def result(self, position: int) -> Result:
        configuration, records = self.evaluated.configurations[position], self.records[position]
        evaluator, left_out, k = self.evaluator, len(self.evaluated.left_out), self.evaluator.k
        right, in_k, classes = int(records.correct.sum()), int((records.rank < k).sum()), len(evaluator.columns)
        count, variant, protocol = len(records.names), configuration.weights.spec.variant, configuration.protocol
        top1, bounds = metrics.share(right, count), metrics.wilson(right, count)
        return Result(
            **self.common(position),
            classes=classes,
            top1=top1,
            top_k=metrics.share(in_k, count),
            k=k,
            top1_interval=bounds,
            top_k_interval=metrics.wilson(in_k, count),
            loss=float(records.loss.mean()),
            calibration=metrics.calibration(records.probability[:, 0], records.correct),
            real=self._real(records),
            published=compare_with_published(
                variant, classes, protocol, evaluator.validation, top1, bounds, count, left_out
            ),
            per_class=results.class_figures(records, k),
            fingerprint=_fingerprint(records),
            hint=self._hint(records),
        )

    def _real(self, records: Records) -> Real | None:
        if self.evaluator.real is None:
            return None
        best = self.evaluator.columns[records.top[:, 0]]
        answers = [self.evaluator.real[index] for index in self.evaluated.index]
        hits = [int(guess) in answer for guess, answer in zip(best, answers, strict=True) if answer]
        return Real(len(hits), metrics.share(sum(hits), len(hits)), metrics.wilson(sum(hits), len(hits)))

    def _hint(self, records: Records) -> str:
        """Return a warning if the classes seem to be permuted, else an empty string."""
        columns, classes = self.evaluator.columns, self.evaluator.classes
        order = metrics.other_order(columns[records.truth], columns[records.top[:, 0]])
        if order is None:
            return ""
        named = [f"{classes[true].id[:40]} as {classes[answer].id[:40]}" for true, answer in order.moved.items()]
        examples = ", ".join(named[:5]) + (", ..." if len(named) > 5 else "")
        if not order.all:
            return (
                f"{len(order.moved)} classes seem to be permuted: {order.explained:.0f}% of their images are predicted "
                f"as another of these classes ({examples}); check that the class list is in the model's order"
            )
        steps = collections.Counter(answer - true for true, answer in order.moved.items())
        step, times = steps.most_common(1)[0]
        shift = {-1: "the labels may count from 1: ", 1: "the labels may be too low by 1: "}.get(step, "")
        return (
            f"the classes seem to be permuted: another order explains {order.explained:.0f}% of the predictions "
            f"({examples}); {shift if times > 0.8 * len(named) else ''}pass the class list in the model's order with "
            "--classes FILE, or correct the labels"
        )

    def agreement(
        self, position: int, reference: int, names: tuple[str, str], engines: tuple[str, str]
    ) -> LogitAgreement:
        rows = self.evaluated.records
        part, other = rows[:, position], rows[:, reference]
        same = int((part["top"][:, 0] == other["top"][:, 0]).sum())
        mean = float(part["total"].sum() / (len(rows) * len(self.evaluator.columns)))
        return LogitAgreement(names, engines, metrics.share(same, len(rows)), float(part["largest"].max()), mean)

    def effect(self, before: int, after: int) -> tuple[float, tuple[float, float], float]:
        paired = metrics.paired(self.records[before].correct, self.records[after].correct)
        return paired.difference, paired.interval, paired.p_value

    def write_result(self, folder: Path, position: int, about: Mapping[str, Any]) -> None:
        dataset, records = self.evaluator.dataset, self.records[position]

        def read(name: str) -> Image.Image:
            location = dataset.locations[bisect.bisect_left(dataset.names, name)]
            return decode(io.BytesIO(location.read()), name)

        predicted = dict(records.classes[index] for index in np.unique(records.top[:, 0]))
        results.write_result(folder, self.results[position], records, {**about, "predicted": predicted}, read)

    def write_page(self, folder: Path, about: Mapping[str, Any]) -> None:
        page.write_page(self, folder, about)

    def tables(self) -> "Iterator[Table]":
        """Yield tables of accuracies and published figures, effects of protocols, and agreement of engines."""
        from fcvit.report.tables import table

        k = self.results[0].k
        figures = ("images", "top-1 (%)", "95% CI", *([f"top-{k} (%)"] if k > 1 else []), "loss", "ECE")
        real = ("ReaL (%)",) if self.results[0].real else ()
        published = published_columns(self.results, "published (%)")
        result = table("configuration", *figures, *real, *published, right=(*figures, *real, "published (%)"))
        about = table()
        for row in self.results:
            cells = [str(row.images), f"{row.top1:.2f}", interval(row.top1_interval)]
            cells += [f"{row.top_k:.2f}"] if k > 1 else []
            cells += [f"{row.loss:.4f}", f"{row.calibration.error:.4f}"]
            cells += [f"{row.real.top1:.2f}"] if row.real else []
            result.add_row(row.name, *cells, *published_cells(row, published))
            chosen = row.protocol.preprocessing
            pixels = f"resize {chosen.resize} {chosen.interpolation}, crop {chosen.input_size}"
            changed = "".join(f", {field} {own} for {usual}" for field, (usual, own) in row.protocol.changed.items())
            computed = f"engine {row.engine} ({row.device}), {row.precision}"
            about.add_row(row.name, f"protocol {row.protocol.name}: {pixels}{changed}, {computed}")
            about.add_row("", f"{counted(row.classes, 'candidate class')}, batch size {row.batch_size}")
            for note in self.notes_of(row):
                about.add_row("", note)
        yield result
        yield about
        yield from self.comparison_tables()


def _fingerprint(records: Records) -> str:
    """Return the SHA-256 of all image contents and classes. Names and order do not change it."""
    ids = [records.classes[label].id for label in records.truth]
    pairs = sorted(f"{digest} {name}" for digest, name in zip(records.digests, ids, strict=True))
    return hashlib.sha256("\n".join(pairs).encode("utf-8", "surrogatepass")).hexdigest()
