"""Charts as PNG files: which classes are taken for which, how far confidence is to be trusted, how a training went.

Matplotlib is imported when a chart is drawn, and its pyplot never. A user's own matplotlib settings
do not reach the charts: they are put aside while one is drawn, and stand as they were afterwards.
"""

import bisect
import collections
import contextlib
import dataclasses
import functools
import io
import unicodedata
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fcvit.data.classes import Classes
from fcvit.errors import DoesNotFit, counted
from fcvit.metrics.classification import Calibration, wilson
from fcvit.report.contact_sheet import INK, PAPER, RIGHT, WRONG
from fcvit.report.page import require_report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MATRIX_CLASSES = 30  # with more, the cells of a confusion matrix are too small to read
WORST_PAIRS = 30

_DPI = 160
_TITLE, _TEXT, _SMALL = 13.0, 10.0, 9.0  # points
_WIDTH, _MARGIN, _NAME = 8.0, 0.25, 1.6  # inches: of most charts; around everything; at most for a class's name
_UNSURE, _FAINT, _EMPTY = "#56B4E9", "#d9d9d9", "#e6e6e6"  # Okabe and Ito's sky blue; grays
# The font that comes with matplotlib has no Chinese, Japanese or Korean; the usual ones that have.
_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Malgun Gothic",
    "Apple SD Gothic Neo",
    "Arial Unicode MS",
)
_NO_GLYPH = "\u25a1"
_LEFT_TO_RIGHT = "\u200e"  # keeps "Hebrew → Arabic" from being set from right to left, which says the opposite


def confusion_chart(matrix: np.ndarray, classes: Classes, title: str) -> bytes:
    """Which classes are taken for which: the matrix of up to `MATRIX_CLASSES` classes, else the worst pairs.

    Args:
        matrix: integers (C, C), how many images of class i (row) were taken for class j (column).
        classes: C of them; names may repeat and hold anything.
        title: one line; cut where it is too long.

    Returns:
        A PNG file, the same bytes for the same arguments on the same machine.

    Raises:
        DoesNotFit: the matrix has another shape.
        MissingExtra: the extra `report` is not installed.
    """
    if matrix.shape != (len(classes), len(classes)):
        raise DoesNotFit(f"a confusion matrix of shape {matrix.shape} for {len(classes)} classes")
    with drawing():
        draw = _heat_map if len(classes) <= MATRIX_CLASSES else _worst_pairs
        return png(draw(matrix, classes, title))


def reliability_chart(calibration: Calibration, title: str) -> bytes:
    """Accuracy in bins of confidence beside the diagonal, and below it how many images are in each bin.

    Args:
        calibration: any number of bins, of equal width over 0 to 1; bins may be empty.
        title: one line; cut where it is too long.

    Returns:
        A PNG file, the same bytes for the same arguments on the same machine.

    Raises:
        MissingExtra: the extra `report` is not installed.
    """
    with drawing():
        return png(_reliability(calibration, title))


def training_curves(rows: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Loss, top-1 and learning rate over the epochs of a training, one below the other.

    Args:
        rows: one an epoch, with `epoch`, `loss`, `lr`, and where there was a validation `val_loss`, `top1`
            (per cent) and the same of averaged weights, `ema_val_loss`, `ema_top1`.
        title: one line; cut where it is too long.

    Returns:
        A PNG file.

    Raises:
        MissingExtra: the extra `report` is not installed.
    """
    with drawing():
        return png(_curves(rows, title))


_CURVES = (  # of each panel: its name, and the columns with their names
    ("loss", (("loss", "training"), ("val_loss", "validation"), ("ema_val_loss", "validation, averaged weights"))),
    ("top-1 accuracy, %", (("top1", "validation"), ("ema_top1", "validation, averaged weights"))),
    ("learning rate", (("lr", "at the end of the epoch"),)),
)


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar of a `speed_chart`: images per second, with the range of the rounds.

    Attributes:
        reference: whether the others are measured by it.
    """

    label: str
    rate: float
    low: float
    high: float
    reference: bool = False


def speed_chart(groups: Sequence[tuple[str, Sequence[Bar]]], title: str, subtitle: str) -> bytes:
    """Images per second as bars, group by group, on one scale.

    Args:
        groups: a name, and from one bar.
        title, subtitle: one line each; cut where they are too long.

    Returns:
        A PNG file, the same bytes for the same arguments on the same machine.

    Raises:
        MissingExtra: the extra `report` is not installed.
    """
    with drawing():
        return png(_speeds(groups, title, subtitle))


def _speeds(groups: Sequence[tuple[str, Sequence[Bar]]], title: str, subtitle: str) -> "Figure":
    bar_height, gap, head = 0.26, 0.5, 0.75  # inches
    every = [bar for _, bars in groups for bar in bars]
    left = _MARGIN + min(2.5, max(_width(drawable(bar.label)) for bar in every)) + 0.1
    height = head + sum(bar_height * len(bars) + gap for _, bars in groups) + _MARGIN
    figure = canvas(_WIDTH, height, title, fit(drawable(subtitle), _WIDTH - 2 * _MARGIN, _TEXT))
    across = _WIDTH - left - _MARGIN
    room = max(_width(_speed(bar)) for bar in every) + 0.15
    most = max(bar.high for bar in every) * across / (across - room)
    top = height - head
    for name, bars in groups:
        inches = bar_height * len(bars)
        axes = axes_at(figure, left, top - gap - inches, across, inches)
        figure.text(_MARGIN / _WIDTH, (top - gap + 0.1) / height, drawable(name), fontsize=_TEXT, fontweight="bold")
        places = range(len(bars))
        colors = [_UNSURE if bar.reference else RIGHT for bar in bars]
        axes.barh(places, [bar.rate for bar in bars], height=0.74, color=colors)
        axes.hlines(places, [bar.low for bar in bars], [bar.high for bar in bars], INK, linewidth=1.2)
        for place, bar in enumerate(bars):
            end = max(bar.rate, bar.high) + 0.06 * most / across
            axes.text(end, place, _speed(bar), va="center_baseline", fontsize=_SMALL)
        axes.set_yticks(places, [fit(drawable(bar.label), 2.5) for bar in bars])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(0, most)
        axes.tick_params(length=0)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        top -= inches + gap
    return figure


def _speed(bar: Bar) -> str:
    return f"{bar.rate:,.{0 if bar.rate >= 1000 else 1}f}{' (reference)' if bar.reference else ''}"


def _curves(rows: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    from matplotlib.ticker import MaxNLocator

    panels = [panel for panel in _CURVES if any(key in row for row in rows for key, _ in panel[1])]
    panel_height, gap = 1.9, 0.45
    height = 1.15 + len(panels) * (panel_height + gap)
    subtitle = counted(len(rows), "epoch")
    scored = [row for row in rows if "top1" in row]
    if scored:
        best = max(scored, key=lambda row: row["top1"])
        subtitle += f"; best top-1 {best['top1']:.2f} % after epoch {best['epoch']}"
    figure = canvas(_WIDTH, height, title, subtitle)
    colors = {"training": INK, "validation": RIGHT, "validation, averaged weights": WRONG}
    for place, (name, lines) in enumerate(reversed(panels)):
        axes = axes_at(figure, 0.85, 0.55 + place * (panel_height + gap), _WIDTH - 0.85 - _MARGIN, panel_height)
        drawn = 0
        for key, label in lines:
            points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=colors.get(label, INK), marker=".", label=label)
                drawn += 1
        axes.set_title(name, loc="left", fontsize=_TEXT)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color=_FAINT, linewidth=0.5)
        if drawn > 1:
            axes.legend(frameon=False, fontsize=_SMALL)
        if not place:
            axes.set_xlabel("epoch")
    return figure


def _heat_map(matrix: np.ndarray, classes: Classes, title: str) -> "Figure":
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import PercentFormatter

    names, count = _names(classes), len(classes)
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.ma.masked_array(matrix / np.maximum(totals, 1), np.broadcast_to(totals == 0, matrix.shape))
    widest = max(_width(name) for name in names)
    left = _MARGIN + 0.3 + widest
    # Wide enough for the largest number, within what fits on a page.
    fill = min(1.2, (_WIDTH - left - _MARGIN) / count)
    cell_width = min(max(fill, _width(str(matrix.max())) + 0.06), 9.2 / count)
    cell_height = min(max(cell_width, 0.27), 0.6)
    level = widest + 0.1 <= cell_width  # short names need not be slanted
    below = 0.35 + (0.15 if level else 0.72 * widest)
    bare = (totals == 0).any()
    bottom = _MARGIN + below + 0.75 + (0.3 if bare else 0.0)
    width, height = max(_WIDTH, left + count * cell_width + _MARGIN), bottom + count * cell_height + 0.95
    figure = canvas(width, height, title, _tally(matrix))
    axes = axes_at(figure, left, bottom, count * cell_width, count * cell_height)

    # The square root spreads the small shares, which are the mistakes.
    norm, colors = PowerNorm(0.5, 0, 1), colormaps["Blues"].with_extremes(bad=_EMPTY)
    cells = axes.pcolormesh(shares, cmap=colors, norm=norm, edgecolors=_FAINT, linewidth=0.25)
    axes.invert_yaxis()
    for row, column in zip(*np.nonzero(matrix), strict=True):
        number = str(matrix[row, column])
        size = _SMALL * min(1.0, (cell_width - 0.02) / _width(number))
        color = _readable_on(colors(norm(shares[row, column])))
        axes.text(column + 0.5, row + 0.5, number, color=color, fontsize=size, ha="center", va="center_baseline")
    slanted: dict[str, Any] = {} if level else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(np.arange(count) + 0.5, names, **slanted)
    axes.set_yticks(np.arange(count) + 0.5, names)
    axes.tick_params(length=0)
    figure.text(_MARGIN / width, (bottom + count * cell_height / 2) / height, "true class", rotation=90, va="center")
    middle = (left + count * cell_width / 2) / width
    figure.text(middle, (bottom - below) / height, "predicted class", ha="center")

    foot = _MARGIN + (0.3 if bare else 0.0)
    label = "share of the true class's images"
    figure.text(left / width, (foot + 0.27) / height, label, va="center", fontsize=_SMALL)
    scale = axes_at(figure, left + _width(label) + 0.25, foot + 0.2, 2.9, 0.14)
    bar = figure.colorbar(cells, cax=scale, orientation="horizontal", ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
    bar.ax.xaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
    bar.outline.set_visible(False)  # pyrefly: ignore
    if bare:
        figure.text(left / width, _MARGIN / height, "A gray row is a class without images.", fontsize=_SMALL)
    return figure


def _worst_pairs(matrix: np.ndarray, classes: Classes, title: str) -> "Figure":
    mistakes = matrix.astype(np.int64)
    np.fill_diagonal(mistakes, 0)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:WORST_PAIRS]
    pairs = [(i, j) for i, j in zip(*np.unravel_index(order, matrix.shape), strict=True) if mistakes[i, j]]
    if not pairs:
        return canvas(_WIDTH, 1.2, title, _tally(matrix))
    names = _names(classes)
    labels = [f"{names[i]} → {names[j]}" for i, j in pairs]
    counts = np.array([mistakes[pair] for pair in pairs])
    totals = matrix.sum(axis=1)
    texts = [f"{_grouped(n)}   ({_percent(n, totals[i])})" for n, (i, _) in zip(counts, pairs, strict=True)]
    shown, every = int(counts.sum()), int(np.count_nonzero(mistakes))
    extent = f"the {len(pairs)} most frequent of {_grouped(every)} pairs of classes, {counted(shown, 'mistake')}"
    if every == len(pairs):
        extent = f"all of them, in {counted(every, 'pair')} of classes"
    left = _MARGIN + max(_width(label) for label in labels) + 0.1
    room = max(_width(text) for text in texts) + 0.15
    width, row = 9.0, 0.26
    height = _MARGIN + 0.3 + len(pairs) * row + 1.2
    figure = canvas(width, height, title, f"{_tally(matrix)}\nShown: {extent}")
    axes = axes_at(figure, left, _MARGIN + 0.3, width - _MARGIN - left, len(pairs) * row)
    bars = axes.barh(range(len(pairs)), counts, height=0.72, color=WRONG)
    for text in axes.bar_label(bars, texts, padding=4, fontsize=_SMALL):
        text.set_verticalalignment("center_baseline")  # as the names at the other end
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.set_xlim(0, counts.max() * (width - _MARGIN - left) / (width - _MARGIN - left - room))
    axes.set_yticks(range(len(pairs)), labels)
    axes.tick_params(length=0)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    note = "true class → predicted class: images, and their share of the true class's images"
    figure.text(_MARGIN / width, _MARGIN / height, note, fontsize=_SMALL)
    return figure


def _reliability(calibration: Calibration, title: str) -> "Figure":
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    bins, total = len(calibration.counts), sum(calibration.counts)
    filled = np.array(calibration.counts) > 0
    counts, accuracy, confidence = (
        np.array(values)[filled] for values in (calibration.counts, calibration.accuracy, calibration.confidence)
    )
    error = f"Expected calibration error (ECE): {100 * calibration.error:.2f} %, {counted(total, 'image')}"
    figure = canvas(_WIDTH, 7.0, title, f"{error} in {counted(bins, 'bin')}" if total else "No images")
    left, inner = 0.85, _WIDTH - 0.85 - _MARGIN
    above = axes_at(figure, left, 2.05, inner, 3.6)
    below = axes_at(figure, left, 0.65, inner, 1.15)

    middles, full = ((np.arange(bins) + 0.5) / bins)[filled], 0.94 / bins
    above.bar(middles, accuracy, full, color=RIGHT)
    over: dict[str, Any] = {"facecolor": PAPER, "edgecolor": WRONG, "hatch": "////"}
    under: dict[str, Any] = {"facecolor": PAPER, "edgecolor": _UNSURE, "hatch": "...."}
    for which, style in ((confidence > accuracy, over), (confidence < accuracy, under)):
        above.bar(middles[which], (confidence - accuracy)[which], 0.9 * full, accuracy[which], **style)
    intervals = [wilson(round(a * n), int(n)) for a, n in zip(accuracy, counts, strict=True)]
    low, high = np.array(intervals).reshape(-1, 2).T / 100
    above.vlines(middles, low, high, INK, linewidth=1.2)
    above.plot([0, 1], [0, 1], "--", color=INK, linewidth=1)
    signs = [
        Patch(color=RIGHT, label="accuracy"),
        Line2D([], [], color=INK, linewidth=1.2, label="95 % interval of the accuracy"),
        Patch(**over, label="gap: overconfident"),
        Patch(**under, label="gap: underconfident"),
        Line2D([], [], color=INK, linewidth=1, linestyle="--", label="accuracy = confidence"),
    ]
    above.legend(handles=signs, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False)
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")

    below.bar(middles, counts, full, color="#777777")
    texts = [_grouped(n) for n in counts]
    size = _SMALL * min([1.0, *(0.9 * inner / bins / _width(text) for text in texts)])
    for x, n, text in zip(middles, counts, texts, strict=True):
        below.annotate(text, (x, n), (0, 2), textcoords="offset points", ha="center", fontsize=size)
    below.set(xlim=(0, 1), ylim=(0, 1.25 * max([1, *counts])), ylabel="images")
    below.set_xlabel("confidence: probability of the predicted class")
    below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    below.yaxis.set_major_formatter(EngFormatter(sep=""))
    above.tick_params(labelbottom=False)
    for axis in (above.xaxis, above.yaxis, below.xaxis):
        axis.set_major_locator(MaxNLocator(10))
        axis.set_major_formatter(PercentFormatter(1, 0, " %"))
    figure.align_ylabels((above, below))
    return figure


@contextlib.contextmanager
def drawing() -> Generator[None]:
    """The settings of all charts, while one is drawn."""
    require_report()
    import matplotlib.style

    own = {
        "font.family": list(_families()),
        "font.size": _TEXT,
        "xtick.labelsize": _SMALL,
        "ytick.labelsize": _SMALL,
        "legend.fontsize": _SMALL,
        "text.parse_math": False,  # a dollar in a name is a dollar
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": "#888888",
        "xtick.color": INK,
        "ytick.color": INK,
        "figure.facecolor": PAPER,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "hatch.linewidth": 1.0,
    }
    with matplotlib.style.context(["default", own]):
        yield


def canvas(width: float, height: float, title: str | Sequence[str], subtitle: str) -> "Figure":
    """A figure of that many inches with its two head lines; the title may be in parts, as for `joined`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    left, room = _MARGIN / width, width - 2 * _MARGIN
    parts = (title,) if isinstance(title, str) else title
    figure.text(left, 1 - 0.42 / height, joined(parts, room, _TITLE), fontsize=_TITLE)
    figure.text(left, 1 - 0.56 / height, subtitle, va="top", linespacing=1.4)
    return figure


def joined(parts: Sequence[str], inches: float, points: float = _TEXT) -> str:
    """A line of several parts, each with the direction of its own script; where they do not fit, the longest give way.

    Args:
        parts: texts that may hold anything, with the spaces between them.
    """
    texts = []
    for part in parts:  # what cannot be shown goes, the spaces at the ends stay
        shown = drawable(part)
        texts.append(f"{' ' * part.startswith(' ')}{shown}{' ' * (bool(shown) and part.endswith(' '))}")
    if len(texts) == 1:
        return fit(texts[0], inches, points)
    widths = sorted(_width(text[:500], points) for text in texts)
    most, left = inches, inches  # what each may have: all of it, or an even share of what shorter ones leave
    for number, width in enumerate(widths):
        most = left / (len(widths) - number)
        if width > most:
            break
        left -= width
    else:
        most = inches
    return fit("".join(upright(fit(text, most, points)) for text in texts), inches, points)


def axes_at(figure: "Figure", left: float, bottom: float, width: float, height: float) -> "Axes":
    """Axes at a place in inches."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return file.getvalue()


def _tally(matrix: np.ndarray) -> str:
    """How many mistakes, of how many images."""
    images, mistakes = int(matrix.sum()), int(matrix.sum() - np.trace(matrix))
    if not images:
        return "No images"
    return f"{counted(mistakes, 'mistake') if mistakes else 'No mistakes'} in {counted(images, 'image')}"


def _grouped(number: int) -> str:
    return f"{number:,}"


def _percent(part: int, whole: int) -> str:
    """Of a few images no decimals, which would pretend to know more."""
    return f"{100 * part / whole:.{0 if whole < 1000 else 1}f} %"


def _readable_on(color: Sequence[float]) -> str:
    """Ink or paper, whichever has more contrast with `color` by WCAG's rule."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
    luminance = np.dot((0.2126, 0.7152, 0.0722), linear)
    dark = 0.0160  # of INK
    return INK if (luminance + 0.05) / (dark + 0.05) >= 1.05 / (luminance + 0.05) else PAPER


def _names(classes: Classes) -> list[str]:
    """A short label for each class, no two alike: the name, with the id or else the index where names repeat.

    The id, or else the index, stands for a name that the fonts cannot show.
    """
    ids = [drawable(c.id) for c in classes]
    names = []
    for index, (c, identity) in enumerate(zip(classes, ids, strict=True)):
        ways = [way for way in (drawable(c.name), identity, f"class {index}") if way]
        names.append(fit(min(ways, key=lambda way: _NO_GLYPH in way), _NAME))
    for marks in (ids, range(len(classes))):
        times = collections.Counter(names)
        for index, (name, mark) in enumerate(zip(names, marks, strict=True)):
            room = _NAME - _width(f" ({mark})")
            if times[name] > 1 and room > _NAME / 3:
                names[index] = f"{fit(name, room)} ({mark})"
    return [upright(name) for name in names]


def upright(text: str) -> str:
    """Set apart from its neighbors: a name that is read from right to left takes nothing with it."""
    return f"{_LEFT_TO_RIGHT}{text}{_LEFT_TO_RIGHT}"


def drawable(text: str) -> str:
    """One line that the fonts can show: any white space is a space, other characters boxes."""
    known = _characters()
    kept, marks = [], 0
    for c in unicodedata.normalize("NFC", " ".join(text.split())):
        category = unicodedata.category(c)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        if category != "Cf" and marks <= 2:  # no tower of accents reaches into the next line
            kept.append(c if ord(c) in known and c.isprintable() else _NO_GLYPH)
    return "".join(kept)


def fit(text: str, inches: float, points: float = _SMALL) -> str:
    """Shorten to a width."""
    text = text[:500]  # no need to measure what cannot fit
    if _width(text, points) <= inches:
        return text
    text = text.removesuffix("…")
    longer = bisect.bisect(range(len(text)), inches, key=lambda length: _width(text[:length] + "…", points))
    return text[: max(0, longer - 1)].rstrip() + "…"


def _width(text: str, points: float = _SMALL) -> float:
    """Inches."""
    return sum(map(_advance, text)) * points / 72


@functools.cache
def _advance(character: str) -> float:
    """How far a character moves the pen, in font sizes; measured once, as shaping a thousand names takes a second."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=list(_families()), size=100)
    with_it, without = (text_to_path.get_text_width_height_descent(t, font, False)[0] for t in (f"|{character}|", "||"))
    return (with_it - without) / 100


@functools.cache
def _families() -> tuple[str, ...]:
    """Those of `_FONTS` that this machine has: matplotlib complains of others."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return tuple(name for name in _FONTS if name in installed)


@functools.cache
def _characters() -> frozenset[int]:
    """What the fonts can show. They are used upright and regular only: the other cuts have fewer."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    charmaps: Iterable[dict[Any, Any]] = (
        get_font(findfont(FontProperties(family=[name]))).get_charmap() for name in _families()
    )
    return frozenset(int(code) for charmap in charmaps for code in charmap)
