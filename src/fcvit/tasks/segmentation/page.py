"""Draw the charts of a segmentation evaluation and write the report page, `report.html`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from fcvit import run_folder as runs
from fcvit.data.classes import Classes
from fcvit.metrics.segmentation import printed
from fcvit.report import charts, page
from fcvit.report.page import Listing, Page, Picture, Section
from fcvit.tasks.segmentation import results
from fcvit.tasks.segmentation.results import Agreement, Effect, Result, Sums


def write_page(
    folder: Path,
    outcomes: Sequence[Result],
    sums: Sequence[Sums],
    classes: Classes,
    agreements: Sequence[Agreement],
    effects: Sequence[Effect],
    about: Mapping[str, object],
) -> None:
    """Write the charts of each result into its folder, and the report page into the run folder.

    Raises:
        MissingExtra: The `report` extra is not installed.
    """
    page.require_report()
    sections = []
    for result, total in zip(outcomes, sums, strict=True):
        result_folder = folder / result.name
        # Titles do not contain the folder, so that equal results give identical files.
        title = f"{result.name}: confusion between classes"
        confusion = charts.pixel_confusion_chart(total.matrix, classes, title)
        runs.write_bytes(result_folder / "confusion.png", confusion)
        pictures = [
            Picture("Confusion between classes", confusion, "Percentage of the pixels of each class by predicted class")
        ]
        for file, which in ((results.WORST, "lowest"), (results.BEST, "highest")):
            alt = f"Image, label, prediction and difference of the images with the {which} mIoU"
            pictures.append(Picture(f"Images with the {which} mIoU", (result_folder / file).read_bytes(), alt))
        sections.append(Section(result.name, _facts(result), (_classes(result),), tuple(pictures)))
    first = outcomes[0]
    left_out, versions = about["left_out"], about["versions"]
    assert isinstance(left_out, list) and isinstance(versions, dict)
    lead = (
        f"{first.images:,} images, {first.pixels:,} labeled pixels"
        + (f", unreadable images excluded: {len(left_out)}" if left_out else "")
        + f". Labels: {about['rule']}. Data: {Path(str(about['data'])).name}, fingerprint {first.fingerprint[:16]}."
    )
    summary = [_summary(outcomes)]
    for kind in dict.fromkeys(effect.of for effect in effects):
        figures = ("difference (percentage points)", "95% confidence interval")
        rows = tuple(
            (f"{e.configurations[1]} minus {e.configurations[0]}", f"{e.difference:+.2f}", _interval(e.interval))
            for e in effects
            if e.of == kind
        )
        title = f"Effect of the {kind} on mIoU, same images"
        summary.append(Listing(title, ("configurations", *figures), rows, frozenset(figures)))
    if agreements:
        columns = ("configurations", "pixels with the same predicted class (%)")
        rows = tuple(
            (f"{a.configurations[1]} and {a.configurations[0]}", f"{a.pixel_agreement:.4f}") for a in agreements
        )
        summary.append(Listing("Agreement of engines, same images", columns, rows, frozenset(columns[1:])))
    if left_out:
        rows = tuple((image["path"], image["reason"]) for image in left_out)
        summary.append(Listing("Excluded images (unreadable)", ("image", "reason"), rows))
    footer = "FCViT for PaddlePaddle. Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items())
    content = page.render_page(Page("FCViT evaluation", lead, tuple(summary), tuple(sections), footer))
    runs.write_text(folder / results.PAGE, content)


def scores(iou: float, interval: tuple[float, float], acc: float) -> tuple[str, str, str]:
    """Return the IoU, its interval and the accuracy of a class as text. Undefined values are empty."""
    first, last = ("" if math.isnan(value) else printed(value) for value in (iou, acc))
    return first, _interval(interval), last


def _summary(outcomes: Sequence[Result]) -> Listing:
    figures = ("mIoU (%)", "95% confidence interval", "mean class accuracy (%)", "pixel accuracy (%)")
    published = ("published mIoU (%)", "comparison") if any(row.published for row in outcomes) else ()
    rows = []
    for row in outcomes:
        cells = [row.name, printed(row.miou), _interval(row.miou_interval), printed(row.macc), printed(row.aacc)]
        if published:
            cells += [f"{row.published.figure:.1f}", row.published.verdict] if row.published else ["", ""]
        rows.append(tuple(cells))
    columns = ("configuration", *figures, *published)
    return Listing("Metrics", columns, tuple(rows), frozenset((*figures, *published[:1])))


def _facts(result: Result) -> tuple[tuple[str, str], ...]:
    values = (
        ("mIoU", result.miou, result.miou_interval),
        ("Mean class accuracy (mAcc)", result.macc, result.macc_interval),
        ("Pixel accuracy (aAcc)", result.aacc, result.aacc_interval),
    )
    facts = [
        (name, f"{printed(value)}% (95% confidence interval {_interval(interval)}, bootstrap over images)")
        for name, value, interval in values
    ]
    if result.absent:
        absent = f"{result.absent:,} of {result.classes:,}: neither labeled nor predicted, left out of the mIoU"
        facts.append(("Absent classes", absent))
    if result.hint:
        facts.append(("Labels", result.hint))
    if published := result.published:
        facts.append(("Published by the authors", f"{published.figure:.1f}%, {published.verdict}: {published.reason}"))
    facts += [
        ("Protocol", result.protocol.name),
        *(
            ("Changed preprocessing", f"{field}: {own} (variant: {usual})")
            for field, (usual, own) in result.protocol.changed.items()
        ),
        ("Network", result.network),
        ("Weights", f"{Path(result.weights).name}, SHA-256 {result.weights_sha256}"),
        ("Engine", f"{result.engine} on {result.device}, {result.precision}, batch size {result.batch_size}"),
    ]
    return tuple(facts)


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


def _interval(bounds: tuple[float, float]) -> str:
    return "" if math.isnan(bounds[0]) else f"{bounds[0]:.2f} to {bounds[1]:.2f}"
