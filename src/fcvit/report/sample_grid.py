"""Grids of augmented images, to check the input of a training run."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from fcvit.errors import UsageError
from fcvit.report.image_grid import GAP, INK, PAPER, TILE, paste_tile, shorten

_HEAD, _CAPTION = 2 * GAP + 20, 22  # pixels: heights of the title and of a row caption
_SEPARATOR = 2 * GAP  # pixels between an original and its augmented versions, with a line in the middle
_FAINT = "#d9d9d9"  # the line, and the frame that shows the border of white images


def sample_grid(rows: Sequence[tuple[str, Image.Image, Sequence[Image.Image]]], title: str) -> Image.Image:
    """Draw one row per image: a caption, the original, a line, and its augmented versions.

    Images are scaled to the size of a tile without changing their aspect ratio, and augmented versions so that their
    shorter side is that of a tile. Small images are enlarged without smoothing.

    Args:
        rows: Caption, original image (RGB) and augmented versions (RGB) of each row. These have the same size.
        title: One line above the grid. A narrow grid is widened for the title. Long titles and captions are shortened.

    Raises:
        UsageError: There are no rows.
    """
    if not rows:
        raise UsageError("the sample grid has no rows; expected at least one image")
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    columns = max(len(augmented) for _, _, augmented in rows)
    wide, tall = max((_tile(augmented[0]) for *_, augmented in rows if augmented), default=(TILE, TILE))
    width = GAP + TILE + (_SEPARATOR + columns * (wide + GAP) if columns else GAP)
    width = max(width, 2 * GAP + min(int(font.getlength(title)) + 1, 6 * TILE))
    grid = Image.new("RGB", (width, _HEAD + len(rows) * (_CAPTION + tall + GAP)), PAPER)
    draw = ImageDraw.Draw(grid)
    draw.text((GAP, GAP), shorten(title, font, width - 2 * GAP), INK, font)
    for number, (caption, original, augmented) in enumerate(rows):
        y = _HEAD + number * (_CAPTION + tall + GAP)
        draw.text((GAP, y), shorten(caption, small, width - 2 * GAP), INK, small)
        y += _CAPTION
        if augmented:
            line = GAP + TILE + _SEPARATOR // 2
            draw.line((line, y, line, y + tall - 1), _FAINT, width=2)
        tiles = [(original, GAP, (TILE, TILE))]
        tiles += [
            (image, GAP + TILE + _SEPARATOR + column * (wide + GAP), (wide, tall))
            for column, image in enumerate(augmented)
        ]
        for image, x, size in tiles:
            draw.rectangle((x - 1, y - 1, x + size[0], y + size[1]), outline=_FAINT)
            paste_tile(grid, image, x, y, size)
    return grid


def _tile(image: Image.Image) -> tuple[int, int]:
    """Return the width and height of a tile for an image whose shorter side is `TILE`."""
    scale = TILE / min(image.size)
    return round(image.width * scale), round(image.height * scale)
