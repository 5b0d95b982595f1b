"""Grids of images with annotated and detected objects side by side. Errors have another color."""

import dataclasses
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fcvit.report.image_grid import GAP, INK, PAPER, RIGHT, WRONG, shorten

_SIDE = 400  # pixels: longer side of an image in the grid
_HEADS = ("annotated objects", "detections")
_LINE, _SWATCH = 20, 12
_WIDTH = GAP + len(_HEADS) * (_SIDE + GAP)
_LEGEND = (("found, or a right detection", RIGHT), ("missed, or a false positive", WRONG))
_OPACITY = 0.4  # of masks


@dataclasses.dataclass(frozen=True)
class Objects:
    """Objects in an image.

    Attributes:
        boxes: x1, y1, x2, y2 of each object, (n, 4).
        right: Which objects are right, bool (n,).
        masks: Mask of each object, (n, H, W), or None.
        marked: Object that is drawn over the others with a white frame around it, or None.
    """

    boxes: np.ndarray
    right: np.ndarray
    masks: np.ndarray | None
    marked: int | None = None


@dataclasses.dataclass(frozen=True)
class ObjectRow:
    """An image (RGB) with its annotated objects and its detections, and a line of text."""

    caption: str
    image: Image.Image
    truth: Objects
    found: Objects


def object_grid(rows: Iterable[ObjectRow], title: str) -> Image.Image:
    """Draw one row per image: its annotated objects and its detections. Errors are vermilion, other objects blue.

    Each row is reduced before the next one is read, so that at most one image is in memory at full size.
    """
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    strips = [_strip(row, small) for row in rows]
    head, foot = 3 * GAP + 2 * _LINE, _LINE + GAP
    grid = Image.new("RGB", (_WIDTH, head + sum(strip.height for strip in strips) + foot), PAPER)
    draw = ImageDraw.Draw(grid)
    draw.text((GAP, GAP), shorten(title, font, _WIDTH - 2 * GAP), INK, font)
    for column, text in enumerate(_HEADS):
        draw.text((GAP + column * (_SIDE + GAP), head - _LINE), text, INK, small)
    y = head
    for strip in strips:
        grid.paste(strip, (0, y))
        y += strip.height
    for number, (name, color) in enumerate(_LEGEND):
        x = GAP + number * (_SIDE + GAP)
        draw.rectangle((x, y + 2, x + _SWATCH, y + 2 + _SWATCH), fill=color)
        draw.text((x + _SWATCH + 5, y), name, INK, small)
    return grid


def _strip(row: ObjectRow, small: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    """Draw a row of the grid with its caption."""
    pictures = [_drawn(row.image, objects) for objects in (row.truth, row.found)]
    strip = Image.new("RGB", (_WIDTH, _LINE + pictures[0].height + GAP), PAPER)
    ImageDraw.Draw(strip).text((GAP, 0), shorten(row.caption, small, _WIDTH - 2 * GAP), INK, small)
    for column, picture in enumerate(pictures):
        strip.paste(picture, (GAP + column * (_SIDE + GAP), _LINE))
    return strip


def _drawn(image: Image.Image, objects: Objects) -> Image.Image:
    """Scale an image to the grid, and draw objects on it: errors last, so that nothing covers them."""
    scale = _SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    drawn = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    order = sorted(range(len(objects.right)), key=lambda index: (index == objects.marked, not objects.right[index]))
    colors = [Image.new("RGB", size, RIGHT if right else WRONG) for right in (True, False)]
    if objects.masks is not None:
        for index in order:
            mask = Image.fromarray(objects.masks[index].astype(np.uint8) * round(255 * _OPACITY))
            drawn.paste(colors[not objects.right[index]], (0, 0), mask.resize(size, Image.Resampling.BOX))
    draw = ImageDraw.Draw(drawn)
    ratio = np.array([size[0] / image.width, size[1] / image.height] * 2)
    for index in order:
        x1, y1, x2, y2 = objects.boxes[index] * ratio
        color = RIGHT if objects.right[index] else WRONG
        draw.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=color, width=2)
        if index == objects.marked:
            for distance, shade in ((1, "white"), (2, "white"), (3, "black")):
                frame = (x1 - distance, y1 - distance, max(x2 - 1, x1) + distance, max(y2 - 1, y1) + distance)
                draw.rectangle(frame, outline=shade)
    return drawn
