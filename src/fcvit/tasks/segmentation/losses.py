"""Losses of semantic segmentation: cross-entropy of pixels as in mmsegmentation 0.19, and a Dice loss."""

from typing import TYPE_CHECKING, Literal

from fcvit.data.class_colors import IGNORED
from fcvit.frameworks import import_framework

if TYPE_CHECKING:
    from paddle import Tensor

LossMean = Literal["all", "valid"]


def pixel_cross_entropy(
    logits: "Tensor", labels: "Tensor", mean: LossMean = "all", class_weights: "Tensor | None" = None
) -> "Tensor":
    """Return the cross-entropy of the labeled pixels, averaged over pixels.

    Args:
        logits: Logits (B, C, H, W).
        labels: Class of each pixel, int64 (B, H, W). 255 marks ignored pixels.
        mean: "all" divides the sum by the number of all pixels, as mmsegmentation 0.19 does: an image with many ignored
            pixels counts less. "valid" divides by the number of labeled pixels. Without labeled pixels, both give 0.
        class_weights: Weight of each class (C,), a factor for the losses of its pixels. The divisor does not change.
    """
    functional = import_framework("paddle").nn.functional
    pixels = logits.transpose([0, 2, 3, 1])  # Paddle's kernel is several times as fast along the last axis
    losses = functional.cross_entropy(pixels, labels, ignore_index=IGNORED, reduction="none").reshape([-1])
    if class_weights is not None:
        known = labels.clip(max=len(class_weights) - 1).reshape([-1])  # the loss of ignored pixels is 0
        losses = losses * class_weights.astype(losses.dtype).gather(known)
    if mean == "all":
        return losses.mean()
    return losses.sum() / (labels != IGNORED).sum().clip(min=1).astype(losses.dtype)


def dice_loss(logits: "Tensor", labels: "Tensor") -> "Tensor":
    """Return 1 - Dice, averaged over the classes that occur in the labels, or 0 if no pixel is labeled.

    The Dice coefficient of a class is 2 sum(p t) / (sum(p^2) + sum(t^2)) over the labeled pixels of all images, with
    the softmax probability p and the target t, 0 or 1. All classes count equally, however few pixels they have.

    Args:
        logits: Logits (B, C, H, W).
        labels: Class of each pixel, int64 (B, H, W). 255 marks ignored pixels.
    """
    functional = import_framework("paddle").nn.functional
    classes = logits.shape[1]
    valid = (labels != IGNORED).astype(logits.dtype).unsqueeze(1)
    targets = functional.one_hot(labels.clip(max=classes - 1), classes).astype(logits.dtype).transpose([0, 3, 1, 2])
    targets, probabilities = targets * valid, functional.softmax(logits, axis=1) * valid
    pixels = targets.sum(axis=[0, 2, 3])
    overlap = (probabilities * targets).sum(axis=[0, 2, 3])
    dice = 2 * overlap / ((probabilities**2).sum(axis=[0, 2, 3]) + pixels).clip(min=1e-12)
    present = (pixels > 0).astype(logits.dtype)
    return ((1 - dice) * present).sum() / present.sum().clip(min=1)
