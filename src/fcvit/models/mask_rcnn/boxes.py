"""Boxes as NumPy arrays (N, 4) of x1, y1, x2, y2: deltas, IoU and non-maximum suppression (NMS).

Ported from the behavior of mmdetection 2.19.0 (`DeltaXYWHBBoxCoder`) and mmcv 1.4.0 (`batched_nms`). Results have the
type of the boxes, float32 or float64.
"""

import math
from collections.abc import Sequence

import numpy as np

RPN_STDS = (1.0, 1.0, 1.0, 1.0)
"""Divisors of the deltas of the region proposal network."""
BOX_STDS = (0.1, 0.1, 0.2, 0.2)
"""Divisors of the deltas of the box head."""
LOG_LIMIT = abs(math.log(16 / 1000))
"""Largest magnitude of the logarithm of a ratio of sides when deltas are decoded."""
_BLOCK = 128  # boxes that NMS compares at once


def encode(boxes: np.ndarray, targets: np.ndarray, stds: Sequence[float]) -> np.ndarray:
    """Return the deltas (N, 4) that turn boxes (N, 4) into targets (N, 4)."""
    (center, size), (target_center, target_size) = _center_and_size(boxes), _center_and_size(targets)
    deltas = np.concatenate([(target_center - center) / size, np.log(target_size / size)], axis=-1)
    return deltas / np.array(stds, boxes.dtype)


def decode(
    boxes: np.ndarray, deltas: np.ndarray, stds: Sequence[float], image_size: Sequence[float] | None = None
) -> np.ndarray:
    """Return boxes moved by deltas.

    Args:
        boxes: Anchors or proposals, (..., 4).
        deltas: Relative shift of the center and logarithm of the ratio of the sides, over `stds`, (..., 4).
        stds: Divisors of the deltas.
        image_size: Height and width to which the boxes are clipped, without padding. None does not clip.
    """
    center, size = _center_and_size(boxes)
    deltas = deltas * np.array(stds, deltas.dtype)
    center = center + size * deltas[..., :2]
    half = size * np.exp(np.clip(deltas[..., 2:], -LOG_LIMIT, LOG_LIMIT)) * 0.5
    moved = np.concatenate([center - half, center + half], axis=-1)
    if image_size is not None:
        height, width = image_size
        moved = np.clip(moved, 0, np.array([width, height, width, height], moved.dtype))
    return moved


def _center_and_size(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (boxes[..., :2] + boxes[..., 2:]) * 0.5, boxes[..., 2:] - boxes[..., :2]


def iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the IoU (N, M) of boxes (N, 4) with boxes (M, 4). It is 0 for a pair of empty boxes."""
    x1, y1, x2, y2 = np.ascontiguousarray(second.T)
    left, top, right, bottom = first.T[:, :, None]
    width, height = np.minimum(right, x2), np.minimum(bottom, y2)
    width -= np.maximum(left, x1)
    height -= np.maximum(top, y1)
    overlap = np.maximum(width, 0, out=width)
    overlap *= np.maximum(height, 0, out=height)
    union = ((right - left) * (bottom - top)) + (x2 - x1) * (y2 - y1) - overlap
    return np.divide(overlap, union, out=overlap, where=union > 0)


def batched_nms(boxes: np.ndarray, scores: np.ndarray, groups: np.ndarray, threshold: float) -> np.ndarray:
    """Return the indices of the boxes that NMS within each group keeps, sorted by score.

    A box is suppressed if its IoU with a kept box of the same group and a higher score is above the threshold. Boxes
    with equal scores keep their order.

    Args:
        boxes: Boxes, (N, 4).
        scores: Score of each box, (N,).
        groups: Level or class of each box, (N,).
        threshold: Largest IoU of two kept boxes.
    """
    order = np.argsort(-scores, kind="stable")
    groups = groups[order]
    kept = np.zeros(len(boxes), bool)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        kept[members] = _survivors(boxes[order[members]], threshold)
    return order[kept]


def _survivors(boxes: np.ndarray, threshold: float) -> np.ndarray:
    """Return which boxes, sorted by score, are not suppressed by a better one."""
    alive = np.ones(len(boxes), bool)
    for start in range(0, len(boxes), _BLOCK):
        rest = start + np.flatnonzero(alive[start:])
        block = rest[: np.searchsorted(rest, start + _BLOCK)]
        separate = ~(iou(boxes[block], boxes[rest]) > threshold)
        good = np.ones(len(rest), bool)
        for row in range(len(block)):
            if good[row]:
                good[row + 1 :] &= separate[row, row + 1 :]
        alive[rest] = good
    return alive


def pyramid_levels(boxes: np.ndarray, finest_scale: float) -> np.ndarray:
    """Return the feature map of each box (N, 4), from 0 to 3.

    Source: mmdetection 2.19.0, `SingleRoIExtractor.map_roi_levels`.

    Args:
        boxes: Boxes in pixels of the input.
        finest_scale: Boxes with a mean side of less than twice this length belong to the first map.
    """
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    return np.clip(np.floor(np.log2(sides / finest_scale + 1e-6)), 0, 3).astype(np.int64)


def to_rois(boxes: Sequence[np.ndarray]) -> np.ndarray:
    """Join the boxes of all images to regions of interest (RoIs), (N, 5): index of the image, x1, y1, x2, y2."""
    return np.concatenate([np.insert(one, 0, image, axis=1) for image, one in enumerate(boxes)])
