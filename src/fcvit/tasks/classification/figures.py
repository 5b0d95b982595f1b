"""Compute the results of a classifier evaluation from all records, in the order of the data set."""

import collections
import dataclasses
import hashlib
import io
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fcvit.data.transforms.preprocess import decode
from fcvit.errors import MissingExtra, counted
from fcvit.evaluation.settings import Configuration
from fcvit.metrics import classification as metrics
from fcvit.tasks.base import Evaluated
from fcvit.tasks.classification import page, results
from fcvit.tasks.classification.published import compare_with_published
from fcvit.tasks.classification.results import EFFECTS, Agreement, Effect, Real, Records, Result

if TYPE_CHECKING:
    from rich.table import Table

    from fcvit.tasks.classification.evaluation import ClassificationEvaluator

logger = logging.getLogger("fcvit")


class ClassificationReport:
    """The results and files of an evaluation of classifiers (see `fcvit.tasks.base.Report`).

    Attributes:
        results, records: Result and records of each configuration.
        agreements: Comparison of each further engine with the first.
        effects: Differences between protocols and between precisions.
        hints: Warnings about a likely wrong order of the classes.
    """

    def __init__(self, evaluator: "ClassificationEvaluator", evaluated: Evaluated):
        self.evaluator, self.evaluated = evaluator, evaluated
        names = tuple(evaluator.dataset.names[index] for index in evaluated.index)
        digests = tuple(digest.tobytes().hex() for digest in evaluated.digests)
        truth, classes = evaluator.labels[evaluated.index], evaluator.candidates
        self.records = tuple(
            Records(names, digests, truth, part["rank"], part["loss"], part["top"], part["probability"], classes)
            for part in evaluated.records.T
        )
        self.results = tuple(self._result(position) for position in range(len(self.records)))
        self.agreements, self.effects = tuple(self._agreements()), tuple(self._effects())
        self.hints = [result.hint for result in self.results if result.hint]

    def _result(self, position: int) -> Result:
        configuration, records = self.evaluated.configurations[position], self.records[position]
        evaluator, evaluated = self.evaluator, self.evaluated
        count, left_out, k = len(records.names), len(evaluated.left_out), evaluator.k
        right, in_k, classes = int(records.correct.sum()), int((records.rank < k).sum()), len(evaluator.columns)
        top1, interval = metrics.share(right, count), metrics.wilson(right, count)
        weights, protocol = configuration.weights, configuration.protocol
        return Result(
            name=configuration.name,
            weights=str(weights.source.path),
            weights_sha256=weights.source.sha256,
            network=str(weights.spec),
            engine=configuration.engine,
            device=evaluated.devices[position],
            precision=configuration.precision,
            batch_size=evaluated.batch_size,
            protocol=protocol,
            images=count,
            unreadable=left_out,
            classes=classes,
            top1=top1,
            top_k=metrics.share(in_k, count),
            k=k,
            top1_interval=interval,
            top_k_interval=metrics.wilson(in_k, count),
            loss=float(records.loss.mean()),
            calibration=metrics.calibration(records.probability[:, 0], records.correct),
            real=self._real(records),
            published=compare_with_published(
                weights.spec.variant, classes, protocol, evaluator.validation, top1, interval, count, left_out
            ),
            per_class=results.class_figures(records, k),
            fingerprint=_fingerprint(records),
            hint=self._hint(records),
            seconds=evaluated.seconds[position],
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

    def _agreements(self) -> Iterator[Agreement]:
        """Compare each further engine or precision with the first one for the same weights and protocol."""
        rows, configurations = self.evaluated.records, self.evaluated.configurations
        for position, configuration in enumerate(configurations):
            if configuration.reference is None:
                continue
            reference = configurations[configuration.reference]
            part, other = rows[:, position], rows[:, configuration.reference]
            same = int((part["top"][:, 0] == other["top"][:, 0]).sum())
            yield Agreement(
                (reference.name, configuration.name),
                (self._computed(reference), self._computed(configuration)),
                metrics.share(same, len(rows)),
                float(part["largest"].max()),
                float(part["total"].sum() / (len(rows) * len(self.evaluator.columns))),
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
                    paired = metrics.paired(self.records[before].correct, self.records[after].correct)
                    names = (earlier.name, later.name)
                    yield Effect(differing[0], names, paired.difference, paired.interval, paired.p_value)

    def write(self, folder: Path) -> None:
        """Write the folder of each configuration, then the charts and the report page."""
        dataset = self.evaluator.dataset
        locations = dict(zip(dataset.names, dataset.locations, strict=True))

        def read(name: str) -> Image.Image:
            return decode(io.BytesIO(locations[name].read()), name)

        about = self._about()
        for result, records in zip(self.results, self.records, strict=True):
            best = [records.classes[index] for index in np.unique(records.top[:, 0])]
            results.write_result(folder / result.name, result, records, about | {"predicted": dict(best)}, read)
        try:
            page.write_page(folder, self.results, self.records, self.agreements, self.effects, about)
        except MissingExtra as error:
            again = f"fcvit resume {shlex.quote(str(folder))}"
            logger.info(f"charts and {results.PAGE} were not written: {error}, then run: {again}")

    def _about(self) -> dict[str, Any]:
        """Return the information about the run that the files contain in addition to the metrics."""
        evaluator, options = self.evaluator, self.evaluator.options
        return dict(self.evaluated.about) | {
            "list": results.file_and_hash(options.list_file),
            "rule": evaluator.rule,
            "mapping": dict(evaluator.dataset.mapping),
            "subset": options.subset and {"images": options.subset, "seed": options.seed or 0},
            "model_classes": len(evaluator.classes),
            "class_list": results.file_and_hash(options.classes),
            "class_subset": results.file_and_hash(options.class_subset),
            "real_labels": results.file_and_hash(options.real),
            "left_out": [{"path": name, "reason": reason} for name, reason in self.evaluated.left_out],
        }

    def to_json(self) -> dict[str, Any]:
        parts = {"results": self.results, "agreements": self.agreements, "effects": self.effects}
        return {name: [dataclasses.asdict(row) for row in rows] for name, rows in parts.items()}

    def tables(self) -> "Iterator[Table]":
        """Yield tables of accuracies and published figures, effects of protocols, and agreement of engines."""
        from fcvit.report.tables import interval, table

        k = self.results[0].k
        figures = ("images", "top-1 (%)", "95% CI", *([f"top-{k} (%)"] if k > 1 else []), "loss", "ECE")
        real = ("ReaL (%)",) if self.results[0].real else ()
        published = ("published (%)", "comparison") if any(row.published for row in self.results) else ()
        result = table("configuration", *figures, *real, *published, right=(*figures, *real, "published (%)"))
        about = table()
        for row in self.results:
            cells = [str(row.images), f"{row.top1:.2f}", interval(row.top1_interval)]
            cells += [f"{row.top_k:.2f}"] if k > 1 else []
            cells += [f"{row.loss:.4f}", f"{row.calibration.error:.4f}"]
            cells += [f"{row.real.top1:.2f}"] if row.real else []
            if published:
                cells += [f"{row.published.figure:.1f}", row.published.verdict] if row.published else ["", ""]
            result.add_row(row.name, *cells)
            chosen = row.protocol.preprocessing
            pixels = f"resize {chosen.resize} {chosen.interpolation}, crop {chosen.input_size}"
            changed = "".join(f", {field} {own} for {usual}" for field, (usual, own) in row.protocol.changed.items())
            computed = f"engine {row.engine} ({row.device}), {row.precision}"
            about.add_row(row.name, f"protocol {row.protocol.name}: {pixels}{changed}, {computed}")
            about.add_row("", f"{counted(row.classes, 'candidate class')}, batch size {row.batch_size}")
            if row.hint:
                about.add_row("", row.hint)
            if row.unreadable:
                about.add_row("", f"{counted(row.unreadable, 'unreadable image')} excluded")
            if row.published:
                about.add_row("", f"published by {row.published.whose}: {row.published.reason}")
        yield result
        yield about
        for effect in self.effects:
            pair = table(title=f"effect of the {effect.of} on top-1 accuracy, same images")
            earlier, later = effect.configurations
            pair.add_row(f"{later} minus {earlier}", f"{effect.difference:+.2f} percentage points")
            pair.add_row("95% confidence interval", interval(effect.interval))
            pair.add_row("exact McNemar test", f"p = {effect.p_value:.2g}")
            yield pair
        for both in self.agreements:
            pair = table(title=f"agreement of {both.engines[0]} and {both.engines[1]}, same images")
            pair.add_row("same top-1 prediction", f"{both.top1_agreement:.2f}%")
            pair.add_row("largest logit difference", f"{both.max_difference:.2e}")
            pair.add_row("mean logit difference", f"{both.mean_difference:.2e}")
            yield pair


def _fingerprint(records: Records) -> str:
    """Return the SHA-256 of all image contents and classes. Names and order do not change it."""
    ids = [records.classes[label].id for label in records.truth]
    pairs = sorted(f"{digest} {name}" for digest, name in zip(records.digests, ids, strict=True))
    return hashlib.sha256("\n".join(pairs).encode("utf-8", "surrogatepass")).hexdigest()
