"""The parts of an evaluation report that are the same for all tasks: results, comparisons, files and the page."""

import abc
import dataclasses
import functools
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fcvit import run_folder as runs
from fcvit.errors import MissingExtra, counted
from fcvit.evaluation.protocols import Protocol
from fcvit.evaluation.published import PublishedComparison
from fcvit.evaluation.settings import Configuration
from fcvit.report import page
from fcvit.report.page import Listing, Page, Section
from fcvit.tasks.base import Evaluated
from fcvit.text import interval

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger("fcvit")

PAGE = "report.html"
_SETTINGS = ("protocol", "precision")
_ENGINES = "agreement of {1} and {0}, same images"
_EFFECT = "effect of the {} on {}, same images"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigurationResult:
    """The part of a result that does not depend on the task.

    Attributes:
        name: Name of the configuration and its folder.
        weights, weights_sha256, network: Path, SHA-256 and description of the evaluated weights.
        engine, device, precision, batch_size: Engine, device, precision and batch size of the computation.
        protocol: Preprocessing protocol.
        images, unreadable: Number of evaluated images, and of unreadable images, which are excluded.
        published: Comparison with the published figure, or None if there is none.
        fingerprint: SHA-256 of the contents and labels of the images. It does not depend on their names and order.
        seconds: Computing time of the engine over all processes, without image decoding.
        hint: Warning about likely errors in the labels, or an empty string.
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
    published: PublishedComparison | None
    fingerprint: str
    seconds: float
    hint: str = ""

    def facts(self, preprocessing: str = "") -> Iterator[tuple[str, str]]:
        """Yield names and values for the report page: warning, published figure, protocol, network, weights, engine.

        Args:
            preprocessing: Text after the name of the protocol.
        """
        if self.hint:
            yield "Warning", self.hint
        if self.published:
            yield f"Published by {self.published.whose}", self.published.text
        yield "Protocol", self.protocol.name + preprocessing
        for field, (usual, own) in self.protocol.changed.items():
            yield "Changed preprocessing", f"{field}: {own} (variant: {usual})"
        yield "Network", self.network
        yield "Weights", f"{Path(self.weights).name}, SHA-256 {self.weights_sha256}"
        yield "Engine", f"{self.engine} on {self.device}, {self.precision}, batch size {self.batch_size}"


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement of two engines or precisions on the same images.

    Attributes:
        configurations: Names of the two configurations.
        engines: Names of the two engines, with the precision if there are several.
    """

    COLUMNS: ClassVar[Mapping[str, tuple[str, str]]]
    """Title and number format of each further field."""

    configurations: tuple[str, str]
    engines: tuple[str, str]

    def figures(self) -> Iterator[tuple[str, str]]:
        """Yield the title and the value of each figure as text."""
        for name, (title, form) in self.COLUMNS.items():
            yield title, format(getattr(self, name), form)


@dataclasses.dataclass(frozen=True)
class Effect:
    """The effect of the protocol or the precision on a metric, for the same weights, engine and images.

    Attributes:
        of: The setting that differs between the two configurations, "protocol" or "precision".
        configurations: Names of the two configurations.
        difference, interval: Second minus first value and its 95% confidence interval, in percentage points. The
            interval is NaN if the task has none.
        p_value: p-value of the exact McNemar test, or None for a task to which it does not apply.
    """

    of: str
    configurations: tuple[str, str]
    difference: float
    interval: tuple[float, float]
    p_value: float | None = None

    @property
    def names(self) -> str:
        return f"{self.configurations[1]} minus {self.configurations[0]}"


class EvaluationReport(abc.ABC):
    """The results and files of an evaluation (see `fcvit.tasks.base.Report`).

    Args:
        evaluator: Evaluator of the task.
        evaluated: All records.

    Attributes:
        metric: Name of the metric in titles.
        names, digests: Name, and first hexadecimal digits of the SHA-256 of the file, of each readable image.
        results: Result of each configuration.
        agreements: Comparison of each further engine or precision with the first, same weights and protocol.
        effects: Comparison of configurations that differ only in the protocol or only in the precision.
        hints: Warnings about likely errors in the labels.
    """

    metric: str

    def __init__(self, evaluator: Any, evaluated: Evaluated):
        self.evaluator, self.evaluated = evaluator, evaluated
        self.names = tuple(evaluator.dataset.names[index] for index in evaluated.index)
        self.digests = tuple(digest.tobytes().hex() for digest in evaluated.digests)

    @abc.abstractmethod
    def result(self, position: int) -> Any:
        """Return the result of a configuration."""

    @abc.abstractmethod
    def agreement(self, position: int, reference: int, names: tuple[str, str], engines: tuple[str, str]) -> Agreement:
        """Compare a configuration with its reference. The last two arguments are the fields of `Agreement`."""

    @abc.abstractmethod
    def effect(self, before: int, after: int) -> tuple[Any, ...]:
        """Return the last fields of `Effect`, from `difference` on, for two configurations."""

    @abc.abstractmethod
    def write_result(self, folder: Path, position: int, about: Mapping[str, Any]) -> None:
        """Write all files of a configuration except the charts."""

    @abc.abstractmethod
    def write_page(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write the charts of each configuration and the report page.

        Raises:
            MissingExtra: The `report` extra is not installed.
        """

    @functools.cached_property
    def results(self) -> tuple[Any, ...]:
        return tuple(map(self.result, range(len(self.evaluated.configurations))))

    @functools.cached_property
    def agreements(self) -> tuple[Agreement, ...]:
        configurations = self.evaluated.configurations
        pairs = ((position, each.reference) for position, each in enumerate(configurations))
        return tuple(
            self.agreement(position, reference, *self._named(configurations[reference], configurations[position]))
            for position, reference in pairs
            if reference is not None
        )

    def _named(self, *pair: Configuration) -> tuple[tuple[str, str], tuple[str, str]]:
        """Return the names of two configurations and of their engines, with the precision if there are several."""
        several = len(self.evaluated.precisions) > 1
        first, second = (f"{each.engine} ({each.precision})" if several else each.engine for each in pair)
        return (pair[0].name, pair[1].name), (first, second)

    @functools.cached_property
    def effects(self) -> tuple[Effect, ...]:
        return tuple(self._effects())

    def _effects(self) -> Iterator[Effect]:
        configurations = self.evaluated.configurations
        for after, later in enumerate(configurations):
            for before, earlier in enumerate(configurations[:after]):
                if (id(earlier.weights), earlier.engine) != (id(later.weights), later.engine):
                    continue
                differing = [name for name in _SETTINGS if getattr(earlier, name) != getattr(later, name)]
                if len(differing) == 1:
                    yield Effect(differing[0], (earlier.name, later.name), *self.effect(before, after))

    @property
    def hints(self) -> list[str]:
        return [result.hint for result in self.results if result.hint]

    def common(self, position: int) -> dict[str, Any]:
        """Return the fields of `ConfigurationResult` that are known without the records."""
        configuration, evaluated = self.evaluated.configurations[position], self.evaluated
        weights = configuration.weights
        return {
            "name": configuration.name,
            "weights": str(weights.source.path),
            "weights_sha256": weights.source.sha256,
            "network": str(weights.spec),
            "engine": configuration.engine,
            "device": evaluated.devices[position],
            "precision": configuration.precision,
            "batch_size": evaluated.batch_size,
            "protocol": configuration.protocol,
            "images": len(self.names),
            "unreadable": len(evaluated.left_out),
            "seconds": evaluated.seconds[position],
        }

    def write(self, folder: Path) -> None:
        """Write the folder of each configuration, then the charts and the report page."""
        left_out = [{"path": name, "reason": reason} for name, reason in self.evaluated.left_out]
        about = {**self.evaluated.about, "rule": self.evaluator.rule, "left_out": left_out, **self.evaluator.about}
        for position, result in enumerate(self.results):
            self.write_result(folder / result.name, position, about)
        try:
            self.write_page(folder, about)
        except MissingExtra as error:
            again = f"fcvit resume {shlex.quote(str(folder))}"
            logger.info(f"charts and {PAGE} were not written: {error}, then run: {again}")

    def to_json(self) -> dict[str, Any]:
        parts = {"results": self.results, "agreements": self.agreements, "effects": self.effects}
        return {name: [dataclasses.asdict(row) for row in rows] for name, rows in parts.items()}

    def comparison_tables(self) -> "Iterator[Table]":
        """Yield tables of the effects of protocols and precisions, and of the agreement of engines."""
        from fcvit.report.tables import table

        for effect in self.effects:
            rows = [(effect.names, f"{effect.difference:+.2f} percentage points")]
            if bounds := interval(effect.interval):
                rows.append(("95% confidence interval", bounds))
            if effect.p_value is not None:
                rows.append(("exact McNemar test", f"p = {effect.p_value:.2g}"))
            yield table(rows=rows, title=_EFFECT.format(effect.of, self.metric))
        engines = [both.engines for both in self.agreements]
        for both in self.agreements:
            names = both.engines if engines.count(both.engines) == 1 else both.configurations
            yield table(rows=both.figures(), title=_ENGINES.format(*names))

    def notes_of(self, result: ConfigurationResult) -> Iterator[str]:
        """Yield the lines below a result in the terminal: hint, unreadable images, and the published figure."""
        if result.hint:
            yield result.hint
        if result.unreadable:
            yield f"{counted(result.unreadable, 'image')} excluded"
        if result.published:
            yield f"published by {result.published.whose}: {result.published.reason}"

    def render_page(
        self, folder: Path, lead: str, summary: Listing, sections: Sequence[Section], about: Mapping[str, Any]
    ) -> None:
        """Write the report page.

        Args:
            folder: Folder of the run.
            lead: Start of the first paragraph: number of images and classes. The rest is added.
            summary: Table of the metrics of all configurations.
            sections: Section of each configuration.
            about: Information about the run.
        """
        listings = [summary]
        for kind in dict.fromkeys(effect.of for effect in self.effects):
            chosen = [effect for effect in self.effects if effect.of == kind]
            columns = ["difference (percentage points)", "95% confidence interval"]
            rows = [[e.names, f"{e.difference:+.2f}", interval(e.interval)] for e in chosen]
            if chosen[0].p_value is not None:
                columns.append("p-value (exact McNemar test)")
                rows = [[*row, f"{e.p_value:.2g}"] for row, e in zip(rows, chosen, strict=True)]
            listings.append(_listing(_EFFECT.format(kind, self.metric), columns, rows))
        if self.agreements:
            columns = [title for title, _ in self.agreements[0].figures()]
            rows = [
                [" and ".join(reversed(a.configurations)), *(value for _, value in a.figures())]
                for a in self.agreements
            ]
            listings.append(_listing("agreement of engines, same images", columns, rows))
        if left_out := about["left_out"]:
            rows = tuple((image["path"], image["reason"]) for image in left_out)
            listings.append(Listing("Excluded images", ("image", "reason"), rows))
            lead += f", images excluded: {len(left_out)}"
        fingerprint = self.results[0].fingerprint[:16]
        lead += f". Labels: {about['rule']}. Data: {Path(str(about['data'])).name}, fingerprint {fingerprint}."
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        footer = f"FCViT for PaddlePaddle. Versions: {versions}"
        content = page.render_page(Page("FCViT evaluation", lead, tuple(listings), tuple(sections), footer))
        runs.write_text(folder / PAGE, content)


def _listing(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Listing:
    """Return a table of pairs of configurations with numbers."""
    title = title[0].upper() + title[1:]
    return Listing(title, ("configurations", *columns), tuple(map(tuple, rows)), frozenset(columns))


def published_columns(results: Sequence[ConfigurationResult], title: str) -> tuple[str, ...]:
    """Return the titles of the columns with published figures, or no title if no result has a published figure."""
    return (title, "comparison") if any(result.published for result in results) else ()


def published_cells(result: ConfigurationResult, columns: Sequence[str]) -> list[str]:
    """Return the cells of a result for `published_columns`."""
    both = [f"{result.published.figure:.1f}", result.published.verdict] if result.published else ["", ""]
    return both[: len(columns)]
