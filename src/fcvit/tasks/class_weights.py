"""Class weights of losses."""

import numpy as np


def balanced(counts: np.ndarray) -> np.ndarray:
    """Return class weights inversely proportional to the class frequency, with mean 1 over all images or pixels.

    Args:
        counts: Number of images or pixels of each class, (classes,).

    Returns:
        float32 (classes,). The weight of a class that does not occur is 0.
    """
    present = counts > 0
    weights = np.zeros(len(counts), np.float32)
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights
