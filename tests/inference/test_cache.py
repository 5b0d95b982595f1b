"""Tests of the cache of exports: keys, damage, races and folders that cannot be written."""

import dataclasses
import json
import multiprocessing
import os
import shutil

import numpy as np
import pytest

from conftest import DIGITS, needs_torch
from fcvit.errors import NumbersDisagree
from fcvit.inference import cache
from fcvit.inference.cache import ENTRY, cache_folder, entry_key, exported
from fcvit.inference.interface import Interface
from fcvit.weights.reading import read_weights

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytestmark = needs_torch

INTERFACE = Interface((32, 32), True, False, DIGITS.variant.preprocessing)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fcvit" / "engines"


@pytest.fixture
def weights(digits_pth):
    return read_weights(digits_pth)


@pytest.fixture
def writes(monkeypatch):
    """A list that grows by one element for every export that is written."""
    count = []
    write = cache.write_export
    monkeypatch.setattr(cache, "write_export", lambda *given: count.append(1) or write(*given))
    return count


def take(weights, **options):
    with exported(weights, INTERFACE, "onnxruntime", **options) as path:
        return path, path.read_bytes()


def test_the_second_use_reads_the_cache(weights, writes, home, notes):
    first, content = take(weights)
    assert take(weights) == (first, content)
    assert len(writes) == 1 and len(notes) == 1 and str(cache_folder()) in notes[0]
    assert first.parent.parent == home and [path.name for path in home.iterdir()] == [first.parent.name]


def test_the_key_depends_on_everything_that_affects_the_numbers(weights, monkeypatch):
    keys = {entry_key(weights, INTERFACE, "onnxruntime")}
    assert entry_key(weights, INTERFACE, "onnxruntime") in keys

    def assert_new_key(weights=weights, interface=INTERFACE, runtime="onnxruntime", calibration=None):
        key = entry_key(weights, interface, runtime, calibration)
        assert key not in keys
        keys.add(key)

    tensors = dict(weights.tensors)
    tensors["head.bias"] = tensors["head.bias"].copy()
    tensors["head.bias"][3] += np.float32(1e-6)
    assert_new_key(dataclasses.replace(weights, tensors=tensors))
    assert_new_key(interface=dataclasses.replace(INTERFACE, uint8=False))
    assert_new_key(interface=dataclasses.replace(INTERFACE, size=(32, 40)))
    assert_new_key(interface=dataclasses.replace(INTERFACE, part="trunk"))
    assert_new_key(interface=dataclasses.replace(INTERFACE, part="box_head"))
    mean = dataclasses.replace(DIGITS.variant.preprocessing, mean=(0.1, 0.2, 0.3))
    assert_new_key(interface=dataclasses.replace(INTERFACE, preprocessing=mean))
    assert_new_key(runtime="openvino")
    assert_new_key(calibration=np.zeros((1, 3, 32, 32), np.uint8))
    assert_new_key(calibration=np.ones((1, 3, 32, 32), np.uint8))
    monkeypatch.setattr(cache, "processor_identity", lambda: "another")
    assert_new_key()
    monkeypatch.setattr(cache.importlib.metadata, "version", lambda package: "99.0")
    assert_new_key()
    monkeypatch.setattr(cache, "__version__", "99.0")
    assert_new_key()
    monkeypatch.setattr(cache, "_sources", lambda runtime: "edited")
    assert_new_key()


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    ["altered", "invalid json"]
    + [pytest.param(damage, marks=pytest.mark.slow) for damage in ("truncated", "no json", "no file", "empty folder")],
)
def test_a_damaged_entry_is_written_again(weights, writes, damage):
    path, content = take(weights)
    entry = path.parent / ENTRY
    match damage:
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "altered":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "no json":
            entry.unlink()
        case "no file":
            path.unlink()
        case "invalid json":
            entry.write_text("[1, 2")
        case "empty folder":
            path.unlink()
            entry.unlink()
    assert take(weights) == (path, content) and len(writes) == 2
    assert take(weights) == (path, content) and len(writes) == 2
    assert [p.name for p in path.parent.parent.iterdir()] == [path.parent.name]


@pytest.mark.slow
def test_an_entry_cannot_name_a_file_outside_its_folder(weights, tmp_path, writes):
    path, content = take(weights)
    (tmp_path / "other").write_bytes(b"x")
    hashes = json.loads((path.parent / ENTRY).read_text())
    (path.parent / ENTRY).write_text(json.dumps({"../../../other": hashes["network.onnx"]}))
    assert take(weights) == (path, content) and len(writes) == 2


@pytest.mark.slow
def test_without_a_writable_cache_each_use_exports_again(weights, tmp_path, monkeypatch, writes, notes):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with exported(weights, INTERFACE, "onnxruntime") as path:
        assert path.stat().st_size > 1000
    assert not path.exists() and len(notes) == 1
    assert "cannot be written" in notes[0] and "XDG_CACHE_HOME" in notes[0] and "temporary folder" in notes[0]
    take(weights)
    assert len(writes) == 2


def test_without_a_home_folder_exports_are_temporary(weights, monkeypatch, notes):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert len(take(weights)[1]) > 1000 and "temporary folder" in notes[0]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["full", "deleted"])
def test_a_cache_that_fails_during_an_export(weights, home, monkeypatch, fault, notes):
    """If the disk is full or the cache is deleted, the export is repeated in a temporary folder, with a note."""
    write = cache.write_export

    def failing(weights, interface, target, path):
        monkeypatch.setattr(cache, "write_export", write)
        if fault == "full":
            raise OSError(28, "No space left on device")
        write(weights, interface, target, path)
        shutil.rmtree(home)

    monkeypatch.setattr(cache, "write_export", failing)
    path, content = take(weights)
    assert len(content) > 1000 and not path.exists()
    assert "again" in notes[1] and "temporary folder" in notes[1] and "XDG_CACHE_HOME" in notes[1]
    assert ("No space left on device" in notes[1]) == (fault == "full")
    assert not home.exists() or not list(home.iterdir())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root can write to any folder")
def test_a_read_only_cache_is_reported(weights, home, notes):
    home.mkdir(parents=True)
    home.chmod(0o500)
    _, content = take(weights)
    assert len(content) > 1000 and any("cannot be written" in text for text in notes)


def test_an_export_with_wrong_numbers_is_not_cached(weights, home, monkeypatch):
    write = cache.write_export

    def faulty(weights, *rest):
        tensors = dict(weights.tensors)
        tensors["network.0.0.norm1.weight"] = tensors["network.0.0.norm1.weight"] * np.float32(1.001)
        write(dataclasses.replace(weights, tensors=tensors), *rest)

    monkeypatch.setattr(cache, "write_export", faulty)
    with pytest.raises(NumbersDisagree, match=r"digits\.pth exported for onnxruntime: .*times the float32"):
        take(weights)
    assert not list(home.iterdir())


def race(path, home, barrier, results):
    os.environ["XDG_CACHE_HOME"] = home
    weights = read_weights(path)
    barrier.wait()
    with exported(weights, INTERFACE, "onnxruntime") as exported_path:
        results.put((str(exported_path), len(exported_path.read_bytes())))


@pytest.mark.ci
@pytest.mark.slow
def test_concurrent_processes_leave_one_entry(digits_pth, home):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=race, args=(digits_pth, os.environ["XDG_CACHE_HOME"], barrier, results))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    exports = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(exports) == 1 and len(list(home.iterdir())) == 1


@pytest.mark.slow
def test_the_slower_process_uses_the_entry_of_the_faster(weights, home, monkeypatch):
    """Another process creates the entry between the lookup and the rename."""
    write = cache._write

    def overtaken(*given):
        write(*given)
        monkeypatch.setattr(cache, "_write", write)
        overtaken.path = take(weights)[0]

    monkeypatch.setattr(cache, "_write", overtaken)
    path, _ = take(weights)
    assert path == overtaken.path and len(list(home.iterdir())) == 1
