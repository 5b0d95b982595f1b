"""Pictures of similarity maps on their image: the heads side by side, and from stage to stage.

Viridis is perceptually uniform and told apart by the colour-blind; one scale, with its bar, holds for a picture.
What the network did not see is pale and has no colour.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fcvit.report.charts import axes_at, canvas, drawable, drawing, fit, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = "viridis"
_TILE, _GAP, _EDGE = 1.55, 0.12, 0.25  # inches: a map's longer side, between two, around everything
_HEAD, _NAME, _BAR = 0.95, 0.26, 0.55  # of the titles, a map's name, the colour bar
_OPACITY = 0.62


@dataclasses.dataclass(frozen=True)
class Row:
    """Maps side by side: what stands beside them, their names, and (n, H, W) with NaN where nothing was seen."""

    name: str
    names: Sequence[str]
    maps: np.ndarray


def maps_sheet(
    image: np.ndarray, rows: Sequence[Row], title: str, subtitle: str, label: str, columns: int = 4
) -> bytes:
    """The image, and every map over it.

    Args:
        image: uint8 (H, W, 3).
        rows: the maps; a single row is broken after `columns`, several stand one below the other.
        title, subtitle: one line each; cut where they are too long.
        label: what the colours mean.

    Returns:
        A PNG file.

    Raises:
        MissingExtra: the extra `report` is not installed.
    """
    with drawing():
        return png(_sheet(image, rows, title, subtitle, label, columns))


def _sheet(image: np.ndarray, rows: Sequence[Row], title: str, subtitle: str, label: str, columns: int) -> "Figure":
    if len(rows) == 1:
        row = rows[0]
        cut = range(0, len(row.maps), columns)
        rows = [Row("", row.names[i : i + columns], row.maps[i : i + columns]) for i in cut]
    across = max(len(row.maps) for row in rows)
    longer = max(image.shape[:2])
    high, wide = (_TILE * side / longer for side in image.shape[:2])
    beside = 0.9 if any(row.name for row in rows) else 0.0
    first = max(1.0, min(2.0, 2.2 / high)) if len(rows) > 1 or across > 1 else 1.0  # how much larger the image is
    left = _EDGE + wide * first + 2 * _GAP + beside
    width = max(left + across * (wide + _GAP) + _EDGE, 6.4)
    height = _HEAD + max(len(rows) * (high + _NAME), high * first + _NAME) + _BAR + _EDGE
    figure = canvas(width, height, title, fit(drawable(subtitle), width - 2 * _EDGE))
    seen = ~np.isnan(rows[0].maps[0])
    values = np.concatenate([row.maps[:, seen].ravel() for row in rows])
    low, top = np.percentile(values, [1, 99]) if len(values) else (0.0, 1.0)
    top = max(top, low + 1e-6)
    place = axes_at(figure, _EDGE, height - _HEAD - _NAME - high * first, wide * first, high * first)
    _bare(place)
    place.imshow(_pale(image, seen))
    place.set_title("image, what was seen", loc="left", fontsize=9)
    drawn = None
    for number, row in enumerate(rows):
        bottom = height - _HEAD - (number + 1) * (high + _NAME)
        if row.name:
            figure.text((left - beside) / width, (bottom + high / 2) / height, row.name, va="center", fontsize=9)
        for column, (name, one) in enumerate(zip(row.names, row.maps, strict=True)):
            place = axes_at(figure, left + column * (wide + _GAP), bottom, wide, high)
            _bare(place)
            place.imshow(_pale(_grey(image), seen))
            drawn = place.imshow(
                np.ma.masked_invalid(one), cmap=COLOURS, vmin=low, vmax=top, alpha=_OPACITY, interpolation="nearest"
            )
            place.set_title(name, loc="left", fontsize=9, pad=3)
    assert drawn is not None
    bar = axes_at(figure, left, _EDGE + 0.22, min(3.4, width - left - _EDGE), 0.12)
    figure.colorbar(drawn, cax=bar, orientation="horizontal", label=label)
    bar.tick_params(labelsize=8, length=2)
    return figure


def _bare(place: "Axes") -> None:
    place.set_xticks([])
    place.set_yticks([])
    for spine in place.spines.values():
        spine.set_visible(False)


def _grey(image: np.ndarray) -> np.ndarray:
    """Luminance in all three channels, the darker half made lighter: colours are for the map, and show on it."""
    luminance = 100 + (image @ np.array([0.299, 0.587, 0.114])) * (155 / 255)
    return np.repeat(luminance[..., None], 3, axis=2).astype(np.uint8)


def _pale(image: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Three parts of white over what was not seen."""
    return np.where(seen[..., None], image, (image.astype(int) + 3 * 255) // 4).astype(np.uint8)
