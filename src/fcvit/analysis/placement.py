"""Where in the original image a feature map lies: the inverse of the evaluation's preprocessing.

The image was resized (the longer side truncated, so the two axes have ratios of their own) and a square cut out of its
center (`fcvit.data.transforms.preprocess`). The network's convolutions are padded by half their kernels, so position i
of a map of stride s sees most of pixel s * i of the crop: its center is there, not in the middle of a block of s
pixels. What the crop left out was never seen, and stays empty.

Arguments are alike in all functions: `size`, width and height of the original; `preprocessing`, that it went through;
`shown`, width and height of the result where the original is shown smaller or larger (None: as it is); `window`, left,
top, right and bottom of the part of the original that is shown (None: all of it).
"""

import numpy as np

from fcvit.data.transforms.preprocess import crop_start, resized
from fcvit.models.variants import Preprocessing

Size = tuple[int, int]
Box = tuple[int, int, int, int]


def crop_box(size: Size, preprocessing: Preprocessing) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of what the network sees, in pixels of the original."""
    side, starts, ends = preprocessing.input_size, [], []
    for length, after in zip(size, resized(size, preprocessing.resize), strict=True):
        start = crop_start(after, side)
        starts.append(start * length / after)
        ends.append((start + side) * length / after)
    return starts[0], starts[1], ends[0], ends[1]


def surroundings(size: Size, preprocessing: Preprocessing, most: float) -> Box:
    """Return the part of an image that is worth showing: all of it, but of a long and thin one not its far ends.

    What the network saw is in its middle; `most` is the longer over the shorter side of the part.
    """
    left, top, right, bottom = crop_box(size, preprocessing)
    starts, ends = [], []
    for length, other, middle in zip(size, size[::-1], ((left + right) / 2, (top + bottom) / 2), strict=True):
        part = min(length, max(1, round(most * other)))
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
    """Resample maps of the crop bilinearly onto the original image: (..., h, w) -> (..., height, width).

    The result is NaN outside of what the network saw.
    """
    across, down = _in_crop(size, preprocessing, shown, window)
    return _interpolate(_interpolate(maps, down, preprocessing, -2), across, preprocessing, -1)


def seen(size: Size, preprocessing: Preprocessing, shown: Size | None = None, window: Box | None = None) -> np.ndarray:
    """Return where the network saw the image: bool (height, width)."""
    across, down = (~np.isnan(pixels) for pixels in _in_crop(size, preprocessing, shown, window))
    return down[:, None] & across


def _in_crop(size: Size, preprocessing: Preprocessing, shown: Size | None, window: Box | None) -> list[np.ndarray]:
    """Return where the pixels that are shown lie in the crop, across and down, in its pixels from the first's center.

    NaN where they lie outside.
    """
    left, top, right, bottom = window or (0, 0, *size)
    box = crop_box(size, preprocessing)
    axes = []
    for begin, end, count, start, stop in zip(
        (left, top), (right, bottom), shown or (right - left, bottom - top), box[:2], box[2:], strict=True
    ):
        centers = begin + (np.arange(count) + 0.5) * (end - begin) / count  # in pixels of the original, from its edge
        pixels = (centers - start) / (stop - start) * preprocessing.input_size - 0.5
        axes.append(np.where((centers >= start) & (centers <= stop), pixels, np.nan))
    return axes


def _interpolate(maps: np.ndarray, pixels: np.ndarray, preprocessing: Preprocessing, axis: int) -> np.ndarray:
    """Interpolate maps linearly along one axis at pixels of the crop; NaN where nothing was seen.

    This is no matrix product, whose rounding depends on NumPy's version, the processor and the layout in memory:
    faithfulness removes pixels in the order of these values, and the last bit decides between pixels that a map marks
    alike.
    """
    cells, side = maps.shape[axis], preprocessing.input_size
    stride = next(stride for stride in (4, 8, 16, 32) if -(-side // stride) == cells)  # each stage halves, rounded up
    cell = np.clip(pixels / stride, 0, cells - 1)
    lower = np.nan_to_num(cell).astype(int)
    share = (cell - lower).reshape(-1, *[1] * (-1 - axis))
    before, after = maps.take(lower, axis), maps.take(np.minimum(lower + 1, cells - 1), axis)
    return before + share * (after - before)
