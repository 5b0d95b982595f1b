"""Select the proposals of an image from the outputs of the region proposal network (RPN).

Ported from the behavior of mmdetection 2.19.0 (`RPNHead.get_bboxes`).
"""

from collections.abc import Sequence

import numpy as np

from fcvit.models.mask_rcnn.boxes import RPN_STDS, batched_nms, decode


def select_proposals(
    logits: Sequence[np.ndarray],
    deltas: Sequence[np.ndarray],
    anchors: Sequence[np.ndarray],
    image_size: Sequence[float],
    *,
    before_nms: int,
    limit: int,
    iou_threshold: float,
) -> np.ndarray:
    """Return the proposals of an image, sorted by score: (N, 5) with x1, y1, x2, y2 and the score.

    Args:
        logits: RPN logits of each level, (3, H, W).
        deltas: RPN deltas of each level, (12, H, W).
        anchors: Anchors of each level, (H * W * 3, 4). See `grid_anchors`.
        image_size: Height and width of the image without its padding.
        before_nms: Largest number of boxes per level before NMS.
        limit: Largest number of proposals.
        iou_threshold: Largest IoU of two proposals of a level.
    """
    parts = []
    for level, anchor in enumerate(anchors):
        scores = _sigmoid(logits[level].transpose(1, 2, 0).reshape(-1))
        kept = _largest(scores, before_nms)
        # Only the deltas that are needed are copied into the order of the anchors.
        cell, ratio = np.divmod(kept, 3)
        delta = deltas[level].reshape(3, 4, -1)[ratio, :, cell]
        boxes = decode(anchor[kept], delta, RPN_STDS, image_size)
        parts.append((boxes, scores[kept], np.full(len(kept), level)))
    boxes, scores, levels = (np.concatenate(part) for part in zip(*parts, strict=True))
    filled = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    boxes, scores = boxes[filled], scores[filled]
    kept = batched_nms(boxes, scores, levels[filled], iou_threshold)[:limit]
    return np.concatenate([boxes[kept], scores[kept, None]], axis=1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(-x) becomes infinite and the result 0
        return 1 / (1 + np.exp(-x))


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the largest scores, sorted by score, or all indices in order if there are not more."""
    if len(scores) <= count:
        return np.arange(len(scores))
    candidates = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
    return candidates[np.argsort(-scores[candidates], kind="stable")[:count]]
