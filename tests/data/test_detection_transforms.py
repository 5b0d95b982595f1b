"""Test the transforms of detection with hashes of the authors' pixels, boxes and masks."""

import zlib

import numpy as np
import pytest

from conftest import golden_json, sha256
from fcvit.data.coco import Instances
from fcvit.data.masks import decode_segmentation, parse_segmentation
from fcvit.data.transforms import detection, segmentation
from fcvit.data.transforms.detection import (
    DetectionAugmentation,
    augment,
    flip_boxes,
    pad_batch,
    preprocess,
    resize_boxes,
    scale_factors,
)
from fcvit.data.transforms.segmentation import keep_ratio_size, normalize, resize_labels
from fcvit.errors import BadImages, UsageError
from fcvit.models.variants import Preprocessing

pytest.importorskip("cv2", reason="OpenCV is not installed")
pytest.importorskip("pycocotools", reason="pycocotools is not installed")

GOLDEN = golden_json("detection/preprocess.json")
CASES = pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: "{}x{}".format(*case["size"]))


def generator_of(text):
    return np.random.Generator(np.random.PCG64(zlib.crc32((GOLDEN["salt"] + text).encode())))


def image_of(case):
    """Return the RGB image of a case, which the rule makes in BGR order."""
    height, width = case["size"]
    noise = generator_of(f"image/{height}x{width}").random((height, width, 3))
    y, x = np.mgrid[:height, :width]
    base = np.stack([x / max(width - 1, 1), y / max(height - 1, 1), ((x + y) % 37) / 37], -1)
    pixels = np.floor(np.clip(0.7 * base + 0.3 * noise, 0, 1) * 255.999).astype(np.uint8)
    assert sha256(pixels) == case["source_sha256"]
    return np.ascontiguousarray(pixels[..., ::-1])


def boxes_of(case):
    """Return the boxes of a case by the box rule, float32 (3, 4)."""
    height, width = case["size"]
    small = min(8, min(height, width) / 2)
    u = generator_of(f"gt/{height}x{width}").random((3, 4))
    center = u[:, :2] * [width, height]
    half = small * (np.array([width, height]) / small) ** u[:, 2:] / 2
    corners = np.concatenate([center - half, center + half], 1)
    return corners.clip(0, [width, height, width, height]).astype(np.float32)


def tensor_of(case, image):
    pixels, _ = preprocess(image, tuple(case["scale"]))
    batch, sizes = pad_batch([pixels])
    return normalize(batch, Preprocessing(), sizes)[0]


@pytest.mark.slow
@CASES
def test_preprocessed_images_equal_the_authors(case):
    image = image_of(case)
    pixels, factors = preprocess(image, tuple(case["scale"]))
    assert pixels.dtype == np.uint8 and list(pixels.shape[1:]) == case["img_shape"]
    assert factors.dtype == np.float32 and factors.tolist() == case["scale_factor"]
    assert sha256(pixels.transpose(1, 2, 0)[..., ::-1]) == case["resized_sha256"]
    tensor = tensor_of(case, image)
    assert tensor.dtype == case["tensor_dtype"] and list(tensor.shape) == case["tensor_shape"]
    assert sha256(tensor) == case["tensor_sha256"]


@CASES
def test_boxes_equal_the_authors(case):
    size = tuple(case["img_shape"])
    boxes = resize_boxes(boxes_of(case), scale_factors(case["size"], size), size)
    assert boxes.dtype == np.float32 and boxes.tolist() == case["boxes"]
    assert flip_boxes(boxes, size, 1).tolist() == case["boxes_flipped"]


def test_other_channels_rounding_or_padding_are_detected(monkeypatch):
    case = GOLDEN["cases"][6]
    image = image_of(case)
    assert sha256(tensor_of(case, image)) == case["tensor_sha256"]
    assert sha256(tensor_of(case, np.ascontiguousarray(image[..., ::-1]))) != case["tensor_sha256"]
    rounded = Preprocessing(mean=(0.485, 0.456, 0.4060001))
    pixels, _ = preprocess(image, tuple(case["scale"]))
    assert sha256(normalize(pixels[None], rounded)[0]) != case["tensor_sha256"]
    case = GOLDEN["cases"][7]  # it is padded
    pixels, _ = preprocess(image_of(case), tuple(case["scale"]))
    black, _ = pad_batch([pixels])
    assert sha256(normalize(black, Preprocessing())[0]) != case["tensor_sha256"]


@pytest.mark.parametrize("fault", ["factors in float64", "rounded down", "without a limit"])
def test_faults_of_boxes_are_detected(monkeypatch, fault):
    case = GOLDEN["cases"][1]
    size = tuple(case["img_shape"])
    boxes, factors = boxes_of(case), scale_factors(case["size"], size)
    if fault == "factors in float64":
        factors = np.array([new / old for new, old in zip(size, case["size"], strict=True)][::-1] * 2)
    elif fault == "rounded down":
        factors = scale_factors(case["size"], (size[0], size[1] - 1))
    else:
        size = (10_000, 10_000)
        boxes = boxes + np.float32([0, 0, 500, 500])
    assert resize_boxes(boxes, factors, size).tolist() != case["boxes"]


def instances_of(size, boxes, masks=None, labels=None):
    """Return instances with boxes x1, y1, x2, y2. Without masks, the boxes are the masks."""
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    if masks is None:
        masks = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes.tolist()]
    return Instances(
        size,
        np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1),
        np.arange(len(boxes)) if labels is None else labels,
        np.full(len(boxes), 9.0),
        np.zeros(len(boxes), bool),
        np.zeros(len(boxes), bool),
        tuple(parse_segmentation(mask, size) for mask in masks),
    )


class Draws:
    """A generator that returns given numbers."""

    def __init__(self, *numbers):
        self.numbers = numbers

    def random(self, count):
        assert count == len(self.numbers)
        return np.array(self.numbers)


def test_masks_equal_the_authors():
    """The three masks of the smallest case, found by trying all 2^15, give both hashes of mmdetection."""
    (case,) = (case for case in GOLDEN["cases"] if case["size"] == [1, 5])
    counts = [[0, 2, 2, 1], [5], [0, 5]]
    masks = [{"size": [1, 5], "counts": runs} for runs in counts]
    instances = instances_of((1, 5), [[0, 0, 1, 1]] * 3, masks)
    augmentation = DetectionAugmentation(scale=case["scale"])
    pixels, target = augment(image_of(case), instances, augmentation, Draws(0.5, 0))
    assert list(target.masks.shape) == case["masks_shape"] and sha256(target.masks) == case["masks_sha256"]
    assert sha256(pixels.transpose(1, 2, 0)[..., ::-1]) == case["resized_sha256"]
    _, target = augment(image_of(case), instances, augmentation, Draws(0.49, 0))
    height, width = case["img_shape"]
    assert sha256(target.masks[:, :height, :width]) == case["masks_flipped_unpadded_sha256"]


SIZE = (60, 80)
BOXES = [[3, 5, 30, 40], [-5, 20, 90, 50], [70, 0, 80, 60]]


@pytest.mark.parametrize("draws", [(0.7, 0.2), (0.3, 0.2), (0.7, 0.05), (0.3, 0.05)])
def test_images_boxes_and_masks_are_flipped_together(draws):
    """A mask must be under its box in the image after each combination of flips."""
    image = np.zeros((*SIZE, 3), np.uint8)
    image[5:40, 3:30] = 200  # the first box
    instances = instances_of(SIZE, BOXES)
    augmentation = DetectionAugmentation((200, 150), flip=0.5, vertical_flip=0.1)
    pixels, target = augment(image, instances, augmentation, Draws(*draws))
    assert pixels.shape == (3, 150, 200) and target.size == (150, 200)
    assert target.boxes.dtype == np.float32 and target.masks.shape == (3, 160, 224)
    assert not target.masks[:, 150:].any() and not target.masks[:, :, 200:].any()
    assert target.boxes.min() >= 0 and target.boxes[:, 2].max() <= 200 and target.boxes[:, 3].max() <= 150
    plain, unflipped = augment(image, instances, augmentation, Draws(1, 1))
    expected, masks = plain, unflipped.masks[:, :150, :200]
    for axis, flipped in ((2, draws[0] < 0.5), (1, draws[1] < 0.1)):
        expected, masks = (np.flip(one, axis) if flipped else one for one in (expected, masks))
    assert np.array_equal(pixels, expected) and np.array_equal(target.masks[:, :150, :200], masks)
    for box, mask in zip(target.boxes, target.masks, strict=True):
        ys, xs = np.nonzero(mask)
        around = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert np.abs(around - box).max() <= 2.6  # a pixel of the original has 2.5
    assert pixels[:, target.masks[0, :150, :200] == 1].mean() > 190


def test_masks_are_rasterized_at_the_original_size():
    """Rasterizing polygons at the new size would give other borders."""
    triangle = [[[10.2, 10.7, 50.4, 14.1, 22.9, 47.3], [1, 1, 9, 1, 9, 9]]]
    instances = instances_of(SIZE, [[10, 10, 51, 48]], triangle)
    _, target = augment(np.zeros((*SIZE, 3), np.uint8), instances, DetectionAugmentation((640, 480)), Draws(1, 1))
    expected = resize_labels(decode_segmentation(instances.masks[0], SIZE), (480, 640))
    assert np.array_equal(target.masks[0, :480, :640], expected) and expected.sum() > 9_000
    at_new_size = decode_segmentation(tuple(8 * polygon for polygon in instances.masks[0]), (480, 640))
    assert not np.array_equal(at_new_size, expected)


def test_masks_are_optional():
    instances = instances_of(SIZE, BOXES, [None] * 3)
    image = np.zeros((*SIZE, 3), np.uint8)
    assert augment(image, instances, DetectionAugmentation(masks=False), Draws(0, 1))[1].masks is None
    with pytest.raises(ValueError, match="has no mask"):
        augment(image, instances, DetectionAugmentation(), Draws(0, 1))


def test_flips_are_drawn_from_the_generator():
    instances = instances_of(SIZE, BOXES)
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    augmentation = DetectionAugmentation((80, 60), flip=0.25, vertical_flip=0.75, masks=False)
    generator, times = np.random.default_rng(1), np.zeros(2)
    for _ in range(400):
        pixels, _ = augment(image, instances, augmentation, generator)
        same = [np.array_equal(np.flip(pixels.transpose(1, 2, 0), axes), image) for axes in ((), 1, 0, (0, 1))]
        assert sum(same) == 1
        times += [same[1] + same[3], same[2] + same[3]]
    assert times / 400 == pytest.approx([0.25, 0.75], abs=0.07)
    one, other = (augment(image, instances, augmentation, np.random.default_rng(5))[0] for _ in range(2))
    assert np.array_equal(one, other)


def test_a_batch_is_padded_to_its_largest_members():
    images = [np.full((3, height, width), 7, np.uint8) for height, width in ((40, 90), (64, 33), (1, 1))]
    batch, sizes = pad_batch(images)
    assert batch.shape == (3, 3, 64, 96) and sizes == [(40, 90), (64, 33), (1, 1)]
    for padded, (height, width) in zip(batch, sizes, strict=True):
        assert (padded[:, :height, :width] == 7).all() and padded.sum() == 21 * height * width


def test_an_image_of_another_size_is_rejected():
    message = r"80 x 61 pixels after the EXIF orientation, but the annotations are for 80 x 60 \(width x height\)"
    with pytest.raises(BadImages, match=message):
        augment(np.zeros((61, 80, 3), np.uint8), instances_of(SIZE, BOXES), DetectionAugmentation(), Draws(1, 1))


def test_masks_beyond_the_memory_are_rejected(monkeypatch):
    monkeypatch.setattr(detection, "_MOST_PIXELS", 3 * 60 * 80 - 1)
    with pytest.raises(BadImages, match="3 masks of 80 x 60 pixels need over 2 GiB; use a smaller scale"):
        augment(np.zeros((*SIZE, 3), np.uint8), instances_of(SIZE, BOXES), DetectionAugmentation((80, 60)), Draws(1, 1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": (0, 5)}, "scale"),
        ({"scale": (512,)}, "scale"),
        ({"flip": 1.5}, "flip 1.5: expected a number from 0 to 1"),
    ],
)
def test_settings_out_of_range_are_rejected(wrong, message):
    with pytest.raises(UsageError, match=message):
        DetectionAugmentation(**wrong)
    assert DetectionAugmentation(scale=[1333, 800]) == DetectionAugmentation()


def test_the_size_is_that_of_segmentation():
    """One function computes the size for both tasks, with another scale."""
    assert detection.keep_ratio_size is segmentation.keep_ratio_size
    assert keep_ratio_size((480, 640), detection.SCALE) == (800, 1067)
