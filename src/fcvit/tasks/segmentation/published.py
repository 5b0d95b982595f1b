"""Compare a measured mIoU with the published figure."""

import math
import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from fcvit.evaluation.protocols import AUTHORS, Protocol
from fcvit.evaluation.published import PublishedComparison, Validation, compare_all, compare_part
from fcvit.models.variants import ADE20K_CLASSES, ADE20K_VALIDATION_IMAGES, Variant, published


def validation_of(names: Iterable[str]) -> Validation:
    """Return "all" or "part" if these are ADE20K's validation images, judged by their file names, or else "other"."""
    found = [re.fullmatch(r"ADE_val_0000(\d{4})", PurePosixPath(name).stem) for name in names]
    numbers = {int(match[1]) for match in found if match}
    if len(numbers) < len(found) or not numbers or not numbers <= set(range(1, ADE20K_VALIDATION_IMAGES + 1)):
        return "other"
    return "all" if len(numbers) == ADE20K_VALIDATION_IMAGES else "part"


def compare_with_published(
    variant: Variant,
    classes: int,
    protocol: Protocol,
    validation: Validation,
    miou: float,
    interval: tuple[float, float],
    images: int,
) -> PublishedComparison | None:
    """Compare an mIoU with the published figure. Return None if no figure was published for this network and protocol.

    If images are unreadable, the others are treated as a part of the validation images. With few images, rare classes
    are missing, which the interval only partly covers.

    Args:
        variant: Variant of the backbone.
        classes: Number of classes of the network.
        protocol: Protocol of the measurement.
        validation: Kind of the images of the data set (see `validation_of`).
        miou, interval: Measured mIoU and its 95% confidence interval, in percent.
        images: Number of evaluated images, without the unreadable ones.
    """
    figures = published(variant)
    if figures is None or figures.ade20k_miou is None or protocol.name != AUTHORS:
        return None
    named = ("the authors", figures.ade20k_miou)
    if classes != ADE20K_CLASSES:
        return PublishedComparison(*named, "not comparable", f"{classes} classes, not {ADE20K_CLASSES}")
    if validation == "other":
        reason = "the file names are not those of ADE20K's validation images"
        return PublishedComparison(*named, "not comparable", reason)
    if math.isnan(miou):
        return PublishedComparison(*named, "not comparable", "no labeled pixels")
    if images == ADE20K_VALIDATION_IMAGES:
        return compare_all(*named, miou)
    return compare_part(*named, miou, interval, images, ADE20K_VALIDATION_IMAGES)
