"""Predictions as a picture: each image with what it was taken for."""

import dataclasses
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's blue and vermilion: told apart by the colour-blind too; a mark repeats it in shape.
RIGHT, WRONG, INK, PAPER = "#0072B2", "#D55E00", "#222222", "#ffffff"
_TILE, _GAP, _TEXT = 128, 16, 44


@dataclasses.dataclass(frozen=True)
class Tile:
    """One image: RGB, the class it was taken for, how surely, and the truth where it is known."""

    image: Image.Image
    predicted: str
    probability: float
    truth: str | None = None


def contact_sheet(tiles: Sequence[Tile], title: str, columns: int = 6) -> Image.Image:
    """A grid of images with their predictions below, right ones in blue, wrong ones in vermilion."""
    columns = max(1, min(columns, len(tiles)))
    rows = -(-len(tiles) // columns)
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    head = 2 * _GAP + 20
    width = _GAP + columns * (_TILE + _GAP)
    sheet = Image.new(
        "RGB", (max(width, _GAP * 2 + int(font.getlength(title))), head + rows * (_TILE + _TEXT + _GAP)), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), title, INK, font)
    for index, tile in enumerate(tiles):
        x = _GAP + (index % columns) * (_TILE + _GAP)
        y = head + (index // columns) * (_TILE + _TEXT + _GAP)
        image = tile.image
        scale = _TILE / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        # Enlarged pixels stay pixels; photographs are shrunk smoothly.
        how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        sheet.paste(image.resize(size, how), (x + (_TILE - size[0]) // 2, y + (_TILE - size[1]) // 2))
        right = tile.truth is None or tile.truth == tile.predicted
        colour = RIGHT if right else WRONG
        draw.rectangle((x - 2, y - 2, x + _TILE + 1, y + _TILE + 1), outline=colour, width=2)
        sure = f"  {100 * tile.probability:.0f} %"
        draw.text((x, y + _TILE + 4), _fit(tile.predicted, font, font.getlength(sure)) + sure, colour, font)
        if not right:
            draw.text((x, y + _TILE + 24), _fit(f"wrong: it is {tile.truth}", small), colour, small)
    return sheet


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, beside: float = 0) -> str:
    """Shorten to the width of a tile, less what stands beside it."""
    width = _TILE - beside
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
