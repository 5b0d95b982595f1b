"""Element types of stored tensors, bfloat16 included, how each file format spells them, and shapes."""

import math

import ml_dtypes
import numpy as np

from fcvit.errors import UnreadableFile

MAX_RANK = 8
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = {"float16": np.dtype("<f2"), "bfloat16": BFLOAT16, "float32": np.dtype("<f4"), "float64": np.dtype("<f8")}

# Storage classes of PyTorch; quantized and complex ones are left out on purpose.
TORCH_STORAGES = {
    "DoubleStorage": FLOATS["float64"],
    "FloatStorage": FLOATS["float32"],
    "HalfStorage": FLOATS["float16"],
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# Names under which PyTorch stores a dtype by itself (tensors over untyped storages).
TORCH_DTYPES = {**FLOATS, "uint16": np.dtype("<u2"), "uint32": np.dtype("<u4"), "uint64": np.dtype("<u8")}
SAFETENSORS = {
    "F64": FLOATS["float64"],
    "F32": FLOATS["float32"],
    "F16": FLOATS["float16"],
    "BF16": BFLOAT16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


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
