"""Select detections from the outputs of the heads, in NumPy.

Ported from the behavior of mmdetection 2.19.0 (`BBoxHead.get_bboxes`, `StandardRoIHead.simple_test`).
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from fcvit.models.mask_rcnn.anchors import grid_anchors
from fcvit.models.mask_rcnn.boxes import BOX_STDS, batched_nms, decode, to_rois
from fcvit.models.mask_rcnn.proposals import select_proposals
from fcvit.models.spec import MaskRCNNOptions

MASK_SIDE = 28
"""Height and width of the mask of a detection."""


@dataclasses.dataclass(frozen=True)
class Detections:
    """The detections in an image, sorted by score.

    Attributes:
        boxes: x1, y1, x2, y2 of each detection, (N, 4).
        scores: Score of each detection, (N,).
        labels: Class of each detection from 0, int64 (N,).
        mask_logits: Mask logits of the class of each detection, (N, 28, 28), or None for a network without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    mask_logits: np.ndarray | None = None


def propose(
    options: MaskRCNNOptions,
    logits: Sequence[np.ndarray],
    deltas: Sequence[np.ndarray],
    image_sizes: np.ndarray,
) -> list[np.ndarray]:
    """Return the proposals (N, 5) of each image. See `select_proposals`.

    Args:
        options: Options of the network.
        logits: RPN logits of each level, (B, 3, H, W).
        deltas: RPN deltas of each level, (B, 12, H, W).
        image_sizes: Height and width of each image without its padding, (B, 2).
    """
    sizes = [(level.shape[2], level.shape[3]) for level in logits]
    anchors = grid_anchors(sizes, options.anchor_scale, logits[0].dtype)
    return [
        select_proposals(
            [level[image] for level in logits],
            [level[image] for level in deltas],
            anchors,
            size,
            before_nms=options.proposals_before_nms,
            limit=options.max_proposals,
            iou_threshold=options.proposal_iou,
        )
        for image, size in enumerate(image_sizes)
    ]


def select_detections(
    options: MaskRCNNOptions,
    proposals: np.ndarray,
    logits: np.ndarray,
    deltas: np.ndarray,
    image_size: Sequence[float],
    scale_factor: np.ndarray | None = None,
) -> Detections:
    """Return the detections in an image, without masks.

    Args:
        options: Options of the network.
        proposals: Proposals in pixels of the input, (N, 4).
        logits: Class logits of the proposals, (N, classes + 1). The last column is the background.
        deltas: Deltas of each class, (N, 4 * classes).
        image_size: Height and width of the image without its padding.
        scale_factor: New over old width, height, width and height, (4,). The boxes are then in pixels of the original
            image, also for NMS.
    """
    scores = _softmax(logits)[:, :-1]
    rows, labels = np.nonzero(scores > options.score_threshold)
    boxes = decode(proposals[rows], deltas.reshape(*scores.shape, 4)[rows, labels], BOX_STDS, image_size)
    if scale_factor is not None:
        boxes = boxes / scale_factor.astype(boxes.dtype)
    scores = scores[rows, labels]
    kept = batched_nms(boxes, scores, labels, options.detection_iou)[: options.max_detections]
    return Detections(boxes[kept], scores[kept], labels[kept])


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def detect(
    options: MaskRCNNOptions,
    proposals: Sequence[np.ndarray],
    box_head: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    mask_head: Callable[[np.ndarray, np.ndarray], np.ndarray],
    image_sizes: np.ndarray,
    scale_factors: np.ndarray | None = None,
) -> list[Detections]:
    """Return the detections in each image. The heads are functions, so that any engine can compute them.

    Args:
        options: Options of the network.
        proposals: Proposals of each image, (N, 5) or (N, 4).
        box_head: Function from RoIs (N, 5) to class logits (N, classes + 1) and deltas (N, 4 * classes).
        mask_head: Function from RoIs (N, 5) and labels (N,) to mask logits (N, 28, 28).
        image_sizes: Height and width of each image without its padding, (B, 2).
        scale_factors: New over old width, height, width and height of each image, (B, 4), or None.
    """
    boxes = [one[:, :4] for one in proposals]
    scales = [None] * len(boxes) if scale_factors is None else list(scale_factors)
    results = [Detections(one[:0], one[:0, 0], np.zeros(0, np.int64)) for one in boxes]
    rois = to_rois(boxes)
    if len(rois):
        logits, deltas = (_by_image(values, boxes) for values in box_head(rois))
        parts = zip(boxes, logits, deltas, image_sizes, scales, strict=True)
        results = [select_detections(options, *part) for part in parts]
    if not options.masks:
        return results
    # RoIs are in pixels of the input.
    input_boxes = [
        one.boxes if scale is None else one.boxes * scale.astype(one.boxes.dtype)
        for one, scale in zip(results, scales, strict=True)
    ]
    rois, labels = to_rois(input_boxes), np.concatenate([one.labels for one in results])
    logits = mask_head(rois, labels) if len(rois) else np.zeros((0, MASK_SIDE, MASK_SIDE), rois.dtype)
    masks = _by_image(logits, input_boxes)
    return [dataclasses.replace(one, mask_logits=mask) for one, mask in zip(results, masks, strict=True)]


def _by_image(values: np.ndarray, boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Split rows of all images into those of each image."""
    return np.split(values, np.cumsum([len(one) for one in boxes])[:-1])
