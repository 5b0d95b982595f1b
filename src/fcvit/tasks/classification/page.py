"""Draw the charts of an evaluation and write the report page, `report.html`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcvit import run_folder as runs
from fcvit.evaluation.report import published_cells, published_columns
from fcvit.metrics import classification as metrics
from fcvit.report import charts, page
from fcvit.report.page import Listing, Picture, Section
from fcvit.tasks.classification import results
from fcvit.tasks.classification.results import Records, Result
from fcvit.text import interval

if TYPE_CHECKING:
    from fcvit.tasks.classification.figures import ClassificationReport


def write_page(report: "ClassificationReport", folder: Path, about: Mapping[str, Any]) -> None:
    """Write the charts of each result into its folder, and the report page into the run folder.

    Raises:
        MissingExtra: The `report` extra is not installed.
    """
    page.require_report()
    sections = []
    for result, images in zip(report.results, report.records, strict=True):
        result_folder = folder / result.name
        matrix = metrics.confusion(images.truth, images.top[:, 0], len(images.classes))
        # Titles do not contain the folder, so that equal results give identical files.
        confusion = charts.confusion_chart(matrix, images.classes, f"{result.name}: confusion between classes")
        reliability = charts.reliability_chart(result.calibration, f"{result.name}: reliability diagram")
        runs.write_bytes(result_folder / "confusion.png", confusion)
        runs.write_bytes(result_folder / "reliability.png", reliability)
        pictures = (
            Picture("Confusion between classes", confusion, "Number of images for pairs of true and predicted classes"),
            Picture(
                "Reliability diagram",
                reliability,
                f"Accuracy by confidence, with an expected calibration error of {result.calibration.error:.4f}",
            ),
            Picture(
                "Most confident errors",
                (result_folder / "worst.png").read_bytes(),
                "Images with a wrong top-1 prediction, highest probability first",
            ),
        )
        if (maps := result_folder / results.MAPS).exists():
            alt = "Most confident wrong and correct predictions, with the token-global similarity maps of each stage"
            pictures += (Picture("Token-global similarity maps", maps.read_bytes(), alt),)
        sections.append(Section(result.name, (*_facts(result),), _listings(result, images), pictures))
    first = report.results[0]
    restricted = about["model_classes"] != first.classes
    lead = (
        f"{first.images:,} images of {len(first.per_class):,} classes"
        + (f", a random subset (seed {subset['seed']})" if isinstance(subset := about["subset"], dict) else "")
        + (f", {first.classes:,} candidates of the model's {about['model_classes']:,} classes" if restricted else "")
    )
    report.render_page(folder, lead, _summary(report.results), sections, about)


def _summary(results: Sequence[Result]) -> Listing:
    k = results[0].k
    top_k = (f"top-{k} accuracy (%)",) if k > 1 else ()
    accuracy = ("top-1 accuracy (%)", "95% confidence interval", *top_k)
    figures = (*accuracy, "cross-entropy loss", "expected calibration error")
    real = ("ImageNet-ReaL accuracy (%)",) if results[0].real else ()
    published = published_columns(results, "published top-1 (%)")
    rows = []
    for result in results:
        row = [result.name, f"{result.top1:.2f}", interval(result.top1_interval)]
        row += [f"{result.top_k:.2f}"] if top_k else []
        row += [f"{result.loss:.4f}", f"{result.calibration.error:.4f}"]
        row += [f"{result.real.top1:.2f}"] if result.real else []
        rows.append((*row, *published_cells(result, published)))
    columns = ("configuration", *figures, *real, *published)
    return Listing("Accuracy", columns, tuple(rows), frozenset((*figures, *real, *published[:1])))


def _facts(result: Result) -> Iterator[tuple[str, str]]:
    accuracies = ((1, result.top1, result.top1_interval), (result.k, result.top_k, result.top_k_interval))
    for k, accuracy, bounds in accuracies[: result.k]:
        yield f"Top-{k} accuracy", f"{accuracy:.2f}% (95% confidence interval {interval(bounds)})"
    yield "Cross-entropy loss", f"{result.loss:.4f}"
    calibration = f"{result.calibration.error:.4f} ({len(result.calibration.counts)} bins)"
    yield "Expected calibration error (ECE)", calibration
    if result.real:
        yield "ImageNet-ReaL accuracy", f"{result.real.top1:.2f}% of {result.real.images:,} labeled images"
    chosen = result.protocol.preprocessing
    pixels = f"shorter side resized to {chosen.resize} ({chosen.interpolation}), center crop {chosen.input_size}"
    yield from result.facts(f": {pixels}")


def _listings(result: Result, records: Records) -> tuple[Listing, ...]:
    scores = ("top-1 accuracy (%)", f"top-{result.k} accuracy (%)")
    columns = ("class", "name", "images", *scores, "most frequent wrong prediction", "count")
    names = {named.id: named.name for named in records.classes}
    worst = sorted(result.per_class, key=lambda c: (c.top1, c.id))
    rows = tuple(
        (c.id, c.name, str(c.images), f"{c.top1:.1f}", f"{c.top_k:.1f}", names.get(c.mistaken_for, ""), str(c.times))
        for c in worst
    )
    weak = sum(c.top1 < result.top1 / 2 for c in result.per_class)
    note = f"Classes with less than half of the overall top-1 accuracy: {weak} of {len(rows)}."
    return (Listing("Classes, lowest accuracy first", columns, rows, frozenset((*columns[2:5], "count")), note),)
