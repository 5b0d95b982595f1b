"""Element types of stored tensors, bfloat16 included, how each file format spells them, and shapes."""

import math

import ml_dtypes
import numpy as np

from fcvit.errors import UnreadableFile

MAX_RANK = 8
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = {"float16": np.dtype("<f2"), "bfloat16": BFLOAT16, "float32": np.dtype("<f4"), "float64": np.dtype("<f8")}

# Type, PyTorch's class of storage (quantized and complex ones are left out on purpose), name in safetensors.
_TYPES = (
    (FLOATS["float64"], "DoubleStorage", "F64"),
    (FLOATS["float32"], "FloatStorage", "F32"),
    (FLOATS["float16"], "HalfStorage", "F16"),
    (BFLOAT16, "BFloat16Storage", "BF16"),
    (np.dtype("<i8"), "LongStorage", "I64"),
    (np.dtype("<i4"), "IntStorage", "I32"),
    (np.dtype("<i2"), "ShortStorage", "I16"),
    (np.dtype("i1"), "CharStorage", "I8"),
    (np.dtype("u1"), "ByteStorage", "U8"),
    (np.dtype("?"), "BoolStorage", "BOOL"),
)
_UNSIGNED = {f"uint{bits}": np.dtype(f"<u{bits // 8}") for bits in (16, 32, 64)}
TORCH_STORAGES = {storage: dtype for dtype, storage, _ in _TYPES}
TORCH_DTYPES = {**FLOATS, **_UNSIGNED}  # which PyTorch stores by their own names (tensors over untyped storages)
SAFETENSORS = {name: dtype for dtype, _, name in _TYPES} | {f"U{n[4:]}": dtype for n, dtype in _UNSIGNED.items()}


def is_float(dtype: np.dtype) -> bool:
    """Return whether weights may be of this type (`numpy.issubdtype` does not know bfloat16)."""
    return dtype in FLOATS.values()


def checked_shape(shape: object, dtype: np.dtype, file_size: int) -> tuple[int, ...]:
    """Return the shape that a file gives a tensor, if it can be true.

    Raises:
        UnreadableFile: not at most 8 whole numbers, or more than a file of that size can hold.
    """
    if not isinstance(shape, tuple | list):
        raise UnreadableFile("a tensor whose shape is not a list of numbers")
    if len(shape) > MAX_RANK:
        raise UnreadableFile(f"a tensor with {len(shape)} dimensions; expected at most {MAX_RANK}")
    if not all(type(side) is int and 0 <= side < 1 << 63 for side in shape):
        raise UnreadableFile("a tensor with a side that is negative, absurdly large or not a whole number")
    # NumPy refuses huge sides also beside one of 0, so that the others have to make sense by themselves.
    if math.prod(side or 1 for side in shape) * dtype.itemsize > file_size:
        raise UnreadableFile(f"a tensor of shape {list(shape)} in a file of {file_size} bytes: absurd size")
    return tuple(shape)


def fixed(items: object) -> object:
    """Return a short list as the tuple it is now, so that nothing can change it later; all else as it is."""
    return tuple(items) if isinstance(items, list) and len(items) <= MAX_RANK else items
