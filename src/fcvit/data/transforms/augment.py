"""Augment training images as in the authors' recipe, with NumPy and Pillow only.

The augmentation corresponds to timm's `create_transform`, which the authors' `train.py` calls: random resized crop,
horizontal flip, RandAugment (arXiv 1909.13719) with timm's settings `rand-m9-mstd0.5-inc1`, and random erasing (arXiv
1708.04896). Hashes in the tests verify that the operations give the same pixels as timm. The random numbers differ.

All random numbers are drawn from the generator that is passed in, in the order that each docstring states. With a
generator from `pixel_generator`, the result depends only on seed, epoch and image and not on the number or order of
the processes, provided that the versions of NumPy and Pillow are the same.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from fcvit.data.transforms.pixel_batch import Rectangle
from fcvit.data.transforms.preprocess import FILTERS, center_crop, planes, resize_shorter
from fcvit.errors import UsageError

FILL = (124, 116, 104)  # ImageNet's mean, which fills the empty areas of rotated, sheared and translated images
HIGHEST_LEVEL = 10.0

Crop = Literal["resized", "padded", "centre"]
Interpolation = Literal["bilinear", "bicubic"]
RandomInterpolation = Literal["random", Interpolation]
Purpose = Literal["augment", "erase", "mix", "sample"]

_INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
_PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
_TRIES = 10  # attempts to draw a rectangle that fits into the image
_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Settings of the augmentation before normalization. The defaults are those of the authors' recipe.

    `size` is S, the side of the result in pixels. The recipe documents the other fields, which have the same names.

    The values of `crop` are:

    - "resized": a random rectangle, resized to S x S.
    - "padded": the shorter side is resized to S and a reflected border is added. Then a random S x S window is cropped.
    - "centre": the shorter side is resized to S (bicubic), then the center is cropped, as in an evaluation with crop
      fraction 1.

    With the interpolation "random", one of the two filters is drawn for each image.

    Raises:
        UsageError: `crop_scale` or `crop_ratio` is not a valid range. The recipe checks the other fields.
    """

    size: int
    crop: Crop = "resized"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_interpolation: RandomInterpolation = "random"
    padding: int = 4
    flip: float = 0.5
    rand_augment: int = 2
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    operation_probability: float = 0.5
    erasing: float = 0.25

    def __post_init__(self) -> None:
        for field, highest in (("crop_scale", 1.0), ("crop_ratio", 100.0)):
            match getattr(self, field):
                case [low, high] if (
                    all(isinstance(x, numbers.Real) for x in (low, high)) and 0 < low <= high <= highest
                ):
                    object.__setattr__(self, field, (low, high))  # JSON gives a list, which is not equal to a tuple
                case pair:
                    raise UsageError(
                        f"{field} {pair!r}: expected two numbers (lowest, highest) above 0 and at most {highest:g}"
                    )


def pixel_generator(seed: int, epoch: int, index: int, purpose: Purpose) -> np.random.Generator:
    """Return the random number generator for an image in an epoch, or for a batch if the purpose is "mix".

    Args:
        seed: Seed of the training run, from 0 to 2^63 - 1.
        epoch: Number of the epoch, from 0 to 2^32 - 1.
        index: Position of the image in the data set, or of the batch in the epoch for "mix", from 0 to 2^32 - 1.
        purpose: "augment", "erase", "mix", or "sample" for a detector. The generators of different purposes are
            independent.

    Raises:
        UsageError: A number is out of range, or the purpose is unknown.
    """
    for name, value, bits in (("seed", seed, 63), ("epoch", epoch, 32), ("index", index, 32)):
        if not isinstance(value, numbers.Integral) or not 0 <= value < 1 << bits:
            raise UsageError(f"{name} {value!r}: expected an integer from 0 to {(1 << bits) - 1}")
    if purpose not in _PURPOSES:
        raise UsageError(f"purpose {purpose!r}: expected one of {', '.join(_PURPOSES)}")
    # NumPy splits each number into 32-bit words. The seed always has two words here, so that all keys are different.
    return np.random.default_rng([*divmod(int(seed), 1 << 32), int(epoch), int(index), _PURPOSES.index(purpose)])


def augment(image: Image.Image, augmentation: Augmentation, generator: np.random.Generator) -> np.ndarray:
    """Crop, flip and apply RandAugment, in this order, to an RGB image of any size. Return uint8 (3, S, S).

    The order of the random numbers is:

    1. The interpolation of the crop, except for "centre".
    2. The crop: `draw_crop` for "resized", top and left for "padded", nothing for "centre".
    3. The decision to flip.
    4. The operations (`draw_operations`).

    Raises:
        UsageError: The image is not RGB.
        BadImages: The crop is "padded" or "centre" and the resized image would be too large, because the image is very
            long and thin.
    """
    if image.mode != "RGB":
        raise UsageError(f"image of mode {image.mode}: expected RGB")
    image = _crop(image, augmentation, generator)
    if generator.random() < augmentation.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for operation in draw_operations(augmentation, generator):
        if operation.applied:
            image = apply_operation(image, operation.name, operation.level, operation.negated, operation.interpolation)
    return planes(image)


def _crop(image: Image.Image, augmentation: Augmentation, generator: np.random.Generator) -> Image.Image:
    size = augmentation.size
    if augmentation.crop == "centre":
        return center_crop(resize_shorter(image, size, "bicubic"), size)
    interpolation = _draw_interpolation(generator)  # always drawn, so that the following numbers stay the same
    if augmentation.crop_interpolation != "random":
        interpolation = augmentation.crop_interpolation
    if augmentation.crop == "resized":
        box = draw_crop(image.size, augmentation.crop_scale, augmentation.crop_ratio, generator)
        # Crop before resizing, because `resize` with a box would also use pixels outside the box.
        return image.crop(box).resize((size, size), FILTERS[interpolation])
    pixels = np.asarray(resize_shorter(image, size, interpolation))
    # Pad the indices of rows and columns instead of the image, so that only the crop is copied.
    rows, columns = (np.pad(np.arange(length), augmentation.padding, mode="reflect") for length in pixels.shape[:2])
    top, left = (int(generator.integers(len(indices) - size, endpoint=True)) for indices in (rows, columns))
    return Image.fromarray(pixels[rows[top : top + size, None], columns[left : left + size]])


def draw_crop(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw the rectangle of a random resized crop, with the same algorithm as torchvision and timm.

    The area is drawn uniformly, then the ratio log-uniformly, until the rectangle fits, at most ten times. Then top and
    left are drawn. If no rectangle fits, the result is the largest centered rectangle with a ratio in the range.

    Args:
        size: Width and height of the image.
        scale: Range of the rectangle's area as a fraction of the image's area.
        ratio: Range of the rectangle's width divided by its height.
        generator: Random number generator.

    Returns:
        (left, top, right, bottom) of a rectangle of at least 1 x 1 pixels.
    """
    width, height = size
    for _ in range(_TRIES):
        crop_width, crop_height = _draw_sides(width * height, scale, ratio, generator)
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(generator.integers(height - crop_height, endpoint=True))
            left = int(generator.integers(width - crop_width, endpoint=True))
            return left, top, left + crop_width, top + crop_height
    lowest, highest = ratio
    crop_width = min(width, max(1, round(height * highest)))
    crop_height = min(height, max(1, round(width / lowest)))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def _draw_sides(
    area: int, share: tuple[float, float], ratio: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int]:
    """Draw the product of two sides, uniformly as a fraction of the area, and then their ratio, log-uniformly."""
    target = generator.uniform(*share) * area
    drawn = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
    return round(math.sqrt(target * drawn)), round(math.sqrt(target / drawn))


def _draw_interpolation(generator: np.random.Generator) -> Interpolation:
    return _INTERPOLATIONS[generator.integers(len(_INTERPOLATIONS))]


class Operation(NamedTuple):
    """A drawn operation of RandAugment. It is skipped if `applied` is False."""

    name: str
    applied: bool
    level: float
    negated: bool
    interpolation: Interpolation


def draw_operations(augmentation: Augmentation, generator: np.random.Generator) -> list[Operation]:
    """Draw the RandAugment operations for an image.

    For each operation these values are drawn in this order, whether they are needed or not: the name (uniform, with
    replacement), `applied`, the level (normal, clipped to 0 to 10), the sign and the interpolation.
    """
    return [
        Operation(
            name=OPERATIONS[generator.integers(len(OPERATIONS))],
            applied=bool(generator.random() < augmentation.operation_probability),
            level=min(max(generator.normal(augmentation.magnitude, augmentation.magnitude_std), 0.0), HIGHEST_LEVEL),
            negated=bool(generator.random() < 0.5),
            interpolation=_draw_interpolation(generator),
        )
        for _ in range(augmentation.rand_augment)
    ]


def operation_argument(name: str, level: float, negated: bool) -> float | None:
    """Return the argument of an operation at a level, or None if the operation has no argument.

    The argument is an angle in degrees, a number of bits, a threshold, a factor or a fraction of the image's side,
    depending on the operation.

    Args:
        name: Operation, one of `OPERATIONS`.
        level: Strength, 0 to 10.
        negated: Use the opposite direction if the operation has two directions.

    Raises:
        UsageError: The name is unknown or the level is out of range.
    """
    if name not in _APPLY:
        raise UsageError(f"operation {name!r}: expected one of {', '.join(OPERATIONS)}")
    if not 0 <= level <= HIGHEST_LEVEL:
        raise UsageError(f"level {level!r}: expected a number from 0 to {HIGHEST_LEVEL:g}")
    if name not in _ARGUMENT:
        return None
    share = level / HIGHEST_LEVEL
    return float(_ARGUMENT[name](-share if negated else share))


def apply_operation(
    image: Image.Image, name: str, level: float, negated: bool, interpolation: Interpolation
) -> Image.Image:
    """Apply an operation of RandAugment to an RGB image. The pixels equal those of timm's operation of this name.

    Args:
        image: RGB image.
        name: Operation, one of `OPERATIONS`.
        level: Strength, 0 to 10.
        negated: Use the opposite direction if the operation has two directions.
        interpolation: Filter for rotation, shear and translation. Other operations ignore it.

    Raises:
        UsageError: The name is unknown or the level is out of range.
    """
    argument = operation_argument(name, level, negated)
    return _APPLY[name](image, 0.0 if argument is None else argument, FILTERS[interpolation])


def _affine(image: Image.Image, matrix: tuple[float, ...], resample: Image.Resampling) -> Image.Image:
    """Apply an affine transform. The matrix (two rows of three) maps positions in the result to the image."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=FILL)


def _solarize_add(image: Image.Image, added: float) -> Image.Image:
    """Add a constant to all values below 128."""
    return image.point([min(255, value + int(added)) if value < 128 else value for value in range(256)] * 3)


def _factor(signed: float) -> float:
    """Return the factor of an enhancement. A factor of 1 does not change the image."""
    return max(0.1, 1 + signed * 0.9)


# Operation -> argument, as a function of level / highest level. The input is negative for the opposite direction.
_ARGUMENT: dict[str, Callable[[float], float]] = {
    "Rotate": lambda signed: signed * 30,
    # The highest level would give 0 bits, which current versions of Pillow reject.
    "PosterizeIncreasing": lambda signed: max(1, 4 - int(abs(signed) * 4)),
    "SolarizeIncreasing": lambda signed: 256 - int(abs(signed) * 256),
    "SolarizeAdd": lambda signed: int(abs(signed) * 110),
    "ColorIncreasing": _factor,
    "ContrastIncreasing": _factor,
    "BrightnessIncreasing": _factor,
    "SharpnessIncreasing": _factor,
    "ShearX": lambda signed: signed * 0.3,
    "ShearY": lambda signed: signed * 0.3,
    "TranslateXRel": lambda signed: signed * 0.45,
    "TranslateYRel": lambda signed: signed * 0.45,
}

_APPLY: dict[str, Callable[[Image.Image, float, Image.Resampling], Image.Image]] = {
    "AutoContrast": lambda image, _, __: ImageOps.autocontrast(image),
    "Equalize": lambda image, _, __: ImageOps.equalize(image),
    "Invert": lambda image, _, __: ImageOps.invert(image),
    "Rotate": lambda image, degrees, resample: image.rotate(degrees, resample, fillcolor=FILL),
    "PosterizeIncreasing": lambda image, bits, _: ImageOps.posterize(image, int(bits)),
    "SolarizeIncreasing": lambda image, threshold, _: ImageOps.solarize(image, int(threshold)),
    "SolarizeAdd": lambda image, added, _: _solarize_add(image, added),
    "ColorIncreasing": lambda image, factor, _: ImageEnhance.Color(image).enhance(factor),
    "ContrastIncreasing": lambda image, factor, _: ImageEnhance.Contrast(image).enhance(factor),
    "BrightnessIncreasing": lambda image, factor, _: ImageEnhance.Brightness(image).enhance(factor),
    "SharpnessIncreasing": lambda image, factor, _: ImageEnhance.Sharpness(image).enhance(factor),
    "ShearX": lambda image, shear, resample: _affine(image, (1, shear, 0, 0, 1, 0), resample),
    "ShearY": lambda image, shear, resample: _affine(image, (1, 0, 0, shear, 1, 0), resample),
    "TranslateXRel": lambda image, share, resample: _affine(image, (1, 0, share * image.width, 0, 1, 0), resample),
    "TranslateYRel": lambda image, share, resample: _affine(image, (1, 0, 0, 0, 1, share * image.height), resample),
}

OPERATIONS = tuple(_APPLY)  # timm's names of the 15 operations in its "increasing" set


def draw_erasing(size: tuple[int, int], probability: float, generator: np.random.Generator) -> Rectangle | None:
    """Draw a random rectangle of noise, N(0, 1) for each pixel and channel, for some of the images.

    This is timm's `RandomErasing` in mode "pixel". The area is uniform in 2% to a third of the image. The ratio of
    height to width is log-uniform in 0.3 to 1/0.3. If none of ten rectangles is smaller than the image, the image is
    not changed. In the authors' pipeline this is the last step, after mixing and normalization.

    These values are drawn in this order: the decision to erase, area and ratio until the rectangle fits, top, left, and
    the noise.

    Args:
        size: Height and width of the image.
        probability: Probability of erasing, 0 to 1.
        generator: Random number generator of the image.

    Returns:
        The rectangle, or None if the image is not changed.

    Raises:
        UsageError: The probability is out of range.
    """
    if not 0 <= probability <= 1:
        raise UsageError(f"probability {probability!r}: expected a number from 0 to 1")
    height, width = size
    for _ in range(_TRIES if generator.random() < probability else 0):
        box_height, box_width = _draw_sides(height * width, _ERASED_AREA, _ERASED_RATIO, generator)
        if box_height < height and box_width < width:
            top = int(generator.integers(height - box_height, endpoint=True))
            left = int(generator.integers(width - box_width, endpoint=True))
            return Rectangle(top, left, generator.standard_normal((3, box_height, box_width), np.float32))
    return None
