"""The cache of exports: races, damage, older versions, folders that cannot be written."""

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
    """How often an export was written."""
    count = []
    write = cache.write_export
    monkeypatch.setattr(cache, "write_export", lambda *given: count.append(1) or write(*given))
    return count


def take(weights, **options):
    with exported(weights, INTERFACE, "onnxruntime", **options) as path:
        return path, path.read_bytes()


def test_the_second_use_finds_the_first(weights, writes, home, notes):
    said = notes
    first, content = take(weights)
    assert take(weights) == (first, content)
    assert len(writes) == 1 and len(said) == 1 and str(cache_folder()) in said[0]
    assert first.parent.parent == home and [path.name for path in home.iterdir()] == [first.parent.name]


def test_the_key_depends_on_all_that_decides_the_numbers(weights, monkeypatch):
    keys = {entry_key(weights, INTERFACE, "onnxruntime")}
    assert entry_key(weights, INTERFACE, "onnxruntime") in keys

    def other(weights=weights, interface=INTERFACE, runtime="onnxruntime", calibration=None):
        key = entry_key(weights, interface, runtime, calibration)
        assert key not in keys
        keys.add(key)

    tensors = dict(weights.tensors)
    tensors["head.bias"] = tensors["head.bias"].copy()
    tensors["head.bias"][3] += np.float32(1e-6)
    other(dataclasses.replace(weights, tensors=tensors))
    other(interface=dataclasses.replace(INTERFACE, uint8=False))
    other(interface=dataclasses.replace(INTERFACE, size=(32, 40)))
    mean = dataclasses.replace(DIGITS.variant.preprocessing, mean=(0.1, 0.2, 0.3))
    other(interface=dataclasses.replace(INTERFACE, preprocessing=mean))
    other(runtime="openvino")
    other(calibration=np.zeros((1, 3, 32, 32), np.uint8))
    other(calibration=np.ones((1, 3, 32, 32), np.uint8))
    monkeypatch.setattr(cache, "processor_identity", lambda: "another")
    other()
    monkeypatch.setattr(cache.importlib.metadata, "version", lambda package: "99.0")
    other()
    monkeypatch.setattr(cache, "__version__", "99.0")
    other()
    monkeypatch.setattr(cache, "_sources", lambda: "edited")
    other()


@pytest.mark.parametrize(
    "damage",
    ["altered", "entry of garbage"]
    + [pytest.param(damage, marks=pytest.mark.slow) for damage in ("cut", "no entry", "no file", "empty folder")],
)
def test_a_damaged_entry_is_made_again(weights, writes, damage):
    path, content = take(weights)
    entry = path.parent / ENTRY
    match damage:
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "altered":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "no entry":
            entry.unlink()
        case "no file":
            path.unlink()
        case "entry of garbage":
            entry.write_text("[1, 2")
        case "empty folder":
            path.unlink()
            entry.unlink()
    assert take(weights) == (path, content) and len(writes) == 2
    assert take(weights) == (path, content) and len(writes) == 2
    assert [p.name for p in path.parent.parent.iterdir()] == [path.parent.name]


def test_an_entry_cannot_point_elsewhere(weights, tmp_path, writes):
    path, content = take(weights)
    (tmp_path / "other").write_bytes(b"x")
    hashes = json.loads((path.parent / ENTRY).read_text())
    (path.parent / ENTRY).write_text(json.dumps({"../../../other": hashes["network.onnx"]}))
    assert take(weights) == (path, content) and len(writes) == 2


def test_a_folder_that_cannot_be_written_costs_time_only(weights, tmp_path, monkeypatch, writes, notes):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    said = notes
    with exported(weights, INTERFACE, "onnxruntime") as path:
        assert path.stat().st_size > 1000
    assert not path.exists() and any("cannot be written" in text and "XDG_CACHE_HOME" in text for text in said)
    assert len(said) == 1 and "it is kept" not in said[0]
    take(weights)
    assert len(writes) == 2


def test_without_a_home_folder_the_cache_is_done_without(weights, monkeypatch, notes):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    said = notes
    assert len(take(weights)[1]) > 1000 and "it is not kept" in said[0]


@pytest.mark.parametrize("fault", ["full", "deleted"])
def test_a_cache_that_fails_while_it_is_filled(weights, home, monkeypatch, fault, notes):
    """A full disk, or somebody empties the cache: the export is made again elsewhere, with a note."""
    write = cache.write_export

    def failing(weights, interface, target, path):
        monkeypatch.setattr(cache, "write_export", write)
        if fault == "full":
            raise OSError(28, "No space left on device")
        write(weights, interface, target, path)
        shutil.rmtree(home)

    monkeypatch.setattr(cache, "write_export", failing)
    said = notes
    path, content = take(weights)
    assert len(content) > 1000 and not path.exists()
    assert said[1].endswith("the export is made again in a temporary folder and not kept")
    assert ("No space left on device" in said[1]) == (fault == "full")
    assert not home.exists() or not list(home.iterdir())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes to any folder")
def test_a_read_only_folder(weights, home, notes):
    home.mkdir(parents=True)
    home.chmod(0o500)
    said = notes
    _, content = take(weights)
    assert len(content) > 1000 and any("cannot be written" in text for text in said)


def test_wrong_numbers_are_never_kept(weights, home, monkeypatch):
    write = cache.write_export

    def faulty(weights, *rest):
        tensors = dict(weights.tensors)
        tensors["network.0.0.norm1.weight"] = tensors["network.0.0.norm1.weight"] * np.float32(1.001)
        write(dataclasses.replace(weights, tensors=tensors), *rest)

    monkeypatch.setattr(cache, "write_export", faulty)
    with pytest.raises(NumbersDisagree, match="computes other numbers than its weights"):
        take(weights)
    assert not list(home.iterdir())


def race(path, home, barrier, results):
    os.environ["XDG_CACHE_HOME"] = home
    weights = read_weights(path)
    barrier.wait()
    with exported(weights, INTERFACE, "onnxruntime") as found:
        results.put((str(found), len(found.read_bytes())))


@pytest.mark.ci
@pytest.mark.slow
def test_processes_at_once_end_with_one_entry(digits_pth, home):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=race, args=(digits_pth, os.environ["XDG_CACHE_HOME"], barrier, results))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    found = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(found) == 1 and len(list(home.iterdir())) == 1


@pytest.mark.slow
def test_the_slower_of_two_takes_what_the_faster_has_published(weights, home, monkeypatch):
    """Between its look and its rename, another process puts the entry there."""
    write = cache._write

    def beaten(*given):
        write(*given)
        monkeypatch.setattr(cache, "_write", write)
        beaten.path = take(weights)[0]

    monkeypatch.setattr(cache, "_write", beaten)
    path, _ = take(weights)
    assert path == beaten.path and len(list(home.iterdir())) == 1
