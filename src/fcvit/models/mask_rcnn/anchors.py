"""Anchors of the region proposal network: three boxes at each position of the five feature maps.

Source: mmdetection 2.19.0, `AnchorGenerator` with the authors' settings.
"""

from collections.abc import Sequence

import numpy as np

STRIDES = (4, 8, 16, 32, 64)
"""Stride of each feature map in pixels of the input."""
RATIOS = (0.5, 1.0, 2.0)
"""Height over width of the anchors at a position."""


def base_anchors(stride: int, scale: float, dtype: np.dtype | type) -> np.ndarray:
    """Return the three anchors (3, 4) around the origin. In float32, they have mmdetection's bits."""
    roots = np.sqrt(np.array(RATIOS, dtype))
    half_width, half_height = stride * (1 / roots) * scale / 2, stride * roots * scale / 2
    return np.stack([-half_width, -half_height, half_width, half_height], axis=1).astype(dtype)


def grid_anchors(sizes: Sequence[tuple[int, int]], scale: float, dtype: np.dtype | type) -> list[np.ndarray]:
    """Return the anchors (H * W * 3, 4) of each level, in the order row, column, ratio.

    An anchor is centered on the upper left corner of its cell, not on the middle. It may be outside the image.

    Args:
        sizes: Height and width of each feature map.
        scale: Side of the square anchor, in strides.
        dtype: float32 or float64.
    """
    levels = []
    for stride, (height, width) in zip(STRIDES, sizes, strict=True):
        y, x = np.meshgrid(np.arange(height) * stride, np.arange(width) * stride, indexing="ij")
        shifts = np.stack([x, y, x, y], axis=2).astype(dtype).reshape(-1, 1, 4)
        levels.append((base_anchors(stride, scale, dtype) + shifts).reshape(-1, 4))
    return levels
