"""Figures by hand, against each other, and against scikit-learn, SciPy and statsmodels."""

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
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
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

quickly = settings(derandomize=True, max_examples=80, deadline=None)
LOGITS = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=st.floats(-50, 50, width=32)
)


def random_case(seed):
    """300 images, seven classes, logits that are often right; no two of an image are equal."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 7, 300)
    logits = generator.normal(size=(300, 7)).astype(np.float32)
    logits[np.arange(300), labels] += 1
    return logits, labels


def test_ranks_and_loss_by_hand():
    logits = np.array([[3.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 5.0, 9.0]], np.float32)
    labels = np.array([2, 1, 2])
    assert rank_of_truth(logits, labels).tolist() == [1, 1, 0]  # of equal logits the lower index is first
    p = np.exp([3, 1, 2]) / np.exp([3, 1, 2]).sum()
    assert cross_entropy(logits, labels)[:2] == pytest.approx([-np.log(p[2]), np.log(3)])


@given(LOGITS, st.data())
@quickly
def test_ranks_best_classes_and_loss_agree(logits, data):
    labels = np.array([data.draw(st.integers(0, logits.shape[1] - 1)) for _ in logits])
    rank = rank_of_truth(logits, labels)
    for k in range(1, logits.shape[1] + 1):
        in_top = (top_classes(logits, k) == labels[:, None]).any(axis=1)
        assert ((rank < k) == in_top).all()
    truth = softmax(logits)[np.arange(len(labels)), labels]
    assert np.exp(-cross_entropy(logits, labels)) == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_as_scikit_learn_and_scipy_have_it(seed):
    logits, labels = random_case(seed)
    rank = rank_of_truth(logits, labels)
    for k in (1, 2, 5):
        theirs = sklearn.metrics.top_k_accuracy_score(labels, logits, k=k, labels=range(7))
        assert np.mean(rank < k) == pytest.approx(theirs)
    probabilities = softmax(logits)
    np.testing.assert_allclose(probabilities, scipy.special.softmax(logits.astype(np.float64), axis=1), rtol=1e-12)
    loss = sklearn.metrics.log_loss(labels, probabilities, labels=range(7))
    assert cross_entropy(logits, labels).mean() == pytest.approx(loss, rel=1e-9)
    predicted = top_classes(logits, 1)[:, 0]
    assert (confusion(labels, predicted, 7) == sklearn.metrics.confusion_matrix(labels, predicted)).all()


@pytest.mark.parametrize("seed", range(5))
def test_calibration_as_scikit_learn_has_it(seed):
    logits, labels = random_case(seed)
    confidence = softmax(logits).max(axis=1)
    correct = rank_of_truth(logits, labels) == 0
    ours = calibration(confidence, correct)
    accuracies, means = calibration_curve(correct, confidence, n_bins=BINS, strategy="uniform")
    filled = [i for i, count in enumerate(ours.counts) if count]
    np.testing.assert_allclose([ours.accuracy[i] for i in filled], accuracies)
    np.testing.assert_allclose([ours.confidence[i] for i in filled], means)
    counts = np.array([ours.counts[i] for i in filled])
    assert counts.sum() == 300
    assert ours.error == pytest.approx((np.abs(accuracies - means) * counts).sum() / 300)


def test_calibration_by_hand():
    """Edges belong below: 2/15 is in the second bin, 0 in the first, 1 in the last."""
    found = calibration(np.array([0.0, 2 / 15, 1.0, 1.0]), np.array([False, True, True, False]))
    assert (found.counts[0], found.counts[1], found.counts[2], found.counts[14]) == (1, 1, 0, 2)
    assert found.error == pytest.approx((0 + (1 - 2 / 15) + 0.5 * 2) / 4)
    assert calibration(np.array([]), np.array([], bool)).error == 0


@given(st.integers(0, 2000), st.integers(1, 2000), st.sampled_from([0.9, 0.95, 0.99]))
@quickly
def test_wilsons_interval_as_statsmodels_has_it(successes, count, confidence):
    successes = min(successes, count)
    low, high = wilson(successes, count, confidence)
    theirs = proportion_confint(successes, count, 1 - confidence, "wilson")
    np.testing.assert_allclose((low, high), [100 * bound for bound in theirs], atol=1e-9)
    assert low <= share(successes, count) <= high


def test_nothing_is_no_figure():
    assert math.isnan(share(0, 0)) and wilson(0, 0) == (0, 100)


@given(st.integers(0, 400), st.integers(0, 400))
@quickly
def test_mcnemar_as_scipy_and_statsmodels_have_it(first, second):
    ours = mcnemar(first, second)
    if first + second:
        assert ours == pytest.approx(scipy.stats.binomtest(first, first + second, 0.5).pvalue, rel=1e-9)
        assert ours == pytest.approx(their_mcnemar([[5, first], [second, 5]], exact=True).pvalue, rel=1e-9)
    assert ours == mcnemar(second, first) and 0 <= ours <= 1


def test_mcnemar_of_all_of_imagenet():
    """Whole numbers of 50,000 bits, and a tail far below what a float can hold."""
    assert mcnemar(25_000, 25_000) == 1
    assert mcnemar(0, 50_000) == 0
    assert mcnemar(24_700, 25_300) == pytest.approx(scipy.stats.binomtest(24_700, 50_000).pvalue, rel=1e-6)


def test_paired_difference_by_hand():
    difference, low, high = paired_difference(10, 30, 500)
    assert difference == 4
    p, q, n = 10.5 / 502, 30.5 / 502, 502
    half = 1.959964 * math.sqrt((p + q - (q - p) ** 2) / n)
    assert (low, high) == pytest.approx((100 * (q - p - half), 100 * (q - p + half)), rel=1e-6)
    assert paired_difference(30, 10, 500) == pytest.approx((-4, -high, -low))
    assert paired_difference(0, 1, 1)[2] <= 100


@pytest.mark.parametrize("probabilities", [(0.02, 0.04), (0.1, 0.1), (0.01, 0.01)])
def test_the_paired_interval_keeps_its_level(probabilities):
    """Of 2,000 drawn pairs of runs, about 95 in 100 intervals hold the true difference."""
    generator = np.random.default_rng(0)
    first, second = probabilities
    drawn = generator.multinomial(400, [first, second, 1 - first - second], 2000)
    truth = 100 * (second - first)
    inside = 0
    for only_first, only_second, _ in drawn:
        _, low, high = paired_difference(int(only_first), int(only_second), 400)
        inside += low <= truth <= high
    assert 0.935 <= inside / 2000 <= 0.985


def answers(classes, each, right, seed=0):
    """True classes, and the answers of a classifier that is right so often and else guesses."""
    generator = np.random.default_rng(seed)
    truth = np.repeat(np.arange(classes), each)
    guesses = generator.integers(0, classes, len(truth))
    return truth, np.where(generator.random(len(truth)) < right, truth, guesses)


def derangement(classes):
    return np.roll(np.random.default_rng(1).permutation(classes), 1)


@pytest.mark.parametrize(
    ("classes", "each", "right"), [(10, 12, 0.9), (10, 5, 1), (37, 5, 0.8), (300, 2, 0.9), (2, 20, 1)]
)
def test_permuted_classes_are_noticed(classes, each, right):
    truth, predicted = answers(classes, each, right)
    order = np.arange(classes)[::-1] if classes == 2 else derangement(classes)
    found = other_order(order[truth], predicted)
    assert found is not None and found.all
    assert sum(order[answer] == true for true, answer in found.moved.items()) > 0.8 * classes
    assert found.explained > 100 * right - 15


@pytest.mark.parametrize("step", [1, -1])
def test_labels_that_are_one_off_are_noticed_with_one_image_of_a_class(step):
    truth = np.arange(20)
    found = other_order(truth + step, truth)
    assert found is not None and {answer - true for true, answer in found.moved.items()} == {-step}


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
@pytest.mark.parametrize("each", [1, 2, 20])
@pytest.mark.parametrize("right", [0, 0.1, 0.5, 0.9, 1])
def test_classes_in_their_order_give_no_hint(classes, each, right):
    assert other_order(*answers(classes, each, right, seed=3)) is None


def test_weak_answers_give_no_hint():
    """All images taken for one class; ten different wrong classes of a thousand; one class taken for another."""
    truth = np.repeat(np.arange(10), 20)
    assert other_order(truth, np.full(200, 3)) is None
    assert other_order(np.arange(10), np.random.default_rng(0).permutation(1000)[:10]) is None
    assert other_order(truth, np.where(truth == 4, 9, truth)) is None


def test_two_swapped_classes_of_ten_are_noticed():
    truth, predicted = answers(10, 20, 1)
    swapped = np.select([truth == 3, truth == 4], [4, 3], truth)
    found = other_order(swapped, predicted)
    assert found is not None and found.moved == {3: 4, 4: 3} and not found.all and found.images == 40
    half = np.where(np.arange(200) % 2, swapped, truth)  # half of them wrong: a weak classifier, or wrong labels
    assert other_order(half, predicted) is None


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_logits_that_are_not_finite_have_no_probabilities(value):
    logits = np.ones((3, 4), np.float32)
    assert first_not_finite(logits) is None and first_not_finite(logits[:0]) is None
    logits[1:, 2] = value
    assert first_not_finite(logits) == 1
    with pytest.raises(NumbersDisagree, match="logits are not finite"):
        softmax(logits)
