"""From an image file to what the network sees, pixel for pixel as in the authors' evaluation.

The authors evaluate with timm's transform over torchvision and Pillow: shorter side to
`floor(size / crop fraction)` with Pillow's antialiased filter, centre crop, [0, 1], normalise.
OpenCV's and Paddle's own resizing give other pixels.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from fcvit.errors import BadImages
from fcvit.images.folder import FORMATS, open_file
from fcvit.variants import Preprocessing

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def decoders() -> dict[str, str]:
    """Versions of the libraries that decode inside Pillow: other releases give other pixels."""
    found = {name: features.version(name) for name in ("libjpeg_turbo", "zlib", "webp", "libtiff")}
    return {name: version for name, version in found.items() if version}


def decode(source: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> Image.Image:
    """Read an image of a known format as RGB, as torchvision does: orientation tags are not applied.

    Args:
        source: its path, or a file that is open.
        name: what messages call it; None: the source.

    Raises:
        BadImages: missing, damaged, not an image, or of more pixels than Pillow deems safe.
    """
    with opened(source, name) as image:
        return image.convert("RGB")


@contextlib.contextmanager
def opened(source: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> Iterator[Image.Image]:
    """The same image as the file has it, not yet decoded; what fails while it is open, fails as there.

    Raises:
        BadImages: as `decode`.
    """
    shown = source if name is None else name
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(source, str | os.PathLike):
                source = stack.enter_context(open_file(source))
            image = stack.enter_context(Image.open(source, formats=list(FORMATS)))
            _check_area(image.width, image.height)
            yield image
    except Exception as error:  # what a damaged image makes Pillow raise has no useful bound
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:
            reason = str(error)[:120]
        raise BadImages(f"{shown}: {reason}") from error


def _check_area(width: int, height: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit and width * height > limit:
        raise ValueError(f"{width} x {height} pixels, over the limit of {limit}")


def resized(size: tuple[int, int], target: int) -> tuple[int, int]:
    """Width and height after resizing so that the shorter one is `target`; the longer one is truncated, not rounded."""
    width, height = size
    return (target, int(target * height / width)) if width <= height else (int(target * width / height), target)


def crop_start(length: int, side: int) -> int:
    """Where the centre of a side begins; negative where it is shorter than the crop."""
    return round((length - side) / 2.0)  # half to even


def resize_shorter(image: Image.Image, target: int, interpolation: str) -> Image.Image:
    """Resize so that the shorter side has `target` pixels, the longer one in proportion, truncated.

    Args:
        image: RGB, any size; handed back itself if the size is already right.
        interpolation: a key of `FILTERS`.

    Raises:
        BadImages: so long and thin that its resized form would be enormous.
    """
    if min(image.size) == target:
        return image
    size = resized(image.size, target)
    try:
        _check_area(*size)
    except ValueError as error:
        raise BadImages(f"{image.width} x {image.height} pixels would be resized to {error}") from error
    return image.resize(size, FILTERS[interpolation])


def planes(image: Image.Image) -> np.ndarray:
    """An RGB image as uint8 (3, H, W)."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def crop(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Resize and centre-crop.

    Args:
        image: RGB, any size.
        preprocessing: see `Preprocessing`; S is its input size.

    Returns:
        uint8 of shape (3, S, S).

    Raises:
        BadImages: so long and thin that its resized form would be enormous.
    """
    image = resize_shorter(image, preprocessing.resize, preprocessing.interpolation)
    return planes(centre_crop(image, preprocessing.input_size))


def centre_crop(image: Image.Image, side: int) -> Image.Image:
    """Cut `side` x `side` pixels out of the centre."""
    left, top = (crop_start(length, side) for length in image.size)
    return image.crop((left, top, left + side, top + side))


@dataclasses.dataclass(frozen=True)
class Centre:
    """The evaluation's view of an image (see `fcvit.images.loader.View`)."""

    preprocessing: Preprocessing

    @property
    def size(self) -> int:
        return self.preprocessing.input_size

    def __call__(self, image: Image.Image, index: int, /) -> np.ndarray:
        return crop(image, self.preprocessing)


def normalise(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """uint8 (B, 3, H, W) in RGB -> float32 of the same shape: to [0, 1], less the mean, over the std."""
    mean = np.array(preprocessing.mean, np.float32)[:, None, None]
    std = np.array(preprocessing.std, np.float32)[:, None, None]
    scaled = images.astype(np.float32)
    scaled /= np.float32(255)
    scaled -= mean
    scaled /= std
    return scaled


def preprocess(image: str | os.PathLike[str] | Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """An image, or the path of one -> uint8 (3, S, S), ready for an engine or for `normalise`.

    Raises:
        BadImages: it cannot be read.
    """
    return crop(image.convert("RGB") if isinstance(image, Image.Image) else decode(image), preprocessing)
