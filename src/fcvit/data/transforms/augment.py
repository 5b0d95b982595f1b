"""Augmentation of training images, as in the authors' recipe; NumPy and Pillow only.

The fields are those of timm's `create_transform` (the authors' `train.py` calls it): random resized crop, horizontal
flip, RandAugment (arXiv 1909.13719) in timm's form `rand-m9-mstd0.5-inc1`, random erasing (arXiv 1708.04896). The
operations are held to the authors' pixels by hash; the random numbers are our own.

Everything random comes from the generator that is passed in, in the order that each docstring states. With one from
`pixel_generator`, the result depends on seed, epoch and image alone, whatever the number and order of the processes
that compute it (as long as the versions of NumPy and Pillow are the same).
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from fcvit.data.transforms.preprocess import FILTERS, center_crop, planes, resize_shorter
from fcvit.errors import UsageError

FILL = (124, 116, 104)  # ImageNet's mean: what comes into the picture where it is turned or moved
HIGHEST_LEVEL = 10.0

Crop = Literal["resized", "padded", "centre"]
Interpolation = Literal["bilinear", "bicubic"]
RandomInterpolation = Literal["random", Interpolation]
Purpose = Literal["augment", "erase", "mix"]

_INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
_PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
_TRIES = 10  # for a rectangle that fits
_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What happens to a training image before it is normalized; the defaults are the authors' recipe.

    The recipe, whose fields these are, describes them. `size` is S, the side of the result in pixels. Crops: "resized"
    is a random rectangle, resized to S x S; "padded" has the shorter side resized to S, then S x S at random from the
    image with a reflected border; "centre" has the shorter side resized to S (bicubic), then the center, as an
    evaluation with crop fraction 1 does. The interpolation "random" is one of both, drawn for each image.

    Raises:
        UsageError: `crop_scale` or `crop_ratio` is no range. The recipe checks the other fields.
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
                    object.__setattr__(self, field, (low, high))  # a list comes from JSON, and is not equal to a tuple
                case pair:
                    raise UsageError(
                        f"{field} {pair!r}: expected two numbers, lowest and highest, above 0 and at most {highest:g}"
                    )


def pixel_generator(seed: int, epoch: int, index: int, purpose: Purpose) -> np.random.Generator:
    """Return the random numbers of one image (or, to mix, of one batch) in one epoch.

    Args:
        seed: of the training run, from 0 to below 2^63.
        epoch: from 0 to below 2^32.
        index: of the image in the data set, or to mix, of the batch in the epoch; below 2^32.
        purpose: "augment", "erase" or "mix"; each has numbers of its own.

    Raises:
        UsageError: a number out of its range, or an unknown purpose.
    """
    for name, value, bits in (("seed", seed, 63), ("epoch", epoch, 32), ("index", index, 32)):
        if not isinstance(value, numbers.Integral) or not 0 <= value < 1 << bits:
            raise UsageError(f"{name} {value!r}: expected a whole number from 0 to {(1 << bits) - 1}")
    if purpose not in _PURPOSES:
        raise UsageError(f"purpose {purpose!r}: expected one of {', '.join(_PURPOSES)}")
    # NumPy cuts each number into words of 32 bits. With always two for the seed, no two keys are the same words.
    return np.random.default_rng([*divmod(int(seed), 1 << 32), int(epoch), int(index), _PURPOSES.index(purpose)])


def augment(image: Image.Image, augmentation: Augmentation, generator: np.random.Generator) -> np.ndarray:
    """Crop, flip and apply RandAugment, in this order, to an RGB image of any size; return uint8 (3, S, S).

    Drawn, in this order: the filter of the crop; its place (`draw_crop`, or for "padded" top and left;
    "centre" draws nothing, the filter included); whether to flip; the operations (`draw_operations`).

    Raises:
        UsageError: the image is not RGB.
        BadImages: "padded" or "centre", and so long and thin that its resized form would be enormous.
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
    interpolation = _draw_interpolation(generator)  # drawn always: the numbers that follow stay the same
    if augmentation.crop_interpolation != "random":
        interpolation = augmentation.crop_interpolation
    if augmentation.crop == "resized":
        box = draw_crop(image.size, augmentation.crop_scale, augmentation.crop_ratio, generator)
        # Cut first: resizing a box of the whole image would let in pixels from beyond its edge.
        return image.crop(box).resize((size, size), FILTERS[interpolation])
    pixels = np.asarray(resize_shorter(image, size, interpolation))
    # The border is in the indices of rows and columns: only what is cut out is copied.
    rows, columns = (np.pad(np.arange(length), augmentation.padding, mode="reflect") for length in pixels.shape[:2])
    top, left = (int(generator.integers(len(places) - size, endpoint=True)) for places in (rows, columns))
    return Image.fromarray(pixels[rows[top : top + size, None], columns[left : left + size]])


def draw_crop(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw the rectangle of a random resized crop (torchvision's rule, which timm shares).

    Its area is uniform in `scale`, width over height log-uniform in `ratio`. Drawn: area, ratio, as long as the
    rectangle does not fit, at most ten times; then top, left. Where none fits: the largest at the center whose ratio
    is in the range. `size` is width and height of the image; returns (left, top, right, bottom), at least 1 x 1.
    """
    width, height = size
    for _ in range(_TRIES):
        across, down = _draw_sides(width * height, scale, ratio, generator)
        if 0 < across <= width and 0 < down <= height:
            top = int(generator.integers(height - down, endpoint=True))
            left = int(generator.integers(width - across, endpoint=True))
            return left, top, left + across, top + down
    lowest, highest = ratio
    across = min(width, max(1, round(height * highest)))
    down = min(height, max(1, round(width / lowest)))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def _draw_sides(
    area: int, share: tuple[float, float], ratio: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int]:
    """Draw two sides whose product is a uniform share of the area, then their ratio, log-uniform."""
    target = generator.uniform(*share) * area
    drawn = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
    return round(math.sqrt(target * drawn)), round(math.sqrt(target / drawn))


def _draw_interpolation(generator: np.random.Generator) -> Interpolation:
    return _INTERPOLATIONS[generator.integers(len(_INTERPOLATIONS))]


class Operation(NamedTuple):
    """One operation of RandAugment as it was drawn; `applied`: whether it takes place."""

    name: str
    applied: bool
    level: float
    negated: bool
    interpolation: Interpolation


def draw_operations(augmentation: Augmentation, generator: np.random.Generator) -> list[Operation]:
    """Draw the operations of one image.

    Drawn for each, needed or not: its name, uniformly and with replacement; whether it is applied; the level, normal
    and cut to 0 to 10; the sign; the filter.
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
    """Return what an operation is told: degrees, bits, a threshold, a factor, a share of the side; None: nothing.

    Args:
        name: one of `OPERATIONS`.
        level: 0 to 10.
        negated: the other direction, where the operation has two.

    Raises:
        UsageError: an unknown name, or a level out of its range.
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
    """Apply an operation of RandAugment to an RGB image, pixel for pixel as timm's of that name.

    Args:
        name, level, negated: see `operation_argument`.
        interpolation: the filter of turning, shearing and moving; nothing to the others.

    Raises:
        UsageError: an unknown name, or a level out of its range.
    """
    argument = operation_argument(name, level, negated)
    return _APPLY[name](image, 0.0 if argument is None else argument, FILTERS[interpolation])


def _affine(image: Image.Image, matrix: tuple[float, ...], resample: Image.Resampling) -> Image.Image:
    """Move each pixel by the matrix from its place in the result to that in the image, row by row."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=FILL)


def _solarize_add(image: Image.Image, added: float) -> Image.Image:
    """Brighten the dark half of the values."""
    return image.point([min(255, value + int(added)) if value < 128 else value for value in range(256)] * 3)


def _factor(signed: float) -> float:
    """Return the factor of an enhancement; 1 leaves the image as it is."""
    return max(0.1, 1 + signed * 0.9)


# Of the share of the highest level, negative where the direction is the other one; some have but one.
_ARGUMENT: dict[str, Callable[[float], float]] = {
    "Rotate": lambda signed: signed * 30,
    # The highest level asks for 0 bits, which is an error in today's Pillow.
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

OPERATIONS = tuple(_APPLY)  # the 15 of RandAugment by timm's names, those of its "increasing" set


def erase(images: np.ndarray, probability: float, generators: Sequence[np.random.Generator]) -> None:
    """Put a rectangle of noise, N(0, 1) for each pixel and channel, into some images, in place.

    timm's `RandomErasing` in mode "pixel": its area uniform in 2 % to a third of the image, height over width
    log-uniform in 0.3 to 1/0.3, ten tries to find one that is smaller than the image, else none. In the authors'
    pipeline it comes last, after mixing and normalizing.

    Drawn for each image from its own generator: whether; area, ratio, as long as it does not fit; top, left; the noise.

    Args:
        images: float32 (B, 3, H, W), normalized.
        probability: for each image, 0 to 1.
        generators: B of them.

    Raises:
        UsageError: an argument of another form.
    """
    if images.dtype != np.float32 or images.ndim != 4 or images.shape[1] != 3:
        raise UsageError(f"images {images.dtype} {images.shape}: expected float32 of shape (B, 3, H, W)")
    if not 0 <= probability <= 1:
        raise UsageError(f"probability {probability!r}: expected a number from 0 to 1")
    if len(generators) != len(images):
        raise UsageError(f"{len(generators)} generators: expected one for each of {len(images)} images")
    height, width = images.shape[2:]
    for image, generator in zip(images, generators, strict=True):
        for _ in range(_TRIES if generator.random() < probability else 0):
            down, across = _draw_sides(height * width, _ERASED_AREA, _ERASED_RATIO, generator)
            if down < height and across < width:
                top = int(generator.integers(height - down, endpoint=True))
                left = int(generator.integers(width - across, endpoint=True))
                noise = generator.standard_normal((len(image), down, across), np.float32)
                image[:, top : top + down, left : left + across] = noise
                break
