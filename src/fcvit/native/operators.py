"""Define the native operators as Paddle functions with gradients, which `operators.cc` computes.

All functions take float32 or float64 tensors on the CPU, with activations as (B, H, W, C), and return new tensors.
Only first derivatives are supported. The functions are at the end of the file.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

from fcvit.frameworks import import_framework
from fcvit.native import build

import_framework("paddle")  # suppresses output, and raises an error with a remedy if Paddle is missing

import paddle  # noqa: E402
from paddle import Tensor, _C_ops  # noqa: E402

PyLayer: Any = paddle.autograd.PyLayer  # its type stubs do not accept specific arguments
SUFFIXES = {paddle.float32: "float32", paddle.float64: "float64"}
CPU = paddle.CPUPlace()
Gradients = tuple[Tensor | None, ...]


def run_kernel(name: str, tensors: Sequence[Tensor | None], sizes: Sequence[int], *options: float) -> None:
    """Call a function of the compiled library for the data type of the tensors.

    Raises:
        TypeError: The tensors have different data types.
        MemoryError: The function ran out of memory.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    dtype = given[0].dtype
    if any(tensor.dtype is not dtype for tensor in given):
        raise TypeError(f"{name}: the tensors have different data types")
    pointers = (ctypes.c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])
    call(name, dtype, pointers, (ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_double * len(options))(*options))


def call(name: str, dtype: paddle.dtype, pointers: Any, sizes: Any, options: Any) -> None:
    """Call a function of the compiled library with three arrays: pointers, int64 numbers and float64 numbers.

    Raises:
        MemoryError: The function ran out of memory.
    """
    if _function(name, SUFFIXES[dtype])(pointers, sizes, options):
        raise MemoryError(f"{name}: out of memory")


@functools.cache
def _function(name: str, suffix: str) -> Any:
    return build.operators()[f"fcvit_{name}_{suffix}"]


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _like(tensor: Tensor) -> Tensor:
    return _C_ops.empty_like(tensor, tensor.dtype, CPU)


def _empty(shape: list[int], dtype: paddle.dtype) -> Tensor:
    """Allocate like `paddle.empty`, in a quarter of its time. A training step allocates about a thousand tensors."""
    return _C_ops.empty(shape, dtype, CPU)


def _gradients(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return memory for the gradient of each tensor that needs one, and None for the others."""
    return [None if tensor is None or tensor.stop_gradient else _like(tensor) for tensor in tensors]


def _positions(x: Tensor) -> tuple[int, int, int]:
    b, h, w, c = x.shape
    return b, h * w, c


class LayerNorm(PyLayer):
    """Normalize over positions and channels together. `weight` and `bias` are (C,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x = _dense(x)
        y, statistics = _like(x), _empty([x.shape[0], 2], x.dtype)
        run_kernel("layer_norm", (x, weight, bias, y, statistics), _positions(x), eps)
        ctx.save_for_backward(x, weight, bias, statistics)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, weight, bias, statistics = ctx.saved_tensor()
        gradients = _like(x), _like(weight), _like(bias)
        run_kernel("layer_norm_backward", (x, weight, statistics, _dense(dy), *gradients, None), _positions(x))
        return gradients


class BatchNorm(PyLayer):
    """Normalize each channel over the batch and positions, and update `running`, the running mean and variance (C,)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running: Sequence[Tensor], eps: float, momentum: float
    ) -> Tensor:
        x = _dense(x)
        y, statistics = _like(x), _empty([2, x.shape[-1]], x.dtype)
        ctx.sizes = (math.prod(x.shape[:-1]), x.shape[-1])
        run_kernel("batch_norm", (x, weight, bias, y, statistics, *running), ctx.sizes, eps, momentum)
        ctx.save_for_backward(x, weight, bias, statistics)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, weight, bias, statistics = ctx.saved_tensor()
        gradients = _like(x), _like(weight), _like(bias)
        run_kernel("batch_norm_backward", (x, weight, statistics, _dense(dy), *gradients), ctx.sizes)
        return gradients


class Weighted(PyLayer):
    """The backward pass of layers with a weight and an optional bias."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, weight, bias, intermediate = ctx.saved_tensor()
        gradients = _gradients(x, weight, bias)
        inputs = (intermediate, weight) if ctx.kernel == "strided" else (x, weight, intermediate)
        run_kernel(f"{ctx.kernel}_backward", (*inputs, _dense(dy), *gradients, None), ctx.sizes)
        return tuple(gradients if bias is not None else gradients[:2])


class Linear(Weighted):
    """Map (..., K) to (..., N), and apply GELU if `gelu`.

    `weight` has the N x K values of a 1x1 convolution, or, if `transposed`, the (K, N) layout of Paddle's Linear.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False, transposed: bool = False
    ) -> Tensor:
        x = _dense(x)
        *rows, inputs = x.shape
        outputs = weight.shape[1 if transposed else 0]
        ctx.kernel, ctx.sizes = "linear", (math.prod(rows), inputs, outputs, int(transposed))
        return _activated(ctx, x, weight, bias, _empty([*rows, outputs], x.dtype), gelu)


class Depthwise(Weighted):
    """Convolve each channel, padded by half the kernel, and apply GELU if `gelu`. `weight` is (C, 1, K, K), K odd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
        x = _dense(x)
        ctx.kernel, ctx.sizes = "depthwise", (*x.shape, weight.shape[-1])
        return _activated(ctx, x, weight, bias, _like(x), gelu)


def _activated(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, gelu: bool) -> Tensor:
    """Return the result of the kernel in `z`. If `gelu`, return its GELU, and keep the derivative of GELU in `z`."""
    y = _like(z) if gelu else None
    run_kernel(ctx.kernel, (x, weight, bias, z, y), ctx.sizes)
    ctx.save_for_backward(x, weight, bias, z if gelu else None)
    return z if y is None else y


class Strided(Weighted):
    """Convolve, padded by half the kernel: (B, H, W, C), or (B, C, H, W) if `channels_first`, to (B, H', W', N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, channels_first: bool = False) -> Tensor:
        x = _dense(x)
        outputs, _, kernel, _ = weight.shape
        if channels_first:
            b, c, h, w = x.shape
            steps = (c * h * w, w, 1, h * w)
        else:
            b, h, w, c = x.shape
            steps = (h * w * c, w * c, c, 1)
        high, wide = -(-h // stride), -(-w // stride)
        y = _empty([b, high, wide, outputs], x.dtype)
        patches = _empty([b * high * wide, c * kernel * kernel], x.dtype)
        ctx.kernel, ctx.sizes = "strided", (b, h, w, c, outputs, kernel, stride, *steps)
        run_kernel("strided", (x, weight, bias, y, patches), ctx.sizes)
        ctx.save_for_backward(x, weight, bias, patches)
        return y


class Context(PyLayer):
    """Add the weighted global context with competition, as `fcvit.models.backbone.GlobalContext` computes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor, eps: float) -> Tensor:
        x = _dense(x)
        b, positions, width = _positions(x)
        fc1, _, _, _, weight, _ = parameters
        heads, inner = weight.shape[0], fc1.shape[1] // 2
        # Context, halves, winner, value, centered similarity and deviation, in the layout of `Kept` in operators.cc.
        intermediates = _empty([b * (2 * width + 3 * inner + positions * heads + 1)], x.dtype)
        y = _like(x)
        ctx.sizes, ctx.eps = (b, positions, width, heads, inner), eps
        run_kernel("context", (x, *parameters, y, intermediates), ctx.sizes, eps)
        ctx.save_for_backward(x, *parameters, intermediates)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, *parameters, intermediates = ctx.saved_tensor()
        fc1, _, fc2, _, weight, bias = parameters
        gradients = [_like(x), *map(_like, parameters)]
        run_kernel(
            "context_backward", (x, fc1, fc2, weight, bias, intermediates, _dense(dy), *gradients), ctx.sizes, ctx.eps
        )
        return tuple(gradients)


class Block(PyLayer):
    """Compute a whole block as `fcvit.models.backbone.Block` does, with its intermediate results in one tensor.

    `factors` are the constant factors of both branches for each image, B numbers each, or None. `sizes` are those of a
    block in `block.cc` after B, H and W. `parameters` has the order of `Parameters` there.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, *parameters: Tensor, factors: Sequence[Tensor | None], sizes: Sequence[int], eps: Any
    ) -> Tensor:
        x = _dense(x)
        ctx.sizes, ctx.factors, ctx.eps = (*x.shape[:3], *sizes, len(parameters)), factors, eps
        memory = build.operators().fcvit_block_memory
        memory.restype = ctypes.c_int64
        arena = _empty([memory((ctypes.c_int64 * len(ctx.sizes))(*ctx.sizes))], x.dtype)
        y = _like(x)
        run_kernel("block", (x, arena, *factors, y, *parameters), ctx.sizes, *eps)
        ctx.save_for_backward(x, arena, *parameters)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, arena, *parameters = ctx.saved_tensor()
        dx, gradients = _like(x), [_like(parameter) for parameter in parameters]
        tensors = (x, arena, *ctx.factors, _dense(dy), dx, *parameters, *gradients)
        run_kernel("block_backward", tensors, ctx.sizes, *ctx.eps)
        return (dx, *gradients)


class Pool(PyLayer):
    """Average over positions: (B, H, W, C) to (B, C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = _dense(x)
        ctx.shape = x.shape
        y = _empty([x.shape[0], x.shape[-1]], x.dtype)
        run_kernel("pool", (x, y), _positions(x))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        dx = _empty(ctx.shape, dy.dtype)
        run_kernel("pool_backward", (_dense(dy), dx), _positions(dx))
        return dx


class Residual(PyLayer):
    """Return x + branch * scale * factor, with `scale` (C,) per channel and the constant `factor` per image."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, scale: Tensor | None, factor: Tensor | None) -> Tensor:
        x, branch = _dense(x), _dense(branch)
        y = _like(x)
        run_kernel("residual", (x, branch, scale, factor, y), _positions(x))
        ctx.save_for_backward(branch, scale, factor)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        branch, scale, factor = ctx.saved_tensor()
        dy = _dense(dy)
        dbranch, (dscale,) = _like(branch), _gradients(scale)
        run_kernel("residual_backward", (branch, scale, factor, dy, dbranch, dscale), _positions(dy))
        gradients: list[Tensor | None] = [dy, dbranch]
        if scale is not None:
            gradients.append(dscale)
        if factor is not None:
            gradients.append(None)
        return tuple(gradients)


class Swap(PyLayer):
    """Convert (B, H, W, C) to (B, C, H, W) if `to_first`, and otherwise back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_first: bool) -> Tensor:
        ctx.to_first = to_first
        return _swapped(x, to_first)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return _swapped(dy, not ctx.to_first)


def _swapped(x: Tensor, to_first: bool) -> Tensor:
    x = _dense(x)
    b, one, two, three = x.shape
    y = _empty([b, three, one, two] if to_first else [b, two, three, one], x.dtype)
    run_kernel("swap", (x, y), (b, one * two, three) if to_first else (b, one, two * three))
    return y


layer_norm, batch_norm, linear, depthwise = LayerNorm.apply, BatchNorm.apply, Linear.apply, Depthwise.apply
strided, context, pool, residual, whole_block = Strided.apply, Context.apply, Pool.apply, Residual.apply, Block.apply


def channels_first(x: Tensor) -> Tensor:
    """Convert (B, H, W, C) to (B, C, H, W)."""
    return Swap.apply(x, True)


def channels_last(x: Tensor) -> Tensor:
    """Convert (B, C, H, W) to (B, H, W, C)."""
    return Swap.apply(x, False)
