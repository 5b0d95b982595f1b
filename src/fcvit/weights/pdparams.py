"""Paddle's `.pdparams`, a pickle of NumPy arrays: read without running it, and written.

`paddle.load` executes whatever such a file contains, also with `return_numpy=True`.
"""

import math
import mmap
import pickle
from collections.abc import Callable, Mapping
from typing import BinaryIO

import numpy as np

from fcvit.errors import UnreadableFile
from fcvit.weights import inert_pickle
from fcvit.weights.dtypes import BFLOAT16
from fcvit.weights.inert_pickle import Opaque

_CODES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
NAME_TABLE = "StructuredToParameterName@@"  # Paddle's list of its internal names; no weights


class DtypeRef(Opaque):
    """`numpy.dtype('f4')`, to be completed by its byte order."""

    __slots__ = ("order",)

    def __init__(self, code: object, *_: object):
        super().__init__(str(code))
        self.order = "<"

    def build(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]

    def dtype(self) -> np.dtype:
        if self.name not in _CODES:
            raise UnreadableFile(f"an array of type {self.name[:20]!r}: not numbers, refused")
        return np.dtype(("<" if self.order == "=" else self.order) + self.name)


class ArrayRef(Opaque):
    """A NumPy array; `array` is None until the pickle has given its contents."""

    __slots__ = ("array",)

    def __init__(self, *_: object):
        super().__init__("numpy.ndarray")
        self.array: np.ndarray | None = None

    def build(self, state: object) -> None:
        match state:
            case (int(), tuple(shape), DtypeRef() as kind, bool(fortran), bytes() | bytearray() as content):
                self.array = _array(content, kind, shape, "F" if fortran else "C")
            case _:
                raise UnreadableFile("an array without plain contents (of Python objects?): refused")

    @classmethod
    def from_buffer(cls, content: object, kind: object, shape: object, order: object) -> "ArrayRef":
        """Pickle protocol 5's way to say it."""
        result = cls()
        result.build((1, shape, kind, order == "F", content))
        return result


def _array(content: bytes | bytearray, kind: DtypeRef, shape: tuple, order: str) -> np.ndarray:
    dtype = kind.dtype()
    if len(shape) > 8 or not all(type(side) is int and side >= 0 for side in shape):
        raise UnreadableFile("an array whose shape is not at most 8 whole numbers")
    if math.prod(shape) * dtype.itemsize != len(content):
        raise UnreadableFile(f"an array of shape {list(shape)} with {len(content)} bytes of contents")
    array = np.frombuffer(content, dtype).reshape(shape, order=order)  # type: ignore[call-overload]
    array = array.astype(dtype.newbyteorder("<"), copy=False)
    # Paddle stores bfloat16 as uint16 with nothing that says so; it has no weights of uint16.
    return array.view(BFLOAT16) if array.dtype == np.uint16 else array


def _encode(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise UnreadableFile("an array with contents in an unknown encoding")
    return text.encode("latin1")


CONSTRUCTORS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": lambda items=(): dict(items),
    "builtins.tuple": tuple,
    "__builtin__.tuple": tuple,
    "_codecs.encode": _encode,
    "numpy.dtype": DtypeRef,
}
for _core in ("numpy.core", "numpy._core"):
    CONSTRUCTORS[f"{_core}.multiarray._reconstruct"] = ArrayRef
    CONSTRUCTORS[f"{_core}.numeric._frombuffer"] = ArrayRef.from_buffer


def read(data: mmap.mmap) -> dict:
    """The dictionary in the file, arrays as `ArrayRef`s, or as Paddle's (name, array) pairs.

    Raises:
        UnreadableFile: damaged, unsafe, or not a dictionary.
    """
    data.seek(0)
    top = inert_pickle.load(data, CONSTRUCTORS)
    if not isinstance(top, dict):
        raise UnreadableFile("a pickle, but not of a dictionary: not a checkpoint")
    if "UnpackBigParamInfor@@" in top:
        raise UnreadableFile("parameters split over several entries; save again with paddle.save(..., protocol=4)")
    return top


def write(file: BinaryIO, tensors: Mapping[str, np.ndarray]) -> None:
    """Write what plain `paddle.load` accepts: a dictionary of arrays."""
    arrays = {
        name: np.ascontiguousarray(array.view(np.uint16) if array.dtype == BFLOAT16 else array)
        for name, array in tensors.items()
    }
    pickle.dump(arrays, file, protocol=4)
