"""Where in the original image a feature map lies: the inverse of the evaluation's preprocessing.

The image was resized (the longer side truncated, so the two axes have ratios of their own) and a square cut out of its
centre (`fcvit.images.preprocess`). The network's convolutions are padded by half their kernels, so position i
of a map of stride s sees most of pixel s * i of the crop: its centre is there, not in the middle of a block of s
pixels. What the crop left out was never seen, and stays empty.
"""

import numpy as np

from fcvit.variants import Preprocessing


def crop_box(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what the network sees, in pixels of the original.

    Args:
        size: width and height of the original.
        preprocessing: that it went through.
    """
    sides = [_side(length, other, preprocessing) for length, other in (size, size[::-1])]
    (left, right), (top, bottom) = sides
    return left, top, right, bottom


def _resized(length: int, other: int, preprocessing: Preprocessing) -> int:
    """A side after resizing; `other` is the other one."""
    return preprocessing.resize if length <= other else int(preprocessing.resize * length / other)


def _side(length: int, other: int, preprocessing: Preprocessing) -> tuple[float, float]:
    resized = _resized(length, other, preprocessing)
    start = round((resized - preprocessing.input_size) / 2.0)
    return start * length / resized, (start + preprocessing.input_size) * length / resized


def place(
    maps: np.ndarray, size: tuple[int, int], preprocessing: Preprocessing, shown: tuple[int, int] | None = None
) -> np.ndarray:
    """Maps of the crop, resampled bilinearly onto the original image.

    Args:
        maps: (..., h, w).
        size: width and height of the original.
        preprocessing: that it went through.
        shown: width and height of the result, where the original is shown smaller or larger; None: as it is.

    Returns:
        (..., height, width), NaN outside of what the network saw.
    """
    width, height = shown or size
    across = _weights(maps.shape[-1], size[0], size[1], width, preprocessing)
    down = _weights(maps.shape[-2], size[1], size[0], height, preprocessing)
    return down @ maps @ across.T


def _weights(cells: int, length: int, other: int, shown: int, preprocessing: Preprocessing) -> np.ndarray:
    """How much each cell counts for each pixel: (shown, cells); rows of NaN where nothing was seen."""
    start, end = _side(length, other, preprocessing)
    centres = (np.arange(shown) + 0.5) * length / shown  # in pixels of the original, from its edge
    seen = (centres >= start) & (centres <= end)
    crop = (centres - start) / (end - start) * preprocessing.input_size - 0.5  # the crop's pixels, from their centres
    stride = _stride(cells, preprocessing.input_size)
    cell = np.clip(crop / stride, 0, cells - 1)
    lower = np.minimum(cell.astype(int), max(cells - 2, 0))
    share = cell - lower
    weights = np.zeros((shown, cells))
    rows = np.arange(shown)
    weights[rows, lower] += 1 - share
    weights[rows, np.minimum(lower + 1, cells - 1)] += share
    weights[~seen] = np.nan
    return weights


def _stride(cells: int, pixels: int) -> int:
    """Of the stage that makes so many positions of so many pixels: each halves, rounded up."""
    return next(stride for stride in (4, 8, 16, 32) if -(-pixels // stride) == cells)
