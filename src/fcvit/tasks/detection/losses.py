"""Losses of Mask R-CNN with the divisors of mmdetection 2.19.0. All are float32 or float64 scalars."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fcvit.data.transforms.detection import DetectionTarget
from fcvit.data.transforms.segmentation import aligned_size
from fcvit.frameworks import import_framework
from fcvit.models.mask_rcnn.anchors import grid_anchors
from fcvit.models.mask_rcnn.boxes import to_rois
from fcvit.models.mask_rcnn.detections import propose
from fcvit.tasks.detection.targets import (
    ROI_SAMPLES,
    RPN_SAMPLES,
    Choose,
    Samples,
    anchor_samples,
    roi_samples,
    valid_anchors,
)

if TYPE_CHECKING:
    from paddle import Tensor

    from fcvit.models.mask_rcnn.network import MaskRCNN


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Numbers of samples per image. The defaults are the authors'.

    Attributes:
        anchors: Anchors in the losses of the RPN.
        rois: RoIs in the losses of the heads.
        proposals_before_nms: Largest number of boxes per feature map before NMS.
    """

    anchors: int = RPN_SAMPLES
    rois: int = ROI_SAMPLES
    proposals_before_nms: int = 2000


def detection_losses(
    model: "MaskRCNN",
    outputs: Any,
    targets: Sequence[DetectionTarget],
    draws: Sequence[Choose],
    sampling: Sampling,
    precision: Callable[[], Any] = contextlib.nullcontext,
) -> "dict[str, Tensor]":
    """Return the losses of the RPN and the heads, under mmdetection's names.

    Args:
        model: The network.
        outputs: Its feature maps, RPN logits and RPN deltas for a batch of images.
        targets: Objects of each image, at least one.
        draws: For each image, the function that draws its samples: anchors first, then RoIs.
        sampling: Numbers of samples.
        precision: Function that returns the context in which the heads are computed.
    """
    paddle = import_framework("paddle")
    maps, logits, deltas = outputs[0], *([_full_precision(x) for x in levels] for levels in outputs[1:])
    sizes = [(x.shape[2], x.shape[3]) for x in logits]
    arrays = [[x.numpy() for x in levels] for levels in (logits, deltas)]
    targets = [target._replace(boxes=target.boxes.astype(arrays[0][0].dtype)) for target in targets]

    anchors = np.concatenate(grid_anchors(sizes, model.options.anchor_scale, arrays[0][0].dtype))
    samples = [
        anchor_samples(anchors, valid_anchors(sizes, aligned_size(target.size)), target.boxes, choose, sampling.anchors)
        for target, choose in zip(targets, draws, strict=True)
    ]
    flat = [
        paddle.concat([x.transpose([0, 2, 3, 1]).reshape([len(targets), -1, *shape]) for x in levels], 1)
        for levels, shape in ((logits, []), (deltas, [4]))
    ]
    losses: dict[str, Tensor] = {}
    losses["loss_rpn_cls"], losses["loss_rpn_bbox"] = anchor_losses(flat[0], flat[1], samples)

    options = dataclasses.replace(model.options, proposals_before_nms=sampling.proposals_before_nms)
    proposals = propose(options, arrays[0], arrays[1], np.array([target.size for target in targets]))
    regions = [
        roi_samples(proposed[:, :4], target, model.num_classes, choose, sampling.rois)
        for proposed, target, choose in zip(proposals, targets, draws, strict=True)
    ]
    with precision():
        features = model.roi_head.box_features(maps, to_rois([r.rois for r in regions]))
        scores, shifts = (_full_precision(x) for x in model.roi_head.bbox_head(features))
    labels = np.concatenate([r.labels for r in regions])
    wanted = np.concatenate([r.deltas for r in regions])
    losses["loss_cls"], losses["loss_bbox"] = box_losses(scores, shifts, labels, wanted)

    if model.options.masks:
        with precision():
            positive = to_rois([r.rois[: len(r.deltas)] for r in regions])
            masks = model.roi_head.mask_head(model.roi_head.mask_features(maps, positive))
        wanted = np.concatenate([r.masks for r in regions if r.masks is not None])
        losses["loss_mask"] = mask_loss(_full_precision(masks), labels[labels < model.num_classes], wanted)
    return losses


def _full_precision(x: "Tensor") -> "Tensor":
    """Convert the outputs of mixed precision to float32."""
    return x if "64" in str(x.dtype) else x.astype("float32")


def anchor_losses(logits: "Tensor", deltas: "Tensor", samples: Sequence[Samples]) -> tuple["Tensor", "Tensor"]:
    """Return the classification and the box loss of the RPN.

    Both are sums over the sampled anchors of all images, divided by the number of samples of all images, where an image
    counts at least one positive and one negative sample.

    Args:
        logits: Logit of each anchor, (B, N).
        deltas: Predicted deltas of each anchor, (B, N, 4).
        samples: Sampled anchors of each image.
    """
    paddle = import_framework("paddle")
    count = sum(max(len(s.positive), 1) + max(len(s.negative), 1) for s in samples)
    offsets = np.arange(len(samples)) * logits.shape[1]
    positive = np.concatenate([s.positive + offset for s, offset in zip(samples, offsets, strict=True)])
    negative = np.concatenate([s.negative + offset for s, offset in zip(samples, offsets, strict=True)])
    chosen = _rows(logits.reshape([-1]), np.concatenate([positive, negative]))
    targets = (np.arange(len(positive) + len(negative)) < len(positive)).astype(np.float32)
    functional = paddle.nn.functional
    labels = paddle.to_tensor(targets).astype(logits.dtype)
    classification = functional.binary_cross_entropy_with_logits(chosen, labels, reduction="sum")
    wanted = np.concatenate([s.deltas for s in samples])
    return classification / count, _absolute_difference(deltas.reshape([-1, 4]), positive, wanted) / count


def box_losses(
    logits: "Tensor", deltas: "Tensor", labels: np.ndarray, targets: np.ndarray
) -> tuple["Tensor", "Tensor"]:
    """Return the classification and the box loss of the box head, sums that are divided by the number of all RoIs.

    Args:
        logits: Logits of the RoIs of all images, (R, classes + 1). The background is the last class.
        deltas: Predicted deltas for each class, (R, classes * 4).
        labels: Class of each RoI, (R,).
        targets: Deltas of the positive RoIs, (P, 4), in the order of the RoIs.
    """
    paddle = import_framework("paddle")
    rois, classes = len(labels), logits.shape[1] - 1
    wanted = paddle.to_tensor(labels.astype(np.int64))
    classification = paddle.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    positive = np.flatnonzero(labels < classes)
    own = positive * classes + labels[positive]
    return classification / rois, _absolute_difference(deltas.reshape([-1, 4]), own, targets) / rois


def mask_loss(logits: "Tensor", labels: np.ndarray, targets: np.ndarray) -> "Tensor":
    """Return the mean binary cross-entropy of the pixels of each positive RoI, in the mask of its own class.

    Args:
        logits: Mask logits of the positive RoIs, (P, classes, M, M).
        labels: Class of each positive RoI, (P,).
        targets: Masks, bool (P, M, M).
    """
    paddle = import_framework("paddle")
    count, classes, *size = logits.shape
    own = _rows(logits.reshape([count * classes, *size]), np.arange(count) * classes + labels)
    wanted = paddle.to_tensor(targets).astype(logits.dtype)
    return paddle.nn.functional.binary_cross_entropy_with_logits(own, wanted, reduction="mean")


def _absolute_difference(predicted: "Tensor", rows: np.ndarray, targets: np.ndarray) -> "Tensor":
    """Return the sum of the absolute differences between some rows and their targets."""
    paddle = import_framework("paddle")
    if not len(rows):
        return predicted.sum() * 0
    return (_rows(predicted, rows) - paddle.to_tensor(targets).astype(predicted.dtype)).abs().sum()


def _rows(tensor: "Tensor", rows: np.ndarray) -> "Tensor":
    return tensor.gather(import_framework("paddle").to_tensor(rows.astype(np.int64)))
