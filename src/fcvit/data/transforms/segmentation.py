"""Preprocess and augment images and label maps for segmentation, with the same pixels as in the authors' code.

The authors use mmsegmentation 0.19, which decodes, resizes and converts colors with OpenCV. Here Pillow decodes and
OpenCV does the rest. Images are uint8 (H, W, 3) in RGB order, label maps uint8 (H, W), and sizes (height, width). All
functions that resize or convert colors raise `MissingExtra` if OpenCV is not installed.

Random numbers are drawn from a `numpy.random.RandomState` in mmsegmentation's order. `RandomState(seed)` gives the
numbers that mmsegmentation draws after `numpy.random.seed(seed)`, and
`RandomState(pixel_generator(seed, epoch, index, "augment").bit_generator)` gives each image of a run its own numbers.
"""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image

from fcvit.data.transforms.pixel_batch import PixelBatch
from fcvit.data.transforms.preprocess import as_rgb, opened
from fcvit.errors import UsageError
from fcvit.frameworks import import_framework
from fcvit.models.variants import Preprocessing

IGNORED = 255  # label of pixels without a class
STRIDE = 32  # the network's input is resized to multiples of this
SCALE = (2048, 512)

_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_CROP_TRIES = 10
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = (-32, 32), (0.5, 1.5), (0.5, 1.5), (-18, 18)  # the last hue is 17
_HUES = 180  # OpenCV stores a hue as half of its angle in degrees


def decode(source: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> Image.Image:
    """Decode an image as RGB with the pixels of OpenCV.

    The orientation tag is applied, the alpha channel is dropped, and 16-bit values are cut to their upper 8 bits. CMYK
    JPEG files can differ from OpenCV by one level.

    Args:
        source: Path of the image, or an open file.
        name: Name of the image in messages, or None to use the source.

    Raises:
        BadImages: The file does not exist, is damaged, is not an image or has more pixels than Pillow's limit.
    """
    with opened(source, name) as image:
        return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB as in `decode`.

    Raises:
        ValueError: The image has 32-bit or float values outside 0 to 255, or floats from 0 to 1.
    """
    rgb = as_rgb(image, cut=True)
    transpose = _TRANSPOSES.get(_orientation(image))
    return rgb if transpose is None else rgb.transpose(transpose)


def rgb_pixels(image: "str | os.PathLike[str] | BinaryIO | Image.Image | np.ndarray") -> np.ndarray:
    """Return the pixels of an image, uint8 (H, W, 3), from its path or open file, a PIL image or an array.

    Raises:
        BadImages, ValueError: See `decode` and `upright_rgb`.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image)
    return np.asarray(upright_rgb(image) if isinstance(image, Image.Image) else decode(image))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, or 1 if it is missing or unreadable. Pillow itself applies it to TIFF files."""
    exif = Image.Exif()
    with contextlib.suppress(Exception):  # damaged EXIF data can make Pillow raise any exception
        exif.load(image.info.get("exif", b""))
        return int(exif.get(_ORIENTATION, 1))
    return 1


def keep_ratio_size(size: tuple[int, int], scale: tuple[int, int] = SCALE) -> tuple[int, int]:
    """Return the size after resizing towards a scale with the same ratio of the sides. Small images are enlarged.

    Args:
        size: Size of the image.
        scale: Largest length of the longer and of the shorter side in pixels, in any order.
    """
    factor = min(max(scale) / max(size), min(scale) / min(size))
    height, width = (max(1, int(length * factor + 0.5)) for length in size)
    return height, width


def aligned_size(size: tuple[int, int], divisor: int = STRIDE) -> tuple[int, int]:
    """Return the size with both sides rounded up to multiples of a divisor."""
    height, width = (-(-length // divisor) * divisor for length in size)
    return height, width


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image (H, W, 3) with OpenCV's bilinear interpolation. The same size returns the image itself."""
    return _resize(image, size, nearest=False)


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a label map (H, W) with OpenCV's nearest neighbor. The same size returns the label map itself."""
    return _resize(labels, size, nearest=True)


def _resize(array: np.ndarray, size: tuple[int, int], nearest: bool) -> np.ndarray:
    if array.shape[:2] == size:
        return array
    cv2 = import_framework("cv2")
    return cv2.resize(array, size[::-1], interpolation=cv2.INTER_NEAREST if nearest else cv2.INTER_LINEAR)


def preprocess(image: np.ndarray, scale: tuple[int, int] = SCALE, divisor: int = STRIDE) -> np.ndarray:
    """Resize an image (H, W, 3) as in the authors' test: with `keep_ratio_size`, then to `aligned_size`.

    The second resize stretches the image by less than `divisor` pixels per side.

    Returns:
        uint8 (3, H', W'), where H' and W' are multiples of `divisor`. `normalize` takes a batch of it.
    """
    image = resize_image(image, keep_ratio_size(_size(image), scale))
    return _planes(resize_image(image, aligned_size(_size(image), divisor)))


def _size(array: np.ndarray) -> tuple[int, int]:
    height, width = array.shape[:2]
    return height, width


def _planes(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def normalize(
    images: np.ndarray, preprocessing: Preprocessing, valid: Sequence[tuple[int, int]] | None = None
) -> np.ndarray:
    """Normalize images, uint8 (B, 3, H, W), with the same float32 values as mmcv's `imnormalize`.

    `fcvit.data.transforms.preprocess.normalize` rounds in another order.

    Args:
        images: RGB images.
        preprocessing: Mean and standard deviation for pixels from 0 to 1.
        valid: Size of each image without its padding on the right and below, or None without padding. The padding is
            set to 0, the mean color.

    Returns:
        float32 (B, 3, H, W).
    """
    return PixelBatch(images, normalization_table(preprocessing), valid).normalized()


def normalization_table(preprocessing: Preprocessing) -> np.ndarray:
    """Return the result of `normalize` for each pixel value in each channel, float32 (3, 256)."""
    # mmcv rounds mean and standard deviation to float32, computes in float64, and rounds after each operation.
    mean, std = (
        np.array([np.float32(255 * number) for number in numbers], np.float64)[:, None]
        for numbers in (preprocessing.mean, preprocessing.std)
    )
    return ((np.arange(256, dtype=np.float64) - mean).astype(np.float32) * (1 / std)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class SegmentationAugmentation:
    """Settings of the augmentation before normalization. The defaults are those of the authors' configurations.

    Attributes:
        crop_size: Size of the result.
        scale: Largest length of the longer and of the shorter side, before the factor, in pixels.
        scale_ratio: Range of the factor.
        max_class_share: A crop is drawn again, at most ten times, if one class has at least this share of its labeled
            pixels. 1 accepts every crop.
        flip: Probability of a horizontal flip.
        distortion: Whether to change brightness, contrast, saturation and hue.

    Raises:
        UsageError: A value is out of range.
    """

    crop_size: tuple[int, int] = (512, 512)
    scale: tuple[int, int] = SCALE
    scale_ratio: tuple[float, float] = (0.5, 2.0)
    max_class_share: float = 0.75
    flip: float = 0.5
    distortion: bool = True

    def __post_init__(self) -> None:
        for field in ("crop_size", "scale", "scale_ratio"):
            pair = tuple(getattr(self, field))  # JSON gives a list, which is not equal to a tuple
            if len(pair) != 2 or min(pair) <= 0:
                raise UsageError(f"{field} {pair!r}: expected two numbers above 0")
            object.__setattr__(self, field, pair)
        if self.scale_ratio[0] > self.scale_ratio[1]:
            raise UsageError(f"scale_ratio {self.scale_ratio!r}: expected the lowest factor first")
        for field in ("max_class_share", "flip"):
            if not 0 <= getattr(self, field) <= 1:
                raise UsageError(f"{field} {getattr(self, field)!r}: expected a number from 0 to 1")


def augment(
    image: np.ndarray, labels: np.ndarray, augmentation: SegmentationAugmentation, generator: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Resize, crop, flip, distort and pad an image and its label map as in the authors' training.

    The steps draw random numbers in this order: `random_resize`, `random_crop`, `random_flip`, `distort`.

    Args:
        image: Image, uint8 (H, W, 3).
        labels: Label map of the same size. 255 marks pixels without a class.
        augmentation: Settings.
        generator: Random number generator.

    Returns:
        Image, uint8 (3, crop height, crop width), label map (crop height, crop width), and the size without the
        padding, which is on the right and below. The image's padding is 0 here; `normalize` with this size sets it to
        the mean color. The label of the padding is 255.
    """
    image, labels = random_resize(image, labels, augmentation.scale, augmentation.scale_ratio, generator)
    image, labels = random_crop(image, labels, augmentation.crop_size, augmentation.max_class_share, generator)
    image, labels = random_flip(image, labels, augmentation.flip, generator)
    if augmentation.distortion:
        image = distort(image, generator)
    height, width = _size(image)
    padding = [(0, whole - length) for whole, length in zip(augmentation.crop_size, (height, width), strict=True)]
    return (
        np.pad(_planes(image), [(0, 0), *padding]),
        np.pad(labels, padding, constant_values=IGNORED),
        (height, width),
    )


def random_resize(
    image: np.ndarray,
    labels: np.ndarray,
    scale: tuple[int, int],
    ratio: tuple[float, float],
    generator: np.random.RandomState,
) -> tuple[np.ndarray, np.ndarray]:
    """Resize an image and its label map with `keep_ratio_size` towards the scale times a factor.

    Draws one number: the factor, uniform in the range `ratio`.
    """
    factor = generator.random_sample() * (ratio[1] - ratio[0]) + ratio[0]
    first, second = (max(1, int(length * factor)) for length in scale)
    size = keep_ratio_size(_size(image), (first, second))
    return resize_image(image, size), resize_labels(labels, size)


def random_crop(
    image: np.ndarray,
    labels: np.ndarray,
    size: tuple[int, int],
    max_class_share: float,
    generator: np.random.RandomState,
) -> tuple[np.ndarray, np.ndarray]:
    """Crop a random rectangle of at most `size`. A shorter side of the image is kept as it is.

    Draws top and left. If `max_class_share` is less than 1, draws both again until the crop has at least two classes
    and the largest has less than this share of the labeled pixels. The eleventh crop is taken without a check.
    """
    height, width = size

    def draw() -> tuple[slice, slice]:
        top = generator.randint(0, max(image.shape[0] - height, 0) + 1)
        left = generator.randint(0, max(image.shape[1] - width, 0) + 1)
        return slice(top, top + height), slice(left, left + width)

    window = draw()
    for _ in range(_CROP_TRIES if max_class_share < 1 else 0):
        counts = np.bincount(labels[window].ravel(), minlength=256)[:IGNORED]
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < max_class_share:
            break
        window = draw()
    return image[window], labels[window]


def random_flip(
    image: np.ndarray, labels: np.ndarray, probability: float, generator: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Flip an image and its label map horizontally with the given probability. Draws one number."""
    if generator.rand() < probability:
        image, labels = image[:, ::-1], labels[:, ::-1]
    return np.ascontiguousarray(image), np.ascontiguousarray(labels)


def distort(image: np.ndarray, generator: np.random.RandomState) -> np.ndarray:
    """Change brightness, contrast, saturation and hue of an image as mmsegmentation's `PhotoMetricDistortion`.

    Each change is applied with probability 1/2: the decision is drawn, then its amount. Between brightness and the
    other changes, one more decision is drawn: whether contrast is changed before saturation and hue, or after them.
    """
    if generator.randint(2):
        image = scale_values(image, offset=generator.uniform(*_BRIGHTNESS))
    contrast_first = generator.randint(2)
    if contrast_first and generator.randint(2):
        image = scale_values(image, generator.uniform(*_CONTRAST))
    if generator.randint(2):
        image = scale_saturation(image, generator.uniform(*_SATURATION))
    if generator.randint(2):
        image = shift_hue(image, generator.randint(*_HUE))
    if not contrast_first and generator.randint(2):
        image = scale_values(image, generator.uniform(*_CONTRAST))
    return image


def scale_values(values: np.ndarray, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """Multiply uint8 values by a factor and add an offset, in float32, clipped to 0 to 255 and rounded down."""
    table = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(offset)
    return table.clip(0, 255).astype(np.uint8)[values]


def scale_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply the saturation of an image by a factor."""
    cv2 = import_framework("cv2")
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = scale_values(hsv[..., 1], factor)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def shift_hue(image: np.ndarray, shift: int) -> np.ndarray:
    """Add a shift, in units of two degrees, to the hue of an image."""
    cv2 = import_framework("cv2")
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(np.int16) + shift) % _HUES
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
