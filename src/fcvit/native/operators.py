"""Define the native operators as Paddle functions with gradients.

All functions take float32 or float64 tensors on the CPU, with activations as (B, H, W, C), and return new tensors.
Only first derivatives are supported. The functions are at the end of the file.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fcvit.frameworks import import_framework
from fcvit.native.composition import Trace, compute
from fcvit.native.kernels import Gradients, PyLayer, dense, empty, like, run_kernel

import_framework("paddle")

import paddle  # noqa: E402
from paddle import Tensor  # noqa: E402

from fcvit.models.semantic_fpn import bilinear_weights  # noqa: E402


class BatchNorm(PyLayer):
    """Normalize each channel over the batch and positions, and update `running`, the running mean and variance (C,).

    The result is cut off at 0 if `relu`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running: Sequence[Tensor],
        eps: float,
        momentum: float,
        relu: bool = False,
    ) -> Tensor:
        x = dense(x)
        y, statistics = like(x), empty([2, x.shape[-1]], x.dtype)
        ctx.sizes = (math.prod(x.shape[:-1]), x.shape[-1], int(relu))
        run_kernel("batch_norm", (x, weight, bias, y, statistics, *running), ctx.sizes, eps, momentum)
        ctx.save_for_backward(x, weight, bias, y if relu else None, statistics)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, weight, bias, y, statistics = ctx.saved_tensor()
        gradients = like(x), like(weight), like(bias)
        run_kernel("batch_norm_backward", (x, weight, y, statistics, dense(dy), *gradients), ctx.sizes)
        return gradients


class Patches(PyLayer):
    """Copy the inputs of each output of a convolution, padded by K / 2: (B, H, W, C) to (B, H', W', C K K)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: int, stride: int) -> Tensor:
        x = dense(x)
        b, h, w, c = ctx.shape = x.shape
        ctx.sizes = (*x.shape, kernel, stride)
        y = empty([b, -(-h // stride), -(-w // stride), c * kernel * kernel], x.dtype)
        run_kernel("patches", (x, y), (*ctx.sizes, 0))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        dx = empty(ctx.shape, dy.dtype)
        run_kernel("patches", (dx, dense(dy)), (*ctx.sizes, 1))
        return dx


class Conv3x3(PyLayer):
    """Convolve with 3x3 kernels, padded by 1: (B, H, W, C) to (B, H, W, N), float32. Cut off at 0 if `relu`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
        x = dense(x)
        y = empty([*x.shape[:3], weight.shape[0]], x.dtype)
        ctx.sizes = (*x.shape, weight.shape[0], int(relu))
        run_kernel("conv3x3", (x, weight, bias, y), ctx.sizes)
        ctx.save_for_backward(x, weight, bias, y if relu else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, weight, bias, y = ctx.saved_tensor()
        gradients = [None if t is None or t.stop_gradient else like(t) for t in (x, weight, bias)]
        run_kernel("conv3x3_backward", (x, weight, y, dense(dy), *gradients), ctx.sizes)
        return tuple(gradients if bias is not None else gradients[:2])


batch_norm = BatchNorm.apply


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalize over positions and channels together. `weight` and `bias` are (C,)."""
    b, h, w, c = x.shape
    return compute(Trace.layer_norm, x.shape, (x, weight, bias), sizes=(b, h * w, c), eps=eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False, transposed: bool = False) -> Tensor:
    """Map (..., K) to (..., N), and apply GELU if `gelu`.

    `weight` has the N x K values of a 1x1 convolution, or, if `transposed`, the (K, N) layout of Paddle's Linear.
    """
    *rows, inputs = x.shape
    outputs = weight.shape[1 if transposed else 0]
    sizes = (math.prod(rows), inputs, outputs, transposed)
    return compute(Trace.linear, [*rows, outputs], (x, weight, bias), sizes=sizes, gelu=gelu)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Convolve each channel, padded by half the kernel, and apply GELU if `gelu`. `weight` is (C, 1, K, K), K odd."""
    sizes = (*x.shape, weight.shape[-1])
    return compute(Trace.depthwise, x.shape, (x, weight, bias), sizes=sizes, gelu=gelu)


def context(x: Tensor, *parameters: Tensor, eps: float) -> Tensor:
    """Add the weighted global context with competition, as `fcvit.models.backbone.GlobalContext` computes it."""
    b, h, w, c = x.shape
    sizes = (b, h * w, c, parameters[4].shape[0], parameters[2].shape[0])
    return compute(Trace.context, x.shape, (x, *parameters), sizes=sizes, eps=eps)


def strided(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Convolve, padded by half the kernel: (B, H, W, C) to (B, H', W', N). `weight` is (N, C, K, K), K odd."""
    return linear(Patches.apply(x, weight.shape[-1], stride), weight, bias)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """Convolve (B, H, W, C) with 3x3 kernels, padded by 1, and cut the result off at 0 if `relu`."""
    if x.dtype == paddle.float32:
        return Conv3x3.apply(x, weight, bias, relu)
    y = strided(x, weight, bias, 1)  # without the rounding errors of Winograd's method
    return paddle.nn.functional.relu(y) if relu else y


def resize(x: Tensor, size: Sequence[int], nearest: bool = False) -> Tensor:
    """Resize (B, H, W, C) to a height and width, bilinearly as with align_corners=False, or to the nearest."""
    b, h, w, c = x.shape
    if h != size[0]:
        x = (_resizing(h, size[0], nearest, x.dtype) @ x.reshape([b, h, w * c])).reshape([b, size[0], w, c])
    if w != size[1]:
        x = _resizing(w, size[1], nearest, x.dtype) @ x
    return x


def _resizing(before: int, after: int, nearest: bool, dtype: Any) -> Tensor:
    """Return the weight of each input pixel in each output pixel of an axis (after, before)."""
    weights = np.eye(before)[np.arange(after) * before // after] if nearest else bilinear_weights(before, after)
    return paddle.to_tensor(weights, dtype="float64").astype(dtype)
