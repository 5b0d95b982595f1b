"""Test the transforms of segmentation with hashes of the authors' pixels and with OpenCV's arithmetic in NumPy."""

import csv
import io
import math
import sys
import zlib
from functools import partial

import cv2
import numpy as np
import pytest
from PIL import Image

from conftest import GOLDEN, golden_json, image_by_rule, sha256
from fcvit.data.painting import overlay, palette_image
from fcvit.data.transforms import segmentation
from fcvit.data.transforms.augment import pixel_generator
from fcvit.data.transforms.preprocess import decode as decode_for_classifier
from fcvit.data.transforms.segmentation import (
    SegmentationAugmentation,
    aligned_size,
    augment,
    decode,
    distort,
    keep_ratio_size,
    normalize,
    preprocess,
    random_crop,
    random_flip,
    random_resize,
    resize_image,
    resize_labels,
    scale_saturation,
    scale_values,
    shift_hue,
)
from fcvit.errors import BadImages, MissingExtra, UsageError
from fcvit.models.variants import Preprocessing

PREPROCESS = golden_json("segmentation/preprocess.json")
PIPELINE = golden_json("segmentation/pipeline.json")
PAINT = golden_json("segmentation/paint.json")
RUNS = pytest.mark.parametrize(
    "run", PIPELINE["runs"], ids=lambda run: f"{run['kind']} {run['width']}x{run['height']} seed {run['seed']}"
)


def generator_of(text):
    return np.random.Generator(np.random.PCG64(zlib.crc32(text.encode())))


def noise(width, height):
    return generator_of(f"noise/{width}x{height}").integers(0, 256, (height, width, 3), np.uint8)


def ramp(width, height):
    y, x, c = np.ogrid[:height, :width, :3]
    return np.rint(255 * (0.5 + 0.5 * np.sin(2 * np.pi * (x * (c + 1) / width + y * (3 - c) / height)))).astype(
        np.uint8
    )


RULES = {"picture": lambda width, height: np.asarray(image_by_rule(width, height)), "noise": noise, "ramp": ramp}


def parse_size(text):
    """Return the (height, width) of "WxH"."""
    width, height = map(int, text.split("x"))
    return height, width


# OpenCV's integer arithmetic


def bilinear(image, size):
    """Resize uint8 (H, W, 3) as `cv2.resize`."""
    if image.shape[:2] == size:
        return image
    if (image.shape[0], image.shape[1]) == (2 * size[0], 2 * size[1]):
        blocks = image.reshape(size[0], 2, size[1], 2, 3).astype(np.int64).sum(axis=(1, 3))
        return ((blocks + 2) >> 2).astype(np.uint8)

    def positions(length, new, clip):
        ratio = 1 / (new / length)
        position = ((np.arange(new) + 0.5) * ratio - 0.5).astype(np.float32)
        first = np.floor(position).astype(np.int64)
        share = position - first.astype(np.float32)
        if clip:
            share[(first < 0) | (first >= length - 1)] = 0
            first = first.clip(0, length - 1)
        weights = [np.rint(np.float32(2048) * one).astype(np.int64) for one in (np.float32(1) - share, share)]
        return (first.clip(0, length - 1), (first + 1).clip(0, length - 1)), weights

    (left, right), (a, b) = positions(image.shape[1], size[1], clip=True)
    wide = image.astype(np.int64)
    wide = wide[:, left] * a[:, None] + wide[:, right] * b[:, None]
    (top, bottom), (a, b) = positions(image.shape[0], size[0], clip=False)
    a, b = a[:, None, None], b[:, None, None]
    return (((((wide[top] >> 4) * a) >> 16) + (((wide[bottom] >> 4) * b) >> 16) + 2) >> 2).astype(np.uint8)


def nearest(labels, size):
    rows, columns = (
        np.minimum(np.floor(np.arange(new) * (1 / (new / length))).astype(np.int64), length - 1)
        for length, new in zip(labels.shape, size, strict=True)
    )
    return labels[rows[:, None], columns]


def hsv_from_rgb(image):
    r, g, b = np.moveaxis(image.astype(np.int64), -1, 0)
    v = image.max(-1).astype(np.int64)
    d = v - image.min(-1)
    index = np.arange(1, 256)
    by_value = np.r_[0, np.rint(255 * 4096 / index)].astype(np.int64)
    by_difference = np.r_[0, np.rint(180 * 4096 / (6 * index))].astype(np.int64)
    s = (d * by_value[v] + 2048) >> 12
    h = np.where(v == r, g - b, np.where(v == g, b - r + 2 * d, r - g + 4 * d))
    h = (h * by_difference[d] + 2048) >> 12
    return np.stack([h + 180 * (h < 0), s, v], -1).astype(np.uint8)


def rgb_from_hsv(image):
    """Convert as OpenCV on a processor with AVX2: the last pixels of a row are rounded and use no fused operation."""
    one = np.float32(1)
    h, s, v = (
        image[..., c].astype(np.float32) * np.float32(scale) for c, scale in enumerate((6 / 180, 1 / 255, 1 / 255))
    )
    sector = np.floor(h).astype(np.int64)
    f = h - sector.astype(np.float32)

    def results(q, t):
        p = v * (one - s)
        table = np.stack([v, t, p, q, v, p, p, v, t, p, q, v, t, p, v, v, p, q], -1).reshape(*v.shape, 6, 3)
        return np.take_along_axis(table, (sector % 6)[..., None, None], -2)[..., 0, :] * np.float32(255)

    fused = [v * (1 - s.astype(np.float64) * share.astype(np.float64)).astype(np.float32) for share in (f, one - f)]
    converted = results(*fused).astype(np.uint8)
    tail = image.shape[1] - image.shape[1] % 32
    rounded = np.rint(results(v * (one - s * f), v * (one - s * (one - f)))).astype(np.uint8)
    converted[:, tail:] = rounded[:, tail:]
    return converted


SIZES = [
    *np.random.default_rng(17).integers(1, 90, (120, 4)).tolist(),
    *[(60, 80, 30, 40), (61, 80, 30, 40), (60, 80, 60, 80), (60, 80, 30, 80)],  # half and equal sides
    *[(1, 1, 64, 32), (7, 1, 96, 2), (40, 50, 1, 1)],
]


def test_opencv_resizes_with_the_integer_arithmetic():
    generator = np.random.default_rng(0)
    for height, width, new_height, new_width in SIZES:
        image = generator.integers(0, 256, (height, width, 3), np.uint8)
        size = (new_height, new_width)
        np.testing.assert_array_equal(resize_image(image, size), bilinear(image, size), f"{image.shape} {size}")
        labels = image[..., 0].copy()
        np.testing.assert_array_equal(resize_labels(labels, size), nearest(labels, size), f"{labels.shape} {size}")


def test_opencv_converts_colors_with_the_integer_arithmetic():
    colors = np.random.default_rng(1).integers(0, 256, (512, 512, 3), np.uint8)
    colors[0] = np.arange(512)[:, None] // 2  # grays
    colors[1:257, :256] = np.stack([np.indices((256, 256))[0], np.indices((256, 256))[1], np.zeros((256, 256))], -1)
    hsv = cv2.cvtColor(colors, cv2.COLOR_RGB2HSV)
    np.testing.assert_array_equal(hsv, hsv_from_rgb(colors))
    back = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    np.testing.assert_array_equal(back, rgb_from_hsv(hsv))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("INTER_LINEAR", "INTER_LINEAR_EXACT"), ("INTER_LINEAR", "INTER_AREA"), ("INTER_NEAREST", "INTER_NEAREST_EXACT")],
)
def test_the_comparison_detects_other_interpolations(monkeypatch, name, wrong):
    monkeypatch.setattr(cv2, name, getattr(cv2, wrong))
    with pytest.raises(AssertionError):
        test_opencv_resizes_with_the_integer_arithmetic()


# Preprocessing


@pytest.mark.slow
@pytest.mark.parametrize("name", PREPROCESS["synthetic"])
def test_preprocessed_pixels_equal_the_authors(name):
    kind, size = name.split()
    height, width = parse_size(size)
    image = RULES[kind](width, height)
    golden = PREPROCESS["synthetic"][name]
    assert sha256(image) == golden["decoded_sha256"]
    kept = resize_image(image, keep_ratio_size(image.shape[:2]))
    assert [kept.shape[1], kept.shape[0]] == golden["keep_ratio"]
    assert sha256(kept) == golden["keep_ratio_sha256"]
    pixels = preprocess(image)
    assert pixels.dtype == np.uint8 and [*pixels.shape] == [3, golden["aligned"][1], golden["aligned"][0]]
    assert sha256(pixels.transpose(1, 2, 0)) == golden["aligned_sha256"]
    (normalized,) = normalize(pixels[None], Preprocessing())
    assert sha256(normalized.transpose(1, 2, 0)) == golden["normalised_float32_sha256"]
    _, rows, columns = normalized.shape
    assert normalized[:, rows // 2, columns // 2].tolist() == golden["normalised_middle"]


@pytest.mark.parametrize("name", PREPROCESS["labels"]["maps"])
def test_resized_label_maps_equal_the_authors(name):
    before, after = map(parse_size, name.split(" to "))
    labels = generator_of(f"label/{before[1]}x{before[0]}").integers(0, 151, before, np.uint8)
    resized = resize_labels(labels, after)
    assert resized.shape == after and sha256(resized) == PREPROCESS["labels"]["maps"][name]["sha256"]


def test_sizes_follow_the_scale():
    assert keep_ratio_size((180, 240), (240, 180)) == keep_ratio_size((180, 240), (180, 240)) == (180, 240)
    assert preprocess(noise(240, 180), (240, 180)).shape == (3, 192, 256)
    assert aligned_size((512, 683)) == (512, 704) and aligned_size((1, 32)) == (32, 32)
    assert keep_ratio_size((9000, 1)) == (2048, 1)  # a side is never 0
    assert preprocess(np.zeros((40000, 1, 3), np.uint8)).shape == (3, 2048, 32)


def test_padding_is_0_after_normalization():
    pixels = np.full((2, 3, 8, 6), 200, np.uint8)
    normalized = normalize(pixels, Preprocessing(), [(8, 6), (5, 4)])
    np.testing.assert_array_equal(normalized[0], normalize(pixels, Preprocessing())[0])
    np.testing.assert_array_equal(normalized[1, :, :5, :4], normalized[0, :, :5, :4])
    assert (normalized[0] != 0).all() and not normalized[1, :, 5:].any() and not normalized[1, :, :, 4:].any()
    with pytest.raises(ValueError, match="zip"):
        normalize(pixels, Preprocessing(), [(8, 6)])


# Decoding


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def assert_decodes_like_opencv(content):
    expected = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    image = decode(io.BytesIO(content), "x")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)
    return np.asarray(image)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("JPEG", {"quality": 95, "subsampling": 0}), ("TIFF", {}), ("WEBP", {"lossless": True})],
)
def test_the_orientation_is_applied(kind, options, orientation):
    """The orientation tag names the sides of the picture at which the first row and the first column lie."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(noise(24, 16))
    content = encoded(stored, kind, exif=exif, **options)
    if kind in ("JPEG", "PNG"):  # older versions of OpenCV do not read the tag of the other formats
        assert_decodes_like_opencv(content)
    if kind != "JPEG":
        upright = {
            2: lambda a: a[:, ::-1],
            3: lambda a: a[::-1, ::-1],
            4: lambda a: a[::-1],
            5: lambda a: a.swapaxes(0, 1),
            6: lambda a: a[::-1].swapaxes(0, 1),
            7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
            8: lambda a: a[:, ::-1].swapaxes(0, 1),
        }.get(orientation, lambda a: a)
        pixels = np.asarray(decode(io.BytesIO(content)))
        np.testing.assert_array_equal(pixels, upright(np.asarray(stored)))


def test_damaged_orientation_data_is_ignored():
    content = encoded(image_by_rule(24, 16), "PNG", exif=b"Exif\0\0not a TIFF header")
    np.testing.assert_array_equal(assert_decodes_like_opencv(content), np.asarray(image_by_rule(24, 16)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_alpha_is_dropped_and_other_modes_are_converted(mode):
    image = Image.fromarray(noise(24, 16)).convert(mode)
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(noise(24, 16)[..., 1].copy()))
    assert_decodes_like_opencv(encoded(image, "PNG"))


@pytest.mark.parametrize("highest", [255, 65535])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_is_always_cut_to_its_upper_8_bits(highest, kind):
    """The classifier keeps values up to 255, which OpenCV makes black."""
    values = np.linspace(0, highest, 24 * 16).astype(np.uint16).reshape(16, 24)
    content = encoded(Image.fromarray(values), kind)
    pixels = assert_decodes_like_opencv(content)
    np.testing.assert_array_equal(pixels[..., 0], values >> 8)
    of_classifier = np.asarray(decode_for_classifier(io.BytesIO(content)))[..., 0]
    np.testing.assert_array_equal(of_classifier, values if highest == 255 else values >> 8)


def test_16_bit_color_is_cut_to_its_upper_8_bits():
    values = np.random.default_rng(2).integers(0, 65536, (16, 24, 4), np.uint16)
    for channels in (3, 4):
        content = cv2.imencode(".png", values[..., :channels])[1].tobytes()
        pixels = assert_decodes_like_opencv(content)
        np.testing.assert_array_equal(pixels, values[..., 2::-1] >> 8)


def test_unreadable_images_are_reported_with_their_name(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(image_by_rule(24, 16), "PNG")[:60])
    with pytest.raises(BadImages, match=r"x\.png: "):
        decode(tmp_path / "x.png")
    with pytest.raises(BadImages, match=r"photo\.jpg: not a readable image: a text file"):
        decode(io.BytesIO(b"hello"), "photo.jpg")


# Training


def sample(run):
    """Return the image and the label map of a run, by the rule in the golden file."""
    width, height = run["width"], run["height"]
    name = f"seg/goldens/pipeline/{width}x{height}/"
    blocks = generator_of(name + "labels").integers(0, 6, (math.ceil(height / 32), math.ceil(width / 32)))
    labels = blocks.repeat(32, 0).repeat(32, 1)[:height, :width].astype(np.uint8)
    labels[generator_of(name + "ignore").random((height, width)) < 0.05] = 255
    return RULES[run["kind"]](width, height), labels


def settings(run):
    return SegmentationAugmentation((run["crop"], run["crop"]), tuple(run["img_scale"]))


@RUNS
def test_each_step_equals_the_authors_pipeline(run):
    generator = np.random.RandomState(run["seed"])
    image, labels = sample(run)
    chosen = settings(run)

    def check(step):
        golden = run["steps"][step]
        assert [image.shape[1], image.shape[0]] == golden["size"], step
        assert sha256(image) == golden["image_sha256"], step
        assert sha256(labels) == golden["label_sha256"], step

    image, labels = random_resize(image, labels, chosen.scale, chosen.scale_ratio, generator)
    check("Resize")
    image, labels = random_crop(image, labels, chosen.crop_size, chosen.max_class_share, generator)
    check("RandomCrop")
    image, labels = random_flip(image, labels, chosen.flip, generator)
    check("RandomFlip")
    image = distort(image, generator)
    if not run["opencv_scalar_tail"]:
        check("PhotoMetricDistortion")
        (normalized,) = normalize(image.transpose(2, 0, 1)[None], Preprocessing())
        assert sha256(normalized.transpose(1, 2, 0)) == run["steps"]["Normalize"]["image_float32_rgb_sha256"]


@RUNS
def test_the_whole_augmentation_equals_the_authors_pipeline(run):
    pixels, labels, valid = augment(*sample(run), settings(run), np.random.RandomState(run["seed"]))
    golden = run["steps"]["Pad"]
    assert pixels.shape == (3, run["crop"], run["crop"]) and pixels.dtype == labels.dtype == np.uint8
    assert [*valid] == run["steps"]["RandomCrop"]["size"][::-1]
    assert [*labels.shape] == golden["size"][::-1] and sha256(labels) == golden["label_sha256"]
    (normalized,) = normalize(pixels[None], Preprocessing(), [valid])
    if not run["opencv_scalar_tail"]:
        assert sha256(normalized.transpose(1, 2, 0)) == golden["image_float32_rgb_sha256"]


def test_the_run_that_depends_on_the_processor_differs_by_at_most_one_level_in_the_last_columns(monkeypatch):
    """The NumPy arithmetic of a processor with AVX2 gives the hash in the golden file."""
    (run,) = (run for run in PIPELINE["runs"] if run["opencv_scalar_tail"])

    def arguments():
        return *sample(run), settings(run), np.random.RandomState(run["seed"])

    with monkeypatch.context() as patch:
        convert = {cv2.COLOR_RGB2HSV: hsv_from_rgb, cv2.COLOR_HSV2RGB: rgb_from_hsv}
        patch.setattr(cv2, "cvtColor", lambda image, code: convert[code](image))
        expected, _, (height, width) = augment(*arguments())
    valid = expected[:, :height, :width].transpose(1, 2, 0)
    assert sha256(valid) == run["steps"]["PhotoMetricDistortion"]["image_sha256"]
    (normalized,) = normalize(expected[None], Preprocessing(), [(height, width)])
    assert sha256(normalized.transpose(1, 2, 0)) == run["steps"]["Pad"]["image_float32_rgb_sha256"]
    difference = np.abs(augment(*arguments())[0].astype(int) - expected)
    assert difference.max() <= 1 and not difference[:, :, : width - width % 64].any()


@pytest.mark.parametrize("name", [name for name in PIPELINE["operations"] if name != "hsv"])
def test_single_distortions_equal_the_authors(name):
    operation, number = name.split()
    image = noise(64, 48)
    result = {
        "contrast": lambda: scale_values(image, float(number)),
        "brightness": lambda: scale_values(image, offset=float(number)),
        "saturation": lambda: scale_saturation(image, float(number)),
        "hue": lambda: shift_hue(image, int(number)),
    }[operation]()
    assert sha256(result) == PIPELINE["operations"][name]
    assert sha256(image) == sha256(noise(64, 48))  # the input is not modified


def test_the_hsv_arithmetic_equals_the_authors():
    assert sha256(hsv_from_rgb(noise(64, 48))) == PIPELINE["operations"]["hsv"]


def test_a_crop_with_one_dominant_class_is_drawn_again():
    labels = np.zeros((40, 200), np.uint8)
    labels[:, 180:] = 1
    image = np.zeros((40, 200, 3), np.uint8)
    shares = []
    for seed in range(40):
        _, checked = random_crop(image, labels, (40, 30), 0.75, np.random.RandomState(seed))
        _, unchecked = random_crop(image, labels, (40, 30), 1, np.random.RandomState(seed))
        shares.append((np.unique(checked).size, np.unique(unchecked).size))
    checked, unchecked = (np.array(column) for column in zip(*shares, strict=True))
    assert (checked >= unchecked).all() and (checked == 2).sum() > (unchecked == 2).sum()
    # Without labels, eleven positions are drawn.
    generator, repeated = np.random.RandomState(3), np.random.RandomState(3)
    random_crop(image, np.full_like(labels, 255), (40, 30), 0.75, generator)
    for _ in range(11):
        repeated.randint(0, 1), repeated.randint(0, 171)
    assert generator.randint(1 << 30) == repeated.randint(1 << 30)


def test_a_crop_is_judged_by_its_labeled_pixels():
    """One class has 4/5 of the labeled pixels, and 2/5 of all pixels."""
    labels = np.tile(np.array([0, 0, 0, 0, 1, 255, 255, 255, 255, 255], np.uint8), (30, 3))
    for share, draws in ((0.75, 11), (0.85, 1)):
        generator, repeated = np.random.RandomState(4), np.random.RandomState(4)
        random_crop(np.zeros((30, 30, 3), np.uint8), labels, (20, 30), share, generator)
        for _ in range(draws):
            repeated.randint(0, 11), repeated.randint(0, 1)
        assert generator.randint(1 << 30) == repeated.randint(1 << 30), share


def test_distortions_are_drawn_from_their_ranges(monkeypatch):
    drawn = {"factor": [], "offset": [], "saturation": [], "hue": []}

    def record(image, factor=None, offset=None, name="factor"):
        drawn[name if offset is None else "offset"].append(factor if offset is None else offset)
        return image

    monkeypatch.setattr(segmentation, "scale_values", record)
    monkeypatch.setattr(segmentation, "scale_saturation", partial(record, name="saturation"))
    monkeypatch.setattr(segmentation, "shift_hue", partial(record, name="hue"))
    generator = np.random.RandomState(0)
    for _ in range(1000):
        distort(np.zeros((1, 1, 3), np.uint8), generator)
    assert all(400 < len(numbers) < 600 for numbers in drawn.values())
    assert set(drawn["hue"]) == set(range(-18, 18))
    for name, low, high in (("factor", 0.5, 1.5), ("saturation", 0.5, 1.5), ("offset", -32, 32)):
        assert low <= min(drawn[name]) < low + 0.02 * (high - low)
        assert high >= max(drawn[name]) > high - 0.02 * (high - low)


def test_options_switch_steps_off():
    image, labels = noise(100, 80), noise(100, 80)[..., 0].copy()
    chosen = SegmentationAugmentation((80, 100), (100, 80), (1, 1), max_class_share=1, flip=0, distortion=False)
    pixels, same, valid = augment(image, labels, chosen, np.random.RandomState(0))
    np.testing.assert_array_equal(pixels.transpose(1, 2, 0), image)
    np.testing.assert_array_equal(same, labels)
    assert valid == (80, 100)
    wide = SegmentationAugmentation((96, 128), (100, 80), (1, 1), max_class_share=1, distortion=False)
    pixels, padded, valid = augment(image, labels, wide, np.random.RandomState(0))
    assert pixels.shape == (3, 96, 128) and valid == (80, 100)
    assert (padded[80:] == 255).all() and (padded[:, 100:] == 255).all() and not pixels[:, 80:].any()


def test_each_image_of_a_run_has_its_own_numbers():
    image, labels = noise(64, 48), noise(64, 48)[..., 0].copy()
    chosen = SegmentationAugmentation((32, 32), (64, 48))

    def drawn(index):
        bits = pixel_generator(5, 0, index, "augment").bit_generator
        return sha256(augment(image, labels, chosen, np.random.RandomState(bits))[0])

    assert drawn(0) == drawn(0) != drawn(1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop_size": (0, 5)}, "crop_size"),
        ({"scale": (512,)}, "scale"),
        ({"scale_ratio": (2.0, 0.5)}, "lowest factor first"),
        ({"flip": 1.5}, "flip 1.5: expected a number from 0 to 1"),
        ({"max_class_share": -1}, "max_class_share"),
    ],
)
def test_settings_out_of_range_are_rejected(wrong, message):
    with pytest.raises(UsageError, match=message):
        SegmentationAugmentation(**wrong)
    assert SegmentationAugmentation(scale_ratio=[0.5, 2.0]) == SegmentationAugmentation()


def test_without_opencv_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)  # makes the import fail
    with pytest.raises(MissingExtra, match=r"cv2 is not installed; install it with: pip install 'fcvit\[dense\]'"):
        segmentation.preprocess(noise(64, 48))


# Painting


def palette_of_ade20k():
    with (GOLDEN / "segmentation" / "ade20k_classes.csv").open(newline="") as file:
        return [[int(row[color]) for color in ("red", "green", "blue")] for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", PAINT["overlays"])
def test_overlays_equal_the_authors(name):
    size, _, opacity = name.split()
    height, width = parse_size(size)
    labels = generator_of(f"paint/{size}").integers(0, 150, (height, width)).astype(np.uint8)
    painted = overlay(noise(width, height), labels, palette_of_ade20k(), float(opacity))
    assert sha256(painted) == PAINT["overlays"][name]


def test_labels_without_a_color_are_black():
    image = np.full((1, 3, 3), 200, np.uint8)
    painted = overlay(image, np.array([[0, 1, 255]], np.uint8), [(255, 0, 0)])
    assert painted.tolist() == [[[227, 100, 100], [100, 100, 100], [100, 100, 100]]]


@pytest.mark.parametrize("colors", [1, 2, 3, 11, 150, 256])
def test_palette_images_keep_every_label(tmp_path, colors):
    palette = noise(colors, 1)[0]
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    palette_image(labels, palette).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), labels)
        painted = np.asarray(image.convert("RGB")).reshape(-1, 3)
    np.testing.assert_array_equal(painted[:colors], palette)
    assert not painted[colors:].any()


@pytest.mark.parametrize("palette", [[(1, 2)], [(0, 0, 256)], [(0, -1, 0)], [(0, 0, 0)] * 257])
def test_wrong_palettes_are_rejected(palette):
    labels = np.zeros((4, 4), np.uint8)
    with pytest.raises(UsageError, match=r"palette of \d+ colors: expected at most 256"):
        palette_image(labels, palette)


def test_wrong_overlays_are_rejected():
    image, labels = noise(64, 48), np.zeros((48, 64), np.uint8)
    with pytest.raises(UsageError, match=r"opacity 2: expected a number from 0 to 1"):
        overlay(image, labels, [(0, 0, 0)], 2)
    with pytest.raises(UsageError, match="expected the same height and width"):
        overlay(image, labels[:-1], [(0, 0, 0)])
