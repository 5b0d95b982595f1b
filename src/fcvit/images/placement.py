"""Where in the original image a feature map lies: the inverse of the evaluation's preprocessing.

The image was resized (the longer side truncated, so the two axes have ratios of their own) and a square cut out of its
centre (`fcvit.images.preprocess`). The network's convolutions are padded by half their kernels, so position i
of a map of stride s sees most of pixel s * i of the crop: its centre is there, not in the middle of a block of s
pixels. What the crop left out was never seen, and stays empty.
"""

import numpy as np

from fcvit.images.preprocess import crop_start, resized
from fcvit.variants import Preprocessing


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
    left, top, right, bottom = crop_box(size, preprocessing)
    across = _weights(maps.shape[-1], size[0], width, (left, right), preprocessing.input_size)
    down = _weights(maps.shape[-2], size[1], height, (top, bottom), preprocessing.input_size)
    return down @ maps @ across.T


def _weights(cells: int, length: int, shown: int, span: tuple[float, float], side: int) -> np.ndarray:
    """How much each cell counts for each pixel, along one axis: (shown, cells); rows of NaN where nothing was seen.

    Args:
        cells: of the map.
        length: of the original, in pixels.
        shown: pixels of the result.
        span: where the crop begins and ends, in pixels of the original.
        side: of the crop, in pixels of its own.
    """
    start, end = span
    centres = (np.arange(shown) + 0.5) * length / shown  # in pixels of the original, from its edge
    seen = (centres >= start) & (centres <= end)
    crop = (centres - start) / (end - start) * side - 0.5  # the crop's pixels, from their centres
    cell = np.clip(crop / _stride(cells, side), 0, cells - 1)
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
