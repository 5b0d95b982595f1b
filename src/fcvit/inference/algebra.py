"""Fuse consecutive layers for inference without changing the function that they compute.

Weights are NumPy arrays in PyTorch's layout: convolutions (N, C // groups, K, K), linear layers (N, C),
vectors (C,). A function that is folded into the input side of a padded convolution must map 0 to 0. Otherwise the
borders change. `scale_inputs` meets this condition. `shift_inputs` is only for layers without padding.
"""

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]  # weight and bias


def batch_norm(weight: np.ndarray, bias: np.ndarray, mean: np.ndarray, variance: np.ndarray, eps: float) -> Pair:
    """Return BatchNorm with fixed statistics as a scale and a shift per channel: y = scale * x + shift."""
    scale = weight / np.sqrt(variance + eps)
    return scale, bias - mean * scale


def scale_outputs(layer: Pair, scale: np.ndarray, shift: np.ndarray | float = 0.0) -> Pair:
    """Fold a following BatchNorm or layer scale into a layer: its output y becomes scale * y + shift per channel."""
    weight, bias = layer
    return weight * _along(scale, 0, weight.ndim), bias * scale + shift


def scale_inputs(layer: Pair, scale: np.ndarray) -> Pair:
    """Fold a preceding scale into a layer without groups: it takes x where the given layer took scale * x."""
    weight, bias = layer
    return weight * _along(scale, 1, weight.ndim), bias


def shift_inputs(layer: Pair, shift: np.ndarray) -> Pair:
    """Fold a preceding shift into a layer without padding: it takes x where the given layer took x + shift."""
    weight, bias = layer
    assert all(side == 1 for side in weight.shape[2:]), weight.shape
    return weight, bias + weight.reshape(weight.shape[:2]) @ shift


def _along(vector: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    return vector.reshape([-1 if index == axis else 1 for index in range(ndim)])
