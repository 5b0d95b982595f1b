"""What the commands print, as rich tables: one function for one thing to show.

Texts from files and paths stand in them as they are: neither rich nor the terminal may read commands
out of them (see `console` and `table`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from fcvit.analysis.heads import Heads
from fcvit.analysis.similarity import Written
from fcvit.analysis.trust import Estimate, Trust
from fcvit.commands.convert import Conversion
from fcvit.commands.export import Export
from fcvit.commands.quickstart import Quickstart
from fcvit.commands.verify import Comparison, Place, Verification
from fcvit.errors import BadImages, counted
from fcvit.inference.predict import Prediction
from fcvit.models.maps import short
from fcvit.models.spec import ModelSpec, parameter_count
from fcvit.models.variants import VARIANTS, published
from fcvit.text import printable
from fcvit.verification.equivalence import FLOAT64_LIMIT, RATIO_LIMIT
from fcvit.weights.reading import Problem

_SHOWN = 20  # rows of a list that may be long
_CLASSES = 10


def console(error: bool = False) -> Console:
    """The console for these tables: plain text stays plain; a pipe, which has no width, gets a wide one."""
    plain = {"markup": False, "emoji": False, "highlight": False, "stderr": error}
    terminal = Console(**plain)
    return terminal if terminal.is_terminal else Console(**plain, width=140)


class _Table(Table):
    """A table whose cells hold texts from anywhere; only a `Text` can have several lines."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row, with control characters as their escapes."""
        super().add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def table(*columns: str, title: str | None = None, right: Iterable[str] = ()) -> Table:
    """An empty table in the one style; columns named in `right` are aligned there; no columns: pairs."""
    result = _Table(title=title and printable(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    result.show_header = bool(columns)
    for column in columns or ("", ""):
        result.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return result


def _lines(texts: Iterable[str]) -> Text:
    """One text below the other in a cell."""
    return Text("\n".join(map(printable, texts)))


def verdict(passed: bool, limit: str = "") -> Text:
    """pass or FAIL, in color, with the limit behind it."""
    word = ("pass", "green") if passed else ("FAIL", "bold red")
    return Text.assemble(word, f" (limit {limit})" if limit else "")


def exported(done: Export) -> Table:
    """What was written, and how near its numbers are to exact ones."""
    result = table(title=f"{done.network} exported as {done.format}, {done.precision}")
    for path in done.files:
        result.add_row("written", path)
    result.add_row("size", f"{done.bytes / 2**20:.1f} MiB, in {done.seconds:.1f} s")
    shape = " x ".join("any" if side is None else str(side) for side in done.input["shape"])
    result.add_row("takes", f"{done.input['type']}, {shape}")
    result.add_row("gives", ", ".join(done.outputs))
    for what, checks in (("", done.checks), ("weights by rule, ", done.lively)):
        for check in checks:
            count, height, width = check.images
            where = f"{what}{counted(count, 'image')} of {height} x {width}, run by {done.runtime}"
            result.add_row(f"gate B ({check.yardstick})", verdict(check.passed, f"{RATIO_LIMIT}"))
            result.add_row("", f"{check.ratio:.2f}, largest difference {check.largest:.1e}; {where}")
    if done.precision == "int8":
        result.add_row("int8", "checked before it was quantized; fcvit eval --precision int8 measures what it costs")
    return result


def _or_dash(value: float | None, spec: str) -> str:
    return "—" if value is None else spec.format(value)


def maps_written(found: Written) -> list[Table]:
    """What was drawn for each image."""
    result = table("image", "%", "class", "first of three files", right=("%",))
    result.caption = "NAME.png: heads; NAME-depth.png: from stage to stage; NAME.npz: all maps"
    for path, files, best in found.images[:_SHOWN]:
        cells = (f"{100 * best.probability:.1f}", best.name) if best else ("", "")
        result.add_row(path, *cells, files[0])
    if len(found.images) > _SHOWN:
        result.add_row(f"... and {len(found.images) - _SHOWN} more", "", "", "")
    return [result]


_HEADS = "1: two heads are one; a flat map (top tenth: 0.1); nothing changes with depth; the query does not matter"


def heads(found: Heads) -> list[Table]:
    """How much heads differ, and whether queries do, layer by layer; a table for each network."""
    columns = ("between heads", "entropy", "of noise", "top tenth", "of noise ", "kept", "queries agree")
    results = []
    for network in found.networks:
        result = table("map", *columns, right=columns, title=f"{network.network}, {counted(found.images, 'image')}")
        result.caption = _HEADS
        for one in network.layers:
            sparse = (one.entropy, one.noise_entropy, one.top_decile, one.noise_top_decile)
            values = (one.correlation, *sparse, one.kept, one.agreement)
            cells = ["" if value != value else f"{value:.3f}" for value in values]
            result.add_row(short(one.name), *(cells if any(cells) else ["one position"]))
        results.append(result)
    return results


def trust(found: Trust) -> list[Table]:
    """How much better than other maps, and how like occlusion."""
    controls = ("random maps", "another image's")
    tables = []
    for what, over_random, over_other in (
        ("deletion", "deletion_over_random", "deletion_over_other"),
        ("insertion", "insertion_over_random", "insertion_over_other"),
    ):
        result = table("map", *controls, right=controls)
        result.title = f"{found.network}, {found.images} images, {found.values} maps: {what}, area gained over"
        for one in found.curves:
            result.add_row(short(one.name), _estimate(getattr(one, over_random)), _estimate(getattr(one, over_other)))
        tables.append(result)
    result = table("map", "rank correlation", right=("rank correlation",), title="with occlusion, over the patches")
    for one in found.curves:
        if cell := _estimate(one.occlusion):
            result.add_row(short(one.name), cell)
    return [*tables, result]


def _estimate(one: Estimate) -> str:
    """With as many digits as it takes for two that count in the interval."""
    if one.mean != one.mean:
        return ""
    spread = one.high - one.low
    digits = max(3, 1 - math.floor(math.log10(spread))) if spread > 0 else 3
    mean, low, high = (f"{round(value, digits) + 0.0:+.{digits}f}" for value in (one.mean, one.low, one.high))
    return f"{mean} ({low} to {high})"


def problems(found: Sequence[Problem]) -> Table:
    """Everything that does not fit, up to a screenful."""
    result = table("tensor", "expected", "found", "remedy", title=f"{len(found)} problem(s)")
    for problem in found[:_SHOWN]:
        result.add_row(problem.name, problem.expected, problem.found, problem.remedy)
    if len(found) > _SHOWN:
        result.add_row(f"... and {len(found) - _SHOWN} more", "", "", "fcvit inspect FILE --json lists all")
    return result


def conversion(done: Conversion) -> Table:
    """What was written, and what was left out."""
    result = table(title=f"{done.source} -> {done.destination}")
    result.add_row("network", done.spec)
    result.add_row("tensors", f"{done.tensors}, {'/'.join(done.dtypes)}, {done.layout} layout, read back bit for bit")
    if done.skipped:
        more = f", ... ({len(done.skipped)})" if len(done.skipped) > _SHOWN else ""
        result.add_row("skipped", ", ".join(done.skipped[:_SHOWN]) + more)
    for note in done.notes:
        result.add_row("note", note)
    return result


def verification(proof: Verification, every_place: bool = False) -> list[Table]:
    """The gates, and the drift by stage (or at every place)."""
    gates = table("check", "measured", "limit", "", title=f"verification of {proof.spec}", right=("measured", "limit"))
    same = proof.tensors - len(proof.different)
    gates.add_row(
        "tensors equal bit for bit", f"{same} of {proof.tensors}", str(proof.tensors), verdict(not proof.different)
    )
    _gate_rows(gates, proof.comparison, "")
    if proof.lively:
        _gate_rows(gates, proof.lively, " (lively weights by rule: the file's own hide the blocks)")
    gates.add_row("largest float32 difference", f"{proof.comparison.float32_max:.2e}", "", "")
    gates.add_row("mean float32 difference", f"{proof.comparison.float32_mean:.2e}", "", "")
    if proof.rounding_cost:
        gates.add_row(f"cost of storing as {proof.stored_as}, largest", f"{proof.rounding_cost:.2e}", "", "")
    comparison = proof.lively or proof.comparison
    drift = table("place", "drift", "", title="drift by stage (float64, over the standard deviation)", right=("drift",))
    for place in comparison.drift:
        if every_place or not _is_block(place):
            drift.add_row(place.name, f"{place.drift:.1e}", verdict(place.drift <= FLOAT64_LIMIT))
    return [gates, drift]


def _gate_rows(gates: Table, comparison: Comparison, note: str) -> None:
    gates.add_row(
        f"gate A: float64, largest over std{note}",
        f"{comparison.float64_difference:.1e}",
        f"{FLOAT64_LIMIT:.0e}",
        verdict(comparison.float64_difference <= FLOAT64_LIMIT),
    )
    gates.add_row(
        f"gate B: float32 rms error over PyTorch's{note}",
        f"{comparison.error_ratio:.2f}",
        f"{RATIO_LIMIT:.0f}",
        verdict(comparison.error_ratio <= RATIO_LIMIT),
    )


def _is_block(place: Place) -> bool:
    return place.name.count(".") == 2


def interval(bounds: tuple[float, float]) -> str:
    """Two bounds in per cent or points."""
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}"


def quickstart(done: Quickstart) -> Table:
    """Paddle beside PyTorch on the same images, and the gates."""
    ours = done.evaluation.results[0]
    result = table(
        "", "PyTorch", "Paddle", "", title=f"the same {ours.images} held-out images", right=("PyTorch", "Paddle")
    )
    result.add_row(
        "top-1 accuracy", f"{done.torch_top1:.2f} %", f"{ours.top1:.2f} %", f"PyTorch's side: {done.torch_side}"
    )
    result.add_row("same prediction", "", f"{done.agreement:.2f} %", "")
    result.add_row("largest logit difference, float32", "", f"{done.max_difference:.2e}", "")
    result.add_row("mean logit difference, float32", "", f"{done.mean_difference:.2e}", "")
    result.add_row(
        "gate A: float64, largest over std",
        "",
        f"{done.float64_difference:.1e}",
        verdict(done.float64_difference <= FLOAT64_LIMIT, f"{FLOAT64_LIMIT:.0e}"),
    )
    result.add_row(
        "gate B: float32 rms error over PyTorch's",
        "",
        f"{done.error_ratio:.2f}",
        verdict(done.error_ratio <= RATIO_LIMIT, f"{RATIO_LIMIT:.0f}"),
    )
    return result


def predictions(found: Sequence[tuple[Path, list[Prediction]]]) -> Table:
    """Top-k of each image."""
    result = table("image", "%", "class", "id", right=("%",))
    for path, ranked in found:
        for place, row in enumerate(ranked):
            result.add_row("" if place else str(path), f"{100 * row.probability:.1f}", row.name, row.id)
    return result


def unreadable(found: Sequence[str | BadImages]) -> Table:
    """Images that were left out."""
    result = table("image and reason", title=f"{counted(len(found), 'image')} left out: cannot be read")
    for entry in found[:_SHOWN]:
        result.add_row(str(entry))
    if len(found) > _SHOWN:
        result.add_row(f"... and {len(found) - _SHOWN} more")
    return result


def inspection(found: Mapping[str, Any]) -> list[Table]:
    """What a weights file is; the list of its tensors where it was asked for."""
    listing = table()
    for name, value in found.items():
        if value is None or value == [] or name == "entries":
            continue
        if isinstance(value, list):
            parts = [" ".join(map(str, part)) if isinstance(part, list) else str(part) for part in value]
            more = [f"... ({len(parts)})"] if len(parts) > _SHOWN else []
            value = _lines(parts[:_SHOWN] + more) if name == "problems" else ", ".join(parts[:_SHOWN] + more)
        listing.add_row(name.replace("_", " "), value if isinstance(value, Text) else str(value))
    if "entries" not in found:
        return [listing]
    entries = table("tensor", "shape", "type")
    for name, shape, dtype in found["entries"]:
        entries.add_row(name, str(shape), dtype)
    return [listing, entries]


def diagnosis(found: Mapping[str, Any]) -> Table:
    """Versions, devices, and what is missing."""
    listing = table()
    listing.add_row("machine", found["machine"])
    for title in ("versions", "devices", "missing"):
        for name, value in found[title].items():
            shown = ", ".join(value) if isinstance(value, list) else value
            listing.add_row(name if title == "versions" else f"{name} {title}", shown)
    return listing


def variants() -> Table:
    """The table of variants with the published figures."""
    figures = ("parameters", "/ 2^20", "GMAC", "crop", "top-1 %")
    listing = table("variant", *figures, title="published figures: ImageNet-1K at 224 x 224", right=figures)
    for name, variant in VARIANTS.items():
        row = published(variant)
        count = row.parameters if row else parameter_count(ModelSpec(variant, 10))
        listing.add_row(
            name,
            f"{count:,}",
            f"{count / 2**20:.1f}M",
            f"{row.gmac:.3f}" if row else "",
            f"{variant.preprocessing.crop_fraction:.2f}",
            f"{row.top1:.1f}" if row else "ours: 10 classes, 32 x 32",
        )
    return listing
