"""Charts about similarity maps: how they change with depth, and whether they mark what predictions rest on."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fcvit.models.maps import short
from fcvit.report.charts import axes_at, canvas, drawing, joined, png
from fcvit.report.contact_sheet import INK, RIGHT, WRONG

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

_FAINT = "#d9d9d9"
_OTHER = "#333333"
_LEGEND: dict[str, Any] = {"ncols": 4, "frameon": False, "bbox_to_anchor": (0.02, 0.005)}
_LOOKS = ((RIGHT, "o", "-"), ("#56B4E9", "s", "--"))  # of the first group of layers, and of the second


@dataclasses.dataclass(frozen=True)
class Line:
    """A measure over depth: its name, a value for each layer (NaN: none), and what noise would have, if it matters."""

    name: str
    values: Sequence[float]
    noise: Sequence[float] = ()


@dataclasses.dataclass(frozen=True)
class Depth:
    """A network's measures over depth.

    Attributes:
        network: its name.
        layers: the names of its layers.
        lines: the measures.
        groups: what each layer is drawn as one line with; none: all are one.
        ends: where a stage ends, as the number of layers before.
    """

    network: str
    layers: Sequence[str]
    lines: Sequence[Line]
    groups: Sequence[str] = ()
    ends: Sequence[int] = ()


class RemovalCurves(Protocol):
    """What `trust_chart` draws of one kind of map; probabilities when 0 to 100 % of the pixels are gone or there.

    Beside its own those of random maps, and of the maps of other images.
    """

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
    @property
    def other_deletion(self) -> tuple[float, ...]: ...
    @property
    def other_insertion(self) -> tuple[float, ...]: ...


def depth_chart(networks: Sequence[Depth], images: int) -> bytes:
    """One panel a measure, one below the other, over the layers; networks side by side on one scale: a PNG file.

    Args:
        networks: at least one, all with the same measures.
        images: how many the values are means over.

    Raises:
        MissingExtra: the extra `report` is not installed.
    """
    with drawing():
        return png(_depth(networks, images))


def trust_chart(curves: Sequence[RemovalCurves], title: str, images: int) -> bytes:
    """Deletion above, insertion below, one column a kind of map, each beside its controls: a PNG file.

    Raises:
        MissingExtra: the extra `report` is not installed.
    """
    with drawing():
        return png(_trust(curves, title, images))


def _depth(networks: Sequence[Depth], images: int) -> "Figure":
    panel, gap, left = 1.25, 0.42, 0.65
    wide = 7.1 if len(networks) == 1 else 5.6
    width = left + len(networks) * (wide + 0.25)
    count = len(networks[0].lines)
    height = 1.9 + count * (panel + gap) + 0.3
    title = "Maps over depth"
    figure = canvas(width, height, title, f"means over {images} images; layers in the order of the pass")
    for row in range(count):
        rows = [network.lines[count - 1 - row] for network in networks]
        known = [value for line in rows for value in (*line.values, *line.noise) if math.isfinite(value)] or [0.0]
        margin = 0.15 * (max(known) - min(known)) or 0.05
        for column, (network, line) in enumerate(zip(networks, rows, strict=True)):
            axes = axes_at(figure, left + column * (wide + 0.25), 1.2 + row * (panel + gap), wide, panel)
            places = range(len(network.layers))
            groups = network.groups or [""] * len(places)
            for (color, marker, style), group in zip(_LOOKS, dict.fromkeys(groups), strict=False):
                own = [place for place in places if groups[place] == group]
                shown = [line.values[place] for place in own]
                axes.plot(own, shown, color=color, marker=marker, linestyle=style, markersize=5, label=group or None)
                if line.noise:
                    noise = [line.noise[place] for place in own]
                    axes.plot(own, noise, color=WRONG, linestyle=style, linewidth=1, label=f"noise {group}".strip())
            for end in network.ends:
                axes.axvline(end - 0.5, color="#888888", linewidth=0.5)
            axes.set_title(line.name, loc="left", fontsize=10)
            axes.grid(color=_FAINT, linewidth=0.5)
            axes.set_ylim(min(known) - margin, max(known) + margin)
            axes.set_xlim(-0.5, len(places) - 0.5)
            step = -(-len(places) // 26)
            axes.set_xticks(places[::step], network.layers[::step] if not row else [""] * len(places[::step]))
            axes.tick_params("x", rotation=90)
            if column:
                axes.set_yticklabels([])
            if row == count - 1:
                name = joined((network.network,), wide, 11)
                axes.annotate(name, (0, 1), (0, 22), "axes fraction", textcoords="offset points", fontsize=11)
    known_labels: dict[str, Artist] = {}
    for axes in figure.axes:
        known_labels |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    if known_labels:
        figure.legend(known_labels.values(), known_labels.keys(), loc="lower left", **_LEGEND)
    return figure


def _trust(curves: Sequence[RemovalCurves], title: str, images: int) -> "Figure":
    side, gap, left, foot = 1.75, 0.3, 0.75, 0.55
    across = len(curves) if len(curves) <= 9 else 8  # the heads of a context, where each is drawn
    band = 2 * (side + 0.6) + 0.15  # deletion and insertion of as many maps as stand side by side
    bands = -(-len(curves) // across)
    width, height = max(left + across * (side + gap) + 0.1, 6.0), 1.0 + bands * band + foot
    subtitle = f"{images} images; probability of the predicted class; stage.block.context"
    figure = canvas(width, height, title, subtitle)
    # Of a thousand classes the likeliest may have but a few per cent.
    top = max(
        max(
            *(*one.deletion, *one.insertion),
            *(*one.random_deletion, *one.random_insertion),
            *(*one.other_deletion, *one.other_insertion),
        )
        for one in curves
    )
    for number, one in enumerate(curves):
        column = number % across
        base = foot + (bands - 1 - number // across) * band + 0.4
        for row, (own, random, other, what) in enumerate(
            (
                (one.insertion, one.random_insertion, one.other_insertion, "% of pixels returned"),
                (one.deletion, one.random_deletion, one.other_deletion, "% of pixels removed"),
            )
        ):
            axes = axes_at(figure, left + column * (side + gap), base + row * (side + 0.6), side, side)
            shares = [100 * index / (len(own) - 1) for index in range(len(own))]
            axes.plot(shares, own, color=RIGHT, linewidth=2, label="the map")
            axes.plot(shares, random, color=WRONG, linewidth=1.5, linestyle="--", label="random maps")
            axes.plot(shares, other, color=_OTHER, linewidth=1.5, linestyle=":", label="another image's map")
            axes.set_ylim(0, 1.04 * top)
            axes.grid(color=_FAINT, linewidth=0.5)
            axes.set_xlabel(what, fontsize=9)
            if row:
                axes.set_title(short(one.name), loc="left", fontsize=10)
            if column:
                axes.set_yticklabels([])
            else:
                axes.set_ylabel("insertion" if not row else "deletion", color=INK)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="lower left", **_LEGEND)
    return figure
