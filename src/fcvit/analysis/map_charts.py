"""Charts about similarity maps: how they change with depth, and whether they mark what predictions rest on."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcvit import run_folder as runs
from fcvit.analysis.faithfulness import Curves, Faithfulness
from fcvit.analysis.head_stats import HeadStats, LayerStats
from fcvit.errors import MissingExtra
from fcvit.models.maps import short
from fcvit.report.charts import FAINT, UNSURE, chart, new_figure
from fcvit.report.image_grid import INK, RIGHT, WRONG

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("fcvit")

_MEASURES = (  # title, field, field of what noise would have
    ("correlation of two heads (1: they are one)", "correlation", None),
    ("entropy over that of a flat map", "entropy", "noise_entropy"),
    ("mass in the top tenth of positions (0.1: flat)", "top_decile", "noise_top_decile"),
    ("correlation with the map before", "kept", None),
    ("agreement of queries (1: the query does not matter)", "agreement", None),
)
_CONTEXTS = (("1", "first contexts", RIGHT, "o", "-"), ("2", "second contexts", UNSURE, "s", "--"))


def save(folder: Path, name: str, result: HeadStats | Faithfulness, draw: Callable[[], bytes]) -> None:
    """Write a result as NAME.json and, where the extra `report` is installed, its chart as NAME.png."""
    runs.write_json(folder / f"{name}.json", result.to_json())
    try:
        runs.write_bytes(folder / f"{name}.png", draw())
    except MissingExtra as error:
        logger.info(f"no picture: {error}")


@chart
def depth_chart(network: str, layers: Sequence[LayerStats], images: int) -> "Figure":
    """Draw each measure over the layers, one below the other."""
    subtitle = f"means over {images} images; layers in the order of the pass"
    figure = new_figure(8, 9, f"Maps over depth: {network}", subtitle)
    names = [short(layer.name).split(".") for layer in layers]  # stage, block, context
    panels = figure.subplots(len(_MEASURES), 1, sharex=True)
    for axes, (title, field, noise) in zip(panels, _MEASURES, strict=True):
        for context, label, color, marker, style in _CONTEXTS:
            own = [place for place, name in enumerate(names) if name[2] == context]
            for which, look in (
                (field, {"color": color, "marker": marker, "markersize": 5, "label": label}),
                (noise, {"color": WRONG, "linewidth": 1, "label": f"noise {label}"}),
            ):
                if which and own:
                    axes.plot(own, [getattr(layers[place], which) for place in own], linestyle=style, **look)
        for place in range(1, len(names)):
            if names[place][0] != names[place - 1][0]:  # a stage ends
                axes.axvline(place - 0.5, color="#888888", linewidth=0.5)
        if not any(math.isfinite(getattr(layer, field)) for layer in layers):
            axes.set_ylim(0, 1)
        axes.set_title(title, loc="left")
        axes.grid(color=FAINT, linewidth=0.5)
    step = -(-len(names) // 26)
    labels = [".".join(name) for name in names]
    panels[-1].set_xticks(range(len(names))[::step], labels[::step], rotation=90)
    panels[-1].set_xlim(-0.5, len(names) - 0.5)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower left", ncols=4, frameon=False)
    return figure


@chart
def faithfulness_chart(curves: Sequence[Curves], title: str, images: int) -> "Figure":
    """Draw deletion above, insertion below, one column a kind of map, each with its controls."""
    across = len(curves) if len(curves) <= 9 else 8  # the heads of a context, where each is drawn
    bands = -(-len(curves) // across)  # of deletion and insertion each
    subtitle = f"{images} images; probability of the predicted class; stage.block.context"
    figure = new_figure(max(0.8 + 2 * across, 6.5), 1.2 + 4.6 * bands, title, subtitle)
    panels = figure.subplots(2 * bands, across, sharex=True, sharey=True, squeeze=False)
    for number, axes in enumerate(panels.flat):
        row, column = divmod(number, across)
        place, what = row // 2 * across + column, ("deletion", "insertion")[row % 2]
        if place >= len(curves):
            axes.set_axis_off()
            continue
        one = curves[place]
        styles: Any = (
            (what, {"color": RIGHT, "linewidth": 2, "label": "the map"}),
            (f"random_{what}", {"color": WRONG, "linestyle": "--", "label": "random maps"}),
            (f"other_{what}", {"color": INK, "linestyle": ":", "label": "another image's map"}),
        )
        for field, style in styles:
            values = getattr(one, field)
            axes.plot([100 * step / (len(values) - 1) for step in range(len(values))], values, **style)
        axes.grid(color=FAINT, linewidth=0.5)
        axes.set_xlabel("% of pixels removed" if what == "deletion" else "% of pixels returned", fontsize=9)
        axes.set_title(short(one.name) if what == "deletion" else "", loc="left")
        axes.set_ylabel(what if not column else "")
    panels[0, 0].set_ylim(bottom=0)  # of a thousand classes the likeliest may have but a few per cent
    legend = panels[0, 0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower left", ncols=3, frameon=False)
    return figure
