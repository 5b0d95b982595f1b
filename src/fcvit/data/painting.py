"""Draw label maps and boxes in the colors of a palette."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from fcvit.errors import UsageError

Palette = Sequence[Sequence[int]]  # (red, green, blue) of each label, from 0 to 255


def overlay(image: np.ndarray, labels: np.ndarray, palette: Palette, opacity: float = 0.5) -> np.ndarray:
    """Paint a label map over an image, with the same pixels as mmsegmentation's `show_result`.

    Args:
        image: Image, uint8 (H, W, 3).
        labels: Label map, uint8 (H, W).
        palette: Color of each label. Labels without a color are black.
        opacity: Weight of the colors, from 0 to 1.

    Returns:
        uint8 (H, W, 3), rounded down.

    Raises:
        UsageError: The sizes differ, or the opacity or the palette is out of range.
    """
    if image.shape[:2] != labels.shape:
        raise UsageError(f"image {image.shape[:2]} and label map {labels.shape}: expected the same height and width")
    if not 0 <= opacity <= 1:
        raise UsageError(f"opacity {opacity!r}: expected a number from 0 to 1")
    return (image * (1 - opacity) + _colors(palette)[labels] * opacity).astype(np.uint8)


def outline_boxes(image: np.ndarray, boxes: np.ndarray, colors: Palette, width: int = 1) -> np.ndarray:
    """Draw the outlines of boxes.

    Args:
        image: Image, uint8 (H, W, 3).
        boxes: x1, y1, x2, y2 of each box in pixels, (N, 4).
        colors: Color of each box.
        width: Width of the lines in pixels.

    Returns:
        uint8 (H, W, 3).
    """
    drawn = Image.fromarray(image)
    draw = ImageDraw.Draw(drawn)
    for (x1, y1, x2, y2), color in zip(boxes.tolist(), colors, strict=True):
        draw.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=tuple(color), width=width)
    return np.asarray(drawn)


def palette_image(labels: np.ndarray, palette: Palette) -> Image.Image:
    """Return a label map, uint8 (H, W), as a palette image. Its pixels are the labels, also in a PNG file.

    Raises:
        UsageError: The palette is out of range.
    """
    image = Image.fromarray(labels)
    # All 256 colors are set, because Pillow writes fewer bits per pixel for a shorter palette, which cuts label 255.
    image.putpalette(_colors(palette).tobytes())
    return image


def _colors(palette: Palette) -> np.ndarray:
    """Return the color of each label from 0 to 255, uint8 (256, 3)."""
    colors = np.array(palette)
    if colors.shape[1:] != (3,) or len(colors) > 256 or colors.min(initial=0) < 0 or colors.max(initial=0) > 255:
        raise UsageError(
            f"palette of {len(colors)} colors: expected at most 256, each with three numbers from 0 to 255"
        )
    table = np.zeros((256, 3), np.uint8)
    table[: len(colors)] = colors
    return table
