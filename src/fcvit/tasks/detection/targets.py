"""Training targets of Mask R-CNN in NumPy: assignment, sampling, box deltas and mask targets.

Ported from the behavior of mmdetection 2.19.0 (`MaxIoUAssigner`, `RandomSampler`, `DeltaXYWHBBoxCoder`, `mask_target`)
and mmcv 1.4.0 (`RoIAlign`). The order of all operations is theirs, because rounding decides ties between anchors.
Boxes are x1, y1, x2, y2 in pixels of the network's input, (N, 4). Results have the type of the boxes.

A `Choose` function draws the given number of positions from an array without replacement. `drawn_from` gives one for a
generator.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

Choose = Callable[[np.ndarray, int], np.ndarray]

RPN_SAMPLES, ROI_SAMPLES = 256, 512  # samples of an image in the authors' configuration
RPN_POSITIVES, ROI_POSITIVES = 0.5, 0.25  # largest share of positive samples


@dataclasses.dataclass(frozen=True)
class Objects:
    """The objects of an image.

    Attributes:
        boxes: Boxes, (N, 4).
        labels: Class of each object from 0, int64 (N,).
        masks: Masks at the size of the image with its own padding, bool or uint8 (N, H, W), or None without masks.
    """

    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None


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


def encode(boxes: np.ndarray, objects: np.ndarray, stds: Sequence[float] = (1, 1, 1, 1)) -> np.ndarray:
    """Return the deltas (N, 4) from boxes (N, 4) to objects (N, 4), divided by `stds`.

    They are the shifts of the center in units of the box's size, and the logarithms of the ratios of the sizes.
    """
    (center, size), (target_center, target_size) = _center_and_size(boxes), _center_and_size(objects)
    deltas = np.concatenate([(target_center - center) / size, np.log(target_size / size)], axis=1)
    return deltas / np.array(stds, boxes.dtype)


def _center_and_size(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (boxes[:, :2] + boxes[:, 2:]) * boxes.dtype.type(0.5), boxes[:, 2:] - boxes[:, :2]


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
    deltas = encode(anchors[inside[positive]], objects[matched])
    return Samples(inside[positive], inside[negative], matched, deltas)


def roi_samples(
    proposals: np.ndarray, objects: Objects, classes: int, stds: Sequence[float], choose: Choose,
    count: int = ROI_SAMPLES, mask_size: int = 28,
) -> RoISamples:  # fmt: skip
    """Assign and sample the proposals of an image. The objects themselves are prepended to the proposals.

    Args:
        proposals: Proposals, (N, 4).
        objects: Objects of the image.
        classes: Number of classes, which is the label of the background.
        stds: Divisors of the deltas.
        choose: Draws the samples.
        count: Number of samples.
        mask_size: Height and width of the mask targets.
    """
    assigned, _ = assign(objects.boxes, proposals, 0.5, 0.5, 0.5)
    assigned = np.concatenate([np.arange(len(objects.boxes)) + 1, assigned])
    boxes = np.concatenate([objects.boxes, proposals])
    positive, negative = sample(assigned, count, ROI_POSITIVES, choose)
    matched = assigned[positive] - 1
    labels = np.concatenate([objects.labels[matched], np.full(len(negative), classes)])
    masks = None
    if objects.masks is not None:
        masks = mask_targets(objects.masks, matched, boxes[positive], mask_size)
    deltas = encode(boxes[positive], objects.boxes[matched], stds)
    return RoISamples(boxes[np.concatenate([positive, negative])], labels, deltas, masks)


def mask_targets(masks: np.ndarray, matched: np.ndarray, rois: np.ndarray, size: int = 28) -> np.ndarray:
    """Return the part of its object's mask in each RoI as bool (P, size, size).

    Args:
        masks: Masks of the objects, bool or uint8 (G, H, W).
        matched: Object of each RoI, (P,).
        rois: RoIs, (P, 4).
        size: Height and width of the result.
    """
    return np.array([mask_in_roi(masks[m], roi, size) >= 0.5 for m, roi in zip(matched, rois, strict=True)], bool)


def mask_in_roi(mask: np.ndarray, roi: np.ndarray, size: int) -> np.ndarray:
    """Return the mean of a mask (H, W) in each of size x size cells of a RoI, as mmcv's RoIAlign computes it.

    The mean of bilinear samples on a grid is the product of two matrices with the mask.
    """
    height, width = mask.shape
    x1, y1, x2, y2 = np.clip(roi, 0, np.array([width, height, width, height], roi.dtype))
    rows, row_weights = _sample_weights(y1, y2, height, size)
    columns, column_weights = _sample_weights(x1, x2, width, size)
    return row_weights @ mask[rows, columns].astype(roi.dtype) @ column_weights.T


def _sample_weights(start: np.floating, end: np.floating, length: int, size: int) -> tuple[slice, np.ndarray]:
    """Return the pixels that one axis of a RoI touches, and their weights in each cell, (size, pixels)."""
    half = start.dtype.type(0.5)
    start, end = start - half, end - half
    count = max(int(np.ceil(np.float32((end - start) / size))), 1)  # mmcv rounds the quotient to float32
    cell = (end - start) / size
    cells, samples = np.arange(size, dtype=start.dtype)[:, None], np.arange(count, dtype=start.dtype)
    # The RoI is inside the image, so no sample is more than half a pixel outside.
    positions = np.clip(start + cells * cell + (samples + half) * cell / count, 0, length - 1)
    first, last = int(positions.min()), min(int(positions.max()) + 1, length - 1)
    pixels = np.arange(first, last + 1, dtype=start.dtype)
    weights = np.maximum(1 - np.abs(positions[:, :, None] - pixels), 0)
    return slice(first, last + 1), weights.mean(axis=1)
