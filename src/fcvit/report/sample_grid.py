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

    Images are scaled to the size of a tile without changing their aspect ratio. Small images are enlarged without
    smoothing.

    Args:
        rows: Caption, original image (RGB) and augmented versions (RGB) of each row.
        title: One line above the grid. A narrow grid is widened for the title. Long titles and captions are shortened.

    Raises:
        UsageError: There are no rows.
    """
    if not rows:
        raise UsageError("the sample grid has no rows; expected at least one image")
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    columns = max(len(augmented) for _, _, augmented in rows)
    width = GAP + TILE + (_SEPARATOR + columns * (TILE + GAP) if columns else GAP)
    width = max(width, 2 * GAP + min(int(font.getlength(title)) + 1, 6 * TILE))
    grid = Image.new("RGB", (width, _HEAD + len(rows) * (_CAPTION + TILE + GAP)), PAPER)
    draw = ImageDraw.Draw(grid)
    draw.text((GAP, GAP), shorten(title, font, width - 2 * GAP), INK, font)
    for number, (caption, original, augmented) in enumerate(rows):
        y = _HEAD + number * (_CAPTION + TILE + GAP)
        draw.text((GAP, y), shorten(caption, small, width - 2 * GAP), INK, small)
        y += _CAPTION
        if augmented:
            line = GAP + TILE + _SEPARATOR // 2
            draw.line((line, y, line, y + TILE - 1), _FAINT, width=2)
        for column, image in enumerate((original, *augmented)):
            x = GAP + column * (TILE + GAP) + (_SEPARATOR - GAP if column else 0)
            draw.rectangle((x - 1, y - 1, x + TILE, y + TILE), outline=_FAINT)
            paste_tile(grid, image, x, y)
    return grid
