"""Compute the metrics of semantic segmentation as mmsegmentation 0.19 does, as pure functions of NumPy arrays.

Each image is reduced once to its pairs of label and predicted class with their number of pixels (`confusion`). All
metrics follow from these integers. They therefore do not depend on the batches, workers, interruptions or processes of
the evaluation, and sums are exact.
"""

import dataclasses
import itertools
import warnings
from collections.abc import Iterable

import numpy as np

from fcvit.errors import DoesNotFit

CONFIDENCE = 0.95
IGNORE = 255
RESAMPLES = 1000  # number of resamples of the bootstrap
PAIR = np.dtype([("label", "u1"), ("predicted", "u1"), ("pixels", "<u4")])
"""Pixels of an image with one label and one predicted class."""
INTERSECT, PREDICTED, LABELED = range(3)
"""Rows of the counts of an image or data set, int64 (3, C): correct, predicted and labeled pixels of each class."""
_BLOCK = 64  # images that are resampled at a time


def confusion(prediction: np.ndarray, label: np.ndarray, ignore: int = IGNORE) -> np.ndarray:
    """Return the pairs of label and predicted class of an image, as an array of `PAIR` sorted by label and class.

    Args:
        prediction: Predicted class of each pixel, uint8 (H, W).
        label: Label of each pixel, uint8 (H, W). Labels that are not a class are kept: mmsegmentation counts their
            pixels as predicted, but not as labeled.
        ignore: Label of the pixels that are not counted at all.

    Raises:
        DoesNotFit: The sizes are different.
    """
    if prediction.shape != label.shape:
        raise DoesNotFit(
            f"the prediction has {_size(prediction)} pixels and the label map {_size(label)}; resize the logits to the "
            "size of the label map"
        )
    pairs = label.astype(np.uint16).ravel() << 8 | prediction.ravel()
    pixels = np.bincount(pairs, minlength=1 << 16)
    pixels[ignore << 8 : (ignore + 1) << 8] = 0
    (present,) = np.nonzero(pixels)
    result = np.empty(len(present), PAIR)
    result["label"], result["predicted"], result["pixels"] = present >> 8, present & 255, pixels[present]
    return result


def _size(image: np.ndarray) -> str:
    return " x ".join(map(str, image.shape))


def encode(pairs: np.ndarray) -> bytes:
    """Encode an array of `PAIR` as bytes, 6 for each pair. `decode` restores it."""
    return pairs.astype(PAIR, copy=False).tobytes()


def decode(content: bytes) -> np.ndarray:
    """Decode an array of `PAIR` from the bytes of `encode`.

    Raises:
        ValueError: The length is not a multiple of the size of a pair.
    """
    return np.frombuffer(content, PAIR)


def class_counts(pairs: np.ndarray, classes: int) -> np.ndarray:
    """Return the correct, predicted and labeled pixels of each class, int64 (3, C), from an array of `PAIR`.

    The rows are `INTERSECT`, `PREDICTED` and `LABELED`. Pixels whose label is not a class count as predicted only.
    """
    counts = np.zeros((3, classes), np.int64)
    correct, labeled = pairs[pairs["label"] == pairs["predicted"]], pairs[pairs["label"] < classes]
    np.add.at(counts[INTERSECT], correct["label"], correct["pixels"])
    np.add.at(counts[PREDICTED], pairs["predicted"], pairs["pixels"])
    np.add.at(counts[LABELED], labeled["label"], labeled["pixels"])
    return counts


def add_confusion(matrix: np.ndarray, pairs: np.ndarray) -> None:
    """Add an array of `PAIR` to a confusion matrix, int64 (C, C), of label (row) and predicted class (column).

    Pixels whose label is not a class are left out.
    """
    pairs = pairs[pairs["label"] < len(matrix)]
    np.add.at(matrix, (pairs["label"], pairs["predicted"]), pairs["pixels"])


@dataclasses.dataclass(frozen=True)
class Figures:
    """The metrics of one or several sets of pixels, in percent. NaN marks an undefined metric.

    Attributes:
        miou: Mean of `iou` over the classes that are labeled or predicted, (...).
        macc: Mean of `acc` over the classes that are labeled, (...).
        aacc: Percentage of the labeled pixels that are correct, (...). NaN without labeled pixels.
        iou: Intersection over union of each class, (..., C). NaN for a class that is neither labeled nor predicted.
        acc: Percentage of each class's labeled pixels that are correct, (..., C). NaN for a class without labels.
    """

    miou: np.ndarray
    macc: np.ndarray
    aacc: np.ndarray
    iou: np.ndarray
    acc: np.ndarray


def figures(counts: np.ndarray) -> Figures:
    """Compute the metrics from counts (..., 3, C), see `class_counts`.

    These are mmsegmentation 0.19's definitions (`mmseg/core/evaluation/metrics.py`): the counts are summed over all
    images first, an absent class is left out of the mean, and a class that is predicted but never labeled has IoU 0.
    """
    counts = np.asarray(counts, np.float64)  # exact up to 2^53 pixels
    intersect, predicted, labeled = (counts[..., row, :] for row in (INTERSECT, PREDICTED, LABELED))
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, as in mmsegmentation
        iou = intersect / (predicted + labeled - intersect)
        acc = intersect / labeled
        aacc = intersect.sum(axis=-1) / labeled.sum(axis=-1)
    return Figures(*(100 * value for value in (_mean(iou), _mean(acc), aacc, iou, acc)))


def _mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis without NaN, or NaN if all values are NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # mean of empty slice
        return np.nanmean(values, axis=-1)


def printed(percent: float) -> str:
    """Format a percentage with two decimals as mmsegmentation prints it: NumPy's rounding, half to even."""
    return f"{np.round(percent, 2):.2f}"


def resample(counts: Iterable[np.ndarray], images: int, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Return the summed counts of bootstrap resamples of the images, int64 (resamples, 3, C).

    Each resample draws `images` images with replacement. The draws depend only on `images`, `seed` and `resamples`, so
    two results on the same images in the same order are resampled alike, and their differences are paired. The memory
    does not depend on the number of images: the draws of a block of images are binomial given those of earlier blocks.

    Args:
        counts: Counts of each image, integers (3, C). They are read once.
        images: Number of images, at least 1.
        seed: Seed of the random numbers.
        resamples: Number of resamples.

    Raises:
        ValueError: `counts` does not have this number of images.
    """
    generator = np.random.default_rng(seed)
    left = np.full(resamples, images)
    total: np.ndarray | None = None
    source = iter(counts)
    for start in range(0, images, _BLOCK):
        block = list(itertools.islice(source, min(_BLOCK, images - start)))
        size, rest = len(block), images - start
        if size < min(_BLOCK, rest):
            raise ValueError(f"counts of {start + size} images; expected {images}")
        drawn = generator.binomial(left, size / rest)
        left -= drawn
        times = generator.multinomial(drawn, np.full(size, 1 / size))
        table = np.stack(block).astype(np.float64)  # products of float64 matrices are fast, and exact up to 2^53
        part = np.einsum("ri,ikc->rkc", times.astype(np.float64), table, optimize=True).astype(np.int64)
        total = part if total is None else total + part
    if total is None or next(source, None) is not None:
        raise ValueError(f"expected the counts of {images} images, at least 1")
    return total


def interval(values: np.ndarray, confidence: float = CONFIDENCE) -> np.ndarray:
    """Return the percentile interval of resampled values, (resamples, ...) -> (2, ...): lower and upper bound.

    Resamples in which the value is undefined (NaN) are left out. The bounds are NaN if all of them are.
    """
    tail = (1 - confidence) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all values are NaN
        return np.nanquantile(values, [tail, 1 - tail], axis=0)


def shift_of_labels(matrix: np.ndarray) -> int:
    """Return 1 if the labels look one too high, -1 if one too low, or else 0.

    Labels look shifted if more than 40% of the pixels are correct after the shift, and at least four times as many as
    before. In the labels of ADE20K, class k is k + 1 (`reduce_zero_label` subtracts 1), which is the usual cause.

    Args:
        matrix: Confusion matrix, integers (C, C), of label (row) and predicted class (column).
    """
    correct, total = int(np.trace(matrix)), int(matrix.sum())
    shifted = {1: int(np.trace(matrix, -1)), -1: int(np.trace(matrix, 1))}
    best = max(shifted, key=lambda shift: shifted[shift])
    return best if len(matrix) > 2 and shifted[best] > 0.4 * total and shifted[best] >= 4 * correct else 0
