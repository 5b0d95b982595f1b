"""From an image file to what the network sees, pixel for pixel as in the authors' evaluation.

The authors evaluate with timm's transform over torchvision and Pillow: shorter side to `floor(size / crop fraction)`
with Pillow's antialiased filter, center crop, [0, 1], normalize. OpenCV's and Paddle's own resizing give other pixels.
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
DEEP = ("I", "F")  # Pillow's modes of more than 8 bits a channel begin so; all are gray


def decoders() -> dict[str, str]:
    """Return the versions of the libraries that decode inside Pillow; other releases give other pixels."""
    return {name: v for name in ("libjpeg_turbo", "zlib", "webp", "libtiff") if (v := features.version(name))}


def decode(source: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> Image.Image:
    """Read an image of a known format as RGB, as torchvision does: orientation tags are not applied.

    Args:
        source: its path, or a file that is open.
        name: what messages call it; None: the source.

    Raises:
        BadImages: missing, damaged, not an image, or of more pixels than Pillow deems safe.
    """
    with opened(source, name) as image:
        return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB of 8 bits a channel, as torchvision does, but 16-bit gray by its upper 8 bits.

    So does Pillow itself with 16-bit color; 16-bit gray it would cut off at 255, and nearly all of a photograph would
    be white. Values up to 255 stay as they are, whatever the type.

    Raises:
        ValueError: 32 bits, or floats, with values that are not from 0 to 255: their range is not known.
    """
    if not image.mode.startswith(DEEP):
        return image.convert("RGB")
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        if high > 255:
            return Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    elif not (low >= 0 and high <= 255) or (image.mode == "F" and 0 < high <= 1):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"{kind} from {low:g} to {high:g}, whose range is not known; save it with 8 or 16 bits")
    return image.convert("RGB")


@contextlib.contextmanager
def opened(source: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> Iterator[Image.Image]:
    """Open an image as the file has it, not yet decoded; whatever fails while it is open raises as `decode` does."""
    shown = source if name is None else name
    try:
        with contextlib.ExitStack() as stack:
            named = isinstance(source, str | os.PathLike)
            file = stack.enter_context(open_file(source)) if named else source
            image = stack.enter_context(Image.open(file, formats=list(FORMATS)))
            yield image
    except Exception as error:  # what a damaged image makes Pillow raise has no useful bound
        if isinstance(error, UnidentifiedImageError):
            what = foreign_kind(_head(source)) or "of no known kind"
            reason = f"not an image that can be read: {what}"
            reason += " that is damaged or cut off" if what in IMAGE_KINDS else ""
        elif isinstance(error, Image.DecompressionBombError):  # Pillow's own limit, found before the size is known
            reason = f"over the limit of {_limit():,} pixels; make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:
            reason = str(error)[:160]
        raise BadImages(f"{shown}: {reason}") from error


def _head(source: str | os.PathLike[str] | BinaryIO) -> bytes:
    """Return the first bytes of what is no image."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(source, str | os.PathLike):
            with open_file(source) as file:
                return file.read(KIND_BYTES)
        source.seek(0)
        return source.read(KIND_BYTES)
    return b""


def _limit() -> float:
    """Return how many pixels Pillow opens: 179 million, twice the number at which it warns."""
    return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else float("inf")


def resized(size: tuple[int, int], target: int) -> tuple[int, int]:
    """Return width and height with `target` for the shorter one; the longer one is truncated, not rounded."""
    width, height = size
    return (target, int(target * height / width)) if width <= height else (int(target * width / height), target)


def crop_start(length: int, side: int) -> int:
    """Return where the center of a side begins; negative where it is shorter than the crop."""
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
    size = width, height = resized(image.size, target)
    if width * height > _limit():
        raise BadImages(
            f"{image.width} x {image.height} pixels would be resized to {width} x {height}, over the limit of "
            f"{_limit():,} pixels; crop it first"
        )
    return image.resize(size, FILTERS[interpolation])


def planes(image: Image.Image) -> np.ndarray:
    """Return an RGB image as uint8 (3, H, W)."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def crop(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Resize and center-crop an RGB image of any size to uint8 (3, S, S), S the input size.

    Raises:
        BadImages: so long and thin that its resized form would be enormous.
    """
    image = resize_shorter(image, preprocessing.resize, preprocessing.interpolation)
    return planes(center_crop(image, preprocessing.input_size))


def center_crop(image: Image.Image, side: int) -> Image.Image:
    """Cut `side` x `side` pixels out of the center."""
    left, top = (crop_start(length, side) for length in image.size)
    return image.crop((left, top, left + side, top + side))


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """Resize and crop an image for evaluation (a `fcvit.data.loader.Transform`); its target stays."""

    preprocessing: Preprocessing

    def __call__(self, image: Image.Image, target: Any, index: int, /) -> tuple[np.ndarray, Any]:
        return crop(image, self.preprocessing), target


def normalize(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Bring uint8 (B, 3, H, W) in RGB to [0, 1], less the mean, over the standard deviation: float32."""
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    scaled = images.astype(np.float32)
    scaled /= np.float32(255)
    scaled -= mean
    scaled /= std
    return scaled


def preprocess(image: str | os.PathLike[str] | Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Make an image, or the path of one, uint8 (3, S, S), ready for an engine or for `normalize`.

    Raises:
        BadImages: it cannot be read.
    """
    name, decoded = ("image", image) if isinstance(image, Image.Image) else (image, decode(image))
    try:
        return crop(decoded if decoded.mode == "RGB" else as_rgb(decoded), preprocessing)
    except ValueError as error:
        raise BadImages(f"{name}: {error}") from error
