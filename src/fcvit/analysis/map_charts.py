"""Charts of attention statistics over depth, and of deletion and insertion curves."""

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

_MEASURES = (  # title, field of `LayerStats`, field of its value for noise
    ("correlation between heads (1: identical heads)", "correlation", None),
    ("normalized entropy (1: uniform map)", "entropy", "noise_entropy"),
    ("mass in the top 10% of positions (0.1: uniform map)", "top_decile", "noise_top_decile"),
    ("correlation with the map of the previous layer (1: no change)", "kept", None),
    ("agreement between queries (1: the query has no influence)", "agreement", None),
)
_CONTEXTS = (("1", "first contexts", RIGHT, "o", "-"), ("2", "second contexts", UNSURE, "s", "--"))


def save(folder: Path, name: str, result: HeadStats | Faithfulness, draw: Callable[[], bytes]) -> None:
    """Write a result as NAME.json and, if the `report` extra is installed, its chart as NAME.png."""
    runs.write_json(folder / f"{name}.json", result.to_json())
    try:
        runs.write_bytes(folder / f"{name}.png", draw())
    except MissingExtra as error:
        logger.info(f"{name}.png was not drawn: {error}")


@chart
def depth_chart(network: str, layers: Sequence[LayerStats], images: int) -> "Figure":
    """Draw each measure over the layers, one panel per measure."""
    subtitle = f"means over {images} images, layers from first to last"
    figure = new_figure(8, 9, f"Maps over depth: {network}", subtitle)
    names = [short(layer.name).split(".") for layer in layers]  # stage, block, context
    panels = figure.subplots(len(_MEASURES), 1, sharex=True)
    for axes, (title, field, noise) in zip(panels, _MEASURES, strict=True):
        for context, label, color, marker, linestyle in _CONTEXTS:
            own = [layer for layer, name in enumerate(names) if name[2] == context]
            for shown_field, style in (
                (field, {"color": color, "marker": marker, "markersize": 5, "linestyle": linestyle, "label": label}),
                (noise, {"color": WRONG, "linewidth": 1, "linestyle": linestyle, "label": f"noise, {label}"}),
            ):
                if shown_field and own:
                    axes.plot(own, [getattr(layers[layer], shown_field) for layer in own], **style)
        for layer in range(1, len(names)):
            if names[layer][0] != names[layer - 1][0]:  # a new stage begins
                axes.axvline(layer - 0.5, color="#888888", linewidth=0.5)
        if not any(math.isfinite(getattr(stats, field)) for stats in layers):
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
    """Draw the curves of each map with its controls: deletion above insertion, one column per map."""
    across = len(curves) if len(curves) <= 9 else 8  # more than 9 only with one map per head
    bands = -(-len(curves) // across)  # each has one row of deletion and one of insertion
    subtitle = f"probability of the predicted class, {images} images, stage.block.context"
    figure = new_figure(max(0.8 + 2 * across, 6.5), 1.2 + 4.6 * bands, title, subtitle)
    panels = figure.subplots(2 * bands, across, sharex=True, sharey=True, squeeze=False)
    for number, axes in enumerate(panels.flat):
        row, column = divmod(number, across)
        index, kind = row // 2 * across + column, ("deletion", "insertion")[row % 2]
        if index >= len(curves):
            axes.set_axis_off()
            continue
        shown_curves = curves[index]
        styles: Any = (
            (kind, {"color": RIGHT, "linewidth": 2, "label": "the map"}),
            (f"random_{kind}", {"color": WRONG, "linestyle": "--", "label": "random maps"}),
            (f"other_{kind}", {"color": INK, "linestyle": ":", "label": "another image's map"}),
        )
        for field, style in styles:
            values = getattr(shown_curves, field)
            axes.plot([100 * step / (len(values) - 1) for step in range(len(values))], values, **style)
        axes.grid(color=FAINT, linewidth=0.5)
        axes.set_xlabel("% of pixels removed" if kind == "deletion" else "% of pixels restored", fontsize=9)
        axes.set_title(short(shown_curves.name) if kind == "deletion" else "", loc="left")
        axes.set_ylabel(kind if not column else "")
    panels[0, 0].set_ylim(bottom=0)  # with many classes the highest probability can be a few percent
    legend = panels[0, 0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower left", ncols=3, frameon=False)
    return figure
