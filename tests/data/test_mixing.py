"""Test mixup and CutMix: the pixels, and targets that match the share of each image."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcvit.data.transforms.mixing import draw_rectangle, mix, smoothed
from fcvit.errors import UsageError

QUICK = settings(derandomize=True, deadline=None, max_examples=60)
BATCHES = st.integers(1, 7)
SIDES = st.integers(1, 24)


def seeded(*parts):
    return np.random.default_rng(list(parts))


def constant_images(*values, height=16, width=12):
    """A batch of images with a single value each."""
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), 3, height, width)).copy()


def test_smoothed_targets_equal_a_manual_computation():
    result = smoothed(np.array([2, 0]), 4, 0.1)
    np.testing.assert_allclose(result, [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]], rtol=1e-6)
    assert result.dtype == np.float32


def test_labels_are_only_smoothed_if_mixing_is_off():
    pixels, generator = seeded(0).integers(0, 256, (3, 3, 5, 7), np.uint8), seeded(1)
    mixed, targets = mix(pixels, np.array([0, 1, 2]), 3, generator, mixup=0, cutmix=0, smoothing=0.3)
    assert np.array_equal(mixed, pixels)
    np.testing.assert_allclose(targets, 0.1 + 0.7 * np.eye(3), rtol=1e-6)
    assert generator.random() == seeded(1).random()  # nothing was drawn


def test_mixup_equals_a_manual_computation():
    """Lambda is the first random number. The batch is mixed with the reversed batch and rounded to nearest."""
    pixels = seeded(2).integers(0, 256, (5, 3, 6, 4), np.uint8)
    labels = np.array([0, 1, 2, 3, 0])
    share = seeded(3).beta(0.8, 0.8)
    mixed, targets = mix(pixels, labels, 4, seeded(3), cutmix=0, smoothing=0.2)
    exact = share * pixels.astype(float) + (1 - share) * pixels[::-1]
    assert 0.05 < share < 0.95 and mixed.dtype == np.uint8 and np.array_equal(mixed, np.rint(exact).astype(np.uint8))
    hot = 0.05 + 0.8 * np.eye(4)[labels]
    np.testing.assert_allclose(targets, share * hot + (1 - share) * hot[::-1], rtol=1e-5)
    assert np.array_equal(mixed[2], pixels[2])  # the middle of an odd batch


def test_mixup_rounds_to_nearest():
    """Rounding down would darken the images by half a value on average."""
    mixed = np.concatenate(
        [
            mix(constant_images(100, 101, height=2, width=2), np.array([0, 1]), 2, seeded(4, i), cutmix=0)[0]
            for i in range(200)
        ]
    )
    assert abs(mixed.mean() - 100.5) < 0.01


def test_cutmix_equals_a_manual_computation():
    pixels = seeded(5).integers(0, 256, (4, 3, 20, 30), np.uint8)
    generator = seeded(6)
    share = generator.beta(1.0, 1.0)
    row, column = int(generator.integers(20)), int(generator.integers(30))
    half_height, half_width = int(20 * math.sqrt(1 - share)) // 2, int(30 * math.sqrt(1 - share)) // 2
    mixed, targets = mix(pixels, np.arange(4), 4, seeded(6), mixup=0, smoothing=0)
    expected, cut = pixels.copy(), 0
    for y in range(20):
        for x in range(30):
            if row - half_height <= y < row + half_height and column - half_width <= x < column + half_width:
                expected[:, :, y, x] = pixels[::-1, :, y, x]
                cut += 1
    assert 0 < cut < 600 and np.array_equal(mixed, expected)
    share = 1 - cut / 600
    np.testing.assert_allclose(targets, share * np.eye(4) + (1 - share) * np.eye(4)[::-1], rtol=1e-6)


@given(BATCHES, SIDES, SIDES, st.integers(0, 10**6), st.sampled_from([0.2, 1.0, 5.0]))
@QUICK
def test_targets_of_cutmix_equal_the_share_of_pixels(count, height, width, seed, alpha):
    """Every image has a different value and class, so that the pixels of each image can be counted."""
    pixels = constant_images(*range(count), height=height, width=width)
    mixed, targets = mix(pixels, np.arange(count), count, seeded(seed), mixup=0, cutmix=alpha, smoothing=0)
    for index in range(count):
        shares = [(mixed[index] == value).mean() for value in range(count)]
        np.testing.assert_allclose(targets[index], shares, atol=1e-6)
        assert {index, count - 1 - index} >= set(np.unique(mixed[index]))


@given(BATCHES, SIDES, SIDES, st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.8, 3.0]), st.floats(0, 0.9))
@QUICK
def test_targets_are_distributions(count, height, width, seed, alpha, smoothing):
    generator = seeded(seed)
    pixels = generator.integers(0, 256, (count, 3, height, width), np.uint8)
    labels = generator.integers(0, 9, count)
    before = pixels.copy()
    mixed, targets = mix(pixels, labels, 9, generator, mixup=alpha, smoothing=smoothing)
    assert mixed.shape == pixels.shape and mixed.dtype == np.uint8 and np.array_equal(pixels, before)
    assert targets.shape == (count, 9) and targets.dtype == np.float32
    np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-6)
    assert targets.min() >= smoothing / 9 - 1e-7 and targets.max() <= 1 - smoothing + smoothing / 9 + 1e-6
    # Two images that are mixed with each other have the same weights for the own and the other class.
    own, other = targets[np.arange(count), labels], targets[np.arange(count), labels[::-1]]
    np.testing.assert_allclose(own, own[::-1], atol=1e-6)
    np.testing.assert_allclose(other, other[::-1], atol=1e-6)


@given(st.integers(0, 255), BATCHES, st.integers(0, 10**6), st.sampled_from([(0.8, 0.0), (0.0, 1.0), (0.1, 0.1)]))
@QUICK
def test_equal_images_do_not_change(value, count, seed, alphas):
    pixels = constant_images(*[value] * count)
    mixed, targets = mix(pixels, np.full(count, 3), 5, seeded(seed), mixup=alphas[0], cutmix=alphas[1])
    assert np.array_equal(mixed, pixels)
    np.testing.assert_allclose(targets, smoothed(np.full(count, 3), 5, 0.1), rtol=1e-6)


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0, 1), st.integers(0, 10**6))
@QUICK
def test_a_rectangle_is_inside_the_image_and_not_too_large(height, width, share, seed):
    top, bottom, left, right = draw_rectangle(height, width, share, seeded(seed))
    assert 0 <= top <= bottom <= height and 0 <= left <= right <= width
    side = math.sqrt(1 - share)
    assert bottom - top <= height * side and right - left <= width * side


def test_rectangles_have_the_right_size_and_uniform_centers():
    boxes = np.array([draw_rectangle(40, 60, 0.75, seeded(7, i)) for i in range(3000)])
    heights, widths = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    assert heights.max() == 20 and widths.max() == 30  # half the sides of the image
    assert heights.min() == 10 and widths.min() == 15  # clipped to half the size at the border
    # The center is uniform over the rows. 10 of 40 rows clip the rectangle at the top and 9 at the bottom.
    assert abs(np.mean(heights < 20) - 19 / 40) < 0.04 and abs(np.mean(widths < 30) - 29 / 60) < 0.04
    assert draw_rectangle(40, 60, 1.0, seeded(8))[0::2] == draw_rectangle(40, 60, 1.0, seeded(8))[1::2]  # empty


def test_lambda_and_the_choice_of_method_have_the_right_distribution():
    pixels = constant_images(0, 255, height=32, width=32)
    cut, lambdas = 0, []
    for seed in range(2000):
        mixed, targets = mix(pixels, np.array([0, 1]), 2, seeded(9, seed), smoothing=0)
        values = np.unique(mixed[0])
        if set(values.tolist()) <= {0, 255}:
            cut += 1
        else:
            lambdas.append(targets[0, 0])
            assert abs(values[0] - 255 * targets[0, 1]) <= 0.5 + 1e-3
    # Mixup with lambda close to 0 or 1 sometimes looks like CutMix here.
    assert abs(cut / 2000 - 0.5) < 0.05
    # Beta(0.8, 0.8): mean 0.5, variance 1 / (4 (2 * 0.8 + 1)).
    assert abs(np.mean(lambdas) - 0.5) < 0.04 and abs(np.var(lambdas) - 1 / (4 * 2.6)) < 0.012


@pytest.mark.parametrize(("switch", "expected"), [(0.0, {False}), (1.0, {True})])
def test_the_switch_selects_mixup_or_cutmix(switch, expected):
    pixels = constant_images(0, 200)
    result = [mix(pixels, np.array([0, 1]), 2, seeded(10, seed), switch=switch, mixup=50)[0] for seed in range(40)]
    assert {set(np.unique(mixed).tolist()) <= {0, 200} for mixed in result} == expected


def test_the_same_seed_gives_the_same_batch():
    pixels = seeded(11).integers(0, 256, (6, 3, 9, 9), np.uint8)
    first, second = (mix(pixels, np.arange(6), 6, seeded(12)) for _ in range(2))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": constant_images(1, 2).astype(np.float32)}, r"pixels float32 \(2, 3, 16, 12\): expected uint8"),
        ({"pixels": constant_images(1, 2)[0]}, r"pixels uint8 \(3, 16, 12\): expected .* \(B, 3, H, W\)"),
        ({"pixels": constant_images(1, 2)[:, :1]}, r"pixels uint8 \(2, 1, 16, 12\): expected .* \(B, 3, H, W\)"),
        ({"pixels": constant_images(1, 2)[:0], "labels": np.array([], int)}, "uint8 of nonzero shape"),
        ({"labels": np.array([0.0, 1.0])}, r"labels float64 \(2,\): expected integers of shape \(2,\)"),
        ({"labels": np.array([0, 1, 1])}, r"labels int64 \(3,\): expected integers of shape \(2,\)"),
        ({"labels": np.array([0, 3])}, "labels 0 to 3, num_classes 3: expected labels from 0"),
        ({"labels": np.array([-1, 0])}, "labels -1 to 0, num_classes 3"),
        ({"mixup": -1}, r"mixup -1: expected a number from 0 \(off\)"),
        ({"cutmix": math.nan}, "cutmix nan: expected"),
        ({"switch": 1.5}, r"switch 1\.5: expected a number from 0 to 1"),
        ({"smoothing": 1.0}, r"smoothing 1\.0: expected a number from 0 to below 1"),
    ],
)
def test_invalid_arguments_are_rejected(change, message):
    arguments = {
        "pixels": constant_images(1, 2),
        "labels": np.array([0, 1], np.int64),
        "num_classes": 3,
        "generator": seeded(0),
    }
    with pytest.raises(UsageError, match=message) as caught:
        mix(**arguments | change)
    assert "\n" not in str(caught.value)
