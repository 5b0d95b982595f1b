"""From logits and records of single images to figures: pure functions over NumPy arrays.

Figures are computed once, from all records in the order of the images, so that batches, workers,
interruptions and processes cannot change them.
"""

import dataclasses
import math
import statistics

import numpy as np

from fcvit.errors import NumbersDisagree

CONFIDENCE = 0.95
BINS = 15  # of the calibration error, as in Guo et al. 2017 (arXiv 1706.04599)


def rank_of_truth(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the true one, (B, C), (B,) -> (B,); of equal logits the lower index is first."""
    truth = logits[np.arange(len(labels)), labels][:, None]
    before = np.arange(logits.shape[1])[None] < labels[:, None]
    return ((logits > truth) | ((logits == truth) & before)).sum(axis=1)


def first_not_finite(logits: np.ndarray) -> int | None:
    """Return the first row of (B, C) with a number that is not finite; None: all are finite."""
    rows = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    return int(rows[0]) if len(rows) else None


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities in float64, (B, C) -> (B, C).

    Raises:
        NumbersDisagree: logits that are not finite, which have no order.
    """
    if first_not_finite(logits) is not None:
        raise NumbersDisagree("logits are not finite; the weights are damaged, or float32 is too narrow for them")
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Per sample, in float64: (B, C), (B,) -> (B,)."""
    logits = logits.astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    log_total = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return log_total - logits[np.arange(len(labels)), labels]


def top_classes(logits: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest, best first, (B, C) -> (B, k); of equal logits the lower index is first."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :k]


def share(successes: int, count: int) -> float:
    """Per cent; NaN of nothing."""
    return 100 * successes / count if count else math.nan


def wilson(successes: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a proportion, in per cent (Wilson 1927); (0, 100) of nothing."""
    if not count:
        return 0.0, 100.0
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / count
    center = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == count else center + half
    return 100 * low, 100 * high


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy, in `BINS` bins of equal width over [0, 1].

    Attributes:
        error: the expected calibration error, 0 to 1: the mean of |accuracy - confidence| over images.
        counts: images in each bin; an edge belongs to the bin below it.
        confidence, accuracy: means in each bin, 0 to 1; 0 for an empty bin.
    """

    error: float
    counts: tuple[int, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Calibration:
    """From the top probability (N,) of each image and whether it was right (N,)."""
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    filled = np.maximum(counts, 1)
    means = np.bincount(place, confidence, bins) / filled
    accuracies = np.bincount(place, correct.astype(float), bins) / filled
    error = float((np.abs(accuracies - means) * counts).sum() / max(1, counts.sum()))
    return Calibration(error, tuple(map(int, counts)), tuple(map(float, means)), tuple(map(float, accuracies)))


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """How often class i was taken for class j: (N,), (N,) -> int64 (classes, classes)."""
    return np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of the exact McNemar test: can such a split of the discordant images be chance?

    Computed in whole numbers, so that it is exact for any count.

    Args:
        only_first, only_second: images that only the one, or only the other, gets right.
    """
    count, fewer = only_first + only_second, min(only_first, only_second)
    tail = term = 1
    for i in range(fewer):
        term = term * (count - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << count))


@dataclasses.dataclass(frozen=True)
class Paired:
    """Two classifiers on the same images: images that only one gets right, and what follows."""

    only_first: int
    only_second: int
    difference: float
    interval: tuple[float, float]
    p_value: float


def paired(first: np.ndarray, second: np.ndarray) -> Paired:
    """From whether each image was right, (N,) and (N,): see `paired_difference` and `mcnemar`."""
    only = int((first & ~second).sum()), int((second & ~first).sum())
    difference, low, high = paired_difference(*only, len(first))
    return Paired(*only, difference, (low, high), mcnemar(*only))


def paired_difference(
    only_first: int, only_second: int, count: int, confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    """Second less first accuracy over the same images, with its interval, in points.

    The interval is Wald's with half a pseudo-image in each of the four cells (Agresti and Min 2005),
    which keeps its level where few images differ.

    Args:
        only_first, only_second: images that only the one, or only the other, gets right.
        count: all images, at least 1.
    """
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    first, second, total = only_first + 0.5, only_second + 0.5, count + 2
    center = (second - first) / total
    half = z * math.sqrt(max(0.0, (first + second) / total - center * center) / total)
    return 100 * (only_second - only_first) / count, 100 * max(-1.0, center - half), 100 * min(1.0, center + half)


@dataclasses.dataclass(frozen=True)
class OtherOrder:
    """An order of the classes that explains the answers better than the one that was used.

    Attributes:
        moved: true class -> class that its images are taken for, of all classes that would change.
        images: of the moved classes.
        explained: per cent of these images that are taken for that class.
        all: whether they are at least half of all images, so that the whole order is in doubt.
    """

    moved: dict[int, int]
    images: int
    explained: float
    all: bool


def other_order(truth: np.ndarray, predicted: np.ndarray) -> OtherOrder | None:
    """Tell whether the classes look permuted: most mistakes follow one other order of the classes.

    Any classifier has an order that explains its answers best, and of few images it explains many by chance.
    So the order must explain clearly more than the best order of the same answers, shuffled. If it moves less
    than half of the images, the moved classes must also be taken for one another, nearly always.

    Args:
        truth, predicted: class indices (N,).
    """
    best = _best_order(truth, predicted)
    moved = {true: answer for true, answer in best.items() if true != answer}
    members = np.isin(truth, [true for true in np.unique(truth).tolist() if best.get(true) != true])
    images = int(members.sum())
    if len(moved) < 2 or not images:
        return None
    own_truth, answers = truth[members], predicted[members]
    explained = _explained(moved, own_truth, answers)
    whole = 2 * images >= len(truth)
    right = float((own_truth == answers).mean())
    if whole:
        if explained < 0.4 or right > explained / 4:
            return None
        steps = answers - own_truth
        if images >= 8 and max((steps == step).mean() for step in (-1, 1)) > 0.5:  # labels that count from 1, say
            return OtherOrder(moved, images, 100 * explained, whole)
    elif set(moved) != set(moved.values()) or explained < 0.8 or right > 0.1 or images < 5 * len(moved):
        return None
    generator = np.random.default_rng(0)
    chance = 0.0
    for _ in range(99 if images < 2000 else 9):  # of few images, chance explains many now and then
        shuffled = generator.permutation(answers)
        chance = max(chance, _explained(_best_order(own_truth, shuffled), own_truth, shuffled))
    if explained <= chance + 0.3 * (1 - chance):
        return None
    return OtherOrder(moved, images, 100 * explained, whole)


def _best_order(truth: np.ndarray, predicted: np.ndarray) -> dict[int, int]:
    """Give each true class the answer it gets most often, none twice: the most frequent pairs first."""
    pairs, counts = np.unique(np.stack([truth, predicted]), axis=1, return_counts=True)
    # Of equally frequent pairs the right ones are first.
    ranked = np.lexsort((pairs[0] != pairs[1], -counts))
    order: dict[int, int] = {}
    taken: set[int] = set()
    for true, answer in pairs[:, ranked].T.tolist():
        if true not in order and answer not in taken:
            order[true] = answer
            taken.add(answer)
    return order


def _explained(order: dict[int, int], truth: np.ndarray, predicted: np.ndarray) -> float:
    """The share of answers that follow an order."""
    return sum(
        order.get(true) == answer for true, answer in zip(truth.tolist(), predicted.tolist(), strict=True)
    ) / len(truth)
