"""Charts about similarity maps: how they change with depth, and whether they mark what predictions rest on."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from fcvit.report.charts import axes_at, canvas, drawing, png
from fcvit.report.contact_sheet import INK, RIGHT, WRONG

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FAINT = "#d9d9d9"


@dataclasses.dataclass(frozen=True)
class Line:
    """A measure over depth: its name, and a value for each context (NaN: none)."""

    name: str
    values: Sequence[float]


class RemovalCurves(Protocol):
    """What `trust_chart` draws of one kind of map; probabilities when 0 to 100 % of the pixels are gone or there."""

    @property
    def name(self) -> str: ...
    @property
    def deletion(self) -> tuple[float, ...]: ...
    @property
    def insertion(self) -> tuple[float, ...]: ...
    @property
    def random_deletion(self) -> tuple[float, ...]: ...
    @property
    def random_insertion(self) -> tuple[float, ...]: ...


def depth_chart(lines: Sequence[Line], names: Sequence[str], title: str, images: int) -> bytes:
    """One panel a measure, one below the other, over the contexts: a PNG file.

    Raises:
        MissingExtra: the extra `report` is not installed.
    """
    with drawing():
        return png(_depth(lines, names, title, images))


def trust_chart(curves: Sequence[RemovalCurves], title: str, images: int) -> bytes:
    """Deletion above, insertion below, one column a kind of map, each beside random maps: a PNG file.

    Raises:
        MissingExtra: the extra `report` is not installed.
    """
    with drawing():
        return png(_trust(curves, title, images))


def _depth(lines: Sequence[Line], names: Sequence[str], title: str, images: int) -> "Figure":
    panel, gap, width = 1.25, 0.42, 8.0
    height = 1.15 + len(lines) * (panel + gap) + 0.3
    figure = canvas(width, height, title, f"means over {images} images; stage.block.context")
    places = range(len(names))
    for number, line in enumerate(reversed(lines)):
        axes = axes_at(figure, 0.65, 0.75 + number * (panel + gap), width - 0.9, panel)
        axes.plot(places, line.values, color=RIGHT, marker="o", markersize=4)
        axes.set_title(line.name, loc="left", fontsize=10)
        axes.grid(color=_FAINT, linewidth=0.5)
        axes.margins(y=0.15)
        axes.set_xlim(-0.5, len(names) - 0.5)
        step = -(-len(names) // 26)
        axes.set_xticks(places[::step], names[::step] if not number else [""] * len(places[::step]), rotation=90)
    return figure


def _trust(curves: Sequence[RemovalCurves], title: str, images: int) -> "Figure":
    side, gap, left = 1.75, 0.3, 0.75
    width, height = left + len(curves) * (side + gap) + 0.1, 1.35 + 2 * (side + 0.45) + 0.45
    figure = canvas(
        max(width, 6.0), height, title, f"{images} images; probability of the predicted class; stage.block.context"
    )
    for column, one in enumerate(curves):
        for row, (own, random, what) in enumerate(
            (
                (one.insertion, one.random_insertion, "% of pixels returned"),
                (one.deletion, one.random_deletion, "% of pixels removed"),
            )
        ):
            axes = axes_at(figure, left + column * (side + gap), 0.95 + row * (side + 0.6), side, side)
            shares = [100 * index / (len(own) - 1) for index in range(len(own))]
            axes.plot(shares, own, color=RIGHT, linewidth=2, label="the map")
            axes.plot(shares, random, color=WRONG, linewidth=1.5, linestyle="--", label="random maps")
            axes.set_ylim(0, 1.02)
            axes.grid(color=_FAINT, linewidth=0.5)
            axes.set_xlabel(what, fontsize=9)
            if row:
                axes.set_title(one.name, loc="left", fontsize=10)
            if column:
                axes.set_yticklabels([])
            else:
                axes.set_ylabel("insertion" if not row else "deletion", color=INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower left", ncols=2, frameon=False, bbox_to_anchor=(0.02, 0.005))
    return figure
