"""Compare the proposals and detections of two detectors as sets.

A detector decides: which boxes are the best, which overlap too much, which score is high enough. If a decision is
nearly a tie, rounding may flip it, and the sets differ without a mistake. The margin of a decision is its distance
from the flip: the gap between two scores, or between an IoU and the threshold. Therefore objects without a counterpart
are accepted only if the smallest margin in the reference is within the rounding, and only a few of them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

MAX_FLIPPED = 0.05  # largest accepted share of objects without a counterpart, if there is a tie


class Objects(NamedTuple):
    """Objects of an image: boxes (N, 4) in pixels, scores (N), labels (N) and mask logits (N, 28, 28)."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray | None = None
    mask_logits: np.ndarray | None = None

    @classmethod
    def of(cls, detections: Any) -> "Objects":
        """Convert the detections of either network."""
        boxes, scores, labels = map(np.asarray, (detections.boxes, detections.scores, detections.labels))
        logits = detections.mask_logits
        return cls(boxes, scores, labels, None if logits is None else np.asarray(logits))


class Limits(NamedTuple):
    """Largest accepted differences of equal objects, and the largest margin of a decision that rounding may flip.

    Attributes:
        score: Difference of two scores.
        pixels: Difference of two coordinates of a box.
        probability: Difference of two probabilities in a mask.
        margin: Margin of a decision.
    """

    score: float
    pixels: float
    probability: float
    margin: float


LIMITS = {"float64": Limits(1e-10, 1e-8, 1e-9, 1e-10), "float32": Limits(1e-4, 1e-2, 1e-3, 1e-4)}


@dataclasses.dataclass(frozen=True)
class ObjectComparison:
    """The differences of two lists of objects.

    Attributes:
        name: Name of the objects: "proposals" or "detections".
        dtype: Type of the compared computation. The reference is in float64.
        count: Number of objects in the reference.
        unmatched: Number of objects without a counterpart of the same label within `LIMITS`.
        score_difference: Largest difference of the scores of counterparts.
        box_difference: Largest difference of their coordinates in pixels.
        mask_difference: Largest difference of the probabilities in their masks.
        margin: Smallest margin of all decisions in the reference.
        decision: Name of the decision with the smallest margin.
    """

    name: str
    dtype: str
    count: int
    unmatched: int
    score_difference: float
    box_difference: float
    mask_difference: float
    margin: float
    decision: str

    @property
    def tied(self) -> bool:
        """Return whether rounding may flip a decision."""
        return self.margin <= LIMITS[self.dtype].margin

    @property
    def limit(self) -> int:
        """Return the accepted number of objects without a counterpart."""
        return int(MAX_FLIPPED * self.count) if self.tied else 0

    @property
    def passed(self) -> bool:
        return self.unmatched <= self.limit and self.mask_difference <= LIMITS[self.dtype].probability

    def __str__(self) -> str:
        text = f"{self.unmatched} of {self.count} {self.name} differ in {self.dtype}, limit {self.limit}"
        text += f", and their masks by {self.mask_difference:.1e}" if self.mask_difference else ""
        return f"{text} (smallest margin of a decision: {self.margin:.1e} in {self.decision or 'none'})"


def compare_objects(
    name: str, dtype: str, computed: list[Objects], reference: list[Objects], margins: Mapping[str, float]
) -> ObjectComparison:
    """Compare the objects of the same images, computed in `dtype`, with those of the float64 reference."""
    score = box = mask = 0.0
    unmatched = 0
    for ours, theirs in zip(computed, reference, strict=True):
        pairs = match(ours, theirs, LIMITS[dtype])
        unmatched += max(len(ours.boxes), len(theirs.boxes)) - len(pairs)
        if not len(pairs):
            continue
        one, other = pairs.T
        score = max(score, float(np.abs(ours.scores[one] - theirs.scores[other]).max()))
        box = max(box, float(np.abs(ours.boxes[one] - theirs.boxes[other]).max()))
        if ours.mask_logits is not None and theirs.mask_logits is not None:
            shown = [1 / (1 + np.exp(-logits)) for logits in (ours.mask_logits[one], theirs.mask_logits[other])]
            mask = max(mask, float(np.abs(shown[0] - shown[1]).max()))
    count = sum(len(one.boxes) for one in reference)
    decision = min(margins, key=margins.__getitem__, default="")
    return ObjectComparison(
        name, dtype, count, unmatched, score, box, mask, margins.get(decision, float("inf")), decision
    )


def match(ours: Objects, theirs: Objects, limits: Limits) -> np.ndarray:
    """Return the indices (N, 2) of counterparts: the nearest unused box with the same label and score."""
    distance = np.abs(ours.boxes[:, None] - theirs.boxes[None]).max(2, initial=0)
    fits = (distance <= limits.pixels) & (np.abs(ours.scores[:, None] - theirs.scores[None]) <= limits.score)
    if ours.labels is not None and theirs.labels is not None:
        fits &= ours.labels[:, None] == theirs.labels[None]
    distance = np.where(fits, distance, np.inf)
    pairs = []
    for index in range(len(ours.boxes) if len(theirs.boxes) else 0):
        nearest = int(distance[index].argmin())
        if np.isfinite(distance[index, nearest]):
            pairs.append((index, nearest))
            distance[:, nearest] = np.inf
    return np.array(pairs, np.int64).reshape(-1, 2)
