"""Augmentation: the operations by hash, everything drawn by property and by count."""

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
    draw_operations,
    erase,
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
# Those that leave an image alone at level 0; SolarizeIncreasing too, as no value reaches its threshold.
IDLE_AT_ZERO = tuple(
    name for name in OPERATIONS if name not in ("AutoContrast", "Equalize", "Invert", "PosterizeIncreasing")
)


def rule(*parts):
    return np.random.default_rng(list(parts))


def same(one, other):
    return np.array_equal(np.asarray(one), np.asarray(other))


# The operations


def test_the_operations_are_those_of_the_golden():
    assert tuple(GOLDEN["operations"]) == OPERATIONS and tuple(GOLDEN["fill"]) == FILL


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_timms_pixels(name):
    image = image_by_rule(97, 64)
    for case in GOLDEN["operations"][name]:
        argument = operation_argument(name, case["level"], case["negated"])
        assert ([] if argument is None else [argument]) == case["arguments"]
        result = apply_operation(image, name, case["level"], case["negated"], case["interpolation"])
        assert sha256(np.asarray(result)) == case["sha256"], case
    assert same(image, image_by_rule(97, 64))  # the image handed in stays as it was


@given(
    st.sampled_from(IDLE_AT_ZERO),
    SIZES,
    SIZES,
    st.booleans(),
    st.sampled_from(["bilinear", "bicubic"]),
)
@QUICK
def test_level_0_changes_nothing(name, width, height, negated, interpolation):
    image = image_by_rule(width, height)
    assert same(apply_operation(image, name, 0, negated, interpolation), image)


@given(st.sampled_from(OPERATIONS), st.floats(0, 10), st.booleans(), SIZES, SIZES)
@QUICK
def test_an_operation_keeps_the_form(name, level, negated, width, height):
    result = apply_operation(image_by_rule(width, height), name, level, negated, "bicubic")
    assert result.size == (width, height) and result.mode == "RGB"


@given(st.floats(0, 10))
@QUICK
def test_arguments_have_their_ranges(level):
    assert 1 <= operation_argument("PosterizeIncreasing", level, False) <= 4
    for name in ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"):
        assert 0.1 <= operation_argument(name, level, True) <= 1 <= operation_argument(name, level, False) <= 1.9
    for name, most in (("Rotate", 30), ("ShearX", 0.3), ("TranslateYRel", 0.45)):
        assert 0 <= operation_argument(name, level, False) == -operation_argument(name, level, True) <= most


def test_what_moves_in_is_the_mean_of_imagenet():
    white = Image.new("RGB", (20, 20), "white")
    right = np.asarray(apply_operation(white, "TranslateXRel", 10, True, "bilinear"))
    assert (right[:, :9] == FILL).all() and (right[:, 9:] == 255).all()
    down = np.asarray(apply_operation(white, "TranslateYRel", 10, True, "bicubic"))
    assert (down[:9] == FILL).all() and (down[9:] == 255).all()


@pytest.mark.parametrize(
    ("name", "level", "message"),
    [("Shear", 1, "operation 'Shear': expected one of AutoContrast"), ("Rotate", 10.5, "level 10.5: expected")],
)
def test_what_is_no_operation_is_refused(name, level, message):
    with pytest.raises(UsageError, match=message):
        apply_operation(Image.new("RGB", (4, 4)), name, level, False, "bilinear")


# What is drawn


def test_operations_are_drawn_as_the_recipe_says():
    generator = rule(1)
    drawn = [one for _ in range(6000) for one in draw_operations(Augmentation(8), generator)]
    assert len(drawn) == 12000
    counts = [sum(one.name == name for one in drawn) for name in OPERATIONS]
    assert all(abs(count - 800) < 4 * math.sqrt(800) for count in counts)
    for share in (
        np.mean([one.applied for one in drawn]),
        np.mean([one.negated for one in drawn]),
        np.mean([one.interpolation == "bicubic" for one in drawn]),
    ):
        assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(12000)
    levels = np.array([one.level for one in drawn])
    assert levels.min() >= 0 and levels.max() == 10
    # A normal number of mean 9 and deviation 0.5 is over 10, and then cut, in 2.28 % of all cases.
    assert abs(np.mean(levels == 10) - 0.02275) < 0.006
    assert abs(np.median(levels) - 9) < 0.03 and abs(np.quantile(levels, 0.1587) - 8.5) < 0.04
    # Drawn independently of each other, and with replacement.
    names = np.array([one.name for one in drawn]).reshape(-1, 2)
    assert abs(np.mean(names[:, 0] == names[:, 1]) - 1 / 15) < 4 * math.sqrt(1 / 15 / 6000)
    applied = np.array([one.applied for one in drawn]).reshape(-1, 2)
    assert abs(np.mean(applied.all(axis=1)) - 0.25) < 0.03


@pytest.mark.parametrize(("magnitude", "expected"), [(0, 0), (10, 10), (4.5, 4.5)])
def test_without_deviation_the_level_is_the_magnitude(magnitude, expected):
    drawn = draw_operations(Augmentation(8, rand_augment=9, magnitude=magnitude, magnitude_std=0), rule(2))
    assert [one.level for one in drawn] == [expected] * 9


def test_a_random_crop_is_as_large_and_as_wide_as_the_recipe_says():
    generator = rule(3)
    boxes = np.array([draw_crop((500, 400), (0.08, 1.0), (3 / 4, 4 / 3), generator) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (right <= 500).all() and (bottom <= 400).all()
    area, ratio = (right - left) * (bottom - top) / 200_000, (right - left) / (bottom - top)
    assert 0.078 < area.min() < 0.09 and 0.9 < area.max() <= 1
    # As far as nearly all rectangles fit, the area is uniform and the logarithm of the ratio too.
    small = area < 0.5
    assert abs(np.median(area[small]) - 0.29) < 0.015
    assert 0.74 < ratio[small].min() < 0.77 and 1.30 < ratio[small].max() < 1.35
    assert abs(np.median(np.log(ratio[small]))) < 0.02 and abs(np.log(ratio[small]).std() - 0.1661) < 0.006
    # Places: all of the room there is, evenly.
    assert abs(np.mean(left[small] / (500 - right + left)[small]) - 0.5) < 0.02
    assert abs(np.mean(top[small] / (400 - bottom + top)[small]) - 0.5) < 0.02
    assert left.min() == top.min() == 0 and right.max() == 500 and bottom.max() == 400


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((1, 500), (0, 249, 1, 250)),  # too tall: as high as the lowest ratio allows
        ((500, 1), (249, 0, 250, 1)),
        ((2, 500), (0, 248, 2, 251)),  # 2.67 rows, rounded
        ((30, 300), (0, 130, 30, 170)),
        ((300, 30), (130, 0, 170, 30)),
    ],
)
def test_where_no_rectangle_fits_the_centre_is_taken(size, box):
    """From 90 % of the area on, none of a ratio of 3/4 to 4/3 fits."""
    generator = rule(4)
    assert draw_crop(size, (0.9, 1.0), (3 / 4, 4 / 3), generator) == box
    expected = rule(4)
    expected.random(20)  # ten tries, two numbers each
    assert generator.random() == expected.random()


def test_a_rectangle_may_be_the_whole_image():
    generator, expected = rule(13), rule(13)
    assert draw_crop((8, 8), (1, 1), (1, 1), generator) == (0, 0, 8, 8)
    expected.random(2)  # one try
    assert generator.random() == expected.random()


def test_the_ratio_is_that_of_width_to_height():
    left, top, right, bottom = draw_crop((400, 400), (0.08, 0.08), (2, 2), rule(14))
    assert (right - left, bottom - top) == (160, 80)


def test_all_places_are_alike():
    generator = rule(15)
    boxes = np.array([draw_crop((12, 14), (1 / 4, 1 / 4), (12 / 14, 12 / 14), generator) for _ in range(1400)])
    assert (boxes[:, 2:] - boxes[:, :2] == (6, 7)).all()
    for starts, count in ((boxes[:, 0], 7), (boxes[:, 1], 8)):
        counts = np.bincount(starts, minlength=count)
        assert len(counts) == count and (abs(counts - 1400 / count) < 4 * math.sqrt(1400 / count)).all()


def test_the_whole_image_is_the_centre_where_its_ratio_allows():
    assert draw_crop((40, 36), (1, 1), (0.8, 0.8), rule(0)) == (5, 0, 34, 36)
    misses = (2.9, 3.0)  # of the area; not reachable, so that only the fallback is left
    assert draw_crop((40, 36), misses, (3 / 4, 4 / 3), rule(0)) == (0, 0, 40, 36)


@given(SIZES, SIZES, st.floats(0.001, 1), st.floats(0.05, 20), st.integers(0, 1000))
@QUICK
def test_a_crop_is_never_empty_nor_outside(width, height, scale, ratio, seed):
    left, top, right, bottom = draw_crop((width, height), (scale / 2, scale), (ratio, ratio), rule(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


# A whole image


@given(
    SIZES,
    SIZES,
    st.integers(1, 40),
    st.sampled_from(["resized", "padded", "centre"]),
    st.integers(0, 60),
    st.integers(),
)
@QUICK
def test_any_image_becomes_one_of_the_right_form(width, height, size, how, padding, seed):
    augmentation = Augmentation(size, crop=how, padding=padding, rand_augment=3, operation_probability=1)
    result = augment(image_by_rule(width, height), augmentation, rule(abs(seed)))
    assert result.dtype == np.uint8 and result.shape == (3, size, size) and result.flags.c_contiguous


@pytest.mark.parametrize("seed", range(12))
def test_everything_is_drawn_in_the_order_that_is_documented(seed):
    image, filters = image_by_rule(60, 45), ("bilinear", "bicubic")
    generator = rule(12, seed)
    how = filters[generator.integers(2)]
    box = draw_crop((60, 45), (0.08, 1.0), (3 / 4, 4 / 3), generator)
    expected = image.crop(box).resize((24, 24), getattr(Image.Resampling, how.upper()))
    if generator.random() < 0.5:
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for _ in range(2):
        name = OPERATIONS[generator.integers(15)]
        applied = generator.random() < 0.5
        level = min(10, generator.normal(9, 0.5))
        negated = generator.random() < 0.5
        how = filters[generator.integers(2)]
        if applied:
            expected = apply_operation(expected, name, level, negated, how)
    assert np.array_equal(augment(image, Augmentation(24), rule(12, seed)), planes(expected))


def test_the_result_depends_on_the_generator_alone():
    images = [image_by_rule(60, 40), image_by_rule(31, 57), image_by_rule(40, 60)]

    def of(order):
        result = {i: augment(images[i], Augmentation(24), pixel_generator(7, 2, i, "augment")) for i in order}
        return [result[i].tobytes() for i in range(3)]

    assert of([0, 1, 2]) == of([2, 0, 1]) and len(set(of([0, 1, 2]))) == 3


def test_the_numbers_of_an_image_are_its_own():
    keys = [(seed, epoch, index) for seed in (0, 1, 1 << 32, 1 + (1 << 32)) for epoch in (0, 1) for index in (0, 1, 2)]
    first = {
        pixel_generator(*key, purpose).integers(1 << 62) for key in keys for purpose in ("augment", "erase", "mix")
    }
    assert len(first) == 3 * len(keys)
    assert pixel_generator(3 + (9 << 32), 4, 5, "erase").random() == np.random.default_rng([9, 3, 4, 5, 1]).random()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 0, "mix"), "seed -1: expected a whole number from 0 to 9223372036854775807"),
        ((1 << 63, 0, 0, "mix"), "seed 9223372036854775808: expected"),
        ((0, 2**32, 0, "mix"), "epoch 4294967296: expected"),
        ((0, 0, 0.5, "mix"), r"index 0\.5: expected"),
        ((0, 0, 0, "flip"), "purpose 'flip': expected one of augment, erase, mix"),
    ],
)
def test_what_is_no_seed_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        pixel_generator(*arguments)


@pytest.mark.parametrize("probability", [0, 0.25, 0.5, 1])
def test_flips_are_as_frequent_as_asked(probability):
    image = image_by_rule(24, 24)
    straight, generator = planes(image), rule(6)
    augmentation = dataclasses.replace(PLAIN, flip=probability)
    flipped = 0
    for _ in range(400):
        result = augment(image, augmentation, generator)
        flipped += np.array_equal(result, straight[:, :, ::-1])
        assert np.array_equal(result, straight[:, :, ::-1]) or np.array_equal(result, straight)
    assert abs(flipped / 400 - probability) <= 4 * math.sqrt(probability * (1 - probability) / 400)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_crop_is_cut_out_before_it_is_resized(monkeypatch, interpolation):
    """Nothing from beyond its edge: a red square in blue stays red all over."""
    image = Image.new("RGB", (90, 90), "blue")
    image.paste("red", (30, 20, 60, 60))
    monkeypatch.setattr(module, "draw_crop", lambda *_: (30, 20, 60, 60))
    result = augment(image, Augmentation(50, rand_augment=0, crop_interpolation=interpolation), rule(0))
    assert (result == np.array([255, 0, 0])[:, None, None]).all()


def test_the_filter_of_the_crop_is_drawn_from_both():
    image, generator = image_by_rule(60, 60), rule(8)
    expected = {
        how: planes(image.resize((24, 24), getattr(Image.Resampling, how.upper()))) for how in ("bilinear", "bicubic")
    }
    result = [augment(image, PLAIN, generator) for _ in range(200)]
    counts = {how: sum(np.array_equal(one, pixels) for one in result) for how, pixels in expected.items()}
    assert sum(counts.values()) == 200 and 72 <= counts["bilinear"] <= 128
    for how, pixels in expected.items():
        assert np.array_equal(augment(image, dataclasses.replace(PLAIN, crop_interpolation=how), generator), pixels)


@pytest.mark.parametrize("size", [(40, 24), (24, 24), (97, 64), (1, 300), (3, 3)])
def test_the_centre_is_that_of_an_evaluation(size):
    image, generator = image_by_rule(*size), rule(9)
    result = augment(image, dataclasses.replace(PLAIN, crop="centre"), generator)
    assert np.array_equal(result, crop(image, Preprocessing(input_size=24, crop_fraction=1)))
    expected = rule(9)
    expected.random()  # the flip alone is drawn
    assert generator.random() == expected.random()


def test_a_padded_crop_is_a_window_on_the_reflected_image():
    image = Image.fromarray(rule(16).integers(0, 256, (24, 24, 3), np.uint8))
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)), mode="reflect").transpose(2, 0, 1)
    windows = {
        padded[:, top : top + 24, left : left + 24].tobytes(): (top, left) for top in range(9) for left in range(9)
    }
    generator, augmentation = rule(10), dataclasses.replace(PLAIN, crop="padded")
    places = np.array([windows[augment(image, augmentation, generator).tobytes()] for _ in range(600)])
    for axis in (0, 1):
        counts = np.bincount(places[:, axis], minlength=9)
        assert len(counts) == 9 and (abs(counts - 600 / 9) < 4 * math.sqrt(600 / 9)).all()
    assert abs(np.corrcoef(places.T)[0, 1]) < 0.15


def test_a_padded_crop_of_a_long_image_reaches_both_ends():
    ramp = np.broadcast_to(np.arange(60, dtype=np.uint8)[None, :, None], (20, 60, 3))
    augmentation = Augmentation(20, crop="padded", padding=0, rand_augment=0, flip=0)
    firsts = {int(augment(Image.fromarray(ramp.copy()), augmentation, rule(11, seed))[0, 0, 0]) for seed in range(500)}
    assert firsts == set(range(41))


def test_an_image_of_another_mode_is_refused():
    with pytest.raises(UsageError, match="image of mode L: expected RGB"):
        augment(Image.new("L", (4, 4)), PLAIN, rule(0))


@pytest.mark.parametrize("how", ["padded", "centre"])
def test_what_would_be_enormous_is_a_bad_image(monkeypatch, how):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80_000)
    with pytest.raises(BadImages, match="1 x 300 pixels would be resized to"):
        augment(Image.new("RGB", (1, 300)), Augmentation(24, crop=how), rule(0))
    assert augment(Image.new("RGB", (1, 300)), Augmentation(24), rule(0)).shape == (3, 24, 24)


# The settings


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("crop_scale", (0, 1), "two numbers, lowest and highest, above 0 and at most 1"),
        ("crop_scale", (0.5, 0.2), "two numbers"),
        ("crop_scale", (0.5, 1.1), "at most 1"),
        ("crop_scale", 0.5, "two numbers"),
        ("crop_scale", (math.nan, 1), "two numbers"),
        ("crop_ratio", (0.5, 1, 2), "two numbers"),
        ("crop_ratio", ("a", "b"), "two numbers"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name(field, value, expected):
    with pytest.raises(UsageError) as caught:
        Augmentation(**{"size": 224, field: value})
    message = str(caught.value)
    assert message.startswith(f"{field} {value!r}: expected ") and expected in message and "\n" not in message


def test_settings_survive_json():
    augmentation = Augmentation(32, crop="padded", crop_scale=(0.2, 0.9))
    assert Augmentation(**json.loads(json.dumps(dataclasses.asdict(augmentation)))) == augmentation
    assert hash(Augmentation(32, crop_ratio=[1, 2])) == hash(Augmentation(32, crop_ratio=(1, 2)))


# Random erasing


def erased(shape, seed, probability=1.0):
    """For each image which pixels are others: booleans (B, 3, H, W); and the images."""
    images = np.full(shape, 7, np.float32)
    erase(images, probability, [rule(seed, i) for i in range(len(images))])
    return images != 7, images


def test_what_is_erased_is_one_rectangle_of_noise():
    changed, images = erased((300, 3, 60, 50), 20)
    shares, ratios, ends = [], [], []
    for mask in changed:
        assert (mask == mask[0]).all() and mask.any()  # all channels alike
        rows, columns = np.flatnonzero(mask[0].any(axis=1)), np.flatnonzero(mask[0].any(axis=0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert mask[0].sum() == height * width and height < 60 and width < 50
        shares.append(height * width / 3000)
        ratios.append(math.log(height / width))
        ends.append((rows[0], 60 - 1 - rows[-1], columns[0], 50 - 1 - columns[-1]))
    assert 0.015 < min(shares) < 0.03 and 0.31 < max(shares) < 0.345
    assert abs(np.mean(shares) - 0.175) < 0.02
    limit = math.log(1 / 0.3)
    # Whole pixels make the ratio of a small rectangle a little larger than was drawn.
    assert -limit - 0.15 < min(ratios) < -limit + 0.15 and limit - 0.15 < max(ratios) < limit + 0.15
    assert abs(np.mean(ratios)) < 0.16 and abs(np.std(ratios) - 2 * limit / math.sqrt(12)) < 0.07
    assert (np.min(ends, axis=0) == 0).all()  # up to all four edges
    noise = images[changed]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01 and len(np.unique(noise)) > 0.99 * len(noise)


@pytest.mark.parametrize("seed", range(6))
def test_erasing_draws_in_the_order_that_is_documented(seed):
    generator, expected = rule(23, seed), np.full((3, 20, 70), 7, np.float32)
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
    erase(images, 1, [rule(23, seed)])
    assert np.array_equal(images[0], expected)


@pytest.mark.parametrize("probability", [0, 0.25, 1])
def test_erasing_is_as_frequent_as_asked(probability):
    changed, _ = erased((800, 3, 12, 12), 21, probability)
    share = changed.any(axis=(1, 2, 3)).mean()
    assert abs(share - probability) <= 4 * math.sqrt(probability * (1 - probability) / 800)


def test_erasing_an_image_does_not_depend_on_the_others():
    images = rule(22).standard_normal((6, 3, 16, 20), np.float32)
    together, alone = images.copy(), images.copy()
    erase(together, 0.5, [pixel_generator(0, 0, i, "erase") for i in range(6)])
    for i in reversed(range(6)):
        erase(alone[i : i + 1], 0.5, [pixel_generator(0, 0, i, "erase")])
    assert np.array_equal(together, alone) and not np.array_equal(together, images)


@given(st.integers(0, 3), st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
@QUICK
def test_something_is_always_left(count, height, width, seed):
    changed, images = erased((count, 3, height, width), seed)
    assert np.isfinite(images).all() and images.dtype == np.float32
    assert not changed.all(axis=2).any() and not changed.all(axis=3).any()  # never a whole column or row


@pytest.mark.parametrize(
    ("images", "probability", "count", "message"),
    [
        (np.zeros((2, 3, 4, 4)), 0.5, 2, r"images float64 \(2, 3, 4, 4\): expected float32"),
        (np.zeros((2, 4, 4, 3), np.float32), 0.5, 2, r"expected float32 of shape \(B, 3, H, W\)"),
        (np.zeros((2, 3, 4, 4), np.float32), 1.5, 2, r"probability 1\.5: expected a number from 0 to 1"),
        (np.zeros((2, 3, 4, 4), np.float32), 0.5, 1, "1 generators: expected one for each of 2 images"),
    ],
)
def test_what_cannot_be_erased_is_refused(images, probability, count, message):
    with pytest.raises(UsageError, match=message):
        erase(images, probability, [rule(0)] * count)
