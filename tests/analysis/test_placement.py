"""Maps on the original image: a bright square at a known place comes back there, to within a pixel."""

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
    """Of the brightness over the background, in pixels of the original."""
    weights = np.nan_to_num(values - np.nanmin(values))
    rows, columns = np.indices(values.shape) + 0.5
    scale = size[0] / values.shape[1], size[1] / values.shape[0]
    return (weights * columns).sum() / weights.sum() * scale[0], (weights * rows).sum() / weights.sum() * scale[1]


def square_in(size, preprocessing, shift=0.1):
    """A square well inside of what is seen, away from the middle."""
    left, top, right, bottom = crop_box(size, preprocessing)
    side = (right - left) / 4
    x, y = left + (right - left) * (0.3 + shift), top + (bottom - top) * (0.5 - shift)
    return tuple(round(v) for v in (x, y, x + side, y + side))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [4, 8])
def test_a_square_comes_back_to_its_place(size, stride):
    """The map is what a network of symmetric kernels sees: position i around pixel stride * i of the crop."""
    box = square_in(size, AUTHORS)
    pixels = crop(square_image(size, box), AUTHORS)[0].astype(float)
    reach = np.pad(pixels, stride - 1, mode="edge")
    kernel = 1 - np.abs(np.arange(-stride + 1, stride)) / stride  # of the pixels around, fewer the further
    rows = np.stack([np.convolve(row, kernel, "valid") for row in reach])[:, ::stride]
    cells = np.stack([np.convolve(column, kernel, "valid") for column in rows.T])[:, ::stride].T / stride**2
    placed = place(cells, size, AUTHORS)
    assert placed.shape == size[::-1]
    expected = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    assert np.abs(np.subtract(center(placed, size), expected)).max() < 1


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (97, 131)])
def test_on_a_smaller_picture_it_is_at_the_same_place(size):
    maps = np.random.default_rng(0).random((2, 7, 7))
    whole, half = place(maps, size, AUTHORS), place(maps, size, AUTHORS, (size[0] // 2, size[1] // 2))
    assert half.shape == (2, size[1] // 2, size[0] // 2)
    for one, other in zip(whole, half, strict=True):
        assert np.abs(np.subtract(center(one, size), center(other, size))).max() < 1


@given(
    st.tuples(st.integers(20, 900), st.integers(20, 900)),
    st.sampled_from([AUTHORS, Preprocessing(crop_fraction=0.95), Preprocessing(crop_fraction=1.0), Preprocessing(96)]),
)
@settings(max_examples=60, deadline=None)
def test_what_was_seen_is_the_crop(size, preprocessing):
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
def test_the_networks_own_convolutions_see_it_there(size):
    """Stem and downsampling with kernels of ones, no trick of ours: where a spot ends up."""
    import torch
    import torch.nn.functional as F

    box = square_in(size, AUTHORS)
    x = torch.from_numpy(crop(square_image(size, box), AUTHORS)[:1].astype(np.float64))[None]
    x = (x - 20).clamp(min=0)  # below the background there is only what bicubic filtering adds
    x = F.conv2d(x, torch.ones(1, 1, 7, 7, dtype=torch.float64), stride=4, padding=3)
    x = F.conv2d(x, torch.ones(1, 1, 3, 3, dtype=torch.float64), stride=2, padding=1)
    placed = place(x[0, 0].numpy(), size, AUTHORS)
    expected = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    assert np.abs(np.subtract(center(placed, size), expected)).max() < 1


@pytest.mark.parametrize(("side", "cells"), [(32, 8), (33, 9), (32, 4), (96, 3)])
def test_a_cell_is_centred_on_its_pixel_exactly(side, cells):
    """Enlarged tenfold, of a whole image: cell i lies on the middle of pixel stride * i."""
    preprocessing = Preprocessing(side, 1.0)
    stride = next(s for s in (4, 8, 16, 32) if -(-side // s) == cells)
    one = np.zeros((cells, cells))
    one[1, 0] = 1
    placed = place(one, (side, side), preprocessing, (10 * side, 10 * side))
    rows = placed[:, 0]
    assert np.flatnonzero(rows == rows.max()).mean() + 0.5 == pytest.approx(10 * (stride + 0.5), abs=0.51)
    above, below = rows[: round(10 * (stride + 0.5))], rows[round(10 * (stride + 0.5)) :]
    assert above[::-1][: 8 * stride] == pytest.approx(below[: 8 * stride], abs=1e-9)


@pytest.mark.parametrize("size", [(500, 375), (61, 900), (2000, 3), (1000, 1)])
def test_a_part_of_the_image_has_the_maps_of_that_part(size):
    maps = np.random.default_rng(0).random((2, 7, 7))
    window = surroundings(size, AUTHORS, 1.9)
    left, top, right, bottom = window
    width, height = right - left, bottom - top
    assert max(width, height) <= 1.9 * min(width, height) + 1 and min(width, height) == min(size)
    whole, part = place(maps, size, AUTHORS), place(maps, size, AUTHORS, window=window)
    assert np.array_equal(whole[:, top:bottom, left:right], part, equal_nan=True)
    seen = ~np.isnan(whole[0])
    assert seen.sum() == (~np.isnan(part[0])).sum(), "nothing that was seen is cut away"
    factor = max(1, 400 // max(width, height))
    large = place(maps, size, AUTHORS, (factor * width, factor * height), window)
    middle = large[:, factor * height // 2, factor * width // 2]
    assert not np.isnan(middle).any(), "what was seen is in the middle"


@pytest.mark.parametrize("size", [(32, 32), (71, 40), (500, 375)])
def test_bits_depend_on_the_values_alone(size):
    """Not on how they lie in memory, nor on the version of NumPy: `trust` orders pixels by them."""
    maps = np.random.default_rng(0).random((2, 7, 7))
    expected = place(maps, size, AUTHORS)
    layouts = np.asfortranarray(maps), maps.repeat(3, 1).repeat(2, 2)[:, ::3, ::2], maps[:, ::-1].copy()[:, ::-1]
    assert all(np.array_equal(place(layout, size, AUTHORS), expected, equal_nan=True) for layout in layouts)
    seen = expected[~np.isnan(expected)]
    assert maps.min() <= seen.min() and seen.max() <= maps.max()
    flat = place(np.full((7, 7), 0.1), size, AUTHORS)
    assert set(flat[~np.isnan(flat)]) == {0.1}, "what a map marks alike stays alike, to the bit"
