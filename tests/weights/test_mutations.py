"""Compare how mutated weights files are read by this package and by the usual loaders.

This package may reject a file that another loader reads. If both give numbers for a name, the numbers must be equal.
The other loaders are PyTorch's safe loader, the safetensors library, and for `.pdparams` Python's unpickler
restricted to NumPy's functions.

The tests try 300 mutants. This command tries more and prints counts:
    FCVIT_MUTANTS=6000 python -m pytest -p no:xdist -s tests/weights/test_mutations.py
"""

import collections
import dataclasses
import io
import json
import os
import pickle
import pickletools
import random
import resource
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from fcvit.errors import UnreadableFile
from fcvit.weights import pdparams, torch_file
from fcvit.weights.checkpoint import read_checkpoint
from fcvit.weights.dtypes import BFLOAT16

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

MUTANTS = int(os.environ.get("FCVIT_MUTANTS", "300"))
SECONDS, MEMORY = 10, 128 << 20  # limits for one small mutant, and for all mutants together

# --- Original files ---------------------------------------------------------------------------------


def state_dict() -> dict[str, object]:
    """Return every kind of tensor that a file can describe, with different numbers."""
    draw = torch.Generator().manual_seed(5)
    base = torch.randn(24, generator=draw)
    parameter = torch.nn.Parameter(torch.randn(3, generator=draw))
    parameter.tag = torch.randn(3, generator=draw)
    tensor = torch.randn(2, generator=draw)
    tensor.tag = torch.randn(2, generator=draw)
    return {
        "a.weight": base.reshape(4, 6),
        "a.part": base[5:11],
        "a.turned": base.reshape(4, 6).T,
        "b.half": torch.randn(2, 2, generator=draw).half(),
        "b.brain": torch.randn(4, generator=draw).bfloat16(),
        "b.double": torch.randn(3, generator=draw).double(),
        "c.count": torch.tensor(7),
        "c.bytes": torch.arange(5, dtype=torch.uint8),
        "c.wide": torch.arange(6).to(torch.uint16),
        "c.truth": torch.tensor([True, False, True]),
        "d.empty": torch.empty(0, 3),
        "d.minus": torch.complex(torch.zeros(4), torch.randn(4, generator=draw)).conj().imag,
        "e.parameter": parameter,
        "e.tensor": tensor,
    }


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(5)
    return {
        "a.weight": draw.normal(size=(3, 4)).astype(np.float32),
        "a.turned": np.asfortranarray(draw.normal(size=(2, 3))),
        "b.half": draw.normal(size=4).astype(np.float16),
        "b.other": draw.normal(size=4).astype(">f4"),
        "b.brain": draw.integers(0, 9999, 3).astype(np.uint16),
        "c.count": np.array(7),
        "c.bytes": np.arange(5, dtype=np.uint8),
    }


# --- Pickles ---------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<L", len(value.encode())) + value.encode()


def reference(name: str) -> bytes:
    module, _, last = name.rpartition(".")
    return f"c{module}\n{last}\n".encode()


NAMES = (
    *("collections.OrderedDict", "torch.Size", "torch.Tensor", "torch.nn.parameter.Parameter", "builtins.set"),
    *("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"),
    *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
    *("torch._tensor._rebuild_from_type_v2", "torch.FloatStorage", "torch.IntStorage", "torch.HalfStorage"),
    *("torch.ShortStorage", "torch.storage.UntypedStorage", "torch.float32", "torch.uint16", "torch.bfloat16"),
    *("numpy.dtype", "numpy.ndarray", "_codecs.encode", "collections.Counter", "builtins.tuple"),
)
TEXTS = (
    *("storage", "cpu", "0", "1", "2", "3", "neg", "conj", "data", "real", "imag", "tag", "dtype", "_untyped_storage"),
    *(
        "a.weight",
        "a.part",
        "c.count",
        "f2",
        "f4",
        "i4",
        "u2",
        "<",
        ">",
        "|",
        "=",
        "C",
        "F",
        "f",
        "latin1",
        "_metadata",
    ),
)
NUMBERS = (0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 12, 24, 25, -1, 255, 65535, (1 << 31) - 1)
VALUES = (b"N", b"\x88", b"\x89", b")", b"}", b"]", b"\x8f", *map(text, TEXTS), *map(reference, NAMES))
FLAGS = tuple(
    b"}" + text(key) + value + b"s" for key in ("neg", "conj", "data", "tag") for value in (b"\x88", b"\x89", b"N")
)
# Opcodes that change the last object and do not change the depth of the stack.
AFTER = (
    *(state + b"b" for state in (b"}", b")", b"N", *FLAGS)),
    *(b"K\0" + value + b"s" for value in (b"K\7", b"N")),
    *(b"}" + text("dtype") + reference(kind) + b"sb" for kind in ("torch.float16", "torch.int32")),
    *(b"Na", b"K\1a", b"K\2a", b")R", b"}\x85R", b"\x85R", b"(K\1K\2e"),
)
CODES = tuple(opcode.code.encode("latin-1") for opcode in pickletools.opcodes if opcode.arg is None)


def opcodes(content: bytes) -> list[bytes]:
    """Split the pickle into its opcodes with their arguments."""
    positions = [position for _, _, position in pickletools.genops(content)]
    return [content[start:stop] for start, stop in zip(positions, [*positions[1:], len(content)], strict=True)]


def counted(value: int) -> bytes:
    return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)


ORDER = b"(K\3" + text(">") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0t"  # the state of a NumPy dtype


def change_earlier_object(rng: random.Random, parts: list[bytes]) -> None:
    """Change an earlier object, either in place of a tensor's hooks (any object is allowed) or between two entries."""
    hooks = [i for i in range(len(parts) - 2) if parts[i - 1] == b"\x89" and parts[i + 1 : i + 3] == [b")", b"R"]]
    keys = [i for i, part in enumerate(parts) if part[:1] in b"X\x8c" and b"." in part]
    at = rng.choice(hooks or keys or [len(parts) - 1])
    memo = [b"h" + part[1:] for part in parts[:at] if part[:1] == b"q"]
    memo = memo or [b"h" + bytes([index]) for index in range(parts[:at].count(b"\x94"))]
    effect = rng.choice((*AFTER, *FLAGS, ORDER + b"b", ORDER + b"b"))
    short = [i for i in range(at) if parts[i] == b"\x85" and parts[i + 1][:1] == b"q" and parts[i - 1][:1] == b"K"]
    if short and rng.random() < 0.4:  # replace a tuple with a list that grows later
        position = rng.choice(short)
        memo, effect = [b"h" + parts[position + 1][1:]], b"K\1a"
        parts[position - 1 : position + 1] = [b"]" + parts[position - 1] + b"a"]
        at -= 1
    parts[at : at + 3 * bool(hooks)] = [rng.choice(memo or [b"N"]), effect, b"" if hooks else b"0"]


def mutate_pickle(rng: random.Random, content: bytes) -> bytes:
    """Change one to three opcodes in a way that leaves most of the pickle valid."""
    parts = opcodes(content)
    for _ in range(rng.choice((1, 1, 1, 1, 1, 2, 3))):
        at = rng.randrange(1, len(parts) - 1)
        code = parts[at][:1]
        attributes = [i for i, part in enumerate(parts) if part == text("tag")]
        choice = rng.randrange(11)
        if choice < 4:  # another argument of the same kind
            numeric = [i for i, part in enumerate(parts) if part[:1] in b"KMJ"]
            spelled = [i for i, part in enumerate(parts) if part[:1] in b"XUB\x8cC"]
            named = [i for i, part in enumerate(parts) if part[:1] == b"c"]
            where = rng.choice([group for group in (numeric, spelled, named) if group])
            at = rng.choice(where)
            if where is numeric:
                parts[at] = rng.choice((counted(rng.choice(NUMBERS)), parts[rng.choice(numeric)]))
            elif where is named:
                parts[at] = rng.choice((reference(rng.choice(NAMES)), parts[rng.choice(named)]))
            elif rng.random() < 0.5:
                parts[at] = text(rng.choice(TEXTS))
            else:
                parts[at] = parts[rng.choice(spelled)]
        elif choice == 4:
            parts.insert(at, rng.choice(AFTER))
        elif choice == 5:
            calls = [i for i, part in enumerate(parts) if part[:1] in b"RQb\x85\x86\x87t"]
            parts.insert(rng.choice(calls or [at]) + 1, rng.choice(AFTER))
        elif choice == 6:
            change_earlier_object(rng, parts)
        elif choice == 10 and attributes:
            parts[rng.choice(attributes)] = text(rng.choice(("data", "grad", "real", "imag", "shape", "requires_grad")))
        elif choice == 7:
            other = rng.randrange(1, len(parts) - 1)
            parts[at], parts[other] = parts[other], parts[at]
        elif choice == 8:
            parts[at] = rng.choice((b"", parts[at] * 2, rng.choice(CODES), rng.choice(VALUES)))
        elif code in b"\x89\x88N}":
            parts[at] = rng.choice((*FLAGS, *VALUES))
        else:
            simple = [i for i, part in enumerate(parts) if part[:1] in b"\x89\x88N})"]
            parts[rng.choice(simple or [at])] = rng.choice((*FLAGS, *VALUES))
    return b"".join(parts)


def older() -> bytes:
    """Return the state dict in PyTorch's legacy format, with storages numbered as in a zip instead of by address."""
    content = state_dict()
    del content["c.wide"]  # PyTorch's own loader fails on it
    pickled, sizes, new = [], [], False
    with zipfile.ZipFile(io.BytesIO(saved(content))) as archive:
        parts = opcodes(archive.read("archive/data.pkl"))
        for index, part in enumerate(parts):
            new |= part[:1] == b"X" and part[5:].isdigit()
            if part == b"t" and parts[index + 2] == b"Q":
                pickled.append(b"N")  # the legacy format has one value more
                if new:
                    sizes.append(int.from_bytes(parts[index - 1][1:], "little"))
                new = False
            pickled.append(part)
        raw = [struct.pack("<q", size) + archive.read(f"archive/data/{key}") for key, size in enumerate(sizes)]
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = b"".join(pickle.dumps(value, 2) for value in (torch_file.LEGACY_MAGIC, 1001, system))
    return head + b"".join(pickled) + pickle.dumps([str(key) for key in range(len(sizes))], 2) + b"".join(raw)


# --- Zips ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Member:
    """A file in a zip. `position` and `size` are the recorded values, or None for the true ones."""

    name: bytes
    content: bytes
    extra: bytes = b""
    flags: int = 0
    method: int = 0
    before: bytes = b""
    local_name: bytes | None = None
    position: int | None = None
    size: int | None = None
    wide: bool = False


def members(content: bytes) -> list[Member]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [Member(info.filename.encode(), archive.read(info)) for info in archive.infolist()]


@dataclasses.dataclass
class Zip:
    """A zip to build with the given faults."""

    members: list[Member]
    order: list[int] | None = None
    wide: bool = True
    front: bytes = b""
    between: bytes = b""
    comment: bytes = b""
    shift: int = 0
    second: "Zip | None" = None

    def build(self) -> bytes:
        body = bytearray(self.front)
        directories = [self._files(body)] + ([self.second._files(body)] if self.second else [])
        body += self.between
        ends = []
        for count, directory in directories:
            start = len(body) + self.shift
            body += directory
            ends.append((count, len(directory), start))
            if self.wide:
                body += struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, *ends[-1])
        count, size, start = ends[0]
        if self.wide:
            body += struct.pack("<4sLQL", b"PK\6\7", 0, start - self.shift + size, 1)
        if self.second:
            count, size, start = 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF
        body += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, start, len(self.comment))
        return bytes(body + self.comment)

    def _files(self, body: bytearray) -> tuple[int, bytes]:
        """Append the files to the body. Return the number of their directory records and the records."""
        records = []
        for member in self.members:
            body += member.before
            position = len(body) if member.position is None else member.position
            size = len(member.content) if member.size is None else member.size
            crc = zlib.crc32(member.content)
            name = member.name if member.local_name is None else member.local_name
            local = (member.flags, member.method, crc, size, size, len(name), len(member.extra))
            body += b"PK\3\4" + struct.pack("<2x2H4x3L2H", *local) + name + member.extra + member.content
            if member.flags & 8:
                body += struct.pack("<4s3L", b"PK\7\x08", crc, size, size)
            sizes, extra = (size, size, position), b""
            if member.wide:
                sizes, extra = (0xFFFFFFFF,) * 3, struct.pack("<2H3Q", 1, 24, size, size, position)
            record = struct.pack("<4x2H4xL2L", member.flags, member.method, crc, *sizes[:2])
            record += struct.pack("<5HLL", len(member.name), len(extra), 0, 0, 0, 0, sizes[2])
            records.append(b"PK\1\2" + record + member.name + extra)
        order = self.order or range(len(records))
        return len(order), b"".join(records[i] for i in order)


def mutate_zip(rng: random.Random, content: bytes) -> bytes:
    """Change the directory, the local headers or the layout, and keep the rest consistent."""
    archive = Zip(members(content), wide=rng.random() < 0.7)
    other = [
        dataclasses.replace(m, content=bytes(b ^ 64 for b in m.content)) for m in archive.members if b"/data/" in m.name
    ]
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(archive.members))
        member = archive.members[at]
        duplicate = rng.choice(other)
        match rng.randrange(18):
            case 0:
                archive.members.insert(at, duplicate)
            case 1:  # the same name in another case
                name = rng.choice(
                    (
                        duplicate.name.upper(),
                        duplicate.name.replace(b"data", b"Data"),
                        duplicate.name + b"\0x",
                    )
                )
                archive.members.insert(at, dataclasses.replace(duplicate, name=name))
            case 2:
                member.name = rng.choice((member.name.upper(), b"x/" + member.name.partition(b"/")[2], member.name[8:]))
            case 3:
                member.local_name = rng.choice(archive.members).name
            case 4:
                member.before = rng.choice((b"\0", b"\0" * 64, b"PK\3\4", Zip([duplicate]).build()))
            case 5:
                member.extra = b"FB" + struct.pack("<H", 7) + bytes(7)
            case 6:
                member.flags = rng.choice((8, 8, 0x800, 0x808, 1))
            case 7:
                member.method = rng.choice((8, 12, 99))
            case 8:
                member.size = max(0, len(member.content) + rng.choice((-4, -1, 1, 4)))
            case 9:
                member.wide = True
            case 10:
                archive.order = rng.sample(range(len(archive.members)), len(archive.members))
            case 11:
                archive.front = rng.choice((b"\0", b"PK\3\4", Zip(other).build()))
            case 12:
                archive.between = rng.choice((b"\0", b"PK\5\6" + bytes(18), b"PK\1\2"))
            case 13:
                archive.comment = rng.choice((b"x", b"PK\5\6" + bytes(18), Zip(other).build()))
            case 14:
                archive.shift = rng.choice((-1, 1, 46))
            case 15:
                others = {m.name: m for m in other}
                archive.second = Zip([others.get(m.name, m) for m in archive.members])
            case 16:
                member.content = rng.choice((b"big", b"little", bytes(len(member.content)), duplicate.content))
            case 17:
                archive.members.append(
                    Member(member.name.partition(b"/")[0] + rng.choice((b"/BYTEORDER", b"/byteorder")), b"big")
                )
        other = other or [duplicate]
    built = archive.build()
    if rng.random() < 0.3:
        built = flipped(rng, built, (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7"))
    return built


def flipped(rng: random.Random, content: bytes, marks: tuple[bytes, ...] = ()) -> bytes:
    """Change one byte, near one of the marks if the content contains any."""
    result = bytearray(content)
    positions = [content.find(mark, rng.randrange(len(content))) for mark in marks]
    positions = [position for position in positions if position >= 0] or [rng.randrange(len(content))]
    at = min(rng.choice(positions) + rng.randrange(46 if marks else 1), len(content) - 1)
    result[at] = rng.choice((result[at] ^ 1 << rng.randrange(8), 0, 255, (result[at] + 1) % 256))
    return bytes(result)


def mutate_pickle_in_zip(rng: random.Random, content: bytes) -> bytes:
    parts = members(content)
    for part in parts:
        if part.name.endswith(b"data.pkl"):
            part.content = mutate_pickle(rng, part.content)
    return Zip(parts).build()


# --- The other formats -----------------------------------------------------------------------------


def mutate_legacy(rng: random.Random, content: bytes) -> bytes:
    """Change one of the five pickles in the legacy format, or the raw storages after them."""
    stream, pickles = io.BytesIO(content), []
    for _ in range(5):
        start = stream.tell()
        collections.deque(pickletools.genops(stream), maxlen=0)
        pickles.append(content[start : stream.tell()])
    rest = content[stream.tell() :]
    at = rng.choice((3, 3, 3, 3, 3, 3, 2, 4, 4, 5))
    if at == 5:
        return b"".join(pickles) + flipped(rng, rest)
    pickles[at] = mutate_pickle(rng, pickles[at])
    return b"".join(pickles) + rest


def mutate_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Change fields or text of the header, and sometimes the length before it."""
    length = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2))):
        name, other = rng.choice(names), rng.choice(names)
        match rng.randrange(8):
            case 0:
                header[name]["dtype"] = rng.choice(("F32", "F16", "BF16", "I32", "U32", "I16", "U8", "F8_E4M3", "X"))
            case 1:
                header[name]["shape"] = rng.choice((header[name]["shape"][::-1], [*header[name]["shape"], 1], [2], []))
            case 2:
                header[name]["data_offsets"] = rng.choice((header[other]["data_offsets"], [0, 4], [4, 0]))
            case 3:
                for field in ("dtype", "shape", "data_offsets"):
                    header[name][field], header[other][field] = header[other][field], header[name][field]
            case 4:
                header[name]["data_offsets"] = [n + rng.choice((-1, 1, 4)) for n in header[name]["data_offsets"]]
            case 5:
                header[name]["more"] = rng.choice((None, 1, "x"))
            case 6:
                header["__metadata__"] = rng.choice(({}, {"a": "b"}, {"a": 1}, [], None))
            case 7:
                rest = rng.choice((rest + b"\0", rest[:-1], rest))
    encoded = json.dumps(header).encode()
    match rng.randrange(6):
        case 0:
            encoded = flipped(rng, encoded)
        case 1:  # a name twice
            encoded = encoded[:-1] + b"," + json.dumps({rng.choice(names): header[rng.choice(names)]}).encode()[1:]
        case 2:
            encoded += rng.choice((b" ", b"\0", b"\n", b"}", b"\xff"))
    size = len(encoded) + rng.choice((0,) * 12 + (-1, 1, 8))
    return struct.pack("<Q", size) + encoded + rest


# --- Readers ---------------------------------------------------------------------------------------


Numbers = dict[str, np.ndarray]


def as_numpy(tensor: object) -> np.ndarray | None:
    """Convert a dense tensor with numbers to an array. Return None for anything else."""
    if not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.layout != torch.strided or tensor.is_complex():
        return None
    tensor = tensor.detach().resolve_neg()
    return tensor.view(torch.int16).numpy().view(BFLOAT16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def flat(content: object, convert: Callable[[object], np.ndarray | None], before: str = "") -> Numbers:
    """Return all arrays in nested dictionaries."""
    result: Numbers = {}
    for name, value in content.items() if isinstance(content, dict) and before.count("/") < 3 else ():
        if isinstance(name, str):
            array = convert(value)
            result |= flat(value, convert, f"{before}{name}/") if array is None else {before + name: array}
    return result


def by_torch(content: bytes, path: str) -> Numbers:
    loaded = torch.load(path, weights_only=True)
    return flat(loaded, as_numpy)


def by_safetensors(content: bytes, _: str) -> Numbers:
    return flat(safetensors_torch.load(content), as_numpy)


class NumpyOnly(pickle._Unpickler):
    """Python's unpickler, restricted to NumPy. Unusual dtype states are rejected because they break NumPy itself."""

    def find_class(self, module: str, name: str) -> object:
        if f"{module}.{name}" not in pdparams.CONSTRUCTORS and (module, name) != ("numpy", "ndarray"):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)

    def load_build(self) -> None:
        target, state = self.stack[-2:]
        if isinstance(target, np.dtype) and tuple(state)[2:] != pdparams.PLAIN:
            raise pickle.UnpicklingError("a dtype that is not a plain number")
        super().load_build()

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}  # noqa: RUF012 -- as in the base class


def by_numpy(content: bytes, _: str) -> Numbers:
    def convert(value: object) -> np.ndarray | None:
        value = value[1] if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) else value
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
            return None
        value = value.astype(value.dtype.newbyteorder("<"))
        return value.view(BFLOAT16) if value.dtype == np.uint16 else value

    return flat(NumpyOnly(io.BytesIO(content), encoding="latin1").load(), convert)


def by_fcvit(path: str) -> Numbers:
    checkpoint = read_checkpoint(path)

    def convert(value: object) -> np.ndarray | None:
        if isinstance(value, np.ndarray):
            return value
        value = value[1] if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) else value
        try:
            return value.array(len(checkpoint.data)) if hasattr(value, "array") else None
        except UnreadableFile:
            return None

    return flat(checkpoint.top, convert)


# --- The comparison --------------------------------------------------------------------------------

Mutate = Callable[[random.Random, bytes], bytes]
FORMATS: dict[str, tuple[Callable[[], list[bytes]], Mutate, Callable[[bytes, str], Numbers]]] = {
    "pickle in a zip": (
        lambda: [saved(state_dict()), saved({"state_dict": collections.OrderedDict(state_dict())})],
        mutate_pickle_in_zip,
        by_torch,
    ),
    "zip": (lambda: [saved(state_dict())], mutate_zip, by_torch),
    "older": (lambda: [older()], mutate_legacy, by_torch),
    "safetensors": (
        lambda: [safetensors_torch.save({n: t.detach().clone().contiguous() for n, t in state_dict().items()})],
        mutate_safetensors,
        by_safetensors,
    ),
    "pdparams": (
        lambda: [pickle.dumps(arrays(), protocol) for protocol in (2, 3, 4, 5)],
        mutate_pickle,
        by_numpy,
    ),
}


def outcome(read: Callable[[], Numbers]) -> Numbers | None:
    """Return the numbers, or None if the file was rejected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read()
        except Exception:
            return None


def differing(ours: Numbers, theirs: Mapping[str, np.ndarray]) -> list[str]:
    def known(array: np.ndarray) -> tuple[object, ...]:
        return array.dtype, array.shape, array.tobytes()

    return [name for name in ours.keys() & theirs.keys() if known(ours[name]) != known(theirs[name])]


@pytest.mark.parametrize("format", FORMATS)
def test_the_original_files_are_read_equally(format, tmp_path):
    make, _, read = FORMATS[format]
    for content in make():
        path = tmp_path / "original.bin"
        path.write_bytes(content)
        ours, theirs = by_fcvit(str(path)), read(content, str(path))
        assert ours.keys() == theirs.keys()
        assert not differing(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_mutants_are_never_read_as_different_numbers(format, tmp_path):
    make, mutate, read = FORMATS[format]
    rng, path = random.Random(f"mutants {format}"), tmp_path / "mutant.bin"
    originals, counts = make(), collections.Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mutants = [mutate(rng, rng.choice(originals)) for _ in range(MUTANTS // len(FORMATS))]
    results = []
    for content in mutants:
        path.write_bytes(content)
        start = time.perf_counter()
        try:
            results.append(by_fcvit(str(path)))
        except UnreadableFile:  # any other error fails the test
            results.append(None)
        assert time.perf_counter() - start < SECONDS
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert growth < MEMORY
    for index, (content, ours) in enumerate(zip(mutants, results, strict=True)):
        path.write_bytes(content)
        theirs = outcome(lambda: read(content, str(path)))  # noqa: B023 -- called immediately
        counts[ours is not None, theirs is not None] += 1
        if ours and theirs:
            assert not differing(ours, theirs), (index, differing(ours, theirs))
            counts["compared"] += len(ours.keys() & theirs.keys())
    print(
        f"\n{format}: {len(mutants)} mutants, read by both: {counts[True, True]} ({counts['compared']} tensors), "
        f"by the other only: {counts[False, True]}, by fcvit only: {counts[True, False]}, "
        f"by neither: {counts[False, False]}"
    )
    assert counts[True, True] > len(mutants) // 20
