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
from typing import BinaryIO

import numpy as np

from fcvit.errors import UnreadableFile
from fcvit.weights import inert_pickle
from fcvit.weights.dtypes import TORCH_DTYPES, TORCH_STORAGES
from fcvit.weights.inert_pickle import Opaque

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
MAX_DIRECTORY = 32 << 20  # bytes of a zip's directory: one entry of a checkpoint takes about 100
MAX_RANK = 8
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

    def __init__(self, storage: object, offset: object, shape: object, strides: object, dtype: np.dtype | None = None):
        numbers = (offset, *_integers(shape), *_integers(strides))
        if not isinstance(storage, Storage) or len(numbers) % 2 == 0:
            raise UnreadableFile("a tensor without storage, or whose shape and strides differ in length")
        if not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
            raise UnreadableFile("a tensor with an offset, side or stride that is negative or absurdly large")
        rank = len(numbers) // 2
        if rank > MAX_RANK:
            raise UnreadableFile(f"a tensor with {rank} dimensions; expected at most {MAX_RANK}")
        self.storage, self.offset = storage, numbers[0]
        self.shape, self.strides = numbers[1 : 1 + rank], numbers[1 + rank :]
        self.dtype = dtype or storage.dtype

    def array(self, file_size: int) -> np.ndarray:
        """The numbers, as a read-only view into the file.

        Raises:
            UnreadableFile: the view reaches outside its storage, or is larger than the whole file.
        """
        items = math.prod(self.shape)
        if items == 0:
            return np.empty(self.shape, self.dtype)
        if items * self.dtype.itemsize > file_size:
            raise UnreadableFile(f"a tensor of shape {list(self.shape)} in a file of {file_size} bytes: absurd size")
        assert self.storage.data is not None
        flat = np.frombuffer(self.storage.data, self.dtype)
        last = self.offset + sum((side - 1) * stride for side, stride in zip(self.shape, self.strides, strict=True))
        if last >= flat.size:
            raise UnreadableFile(
                f"a tensor of shape {list(self.shape)} reaches element {last} of a storage of {flat.size}"
            )
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides, writeable=False)


class Refused(Opaque):
    """A tensor of a kind that is not read; an error only if it is among the weights."""

    __slots__ = ()


def _integers(value: object) -> tuple:
    return tuple(value) if isinstance(value, tuple | list) else (None,)


def _dtype(value: object) -> np.dtype:
    name = value.name.rpartition(".")[2] if isinstance(value, Opaque) else ""
    if name not in TORCH_DTYPES:
        raise UnreadableFile(f"a tensor of type {name or value!r:.40}: not a type of weights; {_RESAVE}")
    return TORCH_DTYPES[name]


def _refusal(kind: str) -> Callable[..., Refused]:
    return lambda *args: Refused(kind)


def _rebuild_from_type(function: object, _type: object, args: object, *_state: object) -> object:
    """A tensor with attributes of its own: what it was before they were added."""
    constructor = CONSTRUCTORS.get(function.name) if isinstance(function, Opaque) else None
    if constructor is None or not isinstance(args, tuple):
        return Refused("tensor subclass")
    return constructor(*args)


CONSTRUCTORS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": lambda items=(): dict(items),
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": TensorRef,
    "torch._utils._rebuild_tensor_v2": lambda storage, offset, shape, strides, *_: TensorRef(
        storage, offset, shape, strides
    ),
    "torch._utils._rebuild_tensor_v3": lambda storage, offset, shape, strides, _grad, _hooks, dtype, *_: TensorRef(
        storage, offset, shape, strides, _dtype(dtype)
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
        if (storage.dtype, storage.size) != (dtype, size) or size < 0:
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
    result = inert_pickle.load(io.BytesIO(_entry(data, directory[pickles[0]])), CONSTRUCTORS, storages)
    for storage in storages.by_key.values():
        entry = directory.get(f"{root}data/{storage.key}")
        if entry is None:
            raise UnreadableFile(f"storage data/{storage.key[:40]} is missing: truncated or damaged")
        storage.data = _entry(data, entry)
        if len(storage.data) < storage.size * storage.dtype.itemsize:
            raise UnreadableFile(f"storage {entry.filename[:60]} is shorter than the {storage.size} elements announced")
    return result


def _directory(data: mmap.mmap) -> dict[str, zipfile.ZipInfo]:
    end = data.rfind(b"PK\x05\x06")
    if end < 0 or len(data) - end < 22:
        raise UnreadableFile("a zip without its directory: truncated; fetch or copy the file again")
    if struct.unpack_from("<L", data, end + 12)[0] > MAX_DIRECTORY:
        raise UnreadableFile("a zip whose directory alone is larger than 32 MiB: not a checkpoint")
    try:
        with zipfile.ZipFile(io.BufferedReader(_Raw(data))) as archive:
            infos = archive.infolist()
    except Exception as error:
        raise UnreadableFile(f"a damaged zip ({error}); fetch or copy the file again") from error
    directory = {info.filename: info for info in infos}
    if len(directory) != len(infos):
        raise UnreadableFile("a zip with two entries of one name: refused, it could show different weights to others")
    return directory


class _Raw(io.RawIOBase):
    """A mapped file as a stream, without copying it as a whole."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, offset + (0, self.at, len(self.data))[whence])
        return self.at

    def readinto(self, buffer) -> int:  # noqa: ANN001 -- a writable buffer; typing.Buffer is of Python 3.12
        chunk = self.data[self.at : self.at + len(buffer)]
        buffer[: len(chunk)] = chunk
        self.at += len(chunk)
        return len(chunk)


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
    magic = inert_pickle.load(data, {})
    version = inert_pickle.load(data, {})
    if magic != LEGACY_MAGIC or version != 1001:
        raise UnreadableFile("not a PyTorch checkpoint of a known version")
    system = inert_pickle.load(data, {})
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UnreadableFile(f"stored on a big-endian machine; {_RESAVE} on a little-endian one")
    storages = _Storages()
    result = inert_pickle.load(data, CONSTRUCTORS, storages)
    keys = inert_pickle.load(data, {})
    if not isinstance(keys, list) or set(map(str, keys)) != set(storages.by_key) or len(keys) != len(storages.by_key):
        raise UnreadableFile("the list of storages does not match the tensors; damaged")
    position = data.tell()
    for key in keys:
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
    storages = {dtype: name for name, dtype in TORCH_STORAGES.items()}
    pickle = bytearray(b"\x80\x02ccollections\nOrderedDict\n)R(")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, content: bytes | memoryview) -> None:
            # A fixed time keeps the file the same from run to run.
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0)), content)

        for index, (name, tensor) in enumerate(tensors.items()):
            pickle += _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
            pickle += _text("storage") + f"ctorch\n{storages[tensor.dtype]}\n".encode()
            pickle += _text(str(index)) + _text("cpu") + _integer(tensor.size) + b"tQ"
            strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(tensor.ndim)]
            pickle += _integer(0) + _tuple(tensor.shape) + _tuple(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
            add(f"data/{index}", np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        add("data.pkl", bytes(pickle + b"u."))
        add("byteorder", b"little")
        add("version", b"3\n")


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<L", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<l", value) if value < 1 << 31 else b"\x8a\x08" + struct.pack("<q", value)


def _tuple(values: tuple[int, ...] | list[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
