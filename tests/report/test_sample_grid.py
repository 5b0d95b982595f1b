"""Tests of the grid of augmented images and the functions it shares with the image grid."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from fcvit.errors import UsageError
from fcvit.report.image_grid import GAP, PAPER, TILE, paste_tile, shorten
from fcvit.report.sample_grid import sample_grid

RED, GREEN = (200, 30, 30), (20, 120, 60)


def flat(color, size=(32, 32)):
    return Image.new("RGB", size, color)


def bounding_box(grid, color):
    """Return the bounding box and the number of all pixels of a color."""
    mask = (np.asarray(grid) == color).all(axis=2)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), mask.sum()


def test_each_row_shows_the_original_and_its_augmented_versions():
    grid = sample_grid([("one", flat(RED), [flat(GREEN)] * 3), ("two", flat(RED), [flat(GREEN)])], "Title")
    (left, top, right, bottom), count = bounding_box(grid, RED)
    assert (left, right) == (GAP, GAP + TILE) and count == 2 * TILE * TILE and bottom - top > 2 * TILE
    (left, _, right, below), count = bounding_box(grid, GREEN)
    assert count == 4 * TILE * TILE and below == bottom
    assert left - (GAP + TILE) == 2 * GAP and right == grid.width - GAP and grid.height == bottom + GAP


@pytest.mark.parametrize(("size", "shown"), [((64, 32), (2 * TILE, TILE)), ((32, 48), (TILE, TILE * 3 // 2))])
def test_augmented_versions_with_labels_are_as_large_as_the_original(size, shown):
    grid = sample_grid([("", flat(RED), [flat(GREEN, size)] * 2)] * 2, "")
    (left, _, right, bottom), count = bounding_box(grid, GREEN)
    assert count == 4 * shown[0] * shown[1] and bounding_box(grid, RED)[1] == 2 * TILE * TILE
    assert right - left == 2 * shown[0] + GAP and bottom == grid.height - GAP


def test_images_are_enlarged_without_smoothing():
    board = np.indices((4, 4)).sum(axis=0) % 2 * 255
    image = Image.fromarray(np.repeat(board.astype(np.uint8)[:, :, None], 3, axis=2))
    grid = sample_grid([("", image, [])], "")
    (left, top, _, _), _ = bounding_box(grid, (0, 0, 0))
    pixels = np.asarray(grid)[top : top + TILE, left : left + TILE, 0]
    assert np.array_equal(pixels[16::32, 16::32], board) and set(np.unique(pixels)) == {0, 255}


@pytest.mark.parametrize(("size", "shown"), [((64, 32), (128, 64)), ((3, 500), (1, 128)), ((1, 1), (128, 128))])
def test_images_keep_their_aspect_ratio(size, shown):
    grid = Image.new("RGB", (TILE, TILE), PAPER)
    paste_tile(grid, flat(RED, size), 0, 0)
    (left, top, right, bottom), _ = bounding_box(grid, RED)
    assert (right - left, bottom - top) == shown
    assert abs(left - (TILE - right)) <= 1 and abs(top - (TILE - bottom)) <= 1


def test_long_texts_are_shortened_to_the_grid():
    grid = sample_grid([("caption " * 90, flat(RED), [])], "title " * 90)
    pixels = np.asarray(grid)
    assert (pixels[:, : GAP - 1] == 255).all() and (pixels[:, -GAP:] == 255).all() and grid.width < 1000
    font = ImageFont.load_default(13)
    assert shorten("abc", font, 100) == "abc" and shorten("a" * 90, font, 100).endswith("a...")
    assert font.getlength(shorten("a" * 90, font, 100)) <= 100


def test_a_grid_without_rows_is_rejected():
    with pytest.raises(UsageError, match="no rows"):
        sample_grid([], "Title")
