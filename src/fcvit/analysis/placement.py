"""Resample feature maps onto the original image by inverting the preprocessing of the evaluation.

The preprocessing resizes the image and crops a square from its center (`fcvit.data.transforms.preprocess`). It rounds
the length of the longer side down, so the two axes have different scales. The network pads its convolutions by half of
their kernels, so position i of a map with stride s is centered at pixel s * i of the crop, not in the middle of a block
of s pixels. Pixels outside of the crop have no map.

Common arguments:
    size: Width and height of the original image.
    preprocessing: Preprocessing of the image.
    shown: Width and height of the result, or None for the size of the window.
    window: Left, top, right and bottom of the part of the original image to show, or None for all of it.
"""

import numpy as np

from fcvit.data.transforms.preprocess import crop_start, resized
from fcvit.models.variants import Preprocessing

Size = tuple[int, int]
Box = tuple[int, int, int, int]


def crop_box(size: Size, preprocessing: Preprocessing) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of the network's crop, in pixels of the original image."""
    side, starts, ends = preprocessing.input_size, [], []
    for length, after in zip(size, resized(size, preprocessing.resize), strict=True):
        start = crop_start(after, side)
        starts.append(start * length / after)
        ends.append((start + side) * length / after)
    return starts[0], starts[1], ends[0], ends[1]


def surroundings(size: Size, preprocessing: Preprocessing, max_aspect: float) -> Box:
    """Return left, top, right and bottom of the part of an image to show.

    This is the entire image, unless its aspect ratio exceeds `max_aspect`. Then its long side is shortened around the
    network's crop.
    """
    left, top, right, bottom = crop_box(size, preprocessing)
    starts, ends = [], []
    for length, other, middle in zip(size, size[::-1], ((left + right) / 2, (top + bottom) / 2), strict=True):
        part = min(length, max(1, round(max_aspect * other)))
        starts.append(min(max(0, round(middle - part / 2)), length - part))
        ends.append(starts[-1] + part)
    return starts[0], starts[1], ends[0], ends[1]


def place(
    maps: np.ndarray,
    size: Size,
    preprocessing: Preprocessing,
    shown: Size | None = None,
    window: Box | None = None,
) -> np.ndarray:
    """Resample maps of the crop bilinearly onto the original image, (..., h, w) -> (..., height, width).

    The result is NaN outside of the network's crop.
    """
    across, down = _in_crop(size, preprocessing, shown, window)
    return _interpolate(_interpolate(maps, down, preprocessing, -2), across, preprocessing, -1)


def seen(size: Size, preprocessing: Preprocessing, shown: Size | None = None, window: Box | None = None) -> np.ndarray:
    """Return a mask of the pixels inside the network's crop, bool (height, width)."""
    across, down = (~np.isnan(pixels) for pixels in _in_crop(size, preprocessing, shown, window))
    return down[:, None] & across


def _in_crop(size: Size, preprocessing: Preprocessing, shown: Size | None, window: Box | None) -> list[np.ndarray]:
    """Return the positions of the shown columns and rows in the crop, in pixels from the center of its first pixel.

    Positions outside of the crop are NaN.
    """
    left, top, right, bottom = window or (0, 0, *size)
    box = crop_box(size, preprocessing)
    axes = []
    for begin, end, count, start, stop in zip(
        (left, top), (right, bottom), shown or (right - left, bottom - top), box[:2], box[2:], strict=True
    ):
        # in pixels of the original image, from its edge
        centers = begin + (np.arange(count) + 0.5) * (end - begin) / count
        pixels = (centers - start) / (stop - start) * preprocessing.input_size - 0.5
        axes.append(np.where((centers >= start) & (centers <= stop), pixels, np.nan))
    return axes


def _interpolate(maps: np.ndarray, pixels: np.ndarray, preprocessing: Preprocessing, axis: int) -> np.ndarray:
    """Interpolate maps linearly along one axis at the given pixels of the crop. NaN pixels give NaN.

    This avoids a matrix product, whose rounding depends on the version of NumPy, the processor and the memory layout.
    Faithfulness removes pixels in the order of these values, so a difference in the last bit would change the order of
    pixels with equal values.
    """
    cells, side = maps.shape[axis], preprocessing.input_size
    # Each stage halves the size and rounds up.
    stride = next(stride for stride in (4, 8, 16, 32) if -(-side // stride) == cells)
    cell = np.clip(pixels / stride, 0, cells - 1)
    lower = np.nan_to_num(cell).astype(int)
    share = (cell - lower).reshape(-1, *[1] * (-1 - axis))
    before, after = maps.take(lower, axis), maps.take(np.minimum(lower + 1, cells - 1), axis)
    return before + share * (after - before)
