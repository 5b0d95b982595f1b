"""Predictions as a picture: each image with what it was taken for."""

import bisect
import dataclasses
import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from fcvit.text import printable

# Okabe and Ito's blue and vermilion: told apart by the color-blind too; a mark repeats it in shape.
RIGHT, WRONG, INK, PAPER = "#0072B2", "#D55E00", "#222222", "#ffffff"
TILE, GAP = 128, 16  # pixels: side of an image's place, space between two
_TEXT = 44


@dataclasses.dataclass(frozen=True)
class Tile:
    """One image: RGB, the class it was taken for, how surely, and the truth where it is known."""

    image: Image.Image
    predicted: str
    probability: float
    truth: str | None = None


def image_grid(tiles: Sequence[Tile], title: str, columns: int = 6) -> Image.Image:
    """Draw a grid of images with their predictions below, right ones in blue, wrong ones in vermilion."""
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
        sure = f"  {100 * tile.probability:.0f} %"
        draw.text((x, y + TILE + 4), shorten(tile.predicted, font, TILE - font.getlength(sure)) + sure, color, font)
        if not right:
            draw.text((x, y + TILE + 24), shorten(f"wrong: it is {tile.truth}", small, TILE), color, small)
    return grid


def paste_tile(grid: Image.Image, image: Image.Image, x: int, y: int) -> None:
    """Draw an image into the place whose upper left corner is (x, y), as large as fits, in its middle."""
    scale = TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Enlarged pixels stay pixels; photographs are shrunk smoothly.
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    grid.paste(image.resize(size, how), (x + (TILE - size[0]) // 2, y + (TILE - size[1]) // 2))


def shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Shorten a text to so many pixels, with three points where something is missing."""
    text = printable(text)  # Pillow measures single lines of whole characters only
    if font.getlength(text) <= width:
        return text
    fitting = bisect.bisect_right(range(len(text)), width, key=lambda count: font.getlength(text[:count] + "..."))
    return text[: max(0, fitting - 1)] + "..."


def png(image: Image.Image) -> bytes:
    """Return a picture as a PNG file."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
