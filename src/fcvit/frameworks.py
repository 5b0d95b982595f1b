"""Import PaddlePaddle, PyTorch, OpenCV or pycocotools without side effects, or raise an error with the remedy.

Only the modules that define networks import a framework at module level. Importing Paddle warns about
a compiler cache and adds a handler to the root logger. Both are suppressed.
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
    "cv2": "pip install 'fcvit[dense]'",
    "pycocotools": "pip install 'fcvit[dense]'",
}


_PADDLE_HANDLES = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGSEGV", "SIGILL", "SIGFPE", "SIGABRT", "SIGBUS")
    if hasattr(signal, name)  # Windows has no SIGBUS
]
_handlers_restored = False  # whether the signal handlers set by Paddle's import were undone
_SIGACTION = 512  # bytes, more than any system's `struct sigaction`


def installed(framework: str) -> bool:
    """Return whether `framework` ("paddle" or "torch") is installed, without importing it."""
    return importlib.util.find_spec(framework) is not None


def import_framework(framework: str) -> ModuleType:
    """Import "paddle", "torch", "cv2", or a module of pycocotools.

    Raises:
        MissingExtra: The framework is not installed, or does not load on this machine.
        KeyboardInterrupt: The import was interrupted. Raised after the import, which an interruption would damage.
    """
    # The libraries read these variables once, when they load. Values set by the user take precedence.
    os.environ.setdefault("GLOG_minloglevel", "2")
    # Threads that spin while waiting occupy the cores of the threads they wait for. A training step
    # was 30 times slower while another process was busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(held_back())
            if framework == "paddle":
                stack.enter_context(_restored_sigterm() if framework in sys.modules else _preserved_signal_handlers())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            return importlib.import_module(framework)
    except ImportError as error:
        package = framework.partition(".")[0]
        if error.name in (framework, package):
            reason = f"{package} is not installed; install it with: {INSTALL[package]}"
        elif "libgomp" in str(error):
            reason = f"{framework} does not load ({error}); install the system package libgomp1"
        else:
            reason = f"{framework} does not load ({error}); reinstall it with: {INSTALL[package]}"
        raise MissingExtra(reason) from error
    finally:
        root.handlers[:], root.level = handlers, level


@contextlib.contextmanager
def _preserved_signal_handlers() -> Iterator[None]:
    """Undo the signal handlers that Paddle's import sets, which print to the standard output and end the process.

    This uses the C library, because Python sets handlers only in the main thread and does not know the handlers
    of other libraries. The handlers are restored at every import that Paddle makes. Otherwise Paddle's handlers
    would be active for half a second.
    """
    global _handlers_restored
    if os.name != "posix":
        with _restored_sigterm():
            yield
        return
    _handlers_restored = True
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
def _restored_sigterm() -> Iterator[None]:
    """Restore Python's SIGTERM handler, once, if Paddle was imported before this package did it."""
    global _handlers_restored
    before = signal.getsignal(signal.SIGTERM)
    yield
    if not _handlers_restored and threading.current_thread() is threading.main_thread():
        _handlers_restored = True
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def quiet_standard_output() -> Iterator[None]:
    """Discard everything that this process, including C++ code, prints to the standard output."""
    sys.stdout.flush()
    standard_output = os.dup(1)
    try:
        with Path(os.devnull).open("w") as discard:
            os.dup2(discard.fileno(), 1)
        yield
    finally:
        with contextlib.suppress(OSError, TypeError):
            ctypes.CDLL(None).fflush(None)  # otherwise C's buffer would be printed later
        os.dup2(standard_output, 1)
        os.close(standard_output)


def paddle_place(device: str = "auto") -> str:
    """Resolve `--device` (auto, cpu, gpu, gpu:N) to Paddle's device name, and check that the device is available.

    `auto` selects the first GPU, or the CPU if Paddle finds no GPU.

    Raises:
        UsageError: The name is unknown, or the device is not available.
    """
    kind, index = parse_device(device)
    paddle = import_framework("paddle")
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else None
    return _place(device, kind, index, gpus, "gpu", "Paddle")


@contextlib.contextmanager
def on_paddle_device(place: str) -> Iterator[None]:
    """Set Paddle's global device for a block, and restore the previous device afterwards."""
    device = import_framework("paddle").device
    before = device.get_device()
    device.set_device(place)
    try:
        yield
    finally:
        device.set_device(before)


def torch_place(device: str = "auto") -> str:
    """Resolve `--device` to PyTorch's device name, which is `cuda:N` for a GPU.

    Raises:
        UsageError: The name is unknown, or the device is not available.
    """
    kind, index = parse_device(device)
    torch = import_framework("torch")
    gpus = torch.cuda.device_count() if torch.version.cuda or torch.version.hip else None
    return _place(device, kind, index, gpus, "cuda", "PyTorch")


def parse_device(device: str) -> tuple[str, int]:
    """Split `--device` (auto, cpu, gpu, gpu:N) into its kind and the GPU number.

    Raises:
        UsageError: The name is unknown. The message suggests the intended name if it is clear.
    """
    device = str(device)
    kind, _, index = device.partition(":")
    if kind in ("auto", "cpu", "gpu") and (not index or (kind == "gpu" and _NUMBER.fullmatch(index))):
        return kind, int(index or 0)
    meant = _GPU.fullmatch(device.strip())
    remedy = ""
    if meant and device:
        remedy = f"; for this GPU use gpu{f':{int(meant[1])}' if meant[1] else ''}"
    elif kind.lower() in ("mps", "metal", "xpu", "npu", "tpu", "rocm", "hip"):
        remedy = "; only NVIDIA GPUs are supported, use cpu"
    raise UsageError(f"--device {device[:40]!r}: expected auto, cpu, gpu or gpu:N{remedy}")


_NUMBER = re.compile(r"[0-9]{1,3}")
_GPU = re.compile(r"(?:cuda|gpu|nvidia)?[:_ -]?([0-9]{1,3})?", re.IGNORECASE)
_GPU_BUILD = {
    "Paddle": "for your CUDA version as described at www.paddlepaddle.org.cn/en/install/quick "
    "(paddlepaddle-gpu from Paddle's own package index, instead of paddlepaddle)",
    "PyTorch": "for your CUDA version as described at pytorch.org/get-started/locally",
}


def _place(device: str, kind: str, index: int, gpus: int | None, gpu_name: str, framework: str) -> str:
    """Return the framework's name of a device.

    Args:
        device: The value of `--device`, for messages.
        kind, index: The result of `parse_device`.
        gpus: Number of GPUs that the framework finds, or None for a CPU build.
        gpu_name: The framework's name of a GPU, without the number.
        framework: Name of the framework, for messages.
    """
    if kind == "cpu" or (kind == "auto" and not gpus):
        return "cpu"
    if gpus is None:
        raise UsageError(
            f"--device {device}: the CPU build of {framework} is installed; install the GPU build "
            f"{_GPU_BUILD[framework]}, or use --device cpu"
        )
    if index >= gpus:
        problem = f"{framework} finds {gpus} GPU(s)" if gpus else f"{framework} finds no GPU or no GPU driver"
        remedy = f"use gpu:0 to gpu:{gpus - 1}" if gpus else "check that nvidia-smi lists it, or use --device cpu"
        raise UsageError(f"--device {device}: {problem}; {remedy}")
    return f"{gpu_name}:{index}"
