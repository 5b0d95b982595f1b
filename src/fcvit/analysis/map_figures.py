"""Pictures of similarity maps on their image: the heads side by side, from stage to stage, and of many images.

Viridis is perceptually uniform and told apart by the color-blind; one scale, with its bar, holds for a picture: from
the 1st to the 99th percentile of what it shows, and what is beyond has the color of the bar's ends.
What the network did not see is pale and has no color.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fcvit.report.charts import DPI, chart, new_figure, shown

if TYPE_CHECKING:
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

COLOURS = "viridis"
LONGEST = 1.9  # longer over shorter side of an image that leaves room for what is written over its maps
_DARKEST = 165  # gray under a map
_LEAST = 0.1  # of similarity: from the lowest to the highest color
_OPACITY = 0.7
_NO_MAP = "one position:\nno map"


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image, uint8 (H, W, 3), at most `LONGEST` times as long as wide, and where the network saw it, bool (H, W)."""

    image: np.ndarray
    seen: np.ndarray

    @functools.cached_property
    def gray(self) -> np.ndarray:
        """Give the luminance in three channels, from light gray to white: dark and bright are for the map."""
        luminance = self.image @ np.array([0.299, 0.587, 0.114])
        low, high = np.percentile(luminance[self.seen], [1, 99])
        share = np.clip((luminance - low) / (high - low), 0, 1) if high - low > 8 else np.full(luminance.shape, 0.5)
        return np.repeat((_DARKEST + share * (255 - _DARKEST)).astype(np.uint8)[..., None], 3, axis=2)


@dataclasses.dataclass(frozen=True)
class Row:
    """Maps side by side: what stands beside them, their names, and (n, H, W); NaN where there is no map."""

    name: str
    names: Sequence[str]
    maps: np.ndarray


@dataclasses.dataclass(frozen=True)
class Panel:
    """One image of many: its title, `Scene`, and its maps (n, H, W); NaN where there is no map."""

    title: str
    scene: Scene
    maps: np.ndarray


@chart
def maps_figure(scene: Scene, rows: Sequence[Row], title: str, subtitle: str, label: str, columns: int = 4) -> "Figure":
    """Draw the image, and every map over it.

    Args:
        scene: the image.
        rows: the maps; a single row is broken after `columns`, several stand one below the other.
        title, subtitle: one line each.
        label: what the colors mean.
    """
    if len(rows) == 1:
        row = rows[0]
        starts = range(0, len(row.maps), columns)
        rows = [Row("", row.names[i : i + columns], row.maps[i : i + columns]) for i in starts]
    across = max(len(row.maps) for row in rows)
    tile = 1.6 if len(rows) > 1 or across > 1 else 3.2
    tall, wide = (tile * side / max(scene.seen.shape) for side in scene.seen.shape)
    cell = max(wide, 1.45)  # a name with its range has room
    width, height = max((1 + across) * (cell + 0.15) + 0.8, 6.4), len(rows) * (tall + 0.3) + 1.5
    figure = new_figure(width, height, title, subtitle)
    grid = figure.subplots(len(rows), 1 + across, squeeze=False)
    scale = _scale(row.maps for row in rows)
    _show(grid[0, 0], _pale(scene.image, scene.seen), "image, what was seen")
    for axes in (
        *grid[1:, 0],
        *(axes for row, line in zip(rows, grid, strict=True) for axes in line[1 + len(row.maps) :]),
    ):
        axes.set_axis_off()
    for row, line in zip(rows, grid, strict=True):
        for axes, name, one in zip(line[1:], row.names, row.maps, strict=False):
            _show_map(axes, scene, one, scale, shown(name, int(15 * cell)))
        line[1].set_ylabel(row.name, rotation=0, ha="right", va="center", fontsize=9)
    _color_bar(figure, scale, label, ax=grid, location="bottom", aspect=40, shrink=min(1, 4 / width))
    return figure


@chart
def maps_overview(panels: Sequence[Panel], names: Sequence[str], title: str, label: str) -> "Figure":
    """Draw many images, each with its maps of those names beside it, in two columns from seven images on."""
    # All images are pasted into one, a pixel of theirs a pixel of the picture: a layout of hundreds would take long.
    columns = 1 if len(panels) <= 6 else 2
    lines, across = -(-len(panels) // columns), 1 + len(names)
    step = max(max(panel.scene.seen.shape) for panel in panels) + 14
    room = across * step + 30  # of a panel
    heights = [len(panel.scene.seen) + 44 for panel in panels]  # with the title
    longest = max(sum(heights[start : start + lines]) for start in range(0, len(panels), lines))
    pasted = np.full((longest, columns * room, 3), 255, np.uint8)
    height, width = longest / DPI + 1.6, columns * room / DPI + 0.1
    figure = new_figure(width, height, title, layout="none")
    axes = figure.add_axes((0.1 / width, 0, 1 - 0.1 / width, longest / DPI / height))
    scale = _scale(panel.maps for panel in panels)
    for number, panel in enumerate(panels):
        column, line = divmod(number, lines)
        left, top = column * room, sum(heights[column * lines : number]) + 30
        tall, wide = panel.scene.seen.shape
        axes.text(left, top - 6, shown(panel.title, room // 10), fontsize=9)
        for place in range(across):
            x, one = left + place * step, panel.maps[place - 1] if place else None
            tile = _pale(panel.scene.image, panel.scene.seen) if one is None else overlay(panel.scene, one, scale)
            pasted[top - 1 : top + tall + 1, x : x + wide + 2] = 204  # a light image ends somewhere, too
            pasted[top : top + tall, x + 1 : x + 1 + wide] = tile
            if one is not None and not np.isfinite(one).any():
                axes.text(x + wide / 2, top + tall / 2, _NO_MAP, ha="center", va="center", fontsize=8)
            if place and not line:
                axes.text(x, -8, names[place - 1], fontsize=9)
    axes.imshow(pasted, aspect="auto", interpolation="none")
    axes.set_axis_off()
    bar = figure.add_axes((0.15 / width, 1 - 0.6 / height, 3.4 / width, 0.12 / height))
    _color_bar(figure, scale, label, cax=bar, orientation="horizontal")
    return figure


def own_range(row: Row) -> Row:
    """Scale each map to 0 to 1, its own lowest to highest color; its name says what those are."""
    maps, names = [], []
    for name, one in zip(row.names, row.maps, strict=True):
        low, high = _range(one[np.isfinite(one)])
        maps.append((one - low) / (high - low))
        names.append(f"{name} ({low:.1f} to {high:.1f})" if np.isfinite(one).any() else name)
    return Row(row.name, names, np.stack(maps))


def _range(values: np.ndarray) -> tuple[float, float]:
    """Return the lowest and the highest color: all but the outermost hundredths, but no stretched rounding errors."""
    low, high = np.percentile(values, [1, 99]) if len(values) else (0.0, 1.0)
    return float(low), float(max(high, low + _LEAST))


def _scale(maps: Iterable[np.ndarray]) -> "Normalize":
    """Return one scale for all maps."""
    from matplotlib.colors import Normalize

    values = np.concatenate([one[np.isfinite(one)] for one in maps])
    return Normalize(*_range(values))


def overlay(scene: Scene, one: np.ndarray, scale: "Normalize") -> np.ndarray:
    """Lay a map in colors over the image, of which so little is left that no place looks like another value.

    Returns uint8 (H, W, 3).

    Args:
        scene: the image.
        one: (H, W), NaN where there is no map: there is no color.
        scale: to 0 to 1.
    """
    from matplotlib import colormaps

    there = np.isfinite(one)
    colors = colormaps[COLOURS](scale(np.where(there, one, 0)))[..., :3]
    mixed = _OPACITY * 255 * colors + (1 - _OPACITY) * scene.gray
    return np.where(there[..., None], mixed.round(), _pale(scene.gray, scene.seen)).astype(np.uint8)


def _show_map(axes: Any, scene: Scene, one: np.ndarray, scale: "Normalize", name: str = "") -> None:
    _show(axes, overlay(scene, one, scale), name)
    if not np.isfinite(one).any():
        axes.text(0.5, 0.5, _NO_MAP, transform=axes.transAxes, ha="center", va="center", fontsize=8)


def _show(axes: Any, image: np.ndarray, name: str = "") -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color="#cccccc", linewidth=0.5)  # a light image ends somewhere, too
    axes.imshow(image)
    axes.set_anchor("W")
    axes.set_title(name, loc="left", fontsize=9, pad=3)


def _color_bar(figure: "Figure", scale: "Normalize", label: str, **where: Any) -> None:
    """Draw the bar in the colors that the map has over an image's middle gray."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    middle = (_DARKEST + 255) / 2 / 255
    mixed = _OPACITY * colormaps[COLOURS](np.arange(256))[:, :3] + (1 - _OPACITY) * middle
    colors = ScalarMappable(scale, ListedColormap(mixed))
    bar = figure.colorbar(colors, label=label, extend="both", ticks=MaxNLocator(5), format="%g", **where)
    bar.ax.tick_params(labelsize=8, length=2)


def _pale(image: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Lay three parts of white over what was not seen."""
    return np.where(seen[..., None], image, (image.astype(int) + 3 * 255) // 4).astype(np.uint8)
