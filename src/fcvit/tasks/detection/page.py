"""Draw the charts of a detection evaluation and write the report page, `report.html`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcvit import run_folder as runs
from fcvit.evaluation.report import published_cells, published_columns
from fcvit.metrics.detection import Precision
from fcvit.report import charts, page
from fcvit.report.page import Listing, Picture, Section
from fcvit.tasks.detection import results
from fcvit.tasks.detection.results import ClassFigures, Result

if TYPE_CHECKING:
    from fcvit.tasks.detection.figures import DetectionReport

PRECISION_RECALL = "precision_recall.png"
_PICTURES = (
    (results.FALSE_POSITIVES, "Most confident false positives", "Images with wrong detections, most confident first"),
    (results.MISSES, "Most missed objects", "Images with the most objects that were not detected"),
    (results.BEST, "Best images", "Images with the fewest missed objects and false positives"),
)
_METRICS = (("AP", "ap"), ("AP50", "ap50"), ("AP75", "ap75"))
_SIZES = ("small", "medium", "large")


def write_page(report: "DetectionReport", folder: Path, about: Mapping[str, Any]) -> None:
    """Write the charts of each result into its folder, and the report page into the run folder.

    Raises:
        MissingExtra: The `report` extra is not installed.
    """
    page.require_report()
    sections = []
    for result, outcome in zip(report.results, report.outcomes, strict=True):
        result_folder = folder / result.name
        curves = {"boxes": outcome.box} | ({"masks": outcome.mask} if outcome.mask is not None else {})
        # Titles do not contain the folder, so that equal results give identical files.
        title = f"{result.name}: precision and recall"
        chart = charts.precision_recall_chart({kind: figures.precision for kind, figures in curves.items()}, title)
        runs.write_bytes(result_folder / PRECISION_RECALL, chart)
        alt = "Mean precision of all classes by recall, at the IoU thresholds 0.50 and 0.75 and as the mean"
        pictures = [Picture("Precision and recall", chart, alt)]
        for file, name, alt in _PICTURES:
            pictures.append(Picture(name, (result_folder / file).read_bytes(), alt))
        sections.append(Section(result.name, (*_facts(result),), (_classes(result),), tuple(pictures)))
    first = report.results[0]
    lead = f"{first.images:,} images, {first.objects:,} annotated objects"
    report.render_page(folder, lead, _summary(report.results), sections, about)


def percent(value: float) -> str:
    """Return a figure with one decimal, as in the authors' tables. An undefined figure is "none"."""
    return "none" if math.isnan(value) else f"{value:.1f}"


def _with_sign(value: float) -> str:
    return percent(value) if math.isnan(value) else f"{percent(value)}%"


def _kinds(result: Result) -> list[tuple[str, Precision]]:
    return [("box", result.box), *([("mask", result.mask)] if result.mask is not None else [])]


def titles(result: Result) -> list[str]:
    """Return the titles of the columns with the metrics of a result."""
    return [f"{kind} {name} (%)" for kind, _ in _kinds(result) for name, _ in _METRICS]


def values(result: Result) -> list[str]:
    """Return the cells for `titles`."""
    return [percent(getattr(figures, field)) for _, figures in _kinds(result) for _, field in _METRICS]


def class_titles(result: Result) -> list[str]:
    """Return the titles of the table of classes."""
    kinds = [kind for kind, _ in _kinds(result)]
    return ["class", "objects", "detections", *(f"{kind} {name} (%)" for kind in kinds for name in ("AP", "AP50"))]


def class_values(result: Result, figures: ClassFigures) -> list[str]:
    """Return the cells of a class for the last titles of `class_titles`."""
    both = (figures.box_ap, figures.box_ap50, figures.mask_ap, figures.mask_ap50)
    return [percent(value) for value in both[: 2 * len(_kinds(result))]]


def _summary(outcomes: Sequence[Result]) -> Listing:
    figures = titles(outcomes[0])
    published = published_columns(outcomes, "published box AP (%)")
    rows = [(row.name, *values(row), *published_cells(row, published)) for row in outcomes]
    columns = ("configuration", *figures, *published)
    return Listing("Metrics", columns, tuple(rows), frozenset((*figures, *published[:1])))


def _facts(result: Result) -> Iterator[tuple[str, str]]:
    for kind, figures in _kinds(result):
        values = ", ".join(f"{name} {_with_sign(getattr(figures, field))}" for name, field in _METRICS)
        yield f"{kind.capitalize()} AP", values
        for what in ("ap", "ar"):
            sizes = ", ".join(f"{size} {_with_sign(getattr(figures, f'{what}_{size}'))}" for size in _SIZES)
            mean = "" if what == "ap" else f"{_with_sign(figures.ar)}, "
            yield f"{kind.capitalize()} {what.upper()} by size", f"{mean}{sizes}"
    yield "Detections that count", f"{result.max_detections} per class and image, of {result.detections:,} in all"
    if result.absent:
        yield "Classes without objects", f"{result.absent:,} of {result.classes:,}: no AP, left out of the means"
    if result.published_mask:
        yield f"Published by {result.published_mask.whose}", result.published_mask.text
    yield from result.facts()


def _classes(result: Result) -> Listing:
    columns = ("class", "name", "images", *class_titles(result)[1:])
    kind = "mask_ap" if result.mask is not None else "box_ap"
    ranked = sorted(result.per_class, key=lambda c: (math.isnan(getattr(c, kind)), getattr(c, kind), c.index))
    rows = tuple(
        (c.id, c.name, f"{c.images:,}", f"{c.objects:,}", f"{c.detections:,}", *class_values(result, c)) for c in ranked
    )
    if all(row[0] == row[1] for row in rows):
        columns, rows = (columns[0], *columns[2:]), tuple((row[0], *row[2:]) for row in rows)
    note = "none: no annotated objects of this class. Crowds are not counted as objects."
    numeric = frozenset(columns) - {"class", "name"}
    return Listing("Classes, lowest AP first", columns, rows, numeric, note)
