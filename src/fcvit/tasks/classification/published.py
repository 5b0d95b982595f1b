"""The comparison of an accuracy with the published figure."""

import dataclasses
import math
from typing import Literal

from fcvit.errors import counted
from fcvit.evaluation.protocols import CUSTOM, RESIZE256, Protocol
from fcvit.models.variants import IMAGENET_CLASSES, VALIDATION_IMAGES, Variant, published

ROUNDING = 0.05
"""Points: published figures have one decimal."""
DECODER_SLACK = 0.05
"""Points allowed for another release of the JPEG decoder than the authors'; chosen, not measured."""


@dataclasses.dataclass(frozen=True)
class PublishedComparison:
    """The comparison of a measured top-1 accuracy with the published one of the same protocol.

    Attributes:
        whose: "the authors" or "the earlier port".
        figure: per cent, over the 50,000 validation images.
        verdict: "reproduced" or "differs" on all the images; "consistent" or "inconsistent" on a part,
            by the confidence interval; "not comparable" on other images or classes.
        reason: in words, with the bound.
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
    """Compare a figure with the published one; None: nothing was published under this protocol.

    On all images a difference is never put down to sampling: there is none. Images that were left out
    could at most have been all right or all wrong, and widen the bound by that. A part is a sample without
    replacement: the larger it is, the narrower its interval.

    Args:
        num_classes: that were told apart.
        validation: whether the images are all of ImageNet-1K's validation set, a part, or others.
        top1, interval: per cent.
        images, unreadable: that were evaluated, and left out.
    """
    figures = published(variant)
    if figures is None or protocol.name == CUSTOM or protocol.preprocessing.mean != variant.preprocessing.mean:
        return None
    whose, figure = ("the authors", figures.top1)
    if protocol.name == RESIZE256:
        whose, figure = ("the earlier port", figures.earlier_port_top1)
    if num_classes != IMAGENET_CLASSES:
        return PublishedComparison(whose, figure, "not comparable", f"{num_classes} classes were told apart, not 1,000")
    if validation == "other":
        return PublishedComparison(
            whose, figure, "not comparable", "by their names these are not ImageNet's validation images"
        )
    if validation == "part":
        narrower = math.sqrt((VALIDATION_IMAGES - images) / (VALIDATION_IMAGES - 1))
        low, high = (top1 + narrower * (bound - top1) for bound in interval)
        within = low - ROUNDING - DECODER_SLACK <= figure <= high + ROUNDING + DECODER_SLACK
        words = "within" if within else "outside"
        reason = f"{words} the 95 % interval {low:.2f} to {high:.2f} of a part of the images"
        return PublishedComparison(whose, figure, "consistent" if within else "inconsistent", reason)
    bound = ROUNDING + DECODER_SLACK + 100 * unreadable / VALIDATION_IMAGES
    near = abs(top1 - figure) <= bound + 1e-9
    reason = f"{top1 - figure:+.2f} points; {ROUNDING} for rounding and {DECODER_SLACK} for decoders are allowed"
    if unreadable:
        reason += f", {100 * unreadable / VALIDATION_IMAGES:.3f} for {counted(unreadable, 'image')} left out"
    return PublishedComparison(whose, figure, "reproduced" if near else "differs", reason)
