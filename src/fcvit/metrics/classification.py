"""Compute classification metrics from logits and from records of images, as pure functions of NumPy arrays.

The metrics are computed once from all records in the order of the images. They therefore do not depend on the batches,
workers, interruptions or processes of the evaluation.
"""

import dataclasses
import math
import statistics

import numpy as np

from fcvit.errors import NumbersDisagree

CONFIDENCE = 0.95
BINS = 15  # number of bins of the calibration error, as in Guo et al. 2017 (arXiv 1706.04599)


def rank_of_truth(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the rank of the true class, 0 for the best: (B, C), (B,) -> (B,). Ties go to the lower index."""
    truth = logits[np.arange(len(labels)), labels][:, None]
    before = np.arange(logits.shape[1])[None] < labels[:, None]
    return ((logits > truth) | ((logits == truth) & before)).sum(axis=1)


def first_not_finite(logits: np.ndarray) -> int | None:
    """Return the index of the first row of (B, C) with a value that is not finite, or None if all are finite."""
    rows = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    return int(rows[0]) if len(rows) else None


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities in float64, (B, C) -> (B, C).

    Raises:
        NumbersDisagree: Logits are not finite.
    """
    if first_not_finite(logits) is not None:
        raise NumbersDisagree("logits are not finite; the weights are damaged or exceed the range of float32")
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the cross-entropy loss of each sample in float64, (B, C), (B,) -> (B,)."""
    logits = logits.astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    log_total = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return log_total - logits[np.arange(len(labels)), labels]


def top_classes(logits: np.ndarray, k: int) -> np.ndarray:
    """Return the indices of the k largest logits, best first, (B, C) -> (B, k). Ties go to the lower index."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :k]


def share(successes: int, count: int) -> float:
    """Return a proportion in percent, or NaN if the count is 0."""
    return 100 * successes / count if count else math.nan


def wilson(successes: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion in percent (Wilson 1927), or (0, 100) if the count is 0."""
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
    """Confidence and accuracy in bins of equal width over [0, 1].

    Attributes:
        error: Expected calibration error, 0 to 1: the mean of |accuracy - confidence| of the bins, weighted by images.
        counts: Number of images in each bin. An edge is part of the lower bin.
        confidence: Mean confidence in each bin, 0 to 1, or 0 for an empty bin.
        accuracy: Mean accuracy in each bin, 0 to 1, or 0 for an empty bin.
    """

    error: float
    counts: tuple[int, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Calibration:
    """Compute the calibration from the top probability (N,) and the correctness (N,) of each image."""
    indices = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(indices, minlength=bins)
    divisors = np.maximum(counts, 1)
    means = np.bincount(indices, confidence, bins) / divisors
    accuracies = np.bincount(indices, correct.astype(float), bins) / divisors
    error = float((np.abs(accuracies - means) * counts).sum() / max(1, counts.sum()))
    return Calibration(error, tuple(map(int, counts)), tuple(map(float, means)), tuple(map(float, accuracies)))


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Return the confusion matrix, int64 (classes, classes): images of true class i (row) and prediction j (column)."""
    return np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of the exact McNemar test.

    It is computed with integers, so that it is exact for any count.

    Args:
        only_first: Number of images that only the first classifier classifies correctly.
        only_second: Number of images that only the second classifier classifies correctly.
    """
    count, fewer = only_first + only_second, min(only_first, only_second)
    tail = term = 1
    for i in range(fewer):
        term = term * (count - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << count))


@dataclasses.dataclass(frozen=True)
class Paired:
    """A comparison of two classifiers on the same images.

    Attributes:
        only_first: Number of images that only the first classifier classifies correctly.
        only_second: Number of images that only the second classifier classifies correctly.
        difference: Second accuracy minus first accuracy, in percentage points.
        interval: Confidence interval of the difference, in percentage points.
        p_value: Two-sided p-value of the exact McNemar test.
    """

    only_first: int
    only_second: int
    difference: float
    interval: tuple[float, float]
    p_value: float


def paired(first: np.ndarray, second: np.ndarray) -> Paired:
    """Compare two classifiers by the correctness of each image, booleans (N,) and (N,)."""
    discordant = int((first & ~second).sum()), int((second & ~first).sum())
    difference, low, high = paired_difference(*discordant, len(first))
    return Paired(*discordant, difference, (low, high), mcnemar(*discordant))


def paired_difference(
    only_first: int, only_second: int, count: int, confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    """Return the difference of two accuracies (second minus first) and its interval (low, high), in percentage points.

    This is the Wald interval with half a pseudo-image in each of the four cells (Agresti and Min 2005). It keeps its
    confidence level even if the classifiers differ on few images.

    Args:
        only_first: Number of images that only the first classifier classifies correctly.
        only_second: Number of images that only the second classifier classifies correctly.
        count: Number of all images, at least 1.
        confidence: Confidence level of the interval.
    """
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    first, second, total = only_first + 0.5, only_second + 0.5, count + 2
    center = (second - first) / total
    half = z * math.sqrt(max(0.0, (first + second) / total - center * center) / total)
    return 100 * (only_second - only_first) / count, 100 * max(-1.0, center - half), 100 * min(1.0, center + half)


@dataclasses.dataclass(frozen=True)
class OtherOrder:
    """An order of the classes that explains the predictions better than the order that was used.

    Attributes:
        moved: True class -> class that is predicted for its images, for each class that the order changes.
        images: Number of images of the moved classes.
        explained: Percentage of these images for which this class is predicted.
        all: True if these are at least half of all images, so that the order of all classes is in doubt.
    """

    moved: dict[int, int]
    images: int
    explained: float
    all: bool


def other_order(truth: np.ndarray, predicted: np.ndarray) -> OtherOrder | None:
    """Return another order of the classes if most errors follow it, so that the classes look permuted, or else None.

    For any classifier there is an order that explains its predictions best. With few images it explains many of them
    by chance. The order must therefore explain clearly more predictions than the best order explains after the
    predictions are shuffled. If it moves less than half of the images, the moved classes must also be nearly always
    predicted for one another.

    Args:
        truth: Indices of the true classes (N,).
        predicted: Indices of the predicted classes (N,).
    """
    best = _best_order(truth, predicted)
    moved = {true: prediction for true, prediction in best.items() if true != prediction}
    members = np.isin(truth, [true for true in np.unique(truth).tolist() if best.get(true) != true])
    images = int(members.sum())
    if len(moved) < 2 or not images:
        return None
    moved_truth, moved_predicted = truth[members], predicted[members]
    explained = _explained(moved, moved_truth, moved_predicted)
    at_least_half = 2 * images >= len(truth)
    accuracy = float((moved_truth == moved_predicted).mean())
    if at_least_half:
        if explained < 0.4 or accuracy > explained / 4:
            return None
        steps = moved_predicted - moved_truth
        if images >= 8 and max((steps == step).mean() for step in (-1, 1)) > 0.5:  # for example, labels that start at 1
            return OtherOrder(moved, images, 100 * explained, at_least_half)
    elif set(moved) != set(moved.values()) or explained < 0.8 or accuracy > 0.1 or images < 5 * len(moved):
        return None
    generator = np.random.default_rng(0)
    chance = 0.0
    for _ in range(99 if images < 2000 else 9):  # the variance is larger for few images
        shuffled = generator.permutation(moved_predicted)
        chance = max(chance, _explained(_best_order(moved_truth, shuffled), moved_truth, shuffled))
    if explained <= chance + 0.3 * (1 - chance):
        return None
    return OtherOrder(moved, images, 100 * explained, at_least_half)


def _best_order(truth: np.ndarray, predicted: np.ndarray) -> dict[int, int]:
    """Assign a different predicted class to each true class, greedily by the frequency of the pairs."""
    pairs, counts = np.unique(np.stack([truth, predicted]), axis=1, return_counts=True)
    # Correct pairs come first among equally frequent pairs.
    ranked = np.lexsort((pairs[0] != pairs[1], -counts))
    order: dict[int, int] = {}
    taken: set[int] = set()
    for true, prediction in pairs[:, ranked].T.tolist():
        if true not in order and prediction not in taken:
            order[true] = prediction
            taken.add(prediction)
    return order


def _explained(order: dict[int, int], truth: np.ndarray, predicted: np.ndarray) -> float:
    """Return the fraction of predictions that follow the order."""
    return sum(
        order.get(true) == prediction for true, prediction in zip(truth.tolist(), predicted.tolist(), strict=True)
    ) / len(truth)
