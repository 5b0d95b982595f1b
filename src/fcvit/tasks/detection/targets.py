"""Training targets of Mask R-CNN in NumPy: assignment, sampling, box deltas and mask targets.

Ported from the behavior of mmdetection 2.19.0 (`MaxIoUAssigner`, `RandomSampler`, `BitmapMasks`).
The order of all operations is theirs, because rounding decides ties between anchors.
Boxes are x1, y1, x2, y2 in pixels of the network's input, (N, 4). Results have the type of the boxes.

A `Choose` function draws the given number of positions from an array without replacement. `drawn_from` gives one for a
generator.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from fcvit.data.transforms.detection import DetectionTarget
from fcvit.models.mask_rcnn.anchors import RATIOS, STRIDES
from fcvit.models.mask_rcnn.boxes import BOX_STDS, RPN_STDS, encode
from fcvit.models.mask_rcnn.detections import MASK_SIDE
from fcvit.models.mask_rcnn.roi_align import axis_weights

Choose = Callable[[np.ndarray, int], np.ndarray]

RPN_SAMPLES, ROI_SAMPLES = 256, 512  # samples of an image in the authors' configuration
RPN_POSITIVES, ROI_POSITIVES = 0.5, 0.25  # largest share of positive samples


@dataclasses.dataclass(frozen=True)
class Samples:
    """The sampled anchors or proposals of an image.

    Attributes:
        positive: Positions of the positive samples in ascending order, (P,).
        negative: Positions of the negative samples in ascending order, (N,).
        objects: Object of each positive sample, (P,).
        deltas: Box deltas from each positive sample to its object, (P, 4).
    """

    positive: np.ndarray
    negative: np.ndarray
    objects: np.ndarray
    deltas: np.ndarray


@dataclasses.dataclass(frozen=True)
class RoISamples:
    """The sampled regions of interest (RoIs) of an image. The positive ones come first.

    Attributes:
        rois: Boxes of the P positive and N negative RoIs, (P + N, 4).
        labels: Class of each RoI, int64 (P + N,). The background has the number of classes as label.
        deltas: Box deltas of the positive RoIs, (P, 4).
        masks: Mask targets of the positive RoIs, bool (P, M, M), or None without masks.
    """

    rois: np.ndarray
    labels: np.ndarray
    deltas: np.ndarray
    masks: np.ndarray | None


def drawn_from(generator: np.random.Generator) -> Choose:
    """Return a function that draws positions uniformly from a generator."""
    return lambda candidates, count: generator.choice(candidates, count, replace=False)


def overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the IoU of a box (4,) with boxes (N, 4), with mmdetection's rounding."""
    x1, y1, x2, y2 = boxes.T
    width = np.maximum(np.minimum(box[2], x2) - np.maximum(box[0], x1), 0)
    height = np.maximum(np.minimum(box[3], y2) - np.maximum(box[1], y1), 0)
    overlap = width * height
    union = (box[2] - box[0]) * (box[3] - box[1]) + (x2 - x1) * (y2 - y1) - overlap
    return overlap / np.maximum(union, boxes.dtype.type(1e-6))


def assign(
    objects: np.ndarray, boxes: np.ndarray, positive: float, negative: float, lowest: float
) -> tuple[np.ndarray, np.ndarray]:
    """Assign each box to the object with the highest IoU.

    Afterwards, each object takes all boxes that have exactly its highest IoU, in the order of the objects.

    Args:
        objects: Boxes of the objects, (G, 4).
        boxes: Anchors or proposals, (N, 4).
        positive: Lowest IoU of a positive box.
        negative: A box is negative if its highest IoU is lower than this.
        lowest: Lowest IoU at which an object takes its best boxes.

    Returns:
        For each box the object counted from 1, 0 if it is negative or -1 if it is ignored, int64 (N,), and its highest
        IoU, (N,).
    """
    highest = np.zeros(len(boxes), boxes.dtype)
    nearest = np.zeros(len(boxes), np.int64)
    best_boxes = []
    for number, box in enumerate(objects):
        ious = overlaps(box, boxes)
        better = ious > highest
        highest[better], nearest[better] = ious[better], number
        best = ious.max(initial=0)
        best_boxes.append(np.flatnonzero(ious == best) if best >= lowest else [])
    assigned = np.full(len(boxes), -1, np.int64)
    assigned[highest < negative] = 0
    taken = highest >= positive
    assigned[taken] = nearest[taken] + 1
    for number, positions in enumerate(best_boxes):
        assigned[positions] = number + 1
    return assigned, highest


def sample(assigned: np.ndarray, count: int, share: float, choose: Choose) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted positions of the positive and the negative samples of an image.

    Args:
        assigned: Result of `assign`.
        count: Number of samples. There are fewer if there are too few negative boxes.
        share: Largest share of positive samples. Negative boxes replace missing positive ones.
        choose: Draws the positions.
    """
    positive = _at_most(np.flatnonzero(assigned > 0), int(count * share), choose)
    return positive, _at_most(np.flatnonzero(assigned == 0), count - len(positive), choose)


def _at_most(candidates: np.ndarray, count: int, choose: Choose) -> np.ndarray:
    return np.sort(choose(candidates, count)) if len(candidates) > count else candidates


def valid_anchors(sizes: Sequence[tuple[int, int]], padded: tuple[int, int]) -> np.ndarray:
    """Return which anchors of all levels belong to a cell inside the image with its own padding, bool (N,).

    Args:
        sizes: Height and width of each feature map.
        padded: Height and width of the image with its own padding. The batch can be larger.
    """
    levels = []
    for stride, (height, width) in zip(STRIDES, sizes, strict=True):
        inside = np.zeros((height, width, len(RATIOS)), bool)
        inside[: -(-padded[0] // stride), : -(-padded[1] // stride)] = True
        levels.append(inside.ravel())
    return np.concatenate(levels)


def anchor_samples(
    anchors: np.ndarray, valid: np.ndarray, objects: np.ndarray, choose: Choose, count: int = RPN_SAMPLES
) -> Samples:
    """Assign and sample the anchors of an image.

    Args:
        anchors: Anchors of all levels, (N, 4).
        valid: Marks the anchors whose cell is inside the image with its own padding, bool (N,).
        objects: Boxes of the objects, (G, 4).
        choose: Draws the samples.
        count: Number of samples.
    """
    inside = np.flatnonzero(valid)
    assigned, _ = assign(objects, anchors[inside], 0.7, 0.3, 0.3)
    positive, negative = sample(assigned, count, RPN_POSITIVES, choose)
    matched = assigned[positive] - 1
    deltas = encode(anchors[inside[positive]], objects[matched], RPN_STDS)
    return Samples(inside[positive], inside[negative], matched, deltas)


def roi_samples(
    proposals: np.ndarray, objects: DetectionTarget, classes: int, choose: Choose, count: int = ROI_SAMPLES
) -> RoISamples:
    """Assign and sample the proposals of an image. The objects themselves are prepended to the proposals.

    Args:
        proposals: Proposals, (N, 4).
        objects: Objects of the image.
        classes: Number of classes, which is the label of the background.
        choose: Draws the samples.
        count: Number of samples.
    """
    assigned, _ = assign(objects.boxes, proposals, 0.5, 0.5, 0.5)
    assigned = np.concatenate([np.arange(len(objects.boxes)) + 1, assigned])
    boxes = np.concatenate([objects.boxes, proposals])
    positive, negative = sample(assigned, count, ROI_POSITIVES, choose)
    matched = assigned[positive] - 1
    labels = np.concatenate([objects.labels[matched], np.full(len(negative), classes)])
    masks = None
    if objects.masks is not None:
        masks = mask_targets(objects.masks, matched, boxes[positive])
    deltas = encode(boxes[positive], objects.boxes[matched], BOX_STDS)
    return RoISamples(boxes[np.concatenate([positive, negative])], labels, deltas, masks)


def mask_targets(masks: np.ndarray, matched: np.ndarray, rois: np.ndarray, size: int = MASK_SIDE) -> np.ndarray:
    """Return the part of its object's mask in each RoI as bool (P, size, size).

    Args:
        masks: Masks of the objects, bool or uint8 (G, H, W).
        matched: Object of each RoI, (P,).
        rois: RoIs, (P, 4).
        size: Height and width of the result.
    """
    return masks_in_rois(masks, matched, rois, size) >= 0.5


def masks_in_rois(masks: np.ndarray, matched: np.ndarray, rois: np.ndarray, size: int) -> np.ndarray:
    """Return the mean of its object's mask in each of size x size bins of each RoI, as RoIAlign computes it.

    The RoIs are cut at the border of the masks before. The arguments are those of `mask_targets`.
    """
    height, width = masks.shape[1:]
    limits = np.array([width, height, width, height], rois.dtype)
    x1, y1, x2, y2 = (np.clip(rois, 0, limits) - rois.dtype.type(0.5)).astype(np.float64).T
    means = np.empty((len(rois), size, size), rois.dtype)
    if not len(rois):
        return means
    top, bottom, down = axis_weights(y1, y2, np.full(len(rois), height), size, rois.dtype)
    left, right, across = axis_weights(x1, x2, np.full(len(rois), width), size, rois.dtype)
    for index, number in enumerate(matched):
        window = masks[number, top[index] : bottom[index], left[index] : right[index]].astype(rois.dtype)
        rows, columns = window.shape
        means[index] = down[index, :, :rows] @ window @ across[index, :, :columns].T
    return means
