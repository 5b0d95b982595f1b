"""Load exported networks into inference runtimes, with one function per runtime.

A loaded network takes images (B, 3, H, W), B at least 1, in the format of its `Interface`. It returns its outputs in
the order of the file. The file may be deleted after it is loaded.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from fcvit.errors import MissingExtra, UsageError
from fcvit.frameworks import import_framework, quiet_standard_output
from fcvit.interrupts import signal_stack_kept

Network: TypeAlias = Callable[[np.ndarray], list[np.ndarray]]

INSTALL = {"onnxruntime": "pip install 'fcvit[onnx]'", "openvino": "pip install 'fcvit[openvino]'"}


def pieces(images: int, threads: int, largest: int) -> list[slice]:
    """Split a batch into slices of at most `largest` images, at least one per thread if there are enough images."""
    step = max(1, min(-(-images // threads), largest))
    return [slice(start, start + step) for start in range(0, images, step)]


class _Parallel:
    """A network that computes a single image with all threads, and a batch in pieces with one thread each.

    Images are independent, so threads do not wait for each other after every layer, and the feature maps of a piece
    stay in the cache of one core.
    """

    def __init__(self, load: Callable[[bool], Network], threads: int, largest: int, split: bool):
        """Load the network with `load(one_thread)`, which is True for pieces and False for single images.

        Without `split`, a batch is computed at once with all threads.
        """
        self.load, self.threads, self.largest = load, threads, largest
        self.all_threads = load(False)
        self.pool = ThreadPoolExecutor(threads) if threads > 1 and split else None

    @functools.cached_property
    def one_thread(self) -> Network:
        return self.load(True)

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        if len(images) == 1 or self.pool is None:
            return self.all_threads(images)
        parts = [images[part] for part in pieces(len(images), self.threads, self.largest)]
        return [np.concatenate(outputs) for outputs in zip(*self.pool.map(self.one_thread, parts), strict=True)]


def onnxruntime(path: Path, threads: int, precision: str = "float32", split: bool = True) -> Network:
    """Load a float32 or int8 .onnx file with ONNX Runtime's CPU provider."""
    if precision not in ("float32", "int8"):
        raise UsageError(f"--precision {precision}: ONNX Runtime supports only float32 and int8 on a CPU")
    package = import_runtime("onnxruntime")
    content = path.read_bytes()  # the file may be deleted before the second session is created

    def load(one_thread: bool) -> Network:
        options = package.SessionOptions()
        options.intra_op_num_threads = 1 if one_thread else threads
        options.log_severity_level = 3  # log only errors, which are also raised
        session = package.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: session.run(None, {name: images})

    return _Parallel(load, threads, 2, split)  # larger pieces exceed the cache (benchmarks/inference.py)


_OPENVINO_TYPES = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}  # an int8 file is already quantized


def openvino(path: Path, threads: int, precision: str = "float32", split: bool = True) -> Network:
    """Load an .onnx file or OpenVINO's IR (.xml) on the CPU, in float32, bfloat16 or int8."""
    if precision not in _OPENVINO_TYPES:
        raise UsageError(f"--precision {precision}: OpenVINO supports only float32, bfloat16 and int8 on a CPU")
    package = import_runtime("openvino")
    core = package.Core()
    if precision == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UsageError(f"--precision {precision}: this processor does not support it; use float32")
    # OpenVINO imports NumPy for its first array. Two threads that do so at once deadlock.
    _ = package.Tensor(np.zeros(1, np.float32)).data
    model = core.read_model(str(path))

    def load(one_thread: bool) -> Network:
        options = {
            "INFERENCE_PRECISION_HINT": _OPENVINO_TYPES[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads if one_thread else 1,
        }
        with signal_stack_kept():  # OpenVINO installs its own stack and frees it with the core
            compiled = core.compile_model(model, "CPU", options)

        def infer(images: np.ndarray) -> list[np.ndarray]:
            outputs = compiled.create_infer_request().infer({0: images})  # threads must not share a request
            return [np.array(outputs[index]) for index in range(len(outputs))]

        return infer

    return _Parallel(load, threads, 8, split)


def paddle_inference(path: Path, threads: int, precision: str = "float32", split: bool = True) -> Network:
    """Load a .json file and its .pdiparams file with Paddle Inference and oneDNN, which never splits a batch."""
    if precision != "float32":
        raise UsageError(f"--precision {precision}: Paddle Inference supports only float32 in this package")
    import_framework("paddle")
    inference = importlib.import_module("paddle.inference")
    config = inference.Config(str(path), str(path.with_suffix(".pdiparams")))
    config.disable_gpu()
    config.disable_glog_info()
    config.enable_mkldnn()
    # In Paddle 3.3.1 this pass silently computes wrong numbers in the normalization of the similarity.
    config.delete_pass("inplace_pass")
    config.set_cpu_math_library_num_threads(threads)
    predictor: Any = inference.create_predictor(config)
    known_shapes: set[tuple[int, ...]] = set()

    def run(images: np.ndarray) -> list[np.ndarray]:
        (name,) = predictor.get_input_names()
        predictor.get_input_handle(name).copy_from_cpu(np.ascontiguousarray(images))
        # Paddle prints a line for every kernel that it selects for a new shape.
        with contextlib.nullcontext() if images.shape in known_shapes else quiet_standard_output():
            predictor.run()
        known_shapes.add(images.shape)
        return [predictor.get_output_handle(name).copy_to_cpu() for name in predictor.get_output_names()]

    return run


RUNTIMES: dict[str, Callable[..., Network]] = {
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "paddle-inference": paddle_inference,
}
"""Name -> function that loads a file, given its path, the number of threads, the precision (default float32), and
whether a batch is computed in pieces (default True)."""
DYNAMIC = ("onnxruntime", "openvino")
"""Runtimes of exports that accept images of any size."""


def import_runtime(package: str) -> ModuleType:
    """Import the package of a runtime, or a module of that package.

    Raises:
        MissingExtra: The package is not installed, or cannot be loaded on this machine.
    """
    # Without this setting, ONNX Runtime 1.32 sends usage data to Microsoft as soon as it is imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    if package == "paddle-inference":
        return import_framework("paddle")
    try:
        return importlib.import_module(package)
    except ImportError as error:
        install = INSTALL[package.partition(".")[0]]
        raise MissingExtra(f"{package} is not available ({error}); install it with: {install}") from error
