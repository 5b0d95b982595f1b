"""Decide whether two computations are equal, by the float64 equivalence check and the float32 error ratio.

Logic: in float64, the largest difference is at most 1e-10 of the standard deviation.
Rounding: the rms error of our float32 against float64 is at most 3 times that of PyTorch's float32.
"""

import math

import numpy as np

FLOAT64_LIMIT = 1e-10
RATIO_LIMIT = 3.0
MIN_OUTPUTS = 256  # with fewer outputs the error ratio is mostly chance


def float64_difference(computed: np.ndarray, reference: np.ndarray) -> float:
    """Return the largest difference divided by the standard deviation of the reference, or infinity for NaN."""
    scale = float(reference.std()) or 1.0
    difference = float(np.abs(computed - reference).max()) if reference.size else 0.0
    return difference / scale if math.isfinite(difference) else math.inf


def error_ratio(computed_32: np.ndarray, reference_32: np.ndarray, exact: np.ndarray) -> float:
    """Return the rms error of `computed_32` divided by that of `reference_32`, or infinity for NaN.

    Both errors are against `exact` (float64).
    """
    ours = rms_error(computed_32, exact)
    theirs = rms_error(reference_32, exact)
    if not math.isfinite(ours):
        return math.inf
    return ours / theirs if theirs else (0.0 if not ours else math.inf)


def rms_error(computed: np.ndarray, exact: np.ndarray) -> float:
    """Return the root mean squared difference, computed in float64."""
    return math.sqrt(np.mean((computed.astype(np.float64) - exact) ** 2))


def images_needed(outputs: int, pixels: int) -> int:
    """Return the number of images that gives the error ratio enough outputs.

    The number is at least two and is limited for large images.

    Args:
        outputs: Number of outputs per image.
        pixels: Number of pixels per image.
    """
    affordable = 2 * 224 * 224 // pixels
    return max(2, min(math.ceil(MIN_OUTPUTS / outputs), affordable))
