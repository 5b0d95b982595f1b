"""Run an exported network: one function for each runtime, a file in, the network out.

A network takes images as the file wants them (see `Interface`), (B, 3, H, W) with B from 1, and returns its outputs
in the order of the file. The file may be deleted once it is loaded.
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
    """Cut a batch into pieces of at most `largest` images, and at least one for each thread where it suffices."""
    step = max(1, min(-(-images // threads), largest))
    return [slice(start, start + step) for start in range(0, images, step)]


class _Parallel:
    """Compute a single image with all threads, but a batch in pieces, each by one thread.

    Images share nothing: threads need not wait for each other after every layer, and the feature maps of a piece stay
    in the cache of its core.
    """

    def __init__(self, load: Callable[[bool], Network], threads: int, largest: int):
        """`load` returns the network for pieces, one thread each (True), or for one call at a time (False)."""
        self.load, self.threads, self.largest = load, threads, largest
        self.whole = load(False)
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None

    @functools.cached_property
    def single(self) -> Network:
        return self.load(True)

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        if len(images) == 1 or self.pool is None:
            return self.whole(images)
        parts = [images[part] for part in pieces(len(images), self.threads, self.largest)]
        return [np.concatenate(outputs) for outputs in zip(*self.pool.map(self.single, parts), strict=True)]


def onnxruntime(path: Path, threads: int, precision: str = "float32") -> Network:
    """Load an .onnx file into ONNX Runtime's CPU provider, in float32 or as the file is quantized."""
    if precision not in ("float32", "int8"):
        raise UsageError(f"--precision {precision}: ONNX Runtime has only float32 and int8 on a CPU")
    package = import_runtime("onnxruntime")
    content = path.read_bytes()  # the file may be gone when the second session is created

    def load(single: bool) -> Network:
        options = package.SessionOptions()
        options.intra_op_num_threads = 1 if single else threads
        options.log_severity_level = 3  # errors; they are raised besides
        session = package.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: session.run(None, {name: images})

    return _Parallel(load, threads, largest=2)  # measured in benchmarks/inference.py; larger pieces leave the cache


_OPENVINO_TYPES = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}  # int8 is in the file itself


def openvino(path: Path, threads: int, precision: str = "float32") -> Network:
    """Load an .onnx file or OpenVINO's IR (.xml) for the CPU, in float32 or bfloat16."""
    if precision not in _OPENVINO_TYPES:
        raise UsageError(f"--precision {precision}: OpenVINO has float32, bfloat16 and int8 on a CPU")
    package = import_runtime("openvino")
    core = package.Core()
    if precision == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UsageError(f"--precision {precision}: this processor does not have it; use float32")
    # OpenVINO looks for NumPy at its first array; two threads that do so at once wait for each other forever.
    _ = package.Tensor(np.zeros(1, np.float32)).data
    model = core.read_model(str(path))

    def load(single: bool) -> Network:
        options = {
            "INFERENCE_PRECISION_HINT": _OPENVINO_TYPES[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads if single else 1,
        }
        with signal_stack_kept():  # OpenVINO makes one, and frees it together with the core
            compiled = core.compile_model(model, "CPU", options)

        def infer(images: np.ndarray) -> list[np.ndarray]:
            outputs = compiled.create_infer_request().infer({0: images})  # a request belongs to one thread
            return [np.array(outputs[index]) for index in range(len(outputs))]

        return infer

    return _Parallel(load, threads, largest=8)


def paddle_inference(path: Path, threads: int, precision: str = "float32") -> Network:
    """Load Paddle's inference format, .json with its .pdiparams beside it, into its own predictor with oneDNN."""
    if precision != "float32":
        raise UsageError(f"--precision {precision}: Paddle Inference is used in float32 only")
    import_framework("paddle")
    inference = importlib.import_module("paddle.inference")
    config = inference.Config(str(path), str(path.with_suffix(".pdiparams")))
    config.disable_gpu()
    config.disable_glog_info()
    config.enable_mkldnn()
    # In Paddle 3.3.1 this pass makes the normalization of the similarity wrong, without an error.
    config.delete_pass("inplace_pass")
    config.set_cpu_math_library_num_threads(threads)
    predictor: Any = inference.create_predictor(config)
    known_shapes: set[tuple[int, ...]] = set()

    def run(images: np.ndarray) -> list[np.ndarray]:
        (name,) = predictor.get_input_names()
        predictor.get_input_handle(name).copy_from_cpu(np.ascontiguousarray(images))
        # The kernels it chooses for a new shape each print a line.
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
"""Name -> what loads a file: path, number of threads, precision (float32 unless given)."""


def import_runtime(package: str) -> ModuleType:
    """Import the package of a runtime, or a module of it.

    Raises:
        MissingExtra: it is not installed, or does not load on this machine.
    """
    # ONNX Runtime 1.32 reports its use to Microsoft from the import on, unless this is set.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    if package == "paddle-inference":
        return import_framework("paddle")
    try:
        return importlib.import_module(package)
    except ImportError as error:
        install = INSTALL[package.partition(".")[0]]
        raise MissingExtra(f"{package} is not available ({error}); install it with: {install}") from error
