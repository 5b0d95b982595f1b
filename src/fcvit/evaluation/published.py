"""Compare a measured figure with the published figure, for any task."""

import dataclasses
import math
from typing import Literal

from fcvit.errors import counted

ROUNDING = 0.05
"""Tolerance in percentage points for rounding: published figures have one decimal."""
DECODER_SLACK = 0.05
"""Tolerance in percentage points for differences between JPEG decoder versions. Chosen, not measured."""
_BOUND = ROUNDING + DECODER_SLACK

Validation = Literal["all", "part", "other"]
"""All or part of the images for which a figure was published, or other images."""


@dataclasses.dataclass(frozen=True)
class PublishedComparison:
    """The comparison of a measured figure with the figure published for the same protocol.

    Attributes:
        whose: Who published the figure: "the authors" or "the earlier port".
        figure: Published figure in percent, on all validation images.
        verdict: "reproduced" or "differs" on all validation images. "consistent" or "inconsistent" on a part of them,
            by its confidence interval. "not comparable" on other images or classes.
        reason: A readable reason with the tolerance.
    """

    whose: str
    figure: float
    verdict: Literal["reproduced", "differs", "consistent", "inconsistent", "not comparable"]
    reason: str

    @property
    def text(self) -> str:
        """Return the figure, the verdict and the reason as a line."""
        return f"{self.figure:.1f}%, {self.verdict}: {self.reason}"


def compare_all(
    whose: str, figure: float, measured: float, images: int = 1, unreadable: int = 0
) -> PublishedComparison:
    """Compare a figure measured on all validation images. The tolerance does not include a sampling error.

    Args:
        whose, figure: Who published the figure, and the figure in percent.
        measured: Measured figure in percent.
        images, unreadable: Number of validation images, and how many of them are unreadable. The tolerance is increased
            by the largest change that they could cause in a mean over images.
    """
    missing = 100 * unreadable / images
    near = abs(measured - figure) <= _BOUND + missing + 1e-9
    reason = (
        f"{measured - figure:+.2f} points, with a tolerance of {ROUNDING} for rounding, {DECODER_SLACK} for decoders"
    )
    if unreadable:
        reason += f", {missing:.3f} for {counted(unreadable, 'unreadable image')}"
    return PublishedComparison(whose, figure, "reproduced" if near else "differs", reason)


def compare_part(
    whose: str, figure: float, measured: float, interval: tuple[float, float], images: int, population: int
) -> PublishedComparison:
    """Compare a figure measured on a part of the validation images by its confidence interval.

    The part is a sample without replacement, so the interval is narrowed by the finite population correction.

    Args:
        whose, figure: Who published the figure, and the figure in percent.
        measured, interval: Measured figure and its 95% confidence interval, in percent.
        images, population: Number of evaluated images, and of all validation images.
    """
    correction = math.sqrt((population - images) / (population - 1))
    low, high = (measured + correction * (bound - measured) for bound in interval)
    within = low - _BOUND <= figure <= high + _BOUND
    side = "within" if within else "outside"
    reason = f"{side} the 95% confidence interval {low:.2f} to {high:.2f} of {images:,} of the {population:,} images"
    return PublishedComparison(whose, figure, "consistent" if within else "inconsistent", reason)
