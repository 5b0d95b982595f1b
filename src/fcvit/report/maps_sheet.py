"""Pictures of similarity maps on their image: the heads side by side, from stage to stage, and of many images.

Viridis is perceptually uniform and told apart by the colour-blind; one scale, with its bar, holds for a picture: from
the 1st to the 99th percentile of what it shows, and what is beyond has the colour of the bar's ends.
What the network did not see is pale and has no colour.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fcvit.report.charts import axes_at, canvas, drawing, joined, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

COLOURS = "viridis"
_TILE, _GAP, _EDGE = 1.55, 0.12, 0.25  # inches: a map's longer side, between two, around everything
_HEAD, _NAME, _BAR = 0.95, 0.26, 0.55  # of the titles, a map's name, the colour bar
_SMALL_TILE = 1.2  # a map's longer side where there are many images
LONGEST = 1.9  # longer over shorter side of an image that leaves room for what is written over its maps
_OPACITY = 0.7


@dataclasses.dataclass(frozen=True)
class Row:
    """Maps side by side: what stands beside them, their names, and (n, H, W) with NaN where nothing was seen."""

    name: str
    names: Sequence[str]
    maps: np.ndarray


@dataclasses.dataclass(frozen=True)
class Panel:
    """One image of many: parts of its title, uint8 (H, W, 3), and its maps (n, H, W), NaN where nothing was seen."""

    title: Sequence[str]
    image: np.ndarray
    maps: np.ndarray


def maps_sheet(
    image: np.ndarray,
    rows: Sequence[Row],
    title: Sequence[str],
    subtitle: Sequence[str],
    label: str,
    columns: int = 4,
) -> bytes:
    """The image, and every map over it.

    Args:
        image: uint8 (H, W, 3), at most `LONGEST` times as long as wide, or the other way round.
        rows: the maps; a single row is broken after `columns`, several stand one below the other.
        title, subtitle: the parts of a line each (`fcvit.report.charts.joined`).
        label: what the colours mean.

    Returns:
        A PNG file.

    Raises:
        MissingExtra: the extra `report` is not installed.
    """
    with drawing():
        return png(_sheet(image, rows, title, subtitle, label, columns))


def maps_overview(panels: Sequence[Panel], names: Sequence[str], title: str, label: str) -> bytes:
    """Many images, each with its maps beside it; in two columns from seven images on.

    Args:
        panels: at least one.
        names: of the maps, which all have.
        title: one line.
        label: what the colours mean.

    Returns:
        A PNG file.

    Raises:
        MissingExtra: the extra `report` is not installed.
    """
    with drawing():
        return png(_overview(panels, names, title, label))


def _sheet(
    image: np.ndarray, rows: Sequence[Row], title: Sequence[str], subtitle: Sequence[str], label: str, columns: int
) -> "Figure":
    if len(rows) == 1:
        row = rows[0]
        starts = range(0, len(row.maps), columns)
        rows = [Row("", row.names[i : i + columns], row.maps[i : i + columns]) for i in starts]
    across = max(len(row.maps) for row in rows)
    longer = max(image.shape[:2])
    high, wide = (_TILE * side / longer for side in image.shape[:2])
    beside = 0.9 if any(row.name for row in rows) else 0.0
    first = max(1.0, min(2.0, 2.2 / high)) if len(rows) > 1 or across > 1 else 1.0  # how much larger the image is
    left = _EDGE + max(wide * first, 1.4) + 2 * _GAP + beside  # what is written over the image has room
    width = max(left + across * (wide + _GAP) + _EDGE, 6.4)
    height = _HEAD + max(len(rows) * (high + _NAME), high * first + _NAME) + _BAR + _EDGE
    figure = canvas(width, height, title, joined(subtitle, width - 2 * _EDGE))
    scale = _scale(row.maps for row in rows)
    place = axes_at(figure, _EDGE, height - _HEAD - _NAME - high * first, wide * first, high * first)
    _show(place, _pale(image, _seen(rows[0].maps[0])))
    place.set_title("image, what was seen", loc="left", fontsize=9)
    for number, row in enumerate(rows):
        bottom = height - _HEAD - (number + 1) * (high + _NAME)
        if row.name:
            figure.text((left - beside) / width, (bottom + high / 2) / height, row.name, va="center", fontsize=9)
        for column, (name, one) in enumerate(zip(row.names, row.maps, strict=True)):
            place = axes_at(figure, left + column * (wide + _GAP), bottom, wide, high)
            _show(place, overlay(image, one, scale))
            place.set_title(name, loc="left", fontsize=9, pad=3)
    _colour_bar(figure, left, min(3.4, width - left - _EDGE), scale, label)
    return figure


def _overview(panels: Sequence[Panel], names: Sequence[str], title: str, label: str) -> "Figure":
    columns = 1 if len(panels) <= 6 else 2
    lines = -(-len(panels) // columns)
    step, high = _SMALL_TILE + _GAP, _SMALL_TILE + 0.34  # from tile to tile; of a panel, with its title
    room = (1 + len(names)) * step  # of a panel
    apart = 0.3
    width, height = columns * (room + apart) - apart + 2 * _EDGE, _HEAD + lines * high + _BAR + _EDGE + 0.1
    figure = canvas(width, height, title, "")
    scale = _scale(panel.maps for panel in panels)
    for number, panel in enumerate(panels):
        left = _EDGE + number // lines * (room + apart)
        top = height - _HEAD + 0.1 - number % lines * high
        if number % lines == 0:
            for column, name in enumerate(names, 1):
                figure.text((left + column * step) / width, (top + 0.04) / height, name, fontsize=9)
        figure.text(left / width, (top - 0.18) / height, joined(panel.title, room - _GAP, 9), fontsize=9)
        tall, wide = (_SMALL_TILE * side / max(panel.image.shape[:2]) for side in panel.image.shape[:2])
        shown = [_pale(panel.image, _seen(panel.maps[0])), *(overlay(panel.image, one, scale) for one in panel.maps)]
        for column, tile in enumerate(shown):
            _show(axes_at(figure, left + column * step, top - 0.24 - tall, wide, tall), tile)
    _colour_bar(figure, _EDGE + step, 3.4, scale, label)
    return figure


def _scale(maps: Iterable[np.ndarray]) -> "Normalize":
    """From the lowest to the highest colour: all but the outermost hundredths of what was seen."""
    from matplotlib.colors import Normalize

    values = np.concatenate([one[np.isfinite(one)] for one in maps])
    low, high = np.percentile(values, [1, 99]) if len(values) else (0.0, 1.0)
    return Normalize(low, max(high, low + 1e-6))


def overlay(image: np.ndarray, one: np.ndarray, scale: "Normalize") -> np.ndarray:
    """A map in colours over the image, uint8 (H, W, 3): of it so little is left that no place looks like another value.

    Args:
        image: uint8 (H, W, 3).
        one: (H, W), NaN where nothing was seen: there is no colour.
        scale: to 0 to 1.
    """
    from matplotlib import colormaps

    seen = _seen(one)
    colours = colormaps[COLOURS](scale(np.where(seen, one, 0)), bytes=False)[..., :3]
    mixed = _OPACITY * 255 * colours + (1 - _OPACITY) * _grey(image)
    return np.where(seen[..., None], mixed.round(), _pale(_grey(image), seen)).astype(np.uint8)


def _colour_bar(figure: "Figure", left: float, width: float, scale: "Normalize", label: str) -> None:
    """In the colours that the map has over an image's middle grey."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    middle = _grey(np.full((1, 1, 3), 128, np.uint8))[0, 0] / 255
    mixed = _OPACITY * colormaps[COLOURS](np.arange(256))[:, :3] + (1 - _OPACITY) * middle
    bar = axes_at(figure, left, _EDGE + 0.22, width, 0.12)
    colours = ScalarMappable(scale, ListedColormap(mixed))
    figure.colorbar(colours, cax=bar, orientation="horizontal", label=label, extend="both")
    bar.tick_params(labelsize=8, length=2)


def _show(place: "Axes", image: np.ndarray) -> None:
    place.set_xticks([])
    place.set_yticks([])
    for spine in place.spines.values():
        spine.set_visible(False)
    place.imshow(image, aspect="auto")


def _grey(image: np.ndarray) -> np.ndarray:
    """Luminance in all three channels, from 165 to white: colours are for the map, and brightness is nearly so."""
    luminance = 165 + (image @ np.array([0.299, 0.587, 0.114])) * (90 / 255)
    return np.repeat(luminance[..., None], 3, axis=2).astype(np.uint8)


def _pale(image: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Three parts of white over what was not seen."""
    return np.where(seen[..., None], image, (image.astype(int) + 3 * 255) // 4).astype(np.uint8)


def _seen(one: np.ndarray) -> np.ndarray:
    return ~np.isnan(one)
