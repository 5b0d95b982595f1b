"""PyTorch's files without PyTorch: the zip format and the older one, read; the zip format, written.

A zip holds a pickle (`data.pkl`) that refers to raw storages (`data/0`, ...); the older format is
four pickles in a row, then the storages. Tensors come back as read-only views into the mapped file.
"""

import io
import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from fcvit.errors import UnreadableFile
from fcvit.weights import inert_pickle, pdparams
from fcvit.weights.dtypes import TORCH_DTYPES, TORCH_STORAGES, checked_shape
from fcvit.weights.inert_pickle import MAX_ARGUMENTS, Opaque

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
MAX_DIRECTORY = 2 << 20  # bytes of a zip's directory: the largest variant with optimiser and EMA has 0.6 MB
_RESAVE = "save it again in PyTorch as plain dense tensors with torch.save(model.state_dict(), FILE)"


class Storage:
    """Where the numbers of one or more tensors lie; `data` is None until they have been found."""

    __slots__ = ("data", "dtype", "key", "size")

    def __init__(self, key: str, dtype: np.dtype, size: int):
        self.key, self.dtype, self.size = key, dtype, size
        self.data: memoryview | None = None


class TensorRef:
    """A tensor as the pickle describes it: a strided view of a storage, not looked at yet."""

    __slots__ = ("dtype", "offset", "shape", "storage", "strides")

    def __init__(self, storage: object, offset: Any, shape: object, strides: object, dtype: object = None):
        self.storage, self.offset, self.shape, self.strides, self.dtype = storage, offset, shape, strides, dtype

    def array(self, file_size: int) -> np.ndarray:
        """The numbers, as a read-only view into the file.

        Raises:
            UnreadableFile: no such view is possible: outside of its storage, larger than the file, ...
        """
        if not isinstance(self.storage, Storage) or self.storage.data is None:
            raise UnreadableFile("a tensor without a storage")
        dtype = self.storage.dtype if self.dtype is None else _dtype(self.dtype)
        shape = checked_shape(self.shape, dtype, file_size)
        if not isinstance(self.strides, tuple | list) or len(self.strides) != len(shape):
            raise UnreadableFile(f"a tensor whose shape {list(shape)} and strides differ in length")
        if not all(type(n) is int and 0 <= n < 1 << 48 for n in (self.offset, *self.strides)):
            raise UnreadableFile("a tensor with an offset or stride that is negative or absurdly large")
        if 0 in shape:
            return np.empty(shape, dtype)
        available = self.storage.size * self.storage.dtype.itemsize // dtype.itemsize
        last = self.offset + sum((side - 1) * stride for side, stride in zip(shape, self.strides, strict=True))
        if last >= available:
            raise UnreadableFile(f"a tensor of shape {list(shape)} reaches element {last} of a storage of {available}")
        strides = [stride * dtype.itemsize for stride in self.strides]
        numbers = np.frombuffer(self.storage.data, np.uint8)  # keeps the file mapped as long as the view lives
        return np.ndarray(shape, dtype, numbers, self.offset * dtype.itemsize, strides)


class Refused(Opaque):
    """A tensor of a kind that is not read; an error only if it is among the weights."""

    __slots__ = ()


def _dtype(value: object) -> np.dtype:
    name = value.name.rpartition(".")[2] if isinstance(value, Opaque) else ""
    if name not in TORCH_DTYPES:
        raise UnreadableFile(f"a tensor of type {name[:40] or 'unknown'}: not a type of weights; {_RESAVE}")
    return TORCH_DTYPES[name]


def _refusal(kind: str) -> Callable[..., Refused]:
    return lambda *args: Refused(kind)


def _rebuild_from_type(function: object, _type: object, args: object, *_state: object) -> object:
    """A tensor with attributes of its own: what it was before they were added."""
    name = function.name if isinstance(function, Opaque) else ""
    constructor = CONSTRUCTORS.get(name) if name.startswith("torch._utils._rebuild_") else None
    if constructor is None or not isinstance(args, tuple) or len(args) > MAX_ARGUMENTS:
        return Refused("tensor subclass")
    return constructor(*args)


CONSTRUCTORS: dict[str, Callable[..., object]] = {
    **pdparams.CONSTRUCTORS,  # NumPy's arrays
    "torch.Size": lambda sides=(): sides,
    "torch._utils._rebuild_tensor": TensorRef,
    "torch._utils._rebuild_tensor_v2": lambda storage, offset, shape, strides, *_: TensorRef(
        storage, offset, shape, strides
    ),
    "torch._utils._rebuild_tensor_v3": lambda storage, offset, shape, strides, _grad, _hooks, dtype, *_: TensorRef(
        storage, offset, shape, strides, dtype
    ),
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch._utils._rebuild_sparse_tensor": _refusal("sparse tensor"),
    "torch._utils._rebuild_sparse_csr_tensor": _refusal("sparse tensor"),
    "torch._utils._rebuild_nested_tensor": _refusal("nested tensor"),
    "torch._utils._rebuild_qtensor": _refusal("quantised tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": _refusal("meta tensor, which has no numbers"),
    "torch._utils._rebuild_wrapper_subclass": _refusal("tensor subclass"),
    "torch._utils._rebuild_device_tensor_from_numpy": _refusal("tensor of a foreign device"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _refusal("tensor of a foreign device"),
}


class _Storages:
    """The storages that a pickle refers to, each once."""

    def __init__(self) -> None:
        self.by_key: dict[str, Storage] = {}

    def __call__(self, reference: object) -> object:
        if isinstance(reference, tuple) and reference and reference[0] == "module":
            return Opaque("module")  # the older format's source code of a pickled class
        match reference:
            case ("storage", Opaque(name=name), str(key), str(), int(size)):
                view = None
            case ("storage", Opaque(name=name), str(key), str(), int(size), view):
                pass
            case _:
                raise UnreadableFile("a persistent id that is not a storage")
        if view is not None:
            raise UnreadableFile(f"storage views of very old PyTorch files are not read; {_RESAVE}")
        kind = name.rpartition(".")[2]
        if kind == "UntypedStorage":
            dtype = np.dtype("u1")
        elif kind in TORCH_STORAGES:
            dtype = TORCH_STORAGES[kind]
        else:
            what = "quantised tensors" if kind.startswith("Q") else f"storages of type {name}"
            raise UnreadableFile(f"{what} are not read; {_RESAVE}")
        storage = self.by_key.setdefault(key, Storage(key, dtype, size))
        if not 0 <= size < 1 << 48:
            raise UnreadableFile(f"storage {key[:40]!r} has a size that is negative or absurdly large")
        if (storage.dtype, storage.size) != (dtype, size):
            raise UnreadableFile(f"storage {key[:40]!r} is described twice, differently")
        return storage


def read_zip(data: mmap.mmap) -> object:
    """The object in a zip-format file, tensors as `TensorRef`s.

    Raises:
        UnreadableFile: damaged or unsafe, a TorchScript archive, or not PyTorch's.
    """
    directory = _directory(data)
    pickles = [name for name in directory if name == "data.pkl" or name.endswith("/data.pkl")]
    root = pickles[0][: -len("data.pkl")] if pickles else ""
    if f"{root}constants.pkl" in directory or any(name.startswith(f"{root}code/") for name in directory):
        raise UnreadableFile(
            "a TorchScript archive (code, not weights); in PyTorch: torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        )
    if len(pickles) != 1:
        kind = "a NumPy archive" if any(name.endswith(".npy") for name in directory) else "a zip"
        raise UnreadableFile(f"{kind} without exactly one data.pkl: not a PyTorch checkpoint")
    if f"{root}byteorder" in directory and bytes(_entry(data, directory[f"{root}byteorder"])) != b"little":
        raise UnreadableFile(f"stored on a big-endian machine; {_RESAVE} on a little-endian one")
    storages = _Storages()
    pickle = io.BytesIO(_entry(data, directory[pickles[0]]))
    result = inert_pickle.load(pickle, CONSTRUCTORS, len(data), storages)
    for storage in storages.by_key.values():
        entry = directory.get(f"{root}data/{storage.key}")
        if entry is None:
            raise UnreadableFile(f"storage data/{storage.key[:40]} is missing: truncated or damaged")
        storage.data = _entry(data, entry)
        if len(storage.data) < storage.size * storage.dtype.itemsize:
            raise UnreadableFile(f"storage {entry.filename[:60]} is shorter than the {storage.size} elements announced")
    return result


def _directory(data: mmap.mmap) -> dict[str, zipfile.ZipInfo]:
    if data.rfind(b"PK\x05\x06") < 0:
        raise UnreadableFile("a zip without its directory: truncated; fetch or copy the file again")
    try:
        with zipfile.ZipFile(_DirectoryReader(data)) as archive:  # type: ignore[arg-type]
            infos = archive.infolist()
    except UnreadableFile:
        raise
    except Exception as error:
        raise UnreadableFile(f"a damaged zip ({error}); fetch or copy the file again") from error
    directory = {info.filename: info for info in infos}
    if len(directory) != len(infos):
        raise UnreadableFile("a zip with two entries of one name: refused, it could show different weights to others")
    # Entries that share their bytes would make a small file take long to check.
    if sum(info.compress_size for info in infos) > len(data):
        raise UnreadableFile("a zip whose entries are together larger than the file: damaged or manipulated")
    return directory


class _DirectoryReader:
    """A mapped file as `zipfile` reads it, which takes the directory in one piece."""

    def __init__(self, data: mmap.mmap):
        self.seek, self.tell, self._read = data.seek, data.tell, data.read

    def read(self, size: int = MAX_DIRECTORY) -> bytes:
        if size > MAX_DIRECTORY:
            raise UnreadableFile(f"a zip whose directory alone takes {size} bytes: not a checkpoint")
        return self._read(size)


def _entry(data: mmap.mmap, info: zipfile.ZipInfo) -> memoryview:
    """The bytes of a stored entry, checked against the directory and its checksum."""
    name = info.filename[:60]
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise UnreadableFile(f"{name} is compressed, which PyTorch never does; {_RESAVE}")
    if info.flag_bits & 1:
        raise UnreadableFile(f"{name} is encrypted")
    start = info.header_offset
    if start < 0 or start + 30 > len(data) or data[start : start + 4] != b"PK\x03\x04":
        raise UnreadableFile(f"{name}: its place in the file is wrong; damaged or truncated")
    name_length, extra_length = struct.unpack_from("<HH", data, start + 26)
    if data[start + 30 : start + 30 + name_length] != info.orig_filename.encode():
        raise UnreadableFile(f"{name} carries another name in its own header; damaged or manipulated")
    start += 30 + name_length + extra_length
    if start + info.file_size > len(data):
        raise UnreadableFile(f"{name} reaches behind the end of the file; truncated")
    view = memoryview(data)[start : start + info.file_size]
    # Zero stands for a file saved with torch.serialization.set_crc32_options(False).
    if info.CRC and zlib.crc32(view) != info.CRC:
        raise UnreadableFile(f"{name} does not have the checksum on record; damaged, fetch or copy the file again")
    return view


def read_legacy(data: mmap.mmap) -> object:
    """The object in a file of the older, non-zip format, tensors as `TensorRef`s.

    Raises:
        UnreadableFile: damaged or unsafe.
    """
    data.seek(0)
    magic = inert_pickle.load(data, {}, len(data))
    version = inert_pickle.load(data, {}, len(data))
    if magic != LEGACY_MAGIC or version != 1001:
        raise UnreadableFile("not a PyTorch checkpoint of a known version")
    system = inert_pickle.load(data, {}, len(data))
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UnreadableFile(f"stored on a big-endian machine; {_RESAVE} on a little-endian one")
    storages = _Storages()
    result = inert_pickle.load(data, CONSTRUCTORS, len(data), storages)
    keys = inert_pickle.load(data, {}, len(data))
    names = [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []
    if not isinstance(keys, list) or len(names) != len(keys) or sorted(names) != sorted(storages.by_key):
        raise UnreadableFile("the list of storages does not match the tensors; damaged")
    position = data.tell()
    for key in names:
        storage = storages.by_key[key]
        length = storage.size * storage.dtype.itemsize
        head = data[position : position + 8]
        if len(head) != 8 or position + 8 + length > len(data):
            raise UnreadableFile("storages reach behind the end of the file; truncated")
        if struct.unpack("<q", head)[0] != storage.size:
            raise UnreadableFile(f"storage {key[:40]!r} has another length than its tensors say; damaged")
        storage.data = memoryview(data)[position + 8 : position + 8 + length]
        position += 8 + length
    return result


def write_zip(file: BinaryIO, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a bare state dict that PyTorch's safe loader (`weights_only=True`) accepts."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, content: bytes | memoryview) -> None:
            # A fixed time keeps the file the same from run to run.
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0)), content)

        add("data.pkl", b"\x80\x02" + state_dict_opcodes(tensors) + b".")
        add("byteorder", b"little")
        for index, tensor in enumerate(tensors.values()):
            add(f"data/{index}", np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        add("version", b"3\n")


def state_dict_opcodes(tensors: Mapping[str, np.ndarray], first: int = 0) -> bytes:
    """The part of a pickle that builds an ordered dictionary of tensors, over the storages `first`, `first` + 1, ..."""
    storages = {dtype: name for name, dtype in TORCH_STORAGES.items()}
    opcodes = bytearray(b"ccollections\nOrderedDict\n)R(")
    for key, (name, tensor) in enumerate(tensors.items(), first):
        opcodes += _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        opcodes += _text("storage") + f"ctorch\n{storages[tensor.dtype]}\n".encode()
        opcodes += _text(str(key)) + _text("cpu") + _integer(tensor.size) + b"tQ"
        strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(tensor.ndim)]
        opcodes += _integer(0) + _tuple(tensor.shape) + _tuple(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    return bytes(opcodes + b"u")


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<L", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<l", value) if value < 1 << 31 else b"\x8a\x08" + struct.pack("<q", value)


def _tuple(values: tuple[int, ...] | list[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
