"""Tests of the check of an export: how it pools images, and which faults it detects."""

import dataclasses
import types

import numpy as np
import pytest

from conftest import DIGITS, needs_torch
from fcvit.errors import NumbersDisagree
from fcvit.inference import check
from fcvit.inference.interface import Interface
from fcvit.verification.equivalence import RATIO_LIMIT
from fcvit.weights.reading import read_weights

INTERFACE = Interface((32, 32), uint8=True, probabilities=False, preprocessing=DIGITS.variant.preprocessing)
IMAGES = np.arange(6, dtype=np.uint8)[:, None, None, None] + np.zeros((6, 3, 32, 32), np.uint8)
WEIGHTS = types.SimpleNamespace(spec=DIGITS)
EXACT = np.random.default_rng(0).normal(size=(6, 10))


@pytest.fixture
def yardstick(monkeypatch):
    """Replace the reference by float32 outputs with an error of 1e-7, and a tenth of that on the first image."""
    single = EXACT + 1e-7 * np.array([0.1, 1, 1, 1, 1, 1])[:, None]
    monkeypatch.setattr(check, "reference", lambda *_: ([EXACT], [single], "torch"))


def outputs(images, off=1e-7):
    """Return the outputs of an export with a usual float32 error. The pixels of an image contain its index."""
    return [EXACT[images[:, 0, 0, 0]] + off]


def test_a_small_reference_error_on_one_image_does_not_fail_the_check(yardstick):
    result = check.check_export(outputs, WEIGHTS, INTERFACE, IMAGES, "it")
    assert result.passed and result.ratio == pytest.approx(1.1, abs=0.01) and result.largest == pytest.approx(1e-7)


@pytest.mark.parametrize("wrong", ["together", "alone"])
def test_errors_in_a_batch_or_for_a_single_image_are_detected(yardstick, wrong):
    def faulty(images):
        return outputs(images, 1e-6 if (wrong == "together") == (len(images) > 1) else 1e-7)

    with pytest.raises(NumbersDisagree, match=rf"it: .* times .*torch \(limit {RATIO_LIMIT}\)"):
        check.check_export(faulty, WEIGHTS, INTERFACE, IMAGES, "it")


@pytest.mark.parametrize("give", [lambda o: o[:1], lambda o: o[:, :5], lambda o: o[None], lambda o: o * np.nan])
def test_outputs_with_a_wrong_shape_or_nan_are_rejected(yardstick, give):
    with pytest.raises(NumbersDisagree, match=rf"it: .*limit {RATIO_LIMIT}"):
        check.check_export(lambda images: [give(outputs(images)[0])], WEIGHTS, INTERFACE, IMAGES, "it")


@needs_torch
def test_weights_that_overflow_have_their_own_message(digits_tensors, digits_pth, monkeypatch):
    weights = read_weights(digits_pth)
    large = {**digits_tensors, "head.weight": np.full((10, 48), 3e38, np.float32)}
    with pytest.raises(NumbersDisagree, match=r"digits\.pth: .*float32 .*not finite"):
        check.reference(dataclasses.replace(weights, tensors=large), INTERFACE, IMAGES)
