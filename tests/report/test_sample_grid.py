"""The picture of augmented images, and what it shares with the contact sheet."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from fcvit.errors import UsageError
from fcvit.report.image_grid import GAP, PAPER, TILE, paste_tile, shorten
from fcvit.report.sample_grid import sample_grid

RED, GREEN = (200, 30, 30), (20, 120, 60)


def flat(color, size=(32, 32)):
    return Image.new("RGB", size, color)


def where(sheet, color):
    """The box around all pixels of a color, and how many there are."""
    mask = (np.asarray(sheet) == color).all(axis=2)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), mask.sum()


def test_each_row_has_its_original_and_its_versions():
    sheet = sample_grid([("one", flat(RED), [flat(GREEN)] * 3), ("two", flat(RED), [flat(GREEN)])], "Title")
    (left, top, right, bottom), count = where(sheet, RED)
    assert (left, right) == (GAP, GAP + TILE) and count == 2 * TILE * TILE and bottom - top > 2 * TILE
    (left, _, right, below), count = where(sheet, GREEN)
    assert count == 4 * TILE * TILE and below == bottom
    assert left - (GAP + TILE) == 2 * GAP and right == sheet.width - GAP and sheet.height == bottom + GAP


def test_enlarged_pixels_stay_pixels():
    board = np.indices((4, 4)).sum(axis=0) % 2 * 255
    image = Image.fromarray(np.repeat(board.astype(np.uint8)[:, :, None], 3, axis=2))
    sheet = sample_grid([("", image, [])], "")
    (left, top, _, _), _ = where(sheet, (0, 0, 0))
    pixels = np.asarray(sheet)[top : top + TILE, left : left + TILE, 0]
    assert np.array_equal(pixels[16::32, 16::32], board) and set(np.unique(pixels)) == {0, 255}


@pytest.mark.parametrize(("size", "shown"), [((64, 32), (128, 64)), ((3, 500), (1, 128)), ((1, 1), (128, 128))])
def test_images_keep_their_form(size, shown):
    sheet = Image.new("RGB", (TILE, TILE), PAPER)
    paste_tile(sheet, flat(RED, size), 0, 0)
    (left, top, right, bottom), _ = where(sheet, RED)
    assert (right - left, bottom - top) == shown
    assert abs(left - (TILE - right)) <= 1 and abs(top - (TILE - bottom)) <= 1


def test_long_words_do_not_leave_the_sheet():
    sheet = sample_grid([("caption " * 90, flat(RED), [])], "title " * 90)
    pixels = np.asarray(sheet)
    assert (pixels[:, : GAP - 1] == 255).all() and (pixels[:, -GAP:] == 255).all() and sheet.width < 1000
    font = ImageFont.load_default(13)
    assert shorten("abc", font, 100) == "abc" and shorten("a" * 90, font, 100).endswith("a...")
    assert font.getlength(shorten("a" * 90, font, 100)) <= 100


def test_a_sheet_of_nothing_is_refused():
    with pytest.raises(UsageError, match="without rows"):
        sample_grid([], "Title")
