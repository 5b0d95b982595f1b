"""Training losses of Mask R-CNN in PyTorch, the reference for `fcvit.tasks.detection.losses`.

It was written from the facts, not from it. The behavior is that of mmdetection 2.19.0, including the bits of the
overlaps, which decide ties between boxes.

Shapes: B images, N boxes or anchors, G objects, P positive samples. A box is x1, y1, x2, y2 in pixels of the network's
input. A `Choose` function draws the given number of entries from an array of positions.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fcvit.data.transforms.detection import DetectionTarget
from fcvit.frameworks import import_framework
from fcvit.reference.mask_rcnn import BOX_STDS, RPN_STDS, STRIDES, MaskRCNN, encode, grid_anchors, roi_align, to_rois

import_framework("torch")  # reports how to install it if it is missing

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

Choose = Callable[[np.ndarray, int], np.ndarray]


class Samples(NamedTuple):
    """Samples of an image: positions of the positive (P) and the negative ones, and the object of each positive (P)."""

    positive: Tensor
    negative: Tensor
    objects: Tensor


def training_losses(
    model: MaskRCNN,
    images: Tensor,
    targets: Sequence[DetectionTarget],
    draws: Sequence[Choose],
    anchor_count: int = 256,
    roi_count: int = 512,
    before_nms: int = 2000,
) -> dict[str, Tensor]:
    """Return the losses of a training step, under mmdetection's names.

    Args:
        model: The network in training mode.
        images: Padded images, (B, 3, H, W).
        targets: Objects of each image, at least one.
        draws: Function that draws the samples of each image: positive and negative anchors, then RoIs.
        anchor_count: Number of sampled anchors per image.
        roi_count: Number of sampled RoIs per image.
        before_nms: Largest number of proposals per level before NMS.
    """
    maps = model.neck(model.backbone(images))
    logits, deltas = model.rpn_head(maps)
    objects = [torch.as_tensor(target.boxes).to(images) for target in targets]

    sizes = [level.shape[-2:] for level in logits]
    anchors = torch.cat(
        [grid_anchors(s, size, model.options.anchor_scale, images) for s, size in zip(STRIDES, sizes, strict=True)]
    )
    samples = []
    for target, boxes, choose in zip(targets, objects, draws, strict=True):
        valid = valid_anchors(sizes, [math.ceil(side / 32) * 32 for side in target.size])
        assigned = torch.full((len(anchors),), -1)
        assigned[valid] = assign(boxes, anchors[valid], 0.7, 0.3, 0.3)
        samples.append(sample(assigned, anchor_count, 0.5, choose))
    wanted = [
        encode(anchors[one.positive], boxes[one.objects], RPN_STDS) for one, boxes in zip(samples, objects, strict=True)
    ]
    losses = rpn_losses(logits, deltas, samples, wanted)

    proposals = model.propose(logits, deltas, np.array([target.size for target in targets]), before=before_nms)
    rois, positive, labels, wanted, masks = [], [], [], [], []
    for proposed, target, boxes, choose in zip(proposals, targets, objects, draws, strict=True):
        everything, one = sample_rois(proposed[:, :4], boxes, roi_count, choose)
        classes = torch.as_tensor(target.labels)[one.objects]
        positive.append(everything[one.positive])
        rois.append(torch.cat([positive[-1], everything[one.negative]]))
        labels.append(F.pad(classes, (0, len(one.negative)), value=model.num_classes))
        wanted.append(encode(positive[-1], boxes[one.objects], BOX_STDS))
        if model.options.masks:
            masks.append(mask_targets(torch.as_tensor(target.masks), one.objects, positive[-1]))
    label = torch.cat(labels)
    head = model.roi_head
    scores, shifts = head.bbox_head(head.box_features(maps, to_rois(rois)))
    losses |= box_losses(scores, shifts, label, torch.cat(wanted))
    if model.options.masks:
        predicted = head.mask_head(head.mask_features(maps, to_rois(positive)))
        losses["loss_mask"] = mask_loss(predicted, label[label < model.num_classes], torch.cat(masks))
    return losses


def valid_anchors(sizes: Sequence[Sequence[int]], padded: Sequence[int]) -> Tensor:
    """Return which anchors (N) belong to a cell that begins inside the image with its own padding (height, width)."""
    flags = []
    for stride, (rows, columns) in zip(STRIDES, sizes, strict=True):
        height, width = (math.ceil(side / stride) for side in padded)
        inside = (torch.arange(rows) < height)[:, None] & (torch.arange(columns) < width)
        flags.append(inside.flatten().repeat_interleave(3))
    return torch.cat(flags)


def overlaps(objects: Tensor, boxes: Tensor) -> Tensor:
    """Return the IoU (G, N) of objects (G, 4) with boxes (N, 4)."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    rows = [boxes.new_zeros(0, len(boxes))]
    for one in objects:
        inner = (torch.minimum(one[2:], boxes[:, 2:]) - torch.maximum(one[:2], boxes[:, :2])).clamp(min=0)
        shared = inner[:, 0] * inner[:, 1]
        union = (one[2] - one[0]) * (one[3] - one[1]) + areas - shared
        rows.append((shared / union.clamp(min=1e-6))[None])
    return torch.cat(rows)


def assign(objects: Tensor, boxes: Tensor, positive: float, negative: float, lowest: float) -> Tensor:
    """Return the object of each box, counted from 1, or 0 for the background, or -1 for a box that is ignored, (N).

    Args:
        objects: Boxes of the objects, (G, 4).
        boxes: Anchors or proposals, (N, 4).
        positive: Smallest IoU of a box with its object.
        negative: IoU below which a box is background.
        lowest: Smallest IoU of an object's best boxes, which it gets in any case.
    """
    if not len(objects) or not len(boxes):
        return torch.zeros(len(boxes), dtype=torch.int64)
    iou = overlaps(objects, boxes)
    highest, nearest = iou.max(0)
    assigned = torch.where(highest < negative, 0, -1)
    assigned = torch.where(highest >= positive, nearest + 1, assigned)
    for number, row in enumerate(iou, 1):
        best = row.max()
        if best >= lowest:
            assigned[row == best] = number
    return assigned


def sample(assigned: Tensor, count: int, share: float, choose: Choose) -> Samples:
    """Draw positive samples, up to a share of the count, and fill the count with negative ones."""
    positive = draw((assigned > 0).nonzero()[:, 0], int(count * share), choose)
    negative = draw((assigned == 0).nonzero()[:, 0], count - len(positive), choose)
    return Samples(positive, negative, assigned[positive] - 1)


def draw(candidates: Tensor, count: int, choose: Choose) -> Tensor:
    """Return at most `count` of the candidates, sorted."""
    if len(candidates) <= count:
        return candidates
    return torch.as_tensor(choose(candidates.numpy(), count)).sort().values


def sample_rois(proposals: Tensor, objects: Tensor, count: int, choose: Choose) -> tuple[Tensor, Samples]:
    """Return the objects followed by the proposals, (G + N, 4), and the samples among them."""
    assigned = assign(objects, proposals, 0.5, 0.5, 0.5)
    assigned = torch.cat([torch.arange(len(objects)) + 1, assigned])
    return torch.cat([objects, proposals]), sample(assigned, count, 0.25, choose)


def mask_targets(masks: Tensor, objects: Tensor, rois: Tensor) -> Tensor:
    """Return the mask (P, 28, 28) of each positive RoI, from the bool masks (G, H, W) of the objects.

    It is computed in float64, because many cells of boxes at whole pixels are exactly half covered.
    """
    height, width = masks.shape[1:]
    rois = rois.double()
    clipped = torch.minimum(rois.clamp(min=0), rois.new_tensor([width, height, width, height]))
    regions = torch.cat([objects[:, None].to(rois), clipped], 1)
    return roi_align(masks[:, None].to(rois), regions, 28, 1.0)[:, 0] >= 0.5


def rpn_losses(
    logits: list[Tensor], deltas: list[Tensor], samples: Sequence[Samples], targets: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return the losses of the RPN: sums divided by the number of samples of all images.

    An image counts at least one positive and one negative sample.

    Args:
        logits: Logits of each level, (B, 3, H, W).
        deltas: Deltas of each level, (B, 12, H, W).
        samples: Sampled anchors of each image.
        targets: Deltas of the positive anchors of each image, (P, 4).
    """
    logit = torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in logits], 1)
    delta = torch.cat([level.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)) for level in deltas], 1)
    label, weight = torch.zeros_like(logit), torch.zeros_like(logit)
    total, moved = 0, delta.new_zeros(())
    for image, (one, wanted) in enumerate(zip(samples, targets, strict=True)):
        label[image, one.positive] = 1
        weight[image, one.positive] = weight[image, one.negative] = 1
        moved = moved + F.l1_loss(delta[image, one.positive], wanted, reduction="sum")
        total += max(len(one.positive), 1) + max(len(one.negative), 1)
    classified = F.binary_cross_entropy_with_logits(logit, label, weight, reduction="sum")
    return {"loss_rpn_cls": classified / total, "loss_rpn_bbox": moved / total}


def box_losses(logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the losses of the box head: sums divided by the number of all RoIs.

    Args:
        logits: Logits of the RoIs of all images, (N, classes + 1). The background is the last class.
        deltas: Deltas for each class, (N, 4 * classes).
        labels: Class of each RoI, (N).
        targets: Deltas of the positive RoIs, (P, 4), in the order of the RoIs.
    """
    positive = labels < logits.shape[1] - 1
    own = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
    return {
        "loss_cls": F.cross_entropy(logits, labels, reduction="sum") / len(labels),
        "loss_bbox": F.l1_loss(own, targets, reduction="sum") / len(labels),
    }


def mask_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Return the mean binary cross-entropy of mask logits (P, classes, 28, 28) in the mask of each RoI's class."""
    own = logits[torch.arange(len(labels)), labels]
    return F.binary_cross_entropy_with_logits(own, targets.to(own))
