"""Losses of Mask R-CNN with the divisors of mmdetection 2.19.0. All are float32 or float64 scalars."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fcvit.frameworks import import_framework
from fcvit.tasks.detection.targets import Samples

if TYPE_CHECKING:
    from paddle import Tensor


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
