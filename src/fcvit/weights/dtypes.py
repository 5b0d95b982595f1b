"""Element types of stored tensors, including bfloat16, their names in each file format, and checks of shapes."""

import math

import ml_dtypes
import numpy as np

from fcvit.errors import UnreadableFile

MAX_RANK = 8
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = {"float16": np.dtype("<f2"), "bfloat16": BFLOAT16, "float32": np.dtype("<f4"), "float64": np.dtype("<f8")}

# NumPy type, PyTorch's storage class, name in safetensors. Quantized and complex types are not supported.
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
TORCH_DTYPES = {**FLOATS, **_UNSIGNED}  # names used by tensors with untyped storages
SAFETENSORS = {name: dtype for dtype, _, name in _TYPES} | {f"U{n[4:]}": dtype for n, dtype in _UNSIGNED.items()}


def is_float(dtype: np.dtype) -> bool:
    """Return whether weights can have this type. `numpy.issubdtype` does not support bfloat16."""
    return dtype in FLOATS.values()


def checked_shape(shape: object, dtype: np.dtype, file_size: int) -> tuple[int, ...]:
    """Return the shape that a file gives for a tensor, after checking that it is plausible.

    Raises:
        UnreadableFile: If the shape is not a list of at most 8 whole numbers, or the file is too small for it.
    """
    if not isinstance(shape, tuple | list):
        raise UnreadableFile("the shape of a tensor is not a list of numbers")
    if len(shape) > MAX_RANK:
        raise UnreadableFile(f"a tensor has {len(shape)} dimensions; expected at most {MAX_RANK}")
    if not all(type(side) is int and 0 <= side < 1 << 63 for side in shape):
        raise UnreadableFile("a tensor has a dimension that is negative, too large or not a whole number")
    # NumPy rejects huge dimensions even if another dimension is 0, so zeros are left out of the product.
    if math.prod(side or 1 for side in shape) * dtype.itemsize > file_size:
        raise UnreadableFile(f"a tensor of shape {list(shape)} is too large for a file of {file_size} bytes")
    return tuple(shape)


def fixed(items: object) -> object:
    """Convert a short list to a tuple so that the file cannot change it later. Return anything else unchanged."""
    return tuple(items) if isinstance(items, list) and len(items) <= MAX_RANK else items
