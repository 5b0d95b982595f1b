"""Draw the charts of an evaluation and write the report page, `report.html`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fcvit import run_folder as runs
from fcvit.metrics import classification as metrics
from fcvit.report import charts, page
from fcvit.report.page import Listing, Page, Picture, Section
from fcvit.tasks.classification import results
from fcvit.tasks.classification.results import Agreement, Effect, Records, Result


def write_page(
    folder: Path,
    outcomes: Sequence[Result],
    records: Sequence[Records],
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
    for result, images in zip(outcomes, records, strict=True):
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
        sections.append(Section(result.name, _facts(result), _listings(result, images), pictures))
    left_out = about["left_out"]
    assert isinstance(left_out, list)
    first = outcomes[0]
    restricted = about["model_classes"] != first.classes
    lead = (
        f"{first.images:,} images of {len(first.per_class):,} classes"
        + (f", a random subset (seed {subset['seed']})" if isinstance(subset := about["subset"], dict) else "")
        + (f", unreadable images excluded: {len(left_out)}" if left_out else "")
        + (f". Candidate classes: {first.classes:,} of the model's {about['model_classes']:,}" if restricted else "")
        + f". Class mapping: {about['rule']}. Data: {Path(str(about['data'])).name}"
        + f", fingerprint {first.fingerprint[:16]}."
    )
    summary = [_summary(outcomes)]
    for kind in dict.fromkeys(effect.of for effect in effects):
        figures = ("difference (percentage points)", "95% confidence interval", "p-value (exact McNemar test)")
        rows = tuple(
            (
                f"{e.configurations[1]} minus {e.configurations[0]}",
                f"{e.difference:+.2f}",
                _interval(e.interval),
                f"{e.p_value:.2g}",
            )
            for e in effects
            if e.of == kind
        )
        columns = ("configurations", *figures)
        title = f"Effect of the {kind} on top-1 accuracy, same images"
        summary.append(Listing(title, columns, rows, frozenset(figures)))
    if agreements:
        columns = ("configurations", "same top-1 prediction (%)", "largest logit difference", "mean logit difference")
        rows = tuple(
            (
                f"{a.configurations[1]} and {a.configurations[0]}",
                f"{a.top1_agreement:.2f}",
                f"{a.max_difference:.2e}",
                f"{a.mean_difference:.2e}",
            )
            for a in agreements
        )
        summary.append(Listing("Agreement of engines, same images", columns, rows, frozenset(columns[1:])))
    if left_out:
        rows = tuple((image["path"], image["reason"]) for image in left_out)
        summary.append(Listing("Excluded images (unreadable)", ("image", "reason"), rows))
    versions = about["versions"]
    assert isinstance(versions, dict)
    footer = "FCViT for PaddlePaddle. Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items())
    content = page.render_page(Page("FCViT evaluation", lead, tuple(summary), tuple(sections), footer))
    runs.write_text(folder / results.PAGE, content)


def _summary(results: Sequence[Result]) -> Listing:
    k = results[0].k
    top_k = (f"top-{k} accuracy (%)",) if k > 1 else ()
    accuracy = ("top-1 accuracy (%)", "95% confidence interval", *top_k)
    figures = (*accuracy, "cross-entropy loss", "expected calibration error")
    real = ("ImageNet-ReaL accuracy (%)",) if results[0].real else ()
    published = ("published top-1 (%)", "comparison") if any(row.published for row in results) else ()
    rows = []
    for result in results:
        row = [result.name, f"{result.top1:.2f}", _interval(result.top1_interval)]
        row += [f"{result.top_k:.2f}"] if top_k else []
        row += [f"{result.loss:.4f}", f"{result.calibration.error:.4f}"]
        row += [f"{result.real.top1:.2f}"] if result.real else []
        if published:
            row += [f"{result.published.figure:.1f}", result.published.verdict] if result.published else ["", ""]
        rows.append(tuple(row))
    columns = ("configuration", *figures, *real, *published)
    return Listing("Accuracy", columns, tuple(rows), frozenset((*figures, *real, *published[:1])))


def _facts(result: Result) -> tuple[tuple[str, str], ...]:
    chosen = result.protocol.preprocessing
    accuracies = ((1, result.top1, result.top1_interval), (result.k, result.top_k, result.top_k_interval))
    facts = [
        *(
            (f"Top-{k} accuracy", f"{accuracy:.2f}% (95% confidence interval {_interval(interval)})")
            for k, accuracy, interval in accuracies[: result.k]
        ),
        ("Cross-entropy loss", f"{result.loss:.4f}"),
        ("Expected calibration error (ECE)", f"{result.calibration.error:.4f} ({len(result.calibration.counts)} bins)"),
    ]
    if result.hint:
        facts.append(("Class order", result.hint))
    if result.real:
        facts.append(("ImageNet-ReaL accuracy", f"{result.real.top1:.2f}% of {result.real.images:,} labeled images"))
    if published := result.published:
        comparison = f"{published.figure:.1f}%, {published.verdict}: {published.reason}"
        facts.append((f"Published by {published.whose}", comparison))
    facts += [
        (
            "Protocol",
            f"{result.protocol.name}: shorter side resized to {chosen.resize} ({chosen.interpolation}), "
            f"center crop {chosen.input_size}",
        ),
        *(
            ("Changed preprocessing", f"{field}: {own} (variant: {usual})")
            for field, (usual, own) in result.protocol.changed.items()
        ),
        ("Network", result.network),
        ("Weights", f"{Path(result.weights).name}, SHA-256 {result.weights_sha256}"),
        ("Engine", f"{result.engine} on {result.device}, {result.precision}, batch size {result.batch_size}"),
    ]
    return tuple(facts)


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


def _interval(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}"
