"""Grids of images with their predicted classes."""

import bisect
import dataclasses
import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from fcvit.text import printable

# Blue and vermilion of the Okabe-Ito palette, which color-blind readers can distinguish.
RIGHT, WRONG, INK, PAPER = "#0072B2", "#D55E00", "#222222", "#ffffff"
TILE, GAP = 128, 16  # pixels: side of an image, space between images
_TEXT = 44  # pixels: height of the text below an image


@dataclasses.dataclass(frozen=True)
class Tile:
    """An RGB image with its predicted class, the probability, and the true class if it is known."""

    image: Image.Image
    predicted: str
    probability: float
    truth: str | None = None


def image_grid(tiles: Sequence[Tile], title: str, columns: int = 6) -> Image.Image:
    """Draw a grid of images with their predictions, correct ones in blue and wrong ones in vermilion."""
    title = printable(title)
    columns = max(1, min(columns, len(tiles)))
    rows = -(-len(tiles) // columns)
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    head = 2 * GAP + 20
    width = GAP + columns * (TILE + GAP)
    grid = Image.new(
        "RGB", (max(width, GAP * 2 + int(font.getlength(title))), head + rows * (TILE + _TEXT + GAP)), PAPER
    )
    draw = ImageDraw.Draw(grid)
    draw.text((GAP, GAP), title, INK, font)
    for index, tile in enumerate(tiles):
        x = GAP + (index % columns) * (TILE + GAP)
        y = head + (index // columns) * (TILE + _TEXT + GAP)
        paste_tile(grid, tile.image, x, y)
        right = tile.truth is None or tile.truth == tile.predicted
        color = RIGHT if right else WRONG
        draw.rectangle((x - 2, y - 2, x + TILE + 1, y + TILE + 1), outline=color, width=2)
        percent = f", {100 * tile.probability:.0f}%"
        name = shorten(tile.predicted, font, TILE - font.getlength(percent))
        draw.text((x, y + TILE + 4), name + percent, color, font)
        if not right:
            draw.text((x, y + TILE + 24), shorten(f"true class: {tile.truth}", small, TILE), color, small)
    return grid


def paste_tile(grid: Image.Image, image: Image.Image, x: int, y: int, tile: tuple[int, int] = (TILE, TILE)) -> None:
    """Draw an image centered in the tile with the upper left corner (x, y), scaled to fit."""
    scale = min(tile[0] / image.width, tile[1] / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Small images are enlarged without smoothing, so that their pixels stay visible.
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    grid.paste(image.resize(size, resampling), (x + (tile[0] - size[0]) // 2, y + (tile[1] - size[1]) // 2))


def shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Shorten a text to a width in pixels, with "..." at the end of a shortened text."""
    text = printable(text)  # Pillow measures only single lines without incomplete characters
    if font.getlength(text) <= width:
        return text
    fitting = bisect.bisect_right(range(len(text)), width, key=lambda count: font.getlength(text[:count] + "..."))
    return text[: max(0, fitting - 1)] + "..."


def jpeg(image: Image.Image) -> bytes:
    """Encode an image as a JPEG file."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=90)
    return content.getvalue()


def png(image: Image.Image) -> bytes:
    """Encode an image as a PNG file."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
