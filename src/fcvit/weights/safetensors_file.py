"""Read and write safetensors files. Tensors that are read are views into the file's bytes."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors

from fcvit.errors import UnreadableFile
from fcvit.text import strict_json
from fcvit.weights.dtypes import SAFETENSORS, checked_shape

MAX_HEADER = 2 << 20  # bytes: the largest variant needs 0.2 MB, and 21,000 classes need another 1 MB


def looks_like(head: bytes) -> bool:
    """Return whether a file begins with an eight-byte length followed by a JSON object."""
    return len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def read(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors by name, and the text entries of the header.

    The safetensors library is not used, because it would open the path again, when it may be another file, or copy all
    tensors.

    Raises:
        UnreadableFile: If the data does not follow the format exactly, or a type is not supported for weights.
    """
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise UnreadableFile(f"the safetensors header has {length} bytes: not a checkpoint, or damaged")
    try:
        header = strict_json(str(data[8 : 8 + length], "utf-8"))
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("an entry of the metadata is not text")
        numbers = np.frombuffer(data, np.uint8)
        tensors, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in SAFETENSORS:
                raise UnreadableFile(f"{name[:80]} has type {entry['dtype']:.40}, which is not supported for weights")
            dtype = SAFETENSORS[entry["dtype"]]
            try:
                shape = checked_shape(entry["shape"], dtype, len(data))
            except UnreadableFile as error:
                raise UnreadableFile(f"{name[:80]}: {error}") from error
            start, end = end, end + math.prod(shape) * dtype.itemsize
            if entry["data_offsets"] != [start, end]:
                raise ValueError(f"the position of {name[:80]} does not match its shape or the preceding tensor")
            tensors[name] = np.ndarray(shape, dtype, numbers, 8 + length + start)
        if 8 + length + end != len(data):
            raise ValueError(f"the file has {len(data)} bytes, expected {8 + length + end}")
    except UnreadableFile:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        message = f"{type(error).__name__}: {str(error)[:200]}"
        raise UnreadableFile(f"damaged safetensors file ({message}); download or copy it again") from error
    return {name: tensors[name] for name in header}, metadata


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write the tensors and the text entries of the header.

    Raises:
        OSError: If the file cannot be written.
    """
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=array.dtype.name,  # NumPy's "bool" is accepted, too
            shape=list(array.shape),
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in arrays.items()
    }
    try:
        safetensors.serialize_file(specs, str(path), dict(metadata))
    except safetensors.SafetensorError as error:  # also raised for a full disk
        raise OSError(str(error)) from error
