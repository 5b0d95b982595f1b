"""Augmented images as a picture, to see what a network is trained on."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from fcvit.errors import UsageError
from fcvit.report.image_grid import GAP, INK, PAPER, TILE, paste_tile, shorten

_HEAD, _CAPTION = 2 * GAP + 20, 22  # heights of the title and of a row's caption
_APART = 2 * GAP  # between an original and its augmented versions, with a line in its middle
_FAINT = "#d9d9d9"  # the line, and a frame that shows where white images end


def sample_grid(rows: Sequence[tuple[str, Image.Image, Sequence[Image.Image]]], title: str) -> Image.Image:
    """Draw one row per source image: its caption, the original, a line, then its augmented versions.

    Each image fills its place as far as its form allows; enlarged pixels stay pixels.

    Args:
        rows: caption, original (RGB), augmented versions (RGB, as many as there are).
        title: one line above all; too long a title or caption is shortened, a short grid widened for it.

    Raises:
        UsageError: no rows.
    """
    if not rows:
        raise UsageError("sample grid without rows: expected at least one image")
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    most = max(len(augmented) for _, _, augmented in rows)
    width = GAP + TILE + (_APART + most * (TILE + GAP) if most else GAP)
    width = max(width, 2 * GAP + min(int(font.getlength(title)) + 1, 6 * TILE))
    grid = Image.new("RGB", (width, _HEAD + len(rows) * (_CAPTION + TILE + GAP)), PAPER)
    draw = ImageDraw.Draw(grid)
    draw.text((GAP, GAP), shorten(title, font, width - 2 * GAP), INK, font)
    for number, (caption, original, augmented) in enumerate(rows):
        y = _HEAD + number * (_CAPTION + TILE + GAP)
        draw.text((GAP, y), shorten(caption, small, width - 2 * GAP), INK, small)
        y += _CAPTION
        if augmented:
            line = GAP + TILE + _APART // 2
            draw.line((line, y, line, y + TILE - 1), _FAINT, width=2)
        for place, image in enumerate((original, *augmented)):
            x = GAP + place * (TILE + GAP) + (_APART - GAP if place else 0)
            draw.rectangle((x - 1, y - 1, x + TILE, y + TILE), outline=_FAINT)
            paste_tile(grid, image, x, y)
    return grid
