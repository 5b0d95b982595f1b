"""Where in the original image a feature map lies: the inverse of the evaluation's preprocessing.

The image was resized (the longer side truncated, so the two axes have ratios of their own) and a square cut out of its
center (`fcvit.data.transforms.preprocess`). The network's convolutions are padded by half their kernels, so position i
of a map of stride s sees most of pixel s * i of the crop: its center is there, not in the middle of a block of s
pixels. What the crop left out was never seen, and stays empty.
"""

import numpy as np

from fcvit.data.transforms.preprocess import crop_start, resized
from fcvit.models.variants import Preprocessing


def crop_box(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what the network sees, in pixels of the original.

    Args:
        size: width and height of the original.
        preprocessing: that it went through.
    """
    side = preprocessing.input_size
    starts, ends = [], []
    for length, after in zip(size, resized(size, preprocessing.resize), strict=True):
        start = crop_start(after, side)
        starts.append(start * length / after)
        ends.append((start + side) * length / after)
    return starts[0], starts[1], ends[0], ends[1]


def surroundings(size: tuple[int, int], preprocessing: Preprocessing, most: float) -> tuple[int, int, int, int]:
    """The part of an image that is worth showing: all of it, but of a long and thin one not its far ends.

    Args:
        size: width and height of the original.
        preprocessing: that it went through.
        most: longer over shorter side of the part.

    Returns:
        Left, top, right and bottom in pixels of the original, with what the network saw in the middle.
    """
    left, top, right, bottom = crop_box(size, preprocessing)
    starts, ends = [], []
    for length, other, middle in zip(size, size[::-1], ((left + right) / 2, (top + bottom) / 2), strict=True):
        kept = min(length, max(1, round(most * other)))
        start = min(max(0, round(middle - kept / 2)), length - kept)
        starts.append(start)
        ends.append(start + kept)
    return starts[0], starts[1], ends[0], ends[1]


def place(
    maps: np.ndarray,
    size: tuple[int, int],
    preprocessing: Preprocessing,
    shown: tuple[int, int] | None = None,
    window: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """Maps of the crop, resampled bilinearly onto the original image.

    Args:
        maps: (..., h, w).
        size: width and height of the original.
        preprocessing: that it went through.
        shown: width and height of the result, where the original is shown smaller or larger; None: as it is.
        window: left, top, right and bottom of the part of the original that is shown; None: all of it.

    Returns:
        (..., height, width), NaN outside of what the network saw.
    """
    side = preprocessing.input_size
    across, down = _in_crop(size, preprocessing, shown, window)
    return _interpolate(_interpolate(maps, down, side, -2), across, side, -1)


def seen(
    size: tuple[int, int],
    preprocessing: Preprocessing,
    shown: tuple[int, int] | None = None,
    window: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """Where the network saw the image: bool (height, width); arguments as of `place`."""
    across, down = (~np.isnan(pixels) for pixels in _in_crop(size, preprocessing, shown, window))
    return down[:, None] & across


def _in_crop(
    size: tuple[int, int],
    preprocessing: Preprocessing,
    shown: tuple[int, int] | None,
    window: tuple[int, int, int, int] | None,
) -> list[np.ndarray]:
    """Where the pixels that are shown lie in the crop, across and down: in its pixels, from the first one's center.

    NaN where they lie outside.
    """
    left, top, right, bottom = window or (0, 0, *size)
    width, height = shown or (right - left, bottom - top)
    crop_left, crop_top, crop_right, crop_bottom = crop_box(size, preprocessing)
    found = []
    for begin, end, count, start, stop in (
        (left, right, width, crop_left, crop_right),
        (top, bottom, height, crop_top, crop_bottom),
    ):
        centers = begin + (np.arange(count) + 0.5) * (end - begin) / count  # in pixels of the original, from its edge
        pixels = (centers - start) / (stop - start) * preprocessing.input_size - 0.5
        found.append(np.where((centers >= start) & (centers <= stop), pixels, np.nan))
    return found


def _interpolate(maps: np.ndarray, pixels: np.ndarray, side: int, axis: int) -> np.ndarray:
    """Interpolate maps linearly along one axis; NaN where nothing was seen.

    This is no matrix product, whose rounding depends on NumPy's version, the processor and the layout in memory.
    `trust` removes pixels in the order of these values: the last bit decides between pixels that a map marks alike.

    Args:
        maps: (..., h, w).
        pixels: of the crop, as `_in_crop` gives them, (shown,).
        side: of the crop, in its pixels.
        axis: -2 or -1.
    """
    last = maps.shape[axis] - 1
    cell = np.clip(pixels / _stride(last + 1, side), 0, last)
    lower = np.nan_to_num(cell).astype(int)
    share = (cell - lower).reshape(-1, *[1] * (-1 - axis))
    before, after = maps.take(lower, axis), maps.take(np.minimum(lower + 1, last), axis)
    return before + share * (after - before)


def _stride(cells: int, pixels: int) -> int:
    """Of the stage that makes so many positions of so many pixels: each halves, rounded up."""
    return next(stride for stride in (4, 8, 16, 32) if -(-pixels // stride) == cells)
