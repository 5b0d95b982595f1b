"""Describe a batch of training images before their normalization, which a GPU can do."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CHANNELS, VALUES = 3, 256


class Rectangle(NamedTuple):
    """A rectangle of noise that random erasing draws over a normalized image.

    Attributes:
        top, left: Position of the upper left pixel.
        noise: The values, float32 (3, height, width).
    """

    top: int
    left: int
    noise: np.ndarray

    @property
    def window(self) -> tuple[slice, slice, slice]:
        """Return the index of the rectangle in an image (3, H, W)."""
        height, width = self.noise.shape[1:]
        return slice(None), slice(self.top, self.top + height), slice(self.left, self.left + width)


@dataclasses.dataclass(frozen=True)
class PixelBatch:
    """Images of a batch, and what their normalization needs.

    Attributes:
        pixels: uint8 (B, 3, H, W).
        table: The normalized value of each pixel value in each channel, float32 (3, 256).
        valid: Height and width of each image without its padding on the right and below, whose normalized value is 0.
            None without padding.
        erased: For each image the rectangle that is drawn over it, or None. Empty without random erasing.
    """

    pixels: np.ndarray
    table: np.ndarray
    valid: Sequence[tuple[int, int]] | None = None
    erased: Sequence[Rectangle | None] = ()

    def normalized(self) -> np.ndarray:
        """Return the normalized images, float32 (B, 3, H, W)."""
        images = np.empty(self.pixels.shape, np.float32)
        for image, pixels in zip(images, self.pixels, strict=True):  # a single image fits into the processor's cache
            for channel in range(CHANNELS):  # the mode "raise" would need a buffer
                np.take(self.table[channel], pixels[channel], out=image[channel], mode="clip")
        for image, (height, width) in zip(images, self.valid or (), strict=self.valid is not None):
            image[:, height:] = 0
            image[:, :, width:] = 0
        for image, rectangle in zip(images, self.erased, strict=bool(self.erased)):
            if rectangle is not None:
                image[rectangle.window] = rectangle.noise
        return images
