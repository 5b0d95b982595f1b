"""Paint label maps and masks in the colors of a palette."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from fcvit.errors import UsageError
from fcvit.frameworks import import_framework

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


def paint_masks(
    image: np.ndarray, masks: Iterable[np.ndarray], colors: Palette, opacity: float, widths: Sequence[int]
) -> np.ndarray:
    """Paint the masks of objects over an image, each with an outline inside of it.

    Each pixel has the color of the first of the masks that contain it, so that the image stays visible where many
    masks overlap. Outlines are drawn over all masks.

    Args:
        image: Image, uint8 (H, W, 3).
        masks: Mask of each object, bool (H, W), the most important one first. One is in memory at a time.
        colors: Color of each object.
        opacity: Weight of the colors, from 0 to 1.
        widths: Width of each outline in pixels.

    Returns:
        uint8 (H, W, 3).

    Raises:
        MissingExtra: OpenCV is not installed.
    """
    cv2 = import_framework("cv2")
    border: Any = {"borderType": cv2.BORDER_CONSTANT, "borderValue": 0}
    owner, outline = (np.zeros(image.shape[:2], np.uint16) for _ in range(2))  # number of an object from 1, or 0
    for number, (mask, width) in enumerate(zip(masks, widths, strict=True), 1):
        (rows,) = np.nonzero(mask.any(1))
        if len(rows):
            (columns,) = np.nonzero(mask[rows[0] : rows[-1] + 1].any(0))
            window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
            inside = mask[window]
            kernel = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
            inner = cv2.erode(inside.astype(np.uint8), kernel, **border).astype(bool)
            for target, pixels in ((owner, inside), (outline, inside & ~inner)):
                part = target[window]
                part[pixels & (part == 0)] = number
    table = np.array([(0, 0, 0), *colors], np.uint8)
    tinted = cv2.addWeighted(image, 1 - opacity, table[owner], opacity, 0)
    painted = np.where(owner[..., None] > 0, tinted, image)
    drawn = outline > 0
    painted[drawn] = table[outline[drawn]]
    return painted


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
