"""Apply mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) and label smoothing to a batch.

This is timm's `FastCollateMixup` in mode "batch", which the authors' recipe uses. It works on uint8 images before
normalization. All images of the batch share one lambda and one rectangle. Each image is mixed with the image at the
same position in the reversed batch.
"""

import math

import numpy as np

from fcvit.errors import UsageError


def mix(
    pixels: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    generator: np.random.Generator,
    *,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    switch: float = 0.5,
    smoothing: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """Mix a batch with the reversed batch. In a batch of odd size, the middle image does not change.

    The random numbers are drawn in this order: the choice of mixup or CutMix if both are on, lambda, and for CutMix the
    row and the column of the center.

    Args:
        pixels: Images, uint8 (B, 3, H, W) with B at least 1. The array is not modified.
        labels: Class indices, integers (B,) from 0 to `num_classes` - 1.
        num_classes: Number of classes.
        generator: Random number generator.
        mixup: Parameter alpha of mixup's distribution of lambda, Beta(alpha, alpha). 0 turns mixup off.
        cutmix: Parameter alpha of CutMix's distribution of lambda, Beta(alpha, alpha). 0 turns CutMix off.
        switch: Probability of CutMix if both are on.
        smoothing: Probability that label smoothing distributes over all classes, at least 0 and less than 1.

    Returns:
        The mixed images, uint8 of the same shape (the array `pixels` if both are off), and the targets, float32
        (B, num_classes), whose rows have the sum 1.

    Raises:
        UsageError: An argument has the wrong type or shape or is out of range.
    """
    _check_batch(pixels, labels, num_classes)
    for name, value, valid, expected in (
        ("mixup", mixup, 0 <= mixup <= 1000, "0 (off) to 1000"),
        ("cutmix", cutmix, 0 <= cutmix <= 1000, "0 (off) to 1000"),
        ("switch", switch, 0 <= switch <= 1, "0 to 1"),
        ("smoothing", smoothing, 0 <= smoothing < 1, "0 to below 1"),
    ):
        if not valid:
            raise UsageError(f"{name} {value!r}: expected a number from {expected}")
    targets = smoothed(labels, num_classes, smoothing)
    if not mixup and not cutmix:
        return pixels, targets
    cut = generator.random() < switch if mixup and cutmix else bool(cutmix)
    alpha = cutmix if cut else mixup
    ratio = float(generator.beta(alpha, alpha))  # lambda: the weight of the original image
    if cut:
        height, width = pixels.shape[2:]
        top, bottom, left, right = draw_rectangle(height, width, ratio, generator)
        mixed = pixels.copy()
        mixed[:, :, top:bottom, left:right] = pixels[::-1, :, top:bottom, left:right]
        ratio = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        mixed = np.empty_like(pixels)
        # One image at a time, because the batch as float32 needs four times the memory.
        for index, (image, other) in enumerate(zip(pixels, pixels[::-1], strict=True)):
            mixed[index] = np.rint(image.astype(np.float32) * ratio + other.astype(np.float32) * (1 - ratio))
    return mixed, targets * np.float32(ratio) + targets[::-1] * np.float32(1 - ratio)


def smoothed(labels: np.ndarray, num_classes: int, smoothing: float) -> np.ndarray:
    """Return the smoothed targets, float32 (B, num_classes), for the class indices `labels` (B,).

    Each class has the target smoothing / num_classes. The class of the label has 1 - smoothing in addition.
    """
    off = smoothing / num_classes
    targets = np.full((len(labels), num_classes), off, np.float32)
    targets[np.arange(len(labels)), labels] = 1 - smoothing + off
    return targets


def draw_rectangle(height: int, width: int, ratio: float, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw the rectangle of CutMix, with the aspect ratio of the image.

    The sides are sqrt(1 - ratio) times those of the image, rounded down to even numbers as in timm. The center is
    uniform over all pixels, and its row is drawn before its column. The rectangle is clipped at the border.

    Returns:
        (top, bottom, left, right), where bottom and right are exclusive. The rectangle can be empty.
    """
    share = math.sqrt(1 - ratio)
    ends = []
    for length in (height, width):
        half = int(length * share) // 2
        center = int(generator.integers(length))
        ends += [max(center - half, 0), min(center + half, length)]
    top, bottom, left, right = ends
    return top, bottom, left, right


def _check_batch(pixels: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.size:
        raise UsageError(f"pixels {pixels.dtype} {pixels.shape}: expected uint8 of nonzero shape (B, 3, H, W)")
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != pixels.shape[:1]:
        raise UsageError(f"labels {labels.dtype} {labels.shape}: expected integers of shape ({len(pixels)},)")
    if num_classes < 1 or labels.min() < 0 or labels.max() >= num_classes:
        raise UsageError(
            f"labels {labels.min()} to {labels.max()}, num_classes {num_classes}: expected labels from 0 to "
            "num_classes - 1"
        )
