"""Tests of 3x3 convolutions by Winograd's method."""

import ctypes

import numpy as np
import pytest


def convolve(library, x, weight, bias=None, relu=False):
    """Return the result for x (B, H, W, C) and weight (N, C, 3, 3)."""
    outputs = len(weight)
    y = np.full((*x.shape[:3], outputs), np.nan, np.float32)
    arrays = [None if array is None else array.ctypes.data for array in (x, weight, bias, y)]
    sizes = (*x.shape, outputs, int(relu))
    assert not library.fcvit_conv3x3_float32((ctypes.c_void_p * 4)(*arrays), (ctypes.c_int64 * 6)(*sizes), None)
    return y


def exact(x, weight, bias=None):
    """Compute the same in float64."""
    _, height, width, _ = x.shape
    padded = np.pad(x.astype(np.float64), [(0, 0), (1, 1), (1, 1), (0, 0)])
    taps = (padded[:, i : i + height, j : j + width] @ weight[..., i, j].T for i in range(3) for j in range(3))
    return sum(taps) + (0 if bias is None else bias)


def random_arrays(shape, outputs, seed=0):
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(outputs, shape[3], 3, 3)) / (3 * shape[3] ** 0.5)
    x, bias = generator.normal(size=shape), generator.normal(size=outputs)
    return [array.astype(np.float32) for array in (x, weight, bias)]


@pytest.mark.parametrize(
    ("shape", "outputs"),
    [
        ((1, 1, 1, 1), 1),
        ((2, 5, 7, 3), 5),
        ((3, 4, 4, 16), 16),
        ((2, 9, 6, 33), 31),
        ((1, 13, 17, 300), 40),
        ((5, 14, 14, 24), 129),
        ((2, 31, 30, 20), 48),
        ((0, 4, 4, 8), 8),
    ],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_convolution_matches_float64(library, shape, outputs, threads):
    library.omp_set_num_threads(threads)
    x, weight, bias = random_arrays(shape, outputs)
    expected = exact(x, weight, bias)
    assert np.abs(convolve(library, x, weight, bias) - expected).max(initial=0) < 2e-5
    assert np.abs(convolve(library, x, weight, bias, relu=True) - np.maximum(expected, 0)).max(initial=0) < 2e-5


def test_error_is_at_most_three_times_that_of_a_direct_float32_convolution(library):
    x, weight, _ = random_arrays((1, 32, 32, 256), 64)
    expected = exact(x, weight)
    assert (convolve(library, x, weight) - expected).std() < 2e-6 * expected.std()  # 0.86e-6 in PyTorch


def test_results_do_not_depend_on_threads(library):
    x, weight, bias = random_arrays((2, 18, 22, 40), 72)
    results = []
    for threads in (1, 2, 5):
        library.omp_set_num_threads(threads)
        results.append(convolve(library, x, weight, bias).tobytes())
    assert len(set(results)) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_reach_every_output_that_they_affect_and_no_other_tile(library, value):
    x, weight, _ = random_arrays((1, 11, 13, 9), 10)
    for row, column in [(0, 0), (3, 4), (4, 3), (5, 6), (10, 12), (7, 0)]:
        spoiled = x.copy()
        spoiled[0, row, column, 8] = value
        finite = np.isfinite(convolve(library, spoiled, weight))[0]
        window = slice(max(row - 1, 0), row + 2), slice(max(column - 1, 0), column + 2)
        assert not finite[window].any()
        if np.isnan(value):
            assert np.isnan(convolve(library, spoiled, weight, relu=True)[0][window]).all()
        top, left = (row - 1) // 4 * 4, (column - 1) // 4 * 4  # the tiles that see the pixel
        finite[max(top, 0) : (row + 1) // 4 * 4 + 4, max(left, 0) : (column + 1) // 4 * 4 + 4] = True
        assert finite.all()


def test_large_finite_numbers_stay_finite(library):
    x, weight, _ = random_arrays((1, 8, 8, 16), 16)
    assert np.isfinite(convolve(library, x * np.float32(1e30), weight)).all()
