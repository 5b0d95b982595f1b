"""Grids of images with label maps: image, label, prediction and difference side by side, with a legend."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fcvit.report.image_grid import GAP, INK, PAPER, WRONG, shorten

IGNORED, OUTSIDE, CORRECT = "#ffffff", "#000000", "#d5dde3"  # not counted, label that is not a class, correct pixel
_SIDE = 208  # pixels: longer side of an image in the grid
_HEADS = ("image", "label", "prediction", "difference")
_LINE, _SWATCH, _PER_LINE, _LINES = 20, 12, 6, 2  # pixels and entries of the legend
_WIDTH = GAP + len(_HEADS) * (_SIDE + GAP)


@dataclasses.dataclass(frozen=True)
class LabelRow:
    """An image (RGB) with its label map and the predicted classes, uint8 (H, W), and a line of text."""

    caption: str
    image: Image.Image
    label: np.ndarray
    prediction: np.ndarray


def label_grid(
    rows: Iterable[LabelRow], title: str, names: Sequence[str], palette: np.ndarray, ignore: int = 255
) -> Image.Image:
    """Draw one row per image: the image, its label, its prediction and the difference, with a legend of its classes.

    Label maps are reduced without mixing colors. The difference is reduced by averaging, so that thin errors stay
    visible. Each row is reduced before the next one is read, so that at most one image is in memory at full size.

    Args:
        rows: Images with label maps of any size.
        title: One line above the grid. It is shortened if it is too long.
        names: Name of each class.
        palette: RGB color of each class, uint8 (C, 3).
        ignore: Label of the pixels that are not counted.
    """
    colors = _colors(palette, ignore)
    strips = [_strip(row, names, colors, ignore) for row in rows]
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
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
    meanings = (("correct", CORRECT), ("wrong", WRONG), ("not counted", IGNORED), ("label is not a class", OUTSIDE))
    _legend(draw, y, meanings)
    return grid


def _colors(palette: np.ndarray, ignore: int) -> np.ndarray:
    """Return the color of every value of a label map, uint8 (256, 3)."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(palette)] = palette
    colors[ignore] = 255
    return colors


def _strip(row: LabelRow, names: Sequence[str], colors: np.ndarray, ignore: int) -> Image.Image:
    """Draw a row of the grid with its caption and legend."""
    small = ImageFont.load_default(13)
    counted = row.label != ignore
    difference = np.array([_rgb(CORRECT), _rgb(WRONG), _rgb(IGNORED)], np.uint8)[
        np.where(counted, row.label != row.prediction, 2)
    ]
    nearest, box = Image.Resampling.NEAREST, Image.Resampling.BOX
    pictures = [
        _fit(row.image, Image.Resampling.LANCZOS),
        Image.fromarray(colors[np.asarray(_fit(Image.fromarray(row.label), nearest))]),
        Image.fromarray(colors[np.asarray(_fit(Image.fromarray(row.prediction), nearest))]),
        _fit(Image.fromarray(difference), box),
    ]
    areas = np.maximum(
        np.bincount(row.label[counted], minlength=256), np.bincount(row.prediction[counted], minlength=256)
    )[: len(names)]
    order = np.argsort(-areas, kind="stable")[: np.count_nonzero(areas)]
    room = _PER_LINE * _LINES
    entries: list[tuple[str, str | tuple[int, ...]]]
    entries = [(names[index], tuple(map(int, colors[index]))) for index in order[:room]]
    if len(order) > room:
        entries[-1] = (f"and {len(order) - room + 1} more", PAPER)
    height = max(picture.height for picture in pictures)
    lines = -(-len(entries) // _PER_LINE)
    strip = Image.new("RGB", (_WIDTH, _LINE + height + GAP // 2 + lines * _LINE + GAP), PAPER)
    draw = ImageDraw.Draw(strip)
    draw.text((GAP, 0), shorten(row.caption, small, _WIDTH - 2 * GAP), INK, small)
    for column, picture in enumerate(pictures):
        x = GAP + column * (_SIDE + GAP)
        strip.paste(picture, (x, _LINE))
        draw.rectangle((x - 1, _LINE - 1, x + picture.width, _LINE + picture.height), outline="#bbbbbb")
    for line in range(lines):
        _legend(draw, _LINE + height + GAP // 2 + line * _LINE, entries[line * _PER_LINE : (line + 1) * _PER_LINE])
    return strip


def _legend(draw: ImageDraw.ImageDraw, y: int, entries: Sequence[tuple[str, str | tuple[int, ...]]]) -> None:
    """Draw a line of colors with their names."""
    small = ImageFont.load_default(13)
    step = (_WIDTH - 2 * GAP) // _PER_LINE
    for number, (name, color) in enumerate(entries):
        x = GAP + number * step
        if color != PAPER or name == "not counted":
            draw.rectangle((x, y + 2, x + _SWATCH, y + 2 + _SWATCH), fill=color, outline="#888888")
        draw.text((x + _SWATCH + 5, y), shorten(name, small, step - _SWATCH - 12), INK, small)


def _rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color.removeprefix("#")))


def _fit(image: Image.Image, reducing: Image.Resampling) -> Image.Image:
    """Scale an image to the size of the grid. Small images are enlarged without smoothing."""
    scale = _SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else reducing)
