"""Check and rasterize the masks of instances in COCO's forms: polygons, and compressed or uncompressed run lengths.

pycocotools rasterizes. Its C code trusts its input: run lengths that do not fill the image, or coordinates that are
not finite, make it read or write outside its memory or allocate gigabytes. `parse_segmentation` therefore checks them
first.
"""

import array
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fcvit.frameworks import import_framework
from fcvit.metrics.detection import decode_masks

Segmentation = tuple[np.ndarray, ...] | np.ndarray
"""The mask of an instance: polygons, float64 (2k,) with x, y, x, y, ...; or run lengths, uint32 (r,), columns first."""

_PARTS = 2000  # maximum number of polygons of an instance
_FARTHEST = 1e7  # maximum coordinate in pixels; pycocotools multiplies it by 5 in 32 bits
_LONGEST = 1e6  # maximum length of all outlines of an instance in pixels; pycocotools needs 100 bytes for each


def parse_segmentation(value: Any, size: tuple[int, int]) -> Segmentation | None:
    """Check the segmentation of an annotation. Polygons of fewer than three points are left out.

    Args:
        value: The value of `segmentation` in a COCO file.
        size: Height and width of the image.

    Returns:
        The mask, or None if there is none.

    Raises:
        ValueError: The value cannot be a mask of this image. The message is the reason.
    """
    if value is None or value == []:
        return None
    if isinstance(value, list):
        return _polygons(value) or None
    if not isinstance(value, Mapping) or not {"size", "counts"} <= value.keys():
        raise ValueError("the segmentation is neither a list of polygons nor an object with size and counts")
    if value["size"] != [*size]:
        raise ValueError(f"the mask has the size {value['size']!s:.40}, but the image has {[*size]} (height, width)")
    counts = value["counts"]
    lengths = _listed(counts) if isinstance(counts, list) else _compressed(counts, size[0] * size[1])
    if (lengths < 0).any() or lengths.sum() != size[0] * size[1]:
        raise ValueError(f"the run lengths do not add up to the {size[0] * size[1]:,} pixels of the image")
    return _without_empty_runs(lengths).astype(np.uint32)


def _polygons(value: list[Any]) -> tuple[np.ndarray, ...]:
    if len(value) > _PARTS:
        raise ValueError(f"{len(value):,} polygons for one instance; at most {_PARTS:,} are read")
    polygons, total = [], 0.0
    for one in value:
        if not isinstance(one, list):
            raise ValueError("a polygon is not a list of coordinates")
        try:
            coordinates = array.array("d", one)
        except (TypeError, OverflowError) as error:
            raise ValueError("a polygon contains something else than numbers") from error
        if len(coordinates) < 6:
            continue
        if len(coordinates) % 2:
            raise ValueError(f"a polygon has {len(coordinates)} coordinates, which is odd")
        low, high = min(coordinates), max(coordinates)
        if not (math.isfinite(sum(coordinates)) and low >= -_FARTHEST and high <= _FARTHEST):
            raise ValueError(f"a polygon has coordinates that are not finite or beyond {_FARTHEST:,.0f} pixels")
        polygon = np.frombuffer(coordinates)
        longest = len(polygon) * (high - low)  # an upper bound, which is enough for nearly all polygons
        if total + longest > _LONGEST:
            points = polygon.reshape(-1, 2)
            longest = float(np.abs(points - np.roll(points, 1, 0)).max(1).sum())
        total += longest
        if total > _LONGEST:
            raise ValueError(f"the outline is longer than {_LONGEST:,.0f} pixels")
        polygons.append(polygon)
    return tuple(polygons)


def _listed(counts: list[Any]) -> np.ndarray:
    """Return uncompressed run lengths, int64."""
    try:
        lengths = np.frombuffer(array.array("d", counts)) if counts else np.zeros(0)
    except (TypeError, OverflowError) as error:
        raise ValueError("the run lengths contain something else than numbers") from error
    if not (np.abs(lengths) < 1 << 31).all() or (lengths % 1).any():  # NaN is not less than anything
        raise ValueError("the run lengths are not whole numbers")
    return lengths.astype(np.int64)


def _compressed(counts: Any, pixels: int) -> np.ndarray:
    """Decode compressed run lengths, int64: groups of six bits, and differences to the run before the last one.

    The groups of a number come lowest first. Each has five bits of the number and a bit that says whether another group
    follows. The highest bit of the last group is the sign. From the fourth number on, they are differences.
    """
    if not isinstance(counts, str):
        raise ValueError("the run lengths are neither a list nor text")
    if len(counts) > 7 * (pixels + 1):
        raise ValueError("there are more run lengths than pixels")
    codes = np.frombuffer(counts.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64) - 48
    (last,) = np.nonzero(codes & 32 == 0)
    starts = np.concatenate([[0], last[:-1] + 1])
    if not len(last) or last[-1] != len(codes) - 1 or codes.min() < 0 or codes.max() > 63:
        raise ValueError("the text is not compressed run lengths")
    lengths = last - starts + 1
    if lengths.max() > 7:
        raise ValueError("a run length has more than 32 bits")
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 31) << 5 * place, starts)
    values -= np.where(codes[last] & 16, 1 << 5 * lengths, 0)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


def _without_empty_runs(lengths: np.ndarray) -> np.ndarray:
    """Join the neighbors of empty runs. pycocotools stops at an empty run, except for the first one."""
    if lengths[1:].all():
        return lengths
    borders, times = np.unique(lengths.cumsum()[:-1], return_counts=True)
    total = lengths.sum()
    borders = borders[(times % 2 == 1) & (borders < total)]
    return np.diff(borders, prepend=0, append=total)


def _polygon_area(polygon: np.ndarray) -> float:
    """Return the area of a polygon in square pixels."""
    x, y = polygon[::2], polygon[1::2]
    return float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)


def mask_area(segmentation: Segmentation) -> float:
    """Return the area of a mask in pixels, without rasterizing polygons. Overlaps of polygons count twice."""
    if isinstance(segmentation, tuple):
        return sum(map(_polygon_area, segmentation))
    return float(segmentation[1::2].sum())


def encode_segmentation(segmentation: Segmentation, size: tuple[int, int]) -> dict[str, Any]:
    """Rasterize a mask to pycocotools' compressed run lengths: `size` (height, width) and `counts`, bytes.

    Raises:
        MissingExtra: pycocotools is not installed.
    """
    tools = import_framework("pycocotools.mask")
    height, width = size
    if isinstance(segmentation, tuple):
        return tools.merge(tools.frPyObjects([*segmentation], height, width))
    return tools.frPyObjects({"size": [height, width], "counts": segmentation}, height, width)


def decode_segmentation(segmentation: Segmentation, size: tuple[int, int]) -> np.ndarray:
    """Rasterize a mask, uint8 (H, W) of 0 and 1. All polygons of an instance are merged.

    Raises:
        MissingExtra: pycocotools is not installed.
    """
    return decode_masks([encode_segmentation(segmentation, size)])[0]
