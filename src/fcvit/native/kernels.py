"""Call the kernels of the training operators in the compiled library."""

import ctypes
import functools
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
    if kernel(name, SUFFIXES[dtype])(pointers, sizes, options):
        raise MemoryError(f"{name}: out of memory")


@functools.cache
def kernel(name: str, suffix: str) -> Any:
    """Return a function of the compiled library. It takes three addresses, and returns whether memory ran out."""
    function = build.library()[f"fcvit_{name}_{suffix}"]
    function.argtypes = [ctypes.c_void_p] * 3
    return function


def dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def like(tensor: Tensor) -> Tensor:
    return _C_ops.empty_like(tensor, tensor.dtype, CPU)


def empty(shape: list[int], dtype: paddle.dtype) -> Tensor:
    """Allocate like `paddle.empty`, in a quarter of its time. A training step allocates about a thousand tensors."""
    return _C_ops.empty(shape, dtype, CPU)
