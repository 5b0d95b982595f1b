"""Pictures of similarity maps on their image: the heads side by side, from stage to stage, and of many images.

Viridis is perceptually uniform and told apart by the color-blind; one scale, with its bar, holds for a picture: from
the 1st to the 99th percentile of what it shows, and what is beyond has the color of the bar's ends.
What the network did not see is pale and has no color.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fcvit.report.charts import axes_at, canvas, drawing, fit, joined, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

COLOURS = "viridis"
_TILE, _GAP, _EDGE = 1.55, 0.12, 0.25  # inches: a map's longer side, between two, around everything
_HEAD, _NAME, _BAR = 0.95, 0.26, 0.55  # of the titles, a map's name, the color bar
_SMALL_TILE = 1.2  # a map's longer side where there are many images
LONGEST = 1.9  # longer over shorter side of an image that leaves room for what is written over its maps
_DARKEST = 165  # gray under a map
_LEAST = 0.1  # of similarity: from the lowest to the highest color
_OPACITY = 0.7


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image, uint8 (H, W, 3), at most `LONGEST` times as long as wide, and where the network saw it, bool (H, W)."""

    image: np.ndarray
    seen: np.ndarray


@dataclasses.dataclass(frozen=True)
class Row:
    """Maps side by side: what stands beside them, their names, and (n, H, W); NaN where there is no map."""

    name: str
    names: Sequence[str]
    maps: np.ndarray


@dataclasses.dataclass(frozen=True)
class Panel:
    """One image of many: parts of its title, `Scene`, and its maps (n, H, W); NaN where there is no map."""

    title: Sequence[str]
    scene: Scene
    maps: np.ndarray


def maps_sheet(
    scene: Scene,
    rows: Sequence[Row],
    title: Sequence[str],
    subtitle: Sequence[str],
    label: str,
    columns: int = 4,
) -> bytes:
    """The image, and every map over it.

    Args:
        scene: the image.
        rows: the maps; a single row is broken after `columns`, several stand one below the other.
        title, subtitle: the parts of a line each (`fcvit.report.charts.joined`).
        label: what the colors mean.

    Returns:
        A PNG file.

    Raises:
        MissingExtra: the extra `report` is not installed.
    """
    with drawing():
        return png(_sheet(scene, rows, title, subtitle, label, columns))


def maps_overview(panels: Sequence[Panel], names: Sequence[str], title: str, label: str) -> bytes:
    """Many images, each with its maps beside it; in two columns from seven images on.

    Args:
        panels: at least one.
        names: of the maps, which all have.
        title: one line.
        label: what the colors mean.

    Returns:
        A PNG file.

    Raises:
        MissingExtra: the extra `report` is not installed.
    """
    with drawing():
        return png(_overview(panels, names, title, label))


def _sheet(
    scene: Scene, rows: Sequence[Row], title: Sequence[str], subtitle: Sequence[str], label: str, columns: int
) -> "Figure":
    if len(rows) == 1:
        row = rows[0]
        starts = range(0, len(row.maps), columns)
        rows = [Row("", row.names[i : i + columns], row.maps[i : i + columns]) for i in starts]
    across = max(len(row.maps) for row in rows)
    alone = len(rows) == across == 1
    tall, wide = (_TILE * (2 if alone else 1) * side / max(scene.seen.shape) for side in scene.seen.shape)
    beside = 0.9 if any(row.name for row in rows) else 0.0
    first = 1.0 if alone else max(1.0, min(2.0, 2.2 / tall))  # how much larger the image is than a map
    left = _EDGE + max(wide * first, 1.4) + 2 * _GAP + beside  # what is written over the image has room
    width = max(left + across * (wide + _GAP) + _EDGE, 6.4)
    height = _HEAD + max(len(rows) * (tall + _NAME), tall * first + _NAME) + _BAR + _EDGE
    figure = canvas(width, height, title, joined(subtitle, width - 2 * _EDGE))
    scale = _scale(row.maps for row in rows)
    place = axes_at(figure, _EDGE, height - _HEAD - _NAME - tall * first, wide * first, tall * first)
    _show(place, _pale(scene.image, scene.seen), "image, what was seen")
    for number, row in enumerate(rows):
        bottom = height - _HEAD - (number + 1) * (tall + _NAME)
        if row.name:
            figure.text((left - beside) / width, (bottom + tall / 2) / height, row.name, va="center", fontsize=9)
        for column, (name, one) in enumerate(zip(row.names, row.maps, strict=True)):
            place = axes_at(figure, left + column * (wide + _GAP), bottom, wide, tall)
            _show_map(place, scene, one, scale, fit(name, wide))
    _color_bar(figure, left, _EDGE + 0.22, min(3.4, width - left - _EDGE), scale, label)
    return figure


def _overview(panels: Sequence[Panel], names: Sequence[str], title: str, label: str) -> "Figure":
    columns = 1 if len(panels) <= 6 else 2
    step, apart, head = _SMALL_TILE + _GAP, 0.3, _HEAD + _BAR + 0.3
    room = (1 + len(names)) * step  # of a panel
    sizes = [[_SMALL_TILE * side / max(panel.scene.seen.shape) for side in panel.scene.seen.shape] for panel in panels]
    lines = -(-len(panels) // columns)
    heights = [tall + 0.34 for tall, _ in sizes]  # with the title
    longest = max(sum(heights[start : start + lines]) for start in range(0, len(panels), lines))
    width, height = columns * (room + apart) - apart + 2 * _EDGE, head + longest + _EDGE
    figure = canvas(width, height, title, "")
    scale = _scale(panel.maps for panel in panels)
    _color_bar(figure, _EDGE + step, height - _HEAD - 0.05, 3.4, scale, label)
    for number, (panel, (tall, wide)) in enumerate(zip(panels, sizes, strict=True)):
        column, line = divmod(number, lines)
        left = _EDGE + column * (room + apart)
        top = height - head + 0.1 - sum(heights[column * lines : number])
        if not line:
            for place, name in enumerate(names, 1):
                figure.text((left + place * step) / width, (top + 0.04) / height, name, fontsize=9)
        figure.text(left / width, (top - 0.18) / height, joined(panel.title, room - _GAP, 9), fontsize=9)
        _show(axes_at(figure, left, top - 0.24 - tall, wide, tall), _pale(panel.scene.image, panel.scene.seen))
        for place, one in enumerate(panel.maps, 1):
            _show_map(axes_at(figure, left + place * step, top - 0.24 - tall, wide, tall), panel.scene, one, scale)
    return figure


def own_range(row: Row) -> Row:
    """Each map from 0 to 1, its own lowest to highest color; its name says what those are."""
    maps, names = [], []
    for name, one in zip(row.names, row.maps, strict=True):
        low, high = _range(one[np.isfinite(one)])
        maps.append((one - low) / (high - low))
        names.append(f"{name} ({low:.1f} to {high:.1f})" if np.isfinite(one).any() else name)
    return Row(row.name, names, np.stack(maps))


def _range(values: np.ndarray) -> tuple[float, float]:
    """From the lowest to the highest color: all but the outermost hundredths, but no stretched rounding errors."""
    low, high = np.percentile(values, [1, 99]) if len(values) else (0.0, 1.0)
    return float(low), float(max(high, low + _LEAST))


def _scale(maps: Iterable[np.ndarray]) -> "Normalize":
    """From the lowest to the highest color: all but the outermost hundredths of what there is."""
    from matplotlib.colors import Normalize

    values = np.concatenate([one[np.isfinite(one)] for one in maps])
    return Normalize(*_range(values))


def overlay(scene: Scene, one: np.ndarray, scale: "Normalize") -> np.ndarray:
    """A map in colors over the image, uint8 (H, W, 3): of it so little is left that no place looks like another value.

    Args:
        scene: the image.
        one: (H, W), NaN where there is no map: there is no color.
        scale: to 0 to 1.
    """
    from matplotlib import colormaps

    there = np.isfinite(one)
    colors = colormaps[COLOURS](scale(np.where(there, one, 0)))[..., :3]
    gray = _gray(scene)
    mixed = _OPACITY * 255 * colors + (1 - _OPACITY) * gray
    return np.where(there[..., None], mixed.round(), _pale(gray, scene.seen)).astype(np.uint8)


def _show_map(place: "Axes", scene: Scene, one: np.ndarray, scale: "Normalize", name: str = "") -> None:
    _show(place, overlay(scene, one, scale), name)
    if not np.isfinite(one).any():
        place.text(0.5, 0.5, "one position:\nno map", transform=place.transAxes, ha="center", va="center", fontsize=8)


def _show(place: "Axes", image: np.ndarray, name: str = "") -> None:
    place.set_xticks([])
    place.set_yticks([])
    for spine in place.spines.values():
        spine.set(visible=True, color="#cccccc", linewidth=0.5)  # a light image ends somewhere, too
    place.imshow(image, aspect="auto")
    place.set_title(name, loc="left", fontsize=9, pad=3)


def _color_bar(figure: "Figure", left: float, bottom: float, width: float, scale: "Normalize", label: str) -> None:
    """In the colors that the map has over an image's middle gray."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    middle = (_DARKEST + 255) / 2 / 255
    mixed = _OPACITY * colormaps[COLOURS](np.arange(256))[:, :3] + (1 - _OPACITY) * middle
    bar = axes_at(figure, left, bottom, width, 0.12)
    colors = ScalarMappable(scale, ListedColormap(mixed))
    figure.colorbar(
        colors, cax=bar, orientation="horizontal", label=label, extend="both", ticks=MaxNLocator(5), format="%g"
    )
    bar.tick_params(labelsize=8, length=2)


def _gray(scene: Scene) -> np.ndarray:
    """Luminance in all three channels, stretched from light gray to white: dark and bright are for the map."""
    luminance = scene.image @ np.array([0.299, 0.587, 0.114])
    low, high = np.percentile(luminance[scene.seen], [1, 99])
    share = np.clip((luminance - low) / (high - low), 0, 1) if high - low > 8 else np.full(luminance.shape, 0.5)
    return np.repeat((_DARKEST + share * (255 - _DARKEST)).astype(np.uint8)[..., None], 3, axis=2)


def _pale(image: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Three parts of white over what was not seen."""
    return np.where(seen[..., None], image, (image.astype(int) + 3 * 255) // 4).astype(np.uint8)
