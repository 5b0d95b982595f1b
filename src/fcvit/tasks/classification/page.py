"""The charts of an evaluation and the page that shows it: `report.html`, one file that a person opens."""

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
    """Draw the charts of each result into its folder, and write the page beside the folders.

    Raises:
        MissingExtra: the extra `report` is not installed.
    """
    page.require_report()
    sections = []
    for result, images in zip(outcomes, records, strict=True):
        place = folder / result.name
        matrix = metrics.confusion(images.truth, images.top[:, 0], len(images.classes))
        # A title must not hang on the folder: the same results make the same pictures anywhere.
        confusion = charts.confusion_chart(matrix, images.classes, f"{result.name}: what was taken for what")
        reliability = charts.reliability_chart(result.calibration, f"{result.name}: confidence and accuracy")
        runs.write_bytes(place / "confusion.png", confusion)
        runs.write_bytes(place / "reliability.png", reliability)
        pictures = (
            Picture("Confusions", confusion, "Which classes are taken for which, as counts of images"),
            Picture(
                "Calibration",
                reliability,
                f"Accuracy against confidence; expected calibration error {result.calibration.error:.4f}",
            ),
            Picture(
                "The surest mistakes",
                (place / "worst.png").read_bytes(),
                "Images that were taken for a wrong class with the highest probability",
            ),
        )
        if (maps := place / results.MAPS).exists():
            alt = "Wrong and right images, the surest, with the token-global similarity of each stage"
            pictures += (Picture("What the network sees", maps.read_bytes(), alt),)
        sections.append(Section(result.name, _facts(result), _listings(result, images), pictures))
    left_out = about["left_out"]
    assert isinstance(left_out, list)
    first = outcomes[0]
    masked = about["model_classes"] != first.classes
    lead = (
        f"{first.images:,} images of {len(first.per_class):,} classes"
        + (f", drawn by seed {subset['seed']}" if isinstance(subset := about["subset"], dict) else "")
        + (f", {len(left_out)} that cannot be read left out" if left_out else "")
        + (f"; {first.classes:,} of the model's {about['model_classes']:,} classes told apart" if masked else "")
        + f"; {about['rule']}. Data: {Path(str(about['data'])).name}, fingerprint {first.fingerprint[:16]}."
    )
    summary = [_summary(outcomes)]
    for kind in dict.fromkeys(effect.of for effect in effects):
        rows = tuple(
            (
                f"{e.configurations[1]} less {e.configurations[0]}",
                f"{e.difference:+.2f}",
                _interval(e.interval),
                f"{e.p_value:.2g}",
            )
            for e in effects
            if e.of == kind
        )
        summary.append(
            Listing(
                f"The {kind}s on the same images",
                ("", "points", "95 % interval", "p (exact McNemar)"),
                rows,
                frozenset(("points", "95 % interval", "p (exact McNemar)")),
            )
        )
    if agreements:
        columns = ("", "same top-1 %", "largest logit difference", "mean")
        rows = tuple(
            (
                f"{a.configurations[1]} and {a.configurations[0]}",
                f"{a.top1_agreement:.2f}",
                f"{a.max_difference:.2e}",
                f"{a.mean_difference:.2e}",
            )
            for a in agreements
        )
        summary.append(Listing("The engines on the same images", columns, rows, frozenset(columns[1:])))
    if left_out:
        rows = tuple((image["path"], image["reason"]) for image in left_out)
        summary.append(Listing("Images that were left out", ("image", "reason"), rows))
    versions = about["versions"]
    assert isinstance(versions, dict)
    footer = "FCViT for PaddlePaddle; " + ", ".join(f"{name} {version}" for name, version in versions.items())
    content = page.render_page(Page("FCViT evaluation", lead, tuple(summary), tuple(sections), footer))
    runs.write_text(folder / results.PAGE, content)


def _summary(results: Sequence[Result]) -> Listing:
    k = results[0].k
    figures = ("top-1 %", "95 % interval", f"top-{k} %", "loss", "ECE")
    real = ("ReaL %",) if results[0].real else ()
    beside = ("published %", "") if any(row.published for row in results) else ()
    rows = []
    for result in results:
        row = [result.name, f"{result.top1:.2f}", _interval(result.top1_interval), f"{result.top_k:.2f}"]
        row += [f"{result.loss:.4f}", f"{result.calibration.error:.4f}"]
        row += [f"{result.real.top1:.2f}"] if result.real else []
        if beside:
            published = result.published
            row += [f"{published.figure:.1f}", published.verdict] if published else ["", ""]
        rows.append(tuple(row))
    columns = ("", *figures, *real, *beside)
    return Listing("Accuracy", columns, tuple(rows), frozenset((*figures, *real, *beside[:1])))


def _facts(result: Result) -> tuple[tuple[str, str], ...]:
    chosen = result.protocol.preprocessing
    facts = [
        ("top-1", f"{result.top1:.2f} % (95 % interval {_interval(result.top1_interval)})"),
        (f"top-{result.k}", f"{result.top_k:.2f} % (95 % interval {_interval(result.top_k_interval)})"),
        ("loss", f"{result.loss:.4f}"),
        ("expected calibration error", f"{result.calibration.error:.4f} in {len(result.calibration.counts)} bins"),
    ]
    if result.hint:
        facts.append(("the order of the classes", result.hint))
    if result.real:
        facts.append(("ImageNet-ReaL", f"{result.real.top1:.2f} % of {result.real.images:,} images with labels"))
    if published := result.published:
        facts.append((f"published by {published.whose}", f"{published.figure:.1f} %: {published.reason}"))
    facts += [
        (
            f"protocol {result.protocol.name}",
            f"shorter side to {chosen.resize} ({chosen.interpolation}), crop {chosen.input_size}",
        ),
        *(
            ("changed", f"{field}: {own} (the variant has {usual})")
            for field, (usual, own) in result.protocol.changed.items()
        ),
        ("network", result.network),
        ("weights", f"{Path(result.weights).name}, SHA-256 {result.weights_sha256}"),
        ("computed by", f"{result.engine} on {result.device}, {result.precision}, batches of {result.batch_size}"),
    ]
    return tuple(facts)


def _listings(result: Result, records: Records) -> tuple[Listing, ...]:
    columns = ("class", "name", "images", "top-1 %", f"top-{result.k} %", "most often taken for", "times")
    names = {named.id: named.name for named in records.classes}
    worst = sorted(result.per_class, key=lambda c: (c.top1, c.id))
    rows = tuple(
        (c.id, c.name, str(c.images), f"{c.top1:.1f}", f"{c.top_k:.1f}", names.get(c.mistaken_for, ""), str(c.times))
        for c in worst
    )
    weak = sum(c.top1 < result.top1 / 2 for c in result.per_class)
    note = f"{weak} of {len(rows)} classes have less than half of the overall accuracy."
    return (Listing("Classes, the worst first", columns, rows, frozenset((*columns[2:5], "times")), note),)


def _interval(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}"
