"""Figures of similarity maps drawn over their image: per head, per stage, and for many images.

The colormap is viridis, which is perceptually uniform and safe for color-blind readers. A figure has one color scale
from the 1st to the 99th percentile of its values. Values outside of this range get the color of the nearer end.
The part of the image outside of the network's crop is pale and has no map.
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

COLORMAP = "viridis"
MAX_ASPECT = 1.9  # largest aspect ratio that leaves enough space for the names of the maps
_DARKEST = 165  # darkest gray of the image under a map
_MIN_RANGE = 0.1  # smallest difference between the values of the lowest and the highest color
_OPACITY = 0.7
_NO_MAP = "one position:\nno map"


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image to draw maps on.

    Attributes:
        image: Pixels, uint8 (H, W, 3), with an aspect ratio of at most `MAX_ASPECT`.
        seen: Mask of the pixels inside the network's crop, bool (H, W).
    """

    image: np.ndarray
    seen: np.ndarray

    @functools.cached_property
    def gray(self) -> np.ndarray:
        """Return the luminance in three channels, from light gray to white, so that the map determines the color."""
        luminance = self.image @ np.array([0.299, 0.587, 0.114])
        low, high = np.percentile(luminance[self.seen], [1, 99])
        share = np.clip((luminance - low) / (high - low), 0, 1) if high - low > 8 else np.full(luminance.shape, 0.5)
        return np.repeat((_DARKEST + share * (255 - _DARKEST)).astype(np.uint8)[..., None], 3, axis=2)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of maps in a figure.

    Attributes:
        name: Label of the row.
        names: Titles of the maps.
        maps: Maps, (n, H, W), NaN outside of the crop.
    """

    name: str
    names: Sequence[str]
    maps: np.ndarray


@dataclasses.dataclass(frozen=True)
class Panel:
    """One image of an overview.

    Attributes:
        title: Title above the image.
        scene: The image.
        maps: Maps of the image, (n, H, W), NaN outside of the crop.
    """

    title: str
    scene: Scene
    maps: np.ndarray


@chart
def maps_figure(scene: Scene, rows: Sequence[Row], title: str, subtitle: str, label: str, columns: int = 4) -> "Figure":
    """Draw the image, followed by each map over the image.

    Args:
        scene: The image.
        rows: Rows of maps. A single row is wrapped after `columns` maps.
        title: Title of the figure, one line.
        subtitle: Subtitle of the figure, one line.
        label: Label of the color bar.
        columns: Number of maps per line if there is a single row.
    """
    if len(rows) == 1:
        row = rows[0]
        starts = range(0, len(row.maps), columns)
        rows = [Row("", row.names[i : i + columns], row.maps[i : i + columns]) for i in starts]
    across = max(len(row.maps) for row in rows)
    tile = 1.6 if len(rows) > 1 or across > 1 else 3.2
    tall, wide = (tile * side / max(scene.seen.shape) for side in scene.seen.shape)
    cell = max(wide, 1.45)  # wide enough for a name with its range
    width, height = max((1 + across) * (cell + 0.15) + 0.8, 6.4), len(rows) * (tall + 0.3) + 1.5
    figure = new_figure(width, height, title, subtitle)
    grid = figure.subplots(len(rows), 1 + across, squeeze=False)
    scale = _scale(row.maps for row in rows)
    _show(grid[0, 0], _pale(scene.image, scene.seen), "image" if scene.seen.all() else "image (pale: cut off)")
    for axes in (
        *grid[1:, 0],
        *(axes for row, line in zip(rows, grid, strict=True) for axes in line[1 + len(row.maps) :]),
    ):
        axes.set_axis_off()
    for row, line in zip(rows, grid, strict=True):
        for axes, name, values in zip(line[1:], row.names, row.maps, strict=False):
            _show_map(axes, scene, values, scale, shown(name, int(15 * cell)))
        line[1].set_ylabel(row.name, rotation=0, ha="right", va="center", fontsize=9)
    _color_bar(figure, scale, label, ax=grid, location="bottom", aspect=40, shrink=min(1, 4 / width))
    return figure


@chart
def maps_overview(panels: Sequence[Panel], names: Sequence[str], title: str, label: str) -> "Figure":
    """Draw many images, each followed by its maps with the given names. More than six images use two columns."""
    # All images are pasted into one array, because a layout with hundreds of axes is slow.
    columns = 1 if len(panels) <= 6 else 2
    lines, across = -(-len(panels) // columns), 1 + len(names)
    step = max(max(panel.scene.seen.shape) for panel in panels) + 14
    panel_width = across * step + 30
    heights = [len(panel.scene.seen) + 44 for panel in panels]  # including the title
    longest = max(sum(heights[start : start + lines]) for start in range(0, len(panels), lines))
    pasted = np.full((longest, columns * panel_width, 3), 255, np.uint8)
    height, width = longest / DPI + 1.6, columns * panel_width / DPI + 0.1
    figure = new_figure(width, height, title, layout="none")
    axes = figure.add_axes((0.1 / width, 0, 1 - 0.1 / width, longest / DPI / height))
    scale = _scale(panel.maps for panel in panels)
    for number, panel in enumerate(panels):
        column, line = divmod(number, lines)
        left, top = column * panel_width, sum(heights[column * lines : number]) + 30
        tall, wide = panel.scene.seen.shape
        axes.text(left, top - 6, shown(panel.title, panel_width // 10), fontsize=9)
        for index in range(across):
            x, values = left + index * step, panel.maps[index - 1] if index else None
            tile = _pale(panel.scene.image, panel.scene.seen) if values is None else overlay(panel.scene, values, scale)
            pasted[top - 1 : top + tall + 1, x : x + wide + 2] = 204  # frame, shows the edge of a light image
            pasted[top : top + tall, x + 1 : x + 1 + wide] = tile
            if values is not None and not np.isfinite(values).any():
                axes.text(x + wide / 2, top + tall / 2, _NO_MAP, ha="center", va="center", fontsize=8)
            if index and not line:
                axes.text(x, -8, names[index - 1], fontsize=9)
    axes.imshow(pasted, aspect="auto", interpolation="none")
    axes.set_axis_off()
    bar = figure.add_axes((0.15 / width, 1 - 0.6 / height, 3.4 / width, 0.12 / height))
    _color_bar(figure, scale, label, cax=bar, orientation="horizontal")
    return figure


def own_range(row: Row) -> Row:
    """Scale each map to 0 to 1 by its own color range, and add this range to its name."""
    maps, names = [], []
    for name, values in zip(row.names, row.maps, strict=True):
        low, high = _range(values[np.isfinite(values)])
        maps.append((values - low) / (high - low))
        names.append(f"{name} ({low:.1f} to {high:.1f})" if np.isfinite(values).any() else name)
    return Row(row.name, names, np.stack(maps))


def _range(values: np.ndarray) -> tuple[float, float]:
    """Return the values of the lowest and the highest color: the 1st and 99th percentile, at least `_MIN_RANGE` apart.

    The smallest range prevents rounding errors of a constant map from filling the color scale.
    """
    low, high = np.percentile(values, [1, 99]) if len(values) else (0.0, 1.0)
    return float(low), float(max(high, low + _MIN_RANGE))


def _scale(maps: Iterable[np.ndarray]) -> "Normalize":
    """Return a common color scale for all maps."""
    from matplotlib.colors import Normalize

    values = np.concatenate([array[np.isfinite(array)] for array in maps])
    return Normalize(*_range(values))


def overlay(scene: Scene, values: np.ndarray, scale: "Normalize") -> np.ndarray:
    """Draw a map in colors over the gray image, and return the result as uint8 (H, W, 3).

    The image has little contrast, so that its brightness cannot be confused with a value of the map.

    Args:
        scene: The image.
        values: The map, (H, W). NaN pixels get no color.
        scale: Color scale that maps values to 0 to 1.
    """
    from matplotlib import colormaps

    finite = np.isfinite(values)
    colors = colormaps[COLORMAP](scale(np.where(finite, values, 0)))[..., :3]
    mixed = _OPACITY * 255 * colors + (1 - _OPACITY) * scene.gray
    return np.where(finite[..., None], mixed.round(), _pale(scene.gray, scene.seen)).astype(np.uint8)


def _show_map(axes: Any, scene: Scene, values: np.ndarray, scale: "Normalize", name: str = "") -> None:
    _show(axes, overlay(scene, values, scale), name)
    if not np.isfinite(values).any():
        axes.text(0.5, 0.5, _NO_MAP, transform=axes.transAxes, ha="center", va="center", fontsize=8)


def _show(axes: Any, image: np.ndarray, name: str = "") -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color="#cccccc", linewidth=0.5)  # shows the edge of a light image
    axes.imshow(image)
    axes.set_anchor("W")
    axes.set_title(name, loc="left", fontsize=9, pad=3)


def _color_bar(figure: "Figure", scale: "Normalize", label: str, **where: Any) -> None:
    """Draw the color bar with the colors that a map has over middle gray."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    middle = (_DARKEST + 255) / 2 / 255
    mixed = _OPACITY * colormaps[COLORMAP](np.arange(256))[:, :3] + (1 - _OPACITY) * middle
    colors = ScalarMappable(scale, ListedColormap(mixed))
    bar = figure.colorbar(colors, label=label, extend="both", ticks=MaxNLocator(5), format="%g", **where)
    bar.ax.tick_params(labelsize=8, length=2)


def _pale(image: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Mix pixels outside of the crop with three parts of white."""
    return np.where(seen[..., None], image, (image.astype(int) + 3 * 255) // 4).astype(np.uint8)
