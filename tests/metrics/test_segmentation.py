"""Test the metrics of segmentation against mmsegmentation's own numbers, manual computations and scikit-learn."""

import dataclasses
import tracemalloc
import zlib

import numpy as np
import pytest
import sklearn.metrics

from conftest import golden_json
from fcvit.errors import DoesNotFit
from fcvit.metrics import segmentation as metrics
from fcvit.metrics.segmentation import (
    INTERSECT,
    LABELED,
    PAIR,
    PREDICTED,
    add_confusion,
    class_counts,
    confusion,
    decode,
    encode,
    figures,
    interval,
    printed,
    resample,
    shift_of_labels,
)

CASES = golden_json("segmentation/metric.json")["cases"]


def images_of(case):
    """Yield the predictions and label maps of a golden case, by the rule in the file."""
    for number, (height, width) in enumerate(case["shapes"]):
        generator = np.random.default_rng(zlib.crc32(f"{case['salt']}metric{number}".encode()))
        truth = generator.integers(case["lo"], case["hi"], (height, width)).astype(np.uint8)
        truth[generator.random((height, width)) < case["ignored"]] = 255
        named = truth.astype(np.int64) - case["reduce_zero_label"]
        agree = generator.random((height, width)) < case["agree"]
        random = generator.integers(0, case["p_hi"], (height, width))
        prediction = np.where(agree, named % case["classes"], random).astype(np.uint8)
        if case["reduce_zero_label"]:
            truth = np.where(truth == 0, 255, np.where(truth == 255, 255, truth - 1)).astype(np.uint8)
        yield prediction, truth


def counts_of(case, ignore=255):
    return sum(class_counts(confusion(p, t, ignore), case["classes"]) for p, t in images_of(case))


def same(ours, golden):
    """Return True if the percentages equal mmsegmentation's fractions. NaN is null in the file."""
    golden = np.array(golden, np.float64)
    return np.allclose(ours, 100 * golden, rtol=1e-14, atol=0, equal_nan=True)


def equals_golden(computed, case):
    names = {"miou": "mIoU", "macc": "mAcc", "aacc": "aAcc", "iou": "IoU", "acc": "Acc"}
    return all(same(getattr(computed, ours), case[theirs]) for ours, theirs in names.items())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_counts_and_metrics_equal_mmsegmentation(case):
    counts = counts_of(case)
    assert counts.dtype == np.int64
    for row, name in ((INTERSECT, "intersect"), (PREDICTED, "predicted"), (LABELED, "labelled")):
        assert counts[row].tolist() == case[name]
    assert (counts[PREDICTED] + counts[LABELED] - counts[INTERSECT]).tolist() == case["union"]
    computed = figures(counts)
    assert equals_golden(computed, case)
    for percent, name in ((computed.miou, "IoU"), (computed.macc, "Acc"), (computed.aacc, "aAcc")):
        expected = case["printed"][name]
        assert printed(percent) == ("nan" if expected is None else f"{expected:.2f}")


def test_a_class_that_is_neither_labeled_nor_predicted_is_left_out_of_the_mean():
    """Counted as 0, the mean of 58.3% would be 29.2%. Counted as 1, as in PaddleSeg, it would be 79.2%."""
    label, prediction = np.array([[0, 0, 2, 2]], np.uint8), np.array([[0, 2, 2, 2]], np.uint8)
    computed = figures(class_counts(confusion(prediction, label), 4))
    expected = np.array([100 / 2, np.nan, 200 / 3, np.nan])
    np.testing.assert_allclose(computed.iou, expected, rtol=1e-14)
    assert computed.miou == pytest.approx((100 / 2 + 200 / 3) / 2, rel=1e-14)
    assert computed.macc == pytest.approx((50 + 100) / 2, rel=1e-14)


def test_a_class_that_is_predicted_but_never_labeled_has_iou_0_and_no_accuracy():
    label, prediction = np.array([[0, 0]], np.uint8), np.array([[0, 1]], np.uint8)
    computed = figures(class_counts(confusion(prediction, label), 2))
    assert computed.iou.tolist() == [50, 0] and (computed.miou, computed.macc) == (25, 50)


def absent_as(value):
    """Return the mean with classes that are neither labeled nor predicted counted as 0 or 100%."""
    return lambda values: np.nan_to_num(values, nan=value).mean(axis=-1)


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("name", ["absent", "reduce-zero-absent", "all-ignored-image"])
def test_a_mean_with_absent_classes_as_0_or_1_is_detected(monkeypatch, name, value):
    monkeypatch.setattr(metrics, "_mean", absent_as(value))
    assert not equals_golden(figures(counts_of(CASES[name])), CASES[name])


@pytest.mark.parametrize("name", [name for name in CASES if name != "all-ignored-image"])
@pytest.mark.parametrize("shift", [1, -1])
def test_labels_shifted_by_one_are_detected(name, shift):
    case = CASES[name]
    counts = sum(
        class_counts(confusion(p, np.where(t == 255, 255, t.astype(int) + shift).astype(np.uint8)), case["classes"])
        for p, t in images_of(case)
    )
    assert not equals_golden(figures(counts), case)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["ignored"]])
def test_counting_ignored_pixels_is_detected(name):
    """No label map contains 254, so all pixels are counted."""
    assert not equals_golden(figures(counts_of(CASES[name], ignore=254)), CASES[name])


def test_the_means_of_images_are_not_the_metric():
    case = CASES["predicted-but-absent"]
    means = [figures(class_counts(confusion(p, t), case["classes"])).miou for p, t in images_of(case)]
    assert not same(np.mean(means), case["mIoU"])


@pytest.mark.parametrize("seed", range(3))
def test_pairs_equal_scikit_learns_confusion_matrix(seed):
    generator = np.random.default_rng(seed)
    label, prediction = generator.integers(0, 9, (2, 31, 47)).astype(np.uint8)
    matrix = np.zeros((9, 9), np.int64)
    pairs = confusion(prediction, label)
    add_confusion(matrix, pairs)
    add_confusion(matrix, pairs)
    assert (matrix == 2 * sklearn.metrics.confusion_matrix(label.ravel(), prediction.ravel())).all()
    counts = class_counts(pairs, 9)
    expected = 100 * sklearn.metrics.jaccard_score(label.ravel(), prediction.ravel(), average=None)
    assert figures(counts).iou == pytest.approx(expected, rel=1e-12)
    assert (counts[INTERSECT] == np.diag(matrix) // 2).all()


def test_pairs_are_sparse_and_survive_encoding():
    label, prediction = np.array([[0, 0, 255, 200]], np.uint8), np.array([[0, 3, 3, 3]], np.uint8)
    pairs = confusion(prediction, label)
    assert pairs.tolist() == [(0, 0, 1), (0, 3, 1), (200, 3, 1)]
    content = encode(pairs)
    assert len(content) == 3 * PAIR.itemsize == 18 and (decode(content) == pairs).all()
    assert confusion(prediction, label, ignore=0).tolist() == [(200, 3, 1), (255, 3, 1)]
    assert len(decode(encode(confusion(prediction, np.full_like(label, 255))))) == 0
    with pytest.raises(ValueError, match="multiple"):
        decode(content[:-1])


def test_a_prediction_of_another_size_is_rejected():
    with pytest.raises(DoesNotFit, match=r"4 x 5 pixels .* 5 x 4; resize the logits"):
        confusion(np.zeros((4, 5), np.uint8), np.zeros((5, 4), np.uint8))


def test_counts_of_large_data_sets_are_exact():
    """A float32 sum of pixels is exact only up to 2^24."""
    pairs = np.array([(0, 0, 2**32 - 1), (1, 0, 1)], PAIR)
    counts = sum(class_counts(pairs, 2) for _ in range(1000))
    assert counts.tolist() == [[1000 * (2**32 - 1), 0], [1000 * 2**32, 0], [1000 * (2**32 - 1), 1000]]


def test_percentages_are_rounded_like_numpy():
    assert [printed(value) for value in (0.125, 0.375, 2.675, 100.0, np.nan)] == [
        "0.12",
        "0.38",
        "2.68",
        "100.00",
        "nan",
    ]


def random_counts(images, classes, seed=0):
    """Return counts of images with different classes and different shares of correct pixels, (images, 3, classes)."""
    generator = np.random.default_rng(seed)
    labeled = generator.integers(1, 400, (images, classes)) * (generator.random((images, classes)) < 0.8)
    intersect = np.round(labeled * generator.beta(3, 2, (images, 1))).astype(int)
    predicted = intersect + generator.integers(0, 100, (images, classes))
    return np.stack([intersect, predicted, labeled], axis=1)


@pytest.mark.parametrize("images", [1, 5, 64, 200])
def test_each_resample_draws_as_many_images_as_there_are(images):
    """Image i has one pixel, of class i, so the counts of a resample are the draws of each image."""
    ones = np.ones((images, 3, 2), np.int64)
    assert (resample(ones, images) == images).all()
    numbered = np.zeros((images, 3, images), np.int64)
    numbered[np.arange(images), :, np.arange(images)] = 1
    draws = resample(numbered, images)[:, 0]
    assert (draws.sum(axis=1) == images).all()
    # Each image is drawn once on average, with the variance of the binomial distribution.
    assert draws.mean(axis=0) == pytest.approx(np.ones(images), abs=0.2)
    assert draws.var() == pytest.approx(1 - 1 / images, abs=0.05)


def test_resamples_are_seeded_and_paired():
    counts = random_counts(150, 4)
    assert (resample(counts, 150) == resample(iter(counts), 150)).all()
    assert (resample(counts, 150) != resample(counts, 150, seed=1)).any()
    # The same images are drawn for other counts, so the difference of two equal results is exactly 0.
    assert (resample(2 * counts, 150) == 2 * resample(counts, 150)).all()


@pytest.mark.parametrize("given", [0, 3, 5])
def test_a_wrong_number_of_images_is_rejected(given):
    with pytest.raises(ValueError, match="images"):
        resample(random_counts(given, 2) if given else [], 4 if given else 0)


def test_the_interval_contains_the_true_miou_about_as_often_as_it_says():
    """120 data sets of 80 images are drawn from 4,000 images."""
    population = random_counts(4000, 3)
    truth = figures(population.sum(axis=0))
    generator = np.random.default_rng(1)
    inside = np.zeros(5)
    for _ in range(120):
        chosen = population[generator.integers(0, 4000, 80)]
        sampled = figures(resample(chosen, 80, resamples=300))
        bounds = interval(sampled.miou)
        inside[0] += bounds[0] <= truth.miou <= bounds[1]
        low, high = interval(sampled.iou)
        inside[1:4] += (low <= truth.iou) & (truth.iou <= high)
        bounds = interval(sampled.aacc)
        inside[4] += bounds[0] <= truth.aacc <= bounds[1]
    assert (inside / 120 >= 0.87).all() and (inside / 120 < 1).any()


def test_the_interval_of_an_undefined_value_is_undefined():
    nothing = figures(resample(np.zeros((3, 3, 2), np.int64), 3))
    assert np.isnan(interval(nothing.miou)).all()
    assert interval(np.array([np.nan, 1.0, 1.0])).tolist() == [1, 1]


def test_the_memory_of_the_bootstrap_does_not_depend_on_the_images():
    def peak(images):
        one = random_counts(1, 20)[0]
        tracemalloc.start()
        resample((one for _ in range(images)), images, resamples=100)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(200)
    assert peak(4000) < 1.1 * peak(400)


def test_shifted_labels_are_recognized():
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 10, 5000)
    guess = np.where(generator.random(5000) < 0.7, truth, generator.integers(0, 10, 5000))
    for shift in (-1, 0, 1):
        matrix = np.zeros((12, 12), np.int64)
        np.add.at(matrix, (truth + 1 + shift, guess + 1), 1)
        assert shift_of_labels(matrix) == shift
    assert shift_of_labels(np.array([[0, 5], [5, 0]])) == 0  # two swapped classes are not a shift
    assert shift_of_labels(np.zeros((5, 5), np.int64)) == 0


def test_figures_of_several_data_sets_are_computed_at_once():
    counts = random_counts(6, 5)
    together = figures(counts)
    for index, one in enumerate(counts):
        for field in dataclasses.fields(together):
            assert np.array_equal(
                getattr(together, field.name)[index], getattr(figures(one), field.name), equal_nan=True
            )
