"""safetensors, without copying: the library checks the file, the tensors are views into it."""

import json
import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors

from fcvit.errors import UnreadableFile
from fcvit.weights.dtypes import SAFETENSORS, checked_shape

MAX_HEADER = 2 << 20  # bytes: the largest variant has 0.2 MB, 21,000 classes take another 1 MB


def looks_like(head: bytes) -> bool:
    """Eight bytes of length, then a JSON object."""
    return len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def read(path: Path, data: mmap.mmap) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors by name, and the header's text entries.

    Raises:
        UnreadableFile: the library refuses the file, or a type is not one of weights.
    """
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise UnreadableFile(f"a safetensors header of {length} bytes: not a checkpoint, or damaged")
    try:
        with safetensors.safe_open(path, "numpy") as checked:
            metadata = checked.metadata() or {}
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_unique)
    except UnreadableFile:
        raise
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UnreadableFile(f"a damaged safetensors file ({error}); fetch or copy it again") from error
    tensors = {}
    numbers = np.frombuffer(data, np.uint8)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in SAFETENSORS:
            raise UnreadableFile(f"{name[:80]} is of type {entry['dtype']}, which is not one of weights")
        dtype = SAFETENSORS[entry["dtype"]]
        try:
            shape = checked_shape(entry["shape"], dtype, len(data))
        except UnreadableFile as error:
            raise UnreadableFile(f"{name[:80]}: {error}") from error
        tensors[name] = np.ndarray(shape, dtype, numbers, 8 + length + entry["data_offsets"][0])
    return tensors, metadata


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise UnreadableFile("two entries of one name in the header: refused, it could show other weights to others")
    return result


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write the tensors and the header's text entries.

    Raises:
        OSError: the file cannot be written.
    """
    spelled = {dtype: name for name, dtype in SAFETENSORS.items()}
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=_LIBRARY_NAMES.get(spelled[array.dtype], array.dtype.name),
            shape=list(array.shape),
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in arrays.items()
    }
    try:
        safetensors.serialize_file(specs, str(path), dict(metadata))
    except safetensors.SafetensorError as error:  # the library's word for a full disk, too
        raise OSError(str(error)) from error


_LIBRARY_NAMES = {"BOOL": "bool"}
