"""Preprocess and augment images with boxes and masks, with the same numbers as in the authors' code.

The authors use mmdetection 2.19. Images are uint8 (H, W, 3) in RGB order and are resized with OpenCV as in
`fcvit.data.transforms.segmentation`. Sizes are (height, width), boxes x1, y1, x2, y2 in pixels, float32 (n, 4), and
masks uint8 (n, H, W) of 0 and 1. Functions that resize raise `MissingExtra` without OpenCV, and those that rasterize
masks without pycocotools.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fcvit.data.coco import Instances, different_size
from fcvit.data.masks import decode_segmentation
from fcvit.data.transforms.segmentation import aligned_size, keep_ratio_size, resize_image, resize_labels
from fcvit.errors import BadImages, UsageError

SCALE = (1333, 800)
_MOST_PIXELS = 1 << 31  # of all masks of an image


def preprocess(image: np.ndarray, scale: tuple[int, int] = SCALE) -> tuple[np.ndarray, np.ndarray]:
    """Resize an image with `keep_ratio_size`, without padding.

    Args:
        image: RGB image, uint8 (H, W, 3).
        scale: Largest length of the longer and of the shorter side in pixels, in any order.

    Returns:
        The image, uint8 (3, H', W'), and its scale factors (see `scale_factors`). `pad_batch` and
        `fcvit.data.transforms.segmentation.normalize` make a batch of several.
    """
    size = keep_ratio_size(_size(image), scale)
    resized = resize_image(image, size)
    return np.ascontiguousarray(resized.transpose(2, 0, 1)), scale_factors(_size(image), size)


def _size(image: np.ndarray) -> tuple[int, int]:
    height, width = image.shape[:2]
    return height, width


def scale_factors(size: tuple[int, int], new_size: tuple[int, int]) -> np.ndarray:
    """Return new/old width, height, width, height, float32 (4), by which boxes are multiplied."""
    height, width = (new / old for new, old in zip(new_size, size, strict=True))
    return np.array([width, height, width, height], np.float32)


def pad_batch(images: Sequence[np.ndarray]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Pad images on the right and below to the largest sides, rounded up to multiples of 32.

    Args:
        images: Images, uint8 (3, H, W) with any sizes.

    Returns:
        uint8 (B, 3, H', W'), and the size of each image without the padding. `normalize` with these sizes sets the
        padding to 0, as in the authors' code.
    """
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height, width = aligned_size((max(height for height, _ in sizes), max(width for _, width in sizes)))
    batch = np.zeros((len(images), 3, height, width), np.uint8)
    for padded, image in zip(batch, images, strict=True):
        padded[:, : image.shape[1], : image.shape[2]] = image
    return batch, sizes


def resize_boxes(boxes: np.ndarray, factors: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Multiply boxes by the scale factors and clip them to the resized image."""
    height, width = size
    return (boxes * factors).clip(0, np.array([width, height, width, height], np.float32))


def flip_boxes(boxes: np.ndarray, size: tuple[int, int], axis: int) -> np.ndarray:
    """Mirror boxes in an image of this size: left and right (axis 1), or top and bottom (axis 0)."""
    flipped = boxes.copy()
    low, high = (0, 2) if axis == 1 else (1, 3)
    flipped[:, low], flipped[:, high] = size[axis] - boxes[:, high], size[axis] - boxes[:, low]
    return flipped


def resized_masks(instances: Instances, size: tuple[int, int]) -> np.ndarray:
    """Rasterize masks at the size of the image and resize them with the nearest neighbor.

    Args:
        instances: Instances, all with a mask.
        size: Size of the result.

    Returns:
        uint8 (n, H, W).

    Raises:
        BadImages: The masks need more than 2 GiB.
    """
    count = len(instances.masks)
    if count * max(size[0] * size[1], instances.size[0] * instances.size[1]) > _MOST_PIXELS:
        raise BadImages(f"{count:,} masks of {size[1]} x {size[0]} pixels need over 2 GiB; use a smaller scale")
    masks = np.empty((count, *size), np.uint8)
    for index, mask in enumerate(instances.masks):
        if mask is None:
            raise ValueError("an instance has no mask; select those with one by `training_images`")
        masks[index] = resize_labels(decode_segmentation(mask, instances.size), size)
    return masks


@dataclasses.dataclass(frozen=True)
class DetectionAugmentation:
    """Settings of the augmentation. The defaults are those of the authors' configurations.

    Attributes:
        scale: Largest length of the longer and of the shorter side in pixels.
        flip: Probability of a horizontal flip.
        vertical_flip: Probability of a vertical flip.
        masks: Whether masks are read.

    Raises:
        UsageError: A value is out of range.
    """

    scale: tuple[int, int] = SCALE
    flip: float = 0.5
    vertical_flip: float = 0.0
    masks: bool = True

    def __post_init__(self) -> None:
        scale = tuple(self.scale)  # JSON gives a list, which is not equal to a tuple
        if len(scale) != 2 or min(scale) < 1:
            raise UsageError(f"scale {scale!r}: expected two numbers above 0")
        object.__setattr__(self, "scale", scale)
        for field in ("flip", "vertical_flip"):
            if not 0 <= getattr(self, field) <= 1:
                raise UsageError(f"{field} {getattr(self, field)!r}: expected a number from 0 to 1")


class DetectionTarget(NamedTuple):
    """The ground truth of a network's input.

    Attributes:
        size: Size of the image without the padding.
        boxes: Boxes in the resized and flipped image, float32 (n, 4).
        labels: Class index of each box, int64 (n).
        masks: Masks in the image padded to multiples of 32, uint8 (n, H', W'), or None.
    """

    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None


def augment(
    image: np.ndarray, instances: Instances, augmentation: DetectionAugmentation, generator: np.random.Generator
) -> tuple[np.ndarray, DetectionTarget]:
    """Resize and flip an image with its boxes and masks as in the authors' training.

    Draws two numbers from the generator: the decision to flip horizontally, and the decision to flip vertically.

    Args:
        image: RGB image, uint8 (H, W, 3).
        instances: The instances to train on, from `fcvit.data.coco.training_images`.
        augmentation: Settings.
        generator: Random number generator.

    Returns:
        The image, uint8 (3, H', W') without padding, and its target.

    Raises:
        BadImages: The image has another size than its annotations, or the masks need more than 2 GiB.
    """
    check_size(image, instances)
    pixels, factors = preprocess(image, augmentation.scale)
    size = (pixels.shape[1], pixels.shape[2])
    boxes = resize_boxes(instances.corners(), factors, size)
    masks = resized_masks(instances, size) if augmentation.masks else None
    draws = generator.random(2)
    for axis, probability, draw in ((1, augmentation.flip, draws[0]), (0, augmentation.vertical_flip, draws[1])):
        if draw < probability:
            boxes = flip_boxes(boxes, size, axis)
            pixels = np.flip(pixels, axis + 1)
            masks = np.flip(masks, axis + 1) if masks is not None else None
    if masks is not None:
        padding = [(0, aligned - length) for aligned, length in zip(aligned_size(size), size, strict=True)]
        masks = np.pad(masks, [(0, 0), *padding])
    return np.ascontiguousarray(pixels), DetectionTarget(size, boxes, instances.labels, masks)


def check_size(image: np.ndarray, instances: Instances) -> None:
    """Compare the size of an image with that of its annotations.

    Raises:
        BadImages: The sizes are different.
    """
    if _size(image) != instances.size:
        raise BadImages(different_size(_size(image), instances.size))
