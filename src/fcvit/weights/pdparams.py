"""Read and write Paddle's `.pdparams` files, which are pickles of NumPy arrays, without executing them.

`paddle.load` executes any code that such a file contains, even with `return_numpy=True`.
"""

import contextlib
import copy
import math
import pickle
from collections.abc import Callable, Mapping
from typing import BinaryIO

import numpy as np

from fcvit.errors import UnreadableFile
from fcvit.weights import safe_unpickler
from fcvit.weights.dtypes import BFLOAT16, checked_shape, fixed
from fcvit.weights.safe_unpickler import Opaque, Stream

_CODES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
PLAIN = (None, None, None, -1, -1, 0)  # rest of a plain dtype's state: no fields, shape or size
NAME_TABLE = "StructuredToParameterName@@"  # Paddle's table of its internal names, not a weight


class DtypeRef(Opaque):
    """A reference to `numpy.dtype('f4', False, True)`. `build` sets its byte order."""

    __slots__ = ("order",)

    def __init__(self, code: object, _align: object = None, own: object = None, *_: object):
        # NumPy ignores the state of a dtype whose third argument, `copy`, is false.
        super().__init__(code if isinstance(code, str) and own in (True, 1) else "unknown")
        self.order = "<"

    def build(self, state: object) -> None:
        known = isinstance(state, tuple) and len(state) <= 8
        if known and state[1:2] in (("<",), (">",), ("|",), ("=",)) and state[2:] == PLAIN[: len(state) - 2]:
            self.order = state[1]
        else:
            self.name = "unknown"

    def dtype(self) -> np.dtype:
        if self.name not in _CODES:
            raise UnreadableFile(f"an array of type {self.name[:20]!r} does not contain numbers")
        return np.dtype(("<" if self.order == "=" else self.order) + self.name)


class Encoded(Opaque):
    """An unevaluated `_codecs.encode(text, "latin1")`, which represents bytes in pickle protocols before 3."""

    __slots__ = ()

    def __init__(self, *args: object):
        super().__init__("_codecs.encode", args)

    def content(self) -> bytes:
        match self.args:
            case (str(text), "latin1"):
                with contextlib.suppress(UnicodeEncodeError):
                    return text.encode("latin1")
        raise UnreadableFile("the contents of an array have an unknown encoding")


class ArrayRef(Opaque):
    """A NumPy array as described by the pickle. It is checked when `array` is called."""

    __slots__ = ()

    def __init__(self, kind: object, *_: object):
        super().__init__(kind.name if isinstance(kind, Opaque) else "unknown")

    @classmethod
    def from_buffer(cls, content: object, kind: object, shape: object, order: object) -> "ArrayRef":
        """Create the reference from an array in pickle protocol 5."""
        result = cls(Opaque("numpy.ndarray"))
        result.build((1, shape, kind, order == "F" if order in ("C", "F") else order, content))
        return result

    def build(self, state: object) -> None:
        match state:
            case (version, shape, DtypeRef() as kind, fortran, stored):  # the file could change shape and type later
                state = (version, fixed(shape), copy.copy(kind), fortran, stored)
        self.state = state

    def array(self, file_size: int) -> np.ndarray:
        """Return the array, as a read-only view if possible.

        Raises:
            UnreadableFile: If the array does not contain numbers, or their count does not match the shape.
        """
        if self.name != "numpy.ndarray":
            raise UnreadableFile(f"an array has the unsupported class {self.name[:60]}")
        match self.state:
            case (int(), shape, DtypeRef() as kind, bool(fortran), bytes() | memoryview() | Encoded() as stored):
                content = stored.content() if isinstance(stored, Encoded) else stored
            case _:
                raise UnreadableFile("an array has no plain contents (does it contain Python objects?)")
        dtype = kind.dtype()
        shape = checked_shape(shape, dtype, file_size)
        if math.prod(shape) * dtype.itemsize != len(content):
            raise UnreadableFile(f"an array of shape {list(shape)} does not match its contents of {len(content)} bytes")
        array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
        array = array.astype(dtype.newbyteorder("<"), copy=False)
        # Paddle stores bfloat16 as uint16 without marking it, and has no weights of type uint16.
        return array.view(BFLOAT16) if array.dtype == np.uint16 else array


def single(value: object) -> np.ndarray | None:
    """Return a single Python or NumPy number as a 0-d array, or None if the value is not a number."""
    match value:
        case bool():
            return None
        case int() if -1 << 63 <= value < 1 << 63:
            return np.array(value, np.int64)
        case float():
            return np.array(value, np.float64)
        case Opaque(args=(DtypeRef() as kind, bytes() | Encoded() as stored)) if value.name.endswith(".scalar"):
            content, dtype = stored.content() if isinstance(stored, Encoded) else stored, kind.dtype()
            return np.frombuffer(content, dtype).reshape(()) if len(content) == dtype.itemsize else None
    return None


CONSTRUCTORS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": safe_unpickler.ordered_dict,
    "builtins.tuple": lambda items=(): fixed(items),
    "__builtin__.tuple": lambda items=(): fixed(items),
    "_codecs.encode": Encoded,
    "numpy.dtype": DtypeRef,
}
for _core in ("numpy.core", "numpy._core"):
    CONSTRUCTORS[f"{_core}.multiarray._reconstruct"] = ArrayRef
    CONSTRUCTORS[f"{_core}.numeric._frombuffer"] = ArrayRef.from_buffer


def read(data: bytes) -> dict:
    """Read the dictionary in the file. Arrays are returned as `ArrayRef`s or as Paddle's (name, `ArrayRef`) pairs.

    Raises:
        UnreadableFile: If the file is damaged, unsafe, or does not contain a dictionary.
    """
    top = safe_unpickler.load(Stream(data), CONSTRUCTORS)
    if not isinstance(top, dict):
        raise UnreadableFile("not a checkpoint: the pickle does not contain a dictionary")
    if "UnpackBigParamInfor@@" in top:
        raise UnreadableFile(
            "parameters are split over several entries; save the file again with paddle.save(..., protocol=4)"
        )
    return top


def write(file: BinaryIO, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a dictionary of arrays that plain `paddle.load` accepts."""
    arrays = {
        name: np.ascontiguousarray(array.view(np.uint16) if array.dtype == BFLOAT16 else array)
        for name, array in tensors.items()
    }
    pickle.dump(arrays, file, protocol=4)
