"""Decode and preprocess images, with the same pixels as in the authors' evaluation.

The authors evaluate with timm's transform, which uses torchvision and Pillow: resize the shorter side to
`floor(size / crop fraction)` with Pillow's antialiased filter, crop the center, scale to [0, 1] and normalize. Resizing
with OpenCV or Paddle gives different pixels.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from fcvit.data.folders import FORMATS, open_file
from fcvit.errors import BadImages
from fcvit.foreign import IMAGE_KINDS, KIND_BYTES, foreign_kind
from fcvit.models.variants import Preprocessing

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
DEEP = ("I", "F")  # prefixes of Pillow's modes with more than 8 bits per channel, all of which are gray


def decoders() -> dict[str, str]:
    """Return the versions of Pillow's decoding libraries. The pixels can differ between versions."""
    return {name: v for name in ("libjpeg_turbo", "zlib", "webp", "libtiff") if (v := features.version(name))}


def decode(source: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> Image.Image:
    """Decode an image of a known format as RGB. Orientation tags are not applied, as in torchvision.

    Args:
        source: Path of the image, or an open file.
        name: Name of the image in messages, or None to use the source.

    Raises:
        BadImages: The file does not exist, is damaged, is not an image or has more pixels than Pillow's limit.
    """
    with opened(source, name) as image:
        return as_rgb(image)


def as_rgb(image: Image.Image, cut: bool = False) -> Image.Image:
    """Convert an image to RGB with 8 bits per channel, as torchvision does except for 16-bit gray images.

    16-bit gray images are converted to their upper 8 bits, as Pillow converts 16-bit color. Pillow would clip their
    values at 255, which makes most of a photograph white. An image whose maximum is at most 255 is not changed.

    Args:
        image: Image of any mode.
        cut: Convert all 16-bit gray images to their upper 8 bits, also those whose maximum is at most 255.

    Raises:
        ValueError: The image has 32-bit or float values outside 0 to 255, or floats from 0 to 1. The value of white is
            then unknown.
    """
    if not image.mode.startswith(DEEP):
        return image.convert("RGB")
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        if cut or high > 255:
            return Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    elif not (low >= 0 and high <= 255) or (image.mode == "F" and 0 < high <= 1):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"{kind} from {low:g} to {high:g}: the value of white is unknown; save with 8 or 16 bits")
    return image.convert("RGB")


@contextlib.contextmanager
def opened(source: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> Iterator[Image.Image]:
    """Open an image without decoding it. All errors while it is open are raised as in `decode`."""
    shown = source if name is None else name
    try:
        with contextlib.ExitStack() as stack:
            named = isinstance(source, str | os.PathLike)
            file = stack.enter_context(open_file(source)) if named else source
            image = stack.enter_context(Image.open(file, formats=list(FORMATS)))
            yield image
    except Exception as error:  # damaged images can make Pillow raise any exception
        if isinstance(error, UnidentifiedImageError):
            kind = foreign_kind(_head(source)) or "an unknown file format"
            damaged = " that is damaged or cut off" if kind in IMAGE_KINDS else ""
            reason = f"not a readable image: {kind}{damaged}"
        elif isinstance(error, Image.DecompressionBombError):
            reason = f"over the limit of {_limit():,} pixels; make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:
            reason = str(error)[:160]
        raise BadImages(f"{shown}: {reason}") from error


def _head(source: str | os.PathLike[str] | BinaryIO) -> bytes:
    """Return the first bytes of a file, or b"" if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(source, str | os.PathLike):
            with open_file(source) as file:
                return file.read(KIND_BYTES)
        source.seek(0)
        return source.read(KIND_BYTES)
    return b""


def _limit() -> float:
    """Return the maximum number of pixels that Pillow opens: 179 million, twice its limit for a warning."""
    return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else float("inf")


def resized(size: tuple[int, int], target: int) -> tuple[int, int]:
    """Return width and height after resizing the shorter side to `target`. The longer side is rounded down."""
    width, height = size
    return (target, int(target * height / width)) if width <= height else (int(target * width / height), target)


def crop_start(length: int, side: int) -> int:
    """Return the position at which a center crop begins, which is negative if the image is shorter than the crop."""
    return round((length - side) / 2.0)  # rounds half to even


def resize_shorter(image: Image.Image, target: int, interpolation: str) -> Image.Image:
    """Resize the shorter side to `target` pixels and the longer side in proportion, rounded down.

    Args:
        image: RGB image of any size. It is returned itself if its shorter side already has this size.
        target: Size of the shorter side in pixels.
        interpolation: Key in `FILTERS`.

    Raises:
        BadImages: The resized image would be too large, because the image is very long and thin.
    """
    if min(image.size) == target:
        return image
    size = width, height = resized(image.size, target)
    if width * height > _limit():
        raise BadImages(
            f"{image.width} x {image.height} pixels would be resized to {width} x {height}, over the limit of "
            f"{_limit():,} pixels; crop the image first"
        )
    return image.resize(size, FILTERS[interpolation])


def planes(image: Image.Image) -> np.ndarray:
    """Convert an RGB image to an array, uint8 (3, H, W)."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def crop(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Resize and center-crop an RGB image of any size to uint8 (3, S, S), where S is the input size.

    Raises:
        BadImages: The resized image would be too large, because the image is very long and thin.
    """
    image = resize_shorter(image, preprocessing.resize, preprocessing.interpolation)
    return planes(center_crop(image, preprocessing.input_size))


def center_crop(image: Image.Image, side: int) -> Image.Image:
    """Crop `side` x `side` pixels at the center."""
    left, top = (crop_start(length, side) for length in image.size)
    return image.crop((left, top, left + side, top + side))


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """A `fcvit.data.loader.Transform` that resizes and crops an image for evaluation and keeps its target."""

    preprocessing: Preprocessing

    def __call__(self, image: Image.Image, target: Any, index: int, /) -> tuple[np.ndarray, Any]:
        return crop(image, self.preprocessing), target


def rgb_image(image: Any) -> Image.Image:
    """Return an image as RGB, from its path, a PIL image or an array.

    Raises:
        BadImages, ValueError: See `decode` and `as_rgb`.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image)
    return as_rgb(image) if isinstance(image, Image.Image) else decode(image)


def normalize(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Normalize RGB images, uint8 (B, 3, H, W): scale to [0, 1], subtract the mean, divide by the standard deviation.

    Returns:
        float32 (B, 3, H, W).
    """
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    scaled = images.astype(np.float32)
    scaled /= np.float32(255)
    scaled -= mean
    scaled /= std
    return scaled


def normalization_table(preprocessing: Preprocessing) -> np.ndarray:
    """Return the result of `normalize` for each pixel value in each channel, float32 (3, 256)."""
    values = np.arange(256, dtype=np.uint8)
    return normalize(np.broadcast_to(values, (1, 3, 1, 256)), preprocessing).reshape(3, 256)


def preprocess(image: str | os.PathLike[str] | Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Decode, resize and crop an image to uint8 (3, S, S). Engines and `normalize` take a batch, (B, 3, S, S).

    Args:
        image: Image, or its path.
        preprocessing: Input size, crop fraction and interpolation.

    Raises:
        BadImages: The image cannot be read.
    """
    name, decoded = ("image", image) if isinstance(image, Image.Image) else (image, decode(image))
    try:
        return crop(decoded if decoded.mode == "RGB" else as_rgb(decoded), preprocessing)
    except ValueError as error:
        raise BadImages(f"{name}: {error}") from error
