"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a batch, with label smoothing.

As timm's `FastCollateMixup` in its mode "batch", which the authors' recipe uses: on uint8, before normalizing; one
lambda and one rectangle for the whole batch; each image with the one at the same place in the reversed batch.
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
    """Mix a batch with itself reversed; in an odd batch the image in the middle stays as it is.

    Drawn, in this order: whether it is CutMix, if both are on; lambda; for CutMix the center, row before column.

    Args:
        pixels: uint8 (B, 3, H, W), B at least 1; left alone.
        labels: integers (B,), 0 to `num_classes` - 1.
        mixup, cutmix: alpha of lambda's distribution Beta(alpha, alpha) in each; 0: off.
        switch: probability of CutMix where both are on.
        smoothing: what label smoothing spreads evenly over all classes, 0 to below 1.

    Returns:
        uint8 of the shape of `pixels` (that array itself where both are off), and float32 targets
        (B, num_classes), each row of sum 1.

    Raises:
        UsageError: an argument of another form or out of its range.
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
    ratio = float(generator.beta(alpha, alpha))  # lambda: how much of each image stays its own
    if cut:
        height, width = pixels.shape[2:]
        top, bottom, left, right = draw_rectangle(height, width, ratio, generator)
        mixed = pixels.copy()
        mixed[:, :, top:bottom, left:right] = pixels[::-1, :, top:bottom, left:right]
        ratio = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        mixed = np.empty_like(pixels)
        for place, (one, other) in enumerate(zip(pixels, pixels[::-1], strict=True)):  # one by one: floats are large
            mixed[place] = np.rint(one.astype(np.float32) * ratio + other.astype(np.float32) * (1 - ratio))
    return mixed, targets * np.float32(ratio) + targets[::-1] * np.float32(1 - ratio)


def smoothed(labels: np.ndarray, num_classes: int, smoothing: float) -> np.ndarray:
    """Return targets for labels (B,): float32 (B, num_classes), smoothing / num_classes, and the rest at the label."""
    off = smoothing / num_classes
    targets = np.full((len(labels), num_classes), off, np.float32)
    targets[np.arange(len(labels)), labels] = 1 - smoothing + off
    return targets


def draw_rectangle(height: int, width: int, ratio: float, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw CutMix's rectangle: the image's form, sides sqrt(1 - ratio) of its own, cut off at the border.

    The center is uniform over all pixels, row drawn before column. Sides are even numbers, as in timm.

    Returns:
        (top, bottom, left, right), the ends excluded; possibly empty.
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
        raise UsageError(f"pixels {pixels.dtype} {pixels.shape}: expected uint8 of shape (B, 3, H, W), none of them 0")
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != pixels.shape[:1]:
        raise UsageError(f"labels {labels.dtype} {labels.shape}: expected integers of shape ({len(pixels)},)")
    if num_classes < 1 or labels.min() < 0 or labels.max() >= num_classes:
        raise UsageError(
            f"labels {labels.min()} to {labels.max()}, num_classes {num_classes}: expected labels from 0 to "
            "num_classes - 1"
        )
