"""Cache the exports that engines run, in `$XDG_CACHE_HOME/fcvit/engines` (by default `~/.cache/fcvit/engines`).

An entry is a folder named by a hash of everything that its numbers depend on: the tensors, the network, the
interface, the versions of the packages that write and run the export, and the processor. It contains the files of
the export and `entry.json` with their hashes. The entry of the native engine has only `entry.json`, with the errors
that its check measured. An entry is written to a temporary folder, checked and then renamed. If two processes write
the same entry at once, both do the work and one result is kept. A damaged entry is written again. If the cache cannot
be written, or is deleted during an export, the export goes to a temporary folder and a note is logged. The cache may
be deleted at any time.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from fcvit import __version__
from fcvit.errors import FcvitError
from fcvit.inference.check import check_export, require_reference, sample_inputs
from fcvit.inference.export import ENDINGS, files, require_writer, write_export
from fcvit.inference.interface import Interface
from fcvit.inference.quantize import quantize
from fcvit.inference.runtimes import RUNTIMES, Network, import_runtime
from fcvit.machine import processor_identity
from fcvit.models.spec import is_counter
from fcvit.models.variants import Preprocessing
from fcvit.run_folder import cache_root, write_json
from fcvit.weights.reading import Weights

logger = logging.getLogger("fcvit")

FORMATS = {"onnxruntime": "onnx", "openvino": "onnx", "paddle-inference": "paddle"}
PACKAGES = {
    "onnxruntime": ("onnx", "onnxruntime"),
    "openvino": ("onnx", "openvino"),
    "paddle-inference": ("paddlepaddle", "paddlepaddle-gpu"),
    "native": (),
}
ENTRY = "entry.json"
LAYOUT = 1  # version of the layout of an entry


def cache_folder() -> Path:
    """Return the folder of the entries."""
    return cache_root() / "engines"


@contextlib.contextmanager
def exported(
    weights: Weights,
    interface: Interface,
    runtime: str,
    calibration: np.ndarray | None = None,
    use_cache: bool = True,
) -> Iterator[Path]:
    """Yield the file that a runtime loads, from the cache or written now. Temporary files are deleted after the block.

    Args:
        weights: Weights of any network.
        interface: Interface of the export.
        runtime: A key of `RUNTIMES`.
        calibration: uint8 images to quantize to int8 with. The export is checked before it is quantized.
        use_cache: False writes the export to a temporary folder.

    Raises:
        NumbersDisagree: The outputs of the runtime do not match the weights.
        MissingExtra, UsageError: See `write_export` and `check_export`.
    """
    import_runtime(runtime)  # reports a missing package before the log mentions an export
    main = f"network{ENDINGS[FORMATS[runtime]][-1]}"
    entry = cache_folder() / entry_key(weights, interface, runtime, calibration)
    if use_cache and _intact(entry, main):
        yield entry / main
        return
    require_writer(FORMATS[runtime])
    require_reference()
    write = functools.partial(_write, weights, interface, runtime, calibration)
    with contextlib.ExitStack() as stack:
        what = f"{_what(weights.spec, interface)} for {runtime}"
        path = _publish(write, entry, main, what, stack) if use_cache else None
        if path is None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fcvit-"))) / main
            write(path)
        yield path


def _publish(
    write: Callable[[Path], None], entry: Path, main: str, what: str, stack: contextlib.ExitStack
) -> Path | None:
    """Write an export and move it into the cache. Return None if the cache cannot be written, is full or is deleted."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
    except OSError as error:
        logger.info(f"exporting {what} to a temporary folder: {_not_written(error)}")
        return None
    stack.callback(shutil.rmtree, folder, ignore_errors=True)  # has no effect once the folder is renamed
    logger.info(f"exporting {what}; the export is cached in {entry.parent}")
    try:
        write(folder / main)
    except Exception as error:  # a full disk or a deleted folder can raise any error
        if isinstance(error, FcvitError) or (folder.exists() and not isinstance(error, OSError)):
            raise
        stack.close()
        logger.info(f"exporting {what} again, to a temporary folder: {_not_written(error)}")
        return None
    for _ in range(2):
        with contextlib.suppress(OSError):  # the entry exists: another process was faster, or it is damaged
            folder.rename(entry)
        if _intact(entry, main):
            return entry / main
        with contextlib.suppress(OSError):
            damaged_folder = tempfile.mkdtemp(prefix=".damaged-", dir=entry.parent)
            entry.rename(Path(damaged_folder) / "entry")
            shutil.rmtree(damaged_folder, ignore_errors=True)
    return folder / main


def check_once(weights: Weights, networks: Mapping[str, Network], preprocessing: Preprocessing, build: str) -> None:
    """Check the networks of the native engine, unless they passed with the same weights and library before.

    Args:
        weights: Weights of any network.
        networks: The network of each part. It takes images of any size, uint8 or normalized.
        preprocessing: Mean and standard deviation of the images.
        build: Hash of everything that the compiled library depends on.

    Raises:
        NumbersDisagree: The outputs do not match the weights.
        MissingExtra: Neither PyTorch nor Paddle is installed.
    """
    whole = Interface(None, True, False, preprocessing)
    entry = cache_folder() / entry_key(weights, whole, "native", build=build) / ENTRY
    if entry.is_file():
        return
    require_reference()
    logger.info(f"checking the native engine with {weights.source.path}; the result is cached in {cache_folder()}")
    ratios = []
    for part, network in networks.items():
        interface = dataclasses.replace(whole, uint8=not part, part=part)
        for inputs in sample_inputs(weights.spec, interface):
            what = f"{_what(weights.source.path, interface)} with the native engine"
            ratios.append(check_export(network, weights, interface, inputs, what).ratio)
            interface = dataclasses.replace(interface, uint8=False)  # the other size is checked with normalized images
    with contextlib.suppress(OSError):  # without a cache, the next start checks again
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_json(entry, {"ratios": ratios})


def _not_written(error: Exception) -> str:
    reason = (isinstance(error, OSError) and error.strerror) or "it was deleted"
    return f"{cache_folder()} cannot be written ({reason}); set XDG_CACHE_HOME to use another folder"


def entry_key(
    weights: Weights, interface: Interface, runtime: str, calibration: np.ndarray | None = None, build: str = ""
) -> str:
    """Return the name of an entry: a hash of everything that its numbers depend on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.tensors.items()):
        if not is_counter(name):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\0".encode())
            digest.update(tensor.tobytes())
    versions = {"fcvit": __version__, "sources": _sources(runtime), "build": build}
    for package in PACKAGES[runtime]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    about = {
        "layout": LAYOUT,
        "form": dataclasses.asdict(weights.spec),
        "interface": dataclasses.asdict(interface),
        "runtime": runtime,
        "versions": versions,
        "processor": processor_identity(),
        "calibration": calibration is not None and hashlib.sha256(calibration.tobytes()).hexdigest(),
    }
    digest.update(json.dumps(about, sort_keys=True).encode())
    return digest.hexdigest()[:32]


@functools.cache
def _sources(runtime: str) -> str:
    """Return a hash of the modules that determine the numbers, because they can also change between two releases."""
    here = Path(__file__).parent
    if runtime == "native":
        modules = [here / "detector.py", here / "native_network.py", *sorted((here.parent / "native").glob("*.py"))]
    else:
        modules = [here / f"{name}.py" for name in ("algebra", "detector", "export", "onnx_graph", "quantize")]
    digest = hashlib.sha256()
    for path in (*modules, *sorted((here.parent / "models").glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _write(weights: Weights, interface: Interface, runtime: str, calibration: np.ndarray | None, path: Path) -> None:
    """Write an export and check it. With calibration images, quantize it afterwards."""
    write_export(weights, interface, FORMATS[runtime], path)
    network, name = RUNTIMES[runtime](path, 1), f"{_what(weights.source.path, interface)} exported for {runtime}"
    for inputs in sample_inputs(weights.spec, interface):
        check_export(network, weights, interface, inputs, name)
    if calibration is not None:
        quantize(path, calibration, interface)
    hashes = {file.name: _sha256(file) for file in files(path, FORMATS[runtime])}
    (path.parent / ENTRY).write_text(json.dumps(hashes), "utf-8")


def _what(network: object, interface: Interface) -> str:
    """Return a readable name of an export."""
    return f"{interface.part} of {network}" if interface.part else str(network)


def _intact(entry: Path, main: str) -> bool:
    """Return whether all files of an entry exist and match the recorded hashes."""
    try:
        hashes = json.loads((entry / ENTRY).read_bytes())
        return main in hashes and all(_sha256(entry / Path(name).name) == known for name, known in hashes.items())
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
