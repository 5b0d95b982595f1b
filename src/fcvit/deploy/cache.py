"""Exports for the engines, made once and kept: `$XDG_CACHE_HOME/fcvit/engines` (`~/.cache/...`).

An entry is a folder named by a hash of all that its numbers depend on: every tensor, the network, the
interface, the versions of what wrote it and of what runs it, the processor. It holds the files of the export and
`entry.json` with their hashes; it is made elsewhere, checked (gate B) and renamed into place as a whole, so
two processes at once do the work twice and keep one result. An entry that is damaged is made again. A cache that
cannot be written is done without, aloud. Anything in it may be deleted at any time.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fcvit import __version__
from fcvit.deploy.check import check_export, require, sample_images
from fcvit.deploy.export import files, write_export
from fcvit.deploy.interface import Interface
from fcvit.deploy.quantise import quantise
from fcvit.deploy.runtimes import RUNTIMES
from fcvit.machine import processor_identity
from fcvit.weights.names import is_counter
from fcvit.weights.reading import Weights

FORMAT_OF = {"onnxruntime": "onnx", "openvino": "onnx", "paddle-inference": "paddle"}
MAIN = {"onnx": "network.onnx", "paddle": "network.json"}
PACKAGES = {
    "onnxruntime": ("onnx", "onnxruntime"),
    "openvino": ("onnx", "openvino"),
    "paddle-inference": ("paddlepaddle", "paddlepaddle-gpu"),
}
ENTRY = "entry.json"
LAYOUT = 1  # of an entry


def cache_folder() -> Path:
    """Where the entries are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fcvit" / "engines"


@contextlib.contextmanager
def exported(
    weights: Weights,
    interface: Interface,
    runtime: str,
    calibration: np.ndarray | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> Iterator[Path]:
    """The file that a runtime is to load, from the cache or made now; it is there while the block runs.

    Args:
        weights: of any form.
        interface: with a fixed size.
        runtime: a key of `RUNTIMES`.
        calibration: uint8 images: quantise to int8 by them. Gate B is then held before that.
        announce: is told of an export that takes time, and of a cache that cannot be used.

    Raises:
        NumbersDisagree: what the runtime computes is not what the weights say.
        MissingExtra, UsageError: see `write_export`, `check_export`.
    """
    key = entry_key(weights, interface, runtime, calibration)
    main = MAIN[FORMAT_OF[runtime]]
    entry = cache_folder() / key
    if _intact(entry, main):
        yield entry / main
        return
    announce(f"exporting {weights.form} for {runtime}, once: it is kept in {cache_folder()}")
    with tempfile.TemporaryDirectory(prefix="fcvit-") as spare:
        kept = _scratch(key, announce)
        made = kept or Path(spare)
        try:
            _make(weights, interface, runtime, calibration, made / main)
            yield (entry if kept and _publish(kept, entry, main) else made) / main
        finally:
            if kept is not None:
                shutil.rmtree(kept, ignore_errors=True)  # unless it was renamed


def entry_key(weights: Weights, interface: Interface, runtime: str, calibration: np.ndarray | None = None) -> str:
    """Name of the entry: all that the numbers depend on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.tensors.items()):
        if not is_counter(name):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\0".encode())
            digest.update(tensor.tobytes())
    about = {
        "layout": LAYOUT,
        "form": dataclasses.asdict(weights.form),
        "interface": dataclasses.asdict(interface),
        "runtime": runtime,
        "versions": _versions(runtime),
        "processor": processor_identity(),
        "calibration": calibration is not None and hashlib.sha256(calibration.tobytes()).hexdigest(),
    }
    digest.update(json.dumps(about, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def _versions(runtime: str) -> dict[str, str]:
    found = {"fcvit": __version__, "sources": _sources()}
    for package in PACKAGES[runtime]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def _sources() -> str:
    """Hash of what writes an export: between two releases it may change too."""
    digest = hashlib.sha256()
    for name in ("algebra.py", "export.py", "onnx_graph.py", "quantise.py", "../model.py"):
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


def _make(weights: Weights, interface: Interface, runtime: str, calibration: np.ndarray | None, path: Path) -> None:
    """Write the export and check it, then quantise it if asked."""
    assert interface.size is not None
    write_export(weights, interface, FORMAT_OF[runtime], path)
    loaded = RUNTIMES[runtime](path, 1)
    what = f"{weights.source.path} exported for {runtime}"
    require(check_export(loaded, weights, interface, sample_images(weights.form, interface.size)), what)
    if calibration is not None:
        quantise(path, calibration, interface)
    hashes = {file.name: _sha256(file) for file in files(path, FORMAT_OF[runtime])}
    (path.parent / ENTRY).write_text(json.dumps(hashes), "utf-8")


def _scratch(key: str, announce: Callable[[str], None]) -> Path | None:
    """A folder beside the entries, or None where they cannot be written."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{key}-", dir=cache_folder()))
    except OSError as error:
        reason = error.strerror or error
        announce(f"{cache_folder()} cannot be written ({reason}): the export is not kept; XDG_CACHE_HOME names another")
        return None


def _publish(made: Path, entry: Path, main: str) -> bool:
    """Rename the folder to its place; whether the entry there is good now, ours or another process's."""
    for _ in range(2):
        with contextlib.suppress(OSError):  # it is there already: another process was faster, or it is damaged
            made.rename(entry)
        if _intact(entry, main):
            return True
        with contextlib.suppress(OSError):
            aside = tempfile.mkdtemp(prefix=".damaged-", dir=entry.parent)
            entry.rename(Path(aside) / "entry")
            shutil.rmtree(aside, ignore_errors=True)
    return False


def _intact(entry: Path, main: str) -> bool:
    """Whether all files are there with the numbers that were written."""
    try:
        hashes = json.loads((entry / ENTRY).read_bytes())
        return main in hashes and all(_sha256(entry / Path(name).name) == known for name, known in hashes.items())
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
