"""When two computations count as equal: gate A for the logic, gate B for the rounding.

Gate A: both compute in float64; the largest difference is at most 1e-10 of the standard deviation.
Gate B: the rms error of our float32 against float64 is at most 3 times that of PyTorch's own float32.
"""

import math

import numpy as np

FLOAT64_LIMIT = 1e-10
RATIO_LIMIT = 3.0
_MIN_OUTPUTS = 256  # fewer make the ratio of gate B a matter of luck


def float64_difference(found: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference over the standard deviation of the reference; both float64. NaN counts as infinite."""
    scale = float(reference.std()) or 1.0
    difference = float(np.abs(found - reference).max()) if reference.size else 0.0
    return difference / scale if math.isfinite(difference) else math.inf


def error_ratio(found_32: np.ndarray, yardstick_32: np.ndarray, exact: np.ndarray) -> float:
    """rms error of the first over rms error of the second, both against `exact` (float64). NaN counts as infinite."""
    ours = rms_error(found_32, exact)
    theirs = rms_error(yardstick_32, exact)
    if not math.isfinite(ours):
        return math.inf
    return ours / theirs if theirs else (0.0 if not ours else math.inf)


def rms_error(found: np.ndarray, exact: np.ndarray) -> float:
    """Root of the mean squared difference, in float64."""
    return math.sqrt(np.mean((found.astype(np.float64) - exact) ** 2))


def images_needed(outputs: int, pixels: int) -> int:
    """How many images give gate B enough numbers, where they are not too large; at least two.

    Args:
        outputs: of one image.
        pixels: of one image.
    """
    affordable = 2 * 224 * 224 // pixels
    return max(2, min(math.ceil(_MIN_OUTPUTS / outputs), affordable))
