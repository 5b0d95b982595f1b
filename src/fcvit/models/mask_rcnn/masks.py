"""Paste the mask of a detection into its image.

Ported from the behavior of mmdetection 2.19.0 (`FCNMaskHead.get_seg_masks` on a CPU).
"""

from collections.abc import Sequence

import numpy as np

MASK_THRESHOLD = 0.5


def paste_mask(logits: np.ndarray, box: np.ndarray, image_size: Sequence[int]) -> np.ndarray:
    """Return the mask of a detection as booleans (height, width) at the size of the image.

    The probabilities are interpolated bilinearly at the centers of the image's pixels, with zeros around them.

    Args:
        logits: Mask logits of the detection, (28, 28).
        box: x1, y1, x2, y2 in pixels of the image, (4,).
        image_size: Height and width of the image.
    """
    height, width = image_size
    mask = np.zeros((height, width), bool)
    (left, right), (top, bottom) = _extent(box[0], box[2], width), _extent(box[1], box[3], height)
    if left < right and top < bottom:
        with np.errstate(over="ignore"):  # exp(-x) becomes infinite and the probability 0
            probabilities = 1 / (1 + np.exp(-logits))
        down = _interpolation(top, bottom, box[1], box[3], logits.shape[0])
        across = _interpolation(left, right, box[0], box[2], logits.shape[1])
        mask[top:bottom, left:right] = down @ probabilities @ across.T >= MASK_THRESHOLD
    return mask


def _extent(low: float, high: float, length: int) -> tuple[int, int]:
    """Return the range of the pixels that a box can touch along an axis."""
    return max(int(np.floor(low)) - 1, 0), min(int(np.ceil(high)) + 1, length)


def _interpolation(first: int, stop: int, low: float, high: float, cells: int) -> np.ndarray:
    """Return the weight of each of a mask's cells, which divide low to high, at the pixels from `first` to `stop`."""
    centers = np.arange(first, stop, dtype=np.asarray(low).dtype) + 0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (centers - low) / (high - low)
    share = np.where(np.isfinite(share), share, 0.5)  # in a box without a size, every pixel shows its middle
    position = share * cells - 0.5
    return np.maximum(1 - np.abs(position[:, None] - np.arange(cells)), 0).astype(position.dtype)
