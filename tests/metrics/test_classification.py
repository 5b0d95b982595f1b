"""Test the metrics against manual computations, scikit-learn, SciPy and statsmodels."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.calibration import calibration_curve
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.proportion import proportion_confint

from fcvit.errors import NumbersDisagree
from fcvit.metrics.classification import (
    BINS,
    calibration,
    confusion,
    cross_entropy,
    first_not_finite,
    mcnemar,
    other_order,
    paired_difference,
    rank_of_truth,
    share,
    softmax,
    top_classes,
    wilson,
)

QUICK = settings(derandomize=True, max_examples=80, deadline=None)
LOGITS = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=st.floats(-50, 50, width=32)
)


def random_case(seed):
    """Return logits of 300 images and seven classes that are often correct, without ties, and the labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 7, 300)
    logits = generator.normal(size=(300, 7)).astype(np.float32)
    logits[np.arange(300), labels] += 1
    return logits, labels


def test_ranks_and_loss_equal_a_manual_computation():
    logits = np.array([[3.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 5.0, 9.0]], np.float32)
    labels = np.array([2, 1, 2])
    assert rank_of_truth(logits, labels).tolist() == [1, 1, 0]  # ties go to the lower index
    p = np.exp([3, 1, 2]) / np.exp([3, 1, 2]).sum()
    assert cross_entropy(logits, labels)[:2] == pytest.approx([-np.log(p[2]), np.log(3)])


@given(LOGITS, st.data())
@QUICK
def test_ranks_top_classes_and_loss_are_consistent(logits, data):
    labels = np.array([data.draw(st.integers(0, logits.shape[1] - 1)) for _ in logits])
    rank = rank_of_truth(logits, labels)
    for k in range(1, logits.shape[1] + 1):
        in_top = (top_classes(logits, k) == labels[:, None]).any(axis=1)
        assert ((rank < k) == in_top).all()
    truth = softmax(logits)[np.arange(len(labels)), labels]
    assert np.exp(-cross_entropy(logits, labels)) == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_scikit_learn_and_scipy(seed):
    logits, labels = random_case(seed)
    rank = rank_of_truth(logits, labels)
    for k in (1, 2, 5):
        expected = sklearn.metrics.top_k_accuracy_score(labels, logits, k=k, labels=range(7))
        assert np.mean(rank < k) == pytest.approx(expected)
    probabilities = softmax(logits)
    np.testing.assert_allclose(probabilities, scipy.special.softmax(logits.astype(np.float64), axis=1), rtol=1e-12)
    loss = sklearn.metrics.log_loss(labels, probabilities, labels=range(7))
    assert cross_entropy(logits, labels).mean() == pytest.approx(loss, rel=1e-9)
    predicted = top_classes(logits, 1)[:, 0]
    assert (confusion(labels, predicted, 7) == sklearn.metrics.confusion_matrix(labels, predicted)).all()


@pytest.mark.parametrize("seed", range(5))
def test_calibration_equals_scikit_learn(seed):
    logits, labels = random_case(seed)
    confidence = softmax(logits).max(axis=1)
    correct = rank_of_truth(logits, labels) == 0
    result = calibration(confidence, correct)
    accuracies, means = calibration_curve(correct, confidence, n_bins=BINS, strategy="uniform")
    filled = [i for i, count in enumerate(result.counts) if count]
    np.testing.assert_allclose([result.accuracy[i] for i in filled], accuracies)
    np.testing.assert_allclose([result.confidence[i] for i in filled], means)
    counts = np.array([result.counts[i] for i in filled])
    assert counts.sum() == 300
    assert result.error == pytest.approx((np.abs(accuracies - means) * counts).sum() / 300)


def test_calibration_equals_a_manual_computation():
    """Edges are part of the lower bin: 2/15 is in the second bin, 0 in the first and 1 in the last."""
    result = calibration(np.array([0.0, 2 / 15, 1.0, 1.0]), np.array([False, True, True, False]))
    assert (result.counts[0], result.counts[1], result.counts[2], result.counts[14]) == (1, 1, 0, 2)
    assert result.error == pytest.approx((0 + (1 - 2 / 15) + 0.5 * 2) / 4)
    assert calibration(np.array([]), np.array([], bool)).error == 0


@given(st.integers(0, 2000), st.integers(1, 2000), st.sampled_from([0.9, 0.95, 0.99]))
@QUICK
def test_wilsons_interval_equals_statsmodels(successes, count, confidence):
    successes = min(successes, count)
    low, high = wilson(successes, count, confidence)
    expected = proportion_confint(successes, count, 1 - confidence, "wilson")
    np.testing.assert_allclose((low, high), [100 * bound for bound in expected], atol=1e-9)
    assert low <= share(successes, count) <= high


def test_a_proportion_of_no_images_is_undefined():
    assert math.isnan(share(0, 0)) and wilson(0, 0) == (0, 100)


@given(st.integers(0, 400), st.integers(0, 400))
@QUICK
def test_mcnemar_equals_scipy_and_statsmodels(first, second):
    p_value = mcnemar(first, second)
    if first + second:
        assert p_value == pytest.approx(scipy.stats.binomtest(first, first + second, 0.5).pvalue, rel=1e-9)
        assert p_value == pytest.approx(statsmodels_mcnemar([[5, first], [second, 5]], exact=True).pvalue, rel=1e-9)
    assert p_value == mcnemar(second, first) and 0 <= p_value <= 1


@pytest.mark.slow
def test_mcnemar_is_exact_for_all_images_of_imagenet():
    """The integers have 50,000 bits, and the tail can be far below the smallest float."""
    assert mcnemar(25_000, 25_000) == 1
    assert mcnemar(0, 50_000) == 0
    assert mcnemar(24_700, 25_300) == pytest.approx(scipy.stats.binomtest(24_700, 50_000).pvalue, rel=1e-6)


def test_the_paired_difference_equals_a_manual_computation():
    difference, low, high = paired_difference(10, 30, 500)
    assert difference == 4
    p, q, n = 10.5 / 502, 30.5 / 502, 502
    half = 1.959964 * math.sqrt((p + q - (q - p) ** 2) / n)
    assert (low, high) == pytest.approx((100 * (q - p - half), 100 * (q - p + half)), rel=1e-6)
    assert paired_difference(30, 10, 500) == pytest.approx((-4, -high, -low))
    assert paired_difference(0, 1, 1)[2] <= 100


@pytest.mark.parametrize("probabilities", [(0.02, 0.04), (0.1, 0.1), (0.01, 0.01)])
def test_the_paired_interval_keeps_its_confidence_level(probabilities):
    """About 95% of the intervals of 2,000 random pairs of runs contain the true difference."""
    generator = np.random.default_rng(0)
    first, second = probabilities
    drawn = generator.multinomial(400, [first, second, 1 - first - second], 2000)
    truth = 100 * (second - first)
    inside = 0
    for only_first, only_second, _ in drawn:
        _, low, high = paired_difference(int(only_first), int(only_second), 400)
        inside += low <= truth <= high
    assert 0.935 <= inside / 2000 <= 0.985


def predictions(classes, images_per_class, accuracy, seed=0):
    """Return true classes, and predictions that are correct with this probability and random otherwise."""
    generator = np.random.default_rng(seed)
    truth = np.repeat(np.arange(classes), images_per_class)
    guesses = generator.integers(0, classes, len(truth))
    return truth, np.where(generator.random(len(truth)) < accuracy, truth, guesses)


def derangement(classes):
    return np.roll(np.random.default_rng(1).permutation(classes), 1)


@pytest.mark.parametrize(
    ("classes", "images_per_class", "accuracy"), [(10, 12, 0.9), (10, 5, 1), (37, 5, 0.8), (300, 2, 0.9), (2, 20, 1)]
)
def test_permuted_classes_are_detected(classes, images_per_class, accuracy):
    truth, predicted = predictions(classes, images_per_class, accuracy)
    order = np.arange(classes)[::-1] if classes == 2 else derangement(classes)
    detected = other_order(order[truth], predicted)
    assert detected is not None and detected.all
    assert sum(order[prediction] == true for true, prediction in detected.moved.items()) > 0.8 * classes
    assert detected.explained > 100 * accuracy - 15


@pytest.mark.parametrize("step", [1, -1])
def test_labels_shifted_by_one_are_detected_with_one_image_per_class(step):
    truth = np.arange(20)
    detected = other_order(truth + step, truth)
    assert detected is not None and {prediction - true for true, prediction in detected.moved.items()} == {-step}


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
@pytest.mark.parametrize("images_per_class", [1, 2, 20])
@pytest.mark.parametrize("accuracy", [0, 0.1, 0.5, 0.9, 1])
def test_classes_in_the_right_order_are_not_reported(classes, images_per_class, accuracy):
    assert other_order(*predictions(classes, images_per_class, accuracy, seed=3)) is None


def test_weak_predictions_are_not_reported():
    """The cases are one class predicted for all images, random wrong classes, and one class predicted for another."""
    truth = np.repeat(np.arange(10), 20)
    assert other_order(truth, np.full(200, 3)) is None
    assert other_order(np.arange(10), np.random.default_rng(0).permutation(1000)[:10]) is None
    assert other_order(truth, np.where(truth == 4, 9, truth)) is None


def test_two_swapped_classes_of_ten_are_detected():
    truth, predicted = predictions(10, 20, 1)
    swapped = np.select([truth == 3, truth == 4], [4, 3], truth)
    detected = other_order(swapped, predicted)
    assert detected is not None and detected.moved == {3: 4, 4: 3} and not detected.all and detected.images == 40
    half = np.where(np.arange(200) % 2, swapped, truth)  # half are wrong, because of a weak classifier or wrong labels
    assert other_order(half, predicted) is None


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_softmax_rejects_logits_that_are_not_finite(value):
    logits = np.ones((3, 4), np.float32)
    assert first_not_finite(logits) is None and first_not_finite(logits[:0]) is None
    logits[1:, 2] = value
    assert first_not_finite(logits) == 1
    with pytest.raises(NumbersDisagree, match="logits are not finite"):
        softmax(logits)
