"""Draw the charts of a segmentation evaluation and write the report page, `report.html`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcvit import run_folder as runs
from fcvit.evaluation.report import published_cells, published_columns
from fcvit.metrics.segmentation import printed
from fcvit.report import charts, page
from fcvit.report.page import Listing, Picture, Section
from fcvit.tasks.segmentation import results
from fcvit.tasks.segmentation.results import Result
from fcvit.text import interval

if TYPE_CHECKING:
    from fcvit.tasks.segmentation.figures import SegmentationReport


def write_page(report: "SegmentationReport", folder: Path, about: Mapping[str, Any]) -> None:
    """Write the charts of each result into its folder, and the report page into the run folder.

    Raises:
        MissingExtra: The `report` extra is not installed.
    """
    page.require_report()
    sections = []
    for result, total in zip(report.results, report.sums, strict=True):
        result_folder = folder / result.name
        # Titles do not contain the folder, so that equal results give identical files.
        title = f"{result.name}: confusion between classes"
        confusion = charts.pixel_confusion_chart(total.matrix, report.evaluator.classes, title)
        runs.write_bytes(result_folder / "confusion.png", confusion)
        pictures = [
            Picture("Confusion between classes", confusion, "Percentage of the pixels of each class by predicted class")
        ]
        for file, which in ((results.WORST, "lowest"), (results.BEST, "highest")):
            alt = f"Image, label, prediction and difference of the images with the {which} mIoU"
            pictures.append(Picture(f"Images with the {which} mIoU", (result_folder / file).read_bytes(), alt))
        sections.append(Section(result.name, (*_facts(result),), (_classes(result),), tuple(pictures)))
    first = report.results[0]
    lead = f"{first.images:,} images, {first.pixels:,} labeled pixels"
    report.render_page(folder, lead, _summary(report.results), sections, about)


def scores(iou: float, iou_interval: tuple[float, float], acc: float) -> tuple[str, str, str]:
    """Return the IoU, its interval and the accuracy of a class as text. Undefined values are empty."""
    first, last = ("" if math.isnan(value) else printed(value) for value in (iou, acc))
    return first, interval(iou_interval), last


def _summary(outcomes: Sequence[Result]) -> Listing:
    figures = ("mIoU (%)", "95% confidence interval", "mean class accuracy (%)", "pixel accuracy (%)")
    published = published_columns(outcomes, "published mIoU (%)")
    rows = []
    for row in outcomes:
        cells = [row.name, printed(row.miou), interval(row.miou_interval), printed(row.macc), printed(row.aacc)]
        rows.append((*cells, *published_cells(row, published)))
    columns = ("configuration", *figures, *published)
    return Listing("Metrics", columns, tuple(rows), frozenset((*figures, *published[:1])))


def _facts(result: Result) -> Iterator[tuple[str, str]]:
    values = (
        ("mIoU", result.miou, result.miou_interval),
        ("Mean class accuracy (mAcc)", result.macc, result.macc_interval),
        ("Pixel accuracy (aAcc)", result.aacc, result.aacc_interval),
    )
    for name, value, bounds in values:
        yield name, f"{printed(value)}% (95% confidence interval {interval(bounds)}, bootstrap over images)"
    if result.absent:
        absent = f"{result.absent:,} of {result.classes:,}: neither labeled nor predicted, left out of the mIoU"
        yield "Absent classes", absent
    yield from result.facts()


def _classes(result: Result) -> Listing:
    figures = ("images", "labeled pixels (%)", "IoU (%)", "95% confidence interval", "accuracy (%)")
    named = any(row.id != row.name for row in result.per_class)
    columns = ("class", *(("name",) if named else ()), *figures, "most frequent wrong prediction", "share (%)")
    names = {row.id: row.name for row in result.per_class}
    ranked = sorted(result.per_class, key=lambda c: (math.isnan(c.iou), c.iou, c.index))
    rows = tuple(
        (
            *((c.id, c.name) if named else (c.name,)),
            f"{c.images:,}" if c.labeled else "no pixels",
            f"{100 * c.labeled / result.pixels:.2f}" if c.labeled else "",
            *scores(c.iou, c.iou_interval, c.acc),
            *(names.get(c.mistaken_for, ""), f"{c.mistaken:.1f}" if c.mistaken_for else ""),
        )
        for c in ranked
    )
    note = "The IoU counts false positives, so a class that is never labeled but predicted has an IoU of 0."
    return Listing("Classes, lowest IoU first", columns, rows, frozenset((*figures, "share (%)")), note)
