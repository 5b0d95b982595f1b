"""RoIAlign on the feature pyramid in NumPy, and its gradient with respect to the feature maps.

Ported from the behavior of mmcv 1.4.0 (`RoIAlign` with aligned=True and sampling_ratio=0) and of mmdetection 2.19.0
(`SingleRoIExtractor`). In each of size x size bins of a RoI, bilinear samples are averaged. The samples form a grid, so
that their mean is the product of the feature map with one small matrix per axis. The gradient is the product with the
transposed matrices.

Maps are channels last, (B, H, W, C), because the products are then several times as fast. Each product is for one row
or column. NumPy would divide larger products among threads, which takes ten times as long.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fcvit.models.mask_rcnn.anchors import STRIDES
from fcvit.models.mask_rcnn.boxes import pyramid_levels

BOX_BINS, MASK_BINS = 7, 14
"""Bins per axis for the box head and the mask head."""


class Window(NamedTuple):
    """The part of the feature pyramid that a RoI covers, and the weights of its rows and columns.

    Attributes:
        level: Index of the feature map.
        part: Index of the image, rows and columns.
        down: Weight of each row in each bin, (size, rows).
        across: Weight of each column in each bin, (size, columns).
    """

    level: int
    part: tuple[int, slice, slice]
    down: np.ndarray
    across: np.ndarray


def roi_windows(
    rois: np.ndarray, sizes: Sequence[tuple[int, int]], size: int, finest_scale: float, dtype: np.dtype | type
) -> list[Window]:
    """Return the window of each RoI.

    Args:
        rois: Index of the image and box in pixels of the input, (N, 5).
        sizes: Height and width of the feature maps.
        size: Number of bins per axis.
        finest_scale: See `pyramid_levels`.
        dtype: Type of the weights, which are computed in float64.
    """
    if not len(rois):
        return []
    rois = rois.astype(np.float64)
    levels = pyramid_levels(rois[:, 1:], finest_scale)
    corners = rois[:, 1:] / np.array(STRIDES)[levels, None] - 0.5
    lengths = np.array(sizes)[levels]
    top, bottom, down = axis_weights(corners[:, 1], corners[:, 3], lengths[:, 0], size, dtype)
    left, right, across = axis_weights(corners[:, 0], corners[:, 2], lengths[:, 1], size, dtype)
    return [
        Window(
            int(levels[index]),
            (int(rois[index, 0]), slice(top[index], bottom[index]), slice(left[index], right[index])),
            down[index, :, : bottom[index] - top[index]],
            across[index, :, : right[index] - left[index]],
        )
        for index in range(len(rois))
    ]


def axis_weights(
    start: np.ndarray, end: np.ndarray, length: np.ndarray, size: int, dtype: np.dtype | type
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first position of each window, the one after its last, and the weights (N, size, longest window).

    Args:
        start, end: Extent of each RoI along the axis, in positions of its map, (N,).
        length: Length of the map of each RoI, (N,).
        size: Number of bins.
        dtype: Type of the weights.
    """
    start, length = start[:, None, None], length[:, None, None]
    width = (end[:, None, None] - start) / size
    # mmcv rounds the quotient to float32. An empty RoI has no samples and the result 0.
    count = np.ceil(width.astype(np.float32)).astype(np.int64)
    bins, samples = np.arange(size)[:, None], np.arange(max(count.max(), 1))
    divisor = np.maximum(count, 1)
    position = start + bins * width + (samples + 0.5) * width / divisor  # (N, size, samples)
    inside = (samples < count) & (position >= -1) & (position <= length)
    position = np.clip(np.where(inside, position, start), 0, length - 1)
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, length - 1)
    first, stop = low.min(axis=(1, 2)), high.max(axis=(1, 2)) + 1
    shape = (len(start), size, int((stop - first).max()))
    cells = (np.arange(len(start))[:, None, None] * size + bins) * shape[2] - first[:, None, None]
    share = inside / divisor
    weights = np.zeros(shape[0] * shape[1] * shape[2])
    for neighbor, weight in ((low, 1 - (position - low)), (high, position - low)):
        weights += np.bincount((cells + neighbor).ravel(), (share * weight).ravel(), len(weights))
    return first, stop, weights.reshape(shape).astype(dtype)


def roi_align(maps: Sequence[np.ndarray], windows: Sequence[Window], size: int) -> np.ndarray:
    """Return the features of RoIs, (N, C, size, size), from maps (B, H, W, C)."""
    channels = maps[0].shape[3]
    features = np.empty((len(windows), channels, size, size), maps[0].dtype)
    for feature, window in zip(features, windows, strict=True):
        rows = window.across @ maps[window.level][window.part]  # (rows, size, C)
        feature[:] = (window.down @ rows.swapaxes(0, 1)).transpose(2, 1, 0)
    return features


def roi_align_gradient(
    gradient: np.ndarray, windows: Sequence[Window], shapes: Sequence[tuple[int, ...]]
) -> list[np.ndarray]:
    """Return the gradient with respect to each map (B, H, W, C) for the gradient of the features (N, C, size, size)."""
    maps = [np.zeros(shape, gradient.dtype) for shape in shapes]
    for given, window in zip(gradient, windows, strict=True):
        bins = np.ascontiguousarray(given.transpose(2, 1, 0))  # (size, size, C), the columns first
        rows = (window.down.T @ bins).swapaxes(0, 1)  # (rows, size, C)
        maps[window.level][window.part] += window.across.T @ rows
    return maps
