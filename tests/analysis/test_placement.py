"""Placement of maps on the original image, checked with bright squares at known positions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import needs_torch
from fcvit.analysis.placement import crop_box, place, surroundings
from fcvit.data.transforms.preprocess import crop
from fcvit.models.variants import Preprocessing

AUTHORS = Preprocessing()
SIZES = [(224, 224), (500, 375), (375, 500), (333, 777), (1001, 640), (250, 251), (97, 131), (64, 300)]


def square_image(size, box):
    image = Image.new("RGB", size, (20, 20, 20))
    image.paste((240, 240, 240), box)
    return image


def center(values, size):
    """Return the center of the brightness above the background, in pixels of the original image."""
    weights = np.nan_to_num(values - np.nanmin(values))
    rows, columns = np.indices(values.shape) + 0.5
    scale = size[0] / values.shape[1], size[1] / values.shape[0]
    return (weights * columns).sum() / weights.sum() * scale[0], (weights * rows).sum() / weights.sum() * scale[1]


def square_in(size, preprocessing, shift=0.1):
    """Return a box inside the crop and away from its center."""
    left, top, right, bottom = crop_box(size, preprocessing)
    side = (right - left) / 4
    x, y = left + (right - left) * (0.3 + shift), top + (bottom - top) * (0.5 - shift)
    return tuple(round(v) for v in (x, y, x + side, y + side))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [4, 8])
def test_a_square_is_placed_at_its_original_position(size, stride):
    """The map is that of symmetric kernels: position i is centered at pixel stride * i of the crop."""
    box = square_in(size, AUTHORS)
    pixels = crop(square_image(size, box), AUTHORS)[0].astype(float)
    reach = np.pad(pixels, stride - 1, mode="edge")
    kernel = 1 - np.abs(np.arange(-stride + 1, stride)) / stride  # weights that decrease with the distance
    rows = np.stack([np.convolve(row, kernel, "valid") for row in reach])[:, ::stride]
    cells = np.stack([np.convolve(column, kernel, "valid") for column in rows.T])[:, ::stride].T / stride**2
    placed = place(cells, size, AUTHORS)
    assert placed.shape == size[::-1]
    expected = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    assert np.abs(np.subtract(center(placed, size), expected)).max() < 1


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (97, 131)])
def test_a_smaller_result_has_the_same_relative_positions(size):
    maps = np.random.default_rng(0).random((2, 7, 7))
    full, half = place(maps, size, AUTHORS), place(maps, size, AUTHORS, (size[0] // 2, size[1] // 2))
    assert half.shape == (2, size[1] // 2, size[0] // 2)
    for one, other in zip(full, half, strict=True):
        assert np.abs(np.subtract(center(one, size), center(other, size))).max() < 1


@given(
    st.tuples(st.integers(20, 900), st.integers(20, 900)),
    st.sampled_from([AUTHORS, Preprocessing(crop_fraction=0.95), Preprocessing(crop_fraction=1.0), Preprocessing(96)]),
)
@settings(max_examples=60, deadline=None)
def test_the_map_covers_exactly_the_crop(size, preprocessing):
    left, top, right, bottom = crop_box(size, preprocessing)
    assert -0.5 * size[0] / preprocessing.resize <= left < right <= size[0] * (1 + 1e-3) + 1
    ratios = (right - left) / preprocessing.input_size, (bottom - top) / preprocessing.input_size
    shorter = min(size) / preprocessing.resize
    assert all(ratio == pytest.approx(shorter, rel=0.02) for ratio in ratios)
    seen = ~np.isnan(
        place(np.zeros((7, 7)) if preprocessing.input_size == 224 else np.zeros((3, 3)), size, preprocessing)
    )
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    assert abs(columns[0] - max(left, 0)) <= 1 and abs(columns[-1] + 1 - min(right, size[0])) <= 1
    assert abs(rows[0] - max(top, 0)) <= 1 and abs(rows[-1] + 1 - min(bottom, size[1])) <= 1
    assert seen[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


@needs_torch
@pytest.mark.parametrize("size", [(224, 224), (400, 300), (301, 411)])
def test_placement_matches_the_convolutions_of_the_network(size):
    """A square passes through the stem and the downsampling with kernels of ones."""
    import torch
    import torch.nn.functional as F

    box = square_in(size, AUTHORS)
    x = torch.from_numpy(crop(square_image(size, box), AUTHORS)[:1].astype(np.float64))[None]
    x = (x - 20).clamp(min=0)  # values below the background are artifacts of bicubic filtering
    x = F.conv2d(x, torch.ones(1, 1, 7, 7, dtype=torch.float64), stride=4, padding=3)
    x = F.conv2d(x, torch.ones(1, 1, 3, 3, dtype=torch.float64), stride=2, padding=1)
    placed = place(x[0, 0].numpy(), size, AUTHORS)
    expected = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    assert np.abs(np.subtract(center(placed, size), expected)).max() < 1


@pytest.mark.parametrize(("side", "cells"), [(32, 8), (33, 9), (32, 4), (96, 3)])
def test_a_position_is_centered_exactly_on_its_pixel(side, cells):
    """In a tenfold enlargement, position i is at the center of pixel stride * i."""
    preprocessing = Preprocessing(side, 1.0)
    stride = next(s for s in (4, 8, 16, 32) if -(-side // s) == cells)
    values = np.zeros((cells, cells))
    values[1, 0] = 1
    placed = place(values, (side, side), preprocessing, (10 * side, 10 * side))
    rows = placed[:, 0]
    assert np.flatnonzero(rows == rows.max()).mean() + 0.5 == pytest.approx(10 * (stride + 0.5), abs=0.51)
    above, below = rows[: round(10 * (stride + 0.5))], rows[round(10 * (stride + 0.5)) :]
    assert above[::-1][: 8 * stride] == pytest.approx(below[: 8 * stride], abs=1e-9)


@pytest.mark.parametrize("size", [(500, 375), (61, 900), (2000, 3), (1000, 1)])
def test_a_window_shows_the_same_part_of_the_maps(size):
    maps = np.random.default_rng(0).random((2, 7, 7))
    window = surroundings(size, AUTHORS, 1.9)
    left, top, right, bottom = window
    width, height = right - left, bottom - top
    assert max(width, height) <= 1.9 * min(width, height) + 1 and min(width, height) == min(size)
    full, part = place(maps, size, AUTHORS), place(maps, size, AUTHORS, window=window)
    assert np.array_equal(full[:, top:bottom, left:right], part, equal_nan=True)
    seen = ~np.isnan(full[0])
    assert seen.sum() == (~np.isnan(part[0])).sum(), "the window contains the crop"
    factor = max(1, 400 // max(width, height))
    large = place(maps, size, AUTHORS, (factor * width, factor * height), window)
    middle = large[:, factor * height // 2, factor * width // 2]
    assert not np.isnan(middle).any(), "the crop is in the center of the window"


@pytest.mark.parametrize("size", [(32, 32), (71, 40), (500, 375)])
def test_results_are_bit_identical_for_any_memory_layout(size):
    """The faithfulness command sorts pixels by these values, so that the last bit matters."""
    maps = np.random.default_rng(0).random((2, 7, 7))
    expected = place(maps, size, AUTHORS)
    layouts = np.asfortranarray(maps), maps.repeat(3, 1).repeat(2, 2)[:, ::3, ::2], maps[:, ::-1].copy()[:, ::-1]
    assert all(np.array_equal(place(layout, size, AUTHORS), expected, equal_nan=True) for layout in layouts)
    seen = expected[~np.isnan(expected)]
    assert maps.min() <= seen.min() and seen.max() <= maps.max()
    constant = place(np.full((7, 7), 0.1), size, AUTHORS)
    assert set(constant[~np.isnan(constant)]) == {0.1}, "a constant map stays constant, to the last bit"
