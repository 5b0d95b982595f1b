"""Inference-time algebra: two layers in a row made one, without changing the function.

Weights are NumPy arrays in PyTorch's layout: convolutions (N, C // groups, K, K), linear layers (N, C),
vectors (C,). Nothing here pads: what is folded into the input side of a padded convolution must map 0
to 0, or its borders would change; `scale_inputs` does, `shift_inputs` is for layers without padding.
"""

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]  # weight and bias


def batch_norm(weight: np.ndarray, bias: np.ndarray, mean: np.ndarray, variance: np.ndarray, eps: float) -> Pair:
    """Return BatchNorm with fixed statistics as scale and shift of each channel: y = scale * x + shift."""
    scale = weight / np.sqrt(variance + eps)
    return scale, bias - mean * scale


def scale_outputs(layer: Pair, scale: np.ndarray, shift: np.ndarray | float = 0.0) -> Pair:
    """Return the layer whose output is scale * y + shift, per channel: BatchNorm or layer scale behind it."""
    weight, bias = layer
    return weight * _along(scale, 0, weight.ndim), bias * scale + shift


def scale_inputs(layer: Pair, scale: np.ndarray) -> Pair:
    """Return the layer that takes x where the given one took scale * x; not for groups of one channel."""
    weight, bias = layer
    return weight * _along(scale, 1, weight.ndim), bias


def shift_inputs(layer: Pair, shift: np.ndarray) -> Pair:
    """Return the layer that takes x where the given one took x + shift; only for a layer without padding."""
    weight, bias = layer
    assert all(side == 1 for side in weight.shape[2:]), weight.shape
    return weight, bias + weight.reshape(weight.shape[:2]) @ shift


def _along(vector: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    return vector.reshape([-1 if place == axis else 1 for place in range(ndim)])
