"""Test augmentation: the operations by hashes of their pixels, the random numbers by their distribution."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import golden_json, image_by_rule, sha256
from fcvit.data.transforms import augment as module
from fcvit.data.transforms.augment import (
    FILL,
    OPERATIONS,
    Augmentation,
    apply_operation,
    augment,
    draw_crop,
    draw_erasing,
    draw_operations,
    operation_argument,
    pixel_generator,
)
from fcvit.data.transforms.preprocess import crop, planes
from fcvit.errors import BadImages, UsageError
from fcvit.models.variants import Preprocessing

GOLDEN = golden_json("randaugment.json")
PLAIN = Augmentation(24, rand_augment=0, flip=0, crop_scale=(1, 1), crop_ratio=(1, 1))
SIZES = st.one_of(st.integers(1, 40), st.sampled_from([1, 2, 3, 500]))
QUICK = settings(derandomize=True, deadline=None, max_examples=40)
# Operations that do not change an image at level 0, including SolarizeIncreasing, whose threshold is then 256.
UNCHANGED_AT_ZERO = tuple(
    name for name in OPERATIONS if name not in ("AutoContrast", "Equalize", "Invert", "PosterizeIncreasing")
)


def seeded(*parts):
    return np.random.default_rng(list(parts))


def equal_pixels(first, second):
    return np.array_equal(np.asarray(first), np.asarray(second))


# Operations


def test_the_golden_file_contains_all_operations():
    assert tuple(GOLDEN["operations"]) == OPERATIONS and tuple(GOLDEN["fill"]) == FILL


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_pixels_of_an_operation_equal_timms(name):
    image = image_by_rule(97, 64)
    for case in GOLDEN["operations"][name]:
        argument = operation_argument(name, case["level"], case["negated"])
        assert ([] if argument is None else [argument]) == case["arguments"]
        result = apply_operation(image, name, case["level"], case["negated"], case["interpolation"])
        assert sha256(np.asarray(result)) == case["sha256"], case
    assert equal_pixels(image, image_by_rule(97, 64))  # the input is not modified


@given(
    st.sampled_from(UNCHANGED_AT_ZERO),
    SIZES,
    SIZES,
    st.booleans(),
    st.sampled_from(["bilinear", "bicubic"]),
)
@QUICK
def test_level_0_does_not_change_an_image(name, width, height, negated, interpolation):
    image = image_by_rule(width, height)
    assert equal_pixels(apply_operation(image, name, 0, negated, interpolation), image)


@given(st.sampled_from(OPERATIONS), st.floats(0, 10), st.booleans(), SIZES, SIZES)
@QUICK
def test_an_operation_keeps_size_and_mode(name, level, negated, width, height):
    result = apply_operation(image_by_rule(width, height), name, level, negated, "bicubic")
    assert result.size == (width, height) and result.mode == "RGB"


@given(st.floats(0, 10))
@QUICK
def test_arguments_are_in_their_ranges(level):
    assert 1 <= operation_argument("PosterizeIncreasing", level, False) <= 4
    for name in ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"):
        assert 0.1 <= operation_argument(name, level, True) <= 1 <= operation_argument(name, level, False) <= 1.9
    for name, highest in (("Rotate", 30), ("ShearX", 0.3), ("TranslateYRel", 0.45)):
        assert 0 <= operation_argument(name, level, False) == -operation_argument(name, level, True) <= highest


def test_empty_areas_are_filled_with_the_mean_of_imagenet():
    white = Image.new("RGB", (20, 20), "white")
    right = np.asarray(apply_operation(white, "TranslateXRel", 10, True, "bilinear"))
    assert (right[:, :9] == FILL).all() and (right[:, 9:] == 255).all()
    down = np.asarray(apply_operation(white, "TranslateYRel", 10, True, "bicubic"))
    assert (down[:9] == FILL).all() and (down[9:] == 255).all()


@pytest.mark.parametrize(
    ("name", "level", "message"),
    [("Shear", 1, "operation 'Shear': expected one of AutoContrast"), ("Rotate", 10.5, "level 10.5: expected")],
)
def test_an_unknown_operation_or_invalid_level_is_rejected(name, level, message):
    with pytest.raises(UsageError, match=message):
        apply_operation(Image.new("RGB", (4, 4)), name, level, False, "bilinear")


# Random numbers


@pytest.mark.slow
def test_operations_have_the_distribution_of_the_recipe():
    generator = seeded(1)
    drawn = [operation for _ in range(6000) for operation in draw_operations(Augmentation(8), generator)]
    assert len(drawn) == 12000
    counts = [sum(operation.name == name for operation in drawn) for name in OPERATIONS]
    assert all(abs(count - 800) < 4 * math.sqrt(800) for count in counts)
    for share in (
        np.mean([operation.applied for operation in drawn]),
        np.mean([operation.negated for operation in drawn]),
        np.mean([operation.interpolation == "bicubic" for operation in drawn]),
    ):
        assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(12000)
    levels = np.array([operation.level for operation in drawn])
    assert levels.min() >= 0 and levels.max() == 10
    # A normal variable with mean 9 and deviation 0.5 is above 10, and is clipped, with a probability of 2.28%.
    assert abs(np.mean(levels == 10) - 0.02275) < 0.006
    assert abs(np.median(levels) - 9) < 0.03 and abs(np.quantile(levels, 0.1587) - 8.5) < 0.04
    # The operations are independent and drawn with replacement.
    names = np.array([operation.name for operation in drawn]).reshape(-1, 2)
    assert abs(np.mean(names[:, 0] == names[:, 1]) - 1 / 15) < 4 * math.sqrt(1 / 15 / 6000)
    applied = np.array([operation.applied for operation in drawn]).reshape(-1, 2)
    assert abs(np.mean(applied.all(axis=1)) - 0.25) < 0.03


@pytest.mark.parametrize(("magnitude", "expected"), [(0, 0), (10, 10), (4.5, 4.5)])
def test_without_deviation_the_level_is_the_magnitude(magnitude, expected):
    drawn = draw_operations(Augmentation(8, rand_augment=9, magnitude=magnitude, magnitude_std=0), seeded(2))
    assert [operation.level for operation in drawn] == [expected] * 9


def test_a_random_crop_has_the_area_and_ratio_of_the_recipe():
    generator = seeded(3)
    boxes = np.array([draw_crop((500, 400), (0.08, 1.0), (3 / 4, 4 / 3), generator) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (right <= 500).all() and (bottom <= 400).all()
    area, ratio = (right - left) * (bottom - top) / 200_000, (right - left) / (bottom - top)
    assert 0.078 < area.min() < 0.09 and 0.9 < area.max() <= 1
    # Nearly all small rectangles fit, so that the area and the logarithm of the ratio are uniform.
    small = area < 0.5
    assert abs(np.median(area[small]) - 0.29) < 0.015
    assert 0.74 < ratio[small].min() < 0.77 and 1.30 < ratio[small].max() < 1.35
    assert abs(np.median(np.log(ratio[small]))) < 0.02 and abs(np.log(ratio[small]).std() - 0.1661) < 0.006
    # The position is uniform over all possible positions.
    assert abs(np.mean(left[small] / (500 - right + left)[small]) - 0.5) < 0.02
    assert abs(np.mean(top[small] / (400 - bottom + top)[small]) - 0.5) < 0.02
    assert left.min() == top.min() == 0 and right.max() == 500 and bottom.max() == 400


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((1, 500), (0, 249, 1, 250)),  # too tall, so the height is limited by the lowest ratio
        ((500, 1), (249, 0, 250, 1)),
        ((2, 500), (0, 248, 2, 251)),  # 2.67 rows, rounded
        ((30, 300), (0, 130, 30, 170)),
        ((300, 30), (130, 0, 170, 30)),
    ],
)
def test_the_center_is_cropped_if_no_rectangle_fits(size, box):
    """No rectangle with at least 90% of the area and a ratio of 3/4 to 4/3 fits."""
    generator = seeded(4)
    assert draw_crop(size, (0.9, 1.0), (3 / 4, 4 / 3), generator) == box
    expected = seeded(4)
    expected.random(20)  # ten tries with two numbers each
    assert generator.random() == expected.random()


def test_a_rectangle_can_be_the_full_image():
    generator, expected = seeded(13), seeded(13)
    assert draw_crop((8, 8), (1, 1), (1, 1), generator) == (0, 0, 8, 8)
    expected.random(2)  # a single try
    assert generator.random() == expected.random()


def test_the_ratio_is_width_divided_by_height():
    left, top, right, bottom = draw_crop((400, 400), (0.08, 0.08), (2, 2), seeded(14))
    assert (right - left, bottom - top) == (160, 80)


def test_positions_of_a_crop_are_uniform():
    generator = seeded(15)
    boxes = np.array([draw_crop((12, 14), (1 / 4, 1 / 4), (12 / 14, 12 / 14), generator) for _ in range(1400)])
    assert (boxes[:, 2:] - boxes[:, :2] == (6, 7)).all()
    for starts, count in ((boxes[:, 0], 7), (boxes[:, 1], 8)):
        counts = np.bincount(starts, minlength=count)
        assert len(counts) == count and (abs(counts - 1400 / count) < 4 * math.sqrt(1400 / count)).all()


def test_the_fallback_is_the_full_image_if_its_ratio_is_in_the_range():
    assert draw_crop((40, 36), (1, 1), (0.8, 0.8), seeded(0)) == (5, 0, 34, 36)
    too_large = (2.9, 3.0)  # no rectangle has this share of the area, so the fallback is used
    assert draw_crop((40, 36), too_large, (3 / 4, 4 / 3), seeded(0)) == (0, 0, 40, 36)


@given(SIZES, SIZES, st.floats(0.001, 1), st.floats(0.05, 20), st.integers(0, 1000))
@QUICK
def test_a_crop_is_not_empty_and_inside_the_image(width, height, scale, ratio, seed):
    left, top, right, bottom = draw_crop((width, height), (scale / 2, scale), (ratio, ratio), seeded(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


# Complete augmentation


@given(
    SIZES,
    SIZES,
    st.integers(1, 40),
    st.sampled_from(["resized", "padded", "centre"]),
    st.integers(0, 60),
    st.integers(),
)
@QUICK
def test_the_result_has_the_right_shape_and_type(width, height, size, crop_kind, padding, seed):
    augmentation = Augmentation(size, crop=crop_kind, padding=padding, rand_augment=3, operation_probability=1)
    result = augment(image_by_rule(width, height), augmentation, seeded(abs(seed)))
    assert result.dtype == np.uint8 and result.shape == (3, size, size) and result.flags.c_contiguous


@pytest.mark.parametrize("seed", range(12))
def test_random_numbers_are_drawn_in_the_documented_order(seed):
    image, filters = image_by_rule(60, 45), ("bilinear", "bicubic")
    generator = seeded(12, seed)
    interpolation = filters[generator.integers(2)]
    box = draw_crop((60, 45), (0.08, 1.0), (3 / 4, 4 / 3), generator)
    expected = image.crop(box).resize((24, 24), getattr(Image.Resampling, interpolation.upper()))
    if generator.random() < 0.5:
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for _ in range(2):
        name = OPERATIONS[generator.integers(15)]
        applied = generator.random() < 0.5
        level = min(10, generator.normal(9, 0.5))
        negated = generator.random() < 0.5
        interpolation = filters[generator.integers(2)]
        if applied:
            expected = apply_operation(expected, name, level, negated, interpolation)
    assert np.array_equal(augment(image, Augmentation(24), seeded(12, seed)), planes(expected))


def test_the_result_does_not_depend_on_the_order_of_the_images():
    images = [image_by_rule(60, 40), image_by_rule(31, 57), image_by_rule(40, 60)]

    def augment_all(order):
        result = {i: augment(images[i], Augmentation(24), pixel_generator(7, 2, i, "augment")) for i in order}
        return [result[i].tobytes() for i in range(3)]

    assert augment_all([0, 1, 2]) == augment_all([2, 0, 1]) and len(set(augment_all([0, 1, 2]))) == 3


def test_every_image_has_different_random_numbers():
    keys = [(seed, epoch, index) for seed in (0, 1, 1 << 32, 1 + (1 << 32)) for epoch in (0, 1) for index in (0, 1, 2)]
    first = {
        pixel_generator(*key, purpose).integers(1 << 62)
        for key in keys
        for purpose in ("augment", "erase", "mix", "sample")
    }
    assert len(first) == 4 * len(keys)
    assert pixel_generator(3 + (9 << 32), 4, 5, "erase").random() == np.random.default_rng([9, 3, 4, 5, 1]).random()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 0, "mix"), "seed -1: expected .* 0 to 9223372036854775807"),
        ((1 << 63, 0, 0, "mix"), "seed 9223372036854775808: expected"),
        ((0, 2**32, 0, "mix"), "epoch 4294967296: expected"),
        ((0, 0, 0.5, "mix"), r"index 0\.5: expected"),
        ((0, 0, 0, "flip"), "purpose 'flip': expected one of augment, erase, mix"),
    ],
)
def test_invalid_seeds_and_positions_are_rejected(arguments, message):
    with pytest.raises(UsageError, match=message):
        pixel_generator(*arguments)


@pytest.mark.parametrize("probability", [0, 0.25, 0.5, 1])
def test_flips_have_the_given_probability(probability):
    image = image_by_rule(24, 24)
    unflipped, generator = planes(image), seeded(6)
    augmentation = dataclasses.replace(PLAIN, flip=probability)
    flipped = 0
    for _ in range(400):
        result = augment(image, augmentation, generator)
        flipped += np.array_equal(result, unflipped[:, :, ::-1])
        assert np.array_equal(result, unflipped[:, :, ::-1]) or np.array_equal(result, unflipped)
    assert abs(flipped / 400 - probability) <= 4 * math.sqrt(probability * (1 - probability) / 400)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_crop_is_resized_without_pixels_from_outside(monkeypatch, interpolation):
    """The crop of a red square on a blue background is completely red."""
    image = Image.new("RGB", (90, 90), "blue")
    image.paste("red", (30, 20, 60, 60))
    monkeypatch.setattr(module, "draw_crop", lambda *_: (30, 20, 60, 60))
    result = augment(image, Augmentation(50, rand_augment=0, crop_interpolation=interpolation), seeded(0))
    assert (result == np.array([255, 0, 0])[:, None, None]).all()


def test_the_interpolation_of_the_crop_is_bilinear_or_bicubic():
    image, generator = image_by_rule(60, 60), seeded(8)
    expected = {
        name: planes(image.resize((24, 24), getattr(Image.Resampling, name.upper())))
        for name in ("bilinear", "bicubic")
    }
    results = [augment(image, PLAIN, generator) for _ in range(200)]
    counts = {name: sum(np.array_equal(result, pixels) for result in results) for name, pixels in expected.items()}
    assert sum(counts.values()) == 200 and 72 <= counts["bilinear"] <= 128
    for name, pixels in expected.items():
        assert np.array_equal(augment(image, dataclasses.replace(PLAIN, crop_interpolation=name), generator), pixels)


@pytest.mark.parametrize("size", [(40, 24), (24, 24), (97, 64), (1, 300), (3, 3)])
def test_the_center_crop_equals_that_of_an_evaluation(size):
    image, generator = image_by_rule(*size), seeded(9)
    result = augment(image, dataclasses.replace(PLAIN, crop="centre"), generator)
    assert np.array_equal(result, crop(image, Preprocessing(input_size=24, crop_fraction=1)))
    expected = seeded(9)
    expected.random()  # only the flip is drawn
    assert generator.random() == expected.random()


def test_a_padded_crop_is_a_uniform_window_in_the_reflected_image():
    image = Image.fromarray(seeded(16).integers(0, 256, (24, 24, 3), np.uint8))
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)), mode="reflect").transpose(2, 0, 1)
    windows = {
        padded[:, top : top + 24, left : left + 24].tobytes(): (top, left) for top in range(9) for left in range(9)
    }
    generator, augmentation = seeded(10), dataclasses.replace(PLAIN, crop="padded")
    positions = np.array([windows[augment(image, augmentation, generator).tobytes()] for _ in range(600)])
    for axis in (0, 1):
        counts = np.bincount(positions[:, axis], minlength=9)
        assert len(counts) == 9 and (abs(counts - 600 / 9) < 4 * math.sqrt(600 / 9)).all()
    assert abs(np.corrcoef(positions.T)[0, 1]) < 0.15


def test_a_padded_crop_of_a_long_image_reaches_both_ends():
    ramp = np.broadcast_to(np.arange(60, dtype=np.uint8)[None, :, None], (20, 60, 3))
    augmentation = Augmentation(20, crop="padded", padding=0, rand_augment=0, flip=0)
    firsts = {
        int(augment(Image.fromarray(ramp.copy()), augmentation, seeded(11, seed))[0, 0, 0]) for seed in range(500)
    }
    assert firsts == set(range(41))


def test_an_image_of_another_mode_is_rejected():
    with pytest.raises(UsageError, match="image of mode L: expected RGB"):
        augment(Image.new("L", (4, 4)), PLAIN, seeded(0))


@pytest.mark.parametrize("crop_kind", ["padded", "centre"])
def test_an_image_that_would_become_too_large_is_rejected(monkeypatch, crop_kind):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80_000)
    with pytest.raises(BadImages, match="1 x 300 pixels would be resized to"):
        augment(Image.new("RGB", (1, 300)), Augmentation(24, crop=crop_kind), seeded(0))
    assert augment(Image.new("RGB", (1, 300)), Augmentation(24), seeded(0)).shape == (3, 24, 24)


# Settings


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("crop_scale", (0, 1), "two numbers (lowest, highest) above 0 and at most 1"),
        ("crop_scale", (0.5, 0.2), "two numbers"),
        ("crop_scale", (0.5, 1.1), "at most 1"),
        ("crop_scale", 0.5, "two numbers"),
        ("crop_scale", (math.nan, 1), "two numbers"),
        ("crop_ratio", (0.5, 1, 2), "two numbers"),
        ("crop_ratio", ("a", "b"), "two numbers"),
    ],
)
def test_the_message_for_an_invalid_range_contains_field_and_value(field, value, expected):
    with pytest.raises(UsageError) as caught:
        Augmentation(**{"size": 224, field: value})
    message = str(caught.value)
    assert message.startswith(f"{field} {value!r}: expected ") and expected in message and "\n" not in message


def test_settings_are_unchanged_after_a_json_round_trip():
    augmentation = Augmentation(32, crop="padded", crop_scale=(0.2, 0.9))
    assert Augmentation(**json.loads(json.dumps(dataclasses.asdict(augmentation)))) == augmentation
    assert hash(Augmentation(32, crop_ratio=[1, 2])) == hash(Augmentation(32, crop_ratio=(1, 2)))


# Random erasing


def erase(images, probability, generators):
    """Draw the rectangles of the images, and draw them over the images."""
    for image, generator in zip(images, generators, strict=True):
        if rectangle := draw_erasing(image.shape[1:], probability, generator):
            image[rectangle.window] = rectangle.noise


def erased(shape, seed, probability=1.0):
    """Return booleans (B, 3, H, W) that mark the changed pixels, and the images."""
    images = np.full(shape, 7, np.float32)
    erase(images, probability, [seeded(seed, i) for i in range(len(images))])
    return images != 7, images


def test_erasing_fills_a_single_rectangle_with_noise():
    changed, images = erased((300, 3, 60, 50), 20)
    shares, ratios, ends = [], [], []
    for mask in changed:
        assert (mask == mask[0]).all() and mask.any()  # equal for all channels
        rows, columns = np.flatnonzero(mask[0].any(axis=1)), np.flatnonzero(mask[0].any(axis=0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert mask[0].sum() == height * width and height < 60 and width < 50
        shares.append(height * width / 3000)
        ratios.append(math.log(height / width))
        ends.append((rows[0], 60 - 1 - rows[-1], columns[0], 50 - 1 - columns[-1]))
    assert 0.015 < min(shares) < 0.03 and 0.31 < max(shares) < 0.345
    assert abs(np.mean(shares) - 0.175) < 0.02
    limit = math.log(1 / 0.3)
    # Rounding to pixels can make the ratio of a small rectangle slightly larger than the drawn ratio.
    assert -limit - 0.15 < min(ratios) < -limit + 0.15 and limit - 0.15 < max(ratios) < limit + 0.15
    assert abs(np.mean(ratios)) < 0.16 and abs(np.std(ratios) - 2 * limit / math.sqrt(12)) < 0.07
    assert (np.min(ends, axis=0) == 0).all()  # all four edges are reached
    noise = images[changed]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01 and len(np.unique(noise)) > 0.99 * len(noise)


@pytest.mark.parametrize("seed", range(6))
def test_erasing_draws_random_numbers_in_the_documented_order(seed):
    generator, expected = seeded(23, seed), np.full((3, 20, 70), 7, np.float32)
    generator.random()
    while True:
        area, ratio = generator.uniform(0.02, 1 / 3) * 1400, generator.uniform(math.log(0.3), math.log(1 / 0.3))
        height, width = round(math.sqrt(area * math.exp(ratio))), round(math.sqrt(area / math.exp(ratio)))
        if height < 20 and width < 70:
            break
    top, left = generator.integers(20 - height + 1), generator.integers(70 - width + 1)
    noise = generator.standard_normal((3, height, width), np.float32)
    expected[:, top : top + height, left : left + width] = noise
    images = np.full((1, 3, 20, 70), 7, np.float32)
    erase(images, 1, [seeded(23, seed)])
    assert np.array_equal(images[0], expected)


@pytest.mark.parametrize("probability", [0, 0.25, 1])
def test_erasing_has_the_given_probability(probability):
    changed, _ = erased((800, 3, 12, 12), 21, probability)
    share = changed.any(axis=(1, 2, 3)).mean()
    assert abs(share - probability) <= 4 * math.sqrt(probability * (1 - probability) / 800)


def test_erasing_an_image_does_not_depend_on_the_other_images():
    images = seeded(22).standard_normal((6, 3, 16, 20), np.float32)
    batch, separate = images.copy(), images.copy()
    erase(batch, 0.5, [pixel_generator(0, 0, i, "erase") for i in range(6)])
    for i in reversed(range(6)):
        erase(separate[i : i + 1], 0.5, [pixel_generator(0, 0, i, "erase")])
    assert np.array_equal(batch, separate) and not np.array_equal(batch, images)


@given(st.integers(0, 3), st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
@QUICK
def test_erasing_leaves_a_part_of_every_row_and_column(count, height, width, seed):
    changed, images = erased((count, 3, height, width), seed)
    assert np.isfinite(images).all() and images.dtype == np.float32
    assert not changed.all(axis=2).any() and not changed.all(axis=3).any()


def test_an_invalid_probability_of_erasing_is_rejected():
    with pytest.raises(UsageError, match=r"probability 1\.5: expected a number from 0 to 1"):
        draw_erasing((4, 4), 1.5, seeded(0))
