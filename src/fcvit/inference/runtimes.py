"""Run an exported network: one class for each runtime, a file in, arrays out.

Each takes the images as the file wants them (float32 normalized or uint8, see `Interface`), (B, 3, H, W) with B
from 1, and gives the outputs in the order of the file. A batch is cut into pieces, each computed by one
thread: images share nothing, so threads need not wait for each other after every layer, and a piece's
feature maps stay in the cache of its core. A single image gets all threads. The file may be deleted
once it is loaded.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from fcvit.errors import MissingExtra, UsageError
from fcvit.frameworks import import_framework, quiet_standard_output
from fcvit.interrupts import signal_stack_kept

INSTALL = {
    "onnxruntime": "pip install 'fcvit[onnx]'",
    "openvino": "pip install 'fcvit[openvino]'",
}


class Runtime(Protocol):
    """A loaded file."""

    def __call__(self, images: np.ndarray, /) -> list[np.ndarray]:
        """(B, 3, H, W), B from 1 -> the outputs."""
        ...


def pieces(images: int, threads: int, most: int) -> list[slice]:
    """A batch in pieces of at most `most` images, no fewer than threads where there are as many images."""
    step = max(1, min(-(-images // threads), most))
    return [slice(start, start + step) for start in range(0, images, step)]


class OnnxRuntime:
    """An .onnx file on ONNX Runtime's CPU provider, in float32 or as the file is quantized."""

    _PIECE = 2  # images: measured in benchmarks/inference.py; larger ones leave the cache

    def __init__(self, path: Path, threads: int, precision: str = "float32"):
        if precision not in ("float32", "int8"):
            raise UsageError(f"--precision {precision}: ONNX Runtime has only float32 and int8 on a CPU")
        self.threads = threads
        self.package = import_runtime("onnxruntime")
        self.content = path.read_bytes()  # the file may be gone when `single` is made
        self.whole = self._session(threads)
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def _session(self, threads: int) -> Any:
        options = self.package.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors; they are raised besides
        return self.package.InferenceSession(self.content, options, providers=["CPUExecutionProvider"])

    @functools.cached_property
    def single(self) -> Any:
        """The network by one thread, which several may use at once."""
        return self._session(1)

    def __call__(self, images: np.ndarray, /) -> list[np.ndarray]:
        (given,) = self.whole.get_inputs()
        if len(images) == 1 or self.pool is None:
            return self.whole.run(None, {given.name: images})
        return _parallel(
            self.pool, lambda part: self.single.run(None, {given.name: part}), images, self.threads, self._PIECE
        )


_OPENVINO_TYPES = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}  # int8 is in the file itself


class OpenVino:
    """An .onnx file or OpenVINO's IR (.xml) on the CPU, in float32 or bfloat16."""

    _PIECE = 8

    def __init__(self, path: Path, threads: int, precision: str = "float32"):
        if precision not in _OPENVINO_TYPES:
            raise UsageError(f"--precision {precision}: OpenVINO has float32, bfloat16 and int8 on a CPU")
        self.threads, self.precision = threads, precision
        self.package = import_runtime("openvino")
        core = self.package.Core()
        wanted = {"bfloat16": "BF16"}.get(precision)
        if wanted and wanted not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise UsageError(f"--precision {precision}: this processor does not have it; use float32")
        # OpenVINO looks for NumPy at its first array; two threads that do so at once wait for each other forever.
        _ = self.package.Tensor(np.zeros(1, np.float32)).data
        self.model = core.read_model(str(path))
        self.core = core
        self.whole = self._compiled(1)
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def _compiled(self, streams: int) -> Any:
        options = {
            "INFERENCE_PRECISION_HINT": _OPENVINO_TYPES[self.precision],
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": streams,
        }
        with signal_stack_kept():  # OpenVINO makes one, and frees it together with the core
            return self.core.compile_model(self.model, "CPU", options)

    @functools.cached_property
    def single(self) -> Any:
        """The network in as many streams as threads."""
        return self._compiled(self.threads)

    def __call__(self, images: np.ndarray, /) -> list[np.ndarray]:
        if len(images) == 1 or self.pool is None:
            return self._infer(self.whole, images)
        return _parallel(self.pool, lambda part: self._infer(self.single, part), images, self.threads, self._PIECE)

    @staticmethod
    def _infer(compiled: Any, images: np.ndarray) -> list[np.ndarray]:
        request = compiled.create_infer_request()  # one belongs to one thread
        found = request.infer({0: images})
        return [np.array(found[index]) for index in range(len(found))]


class PaddleInference:
    """Paddle's inference format on its own predictor, by oneDNN; `path` is the .json beside the .pdiparams."""

    def __init__(self, path: Path, threads: int, precision: str = "float32"):
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
        self.predictor = inference.create_predictor(config)
        self.shapes: set[tuple[int, ...]] = set()  # seen so far

    def __call__(self, images: np.ndarray, /) -> list[np.ndarray]:
        (name,) = self.predictor.get_input_names()
        self.predictor.get_input_handle(name).copy_from_cpu(np.ascontiguousarray(images))
        # The kernels it chooses for a new shape each print a line.
        with contextlib.nullcontext() if images.shape in self.shapes else quiet_standard_output():
            self.predictor.run()
        self.shapes.add(images.shape)
        return [self.predictor.get_output_handle(name).copy_to_cpu() for name in self.predictor.get_output_names()]


RUNTIMES: dict[str, Callable[..., Runtime]] = {
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "paddle-inference": PaddleInference,
}


def import_runtime(package: str) -> ModuleType:
    """Import the package of a runtime.

    Raises:
        MissingExtra: it is not installed, or does not load on this machine.
    """
    # ONNX Runtime 1.32 reports its use to Microsoft from the import on, unless this is set.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        if package == "paddle-inference":
            return import_framework("paddle")
        return importlib.import_module(package)
    except ImportError as error:
        if isinstance(error, MissingExtra):
            raise
        raise MissingExtra(f"{package} cannot be had ({error}); install it with: {INSTALL[package]}") from error


def _parallel(
    pool: ThreadPoolExecutor,
    compute: Callable[[np.ndarray], list[np.ndarray]],
    images: np.ndarray,
    threads: int,
    most: int,
) -> list[np.ndarray]:
    found = list(pool.map(compute, [images[part] for part in pieces(len(images), threads, most)]))
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]
