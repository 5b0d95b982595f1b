"""Import PaddlePaddle or PyTorch when a model is needed: quietly, or with the remedy.

Nothing else of the package imports either of them at the top, save the files that hold
networks. Importing Paddle warns about a compiler cache and adds a handler to the root logger;
neither is the user's business.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from fcvit.errors import MissingExtra, UsageError
from fcvit.interrupts import held_back

INSTALL = {
    "paddle": "pip install paddlepaddle (on a GPU: paddlepaddle-gpu from Paddle's own package index)",
    "torch": "pip install torch",
}


_PADDLE_HANDLES = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGSEGV", "SIGILL", "SIGFPE", "SIGABRT", "SIGBUS")
    if hasattr(signal, name)  # Windows has no SIGBUS
]
_handlers_are_ours = False  # whether what Paddle's import did to them is undone
_SIGACTION = 512  # bytes, more than any system's `struct sigaction`


def installed(framework: str) -> bool:
    """Return whether `framework` ("paddle" or "torch") is installed, without importing it."""
    return importlib.util.find_spec(framework) is not None


def import_framework(framework: str) -> ModuleType:
    """Import "paddle" or "torch".

    Raises:
        MissingExtra: it is not installed, or does not load on this machine.
        KeyboardInterrupt: after the import, which an interruption would damage.
    """
    # The libraries read these once, when they load; a user's own setting wins.
    os.environ.setdefault("GLOG_minloglevel", "2")
    # Threads that wait for each other by spinning take the cores away from those they wait for: beside
    # another busy process a training step became 30 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(held_back())
            if framework == "paddle":
                stack.enter_context(_sigterm_taken_back() if framework in sys.modules else _signal_handlers_kept())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            return importlib.import_module(framework)
    except ImportError as error:
        if error.name == framework:
            reason = f"{framework} is not installed"
        else:
            reason = f"{framework} does not load ({error})"
            if "libgomp" in str(error):
                reason += "; install the system package libgomp1"
        raise MissingExtra(f"{reason}; install it with: {INSTALL[framework]}") from error
    finally:
        root.handlers[:], root.level = handlers, level


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Undo the signal handlers that Paddle's import sets, which print to the standard output and end the process.

    By the C library, since Python sets handlers in the main thread only and does not know those of other libraries.
    Each module that Paddle looks for is an occasion to undo them: else they would be in force for half a second.
    """
    global _handlers_are_ours
    if os.name != "posix":
        with _sigterm_taken_back():
            yield
        return
    _handlers_are_ours = True
    sigaction = ctypes.CDLL(None).sigaction
    actions = {number: ctypes.create_string_buffer(_SIGACTION) for number in _PADDLE_HANDLES}
    for number, action in actions.items():
        sigaction(number, None, action)

    class Finder:
        @staticmethod
        def find_spec(*_: object) -> None:
            for number, action in actions.items():
                sigaction(number, action, None)

    sys.meta_path.insert(0, Finder)
    try:
        yield
    finally:
        sys.meta_path.remove(Finder)
        Finder.find_spec()


@contextlib.contextmanager
def _sigterm_taken_back() -> Iterator[None]:
    """Once, put the handler of SIGTERM that Python knows of back into force, where others imported Paddle before us."""
    global _handlers_are_ours
    before = signal.getsignal(signal.SIGTERM)
    yield
    if not _handlers_are_ours and threading.current_thread() is threading.main_thread():
        _handlers_are_ours = True
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def quiet_standard_output() -> Iterator[None]:
    """Send what C++ code prints to the standard output, which is the user's, to nowhere; of the whole process."""
    sys.stdout.flush()
    standard_output = os.dup(1)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        with contextlib.suppress(OSError, TypeError):
            ctypes.CDLL(None).fflush(None)  # what is still in C's buffer would come out later
        os.dup2(standard_output, 1)
        os.close(standard_output)


def paddle_place(device: str = "auto") -> str:
    """Resolve `--device` (auto, cpu, gpu, gpu:N) to Paddle's name of the device, and check it.

    `auto` is the first GPU where this build of Paddle has one, else the CPU.

    Raises:
        UsageError: the name is unknown, or the machine has no such device.
    """
    kind, index = parse_device(device)
    paddle = import_framework("paddle")
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else None
    return _place(device, kind, index, gpus, "gpu", "Paddle")


@contextlib.contextmanager
def on_paddle_device(place: str) -> Iterator[None]:
    """Set Paddle's device for a block: it is global, and the caller's afterwards."""
    device = import_framework("paddle").device
    before = device.get_device()
    device.set_device(place)
    try:
        yield
    finally:
        device.set_device(before)


def torch_place(device: str = "auto") -> str:
    """Resolve `--device` for PyTorch, whose name of a GPU is `cuda:N`.

    Raises:
        UsageError: the name is unknown, or the machine has no such device.
    """
    kind, index = parse_device(device)
    torch = import_framework("torch")
    gpus = torch.cuda.device_count() if torch.version.cuda or torch.version.hip else None
    return _place(device, kind, index, gpus, "cuda", "PyTorch")


def parse_device(device: str) -> tuple[str, int]:
    """Split `--device` (auto, cpu, gpu, gpu:N) into its kind and the number of the GPU.

    Raises:
        UsageError: another name; the message says which one is meant, where that is clear.
    """
    device = str(device)
    kind, _, index = device.partition(":")
    if kind in ("auto", "cpu", "gpu") and (not index or (kind == "gpu" and _NUMBER.fullmatch(index))):
        return kind, int(index or 0)
    meant = _GPU.fullmatch(device.strip())
    remedy = ""
    if meant and device:
        remedy = f"; a GPU is called gpu{f':{int(meant[1])}' if meant[1] else ''} here"
    elif kind.lower() in ("mps", "metal", "xpu", "npu", "tpu", "rocm", "hip"):
        remedy = "; only NVIDIA's GPUs are supported, use cpu"
    raise UsageError(f"--device {device[:40]!r}: expected auto, cpu, gpu or gpu:N{remedy}")


_NUMBER = re.compile(r"[0-9]{1,3}")
_GPU = re.compile(r"(?:cuda|gpu|nvidia)?[:_ -]?([0-9]{1,3})?", re.IGNORECASE)
_GPU_BUILD = {
    "Paddle": "the way that www.paddlepaddle.org.cn/en/install/quick describes for your CUDA "
    "(paddlepaddle-gpu from Paddle's own package index, in place of paddlepaddle)",
    "PyTorch": "the way that pytorch.org/get-started/locally describes for your CUDA",
}


def _place(device: str, kind: str, index: int, gpus: int | None, gpu_name: str, framework: str) -> str:
    """Return the framework's name of a device; `gpus`: how many it sees, None in a build for CPUs only."""
    if kind == "cpu" or (kind == "auto" and not gpus):
        return "cpu"
    if gpus is None:
        raise UsageError(
            f"--device {device}: the CPU build of {framework} is installed, which uses no GPU; install the GPU build "
            f"{_GPU_BUILD[framework]}, or use --device cpu"
        )
    if index >= gpus:
        sees = f"{framework} sees {gpus} GPU(s) here" if gpus else f"{framework} sees no GPU or no driver of one here"
        remedy = f"use gpu:0 to gpu:{gpus - 1}" if gpus else "nvidia-smi should list it; else use --device cpu"
        raise UsageError(f"--device {device}: {sees}; {remedy}")
    return f"{gpu_name}:{index}"
