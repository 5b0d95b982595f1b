"""Read PyTorch's zip format and its legacy format without PyTorch, and write the zip format.

A zip contains a pickle (`data.pkl`) that refers to raw storages (`data/0`, ...). The legacy format is a series of
pickles followed by the storages. Tensors are returned as read-only views into the file's bytes. Every file is either
read with the same numbers as PyTorch's safe loader reads, or rejected.
"""

import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from fcvit.errors import UnreadableFile
from fcvit.weights import pdparams, safe_unpickler, stored_zip
from fcvit.weights.dtypes import TORCH_DTYPES, TORCH_STORAGES, checked_shape, fixed
from fcvit.weights.safe_unpickler import MAX_ARGUMENTS, Opaque, Stream

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_RESAVE = "save it again in PyTorch as plain dense tensors with torch.save(model.state_dict(), FILE)"


class Storage:
    """The numbers of one or more tensors. `data` is None until the storage has been located."""

    __slots__ = ("data", "dtype", "key", "size")

    def __init__(self, key: str, dtype: np.dtype, size: int):
        self.key, self.dtype, self.size = key, dtype, size
        self.data: memoryview | None = None


class TensorRef:
    """A tensor as described by the pickle: a strided view of a storage. It is checked when `array` is called."""

    __slots__ = ("dtype", "negative", "offset", "shape", "storage", "strides", "unsure")

    def __init__(
        self,
        storage: object,
        offset: Any,
        shape: object,
        strides: object,
        dtype: object = None,
        metadata: object = None,
    ):
        self.storage, self.offset, self.dtype = storage, offset, dtype
        self.shape, self.strides = fixed(shape), fixed(strides)
        # PyTorch's lazy negation. Only the presence of the key matters, not its value.
        self.negative = isinstance(metadata, dict) and "neg" in metadata
        self.unsure = bool(metadata) and (not isinstance(metadata, dict) or "conj" in metadata)

    def build(self, _: object) -> None:
        """Record that the file changes the tensor after its construction, as only very old PyTorch did."""
        self.unsure = True

    def array(self, file_size: int) -> np.ndarray:
        """Return the numbers, as a read-only view into the file if possible.

        Raises:
            UnreadableFile: If the tensor is not valid, for example because it extends past its storage.
        """
        if not isinstance(self.storage, Storage) or self.storage.data is None:
            raise UnreadableFile("a tensor has no storage")
        if self.unsure:
            raise UnreadableFile(f"a tensor is changed after its construction; {_RESAVE}")
        dtype = self.storage.dtype if self.dtype is None else _dtype(self.dtype)
        shape = checked_shape(self.shape, dtype, file_size)
        if not isinstance(self.strides, tuple | list) or len(self.strides) != len(shape):
            raise UnreadableFile(f"the shape {list(shape)} and the strides of a tensor differ in length")
        if not all(type(n) is int and 0 <= n < 1 << 48 for n in (self.offset, *self.strides)):
            raise UnreadableFile("a tensor has an offset or stride that is negative or too large")
        if 0 in shape:
            return np.empty(shape, dtype)
        available = self.storage.size * self.storage.dtype.itemsize // dtype.itemsize
        last = self.offset + sum((side - 1) * stride for side, stride in zip(shape, self.strides, strict=True))
        if last >= available:
            raise UnreadableFile(
                f"a tensor of shape {list(shape)} reaches element {last} of a storage of {available} elements"
            )
        strides = [stride * dtype.itemsize for stride in self.strides]
        numbers = np.frombuffer(self.storage.data, np.uint8)
        tensor = np.ndarray(shape, dtype, numbers, self.offset * dtype.itemsize, strides)
        if self.negative and dtype.kind == "b":
            raise UnreadableFile("a tensor of truth values is negated")
        return np.negative(tensor) if self.negative else tensor


class Refused(Opaque):
    """A tensor of an unsupported kind. It is an error only if it is among the weights."""

    __slots__ = ()


def _dtype(value: object) -> np.dtype:
    name = value.name.rpartition(".")[2] if isinstance(value, Opaque) else ""
    if name not in TORCH_DTYPES:
        raise UnreadableFile(
            f"a tensor has type {name[:40] or 'unknown'}, which is not supported for weights; {_RESAVE}"
        )
    return TORCH_DTYPES[name]


def _rebuild_parameter(data: object, _grad: object = None, _hooks: object = None, state: object = None) -> object:
    """Return the tensor of a parameter after checking that its attributes do not change the numbers."""
    for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
        if (part and not isinstance(part, dict)) or (isinstance(part, dict) and not part.keys().isdisjoint(_NUMBERS)):
            raise UnreadableFile(f"the attributes of a tensor replace its numbers; {_RESAVE}")
    return data


def _rebuild_from_type(function: object, _type: object, args: object, state: object = None, *_: object) -> object:
    name = function.name if isinstance(function, Opaque) else ""
    constructor = CONSTRUCTORS.get(name) if name.startswith("torch._utils._rebuild_") else None
    if constructor is None or not isinstance(args, tuple) or len(args) > MAX_ARGUMENTS:
        return Refused("tensor subclass")
    return _rebuild_parameter(constructor(*args), state=state)


# Unsupported tensors: end of the name `torch._utils._rebuild_...` -> description.
_REFUSED = {
    **dict.fromkeys(("sparse_tensor", "sparse_csr_tensor"), "sparse tensor"),
    "nested_tensor": "nested tensor",
    "qtensor": "quantized tensor",
    "meta_tensor_no_storage": "meta tensor (without numbers)",
    "wrapper_subclass": "tensor subclass",
    **dict.fromkeys(("device_tensor_from_numpy", "device_tensor_from_cpu_tensor"), "tensor of another kind of device"),
}
_NUMBERS = frozenset({"data", "real", "imag", "__class__", "__dict__"})  # attributes that replace a tensor's numbers

CONSTRUCTORS: dict[str, Callable[..., object]] = {
    **pdparams.CONSTRUCTORS,  # NumPy arrays
    "torch.Size": lambda sides=(): fixed(sides),
    "torch._utils._rebuild_tensor": TensorRef,
    "torch._utils._rebuild_tensor_v2": lambda storage, offset, shape, strides, _grad, _hooks, metadata=None: TensorRef(
        storage, offset, shape, strides, metadata=metadata
    ),
    "torch._utils._rebuild_tensor_v3": lambda storage, offset, shape, strides, _grad, _hooks, dtype, metadata=None: (
        TensorRef(storage, offset, shape, strides, dtype, metadata)
    ),
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    **{f"torch._utils._rebuild_{name}": (lambda *_, kind=kind: Refused(kind)) for name, kind in _REFUSED.items()},
}


class _Storages:
    """The storages that a pickle refers to, by key."""

    def __init__(self) -> None:
        self.by_key: dict[str, Storage] = {}

    def __call__(self, reference: object) -> object:
        if isinstance(reference, tuple) and reference and reference[0] == "module":
            return Opaque("module")  # source code of a pickled class in the legacy format
        match reference:
            case ("storage", Opaque(name=name), str(key), str(), int(size)):
                view = None
            case ("storage", Opaque(name=name), str(key), str(), int(size), view):
                pass
            case _:
                raise UnreadableFile("a persistent id does not refer to a storage")
        if view is not None:
            raise UnreadableFile(f"storage views of very old PyTorch files are not supported; {_RESAVE}")
        kind = name.rpartition(".")[2]
        dtype = np.dtype("u1") if kind == "UntypedStorage" else TORCH_STORAGES.get(kind)
        if dtype is None:
            what = "quantized tensors" if kind.startswith("Q") else f"storages of type {name}"
            raise UnreadableFile(f"{what} are not supported; {_RESAVE}")
        storage = self.by_key.setdefault(key, Storage(key, dtype, size))
        if not 0 <= size < 1 << 48:
            raise UnreadableFile(f"storage {key[:40]!r} has a size that is negative or too large")
        if (storage.dtype, storage.size) != (dtype, size):
            raise UnreadableFile(f"storage {key[:40]!r} is described twice with different types or sizes")
        return storage


def read_zip(data: bytes) -> object:
    """Read the object in a zip-format file, with tensors as `TensorRef`s.

    Raises:
        UnreadableFile: If the file is damaged, unsafe, a TorchScript archive or not from PyTorch.
    """
    entries, end = stored_zip.directory(data)
    # PyTorch looks up names in the folder of the first entry and ignores case.
    below = {name.partition(b"/")[2] or name: entry for name, entry in entries.items()}
    if b"constants.pkl" in below or any(name.startswith(b"code/") for name in below):
        raise UnreadableFile(
            "a TorchScript archive contains code instead of weights; "
            "save its weights in PyTorch with torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        )
    if sum(name.rpartition(b"/")[2] == b"data.pkl" for name in entries) != 1 or b"data.pkl" not in below:
        kind = "a NumPy archive" if any(name.endswith(b".npy") for name in below) else "a zip"
        raise UnreadableFile(f"not a PyTorch checkpoint: {kind} without exactly one data.pkl")
    stored_zip.check_layout(data, entries, end)
    if b"byteorder" in below and below[b"byteorder"].content(data) != b"little":
        raise UnreadableFile(f"stored on a big-endian machine; {_RESAVE} on a little-endian machine")
    storages = _Storages()
    pickle = below[b"data.pkl"]
    pickle.content(data)
    result = safe_unpickler.load(Stream(data, pickle.start, pickle.start + pickle.size), CONSTRUCTORS, storages)
    for storage in storages.by_key.values():
        entry = below.get(b"data/" + storage.key.encode(errors="replace").lower())
        if entry is None:
            raise UnreadableFile(f"storage data/{storage.key[:40]} is missing: the file is truncated or damaged")
        storage.data = entry.content(data)
        if entry.size < storage.size * storage.dtype.itemsize:
            raise UnreadableFile(f"storage {entry} is shorter than its {storage.size} elements")
    return result


def read_legacy(data: bytes) -> object:
    """Read the object in a file of the legacy, non-zip format, with tensors as `TensorRef`s.

    Raises:
        UnreadableFile: If the file is damaged or unsafe.
    """
    stream = Stream(data)
    magic, version = safe_unpickler.load(stream, {}), safe_unpickler.load(stream, {})
    if magic != LEGACY_MAGIC or version != 1001:
        raise UnreadableFile("not a PyTorch checkpoint of a known version")
    system = safe_unpickler.load(stream, {})
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UnreadableFile(f"stored on a big-endian machine; {_RESAVE} on a little-endian machine")
    storages = _Storages()
    result = safe_unpickler.load(stream, CONSTRUCTORS, storages)
    keys = safe_unpickler.load(stream, {})
    names = [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []
    if not isinstance(keys, list) or len(names) != len(keys) or sorted(names) != sorted(storages.by_key):
        raise UnreadableFile("the list of storages does not match the tensors: the file is damaged")
    position = stream.position
    for key in names:
        storage = storages.by_key[key]
        length = storage.size * storage.dtype.itemsize
        head = data[position : position + 8]
        if len(head) != 8 or position + 8 + length > len(data):
            raise UnreadableFile("storages extend past the end of the file: it is truncated")
        if struct.unpack("<q", head)[0] != storage.size:
            raise UnreadableFile(f"the length of storage {key[:40]!r} does not match its tensors: the file is damaged")
        storage.data = memoryview(data)[position + 8 : position + 8 + length]
        position += 8 + length
    return result


def write_zip(file: BinaryIO, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a plain state dict that PyTorch's safe loader (`weights_only=True`) accepts."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, content: bytes | memoryview) -> None:
            # A fixed time makes the file reproducible.
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0)), content)

        add("data.pkl", b"\x80\x02" + state_dict_opcodes(tensors) + b".")
        add("byteorder", b"little")
        for index, tensor in enumerate(tensors.values()):
            add(f"data/{index}", np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        add("version", b"3\n")


def state_dict_opcodes(tensors: Mapping[str, np.ndarray], first: int = 0) -> bytes:
    """Return the part of a pickle that builds a dictionary of tensors with storages numbered from `first`."""
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
