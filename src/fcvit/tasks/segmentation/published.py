"""Compare a measured mIoU with the published figure."""

import dataclasses
import math
import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Literal

from fcvit.evaluation.protocols import AUTHORS, Protocol
from fcvit.models.variants import ADE20K_CLASSES, ADE20K_VALIDATION_IMAGES, Variant, published

ROUNDING = 0.05
"""Tolerance in percentage points for rounding: published figures have one decimal."""
DECODER_SLACK = 0.05
"""Tolerance in percentage points for differences between JPEG decoder versions. Chosen, not measured."""
Validation = Literal["all", "part", "other"]


@dataclasses.dataclass(frozen=True)
class PublishedComparison:
    """The comparison of a measured mIoU with the authors' figure for Semantic FPN on the same variant.

    Attributes:
        figure: Published mIoU in percent, on ADE20K's 2,000 validation images.
        verdict: "reproduced" or "differs" on all validation images. "consistent" or "inconsistent" on a part of them,
            by its confidence interval. "not comparable" on other images or classes.
        reason: A readable reason with the tolerance.
    """

    figure: float
    verdict: Literal["reproduced", "differs", "consistent", "inconsistent", "not comparable"]
    reason: str


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

    On all validation images, the tolerance does not include a sampling error. A part of the images, or all but the
    unreadable ones, is treated as a sample without replacement, so its confidence interval is narrowed by the finite
    population correction. With few images, rare classes are missing, which the interval only partly covers.

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
    figure = figures.ade20k_miou
    if classes != ADE20K_CLASSES:
        return PublishedComparison(figure, "not comparable", f"{classes} classes, not {ADE20K_CLASSES}")
    if validation == "other":
        reason = "the file names are not those of ADE20K's validation images"
        return PublishedComparison(figure, "not comparable", reason)
    if math.isnan(miou):
        return PublishedComparison(figure, "not comparable", "no labeled pixels")
    if images == ADE20K_VALIDATION_IMAGES:
        near = abs(miou - figure) <= ROUNDING + DECODER_SLACK + 1e-9
        reason = (
            f"{miou - figure:+.2f} points, with a tolerance of {ROUNDING} for rounding, {DECODER_SLACK} for decoders"
        )
        return PublishedComparison(figure, "reproduced" if near else "differs", reason)
    correction = math.sqrt((ADE20K_VALIDATION_IMAGES - images) / (ADE20K_VALIDATION_IMAGES - 1))
    low, high = (miou + correction * (bound - miou) for bound in interval)
    within = low - ROUNDING - DECODER_SLACK <= figure <= high + ROUNDING + DECODER_SLACK
    side = "within" if within else "outside"
    reason = f"{side} the 95% confidence interval {low:.2f} to {high:.2f} of {images:,} of the images"
    return PublishedComparison(figure, "consistent" if within else "inconsistent", reason)
