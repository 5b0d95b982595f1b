"""Hostile and damaged checkpoints are rejected safely.

Nothing is executed, nothing crashes or hangs, the memory stays bounded, and each file gives one clear error that
names the file and the fault. All files are built opcode by opcode and byte by byte, so PyTorch is not needed.
"""

import bz2
import contextlib
import copyreg
import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import pickletools
import random
import re
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcvit.errors import DoesNotFit, FcvitError, UnreadableFile, UsageError
from fcvit.models.spec import ModelSpec, SemanticFPNOptions, paddle_name, tensor_specs
from fcvit.models.variants import VARIANTS
from fcvit.training.state import STATE, Progress, encode_state, read_state, write_state
from fcvit.weights import checkpoint, pdparams, safetensors_file, torch_file
from fcvit.weights.checkpoint import read_checkpoint
from fcvit.weights.header import Header
from fcvit.weights.reading import read_weights
from fcvit.weights.synthetic import synthetic_tensors

SPEC = ModelSpec(VARIANTS["fcvit_digits"], 10)
PATIENCE = 40  # seconds of processor time; the slowest file takes 3
MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_hang():
    """Fail a test that takes longer than `PATIENCE` instead of blocking the tests after it."""

    def fail(*_):
        pytest.fail(f"still busy after {PATIENCE} seconds")

    before = signal.signal(signal.SIGPROF, fail)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


# --- Pickles, opcode by opcode ---------------------------------------------------------------------

PROTOCOL_2 = b"\x80\x02"


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<L", len(encoded)) + encoded


def number(value: int) -> bytes:
    encoded = pickle.encode_long(value)
    head = b"\x8a" + bytes([len(encoded)]) if len(encoded) < 256 else b"\x8b" + struct.pack("<l", len(encoded))
    return head + encoded


def name(dotted: str) -> bytes:
    """Name a class or function with the older opcode GLOBAL."""
    module, _, last = dotted.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def many(*items: bytes) -> bytes:
    """Build a tuple."""
    return b"(" + b"".join(items) + b"t"


def listed(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def call(function: str, *arguments: bytes) -> bytes:
    return name(function) + many(*arguments) + b"R"


def mapping(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def pickled(content: bytes) -> bytes:
    return PROTOCOL_2 + content + b"."


def numbers(*values: int) -> bytes:
    return many(*map(number, values))


NONE, FALSE, TRUE = b"N", b"\x89", b"\x88"
RECONSTRUCT = "numpy.core.multiarray._reconstruct"
REBUILD_V2 = "torch._utils._rebuild_tensor_v2"
REBUILD_TYPE = "torch._tensor._rebuild_from_type_v2"
HUGE_NUMBER = number(1 << 20000)  # Python rejects to print so many digits
# Sixty lists, each containing the previous list twice. As text, they would have 2^60 items.
DOUBLING = b"]q\x000" + b"".join(b"]q%c(h%ch%ce0" % (i, i - 1, i - 1) for i in range(1, 60)) + b"h\x3b"


def storage(kind: str = "torch.FloatStorage", key: str = "0", size: bytes = number(4)) -> bytes:
    return many(text("storage"), name(kind), text(key), text("cpu"), size) + b"Q"


def tensor(
    data: bytes = storage(),
    offset: bytes = number(0),
    shape: bytes = numbers(4),
    strides: bytes = numbers(1),
    version: int = 2,
    more: bytes = b"",
) -> bytes:
    hooks = call("collections.OrderedDict")
    return call(f"torch._utils._rebuild_tensor_v{version}", data, offset, shape, strides, FALSE, hooks, more)


def array(
    content: bytes = b"C\x10" + bytes(16),
    shape: bytes = numbers(4),
    code: str | None = "f4",
    order: str = "<",
    kind: str = "numpy.ndarray",
) -> bytes:
    """Build an array as NumPy pickles it. If `code` is None, the type is not valid."""
    dtype = call("numpy.dtype", DOUBLING if code is None else text(code), FALSE, TRUE)
    dtype += many(number(3), text(order), NONE) + b"b"
    empty = call(RECONSTRUCT, name(kind), numbers(0), b"C\x01b")
    return empty + many(number(1), shape, dtype, FALSE, content) + b"b"


# --- Files -----------------------------------------------------------------------------------------

SIXTEEN = bytes(range(16))


def zipped(content: bytes = mapping({"w": tensor()}), **more: bytes) -> bytes:
    """Build a PyTorch file around a pickle. `more` replaces or adds entries by the last part of their names."""
    files = {"data.pkl": pickled(content), "byteorder": b"little", "data/0": SIXTEEN, **more}
    return plain_zip({f"archive/{key}": value for key, value in files.items()})


def plain_zip(files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for key, value in files.items():
            info = zipfile.ZipInfo(key)
            info.compress_type = compression
            archive.writestr(info, value)
    return buffer.getvalue()


def legacy(
    content: bytes = mapping({"w": tensor()}),
    keys: bytes = listed(text("0")),
    storages: tuple[bytes, ...] = (SIXTEEN,),
    version: int = 1001,
    system: bytes = mapping({"protocol_version": number(1001), "little_endian": TRUE}),
) -> bytes:
    """Build a file in PyTorch's legacy format around a pickle, with four numbers of four bytes in each storage."""
    head = pickle.dumps(torch_file.LEGACY_MAGIC, 2) + pickle.dumps(version, 2) + pickled(system)
    raw = b"".join(struct.pack("<q", len(data) // 4) + data for data in storages)
    return head + pickled(content) + pickled(keys) + raw


def paddle(content: bytes = mapping({"w": array()})) -> bytes:
    return pickled(content)


def safetensors(header: Mapping[str, object] | bytes, data: bytes = SIXTEEN, length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def entry(dtype: str = "F32", shape: tuple[int, ...] = (4,), start: int = 0, end: int = 16) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@functools.cache
def good_tensors() -> Mapping[str, np.ndarray]:
    return synthetic_tensors(SPEC)


def changed(key: str, value: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return the valid tensors with one tensor replaced, added, or removed (None)."""
    tensors = {**good_tensors(), key: value}
    return {key: value for key, value in tensors.items() if value is not None}


def in_paddle_form() -> dict[str, np.ndarray]:
    table = tensor_specs(SPEC)
    return {
        paddle_name(key): value.T if table[key].transposed_in_paddle else value
        for key, value in good_tensors().items()
        if value.ndim
    }


def good_zip(tensors: Mapping[str, np.ndarray] | None = None) -> bytes:
    buffer = io.BytesIO()
    torch_file.write_zip(buffer, tensors or good_tensors())
    return buffer.getvalue()


def good_paddle(tensors: Mapping[str, np.ndarray] | None = None) -> bytes:
    buffer = io.BytesIO()
    pdparams.write(buffer, tensors or in_paddle_form())
    return buffer.getvalue()


def good_safetensors(header: str | None = None) -> bytes:
    """Build a file as the package writes it, without writing it to disk."""
    fields: dict[str, object] = {} if header is None else {"__metadata__": {"fcvit": header}}
    data = b""
    spelled = {dtype: spelling for spelling, dtype in safetensors_file.SAFETENSORS.items()}
    for key, value in good_tensors().items():
        fields[key] = entry(spelled[value.dtype], value.shape, len(data), len(data) + value.nbytes)
        data += np.ascontiguousarray(value).tobytes()
    return safetensors(fields, data)


@functools.cache
def state_pickle() -> bytes:
    """Return the opcodes of the valid weights in a PyTorch file, for use in other pickles."""
    with zipfile.ZipFile(io.BytesIO(good_zip())) as archive:
        return archive.read("archive/data.pkl").removeprefix(PROTOCOL_2).removesuffix(b".")


def zip_around(content: bytes) -> bytes:
    """Build a PyTorch file with this pickle and the storages of the valid weights."""
    storages = {f"data/{index}": value.tobytes() for index, value in enumerate(good_tensors().values())}
    return zipped(content, **storages)


def legacy_around(content: bytes) -> bytes:
    keys = listed(*(text(str(index)) for index in range(len(good_tensors()))))
    file = legacy(content, keys, ())
    return file + b"".join(struct.pack("<q", value.size) + value.tobytes() for value in good_tensors().values())


def header_json(**changes: object) -> str:
    """Return the header of the valid weights with changed values. `variant__depths` is a field of the variant."""
    fields = json.loads(Header(SPEC, "torch").to_json())
    for key, value in changes.items():
        outer, _, inner = key.partition("__")
        (fields[outer] if inner else fields)[inner or outer] = value
    return json.dumps(fields)


def write(folder: Path, content: bytes, ending: str = ".pth") -> Path:
    path = folder / f"suspect{ending}"
    path.write_bytes(content)
    return path


def reading_error(path: Path, kind: type[FcvitError] = UnreadableFile) -> str:
    """Return the message of the error from reading the file, after checking its type and form."""
    with pytest.raises(kind) as caught:
        read_weights(path)
    message = str(caught.value)
    assert message.isprintable(), message  # one line without control characters
    assert len(message) < 700
    assert path.name in message
    return message


def same_numbers(tensors: Mapping[str, np.ndarray]) -> bool:
    return all(np.array_equal(tensors[key], value) for key, value in good_tensors().items() if value.ndim)


@pytest.mark.parametrize(
    "content",
    [
        good_zip,
        good_paddle,
        good_safetensors,
        lambda: good_safetensors(header_json()),
        lambda: zip_around(state_pickle()),
        lambda: legacy_around(state_pickle()),
        lambda: zip_around(mapping({"state_dict": state_pickle()})),
    ],
)
def test_the_good_files_are_read(content, tmp_path):
    """The files that the hostile files are derived from have no fault."""
    assert same_numbers(read_weights(write(tmp_path, content())).tensors)


@pytest.mark.parametrize("content", [zipped, legacy, paddle, lambda: safetensors({"w": entry()})])
def test_the_tiny_files_are_read(content, tmp_path):
    tensors = read_checkpoint(write(tmp_path, content())).select().tensors
    assert tensors["w"].shape == (4,)


# --- Attempts to execute code ----------------------------------------------------------------------

# A marker file is written when a pickle imports, calls, fills or hashes anything in this module.
TRAP = """
import pathlib
marker = pathlib.Path(__file__).with_name("marker")
marker.write_text("imported")

def called(*arguments):
    marker.write_text("called")

class Made:
    def __new__(cls, *arguments, **keywords):
        marker.write_text("made")
        return object.__new__(cls)

class Filled:
    def __setstate__(self, state):
        marker.write_text("state set")
    def append(self, item):
        marker.write_text("appended")
    def __setitem__(self, key, value):
        marker.write_text("item set")

class Hashed(str):
    def __hash__(self):
        marker.write_text("hashed")
        return 0
"""


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """Return the path of the file that any execution creates. The module `hostile_trap` can be imported."""
    tmp_path.joinpath("hostile_trap.py").write_text(TRAP)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hostile_trap", raising=False)
    yield tmp_path / "marker"
    sys.modules.pop("hostile_trap", None)


def shell(marker: Path) -> bytes:
    return text(f"echo called> '{marker}'")


def python(marker: Path) -> bytes:
    return text(f"__import__('pathlib').Path({str(marker)!r}).write_text('called')")


# Kind of attack -> opcodes, and the text that Python's own unpickler leaves in the marker file.
ATTACKS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "os.system": (lambda m: call("os.system", shell(m)), "called"),
    "posix.system": (lambda m: call("posix.system", shell(m)), "called"),
    "builtins.eval": (lambda m: call("builtins.eval", python(m)), "called"),
    "builtins.exec": (lambda m: call("builtins.exec", python(m)), "called"),
    "__builtin__.eval from Python 2": (lambda m: call("__builtin__.eval", python(m)), "called"),
    "GLOBAL alone imports": (lambda _: name("hostile_trap.called"), "imported"),
    "GLOBAL and REDUCE": (lambda _: call("hostile_trap.called"), "called"),
    "STACK_GLOBAL": (lambda _: text("hostile_trap") + text("called") + b"\x93)R", "called"),
    "INST": (lambda _: b"(ihostile_trap\ncalled\n", "called"),
    "OBJ": (lambda _: b"(" + name("hostile_trap.called") + number(1) + b"o", "called"),
    "NEWOBJ": (lambda _: name("hostile_trap.Made") + b")\x81", "made"),
    "NEWOBJ_EX": (lambda _: name("hostile_trap.Made") + b")}\x92", "made"),
    "BUILD with __setstate__": (lambda _: name("hostile_trap.Filled") + b")\x81}b", "state set"),
    "APPEND on any object": (lambda _: name("hostile_trap.Filled") + b")\x81Na", "appended"),
    "APPENDS on any object": (lambda _: name("hostile_trap.Filled") + b")\x81(Ne", "appended"),
    "SETITEM on any object": (lambda _: name("hostile_trap.Filled") + b")\x81NNs", "item set"),
    "SETITEMS on any object": (lambda _: name("hostile_trap.Filled") + b")\x81(NNu", "item set"),
    "a key that is hashed": (lambda _: b"}" + name("hostile_trap.Hashed") + b")\x81Ns", "hashed"),
    "the result of a call, called": (
        lambda _: call("builtins.getattr", name("hostile_trap.called"), text("__call__")) + b")R",
        "called",
    ),
    "deep inside plain data": (lambda _: listed(mapping({"a": many(call("hostile_trap.called"))})), "called"),
    "as an argument of a tensor": (
        lambda _: call("collections.OrderedDict", listed(many(text("a"), call("hostile_trap.called")))),
        "called",
    ),
    "as an array's class": (
        lambda _: call(RECONSTRUCT, call("hostile_trap.called") + b"0" + name("numpy.ndarray"), numbers(0), b"C\x01b"),
        "called",
    ),
    "as an array's contents": (
        lambda _: call("_codecs.encode", call("hostile_trap.called") + b"0" + text("x"), text("latin1")),
        "called",
    ),
}
attacks = pytest.mark.parametrize("attack", ATTACKS)

# Position of the attack in a file -> a function that builds the file, and the fault in the error.
POSITIONS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a zip instead of weights": (zipped, "expected a dictionary of weights|not a state dict|is not text"),
    "a legacy file instead of weights": (
        legacy,
        "expected a dictionary of weights|not match|not a state dict|is not text",
    ),
    "a pdparams instead of weights": (paddle, "not contain a dictionary|not a state dict|is not text"),
    "a tensor of a zip": (
        lambda a: zipped(mapping({"w": a, "x": tensor()})),
        "w: (expected a tensor|an array)",
    ),
    "a tensor of a legacy file": (
        lambda a: legacy(mapping({"w": a, "x": tensor()})),
        "w: (expected a tensor|an array)",
    ),
    "a tensor of a pdparams": (lambda a: paddle(mapping({"w": a})), "w: (expected a tensor|an array)"),
    "a name in a zip": (lambda a: zipped(b"}" + a + tensor() + b"s"), "is not text"),
    "a name in a pdparams": (lambda a: paddle(b"}" + a + array() + b"s"), "is not text"),
    "the storage of a tensor": (lambda a: zipped(mapping({"w": tensor(a)})), "w: .*no storage"),
    "the shape of a tensor": (
        lambda a: zipped(mapping({"w": tensor(shape=a)})),
        "w: .*(shape|dimension)",
    ),
    "the dtype of a tensor": (
        lambda a: zipped(mapping({"w": tensor(storage("torch.storage.UntypedStorage"), version=3, more=a)})),
        "w: .*type .*not supported for weights",
    ),
    "a tensor's rebuilding function": (
        lambda a: zipped(mapping({"w": call(REBUILD_TYPE, a, NONE, many(), NONE)})),
        "w: a tensor subclass",
    ),
    "the persistent id of a zip": (lambda a: zipped(a + b"Q"), "persistent id .*storage"),
    "the persistent id of a legacy file": (lambda a: legacy(a + b"Q"), "persistent id .*storage"),
    "the persistent id of a pdparams": (lambda a: paddle(a + b"Q"), "external storages"),
    "the contents of an array": (
        lambda a: paddle(mapping({"w": array(a)})),
        "w: .*(plain contents|encoding|shape)",
    ),
    "the shape of an array": (
        lambda a: paddle(mapping({"w": array(shape=a)})),
        "w: .*(shape|dimension)",
    ),
    "the list of storages": (lambda a: legacy(keys=a), "the list of storages does not match"),
    "the system information": (lambda a: legacy(system=mapping({"little_endian": a})), "big-endian"),
}


@attacks
def test_the_attacks_are_real(attack, marker):
    """Python's own unpickler executes each attack."""
    make, effect = ATTACKS[attack]
    with contextlib.suppress(Exception):  # errors after the attack do not matter
        pickle.loads(pickled(make(marker)))
    assert marker.read_text().strip() == effect


@attacks
def test_no_attack_is_executed(attack, marker, tmp_path):
    """No attack is executed in place of the weights or of any part of a tensor."""
    make, _ = ATTACKS[attack]
    for position, (build, fault) in POSITIONS.items():
        message = reading_error(write(tmp_path, build(make(marker))))
        assert re.search(fault, message), (position, message)
    assert not marker.exists()
    assert "hostile_trap" not in sys.modules


@attacks
@pytest.mark.parametrize("around", ["zip", "older", "pdparams"])
@pytest.mark.slow
def test_attacks_next_to_the_weights_are_skipped(attack, around, marker, tmp_path):
    """Entries that are not needed are not evaluated, and the weights next to them are read."""
    payload = ATTACKS[attack][0](marker)
    entries = {"args": payload, "optimizer": mapping({"param_groups": listed(payload)})}
    if around == "pdparams":
        # Protocol 3 numbers its memo, and the inserted opcodes do not use the memo.
        state = pickle.dumps(in_paddle_form(), 3).removeprefix(b"\x80\x03").removesuffix(b".")
        content = b"\x80\x03" + mapping({"model": state, **entries}) + b"."
    else:
        wrap = {"zip": zip_around, "older": legacy_around}[around]
        content = wrap(mapping({"state_dict": state_pickle(), **entries}))
    weights = read_weights(write(tmp_path, content))
    assert same_numbers(weights.tensors)
    assert weights.skipped == ("args", "optimizer")
    assert not marker.exists()
    assert "hostile_trap" not in sys.modules


def test_extension_codes_are_rejected(marker, tmp_path):
    """EXT opcodes execute what was registered for a code without naming it."""
    copyreg.add_extension("hostile_trap", "called", 0x70000001)
    copyreg.add_extension("hostile_trap", "Made", 240)
    try:
        pickle.loads(pickled(b"\x84" + struct.pack("<l", 0x70000001) + b")R"))
        assert marker.read_text() == "called"
        marker.unlink()
        for opcodes, fault in (
            (b"\x84" + struct.pack("<l", 0x70000001), "EXT4"),
            (b"\x82\xf0", "EXT1"),
            (b"\x83\xf0\0", "EXT2"),
        ):
            for build in (zipped, legacy, paddle):
                message = reading_error(write(tmp_path, build(mapping({"w": opcodes + b")R"}))))
                assert f"opcode {fault}" in message
    finally:
        copyreg.remove_extension("hostile_trap", "called", 0x70000001)
        copyreg.remove_extension("hostile_trap", "Made", 240)
    assert not marker.exists()


def test_reading_imports_nothing(marker, tmp_path):
    """Reading imports no module, neither one that the file names nor any other."""
    for content in (good_zip(), good_paddle(), good_safetensors(), legacy_around(state_pickle())):
        read_weights(write(tmp_path, content))
    (tmp_path / "hostile_other").mkdir()
    (tmp_path / "hostile_other" / "__init__.py").write_text("")
    modules = set(sys.modules)
    payload = listed(name("hostile_trap.called"), name("hostile_other.x"), name("antigravity.x"), name("this.s"))
    for build in (zipped, legacy, paddle):
        reading_error(write(tmp_path, build(payload)))
    read_weights(write(tmp_path, zip_around(mapping({"state_dict": state_pickle(), "args": payload}))))
    assert set(sys.modules) == modules
    assert not marker.exists()


# --- Damaged and impossible files ------------------------------------------------------------------

TINY = zipped()


def in_directory(file: bytes, entry_name: str, offset: int, layout: str, *values: int) -> bytes:
    """Return the zip with changed numbers in one entry's record of the directory."""
    at = file.rindex(b"archive/" + entry_name.encode()) - 46
    assert file[at : at + 4] == b"PK\x01\x02"
    result = bytearray(file)
    struct.pack_into(layout, result, at + offset, *values)
    return bytes(result)


FLAGS, SIZES, STORED_SIZE, OFFSET = 8, 20, 24, 42  # positions in a directory record


def beyond_the_end() -> bytes:
    file = plain_zip({"archive/data.pkl": pickled(mapping({"w": tensor()})), "archive/data/0": SIXTEEN})
    size = len(file) - file.index(SIXTEEN) + 1
    return in_directory(file, "data/0", SIZES, "<LL", size, size)


def end_record(size: int, start: int) -> bytes:
    return b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 0, 0, size, start, 0)


def large_directory() -> bytes:
    """Build a zip with fifty thousand empty entries, each with 47 bytes in the directory."""
    records = (b"PK\x01\x02" + bytes(24) + struct.pack("<H", 1) + bytes(16) + b"x") * 50_000
    return TINY + records + end_record(len(records), len(TINY))


def large_directory_zip64() -> bytes:
    """Build `large_directory` with its size only in the 64-bit record."""
    file = large_directory()[:-22]
    sizes = (50_000, 50_000, len(file) - len(TINY), len(TINY))
    record = b"PK\x06\x06" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, *sizes)
    return file + record + b"PK\x06\x07" + struct.pack("<LQL", 0, len(file), 1) + end_record(0, 0)


DIRECTORY = TINY.index(b"PK\1\2")


def swapped_directory() -> bytes:
    """Build the zip with its directory records in reverse order."""
    records = TINY[DIRECTORY:-22].split(b"PK\1\2")[1:]
    return TINY[:DIRECTORY] + b"".join(b"PK\1\2" + record for record in reversed(records)) + TINY[-22:]


def bytes_between() -> bytes:
    """Build the zip with bytes between its last file and its directory, at the recorded position."""
    return TINY[:DIRECTORY] + b"more" + TINY[DIRECTORY:-6] + struct.pack("<LH", DIRECTORY + 4, 0)


def two_end_records() -> bytes:
    """Build a zip with two 64-bit end records. Some programs use the referenced record, others the nearest."""
    count, size = TINY.count(b"PK\1\2"), len(TINY) - 22 - DIRECTORY
    record = b"PK\6\6" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, count, count, size, DIRECTORY)
    file = TINY[:-22] + record * 2 + b"PK\6\7" + struct.pack("<LQL", 0, len(TINY) - 22, 1)
    return file + b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights"))
    return buffer.getvalue()


def numpy_file(save: Callable[..., None]) -> bytes:
    buffer = io.BytesIO()
    save(buffer, np.ones(3))
    return buffer.getvalue()


# Kind of file -> a function that builds it, and the fault in the error.
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    # Not checkpoints.
    "empty": (lambda: b"", "the file is empty"),
    "one byte": (lambda: b"\x80", "damaged pickle"),
    "one letter": (lambda: b"P", "not a checkpoint: expected"),
    "zeros": (lambda: bytes(4096), "not a checkpoint: zeros only"),
    "random bytes": (lambda: random.Random(5).randbytes(4096), "not a checkpoint: expected"),
    "text": (lambda: b"some notes on training\n" * 40, "not a checkpoint: expected"),
    "JSON": (lambda: b'{"epoch": 3}', "not a checkpoint: expected"),
    "web page": (lambda: b"\n<!DOCTYPE html><html><title>Google Drive - Virus scan warning", "a web page"),
    "Git LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "gzip": (lambda: gzip.compress(TINY), "gzip-compressed"),
    "bzip2": (lambda: bz2.compress(TINY), "bzip2-compressed"),
    "tar": (tar, "a tar archive"),
    "npy": (lambda: numpy_file(np.save), "a single NumPy array"),
    "npz": (lambda: numpy_file(np.savez), r"a NumPy archive without exactly one data\.pkl"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c" + bytes(100), "a 7z archive"),
    "RAR": (lambda: b"Rar!\x1a\x07\x01\x00" + bytes(100), "a RAR archive"),
    "pickle of protocol 0": (lambda: pickle.dumps({"w": 1.0}, 0), "not a checkpoint: expected"),
    # The zip around a PyTorch checkpoint.
    "zip of other things": (lambda: plain_zip({"readme.txt": b"x"}), r"a zip without exactly one data\.pkl"),
    "two data.pkl": (lambda: plain_zip({"a/data.pkl": b"N.", "b/data.pkl": b"N."}), r"without exactly one data\.pkl"),
    "TorchScript": (lambda: zipped(**{"constants.pkl": b"N.", "code/net.py": b""}), "a TorchScript archive"),
    "TorchScript, only code": (lambda: zipped(**{"code/net.py": b""}), "a TorchScript archive"),
    "big-endian": (lambda: zipped(byteorder=b"big"), "stored on a big-endian machine"),
    "compressed": (lambda: plain_zip({"data.pkl": bytes(99)}, zipfile.ZIP_DEFLATED), r"data\.pkl is compressed"),
    "sizes that differ": (lambda: in_directory(TINY, "data/0", STORED_SIZE, "<L", 99), "data/0 is compressed"),
    "encrypted": (lambda: in_directory(TINY, "data/0", FLAGS, "<H", 1), "archive/data/0 is encrypted"),
    "one entry twice": (
        lambda: zipped(**{"data/1": SIXTEEN}).replace(b"data/1", b"data/0"),
        "two entries with the same name",
    ),
    "flipped bit in a storage": (lambda: TINY.replace(SIXTEEN, b"\1" + SIXTEEN[1:]), "archive/data/0 .*checksum"),
    "flipped bit in the pickle": (lambda: TINY.replace(b"storage", b"storagd"), r"archive/data\.pkl .*checksum"),
    "entry of another name": (lambda: TINY.replace(b"data/0", b"data/1", 1), "archive/data/0 .*different name"),
    "entry far outside": (lambda: in_directory(TINY, "data/0", OFFSET, "<L", 1 << 30), "data/0 .*position"),
    "entry at another position": (lambda: in_directory(TINY, "data/0", OFFSET, "<L", 7), "data/0 .*position"),
    "entry beyond the end": (beyond_the_end, "archive/data/0 .*past the end of the file"),
    "entry too large": (
        lambda: in_directory(TINY, "data/0", SIZES, "<LL", 1 << 30, 1 << 30),
        "entries of the zip are together larger",
    ),
    "storage too short": (lambda: zipped(**{"data/0": SIXTEEN[:15]}), "data/0 is shorter than its 4 elements"),
    "no directory": (lambda: TINY[: TINY.index(b"PK\1\2")], "zip is truncated .*no directory"),
    "directory of noise": (lambda: TINY.replace(b"PK\1\2", b"PK\7\7"), "damaged zip"),
    "directory cut": (lambda: TINY[:-60] + TINY[-22:], "damaged zip"),
    "directory too large": (large_directory, "directory of the zip takes 2350000 bytes"),
    # Newer Python versions reject the two end records as inconsistent.
    "directory too large, zip64": (large_directory_zip64, "directory of the zip takes 2350000 bytes|damaged zip"),
    "zip64 without its sizes": (
        lambda: in_directory(TINY, "data/0", SIZES, "<LL", 0xFFFFFFFF, 0xFFFFFFFF),
        "entries of the zip are together larger",
    ),
    "zip64 directory outside the file": (
        lambda: TINY[:-22] + b"PK\6\7" + struct.pack("<LQL", 0, 1 << 60, 9) + TINY[-22:],
        "damaged zip",
    ),
    # Zips in which other programs could find different weights.
    "zip behind a zip": (lambda: TINY + zipped(**{"data/0": bytes(16)}), "directory is not at the recorded position"),
    "bytes in front": (lambda: TINY[:30] + TINY, "directory is not at the recorded position"),
    "bytes behind": (lambda: TINY + b"PK\5\6", "data after its directory"),
    "comment": (lambda: TINY[:-2] + b"\1\0x", "data after its directory"),
    "bytes between": (bytes_between, "the zip has gaps"),
    "name in another case": (lambda: zipped(**{"DATA/0": bytes(16)}), "two entries with the same name"),
    "byte order in another case": (
        lambda: plain_zip(
            {"a/data.pkl": pickled(mapping({"w": tensor()})), "a/data/0": SIXTEEN, "a/BYTEORDER": b"big"},
        ),
        "stored on a big-endian machine",
    ),
    "two folders": (
        lambda: plain_zip({"a/x": b"", "b/data.pkl": pickled(mapping({"w": tensor()})), "b/data/0": SIXTEEN}),
        "not in a single folder",
    ),
    "no folder": (
        lambda: plain_zip({"data.pkl": pickled(mapping({"w": tensor()})), "data/0": SIXTEEN}),
        "not in a single folder",
    ),
    "name that ends early": (
        lambda: zipped(**{"data/0_x": SIXTEEN}).replace(b"data/0_x", b"data/0\0x"),
        "not in a single folder",
    ),
    "entries in another order": (swapped_directory, "not at the expected position"),
    "two end records": (two_end_records, "end records"),
    # PyTorch's legacy format.
    "legacy: other version": (lambda: legacy(version=999), "not a PyTorch checkpoint of a known version"),
    "legacy: big-endian": (lambda: legacy(system=mapping({"little_endian": FALSE})), "big-endian"),
    "legacy: system is a list": (lambda: legacy(system=b"]"), "big-endian"),
    "legacy: storage not listed": (lambda: legacy(keys=b"]"), "list of storages does not match"),
    "legacy: unknown storage listed": (lambda: legacy(keys=listed(text("1"))), "list of storages does not match"),
    "legacy: storage listed twice": (lambda: legacy(keys=listed(text("0"), text("0"))), "list of storages does not"),
    "legacy: storages are numbers": (lambda: legacy(keys=listed(number(0))), "list of storages does not match"),
    "legacy: storages are a text": (lambda: legacy(keys=text("0")), "list of storages does not match"),
    "legacy: storages double": (lambda: legacy(keys=DOUBLING), "list of storages does not match"),
    "legacy: storage cut": (lambda: legacy()[:-1], "past the end of the file"),
    "legacy: storages missing": (lambda: legacy(storages=()), "past the end of the file"),
    "legacy: other length": (lambda: legacy(storages=(SIXTEEN + bytes(4),)), "length of storage '0'"),
    "legacy: negative length": (lambda: legacy(storages=()) + b"\xff" * 24, "length of storage '0'"),
    "legacy: large storage": (
        lambda: legacy(mapping({"w": tensor(storage(size=number(1 << 47)))})),
        "past the end of the file",
    ),
    # safetensors without our header.
    "header cut": (lambda: safetensors({"w": entry()})[:20], "damaged safetensors file"),
    "header of one byte": (lambda: safetensors(b"{" + b" " * 50, length=1), "damaged safetensors file"),
    "header beyond the end": (lambda: safetensors({"w": entry()}, length=1000), "damaged safetensors file"),
    "header large": (lambda: safetensors({"w": entry()}, length=1 << 22), "header has 4194304 bytes"),
    "header absurdly large": (lambda: safetensors({"w": entry()}, length=1 << 63), "not a checkpoint: expected"),
    "header is not JSON": (lambda: safetensors(b'{"w": }   '), "damaged safetensors file .*JSON"),
    "header is not UTF-8": (lambda: safetensors(b'{"\xff": 1}   '), "damaged safetensors file .*utf-8"),
    "header is deep": (
        lambda: safetensors(json.dumps({"w": entry() | {"x": 0}}).replace("0}", "[" * 9999).encode()),
        "damaged safetensors file .*recursion",
    ),
    "one tensor twice": (
        lambda: safetensors(b'{"w":%b,"w":%b}' % ((json.dumps(entry()).encode(),) * 2)),
        "two entries of one name in the header",
    ),
    "offsets overlap": (lambda: safetensors({"v": entry(), "w": entry()}), "damaged safetensors file"),
    "offsets leave a hole": (
        lambda: safetensors({"v": entry(shape=(1,), end=4), "w": entry(shape=(1,), start=12)}),
        "damaged safetensors file",
    ),
    "offsets leave a rest": (lambda: safetensors({"w": entry()}, bytes(20)), "damaged safetensors file"),
    "offsets beyond the end": (lambda: safetensors({"w": entry()}, bytes(15)), "damaged safetensors file"),
    "offsets backwards": (lambda: safetensors({"w": entry(start=16, end=0)}), "damaged safetensors file"),
    "offsets of another shape": (lambda: safetensors({"w": entry(shape=(5,))}), "damaged safetensors file"),
    "offsets that overflow": (lambda: safetensors({"w": entry(shape=(1 << 63, 2))}), "w: .*dimension"),
    "nine dimensions": (lambda: safetensors({"w": entry(shape=(4, *[1] * 8))}), "w: a tensor has 9 dimensions"),
    "seventy dimensions": (lambda: safetensors({"w": entry(shape=(4, *[1] * 69))}), "w: a tensor has 70 dimensions"),
    "none of many": (lambda: safetensors({"w": entry(shape=(0, 1 << 62), end=0)}, b""), "w: .*too large for a file"),
    "type float8": (lambda: safetensors({"w": entry("F8_E4M3", (16,))}), "w has type F8_E4M3"),
    "type unknown": (lambda: safetensors({"w": entry("F33")}), "w has type F33"),
    "name that clears the screen": (lambda: safetensors({"w\x1b[2J": entry()}), r"invalid tensor name: w\?\[2J"),
}

# Kind of tensor "w" in a zip -> its opcodes, and the fault in the error.
UNTYPED = storage("torch.storage.UntypedStorage")
BIG_TENSOR = tensor(storage(size=number(MIB)), shape=numbers(MIB))
TENSORS: dict[str, tuple[bytes, str]] = {
    "offset outside": (tensor(offset=number(1)), "reaches element 4 of a storage of 4"),
    "offset far outside": (tensor(offset=number(1 << 70)), "offset or stride that is .*too large"),
    "offset negative": (tensor(offset=number(-1)), "offset or stride that is negative"),
    "offset is no number": (tensor(offset=FALSE), "offset or stride that is negative"),
    "stride negative": (tensor(strides=numbers(-1)), "offset or stride that is negative"),
    "stride outside": (tensor(strides=numbers(2)), "reaches element 6 of a storage of 4"),
    "stride huge": (tensor(strides=numbers(1 << 47)), "reaches element 422212465065984 of a storage of 4"),
    "strides are a number": (tensor(strides=number(1)), r"shape \[4\] and the strides of a tensor differ in length"),
    "shape and strides differ": (
        tensor(strides=numbers(2, 1)),
        r"shape \[4\] and the strides of a tensor differ in length",
    ),
    "side negative": (tensor(shape=numbers(-4)), "dimension that is negative"),
    "side is text": (tensor(shape=many(text("4"))), "dimension that is .*not a whole number"),
    "side of many digits": (tensor(shape=many(HUGE_NUMBER)), "dimension that is .*too large"),
    "shape is a number": (tensor(shape=number(4)), "shape of a tensor is not a list"),
    "nine dimensions": (tensor(shape=numbers(*[1] * 9), strides=numbers(*[1] * 9)), "a tensor has 9 dimensions"),
    "too large for a file": (tensor(shape=numbers(1 << 40)), r"shape \[1099511627776\] .*too large for a file"),
    "absurd size of one number": (tensor(shape=numbers(1 << 40), strides=numbers(0)), "too large for a file"),
    "absurd size of no number": (tensor(shape=numbers(0, 1 << 60), strides=numbers(1, 1)), "too large for a file"),
    "storage missing": (tensor(storage(key="7")), "storage data/7 is missing"),
    "storage of many digits": (tensor(storage(size=HUGE_NUMBER)), "storage '0' has a size that is .*too large"),
    "storage of negative size": (tensor(storage(size=number(-1))), "storage '0' has a size that is negative"),
    "storage described twice": (
        listed(storage(), storage("torch.IntStorage")),
        "storage '0' is described twice",
    ),
    "storage of odd length": (
        tensor(storage("torch.storage.UntypedStorage", size=number(15)), version=3, more=name("torch.float32")),
        "reaches element 3 of a storage of 3",
    ),
    "storage view": (
        tensor(many(text("storage"), name("torch.FloatStorage"), text("0"), text("cpu"), number(4), many()) + b"Q"),
        "storage views of very old PyTorch files",
    ),
    "storage unknown": (tensor(storage("torch.OddStorage")), r"storages of type torch\.OddStorage are not supported"),
    "storage complex": (
        tensor(storage("torch.ComplexFloatStorage")),
        "type torch.ComplexFloatStorage are not supported",
    ),
    "storage quantized": (tensor(storage("torch.QInt8Storage")), "quantized tensors are not supported"),
    "persistent id is a text": (text("storage") + b"Q", "persistent id .*storage"),
    "persistent id of protocol 0": (b"Pstorage\n", "opcode PERSID"),
    "float8": (tensor(UNTYPED, version=3, more=name("torch.float8_e5m2")), "w: .*type float8_e5m2"),
    "type that doubles": (tensor(UNTYPED, version=3, more=DOUBLING), "w: .*type unknown"),
    "sparse": (call("torch._utils._rebuild_sparse_tensor", NONE), "w: a sparse tensor"),
    "sparse CSR": (call("torch._utils._rebuild_sparse_csr_tensor", NONE), "w: a sparse tensor"),
    "quantized": (call("torch._utils._rebuild_qtensor", NONE), "w: a quantized tensor"),
    "nested": (call("torch._utils._rebuild_nested_tensor", NONE), "w: a nested tensor"),
    "meta": (call("torch._utils._rebuild_meta_tensor_no_storage", NONE), "w: a meta tensor"),
    "subclass": (call("torch._utils._rebuild_wrapper_subclass", NONE), "w: a tensor subclass"),
    "subclass of a subclass": (
        call(REBUILD_TYPE, name(REBUILD_TYPE), NONE, many(name(REBUILD_TYPE), NONE, many(), NONE), NONE),
        "w: a tensor subclass",
    ),
    "too many arguments": (call("torch._utils._rebuild_qtensor", NONE * 17), "_rebuild_qtensor .*17 arguments"),
    "too few arguments": (call("torch._utils._rebuild_tensor_v2", NONE), "damaged pickle .TypeError"),
    "conjugated": (tensor(more=mapping({"conj": TRUE})), "changed after its construction"),
    "with notes of another kind": (tensor(more=many(text("neg"))), "changed after its construction"),
    "truth values negated": (
        tensor(storage("torch.BoolStorage", size=number(16)), more=mapping({"neg": TRUE})),
        "tensor of truth values is negated",
    ),
    "set to another storage": (
        tensor() + many(storage(key="1"), number(0), numbers(4), numbers(1)) + b"b",
        "storage data/1 is missing",
    ),
    "set to another part": (
        tensor() + many(storage(), number(1), numbers(2), numbers(1)) + b"b",
        "w: a tensor is changed after its construction",
    ),
    "storage set to another type": (
        tensor(storage() + mapping({"dtype": name("torch.int32")}) + b"b"),
        "a state is set",
    ),
    "number in it set": (tensor() + number(0) + number(7) + b"s", "items are added"),
    "appended to": (tensor() + number(7) + b"a", "items are added"),
    **{
        f"{kind} in its {where}": (call(*arguments), "attributes of a tensor replace its numbers")
        for kind, state in {
            "data": mapping({"data": tensor()}),
            "imaginary part": mapping({"imag": tensor()}),
            "data in slots": many(NONE, mapping({"data": tensor()})),
            "data in an ordered dictionary": call("collections.OrderedDict", listed(many(text("data"), tensor()))),
        }.items()
        for where, arguments in {
            "parameter": ("torch._utils._rebuild_parameter_with_state", tensor(), FALSE, NONE, state),
            "type": (REBUILD_TYPE, name("torch._utils._rebuild_parameter"), NONE, many(tensor(), FALSE), state),
        }.items()
    },
    "number": (number(3), "w: expected a tensor, found a int"),
    "dictionary": (b"}", "w: expected a tensor, found a dict"),
    "list of itself": (b"]q\x00h\x00a", "w: expected a tensor, found a list"),
    "unknown class": (name("models.Thing") + b")\x81", r"w: expected a tensor, found a models\.Thing"),
}

# Object instead of the state dict in a zip -> its opcodes, and the fault in the error.
MODEL = name("models.fcvit.FCViT") + b")\x81}b"
STATES: dict[str, tuple[bytes, str]] = {
    "pickled model": (MODEL, r"expected a dictionary of weights, found a models\.fcvit\.FCViT"),
    "pickled model under a key": (mapping({"model": MODEL}), "contains a pickled model"),
    "list of tensors": (listed(tensor()), "expected a dictionary of weights, found a list"),
    "dictionary of itself": (b"}q\x00" + text("w") + b"h\x00s", "w: expected a tensor, found a dict"),
    "state dict of itself": (b"}q\x00" + text("state_dict") + b"h\x00s", "state_dict: expected a tensor, found a dict"),
    "name is a number": (b"}" + number(3) + tensor() + b"s", "name of an entry is not text"),
    "name is a number of many digits": (b"}" + HUGE_NUMBER + tensor() + b"s", "name of an entry is not text"),
    "name is a list": (b"}]" + tensor() + b"s", "name of an entry is not text"),
    "name of two lines": (mapping({"w\n\x1b[31mx": tensor()}), r"invalid tensor name: w\?\?\[31mx"),
    "name with half a character": (mapping({"w\udc80": tensor()}), r"invalid tensor name: w\?"),
    "name without end": (mapping({"module." * 40_000 + "w": tensor()}), "invalid tensor name: module"),
    "class of two lines": (
        text("a\nb") + text("c\x1b") + b"\x93",
        r"expected a dictionary of weights, found a a\?b\.c\?",
    ),
    "one name twice": (b"}(" + (text("w") + tensor()) * 2 + b"u", "entry 'w' occurs twice in one dictionary"),
    "one name twice, apart": (b"}" + (text("w") + tensor() + b"s") * 2, "entry 'w' occurs twice in one dictionary"),
    "one name twice, in order": (
        call("collections.OrderedDict", listed(*[many(text("w"), tensor())] * 2)),
        r"expected a dictionary of weights, found a collections\.OrderedDict",
    ),
}

# Kind of fault in a pickle -> its opcodes, and the fault in the error.
PICKLES: dict[str, tuple[bytes, str]] = {
    "a number": (number(3), "not contain a dictionary"),
    "opcode unknown": (b"\xff", r"damaged pickle .*unknown opcode b'\\xff'"),
    "buffers outside": (b"\x97", "opcode NEXT_BUFFER"),
    "persistent ids": (text("0") + b"Q", "external storages"),
    "stack empty": (b"00", "damaged pickle .IndexError"),
    "mark missing": (b"t", "a mark is missing"),
    "memo missing": (b"h\x07", "damaged pickle .KeyError: 7"),
    "memo far away": (b"Nr\xff\xff\xff\x7f", "a memo index is negative or too large"),
    "memo negative": (b"Np-1\n", "a memo index is negative or too large"),
    "key without value": (b"}(Nu", "damaged pickle .ValueError"),
    "class is a number": (number(1) * 2 + b"\x93", "name of a global is not text"),
    "class of endless name": (text("a" * 99_999) + text("b") + b"\x93", r"name of a global has 99999 \+ 1 char"),
    "text beyond the end": (b"X\xff\xff\xff\xffabc", "damaged pickle .*expected 4294967295 bytes"),
    "line without end": (b"c" + b"a" * 300_000, "damaged pickle .a line has over 131072 bytes"),
    "line of an endless name": (b"c" + b"a" * 999 + b"\nb\n", r"name of a global has 999 \+ 1 char"),
    "item of a tuple": (b"(NtK\0Ns", "items are added"),
    "numbers in an array set": (array() + number(0) + number(7) + b"s", "items are added"),
    "state of a text": (text("a") + b"}b", "a state is set"),
    "text that is not UTF-8": (b"X\x01\0\0\0\xff", "damaged pickle .UnicodeDecodeError"),
    "text without quotes": (b"Sabc\n", "damaged pickle .*no string quotes"),
    "bytes beyond the end": (b"\x8e\0\0\0\0\0\0\1\0", "damaged pickle .*expected 281474976710656 bytes"),
    "bytes beyond any memory": (b"\x8e" + b"\xff" * 8, "damaged pickle .*expected 18446744073709551615 bytes"),
    "bytearray beyond the end": (b"\x96\0\0\0\0\0\0\1\0", "damaged pickle .*expected 281474976710656 bytes"),
    "number beyond the end": (b"\x8b\xff\xff\xff\x7f\x01", "damaged pickle .*not enough data"),
    "number of negative length": (b"\x8b\xff\xff\xff\xff", "damaged pickle .*byte count < 0"),
    "number of many digits": (b"I" + b"9" * 100_000 + b"\n", "damaged pickle .*Exceeds the limit"),
    "number of no digits": (b"Iabc\n", "damaged pickle .*invalid literal"),
    "parameters split": (mapping({"UnpackBigParamInfor@@": b"}"}), "parameters are split .*protocol=4"),
}

# Kind of array "w" in a .pdparams -> its opcodes, and the fault in the error.
ARRAYS: dict[str, tuple[bytes, str]] = {
    "objects": (array(listed(NONE), code="O8", order="|"), "no plain contents"),
    "objects from bytes": (array(code="O8", order="|"), "an array of type 'O8' does not contain numbers"),
    "texts": (array(code="U4"), "an array of type 'U4' does not contain numbers"),
    "type that doubles": (array(code=None), "an array of type 'unknown' does not contain numbers"),
    "type that is no copy": (
        array().replace(text("f4") + FALSE + TRUE, text("f4") + FALSE + FALSE),
        "an array of type 'unknown'",
    ),
    "type with a shape of its own": (
        array().replace(text("<") + NONE, text("<") + many(name("numpy.dtype"), numbers(2))),
        "an array of type 'unknown'",
    ),
    "in an unknown order": (
        call(
            "numpy.core.numeric._frombuffer",
            b"C\4abcd",
            call("numpy.dtype", text("f4"), FALSE, TRUE),
            numbers(1),
            text("f"),
        ),
        "no plain contents",
    ),
    "never filled": (call(RECONSTRUCT, name("numpy.ndarray"), numbers(0)), "no plain contents"),
    "of another class": (array(kind="subprocess.Popen"), r"class subprocess\.Popen"),
    "of a matrix": (array(kind="numpy.matrix"), r"class numpy\.matrix"),
    "of another shape": (array(shape=numbers(3)), r"an array of shape \[3\] .*16 bytes"),
    "negative side": (array(shape=numbers(-4)), "dimension that is negative"),
    "nine dimensions": (array(shape=numbers(4, *[1] * 8)), "a tensor has 9 dimensions; expected at most 8"),
    "absurd size of no number": (array(b"C\0", numbers(0, 1 << 60)), "too large for a file"),
    "another encoding": (array(call("_codecs.encode", text("x"), text("rot13"))), "unknown encoding"),
    "not Latin": (array(call("_codecs.encode", text("\u20ac"), text("latin1"))), "unknown encoding"),
    "encoded text": (call("_codecs.encode", text("x"), text("latin1")), r"expected a tensor, found a _codecs\.encode"),
}

# Kind of fault in our own header in a safetensors file -> changed values, and the fault in the error.
DIGITS = [[str(digit), str(digit)] for digit in range(10)]
PREPROCESSING = json.loads(Header(SPEC, "torch").to_json())["variant"]["preprocessing"]
HEADERS: dict[str, tuple[dict[str, object], str]] = {
    "too few kernels": (
        {"variant__kernel_sizes": [11]},
        "header is damaged .*kernel_sizes and channel_attention_kernels",
    ),
    "option of text": ({"variant__token_factor": "x"}, "header is damaged .*token_factor has type str"),
    "name of two lines": ({"variant__name": "a\nb"}, "header is damaged .*one printable line"),
    "newer": ({"format_version": 3}, "format version 3, .*2; update fcvit"),
    "of a doubtful version": ({"format_version": "1\n\x1b" * 9999}, "format version '1"),
    "absurd depth": ({"variant__depths": [1 << 40, 1, 1, 1]}, "header is damaged .UsageError.*too large"),
    "negative depth": ({"variant__depths": [-1, 1, 1, 1]}, "header is damaged .UsageError.*1 or more"),
    "absurd width": ({"variant__widths": [1 << 40] * 4}, "header is damaged .UsageError.*too large"),
    "unknown option": ({"variant__secret": 1}, "header is damaged .TypeError.*secret"),
    "unknown layout": ({"layout": "onnx"}, "unknown layout 'onnx'"),
    "negative class count": ({"num_classes": -1}, "header is damaged .*-1 is not an integer"),
    "too few classes": ({"classes": [["a", "a"]]}, "1 classes for 10 outputs"),
    "one class twice": ({"classes": [["a", "a"]] * 10}, "header is damaged .*class id 'a'"),
    "half a character in a name": (
        {"classes": [*DIGITS[:9], ["9", "\ud800"]]},
        "header is damaged .UnicodeEncodeError",
    ),
    "half a character in an id": ({"classes": [*DIGITS[:9], ["\udc80", "9"]]}, "header is damaged .UnicodeEncodeError"),
    "deviation near 0": ({"variant__preprocessing": {**PREPROCESSING, "std": [1e-300] * 3}}, "std is 1e-300"),
    "counter that is none": ({"counters": {"x": -3}}, "header is damaged .*-3 is not an integer"),
}
TEXT_HEADERS: dict[str, tuple[str, str]] = {
    "not JSON": ("{", "header is damaged .JSONDecodeError"),
    "a list": ("[1]", "header is damaged .TypeError"),
    "deep": ("[" * 99_999, "header is damaged .RecursionError"),
    "one field twice": (header_json()[:-1] + ', "classes": null}', "two entries of one name in the header"),
    "without fields": ('{"format_version": 1}', "header is damaged .KeyError"),
    "large number": ('{"format_version": 1%s}' % ("0" * 9999), "header is damaged .*Exceeds the limit"),
}

NAN, MEAN = np.array([np.nan, *[0] * 9], np.float32), "patch_embed.norm.running_mean"

# Files with readable tensors that are not the weights of one network -> the fault, and the kind of error.
MISFITS: dict[str, tuple[Callable[[], bytes], str, type[FcvitError]]] = {
    "NaN": (lambda: good_zip(changed("head.bias", NAN)), "head.bias: .* found 1 infinite or NaN", DoesNotFit),
    "NaN in a pdparams": (
        lambda: good_paddle({**in_paddle_form(), "head.bias": NAN}),
        "head.bias: expected finite numbers, found 1 infinite or NaN",
        DoesNotFit,
    ),
    "infinity": (lambda: good_zip(changed("head.bias", np.full(10, np.inf))), "infinite or NaN", DoesNotFit),
    "whole numbers": (
        lambda: good_zip(changed("head.bias", np.ones(10, np.int32))),
        "head.bias: expected floating-point numbers, found int32",
        DoesNotFit,
    ),
    "counter is a fraction": (
        lambda: good_zip(changed("patch_embed.norm.num_batches_tracked", np.array(1.5))),
        "num_batches_tracked: expected a whole number.*, found 1.5",
        DoesNotFit,
    ),
    "tensor missing": (
        lambda: good_zip(changed("head.bias", None)),
        r"head.bias: expected shape \[10\], found nothing",
        DoesNotFit,
    ),
    "tensor too many": (
        lambda: good_zip(changed("other", np.ones(3, np.float32))),
        r"other: expected no such tensor, found shape \[3\]",
        DoesNotFit,
    ),
    "tensor of another shape": (
        lambda: good_zip(changed("head.bias", np.ones((10, 1), np.float32))),
        r"head.bias: expected shape \[10\], found \[10, 1\]",
        DoesNotFit,
    ),
    "names of both frameworks": (
        lambda: good_zip(changed("patch_embed.norm._mean", good_tensors()[MEAN])),
        r"mixes Paddle names \(_mean\) with PyTorch names \(running_mean\)",
        DoesNotFit,
    ),
    "prefixes that collide": (
        lambda: good_zip(changed("module.head.weight", good_tensors()["head.weight"])),
        "'head.weight' and 'module.head.weight' are the same name",
        DoesNotFit,
    ),
    "raw and EMA weights": (
        lambda: zip_around(mapping({"state_dict": state_pickle(), "state_dict_ema": state_pickle()})),
        r"EMA weights \(state_dict_ema\) and raw weights; .*--ema or --no-ema",
        UsageError,
    ),
    "two sets of weights": (
        lambda: zip_around(mapping({"state_dict": state_pickle(), "model": state_pickle()})),
        r"several sets of weights \(state_dict, model\); .*--key",
        UsageError,
    ),
    "header of the other layout": (
        lambda: good_safetensors(header_json(layout="paddle")),
        "header specifies paddle layout, .*torch layout",
        DoesNotFit,
    ),
    "header of another network": (
        lambda: good_safetensors(header_json(variant__depths=[9, 1, 2, 1])),
        r"does not fit fcvit_digits .*: network\.0\.1\..* found nothing .*\(and \d+ more\)",
        DoesNotFit,
    ),
    "header of more classes": (
        lambda: good_safetensors(header_json(num_classes=11)),
        r"head\.weight: expected shape \[11, 48\], found \[10, 48\]",
        DoesNotFit,
    ),
    "many views of one storage": (
        lambda: zipped(mapping(dict.fromkeys("abcde", BIG_TENSOR)), **{"data/0": bytes(4 * MIB)}),
        "over four times",
        UnreadableFile,
    ),
}

KINDS: dict[str, tuple[Callable[[], bytes], str, type[FcvitError]]] = {
    **{f"file: {kind}": (make, fault, UnreadableFile) for kind, (make, fault) in FILES.items()},
    **{
        f"tensor: {kind}": (functools.partial(zipped, mapping({"w": opcodes})), fault, UnreadableFile)
        for kind, (opcodes, fault) in TENSORS.items()
    },
    **{
        f"state: {kind}": (functools.partial(zipped, opcodes), fault, UnreadableFile)
        for kind, (opcodes, fault) in STATES.items()
    },
    **{
        f"pickle: {kind}": (functools.partial(paddle, opcodes), fault, UnreadableFile)
        for kind, (opcodes, fault) in PICKLES.items()
    },
    **{
        f"array: {kind}": (functools.partial(paddle, mapping({"w": opcodes})), f"w: .*{fault}", UnreadableFile)
        for kind, (opcodes, fault) in ARRAYS.items()
    },
    **{
        f"header: {kind}": (lambda changes=changes: good_safetensors(header_json(**changes)), fault, UnreadableFile)
        for kind, (changes, fault) in HEADERS.items()
    },
    **{
        f"header: {kind}": (functools.partial(good_safetensors, content), fault, UnreadableFile)
        for kind, (content, fault) in TEXT_HEADERS.items()
    },
    **{f"misfit: {kind}": row for kind, row in MISFITS.items()},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_gives_one_clear_error(kind, tmp_path):
    make, fault, error = KINDS[kind]
    message = reading_error(write(tmp_path, make()), error)
    assert re.search(fault, message), message


def missing(path: Path) -> None:
    assert not path.exists()


def circle(path: Path) -> None:
    path.symlink_to(path)


def unreadable(path: Path) -> None:
    path.write_bytes(TINY)
    path.chmod(0)


not_as_root = pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (missing, "cannot be opened: No such file"),
        (Path.mkdir, "neither model.safetensors nor pytorch_model.bin"),
        (os.mkfifo, "found a directory or a device"),
        (circle, "cannot be opened: .*[Ss]ym"),
        pytest.param(unreadable, "cannot be opened: Permission denied", marks=not_as_root),
    ],
)
def test_a_path_that_is_not_a_readable_file_is_rejected(make, fault, tmp_path):
    make(tmp_path / "suspect.pth")
    message = reading_error(tmp_path / "suspect.pth")
    assert re.search(fault, message), message


def test_the_longest_file_name_is_read(tmp_path):
    """A file is read even if its name with `.json` added is too long for the file system."""
    path = tmp_path / ("w" * 251 + ".pth")
    path.write_bytes(good_zip())
    assert same_numbers(read_weights(path).tensors)


# Contents of the sidecar of `suspect.pdparams` -> the fault in the error.
OTHER_HASH = {"layout": "paddle", "weights_sha256": "0" * 64}
SIDECARS: dict[str, tuple[Callable[[], bytes], str]] = {
    "of other weights": (lambda: header_json(**OTHER_HASH).encode(), "describes other weights .*SHA-256"),
    "empty": (lambda: b"", "header is damaged .JSONDecodeError"),
    "cut": (lambda: header_json()[:-9].encode(), "header is damaged .JSONDecodeError"),
    "not UTF-8": (lambda: b'{"\xff": 1}', r"suspect\.pdparams\.json cannot be read"),
    "deep": (lambda: b"[" * 100_000, "header is damaged .RecursionError"),
    "one field twice": (lambda: header_json().encode()[:-1] + b', "layout": "torch"}', "two entries of one name"),
    "newer": (lambda: header_json(format_version=7).encode(), "format version 7"),
    "large": (lambda: b" " * (2 * MIB + 1), r"suspect\.pdparams\.json is over 2 MiB"),
}


@pytest.mark.parametrize("kind", SIDECARS)
def test_hostile_sidecars_are_rejected(kind, tmp_path):
    make, fault = SIDECARS[kind]
    path = write(tmp_path, good_paddle(), ".pdparams")
    assert same_numbers(read_weights(path).tensors)
    (tmp_path / "suspect.pdparams.json").write_bytes(make())
    message = reading_error(path)
    assert re.search(fault, message), message


def test_a_sidecar_that_is_a_pipe_is_ignored(tmp_path):
    path = write(tmp_path, good_paddle(), ".pdparams")
    os.mkfifo(tmp_path / "suspect.pdparams.json")
    assert same_numbers(read_weights(path).tensors)


def test_control_characters_in_class_names_are_read(tmp_path):
    """They are harmless in memory. Code that prints them must escape them."""
    classes = [["0", "\x1b[2Jzero\u202e"], *DIGITS[1:]]
    read = read_weights(write(tmp_path, good_safetensors(header_json(classes=classes)))).classes
    assert read is not None
    assert read[0].name == "\x1b[2Jzero\u202e"


# --- Changes of a tensor after its construction ----------------------------------------------------

NUMBERS = np.frombuffer(SIXTEEN, "<f4")


@pytest.mark.parametrize("build", [zipped, legacy])
@pytest.mark.parametrize("value", [TRUE, FALSE])
def test_negated_tensors_have_the_numbers_that_pytorch_gives_them(build, value, tmp_path):
    """The presence of the negative bit matters, not its value."""
    notes = mapping({"neg": value})
    untyped = storage("torch.storage.UntypedStorage", size=number(16))
    for content in (tensor(more=notes), tensor(untyped, version=3, more=name("torch.float32") + notes)):
        if build is legacy and untyped in content:
            continue
        tensors = read_checkpoint(write(tmp_path, build(mapping({"w": content})))).select()[0]
        assert np.array_equal(tensors["w"], -NUMBERS)
        assert np.signbit(tensors["w"]).all()


@pytest.mark.parametrize("state", [NONE, mapping({"tag": text("mine")}), many(mapping({"tag": NONE}), mapping({}))])
def test_other_attributes_of_a_tensor_are_ignored(state, tmp_path):
    parameter = call("torch._utils._rebuild_parameter_with_state", tensor(), FALSE, NONE, state)
    subclass = call(
        REBUILD_TYPE, name("torch._utils._rebuild_tensor_v2"), NONE, tensor()[len(name(REBUILD_V2)) : -1], state
    )
    path = write(tmp_path, zipped(mapping({"p": parameter, "s": subclass})))
    tensors = read_checkpoint(path).select()[0]
    assert np.array_equal(tensors["p"], NUMBERS)
    assert np.array_equal(tensors["s"], NUMBERS)


def test_lists_that_grow_later_do_not_change_a_tensor(tmp_path):
    """A tensor keeps the shape, strides and type of its construction."""
    grown = tensor(shape=b"]q\x05K\2a", strides=b"]q\x06K\1a") + b"h\5K\1a0h\6K\1a0"
    assert np.array_equal(read_checkpoint(write(tmp_path, zipped(mapping({"w": grown})))).select()[0]["w"], NUMBERS[:2])
    kind = call("numpy.dtype", text("f4"), FALSE, TRUE) + b"q\7"
    late = (
        array().replace(call("numpy.dtype", text("f4"), FALSE, TRUE), kind)
        + b"h\7"
        + many(number(3), text(">"))
        + b"b0"
    )
    assert np.array_equal(read_checkpoint(write(tmp_path, paddle(mapping({"w": late})))).select()[0]["w"], np.zeros(4))


# --- Files that change while they are read -----------------------------------------------------------


@pytest.mark.parametrize("content", [good_zip, good_paddle, good_safetensors, lambda: legacy_around(state_pickle())])
def test_later_changes_of_the_file_have_no_effect(content, tmp_path):
    """Neither the numbers nor the SHA-256 change, although the SHA-256 is computed last."""
    path = write(tmp_path, content())
    weights = read_weights(path)
    with path.open("r+b") as file:
        file.write(bytes(len(content())))
    assert same_numbers(weights.tensors)
    assert weights.source.sha256 == hashlib.sha256(content()).hexdigest()


@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 99), lambda path: path.write_bytes(good_zip() * 2)])
def test_a_file_that_changes_while_it_is_read_is_rejected(change, tmp_path, monkeypatch):
    path = write(tmp_path, good_zip())
    measure, times = os.fstat, []

    def changed_meanwhile(descriptor: int) -> os.stat_result:
        result = measure(descriptor)
        times.append(change(path) if stat.S_ISREG(result.st_mode) and result.st_size > 99 and not times else None)
        return result

    monkeypatch.setattr(checkpoint.os, "fstat", changed_meanwhile)
    assert "changed while it was read" in reading_error(path)


def test_the_state_of_a_training_is_read_at_once(tmp_path):
    numbers = {"w": np.arange(5, dtype=np.float32)}
    write_state(tmp_path, *encode_state(Progress(epoch=1), numbers))
    _, tensors = read_state(tmp_path)
    os.truncate(tmp_path / STATE, 8)
    assert np.array_equal(tensors["w"], numbers["w"])


# --- Truncation and random mutations ---------------------------------------------------------------

TINY_FILES: dict[str, Callable[[], bytes]] = {
    "zip": zipped,
    "older": legacy,
    "pdparams": paddle,
    "safetensors": lambda: safetensors({"w": entry()}),
}
GOOD_FILES: dict[str, Callable[[], bytes]] = {
    "zip": lambda: zip_around(state_pickle()),
    "older": lambda: legacy_around(state_pickle()),
    "pdparams": good_paddle,
    "safetensors": lambda: good_safetensors(),
}
formats = pytest.mark.parametrize("format", TINY_FILES)


@formats
@pytest.mark.slow
def test_truncated_files_are_rejected(format, tmp_path):
    """Tiny files are truncated at every byte, complete files at many positions."""
    for content, step in ((TINY_FILES[format](), 1), (GOOD_FILES[format](), 20_011)):
        for length in range(0, len(content), step):
            reading_error(write(tmp_path, content[:length]))


def mutated(rng: random.Random, content: bytes, others: list[bytes], end: int) -> bytes:
    """Make one to three changes before `end`: bytes changed, removed, added, repeated or copied from another file."""
    result = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(end, len(result)) or 1)
        length = min(rng.choice((1, 1, 2, 4, 8, 40)), len(result) - at)
        match rng.randrange(8):
            case 0:
                result[at : at + 1] = bytes([result[at] ^ 1 << rng.randrange(8)]) if result else b""
            case 1:
                result[at : at + length] = rng.randbytes(length)
            case 2:
                result[at : at + length] = rng.choice((b"\x00", b"\xff", b"\x7f")) * length
            case 3:
                del result[at : at + length]
            case 4:
                result[at:at] = rng.randbytes(length)
            case 5:
                source = rng.randrange(len(result) or 1)
                result[at:at] = result[source : source + length]
            case 6:
                del result[at:]
            case 7:
                other = rng.choice(others)
                result[at:] = other[rng.randrange(len(other)) :]
    return bytes(result)


def outcome(path: Path, spec: ModelSpec = SPEC) -> FcvitError | None:
    """Return the error from reading a file, or None if it was read. Other exceptions fail the test."""
    try:
        tensors = read_weights(path).tensors
    except FcvitError as error:
        assert str(error).isprintable()
        assert path.name in str(error)
        return error
    # An undetected change can only have changed numbers.
    assert {key: value.shape for key, value in tensors.items()} == {k: e.shape for k, e in tensor_specs(spec).items()}
    return None


@pytest.mark.slow
@formats
def test_mutated_tiny_files_are_rejected(format, tmp_path):
    """No mutated tiny file is read as the weights of a network."""
    rng = random.Random(f"tiny {format}")
    content, others = TINY_FILES[format](), [make() for make in TINY_FILES.values()]
    kinds = {type(outcome(write(tmp_path, mutated(rng, content, others, len(content))))) for _ in range(400)}
    assert kinds <= {UnreadableFile, UsageError, DoesNotFit}
    assert UnreadableFile in kinds


@formats
@pytest.mark.slow
def test_mutated_complete_files_are_rejected_or_read(format, tmp_path):
    """Only the names, shapes and positions are mutated, because changed numbers cannot be detected."""
    rng = random.Random(f"whole {format}")
    content, others = GOOD_FILES[format](), [make() for make in TINY_FILES.values()]
    if format == "zip":  # disable the pickle's checksum, which would detect every change
        content = content.replace(struct.pack("<L", zlib.crc32(pickled(state_pickle()))), bytes(4))
    end = 40_000
    results = [outcome(write(tmp_path, mutated(rng, content, others, end))) for _ in range(100)]
    assert any(results)


KNOWN = [*torch_file.CONSTRUCTORS, *pdparams.CONSTRUCTORS]
PARTS = [
    *(NONE, FALSE, number(3), number(-1), HUGE_NUMBER, numbers(4), numbers(1), text("w"), text("latin1"), b"C\x02ab"),
    *(b")", b"}", b"]", b"\x8f", b"h\x00", b"0", b"2", DOUBLING, tensor(), array(), storage(), name("a.b")),
]
INGREDIENTS = [*PARTS, *map(name, KNOWN), *(opcode.code.encode("latin-1") for opcode in pickletools.opcodes)]


def nested(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Combine smaller values into calls of known functions, containers, states and storages."""
    some = st.lists(inner, max_size=7)
    return st.one_of(
        st.builds(lambda function, items: call(function, *items), st.sampled_from(KNOWN), some),
        some.map(lambda items: many(*items)),
        some.map(lambda items: listed(*items)),
        some.map(lambda items: b"}(" + b"".join(items) + b"u"),
        some.map(lambda items: many(text("storage"), *items) + b"Q"),
        st.builds(lambda value, state: value + state + b"b", inner, inner),
        inner.map(lambda value: value + b"q\x00"),
    )


randomly = settings(derandomize=True, deadline=None, max_examples=300, database=None)
builders = st.sampled_from([zipped, legacy, paddle])


@pytest.mark.slow
@randomly
@given(st.lists(st.one_of(st.sampled_from(INGREDIENTS), st.binary(max_size=6)), max_size=40), builders)
def test_random_opcodes_are_rejected(tmp_path_factory, ingredients, build):
    """Programs for the pickle machine that no pickler writes are rejected."""
    path = write(tmp_path_factory.getbasetemp(), build(b"".join(ingredients)))
    assert isinstance(outcome(path), FcvitError)


@pytest.mark.slow
@randomly
@given(st.recursive(st.sampled_from(PARTS), nested, max_leaves=12), builders)
def test_well_formed_pickles_with_wrong_values_are_rejected(tmp_path_factory, value, build):
    """Any value can be in the position of any other value."""
    path = write(tmp_path_factory.getbasetemp(), build(mapping({"w": value})))
    assert isinstance(outcome(path), FcvitError)


# --- Checkpoints of mmsegmentation -----------------------------------------------------------------

SEGMENTER = ModelSpec(VARIANTS["fcvit_digits"], 3, "semantic_fpn", SemanticFPNOptions(4, 4))
CLASSES, COLORS = many(text("sky"), text("road"), text("car")), listed(*[listed(*map(number, (1, 2, 3)))] * 3)
LOGITS = "decode_head.conv_seg.weight"


@functools.cache
def segmenter_tensors() -> Mapping[str, np.ndarray]:
    return synthetic_tensors(SEGMENTER)


@functools.cache
def segmenter_files() -> tuple[bytes, Mapping[str, bytes]]:
    return files_of(segmenter_tensors())


def files_of(tensors: Mapping[str, np.ndarray]) -> tuple[bytes, Mapping[str, bytes]]:
    """Return the opcodes of the tensors, and the other files in a PyTorch file."""
    with zipfile.ZipFile(io.BytesIO(good_zip(tensors))) as archive:
        files = {key.removeprefix("archive/"): archive.read(key) for key in archive.namelist()}
    return files.pop("data.pkl").removeprefix(PROTOCOL_2).removesuffix(b"."), files


def of_mmseg(
    meta: bytes = mapping({"CLASSES": CLASSES, "PALETTE": COLORS}),
    changes: Mapping[str, np.ndarray | None] | None = None,
    **entries: bytes,
) -> bytes:
    """Build a file as mmsegmentation writes it: `meta`, `state_dict` with changed or removed tensors, and entries."""
    state, files = segmenter_files()
    if changes:
        tensors = {key: value for key, value in {**segmenter_tensors(), **changes}.items() if value is not None}
        state, files = files_of(tensors)
    return zipped(mapping({"meta": meta, "state_dict": state, **entries}), **{"data/x": SIXTEEN, **files})


def same_segmenter(tensors: Mapping[str, np.ndarray]) -> bool:
    return all(np.array_equal(tensors[key], value) for key, value in segmenter_tensors().items() if value.ndim)


def test_the_good_file_of_mmsegmentation_is_read(tmp_path):
    weights = read_weights(write(tmp_path, of_mmseg(optimizer=mapping({"state": b"}"}))))
    assert weights.spec == SEGMENTER and same_segmenter(weights.tensors) and not weights.notes
    assert [c.name for c in weights.classes] == ["sky", "road", "car"] and weights.palette == ((1, 2, 3),) * 3


@pytest.mark.slow
@attacks
def test_attacks_in_the_meta_of_a_segmenter_are_not_executed(attack, marker, tmp_path):
    payload = ATTACKS[attack][0](marker)
    for meta in (
        payload,
        mapping({"CLASSES": payload, "PALETTE": COLORS}),
        mapping({"CLASSES": many(text("sky"), payload, text("car")), "PALETTE": COLORS}),
        mapping({"CLASSES": CLASSES, "PALETTE": payload}),
        mapping({"CLASSES": CLASSES, "PALETTE": listed(payload, payload, payload)}),
        mapping({"config": payload, "hook_msgs": mapping({"last_ckpt": payload})}),
    ):
        weights = read_weights(write(tmp_path, of_mmseg(meta, optimizer=mapping({"state": payload}))))
        assert same_segmenter(weights.tensors) and weights.classes is None
        assert all(note.isprintable() and len(note) < 300 for note in weights.notes)
    assert not marker.exists()
    assert "hostile_trap" not in sys.modules


# Kind -> CLASSES and PALETTE of the meta, and the note.
WRONG_META: dict[str, tuple[bytes, bytes, str]] = {
    "a number": (number(3), COLORS, "not text"),
    "a text": (text("abc"), COLORS, "not text"),
    "a dictionary": (mapping({"a": NONE}), COLORS, "not text"),
    "numbers": (numbers(1, 2, 3), COLORS, "not text"),
    "bytes": (many(*[b"C\x01a"] * 3), COLORS, "not text"),
    "a tensor": (tensor(storage(key="x")), COLORS, "not text"),
    "nested lists": (DOUBLING, COLORS, "not text"),
    "a huge number": (HUGE_NUMBER, COLORS, "not text"),
    "no names": (many(), COLORS, "no class"),
    "an empty name": (many(text("a"), text(" "), text("c")), COLORS, "without an id"),
    "a repeated name": (many(*[text("a\x1b[2J\nb")] * 3), COLORS, "repeat|more than once"),
    "a surrogate": (many(text("a"), text("\ud800"), text("c")), COLORS, "surrogate"),
    "too few names": (many(text("a")), COLORS, "1 names for 3 outputs"),
    "many names": (many(*(text(str(i)) for i in range(100_000))), COLORS, "100000 names for 3 outputs"),
    "too few colors": (CLASSES, listed(listed(*[number(1)] * 3)), "for 3 outputs"),
    "a text as colors": (CLASSES, text("red"), "three integers"),
    "colors with four numbers": (CLASSES, listed(*[numbers(1, 2, 3, 4)] * 3), "three integers"),
    "fractions": (CLASSES, listed(*[many(*[b"G" + struct.pack(">d", 0.5)] * 3)] * 3), "three integers"),
    "truth values": (CLASSES, listed(*[many(TRUE, TRUE, TRUE)] * 3), "three integers"),
    "negative colors": (CLASSES, listed(*[numbers(-1, 2, 3)] * 3), "three integers"),
    "huge colors": (CLASSES, listed(*[many(HUGE_NUMBER, NONE, NONE)] * 3), "three integers"),
    "nested colors": (CLASSES, DOUBLING, "three integers"),
    "an array of colors": (CLASSES, array(), "three integers"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRONG_META)
def test_wrong_classes_in_a_meta_are_one_note_and_the_weights_are_read(kind, tmp_path):
    names, colors, fault = WRONG_META[kind]
    weights = read_weights(write(tmp_path, of_mmseg(mapping({"CLASSES": names, "PALETTE": colors}))))
    assert same_segmenter(weights.tensors) and weights.classes is None and weights.palette is None
    (note,) = weights.notes
    assert re.search(f"^ignoring the classes in meta: .*({fault})", note) and note.isprintable() and len(note) < 300


@pytest.mark.parametrize("meta", [NONE, number(3), text("x"), listed(NONE), DOUBLING, tensor(storage(key="x")), many()])
def test_a_meta_of_another_type_is_skipped(meta, tmp_path):
    weights = read_weights(write(tmp_path, of_mmseg(meta)))
    assert same_segmenter(weights.tensors) and weights.classes is None and not weights.notes


def wide(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.float32)


# Kind -> tensors that are changed or missing, and the fault.
WRONG_SEGMENTERS: dict[str, tuple[dict[str, np.ndarray | None], str]] = {
    "no classes": ({LOGITS: wide((0, 4, 1, 1))}, "conv_seg"),
    "logits without dimensions": ({LOGITS: wide(())}, "conv_seg"),
    "logits of another rank": ({LOGITS: wide((3, 4))}, "conv_seg"),
    "more classes than biases": ({LOGITS: wide((100_000, 4, 1, 1))}, "conv_seg"),
    "an empty neck": ({"neck.lateral_convs.0.conv.weight": wide((0, 16, 1, 1))}, "neck"),
    "a neck without dimensions": ({"neck.lateral_convs.0.conv.weight": wide(())}, "neck"),
    "a wide neck": ({"neck.lateral_convs.0.conv.weight": wide((1 << 20, 1, 1, 1))}, "neck"),
    "an empty head": ({"decode_head.scale_heads.0.0.conv.weight": wide((0, 4, 3, 3))}, "scale_heads|head"),
    "no logits": ({LOGITS: None}, "neck|decode_head|conv_seg"),
    "no backbone": ({"backbone.network.0.0.norm1.weight": None}, "norm1"),
    "no norm": ({"backbone.norm0.weight": None}, "norm0"),
    "an auxiliary head": ({"auxiliary_head.conv_seg.weight": wide((3, 4, 1, 1))}, "auxiliary_head"),
    "a negative variance": ({"decode_head.scale_heads.0.0.bn.running_var": np.full(4, -1, np.float32)}, "variances"),
    "NaN": ({LOGITS: np.full((3, 4, 1, 1), np.nan, np.float32)}, "NaN"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRONG_SEGMENTERS)
def test_wrong_tensors_of_a_segmenter_give_one_clear_error(kind, tmp_path):
    changes, fault = WRONG_SEGMENTERS[kind]
    message = reading_error(write(tmp_path, of_mmseg(changes=changes)), DoesNotFit)
    assert re.search(fault, message), message


@pytest.mark.slow
def test_truncated_segmenters_are_rejected(tmp_path):
    content = of_mmseg()
    for length in range(0, len(content), 10_007):
        reading_error(write(tmp_path, content[:length]))


@pytest.mark.slow
def test_segmenters_with_mutated_pickles_are_rejected_or_read(tmp_path):
    rng = random.Random("segmenter")
    state, files = segmenter_files()
    meta = mapping({"CLASSES": CLASSES, "PALETTE": COLORS})
    content = pickled(mapping({"meta": meta, "state_dict": state}))
    results = []
    for _ in range(100):
        changed_pickle = mutated(rng, content, [content], len(content))
        results.append(outcome(write(tmp_path, zipped(**{**files, "data.pkl": changed_pickle})), SEGMENTER))
    assert {UnreadableFile, DoesNotFit} <= {type(result) for result in results}


values = st.recursive(st.sampled_from(PARTS), nested, max_leaves=8)


@pytest.mark.slow
@settings(randomly, max_examples=100)
@given(values, values)
def test_any_values_can_be_the_classes_and_colors_of_a_meta(tmp_path_factory, names, colors):
    """A file whose pickle is valid is read, with a short note about the classes."""
    path = write(tmp_path_factory.getbasetemp(), of_mmseg(mapping({"CLASSES": names, "PALETTE": colors})))
    if outcome(path, SEGMENTER) is None:
        weights = read_weights(path)
        assert same_segmenter(weights.tensors) and weights.classes is None
        assert all(note.isprintable() and len(note) < 300 for note in weights.notes)


# --- Memory and time -------------------------------------------------------------------------------

# Each file is read in its own process, so that its memory can be measured and a crash is detected.
MEASURE = """
import json, os, resource, signal, sys, time
from fcvit.errors import FcvitError
from fcvit.weights.reading import read_weights

if sys.platform == "linux":  # limits that are reached before those of the machine
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def measure(path):
    before, start = peak(), time.perf_counter()
    try:
        read_weights(path)
        message = "it was read"
    except FcvitError as error:
        message = str(error)
    except BaseException as error:
        message = f"not one of our errors: {error!r}"
    return {"message": message, "seconds": time.perf_counter() - start, "memory": peak() - before}

for path in sys.argv[2:]:
    child = os.fork()
    if not child:
        signal.setitimer(signal.ITIMER_PROF, int(sys.argv[1]))
        print(json.dumps(measure(path)), flush=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        print(json.dumps({"message": f"killed by signal {status}", "seconds": 0, "memory": 0}), flush=True)
"""


def entries_that_share_bytes() -> bytes:
    """Build a zip with thousands of names for the same eight megabytes."""
    names = [f"data/{index}" for index in range(3000)]
    content = pickled(mapping({key: tensor(storage(key=key.removeprefix("data/"))) for key in names}))
    file = plain_zip({"data.pkl": content, "data/0": bytes(8 * MIB)})
    start, last = file.index(b"PK\1\2"), file.rindex(b"PK\1\2")
    more = b"".join(
        file[last : last + 28] + struct.pack("<H", len(key)) + file[last + 30 : last + 46] + key.encode()
        for key in names[1:]
    )
    return file[:-22] + more + end_record(len(file) - 22 - start + len(more), start)


def numbered(value: bytes, index: int) -> bytes:
    """Store a value in the memo, without leaving it on the stack."""
    return value + b"q" + bytes([index]) + b"0"


def used_in_many_entries(value: bytes) -> bytes:
    """Build a .pdparams with one array under twenty thousand names."""
    return paddle(numbered(value, 0) + b"}(" + b"".join(text(str(i)) + b"h\x00" for i in range(20_000)) + b"u")


DEPTH = 40_000  # twice as deep as the C stack of the process allows
LARGE_TEXT = numbered(text("a" * MIB), 0)
LARGE_TUPLE = b"(" + NONE * 90_000 + b"t"
DEEP = b")" + b"\x85" * DEPTH  # a tuple in a tuple in a tuple ...
COLLIDING = [index * sys.hash_info.modulus for index in range(1, 40_000)]  # numbers that all have the hash 0
HUGE_BYTES = b"\x8b" + struct.pack("<l", 32 * MIB) + b"\x7f" * (32 * MIB)
WIDE = "\U0001f600" + "a" * (32 * MIB)  # one character makes Python use four bytes for every character
HOLE = 4 * MIB  # bytes added to a file, which take no disk space but allow more opcodes

# Kind of file -> a function that builds it, its extended size in bytes (0: unchanged), the fault in the error.
NASTY: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "opcodes": (lambda: paddle(NONE * 3 * MIB), 0, "pickle has over 198304 opcodes in a file of 3145731 bytes"),
    "opcodes, large file": (lambda: paddle(NONE * MIB), 100 * MIB, "pickle has over 1000000 opcodes"),
    "dictionaries": (lambda: paddle(b"}NNs" * MIB), HOLE, "pickle has over 231072 opcodes"),
    "sets": (lambda: paddle(b"\x8f" * MIB), 0, "pickle has over 132768 opcodes"),
    "memo": (lambda: paddle(NONE + b"\x94" * MIB), 0, "pickle has over 132768 opcodes"),
    "memo, one far number": (lambda: paddle(b"Nr\xff\xff\xff\x7f"), 0, "memo index .*too large"),
    "memo, numbers that collide": (
        lambda: paddle(NONE + b"".join(b"p%d\n" % index for index in COLLIDING)),
        0,
        "memo index .*too large",
    ),
    "keys that collide": (
        lambda: paddle(b"}(" + b"".join(number(index) + NONE for index in COLLIDING) + b"u"),
        0,
        "is not text",
    ),
    "deep tuple as a tensor": (lambda: paddle(mapping({"w": DEEP})), HOLE, "w: .*found a tuple"),
    "deep tuple as a name": (lambda: paddle(b"}" + DEEP + b"Ns"), HOLE, "is not text"),
    "deep tuple as a name, ordered": (
        lambda: paddle(call("collections.OrderedDict", listed(DEEP + NONE + b"\x86"))),
        HOLE,
        "not contain a dictionary",
    ),
    "deep tuple as a storage": (lambda: legacy(DEEP + b"Q"), HOLE, "persistent id .*storage"),
    "deep list": (lambda: paddle(b"]" * DEPTH + b"a" * (DEPTH - 1)), HOLE, "not contain a dictionary"),
    "deep dictionary": (lambda: paddle((b"}" + text("w")) * DEPTH + NONE + b"s" * DEPTH), HOLE, "w: .*found a dict"),
    "deep calls": (
        lambda: paddle(mapping({"w": name("a.b") + NONE + (b"\x85RN" * DEPTH) + b"0"})),
        HOLE,
        r"w: .*found a call",
    ),
    "deep states": (
        lambda: paddle(mapping({"w": name("a.b") * DEPTH + b"b" * (DEPTH - 1)})),
        HOLE,
        r"w: .*found a a\.b",
    ),
    "doubling lists as a type": (
        lambda: paddle(mapping({"w": array(code=None)})),
        0,
        "type 'unknown' does not contain numbers",
    ),
    "doubling lists as a name": (lambda: paddle(b"}" + DOUBLING + b"Ns"), 0, "is not text"),
    "doubling lists as storages": (lambda: legacy(keys=DOUBLING), 0, "list of storages does not match"),
    "large name, used often": (
        lambda: paddle(LARGE_TEXT + b"h\x00h\x00\x93" * 5000),
        0,
        "name of a global has 1048576",
    ),
    "large text, encoded often": (
        lambda: paddle(LARGE_TEXT + numbered(name("_codecs.encode"), 1) + b"h\1h\0\x85R" * 20_000),
        0,
        "not contain a dictionary",
    ),
    "large text, in many arrays": (
        lambda: used_in_many_entries(
            array(call("_codecs.encode", text("a" * 400_000), text("latin1")), numbers(100_000))
        ),
        0,
        "over four times",
    ),
    "large array of another byte order, in many entries": (
        lambda: used_in_many_entries(array(text("a" * MIB).replace(b"X", b"B", 1), numbers(MIB // 4), order=">")),
        0,
        "over four times",
    ),
    "large tuple, copied often": (
        lambda: paddle(numbered(LARGE_TUPLE, 0) + numbered(name("builtins.tuple"), 1) + b"h\1h\0\x85R" * 2000),
        0,
        "not contain a dictionary",
    ),
    "large tuple, often a shape": (
        lambda: zipped(numbered(LARGE_TUPLE, 0) + listed(*[tensor(shape=b"h\0", strides=b"h\0")] * 300)),
        0,
        "expected a dictionary of weights, found a list",
    ),
    "large tuple, once a shape": (
        lambda: zipped(numbered(LARGE_TUPLE, 0) + mapping({"w": tensor(shape=b"h\0")})),
        0,
        "w: a tensor has 90000 dimensions",
    ),
    "large tuple as arguments": (
        lambda: zipped(name("torch._utils._rebuild_qtensor") + LARGE_TUPLE + b"R"),
        0,
        "with 90000 arguments",
    ),
    "wide text": (lambda: paddle(mapping({"w": text(WIDE)})), 0, "over 4 MiB of text beyond Latin-1"),
    "wide name": (lambda: paddle(b"}" + text(WIDE) + NONE + b"s"), 0, "over 4 MiB of text beyond Latin-1"),
    "wide texts, many": (
        lambda: paddle(listed(*[text(WIDE[: 64 << 10])] * 512)),
        0,
        "over 4 MiB of text beyond Latin-1",
    ),
    "wide text, encoded": (
        lambda: paddle(mapping({"w": array(call("_codecs.encode", text(WIDE), text("latin1")))})),
        0,
        "over 4 MiB of text beyond Latin-1",
    ),
    "wide text with escapes": (
        lambda: paddle(b"V\\U0001f600" + b"a" * (32 * MIB) + b"\n"),
        0,
        "a line has over 131072",
    ),
    "wide texts with escapes": (
        lambda: paddle(listed(*[b"V\\U0001f600" + b"a" * (120 << 10) + b"\n"] * 256)),
        0,
        "over 4 MiB of text beyond Latin-1",
    ),
    "narrow text": (lambda: paddle(mapping({"w": text("\xe9" * (16 * MIB))})), 0, "w: .*found a str"),
    "number of many bytes": (lambda: paddle(b"}" + text("w") + HUGE_BYTES + b"s"), 0, "w: .*found a int"),
    "bytes beyond the end": (lambda: paddle(b"\x8e\0\0\0\0\0\0\1\0"), 0, "expected 281474976710656 bytes"),
    "number beyond the end": (lambda: paddle(b"\x8b\xff\xff\xff\x7f"), 0, "not enough data"),
    "absurd tensor": (
        lambda: zipped(mapping({"w": tensor(shape=numbers(1 << 40), strides=numbers(0))})),
        0,
        "too large",
    ),
    "absurd storage": (lambda: zipped(storage(size=number(1 << 40))), 0, "shorter than its 1099511627776 elements"),
    "absurd header": (lambda: safetensors(b"{" + b" " * 99, length=90 * MIB), 91 * MIB, "header has 94371840 bytes"),
    "header of lists": (lambda: safetensors(b'{"w":[' + b"[]," * 690_000 + b"[]]}"), 0, "damaged safetensors file"),
    "header of tensors": (
        lambda: safetensors({f"{index:x}": entry(shape=(0,), end=0) for index in range(32_000)}, b""),
        0,
        "not an FCViT",
    ),
    "directory too large": (large_directory, 0, "directory of the zip takes 2350000 bytes"),
    "directory": (lambda: plain_zip(dict.fromkeys(map(str, range(20_000)), b"")), 0, r"without exactly one data\.pkl"),
    "entries that share bytes": (entries_that_share_bytes, 0, "entries of the zip are together larger"),
}
MODEL_SIZE = 512 << 10  # bytes of the package's smallest variant
INTERPRETER = 48 * MIB  # maximum bytes for the longest headers and the opcodes that files of any size may have


@pytest.mark.slow
def test_nasty_files_take_little_memory_and_time(tmp_path):
    """At most four times the larger of file and model, and `PATIENCE` seconds of processor time."""
    paths = [tmp_path / f"{index}.pth" for index in range(len(NASTY))]
    for path, (make, size, _) in zip(paths, NASTY.values(), strict=True):
        path.write_bytes(make())
        if size:
            os.truncate(path, size)
    signal.setitimer(signal.ITIMER_REAL, 0)  # each file has its own limit
    command = [sys.executable, "-c", MEASURE, str(PATIENCE), *map(str, paths)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for kind, path, line in zip(NASTY, paths, output.splitlines(), strict=True):
        result = json.loads(line)
        assert re.search(NASTY[kind][2], result["message"]), (kind, result)
        assert result["memory"] < 4 * max(path.stat().st_size, MODEL_SIZE) + INTERPRETER, (kind, result)
