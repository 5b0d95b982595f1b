"""Charts as PNG files: confusion between classes, reliability diagram, training curves, speed.

Matplotlib is imported when a chart is drawn, and pyplot is never imported. The charts neither use nor change the user's
Matplotlib settings. Names and texts are drawn literally, without markup.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import unicodedata
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from fcvit.data.classes import Classes
from fcvit.errors import DoesNotFit, counted
from fcvit.metrics.classification import Calibration, wilson
from fcvit.report import page
from fcvit.report.image_grid import INK, PAPER, RIGHT, WRONG

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATRIX_CLASSES = 30  # with more classes, the cells of a confusion matrix are too small to read
WORST_PAIRS = 30
LARGEST = 20  # classes in the confusion of pixels
UNSURE, GREEN, FAINT = "#56B4E9", "#009E73", "#d9d9d9"  # sky blue and green of the Okabe-Ito palette, and gray
DPI = 160
_WIDTH = 8.0  # inches
_NAME = 20  # maximum width of a class name in columns
# DejaVu Sans, the font included in Matplotlib, has no Chinese, Japanese or Korean characters. The others have them.
_FONTS = """DejaVu Sans,Noto Sans CJK SC,Noto Sans CJK JP,Source Han Sans SC,Source Han Sans CN,WenQuanYi Zen Hei
WenQuanYi Micro Hei,Microsoft YaHei,SimHei,PingFang SC,Hiragino Sans GB,Malgun Gothic,Apple SD Gothic Neo
Arial Unicode MS"""
_NO_GLYPH = "\u25a1"
_LEFT_TO_RIGHT = "\u200e"  # keeps "Hebrew → Arabic" left to right: the reverse order would change its meaning


P = ParamSpec("P")


def chart(draw: Callable[P, "Figure"]) -> Callable[P, bytes]:
    """Decorate a function that draws a figure, so that it returns a PNG file.

    The same arguments give the same bytes on one machine. The function raises MissingExtra if the `report` extra is not
    installed.
    """

    @functools.wraps(draw)
    def drawn(*arguments: P.args, **options: P.kwargs) -> bytes:
        with drawing():
            file = io.BytesIO()
            draw(*arguments, **options).savefig(file, format="png", metadata={"Software": None})
            return file.getvalue()

    return drawn


@chart
def confusion_chart(matrix: np.ndarray, classes: Classes, title: str) -> "Figure":
    """Draw the confusion matrix of up to `MATRIX_CLASSES` classes, or the most frequent errors for more classes.

    Args:
        matrix: Integers (C, C). Entry (i, j) is the number of images of class i predicted as class j.
        classes: C classes. Names may repeat and contain any characters.
        title: One line. It is shortened if it is too long.

    Raises:
        DoesNotFit: The shape of the matrix does not match the number of classes.
    """
    if matrix.shape != (len(classes), len(classes)):
        raise DoesNotFit(f"the shape {matrix.shape} of the confusion matrix does not match {len(classes)} classes")
    return (_heat_map if len(classes) <= MATRIX_CLASSES else _worst_pairs)(matrix, classes, title)


def _heat_map(matrix: np.ndarray, classes: Classes, title: str) -> "Figure":
    names = _names(classes)
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.ma.masked_array(matrix / np.maximum(totals, 1), np.broadcast_to(totals == 0, matrix.shape))
    texts = [[str(count) if count else "" for count in row] for row in matrix.tolist()]
    note = "\nA gray row is a class without images." if (totals == 0).any() else ""
    return _cells(shares, texts, names, names, title, _tally(matrix) + note, "images")


@chart
def pixel_confusion_chart(matrix: np.ndarray, classes: Classes, title: str, largest: int = LARGEST) -> "Figure":
    """Draw the percentages of the pixels of the largest classes by predicted class.

    Args:
        matrix: Integers (C, C). Entry (i, j) is the number of pixels of class i predicted as class j.
        classes: C classes. Names may repeat and contain any characters.
        title: One line. It is shortened if it is too long.
        largest: Maximum number of classes with pixels to show. All other predicted classes are added up in one column.
    """
    totals, names = matrix.sum(axis=1), _names(classes)
    order = np.argsort(-totals, kind="stable")[: min(largest, max(1, np.count_nonzero(totals)))]
    cells, columns = matrix[np.ix_(order, order)], [names[index] for index in order]
    if len(order) < len(classes):
        cells = np.column_stack([cells, totals[order] - cells.sum(axis=1)])
        columns.append("all other classes")
    empty = np.broadcast_to(totals[order, None] == 0, cells.shape)
    shares = np.ma.masked_array(cells / np.maximum(totals[order, None], 1), empty)
    texts = [[f"{100 * share:.0f}" if share >= 0.005 else "" for share in row] for row in shares.filled(0)]
    extent = 100 * totals[order].sum() / max(1, totals.sum())
    subtitle = (
        f"Percentage of the pixels of each class. {counted(len(order), 'class')} with {extent:.1f}% of all pixels"
    )
    return _cells(shares, texts, columns[: len(order)], columns, title, subtitle, "pixels")


def _cells(
    shares: np.ma.MaskedArray,
    texts: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    subtitle: str,
    unit: str,
) -> "Figure":
    """Draw a confusion matrix: the fraction of each true class (row) as the color, and a text for each cell."""
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import PercentFormatter

    count = len(columns)
    cell = min(1.0, max(0.34, 5.5 / count))  # inches
    width, height = max(_WIDTH, 2.5 + count * cell), 3.4 + len(rows) * min(cell, 0.6)
    figure = new_figure(width, height, title, subtitle)
    axes = figure.subplots()
    # The square root makes small fractions, which are the errors, easier to distinguish.
    norm, colors = PowerNorm(0.5, 0, 1), colormaps["Blues"].with_extremes(bad="#e6e6e6")
    cells = axes.pcolormesh(shares, cmap=colors, norm=norm, edgecolors=FAINT, linewidth=0.25)
    axes.invert_yaxis()
    size = min(9.0, 100 * cell / max(4, *(len(text) for row in texts for text in row)))
    for (row, column), share in np.ndenumerate(shares.filled(0)):
        if text := texts[row][column]:
            color, at = PAPER if share > 0.35 else INK, (column + 0.5, row + 0.5)
            axes.text(*at, text, color=color, fontsize=size, ha="center", va="center_baseline")
    axes.set_xticks(np.arange(count) + 0.5, columns, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.tick_params(length=0)
    axes.set(xlabel="predicted class", ylabel="true class")
    scale: dict[str, Any] = {"ticks": [0, 0.01, 0.1, 0.25, 0.5, 1], "format": PercentFormatter(1, 0)}
    layout: dict[str, Any] = {"location": "bottom", "aspect": 40, "shrink": 0.6}
    bar = figure.colorbar(cells, ax=axes, label=f"percentage of the {unit} of the true class", **scale, **layout)
    bar.outline.set_visible(False)  # pyrefly: ignore
    return figure


def _worst_pairs(matrix: np.ndarray, classes: Classes, title: str) -> "Figure":
    errors = matrix.astype(np.int64)
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:WORST_PAIRS]
    pairs = [(i, j) for i, j in zip(*np.unravel_index(order, matrix.shape), strict=True) if errors[i, j]]
    if not pairs:
        return new_figure(_WIDTH, 1.2, title, _tally(matrix))
    names, totals = _names(classes), matrix.sum(axis=1)
    counts = np.array([errors[pair] for pair in pairs])
    total = int(np.count_nonzero(errors))
    extent = f"the {len(pairs)} most frequent of {total:,} class pairs, with {counted(int(counts.sum()), 'error')}"
    if total == len(pairs):
        extent = f"all errors, in {counted(total, 'class pair')}"
    figure = new_figure(9.0, 1.6 + len(pairs) * 0.26, title, f"{_tally(matrix)}\nShown: {extent}")
    axes = figure.subplots()
    # Decimals would suggest too much precision for a small number of images.
    shares = [100 * number / totals[i] for number, (i, _) in zip(counts, pairs, strict=True)]
    digits = [0 if totals[i] < 1000 else 1 for i, _ in pairs]
    texts = [f"{n:,}   ({share:.{digit}f}%)" for n, share, digit in zip(counts, shares, digits, strict=True)]
    _bars(axes, [f"{names[i]} → {names[j]}" for i, j in pairs], counts, texts, [WRONG] * len(pairs))
    axes.set_xlim(0, 1.25 * counts.max())
    text = "true class → predicted class: number of images (percentage of the true class)"
    axes.set_title(text, loc="left", fontsize=9)
    return figure


@chart
def reliability_chart(calibration: Calibration, title: str) -> "Figure":
    """Draw a reliability diagram: accuracy by confidence bin, and the number of images in each bin."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    bins, total = len(calibration.counts), sum(calibration.counts)
    filled = np.array(calibration.counts) > 0
    counts, accuracy, confidence = (
        np.array(values)[filled] for values in (calibration.counts, calibration.accuracy, calibration.confidence)
    )
    error = f"Expected calibration error (ECE): {calibration.error:.4f}, {counted(total, 'image')}"
    figure = new_figure(_WIDTH, 7.0, title, f"{error} in {counted(bins, 'bin')}" if total else "No images")
    above, below = _column(figure, 2, sharex=True, height_ratios=[3, 1])

    middles, full = ((np.arange(bins) + 0.5) / bins)[filled], 0.94 / bins
    above.bar(middles, accuracy, full, color=RIGHT)
    over: dict[str, Any] = {"facecolor": PAPER, "edgecolor": WRONG, "hatch": "////"}
    under: dict[str, Any] = {"facecolor": PAPER, "edgecolor": UNSURE, "hatch": "...."}
    for which, style in ((confidence > accuracy, over), (confidence < accuracy, under)):
        above.bar(middles[which], (confidence - accuracy)[which], 0.9 * full, accuracy[which], **style)
    intervals = [wilson(round(a * n), int(n)) for a, n in zip(accuracy, counts, strict=True)]
    low, high = np.array(intervals).reshape(-1, 2).T / 100
    above.vlines(middles, low, high, INK, linewidth=1.2)
    above.plot([0, 1], [0, 1], "--", color=INK, linewidth=1)
    signs = [
        Patch(color=RIGHT, label="accuracy"),
        Line2D([], [], color=INK, linewidth=1.2, label="95% confidence interval of the accuracy"),
        Patch(**over, label="gap: overconfident"),
        Patch(**under, label="gap: underconfident"),
        Line2D([], [], color=INK, linewidth=1, linestyle="--", label="accuracy = confidence"),
    ]
    above.legend(handles=signs, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False)
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    below.bar(middles, counts, full, color="#777777")
    for x, number in zip(middles, counts, strict=True):
        style = {"textcoords": "offset points", "ha": "center", "fontsize": min(9.0, 600 / bins / len(f"{number:,}"))}
        below.annotate(f"{number:,}", (x, number), (0, 2), **style)
    below.set(ylim=(0, 1.25 * max([1, *counts])), ylabel="images")
    below.set_xlabel("confidence (probability of the predicted class)")
    below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    below.yaxis.set_major_formatter(EngFormatter(sep=""))
    for axis in (above.yaxis, below.xaxis):
        axis.set_major_locator(MaxNLocator(10))
        axis.set_major_formatter(PercentFormatter(1, 0))
    return figure


_CURVES = (  # panels: (name, ((column, label, color), ...))
    (
        "loss",
        (
            ("loss", "training", INK),
            ("val_loss", "validation", RIGHT),
            ("ema_val_loss", "validation, EMA weights", WRONG),
        ),
    ),
    (
        "terms of the loss",
        (
            ("loss_rpn_cls", "RPN, objects", UNSURE),
            ("loss_rpn_bbox", "RPN, boxes", GREEN),
            ("loss_cls", "classes", INK),
            ("loss_bbox", "boxes", RIGHT),
            ("loss_mask", "masks", WRONG),
        ),
    ),
    ("top-1 accuracy (%)", (("top1", "validation", RIGHT), ("ema_top1", "validation, EMA weights", WRONG))),
    ("mIoU (%)", (("miou", "validation", RIGHT), ("ema_miou", "validation, EMA weights", WRONG))),
    ("pixel accuracy (%)", (("aacc", "validation", RIGHT), ("ema_aacc", "validation, EMA weights", WRONG))),
    ("box AP (%)", (("box_ap", "validation", RIGHT), ("ema_box_ap", "validation, EMA weights", WRONG))),
    ("mask AP (%)", (("mask_ap", "validation", RIGHT), ("ema_mask_ap", "validation, EMA weights", WRONG))),
    ("learning rate", (("lr", "at the end of the epoch", INK),)),
)


@chart
def precision_recall_chart(curves: Mapping[str, np.ndarray], title: str) -> "Figure":
    """Draw the mean precision of all classes by recall, for the IoU thresholds 0.50 and 0.75 and as the mean of all.

    Args:
        curves: Name of a panel -> precision (10, 101, C) at the IoU thresholds 0.50, 0.55, ..., 0.95 and at recall 0,
            0.01, ..., 1, NaN for classes without objects.
        title: One line. It is shortened if it is too long.
    """
    figure = new_figure(_WIDTH, 4.6, title)
    recall = np.linspace(0, 1, 101)
    for axes, (name, precision) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        known = precision[:, :, ~np.isnan(precision[0, 0])]
        if known.shape[2]:
            means = known.mean(axis=2)
            lines = ((means[0], "IoU 0.50", RIGHT), (means[5], "IoU 0.75", WRONG), (means.mean(axis=0), "mean", INK))
            for values, label, color in lines:
                axes.plot(recall, values, color=color, label=f"{label} (AP {100 * values.mean():.1f}%)")
            axes.legend(loc="lower left", framealpha=0.9, edgecolor="none")
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
        axes.set_title(name, loc="left")
        axes.grid(color=FAINT, linewidth=0.5)
    return figure


@chart
def training_curves(rows: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    """Draw loss, metrics and learning rate over the epochs of a training run, in panels.

    Args:
        rows: One row per epoch with `epoch`, `loss` and `lr`, and for a detector the terms of the loss, such as
            `loss_mask`. After a validation also `val_loss` and `top1`, or `miou` and `aacc`, or `box_ap` and `mask_ap`
            (percent), and the same for EMA weights, such as `ema_top1`.
        title: One line. It is shortened if it is too long.
    """
    from matplotlib.ticker import MaxNLocator

    panels = [panel for panel in _CURVES if any(key in row for row in rows for key, *_ in panel[1])]
    subtitle = counted(len(rows), "epoch")
    for key, metric in (("top1", "top-1 accuracy"), ("miou", "mIoU"), ("box_ap", "box AP"), ("mask_ap", "mask AP")):
        if scored := [row for row in rows if key in row]:
            best = max(scored, key=lambda row, key=key: row[key])
            subtitle += f", best {metric} {best[key]:.2f}% after epoch {best['epoch']}"
    figure = new_figure(_WIDTH, 1 + 2.2 * len(panels), title, subtitle)
    for axes, (name, lines) in zip(_column(figure, len(panels), sharex=True), panels, strict=True):
        for key, label, color in lines:
            if points := [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]:
                axes.plot(*zip(*points, strict=True), color=color, marker=".", label=label)
        axes.set_title(name, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(rows[0]["epoch"] - 0.5, rows[-1]["epoch"] + 0.5)
        axes.grid(color=FAINT, linewidth=0.5)
        if len(axes.lines) > 3:  # too many for a legend that hides no line
            axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(axes.lines), borderpad=0)
        elif len(axes.lines) > 1:
            axes.legend(frameon=False)
    figure.axes[-1].set_xlabel("epoch")
    return figure


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar of a `speed_chart`.

    Attributes:
        label: Label of the bar.
        rate: Images per second.
        low, high: Lowest and highest rate of all measurement rounds.
        reference: True for the reference of the comparison.
    """

    label: str
    rate: float
    low: float
    high: float
    reference: bool = False


@chart
def speed_chart(groups: Sequence[tuple[str, Sequence[Bar]]], title: str, subtitle: str) -> "Figure":
    """Draw images per second as bars on a common scale. Each group is a name with its bars."""
    sizes = [len(bars) for _, bars in groups]
    figure = new_figure(_WIDTH, 1 + 0.5 * len(groups) + 0.28 * sum(sizes), title, subtitle)
    panels = _column(figure, len(groups), sharex=True, height_ratios=sizes)
    for axes, (name, bars) in zip(panels, groups, strict=True):
        speeds = [f"{bar.rate:,.{0 if bar.rate >= 1000 else 1}f}{' (reference)' * bar.reference}" for bar in bars]
        labels, rates = [shown(bar.label, 36) for bar in bars], [bar.rate for bar in bars]
        lows, highs = [bar.low for bar in bars], [bar.high for bar in bars]
        _bars(axes, labels, rates, speeds, [UNSURE if bar.reference else RIGHT for bar in bars], highs)
        axes.hlines(range(len(bars)), lows, highs, INK, linewidth=1.2)
        axes.set_title(shown(name), loc="left", fontweight="bold")
    figure.axes[0].set_xlim(0, 1.25 * max(bar.high for _, bars in groups for bar in bars))
    return figure


@contextlib.contextmanager
def drawing() -> Generator[None]:
    """Apply the Matplotlib settings of the charts, and restore the previous settings afterwards."""
    page.require_report()
    import matplotlib.style

    small = {f"{what}.labelsize": 9 for what in ("xtick", "ytick")} | {"legend.fontsize": 9, "axes.titlesize": 10}
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    own = {
        "font.family": _fonts()[0],
        "font.size": 10,
        "savefig.dpi": DPI,
        "text.parse_math": False,  # a dollar sign in a name does not start a formula
        "axes.edgecolor": "#888888",
        "figure.facecolor": PAPER,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "hatch.linewidth": 1.0,
    }
    with matplotlib.style.context(["default", small | ink | own]):
        yield


def new_figure(width: float, height: float, title: str, subtitle: str = "", layout: Any = "constrained") -> "Figure":
    """Create a figure, with the size in inches, a title and a subtitle of one or more lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    lines = [shown(line, int(width * 11)) for line in (title, *subtitle.split("\n")) if line]
    figure.suptitle("\n".join(lines), x=0.1 / width, ha="left", va="top", fontsize=11)
    return figure


def _column(figure: "Figure", count: int, **options: Any) -> Sequence[Any]:
    return figure.subplots(count, 1, squeeze=False, **options)[:, 0]


def _bars(
    axes: Any, names: Sequence[str], values: Any, texts: Sequence[str], colors: Sequence[str], ends: Any = ()
) -> None:
    """Draw horizontal bars from top to bottom, with the name on the left and a text at the end of each bar."""
    axes.barh(range(len(names)), values, height=0.74, color=colors)
    for row, (value, text) in enumerate(zip(values, texts, strict=True)):
        end = max(value, ends[row]) if len(ends) else value
        axes.annotate(text, (end, row), (4, 0), textcoords="offset points", va="center_baseline", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)


def _tally(matrix: np.ndarray) -> str:
    """Return the number of errors and of images as text."""
    images, errors = int(matrix.sum()), int(matrix.sum() - np.trace(matrix))
    wrong = counted(errors, "error") if errors else "No errors"
    return f"{wrong} in {counted(images, 'image')}" if images else "No images"


def _names(classes: Classes) -> list[str]:
    """Return a short, unique label for each class.

    The label is the name. If names repeat, the id is added, and the index if this is not unique either. The id, or else
    the index, replaces a name that the fonts cannot show.
    """
    ids = [shown(c.id, _NAME) for c in classes]
    names = []
    for index, (c, identity) in enumerate(zip(classes, ids, strict=True)):
        labels = [label for label in (shown(c.name, _NAME), identity, f"class {index}") if label]
        names.append(min(labels, key=lambda label: _NO_GLYPH in label))
    for suffixes in (ids, range(len(classes))):
        counts = collections.Counter(names)
        pairs = zip(names, suffixes, strict=True)
        names = [f"{name} ({suffix})" if counts[name] > 1 else name for name, suffix in pairs]
    return [f"{_LEFT_TO_RIGHT}{name}{_LEFT_TO_RIGHT}" for name in names]


def shown(text: str, columns: int = 80) -> str:
    """Return the text as one line of at most `columns` columns. Characters without a glyph become boxes."""
    known, line, width = _fonts()[1], "", 0
    for c in unicodedata.normalize("NFC", " ".join(text[: 10 * columns].split())):
        category = unicodedata.category(c)
        width += 2 if unicodedata.east_asian_width(c) in "WF" else category not in ("Mn", "Me", "Cf")
        if width > columns:
            return line[:-1].rstrip() + "…"
        if category != "Cf":
            line += c if ord(c) in known and c.isprintable() else _NO_GLYPH
    return line[: 2 * columns]  # limits combining characters, which have no width


@functools.cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """Return the installed fonts of `_FONTS`, since Matplotlib warns about missing ones, and their characters."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    installed = {font.name for font in fontManager.ttflist}
    names = [str(name) for name in _FONTS.replace("\n", ",").split(",") if name in installed]
    fonts = [get_font(findfont(FontProperties(family=[name]))) for name in names]
    return names, frozenset(int(code) for font in fonts for code in font.get_charmap())
