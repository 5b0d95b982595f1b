"""Compare a measured accuracy with the published figure."""

import dataclasses
import math
from typing import Literal

from fcvit.errors import counted
from fcvit.evaluation.protocols import CUSTOM, RESIZE256, Protocol
from fcvit.models.variants import IMAGENET_CLASSES, VALIDATION_IMAGES, Variant, published

ROUNDING = 0.05
"""Tolerance in percentage points for rounding: published figures have one decimal."""
DECODER_SLACK = 0.05
"""Tolerance in percentage points for differences between JPEG decoder versions. Chosen, not measured."""


@dataclasses.dataclass(frozen=True)
class PublishedComparison:
    """The comparison of a measured top-1 accuracy with the figure published for the same protocol.

    Attributes:
        whose: Who published the figure: "the authors" or "the earlier port".
        figure: Published top-1 accuracy in percent, on the 50,000 validation images.
        verdict: "reproduced" or "differs" on all validation images. "consistent" or "inconsistent" on a subset, by its
            confidence interval. "not comparable" on other images or classes.
        reason: A readable reason with the tolerance.
    """

    whose: str
    figure: float
    verdict: Literal["reproduced", "differs", "consistent", "inconsistent", "not comparable"]
    reason: str


def compare_with_published(
    variant: Variant,
    num_classes: int,
    protocol: Protocol,
    validation: Literal["all", "part", "other"],
    top1: float,
    interval: tuple[float, float],
    images: int,
    unreadable: int = 0,
) -> PublishedComparison | None:
    """Compare an accuracy with the published figure. Return None if no figure was published for this protocol.

    On all validation images, the tolerance does not include a sampling error. It is increased by the largest change
    that unreadable images could cause. A subset is a sample without replacement, so its confidence interval is narrowed
    by the finite population correction.

    Args:
        variant: Variant of the network.
        num_classes: Number of candidate classes.
        protocol: Protocol of the measurement.
        validation: "all" or "part" of ImageNet-1K's validation images, or "other" images.
        top1, interval: Measured top-1 accuracy and its 95% confidence interval, in percent.
        images, unreadable: Number of evaluated and of unreadable images.
    """
    figures = published(variant)
    if figures is None or protocol.name == CUSTOM or protocol.preprocessing.mean != variant.preprocessing.mean:
        return None
    whose, figure = ("the authors", figures.top1)
    if protocol.name == RESIZE256:
        whose, figure = ("the earlier port", figures.earlier_port_top1)
    if num_classes != IMAGENET_CLASSES:
        return PublishedComparison(whose, figure, "not comparable", f"{num_classes} candidate classes, not 1,000")
    if validation == "other":
        return PublishedComparison(
            whose, figure, "not comparable", "the file names are not those of ImageNet's validation images"
        )
    if validation == "part":
        correction = math.sqrt((VALIDATION_IMAGES - images) / (VALIDATION_IMAGES - 1))
        low, high = (top1 + correction * (bound - top1) for bound in interval)
        within = low - ROUNDING - DECODER_SLACK <= figure <= high + ROUNDING + DECODER_SLACK
        side = "within" if within else "outside"
        reason = f"{side} the 95% confidence interval {low:.2f} to {high:.2f} of a subset of the images"
        return PublishedComparison(whose, figure, "consistent" if within else "inconsistent", reason)
    bound = ROUNDING + DECODER_SLACK + 100 * unreadable / VALIDATION_IMAGES
    near = abs(top1 - figure) <= bound + 1e-9
    reason = f"{top1 - figure:+.2f} points, with a tolerance of {ROUNDING} for rounding, {DECODER_SLACK} for decoders"
    if unreadable:
        reason += f", {100 * unreadable / VALIDATION_IMAGES:.3f} for {counted(unreadable, 'unreadable image')}"
    return PublishedComparison(whose, figure, "reproduced" if near else "differs", reason)
