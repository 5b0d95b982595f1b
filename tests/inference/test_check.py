"""The check of an export by itself: what it pools, and what it does not let pass."""

import dataclasses

import numpy as np
import pytest

from conftest import DIGITS, needs_torch
from fcvit.errors import NumbersDisagree
from fcvit.inference import check as task
from fcvit.inference.interface import Interface
from fcvit.verification.equivalence import RATIO_LIMIT
from fcvit.weights.reading import read_weights

INTERFACE = Interface((32, 32), uint8=True, probabilities=False, preprocessing=DIGITS.variant.preprocessing)
IMAGES = np.arange(6, dtype=np.uint8)[:, None, None, None] + np.zeros((6, 3, 32, 32), np.uint8)
EXACT = np.random.default_rng(0).normal(size=(6, 10))


@pytest.fixture
def yardstick(monkeypatch):
    """PyTorch's float32: off by 1e-7 everywhere, but by luck by a tenth of it on the first image."""
    single = EXACT + 1e-7 * np.array([0.1, 1, 1, 1, 1, 1])[:, None]
    monkeypatch.setattr(task, "reference", lambda *_: ([EXACT], [single], "torch"))


def outputs(images, off=1e-7):
    """Of an export that is off by as much as PyTorch usually is; an image's pixels are its number."""
    return [EXACT[images[:, 0, 0, 0]] + off]


def test_luck_with_a_single_image_refuses_nothing(yardstick):
    found = task.check_export(outputs, None, INTERFACE, IMAGES, "it")
    assert found.passed and found.ratio == pytest.approx(1.1, abs=0.01) and found.largest == pytest.approx(1e-7)


@pytest.mark.parametrize("wrong", ["together", "alone"])
def test_what_is_wrong_in_a_batch_or_alone_is_seen(yardstick, wrong):
    def faulty(images):
        return outputs(images, 1e-6 if (wrong == "together") == (len(images) > 1) else 1e-7)

    with pytest.raises(NumbersDisagree, match=rf"it computes other numbers .*\(limit {RATIO_LIMIT}\)"):
        task.check_export(faulty, None, INTERFACE, IMAGES, "it")


@pytest.mark.parametrize("give", [lambda o: o[:1], lambda o: o[:, :5], lambda o: o[None], lambda o: o * np.nan])
def test_outputs_of_another_shape_or_none_never_pass(yardstick, give):
    with pytest.raises(NumbersDisagree, match="it computes other numbers"):
        task.check_export(lambda images: [give(outputs(images)[0])], None, INTERFACE, IMAGES, "it")


@needs_torch
def test_weights_that_overflow_are_told_from_a_wrong_export(digits_tensors, digits_pth, monkeypatch):
    weights = read_weights(digits_pth)
    large = {**digits_tensors, "head.weight": np.full((10, 48), 3e38, np.float32)}
    with pytest.raises(NumbersDisagree, match=r"digits\.pth: what it computes is not finite in float32"):
        task.reference(dataclasses.replace(weights, tensors=large), INTERFACE, IMAGES)
