"""Hostile and damaged checkpoints: nothing is executed, nothing crashes or hangs, memory stays
bounded, and each gives one clear error that names the file and the fault.

All files are built by hand, opcode by opcode and byte by byte, so that PyTorch is not needed.
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
from fcvit.models.spec import ModelSpec, paddle_name, tensor_specs
from fcvit.models.variants import VARIANTS
from fcvit.training.state import STATE, Progress, read_state, write_state
from fcvit.weights import checkpoint, pdparams, safetensors_file, torch_file
from fcvit.weights.checkpoint import read_checkpoint
from fcvit.weights.header import Header
from fcvit.weights.reading import read_weights
from fcvit.weights.synthetic import synthetic_tensors

FORM = ModelSpec(VARIANTS["fcvit_digits"], 10)
PATIENCE = 40  # seconds of the processor, whatever else the machine does; the slowest file takes 3
MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_hang():
    """Whatever takes longer than `PATIENCE` fails, instead of stopping everything behind it."""

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
    """GLOBAL, the older way to name a class or function."""
    module, _, last = dotted.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def many(*items: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(items) + b"t"


def listed(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def call(function: str, *arguments: bytes) -> bytes:
    return name(function) + many(*arguments) + b"R"


def mapping(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def whole(content: bytes) -> bytes:
    return PROTOCOL_2 + content + b"."


def numbers(*values: int) -> bytes:
    return many(*map(number, values))


NONE, FALSE, TRUE = b"N", b"\x89", b"\x88"
RECONSTRUCT = "numpy.core.multiarray._reconstruct"
REBUILD_V2 = "torch._utils._rebuild_tensor_v2"
REBUILD_TYPE = "torch._tensor._rebuild_from_type_v2"
HUGE_NUMBER = number(1 << 20000)  # has more digits than Python is willing to print
# Sixty lists, each holding the one before twice: as text it would have 2^60 parts.
DOUBLING = b"]q\x000" + b"".join(b"]q%c(h%ch%ce0" % (i, i - 1, i - 1) for i in range(1, 60)) + b"h\x3b"


def storage(kind: str = "torch.FloatStorage", key: str = "0", size: bytes = number(4)) -> bytes:
    return many(text("storage"), name(kind), text(key), text("cpu"), size) + b"Q"


def tensor(
    place: bytes = storage(),
    offset: bytes = number(0),
    shape: bytes = numbers(4),
    strides: bytes = numbers(1),
    version: int = 2,
    more: bytes = b"",
) -> bytes:
    hooks = call("collections.OrderedDict")
    return call(f"torch._utils._rebuild_tensor_v{version}", place, offset, shape, strides, FALSE, hooks, more)


def array(
    content: bytes = b"C\x10" + bytes(16),
    shape: bytes = numbers(4),
    code: str | None = "f4",
    order: str = "<",
    kind: str = "numpy.ndarray",
) -> bytes:
    """As NumPy pickles it; a code of None stands for something that is none."""
    dtype = call("numpy.dtype", DOUBLING if code is None else text(code), FALSE, TRUE)
    dtype += many(number(3), text(order), NONE) + b"b"
    empty = call(RECONSTRUCT, name(kind), numbers(0), b"C\x01b")
    return empty + many(number(1), shape, dtype, FALSE, content) + b"b"


# --- Files -----------------------------------------------------------------------------------------

SIXTEEN = bytes(range(16))


def zipped(content: bytes = mapping({"w": tensor()}), **more: bytes) -> bytes:
    """A PyTorch file around the pickle; `more` replaces or adds entries, by the last part of their names."""
    files = {"data.pkl": whole(content), "byteorder": b"little", "data/0": SIXTEEN, **more}
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
    """A file of PyTorch's older format around the pickle; four numbers of four bytes in a storage."""
    head = pickle.dumps(torch_file.LEGACY_MAGIC, 2) + pickle.dumps(version, 2) + whole(system)
    raw = b"".join(struct.pack("<q", len(data) // 4) + data for data in storages)
    return head + whole(content) + whole(keys) + raw


def paddle(content: bytes = mapping({"w": array()})) -> bytes:
    return whole(content)


def safetensors(header: Mapping[str, object] | bytes, data: bytes = SIXTEEN, length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def entry(dtype: str = "F32", shape: tuple[int, ...] = (4,), start: int = 0, end: int = 16) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@functools.cache
def good_tensors() -> Mapping[str, np.ndarray]:
    return synthetic_tensors(FORM)


def changed(key: str, value: np.ndarray | None) -> dict[str, np.ndarray]:
    """The good tensors but for one, which is replaced, added or (None) left out."""
    tensors = {**good_tensors(), key: value}
    return {key: value for key, value in tensors.items() if value is not None}


def in_paddle_form() -> dict[str, np.ndarray]:
    table = tensor_specs(FORM)
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
    """As the package would write it, without going through a file."""
    fields: dict[str, object] = {} if header is None else {"__metadata__": {"fcvit": header}}
    data = b""
    spelled = {dtype: spelling for spelling, dtype in safetensors_file.SAFETENSORS.items()}
    for key, value in good_tensors().items():
        fields[key] = entry(spelled[value.dtype], value.shape, len(data), len(data) + value.nbytes)
        data += np.ascontiguousarray(value).tobytes()
    return safetensors(fields, data)


@functools.cache
def state_pickle() -> bytes:
    """The opcodes of the good weights in a PyTorch file, to be put into other pickles."""
    with zipfile.ZipFile(io.BytesIO(good_zip())) as archive:
        return archive.read("archive/data.pkl").removeprefix(PROTOCOL_2).removesuffix(b".")


def zip_around(content: bytes) -> bytes:
    """A PyTorch file with this pickle and the storages of the good weights."""
    storages = {f"data/{index}": value.tobytes() for index, value in enumerate(good_tensors().values())}
    return zipped(content, **storages)


def legacy_around(content: bytes) -> bytes:
    keys = listed(*(text(str(index)) for index in range(len(good_tensors()))))
    file = legacy(content, keys, ())
    return file + b"".join(struct.pack("<q", value.size) + value.tobytes() for value in good_tensors().values())


def header_json(**changes: object) -> str:
    """The header of the good weights, with other values in it; `variant__depths` is a field of the variant."""
    fields = json.loads(Header(FORM, "torch").to_json())
    for key, value in changes.items():
        outer, _, inner = key.partition("__")
        (fields[outer] if inner else fields)[inner or outer] = value
    return json.dumps(fields)


def write(folder: Path, content: bytes, ending: str = ".pth") -> Path:
    path = folder / f"suspect{ending}"
    path.write_bytes(content)
    return path


def the_error(path: Path, kind: type[FcvitError] = UnreadableFile) -> str:
    """The message of the one error that reading gives, of the right kind and form."""
    with pytest.raises(kind) as caught:
        read_weights(path)
    message = str(caught.value)
    assert message.isprintable(), message  # one line, and nothing that a terminal would obey
    assert len(message) < 700
    assert path.name in message
    return message


def same_numbers(found: Mapping[str, np.ndarray]) -> bool:
    return all(np.array_equal(found[key], value) for key, value in good_tensors().items() if value.ndim)


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
    """What the hostile files are made from has no fault of its own."""
    assert same_numbers(read_weights(write(tmp_path, content())).tensors)


@pytest.mark.parametrize("content", [zipped, legacy, paddle, lambda: safetensors({"w": entry()})])
def test_the_tiny_files_are_read(content, tmp_path):
    tensors = read_checkpoint(write(tmp_path, content())).select().tensors
    assert tensors["w"].shape == (4,)


# --- Attempts to execute code ----------------------------------------------------------------------

# Whatever a pickle can make Python do with it leaves a marker: importing, calling, filling, hashing.
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
    """The file that any execution creates; the module `hostile_trap` can be imported."""
    tmp_path.joinpath("hostile_trap.py").write_text(TRAP)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hostile_trap", raising=False)
    yield tmp_path / "marker"
    sys.modules.pop("hostile_trap", None)


def shell(marker: Path) -> bytes:
    return text(f"echo called> '{marker}'")


def python(marker: Path) -> bytes:
    return text(f"__import__('pathlib').Path({str(marker)!r}).write_text('called')")


# How each makes Python's own unpickler act -> opcodes, and what it then leaves behind.
ATTACKS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "os.system": (lambda m: call("os.system", shell(m)), "called"),
    "posix.system": (lambda m: call("posix.system", shell(m)), "called"),
    "builtins.eval": (lambda m: call("builtins.eval", python(m)), "called"),
    "builtins.exec": (lambda m: call("builtins.exec", python(m)), "called"),
    "__builtin__.eval, of Python 2": (lambda m: call("__builtin__.eval", python(m)), "called"),
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
    "deep inside of plain data": (lambda _: listed(mapping({"a": many(call("hostile_trap.called"))})), "called"),
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

# Where it stands in a file -> the file, and the fault that is named.
PLACES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a zip instead of weights": (zipped, "not a dictionary of weights|not a state dict|name is not"),
    "an older file instead of weights": (legacy, "not a dictionary of weights|not match|not a state dict|name is not"),
    "a pdparams instead of weights": (paddle, "not of a dictionary|not a state dict|name is not"),
    "a tensor of a zip": (
        lambda a: zipped(mapping({"w": a, "x": tensor()})),
        "w: (is a .*expected a tensor|an array)",
    ),
    "a tensor of an older file": (
        lambda a: legacy(mapping({"w": a, "x": tensor()})),
        "w: (is a .*expected a tensor|an array)",
    ),
    "a tensor of a pdparams": (lambda a: paddle(mapping({"w": a})), "w: (is a .*expected a tensor|an array)"),
    "a name in a zip": (lambda a: zipped(b"}" + a + tensor() + b"s"), "name is not text"),
    "a name in a pdparams": (lambda a: paddle(b"}" + a + array() + b"s"), "name is not text"),
    "the storage of a tensor": (lambda a: zipped(mapping({"w": tensor(a)})), "w: a tensor without a storage"),
    "the shape of a tensor": (
        lambda a: zipped(mapping({"w": tensor(shape=a)})),
        "w: a tensor (whose shape|with a side)",
    ),
    "the dtype of a tensor": (
        lambda a: zipped(mapping({"w": tensor(storage("torch.storage.UntypedStorage"), version=3, more=a)})),
        "w: a tensor of type .*not a type of weights",
    ),
    "a tensor's rebuilding function": (
        lambda a: zipped(mapping({"w": call(REBUILD_TYPE, a, NONE, many(), NONE)})),
        "w: a tensor subclass is not read",
    ),
    "the persistent id of a zip": (lambda a: zipped(a + b"Q"), "a persistent id that is not a storage"),
    "the persistent id of an older file": (lambda a: legacy(a + b"Q"), "a persistent id that is not a storage"),
    "the persistent id of a pdparams": (lambda a: paddle(a + b"Q"), "refers to storages outside"),
    "the contents of an array": (
        lambda a: paddle(mapping({"w": array(a)})),
        "w: an array (without plain|with contents in|of shape)",
    ),
    "the shape of an array": (
        lambda a: paddle(mapping({"w": array(shape=a)})),
        "w: a tensor (whose shape|with a side)",
    ),
    "the list of storages": (lambda a: legacy(keys=a), "the list of storages does not match"),
    "the system information": (lambda a: legacy(system=mapping({"little_endian": a})), "big-endian"),
}


@attacks
def test_the_attacks_are_real(attack, marker):
    """Python's own unpickler does execute each of them."""
    make, effect = ATTACKS[attack]
    with contextlib.suppress(Exception):  # what follows the damage does not matter
        pickle.loads(whole(make(marker)))
    assert marker.read_text().strip() == effect


@attacks
def test_no_attack_is_executed(attack, marker, tmp_path):
    """Wherever it stands: not in place of the weights, nor of any part of a tensor."""
    make, _ = ATTACKS[attack]
    for place, (build, fault) in PLACES.items():
        message = the_error(write(tmp_path, build(make(marker))))
        assert re.search(fault, message), (place, message)
    assert not marker.exists()
    assert "hostile_trap" not in sys.modules


@attacks
@pytest.mark.parametrize("around", ["zip", "older", "pdparams"])
@pytest.mark.slow
def test_attacks_beside_the_weights_are_skipped(attack, around, marker, tmp_path):
    """An item that nobody needs is not looked at: the weights beside it are read."""
    payload = ATTACKS[attack][0](marker)
    beside = {"args": payload, "optimizer": mapping({"param_groups": listed(payload)})}
    if around == "pdparams":
        # Protocol 3 numbers its memo, and what we put in does not use it.
        state = pickle.dumps(in_paddle_form(), 3).removeprefix(b"\x80\x03").removesuffix(b".")
        content = b"\x80\x03" + mapping({"model": state, **beside}) + b"."
    else:
        wrap = {"zip": zip_around, "older": legacy_around}[around]
        content = wrap(mapping({"state_dict": state_pickle(), **beside}))
    weights = read_weights(write(tmp_path, content))
    assert same_numbers(weights.tensors)
    assert weights.skipped == ("args", "optimizer")
    assert not marker.exists()
    assert "hostile_trap" not in sys.modules


def test_extension_codes_are_refused(marker, tmp_path):
    """EXT opcodes execute what a code was registered for, also without naming it."""
    copyreg.add_extension("hostile_trap", "called", 0x70000001)
    copyreg.add_extension("hostile_trap", "Made", 240)
    try:
        pickle.loads(whole(b"\x84" + struct.pack("<l", 0x70000001) + b")R"))
        assert marker.read_text() == "called"
        marker.unlink()
        for opcodes, fault in (
            (b"\x84" + struct.pack("<l", 0x70000001), "EXT4"),
            (b"\x82\xf0", "EXT1"),
            (b"\x83\xf0\0", "EXT2"),
        ):
            for build in (zipped, legacy, paddle):
                message = the_error(write(tmp_path, build(mapping({"w": opcodes + b")R"}))))
                assert f"opcode {fault}: not used by any checkpoint" in message
    finally:
        copyreg.remove_extension("hostile_trap", "called", 0x70000001)
        copyreg.remove_extension("hostile_trap", "Made", 240)
    assert not marker.exists()


def test_reading_imports_nothing(marker, tmp_path):
    """Neither what a file names nor anything else: what reading needs is there beforehand."""
    for content in (good_zip(), good_paddle(), good_safetensors(), legacy_around(state_pickle())):
        read_weights(write(tmp_path, content))
    (tmp_path / "hostile_other").mkdir()
    (tmp_path / "hostile_other" / "__init__.py").write_text("")
    modules = set(sys.modules)
    payload = listed(name("hostile_trap.called"), name("hostile_other.x"), name("antigravity.x"), name("this.s"))
    for build in (zipped, legacy, paddle):
        the_error(write(tmp_path, build(payload)))
    read_weights(write(tmp_path, zip_around(mapping({"state_dict": state_pickle(), "args": payload}))))
    assert set(sys.modules) == modules
    assert not marker.exists()


# --- Damaged and impossible files ------------------------------------------------------------------

TINY = zipped()


def in_directory(file: bytes, entry_name: str, offset: int, layout: str, *values: int) -> bytes:
    """The zip with other numbers in the directory's record of one entry."""
    at = file.rindex(b"archive/" + entry_name.encode()) - 46
    assert file[at : at + 4] == b"PK\x01\x02"
    result = bytearray(file)
    struct.pack_into(layout, result, at + offset, *values)
    return bytes(result)


FLAGS, SIZES, STORED_SIZE, PLACE = 8, 20, 24, 42  # where they stand in such a record


def beyond_the_end() -> bytes:
    file = plain_zip({"archive/data.pkl": whole(mapping({"w": tensor()})), "archive/data/0": SIXTEEN})
    size = len(file) - file.index(SIXTEEN) + 1
    return in_directory(file, "data/0", SIZES, "<LL", size, size)


def end_record(size: int, start: int) -> bytes:
    return b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 0, 0, size, start, 0)


def large_directory() -> bytes:
    """Fifty thousand empty entries, each 47 bytes of the directory."""
    records = (b"PK\x01\x02" + bytes(24) + struct.pack("<H", 1) + bytes(16) + b"x") * 50_000
    return TINY + records + end_record(len(records), len(TINY))


def large_directory_zip64() -> bytes:
    """The same, but only the 64-bit record says how large it is."""
    file = large_directory()[:-22]
    sizes = (50_000, 50_000, len(file) - len(TINY), len(TINY))
    record = b"PK\x06\x06" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, *sizes)
    return file + record + b"PK\x06\x07" + struct.pack("<LQL", 0, len(file), 1) + end_record(0, 0)


DIRECTORY = TINY.index(b"PK\1\2")


def swapped_directory() -> bytes:
    """The zip with its directory's records in the opposite order."""
    records = TINY[DIRECTORY:-22].split(b"PK\1\2")[1:]
    return TINY[:DIRECTORY] + b"".join(b"PK\1\2" + record for record in reversed(records)) + TINY[-22:]


def bytes_between() -> bytes:
    """The zip with bytes between its last file and its directory, which knows where it is."""
    return TINY[:DIRECTORY] + b"more" + TINY[DIRECTORY:-6] + struct.pack("<LH", DIRECTORY + 4, 0)


def two_end_records() -> bytes:
    """A zip with two 64-bit end records; some programs take the one that is pointed at, others the nearest."""
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


# Each kind of file -> how to make it, and the fault that the message names.
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    # Not a checkpoint at all.
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
        "a zip with two entries of one name",
    ),
    "flipped bit in a storage": (lambda: TINY.replace(SIXTEEN, b"\1" + SIXTEEN[1:]), "archive/data/0 .*checksum"),
    "flipped bit in the pickle": (lambda: TINY.replace(b"storage", b"storagd"), r"archive/data\.pkl .*checksum"),
    "entry of another name": (lambda: TINY.replace(b"data/0", b"data/1", 1), "archive/data/0 carries another name"),
    "entry far outside": (lambda: in_directory(TINY, "data/0", PLACE, "<L", 1 << 30), "data/0: its place .* is wrong"),
    "entry elsewhere": (lambda: in_directory(TINY, "data/0", PLACE, "<L", 7), "data/0: its place .* is wrong"),
    "entry beyond the end": (beyond_the_end, "archive/data/0 reaches behind the end of the file"),
    "entry too large": (
        lambda: in_directory(TINY, "data/0", SIZES, "<LL", 1 << 30, 1 << 30),
        "entries are together larger than the file",
    ),
    "storage too short": (lambda: zipped(**{"data/0": SIXTEEN[:15]}), "data/0 is shorter than the 4 elements"),
    "no directory": (lambda: TINY[: TINY.index(b"PK\1\2")], "a zip without its directory: truncated"),
    "directory of noise": (lambda: TINY.replace(b"PK\1\2", b"PK\7\7"), "a damaged zip"),
    "directory cut": (lambda: TINY[:-60] + TINY[-22:], "a damaged zip"),
    "directory too large": (large_directory, r"directory alone takes 2350000 bytes"),
    # Newer Pythons find the two end records inconsistent by themselves.
    "directory too large, zip64": (large_directory_zip64, "directory alone takes 2350000 bytes|a damaged zip"),
    "zip64 without its sizes": (
        lambda: in_directory(TINY, "data/0", SIZES, "<LL", 0xFFFFFFFF, 0xFFFFFFFF),
        "entries are together larger than the file",
    ),
    "zip64 directory nowhere": (
        lambda: TINY[:-22] + b"PK\6\7" + struct.pack("<LQL", 0, 1 << 60, 9) + TINY[-22:],
        "a damaged zip",
    ),
    # Zips in which other programs could find other weights.
    "zip behind a zip": (lambda: TINY + zipped(**{"data/0": bytes(16)}), "directory is in another place"),
    "bytes in front": (lambda: TINY[:30] + TINY, "directory is in another place"),
    "bytes behind": (lambda: TINY + b"PK\5\6", "a zip with something behind its directory"),
    "comment": (lambda: TINY[:-2] + b"\1\0x", "a zip with something behind its directory"),
    "bytes between": (bytes_between, "a zip with gaps"),
    "name in other letters": (lambda: zipped(**{"DATA/0": bytes(16)}), "a zip with two entries of one name"),
    "byte order in other letters": (
        lambda: plain_zip(
            {"a/data.pkl": whole(mapping({"w": tensor()})), "a/data/0": SIXTEEN, "a/BYTEORDER": b"big"},
        ),
        "stored on a big-endian machine",
    ),
    "two folders": (
        lambda: plain_zip({"a/x": b"", "b/data.pkl": whole(mapping({"w": tensor()})), "b/data/0": SIXTEEN}),
        "files outside of one folder",
    ),
    "no folder": (
        lambda: plain_zip({"data.pkl": whole(mapping({"w": tensor()})), "data/0": SIXTEEN}),
        "files outside of one folder",
    ),
    "name that ends early": (
        lambda: zipped(**{"data/0_x": SIXTEEN}).replace(b"data/0_x", b"data/0\0x"),
        "files outside of one folder",
    ),
    "entries in another order": (swapped_directory, "its place in the file is wrong"),
    "two end records": (two_end_records, "its end records disagree"),
    # PyTorch's older format.
    "older: other version": (lambda: legacy(version=999), "not a PyTorch checkpoint of a known version"),
    "older: big-endian": (lambda: legacy(system=mapping({"little_endian": FALSE})), "big-endian"),
    "older: system is a list": (lambda: legacy(system=b"]"), "big-endian"),
    "older: storage not listed": (lambda: legacy(keys=b"]"), "list of storages does not match"),
    "older: unknown storage listed": (lambda: legacy(keys=listed(text("1"))), "list of storages does not match"),
    "older: storage listed twice": (lambda: legacy(keys=listed(text("0"), text("0"))), "list of storages does not"),
    "older: storages are numbers": (lambda: legacy(keys=listed(number(0))), "list of storages does not match"),
    "older: storages are a text": (lambda: legacy(keys=text("0")), "list of storages does not match"),
    "older: storages double": (lambda: legacy(keys=DOUBLING), "list of storages does not match"),
    "older: storage cut": (lambda: legacy()[:-1], "storages reach behind the end of the file"),
    "older: storages missing": (lambda: legacy(storages=()), "storages reach behind the end of the file"),
    "older: other length": (lambda: legacy(storages=(SIXTEEN + bytes(4),)), "storage '0' has another length"),
    "older: negative length": (lambda: legacy(storages=()) + b"\xff" * 24, "storage '0' has another length"),
    "older: large storage": (
        lambda: legacy(mapping({"w": tensor(storage(size=number(1 << 47)))})),
        "storages reach behind the end of the file",
    ),
    # safetensors, without our header.
    "header cut": (lambda: safetensors({"w": entry()})[:20], "a damaged safetensors file"),
    "header of one byte": (lambda: safetensors(b"{" + b" " * 50, length=1), "a damaged safetensors file"),
    "header beyond the end": (lambda: safetensors({"w": entry()}, length=1000), "a damaged safetensors file"),
    "header large": (lambda: safetensors({"w": entry()}, length=1 << 22), "a safetensors header of 4194304 bytes"),
    "header absurdly large": (lambda: safetensors({"w": entry()}, length=1 << 63), "not a checkpoint: expected"),
    "header is not JSON": (lambda: safetensors(b'{"w": }   '), "a damaged safetensors file .*JSON"),
    "header is not UTF-8": (lambda: safetensors(b'{"\xff": 1}   '), "a damaged safetensors file .*utf-8"),
    "header is deep": (
        lambda: safetensors(json.dumps({"w": entry() | {"x": 0}}).replace("0}", "[" * 9999).encode()),
        "a damaged safetensors file .*recursion",
    ),
    "one tensor twice": (
        lambda: safetensors(b'{"w":%b,"w":%b}' % ((json.dumps(entry()).encode(),) * 2)),
        "two entries of one name in the header",
    ),
    "offsets overlap": (lambda: safetensors({"v": entry(), "w": entry()}), "a damaged safetensors file"),
    "offsets leave a hole": (
        lambda: safetensors({"v": entry(shape=(1,), end=4), "w": entry(shape=(1,), start=12)}),
        "a damaged safetensors file",
    ),
    "offsets leave a rest": (lambda: safetensors({"w": entry()}, bytes(20)), "a damaged safetensors file"),
    "offsets beyond the end": (lambda: safetensors({"w": entry()}, bytes(15)), "a damaged safetensors file"),
    "offsets backwards": (lambda: safetensors({"w": entry(start=16, end=0)}), "a damaged safetensors file"),
    "offsets of another shape": (lambda: safetensors({"w": entry(shape=(5,))}), "a damaged safetensors file"),
    "offsets that overflow": (lambda: safetensors({"w": entry(shape=(1 << 63, 2))}), "w: a tensor with a side"),
    "nine dimensions": (lambda: safetensors({"w": entry(shape=(4, *[1] * 8))}), "w: a tensor with 9 dimensions"),
    "seventy dimensions": (lambda: safetensors({"w": entry(shape=(4, *[1] * 69))}), "w: a tensor with 70 dimensions"),
    "none of many": (lambda: safetensors({"w": entry(shape=(0, 1 << 62), end=0)}, b""), "w: .*absurd size"),
    "type float8": (lambda: safetensors({"w": entry("F8_E4M3", (16,))}), "w is of type F8_E4M3, which is not one"),
    "type unknown": (lambda: safetensors({"w": entry("F33")}), "w is of type F33, which is not one"),
    "name that clears the screen": (lambda: safetensors({"w\x1b[2J": entry()}), r"not one of a tensor: w\?\[2J"),
}

# What stands as the tensor "w" in a zip -> its opcodes, and the fault.
UNTYPED = storage("torch.storage.UntypedStorage")
BIG_TENSOR = tensor(storage(size=number(MIB)), shape=numbers(MIB))
TENSORS: dict[str, tuple[bytes, str]] = {
    "offset outside": (tensor(offset=number(1)), "reaches element 4 of a storage of 4"),
    "offset far outside": (tensor(offset=number(1 << 70)), "offset or stride that is .*absurdly large"),
    "offset negative": (tensor(offset=number(-1)), "offset or stride that is negative"),
    "offset is no number": (tensor(offset=FALSE), "offset or stride that is negative"),
    "stride negative": (tensor(strides=numbers(-1)), "offset or stride that is negative"),
    "stride outside": (tensor(strides=numbers(2)), "reaches element 6 of a storage of 4"),
    "stride huge": (tensor(strides=numbers(1 << 47)), "reaches element 422212465065984 of a storage of 4"),
    "strides are a number": (tensor(strides=number(1)), r"shape \[4\] and strides differ in length"),
    "shape and strides differ": (tensor(strides=numbers(2, 1)), r"shape \[4\] and strides differ in length"),
    "side negative": (tensor(shape=numbers(-4)), "a side that is negative"),
    "side is text": (tensor(shape=many(text("4"))), "a side that is .*not a whole number"),
    "side of many digits": (tensor(shape=many(HUGE_NUMBER)), "a side that is .*absurdly large"),
    "shape is a number": (tensor(shape=number(4)), "shape is not a list"),
    "nine dimensions": (tensor(shape=numbers(*[1] * 9), strides=numbers(*[1] * 9)), "a tensor with 9 dimensions"),
    "absurd size": (tensor(shape=numbers(1 << 40)), r"shape \[1099511627776\] .*absurd size"),
    "absurd size of one number": (tensor(shape=numbers(1 << 40), strides=numbers(0)), "absurd size"),
    "absurd size of no number": (tensor(shape=numbers(0, 1 << 60), strides=numbers(1, 1)), "absurd size"),
    "storage missing": (tensor(storage(key="7")), "storage data/7 is missing"),
    "storage of many digits": (tensor(storage(size=HUGE_NUMBER)), "storage '0' has a size that is .*absurdly large"),
    "storage of negative size": (tensor(storage(size=number(-1))), "storage '0' has a size that is negative"),
    "storage described twice": (
        listed(storage(), storage("torch.IntStorage")),
        "storage '0' is described twice, differently",
    ),
    "storage of odd length": (
        tensor(storage("torch.storage.UntypedStorage", size=number(15)), version=3, more=name("torch.float32")),
        "reaches element 3 of a storage of 3",
    ),
    "storage view": (
        tensor(many(text("storage"), name("torch.FloatStorage"), text("0"), text("cpu"), number(4), many()) + b"Q"),
        "storage views of very old PyTorch files",
    ),
    "storage unknown": (tensor(storage("torch.OddStorage")), r"storages of type torch\.OddStorage are not read"),
    "storage complex": (tensor(storage("torch.ComplexFloatStorage")), "type torch.ComplexFloatStorage are not read"),
    "storage quantized": (tensor(storage("torch.QInt8Storage")), "quantized tensors are not read"),
    "persistent id is a text": (text("storage") + b"Q", "a persistent id that is not a storage"),
    "persistent id of protocol 0": (b"Pstorage\n", "opcode PERSID: not used by any checkpoint"),
    "float8": (tensor(UNTYPED, version=3, more=name("torch.float8_e5m2")), "w: a tensor of type float8_e5m2"),
    "type that doubles": (tensor(UNTYPED, version=3, more=DOUBLING), "w: a tensor of type unknown"),
    "sparse": (call("torch._utils._rebuild_sparse_tensor", NONE), "w: a sparse tensor is not read"),
    "sparse CSR": (call("torch._utils._rebuild_sparse_csr_tensor", NONE), "w: a sparse tensor is not read"),
    "quantized": (call("torch._utils._rebuild_qtensor", NONE), "w: a quantized tensor is not read"),
    "nested": (call("torch._utils._rebuild_nested_tensor", NONE), "w: a nested tensor is not read"),
    "meta": (call("torch._utils._rebuild_meta_tensor_no_storage", NONE), "w: a meta tensor, which has no numbers"),
    "subclass": (call("torch._utils._rebuild_wrapper_subclass", NONE), "w: a tensor subclass is not read"),
    "subclass of a subclass": (
        call(REBUILD_TYPE, name(REBUILD_TYPE), NONE, many(name(REBUILD_TYPE), NONE, many(), NONE), NONE),
        "w: a tensor subclass is not read",
    ),
    "too many arguments": (call("torch._utils._rebuild_qtensor", NONE * 17), "_rebuild_qtensor with 17 arguments"),
    "too few arguments": (call("torch._utils._rebuild_tensor_v2", NONE), "damaged pickle .TypeError"),
    "conjugated": (tensor(more=mapping({"conj": TRUE})), "changed after it was made"),
    "with notes of another kind": (tensor(more=many(text("neg"))), "changed after it was made"),
    "truth values negated": (
        tensor(storage("torch.BoolStorage", size=number(16)), more=mapping({"neg": TRUE})),
        "a negated tensor of truth values",
    ),
    "set to another storage": (
        tensor() + many(storage(key="1"), number(0), numbers(4), numbers(1)) + b"b",
        "storage data/1 is missing",
    ),
    "set to another part": (
        tensor() + many(storage(), number(1), numbers(2), numbers(1)) + b"b",
        "w: a tensor that is changed after it was made",
    ),
    "storage set to another type": (
        tensor(storage() + mapping({"dtype": name("torch.int32")}) + b"b"),
        "a state for something that has none",
    ),
    "number in it set": (tensor() + number(0) + number(7) + b"s", "items for something that has none"),
    "appended to": (tensor() + number(7) + b"a", "items for something that has none"),
    **{
        f"{kind} in its {where}": (call(*arguments), "attributes replace its numbers")
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
    "number": (number(3), "w: is a int, expected a tensor"),
    "dictionary": (b"}", "w: is a dict, expected a tensor"),
    "list of itself": (b"]q\x00h\x00a", "w: is a list, expected a tensor"),
    "unknown class": (name("models.Thing") + b")\x81", r"w: is a models\.Thing, expected a tensor"),
}

# What stands instead of the state dict, in a zip -> its opcodes, and the fault.
MODEL = name("models.fcvit.FCViT") + b")\x81}b"
STATES: dict[str, tuple[bytes, str]] = {
    "whole pickled model": (MODEL, r"holds a models\.fcvit\.FCViT, not a dictionary of weights"),
    "whole pickled model under a key": (mapping({"model": MODEL}), "holds a whole pickled model"),
    "list of tensors": (listed(tensor()), "holds a list, not a dictionary of weights"),
    "dictionary of itself": (b"}q\x00" + text("w") + b"h\x00s", "w: is a dict, expected a tensor"),
    "state dict of itself": (b"}q\x00" + text("state_dict") + b"h\x00s", "state_dict: is a dict, expected a tensor"),
    "name is a number": (b"}" + number(3) + tensor() + b"s", "an entry whose name is not text"),
    "name is a number of many digits": (b"}" + HUGE_NUMBER + tensor() + b"s", "an entry whose name is not text"),
    "name is a list": (b"}]" + tensor() + b"s", "an entry whose name is not text"),
    "name of two lines": (mapping({"w\n\x1b[31mx": tensor()}), r"name is not one of a tensor: w\?\?\[31mx"),
    "name with half a character": (mapping({"w\udc80": tensor()}), r"name is not one of a tensor: w\?"),
    "name without end": (mapping({"module." * 40_000 + "w": tensor()}), "name is not one of a tensor: module"),
    "class of two lines": (text("a\nb") + text("c\x1b") + b"\x93", r"holds a a\?b\.c\?, not a dictionary"),
    "one name twice": (b"}(" + (text("w") + tensor()) * 2 + b"u", "entry 'w' stands twice in one dictionary"),
    "one name twice, apart": (b"}" + (text("w") + tensor() + b"s") * 2, "entry 'w' stands twice in one dictionary"),
    "one name twice, in order": (
        call("collections.OrderedDict", listed(*[many(text("w"), tensor())] * 2)),
        r"holds a collections\.OrderedDict, not a dictionary of weights",
    ),
}

# A pickle with this in it -> the fault.
PICKLES: dict[str, tuple[bytes, str]] = {
    "a number": (number(3), "a pickle, but not of a dictionary"),
    "opcode unknown": (b"\xff", r"damaged pickle .*opcode b'\\xff' unknown"),
    "buffers outside": (b"\x97", "opcode NEXT_BUFFER: not used by any checkpoint"),
    "persistent ids": (text("0") + b"Q", "refers to storages outside of it"),
    "stack empty": (b"00", "damaged pickle .IndexError"),
    "mark missing": (b"t", "a mark is missing"),
    "memo missing": (b"h\x07", "damaged pickle .KeyError: 7"),
    "memo far away": (b"Nr\xff\xff\xff\x7f", "a memo index that is negative or absurdly large"),
    "memo negative": (b"Np-1\n", "a memo index that is negative or absurdly large"),
    "key without value": (b"}(Nu", "damaged pickle .ValueError"),
    "class is a number": (number(1) * 2 + b"\x93", "a global whose name is no text"),
    "class of endless name": (text("a" * 99_999) + text("b") + b"\x93", r"a global whose name has 99999 \+ 1 char"),
    "text beyond the end": (b"X\xff\xff\xff\xffabc", "damaged pickle .*expected 4294967295 bytes"),
    "line without end": (b"c" + b"a" * 300_000, "damaged pickle .a line of over 131072 bytes"),
    "line of an endless name": (b"c" + b"a" * 999 + b"\nb\n", r"a global whose name has 999 \+ 1 char"),
    "item of a tuple": (b"(NtK\0Ns", "items for something that has none"),
    "numbers in an array set": (array() + number(0) + number(7) + b"s", "items for something that has none"),
    "state of a text": (text("a") + b"}b", "a state for something that has none"),
    "text that is not UTF-8": (b"X\x01\0\0\0\xff", "damaged pickle .UnicodeDecodeError"),
    "text without quotes": (b"Sabc\n", "damaged pickle .*no string quotes"),
    "bytes beyond the end": (b"\x8e\0\0\0\0\0\0\1\0", "damaged pickle .*expected 281474976710656 bytes"),
    "bytes beyond any memory": (b"\x8e" + b"\xff" * 8, "damaged pickle .*expected 18446744073709551615 bytes"),
    "bytearray beyond the end": (b"\x96\0\0\0\0\0\0\1\0", "damaged pickle .*expected 281474976710656 bytes"),
    "number beyond the end": (b"\x8b\xff\xff\xff\x7f\x01", "damaged pickle .*not enough data"),
    "number of negative length": (b"\x8b\xff\xff\xff\xff", "damaged pickle .*byte count < 0"),
    "number of many digits": (b"I" + b"9" * 100_000 + b"\n", "damaged pickle .*Exceeds the limit"),
    "number of no digits": (b"Iabc\n", "damaged pickle .*invalid literal"),
    "parameters split": (mapping({"UnpackBigParamInfor@@": b"}"}), "parameters split over several entries"),
}

# What stands as the tensor "w" in a .pdparams -> its opcodes, and the fault.
ARRAYS: dict[str, tuple[bytes, str]] = {
    "objects": (array(listed(NONE), code="O8", order="|"), "an array without plain contents"),
    "objects from bytes": (array(code="O8", order="|"), "an array of type 'O8': not numbers"),
    "texts": (array(code="U4"), "an array of type 'U4': not numbers"),
    "type that doubles": (array(code=None), "an array of type 'unknown': not numbers"),
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
        "an array without plain contents",
    ),
    "never filled": (call(RECONSTRUCT, name("numpy.ndarray"), numbers(0)), "an array without plain contents"),
    "of another class": (array(kind="subprocess.Popen"), r"an array of the class subprocess\.Popen: refused"),
    "of a matrix": (array(kind="numpy.matrix"), r"an array of the class numpy\.matrix: refused"),
    "of another shape": (array(shape=numbers(3)), r"an array of shape \[3\] with 16 bytes of contents"),
    "negative side": (array(shape=numbers(-4)), "a side that is negative"),
    "nine dimensions": (array(shape=numbers(4, *[1] * 8)), "a tensor with 9 dimensions; expected at most 8"),
    "absurd size of no number": (array(b"C\0", numbers(0, 1 << 60)), "absurd size"),
    "another encoding": (array(call("_codecs.encode", text("x"), text("rot13"))), "in an unknown encoding"),
    "not Latin": (array(call("_codecs.encode", text("\u20ac"), text("latin1"))), "in an unknown encoding"),
    "encoded text": (call("_codecs.encode", text("x"), text("latin1")), r"is a _codecs\.encode, expected a tensor"),
}

# Our own header in a safetensors file, with other values in it -> the fault.
DIGITS = [[str(digit), str(digit)] for digit in range(10)]
PREPROCESSING = json.loads(Header(FORM, "torch").to_json())["variant"]["preprocessing"]
HEADERS: dict[str, tuple[dict[str, object], str]] = {
    "too few kernels": (
        {"variant__kernel_sizes": [11]},
        "header is damaged .*kernel_sizes and channel_attention_kernels are two",
    ),
    "option of text": ({"variant__token_factor": "x"}, "header is damaged .*token_factor is a str"),
    "name of two lines": ({"variant__name": "a\nb"}, "header is damaged .*one printable line"),
    "newer": ({"format_version": 3}, "header of format version 3, this program reads 2"),
    "of a doubtful version": ({"format_version": "1\n\x1b" * 9999}, "header of format version '1"),
    "absurd depth": ({"variant__depths": [1 << 40, 1, 1, 1]}, "header is damaged .UsageError.*absurd size"),
    "negative depth": ({"variant__depths": [-1, 1, 1, 1]}, "header is damaged .UsageError.*from 1"),
    "absurd width": ({"variant__widths": [1 << 40] * 4}, "header is damaged .UsageError.*absurd size"),
    "unknown option": ({"variant__secret": 1}, "header is damaged .TypeError.*secret"),
    "unknown layout": ({"layout": "onnx"}, "header with the unknown layout 'onnx'"),
    "negative class count": ({"num_classes": -1}, "header is damaged .*-1 is not a whole number"),
    "too few classes": ({"classes": [["a", "a"]]}, "header with 1 classes for 10 outputs"),
    "one class twice": ({"classes": [["a", "a"]] * 10}, "header is damaged .*class id 'a'"),
    "half a character in a name": (
        {"classes": [*DIGITS[:9], ["9", "\ud800"]]},
        "header is damaged .UnicodeEncodeError",
    ),
    "half a character in an id": ({"classes": [*DIGITS[:9], ["\udc80", "9"]]}, "header is damaged .UnicodeEncodeError"),
    "deviation near 0": ({"variant__preprocessing": {**PREPROCESSING, "std": [1e-300] * 3}}, "std is 1e-300"),
    "counter that is none": ({"counters": {"x": -3}}, "header is damaged .*-3 is not a whole number"),
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

# Whole files whose tensors are readable, but not the weights of one network -> the fault, and the kind of error.
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
        "num_batches_tracked: expected a whole number from 0 up, found 1.5",
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
        r"mixes Paddle's names \(_mean\) with PyTorch's",
        DoesNotFit,
    ),
    "prefixes that collide": (
        lambda: good_zip(changed("module.head.weight", good_tensors()["head.weight"])),
        "'head.weight' and 'module.head.weight' are one name once their prefixes are stripped",
        DoesNotFit,
    ),
    "raw and averaged": (
        lambda: zip_around(mapping({"state_dict": state_pickle(), "state_dict_ema": state_pickle()})),
        r"averaged weights \(state_dict_ema\) beside the raw ones: choose",
        UsageError,
    ),
    "two sets of weights": (
        lambda: zip_around(mapping({"state_dict": state_pickle(), "model": state_pickle()})),
        r"several sets of weights \(state_dict, model\): choose",
        UsageError,
    ),
    "header of the other layout": (
        lambda: good_safetensors(header_json(layout="paddle")),
        "the header says paddle layout, the names are those of torch",
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
        "its tensors are over four times its size",
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


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_gives_one_clear_error(kind, tmp_path):
    make, fault, error = KINDS[kind]
    message = the_error(write(tmp_path, make()), error)
    assert re.search(fault, message), message


def missing(path: Path) -> None:
    assert not path.exists()


def circle(path: Path) -> None:
    path.symlink_to(path)


def unreadable(path: Path) -> None:
    path.write_bytes(TINY)
    path.chmod(0)


as_a_person = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (missing, "cannot be opened: No such file"),
        (Path.mkdir, "a directory, and without model.safetensors or pytorch_model.bin"),
        (os.mkfifo, "a directory or a device, not a file"),
        (circle, "cannot be opened: .*[Ss]ym"),
        pytest.param(unreadable, "cannot be opened: Permission denied", marks=as_a_person),
    ],
)
def test_what_is_no_file(make, fault, tmp_path):
    make(tmp_path / "suspect.pth")
    message = the_error(tmp_path / "suspect.pth")
    assert re.search(fault, message), message


def test_the_longest_file_name_is_read(tmp_path):
    """Although no file can have that name with `.json` added."""
    path = tmp_path / ("w" * 251 + ".pth")
    path.write_bytes(good_zip())
    assert same_numbers(read_weights(path).tensors)


# What stands beside `suspect.pdparams` as its sidecar -> the fault.
OTHER_HASH = {"layout": "paddle", "weights_sha256": "0" * 64}
SIDECARS: dict[str, tuple[Callable[[], bytes], str]] = {
    "of other weights": (lambda: header_json(**OTHER_HASH).encode(), "describes other weights .SHA-256 differs"),
    "empty": (lambda: b"", "header is damaged .JSONDecodeError"),
    "cut": (lambda: header_json()[:-9].encode(), "header is damaged .JSONDecodeError"),
    "not UTF-8": (lambda: b'{"\xff": 1}', r"suspect\.pdparams\.json beside it cannot be read"),
    "deep": (lambda: b"[" * 100_000, "header is damaged .RecursionError"),
    "one field twice": (lambda: header_json().encode()[:-1] + b', "layout": "torch"}', "two entries of one name"),
    "newer": (lambda: header_json(format_version=7).encode(), "header of format version 7"),
    "large": (lambda: b" " * (2 * MIB + 1), r"suspect\.pdparams\.json beside it is over 2 MiB"),
}


@pytest.mark.parametrize("kind", SIDECARS)
def test_hostile_sidecars(kind, tmp_path):
    make, fault = SIDECARS[kind]
    path = write(tmp_path, good_paddle(), ".pdparams")
    assert same_numbers(read_weights(path).tensors)
    (tmp_path / "suspect.pdparams.json").write_bytes(make())
    message = the_error(path)
    assert re.search(fault, message), message


def test_a_sidecar_that_is_a_pipe_is_none(tmp_path):
    path = write(tmp_path, good_paddle(), ".pdparams")
    os.mkfifo(tmp_path / "suspect.pdparams.json")
    assert same_numbers(read_weights(path).tensors)


def test_control_characters_in_class_names_are_read(tmp_path):
    """They are no harm in memory; whatever prints them has to care."""
    classes = [["0", "\x1b[2Jzero\u202e"], *DIGITS[1:]]
    read = read_weights(write(tmp_path, good_safetensors(header_json(classes=classes)))).classes
    assert read is not None
    assert read[0].name == "\x1b[2Jzero\u202e"


# --- What becomes of a tensor after its construction -------------------------------------------------

NUMBERS = np.frombuffer(SIXTEEN, "<f4")


@pytest.mark.parametrize("build", [zipped, legacy])
@pytest.mark.parametrize("value", [TRUE, FALSE])
def test_negated_tensors_have_the_numbers_that_pytorch_gives_them(build, value, tmp_path):
    """It is the presence of its negative bit that counts."""
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


def test_lists_that_grow_later_change_no_tensor(tmp_path):
    """Its shape, strides and type are those that it was made with."""
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
def test_what_happens_to_the_file_later_changes_nothing(content, tmp_path):
    """Neither numbers nor the SHA-256, which is asked for last."""
    path = write(tmp_path, content())
    weights = read_weights(path)
    with path.open("r+b") as file:
        file.write(bytes(len(content())))
    assert same_numbers(weights.tensors)
    assert weights.source.sha256 == hashlib.sha256(content()).hexdigest()


@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 99), lambda path: path.write_bytes(good_zip() * 2)])
def test_a_file_that_changes_while_it_is_read_is_refused(change, tmp_path, monkeypatch):
    path = write(tmp_path, good_zip())
    measure, times = os.fstat, []

    def changed_meanwhile(descriptor: int) -> os.stat_result:
        result = measure(descriptor)
        times.append(change(path) if stat.S_ISREG(result.st_mode) and result.st_size > 99 and not times else None)
        return result

    monkeypatch.setattr(checkpoint.os, "fstat", changed_meanwhile)
    assert "changed while it was read; wait until it is written" in the_error(path)


def test_the_state_of_a_training_is_read_at_once(tmp_path):
    numbers = {"w": np.arange(5, dtype=np.float32)}
    write_state(tmp_path, Progress(epoch=1), numbers)
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
def test_truncated_anywhere(format, tmp_path):
    """Tiny files cut at every byte, whole ones at many."""
    for content, step in ((TINY_FILES[format](), 1), (GOOD_FILES[format](), 20_011)):
        for length in range(0, len(content), step):
            the_error(write(tmp_path, content[:length]))


def mutated(rng: random.Random, content: bytes, others: list[bytes], end: int) -> bytes:
    """One to three accidents before `end`: bytes changed, lost, added, repeated, or those of another file."""
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


def outcome(path: Path) -> FcvitError | None:
    """None: it was read. Any other exception than ours goes through and fails the test."""
    try:
        found = read_weights(path).tensors
    except FcvitError as error:
        assert str(error).isprintable()
        assert path.name in str(error)
        return error
    # What went unnoticed changed numbers at most.
    assert {key: value.shape for key, value in found.items()} == {k: e.shape for k, e in tensor_specs(FORM).items()}
    return None


@formats
def test_mutated_tiny_files(format, tmp_path):
    """None of them ever becomes the weights of a network."""
    rng = random.Random(f"tiny {format}")
    content, others = TINY_FILES[format](), [make() for make in TINY_FILES.values()]
    kinds = {type(outcome(write(tmp_path, mutated(rng, content, others, len(content))))) for _ in range(400)}
    assert kinds <= {UnreadableFile, UsageError, DoesNotFit}
    assert UnreadableFile in kinds


@formats
@pytest.mark.slow
def test_mutated_whole_files(format, tmp_path):
    """Accidents where the names, shapes and places stand; what happens to the numbers, nobody can tell."""
    rng = random.Random(f"whole {format}")
    content, others = GOOD_FILES[format](), [make() for make in TINY_FILES.values()]
    if format == "zip":  # whose checksum of the pickle would find everything: zero stands for none
        content = content.replace(struct.pack("<L", zlib.crc32(whole(state_pickle()))), bytes(4))
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
    """Calls of what the reader knows, containers, states and storages, out of smaller ones."""
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


@randomly
@given(st.lists(st.one_of(st.sampled_from(INGREDIENTS), st.binary(max_size=6)), max_size=40), builders)
def test_any_sequence_of_opcodes(tmp_path_factory, ingredients, build):
    """Programs for the pickle machine that no pickler would write."""
    path = write(tmp_path_factory.getbasetemp(), build(b"".join(ingredients)))
    assert isinstance(outcome(path), FcvitError)


@randomly
@given(st.recursive(st.sampled_from(PARTS), nested, max_leaves=12), builders)
def test_any_values(tmp_path_factory, value, build):
    """Well-formed pickles in which everything stands where something else should."""
    path = write(tmp_path_factory.getbasetemp(), build(mapping({"w": value})))
    assert isinstance(outcome(path), FcvitError)


# --- Memory and time -------------------------------------------------------------------------------

# Each file in a process of its own: its memory can be measured, and a crash does not go unseen.
MEASURE = """
import json, os, resource, signal, sys, time
from fcvit.errors import FcvitError
from fcvit.weights.reading import read_weights

if sys.platform == "linux":  # should a bound fail, then before the machine does, and at little depth
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


def entries_at_one_place() -> bytes:
    """A zip with thousands of names for the same eight megabytes."""
    names = [f"data/{index}" for index in range(3000)]
    pickled = whole(mapping({key: tensor(storage(key=key.removeprefix("data/"))) for key in names}))
    file = plain_zip({"data.pkl": pickled, "data/0": bytes(8 * MIB)})
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
    """A .pdparams with one array under twenty thousand names."""
    return paddle(numbered(value, 0) + b"}(" + b"".join(text(str(i)) + b"h\x00" for i in range(20_000)) + b"u")


DEPTH = 40_000  # twice what the C stack of that process can take
LARGE_TEXT = numbered(text("a" * MIB), 0)
LARGE_TUPLE = b"(" + NONE * 90_000 + b"t"
DEEP = b")" + b"\x85" * DEPTH  # a tuple in a tuple in a tuple ...
COLLIDING = [index * sys.hash_info.modulus for index in range(1, 40_000)]  # all numbers with the hash 0
HUGE_BYTES = b"\x8b" + struct.pack("<l", 32 * MIB) + b"\x7f" * (32 * MIB)
WIDE = "\U0001f600" + "a" * (32 * MIB)  # one letter makes Python keep four bytes for each
HOLE = 4 * MIB  # at the end of a file: takes no disk, but allows for more opcodes

# Each kind -> how to make it, to how many bytes it is lengthened, the fault.
NASTY: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "opcodes": (lambda: paddle(NONE * 3 * MIB), 0, "pickle of over 198304 opcodes in a file of 3145731 bytes"),
    "opcodes, large file": (lambda: paddle(NONE * MIB), 100 * MIB, "pickle of over 1000000 opcodes"),
    "dictionaries": (lambda: paddle(b"}NNs" * MIB), HOLE, "pickle of over 231072 opcodes"),
    "sets": (lambda: paddle(b"\x8f" * MIB), 0, "pickle of over 132768 opcodes"),
    "memo": (lambda: paddle(NONE + b"\x94" * MIB), 0, "pickle of over 132768 opcodes"),
    "memo, one far number": (lambda: paddle(b"Nr\xff\xff\xff\x7f"), 0, "memo index .*absurdly large"),
    "memo, numbers that collide": (
        lambda: paddle(NONE + b"".join(b"p%d\n" % index for index in COLLIDING)),
        0,
        "memo index .*absurdly large",
    ),
    "keys that collide": (
        lambda: paddle(b"}(" + b"".join(number(index) + NONE for index in COLLIDING) + b"u"),
        0,
        "name is not text",
    ),
    "deep tuple as a tensor": (lambda: paddle(mapping({"w": DEEP})), HOLE, "w: is a tuple"),
    "deep tuple as a name": (lambda: paddle(b"}" + DEEP + b"Ns"), HOLE, "name is not text"),
    "deep tuple as a name, ordered": (
        lambda: paddle(call("collections.OrderedDict", listed(DEEP + NONE + b"\x86"))),
        HOLE,
        "not of a dictionary",
    ),
    "deep tuple as a storage": (lambda: legacy(DEEP + b"Q"), HOLE, "a persistent id that is not a storage"),
    "deep list": (lambda: paddle(b"]" * DEPTH + b"a" * (DEPTH - 1)), HOLE, "not of a dictionary"),
    "deep dictionary": (lambda: paddle((b"}" + text("w")) * DEPTH + NONE + b"s" * DEPTH), HOLE, "w: is a dict"),
    "deep calls": (
        lambda: paddle(mapping({"w": name("a.b") + NONE + (b"\x85RN" * DEPTH) + b"0"})),
        HOLE,
        r"w: is a call",
    ),
    "deep states": (lambda: paddle(mapping({"w": name("a.b") * DEPTH + b"b" * (DEPTH - 1)})), HOLE, r"w: is a a\.b"),
    "doubling lists as a type": (lambda: paddle(mapping({"w": array(code=None)})), 0, "type 'unknown': not numbers"),
    "doubling lists as a name": (lambda: paddle(b"}" + DOUBLING + b"Ns"), 0, "name is not text"),
    "doubling lists as storages": (lambda: legacy(keys=DOUBLING), 0, "list of storages does not match"),
    "large name, used often": (
        lambda: paddle(LARGE_TEXT + b"h\x00h\x00\x93" * 5000),
        0,
        "a global whose name has 1048576",
    ),
    "large text, encoded often": (
        lambda: paddle(LARGE_TEXT + numbered(name("_codecs.encode"), 1) + b"h\1h\0\x85R" * 20_000),
        0,
        "not of a dictionary",
    ),
    "large text, in many arrays": (
        lambda: used_in_many_entries(
            array(call("_codecs.encode", text("a" * 400_000), text("latin1")), numbers(100_000))
        ),
        0,
        "over four times its size",
    ),
    "large array of another byte order, in many entries": (
        lambda: used_in_many_entries(array(text("a" * MIB).replace(b"X", b"B", 1), numbers(MIB // 4), order=">")),
        0,
        "over four times its size",
    ),
    "large tuple, copied often": (
        lambda: paddle(numbered(LARGE_TUPLE, 0) + numbered(name("builtins.tuple"), 1) + b"h\1h\0\x85R" * 2000),
        0,
        "not of a dictionary",
    ),
    "large tuple, often a shape": (
        lambda: zipped(numbered(LARGE_TUPLE, 0) + listed(*[tensor(shape=b"h\0", strides=b"h\0")] * 300)),
        0,
        "holds a list, not a dictionary",
    ),
    "large tuple, once a shape": (
        lambda: zipped(numbered(LARGE_TUPLE, 0) + mapping({"w": tensor(shape=b"h\0")})),
        0,
        "w: a tensor with 90000 dimensions",
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
    "wide text with escapes": (lambda: paddle(b"V\\U0001f600" + b"a" * (32 * MIB) + b"\n"), 0, "a line of over 131072"),
    "wide texts with escapes": (
        lambda: paddle(listed(*[b"V\\U0001f600" + b"a" * (120 << 10) + b"\n"] * 256)),
        0,
        "over 4 MiB of text beyond Latin-1",
    ),
    "narrow text": (lambda: paddle(mapping({"w": text("\xe9" * (16 * MIB))})), 0, "w: is a str"),
    "number of many bytes": (lambda: paddle(b"}" + text("w") + HUGE_BYTES + b"s"), 0, "w: is a int"),
    "bytes beyond the end": (lambda: paddle(b"\x8e\0\0\0\0\0\0\1\0"), 0, "expected 281474976710656 bytes"),
    "number beyond the end": (lambda: paddle(b"\x8b\xff\xff\xff\x7f"), 0, "not enough data"),
    "absurd tensor": (lambda: zipped(mapping({"w": tensor(shape=numbers(1 << 40), strides=numbers(0))})), 0, "absurd"),
    "absurd storage": (lambda: zipped(storage(size=number(1 << 40))), 0, "shorter than the 1099511627776 elements"),
    "absurd header": (lambda: safetensors(b"{" + b" " * 99, length=90 * MIB), 91 * MIB, "header of 94371840 bytes"),
    "header of lists": (lambda: safetensors(b'{"w":[' + b"[]," * 690_000 + b"[]]}"), 0, "a damaged safetensors file"),
    "header of tensors": (
        lambda: safetensors({f"{index:x}": entry(shape=(0,), end=0) for index in range(32_000)}, b""),
        0,
        "not an FCViT",
    ),
    "directory too large": (large_directory, 0, "directory alone takes 2350000 bytes"),
    "directory": (lambda: plain_zip(dict.fromkeys(map(str, range(20_000)), b"")), 0, r"without exactly one data\.pkl"),
    "entries at one place": (entries_at_one_place, 0, "entries are together larger than the file"),
}
MODEL_SIZE = 512 << 10  # bytes of the package's small variant, the smallest there is
INTERPRETER = 48 * MIB  # what the longest headers, and the opcodes that files of any size may have, take at most


@pytest.mark.slow
def test_nasty_files_take_little_memory_and_time(tmp_path):
    """At most four times the larger of file and model, and ten seconds."""
    paths = [tmp_path / f"{index}.pth" for index in range(len(NASTY))]
    for path, (make, size, _) in zip(paths, NASTY.values(), strict=True):
        path.write_bytes(make())
        if size:
            os.truncate(path, size)
    signal.setitimer(signal.ITIMER_REAL, 0)  # each file has a limit of its own
    command = [sys.executable, "-c", MEASURE, str(PATIENCE), *map(str, paths)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for kind, path, line in zip(NASTY, paths, output.splitlines(), strict=True):
        result = json.loads(line)
        assert re.search(NASTY[kind][2], result["message"]), (kind, result)
        assert result["memory"] < 4 * max(path.stat().st_size, MODEL_SIZE) + INTERPRETER, (kind, result)
