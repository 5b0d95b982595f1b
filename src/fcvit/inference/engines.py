"""Engines: a batch of images in, logits out.

Every engine takes uint8 RGB or normalized float32, (B, 3, H, W) with B from 0, and gives float32 (B, classes).
`paddle`, `native` and `torch` hold the network itself; `onnxruntime`, `openvino` and `paddle-inference` an
export of it, made and checked at the first use (`fcvit.inference.cache`).
"""

import functools
import importlib.metadata
import logging
from typing import Protocol

import numpy as np

from fcvit.data.transforms.preprocess import normalize
from fcvit.errors import FcvitError, MissingExtra, NumbersDisagree, UsageError
from fcvit.frameworks import import_framework, on_paddle_device, paddle_place, parse_device, torch_place
from fcvit.inference import cache
from fcvit.inference.interface import Interface
from fcvit.inference.runtimes import INSTALL, RUNTIMES, Runtime
from fcvit.interrupts import held_back
from fcvit.machine import available_threads
from fcvit.models.variants import Preprocessing
from fcvit.weights.reading import Weights

logger = logging.getLogger("fcvit")

ENGINES = ("paddle", "native", "torch", "onnxruntime", "openvino", "paddle-inference")
PRECISIONS = ("float32", "float16", "bfloat16", "int8")
AUTO = "auto"
# On a CPU, the fastest first (docs/inference.md).
_FASTEST = {
    "float32": ("onnxruntime", "openvino", "native", "torch", "paddle"),
    "bfloat16": ("openvino", "torch"),
}


class Engine(Protocol):
    """What the tasks need of whatever computes the logits."""

    name: str
    device: str
    precision: str

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 RGB or normalized float32 (B, 3, H, W) -> float32 (B, classes)."""
        ...


def create_engine(
    name: str,
    weights: Weights,
    preprocessing: Preprocessing,
    device: str = "auto",
    precision: str = "float32",
    threads: int | None = None,
    calibration: np.ndarray | None = None,
) -> Engine:
    """The engine of that name, holding these weights.

    Args:
        name: one of `ENGINES`, or "auto": Paddle on a GPU; on a CPU the fastest one that is installed and
            computes the right numbers.
        weights: a classifier's.
        preprocessing: mean and standard deviation of the images, and the size that an export is made for now.
        device: auto, cpu, gpu or gpu:N.
        precision: one of `PRECISIONS`.
        threads: that compute on a CPU, in the whole process where a framework knows no other way; None: those of the
            framework as it stands, for an export one for each core.
        calibration: uint8 images (B, 3, H, W) for int8, which only engines on exports have.

    Raises:
        UsageError: no such engine, device or precision, or the device does not have the precision.
        MissingExtra: its framework is not installed.
        NumbersDisagree: the export that it needs computes other numbers than the weights say.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision!r}: expected {', '.join(PRECISIONS)}")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise UsageError(f"--threads {threads!r:.40}: expected a whole number, at least 1")
    parse_device(device)
    given = (weights, preprocessing, device, precision, threads)
    if name == AUTO:
        return _fastest(*given)
    if name in RUNTIMES:
        return ExportedEngine(name, *given, calibration)
    held = {"paddle": PaddleEngine, "native": NativeEngine, "torch": TorchEngine}
    if name not in held:
        raise UsageError(f"--engine {name!r}: expected {AUTO}, {', '.join(ENGINES)}")
    return held[name](*given)


def _fastest(
    weights: Weights,
    preprocessing: Preprocessing,
    device: str,
    precision: str,
    threads: int | None,
) -> Engine:
    given = (weights, preprocessing, device, precision, threads)
    if device.startswith("gpu") or (device == "auto" and _has_gpu()):
        engine = PaddleEngine(*given)
        logger.info(f"engine: {engine.name}")
        return engine
    refused: list[str] = []
    faster = ""
    for name in _FASTEST.get(precision, ("paddle",)):
        try:
            engine = create_engine(name, *given)
        except (MissingExtra, NumbersDisagree) as error:
            refused.append(f"{name}: {error}")
            if isinstance(error, NumbersDisagree):
                logger.info(f"engine {name} is passed over: {error}")
            elif name in INSTALL and not faster:
                faster = f"; a faster one: {INSTALL[name]}"
        else:
            logger.info(f"engine: {name}{faster}")
            return engine
    raise MissingExtra(f"no engine can compute in {precision} here; {refused[-1]}")


def _has_gpu() -> bool:
    """Whether Paddle would find one, without importing a build that has none."""
    try:
        return bool(importlib.metadata.version("paddlepaddle-gpu")) and paddle_place() != "cpu"
    except (importlib.metadata.PackageNotFoundError, FcvitError):
        return False


def check_input(images: np.ndarray) -> None:
    """Nothing, for uint8 or float32 (B, 3, H, W).

    Raises:
        UsageError: another type or shape.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.shape[2] or not images.shape[3]:
        raise UsageError(f"images of shape {images.shape}: expected (batch, 3, height, width)")
    if images.dtype not in (np.uint8, np.float32):
        raise UsageError(f"images of type {images.dtype}: expected uint8 (RGB) or float32 (normalized)")


def as_input(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """What a network takes: uint8 images normalized, float32 ones as they are.

    Raises:
        UsageError: another type or shape.
    """
    check_input(images)
    return normalize(images, preprocessing) if images.dtype == np.uint8 else images


class PaddleEngine:
    """The Paddle network, as it is; in half precision by Paddle's automatic mixed precision."""

    name = "paddle"

    def __init__(
        self,
        weights: Weights,
        preprocessing: Preprocessing,
        device: str = "auto",
        precision: str = "float32",
        threads: int | None = None,
    ):
        from fcvit.models.build import build_classifier

        self.device = paddle_place(device)
        self.precision = precision
        self.paddle = import_framework("paddle")
        amp = self.paddle.amp
        has = {"float32": True, "float16": self.device != "cpu" and amp.is_float16_supported()}
        has["bfloat16"] = self.device != "cpu" and amp.is_bfloat16_supported()
        if not has.get(precision):  # on the CPU Paddle would compute in float32 and not say so
            raise UsageError(f"--precision {precision}: Paddle does not have it on {self.device}; use float32")
        if threads is not None and self.device == "cpu":
            self.paddle.base.core.set_num_threads(threads)
        with on_paddle_device(self.device):
            self.model = build_classifier(weights)
        self.preprocessing = preprocessing

    def __call__(self, images: np.ndarray) -> np.ndarray:
        given = as_input(images, self.preprocessing)
        if not len(given):
            return np.zeros((0, self.model.num_classes), np.float32)
        half = self.precision != "float32"
        cast = self.paddle.amp.auto_cast(enable=half, dtype=self.precision if half else "float16")
        with held_back(), on_paddle_device(self.device), self.paddle.no_grad(), cast:
            logits = self.model(self.paddle.to_tensor(given))
            return logits.astype("float32").numpy()


class NativeEngine(PaddleEngine):
    """The Paddle network by our own operators, on a CPU; float32 as it trains there."""

    name = "native"

    def __init__(
        self,
        weights: Weights,
        preprocessing: Preprocessing,
        device: str = "auto",
        precision: str = "float32",
        threads: int | None = None,
    ):
        super().__init__(weights, preprocessing, "cpu" if device == "auto" else device, precision, threads)
        if self.device != "cpu":
            raise UsageError(f"--device {device}: the native operators are for the CPU; use --engine paddle")
        from fcvit.native import build
        from fcvit.native.network import accelerate

        accelerate(self.model)
        if threads is not None:
            build.operators().omp_set_num_threads(threads)


class TorchEngine:
    """The PyTorch twin, as it is; in half precision by PyTorch's automatic mixed precision."""

    name = "torch"

    def __init__(
        self,
        weights: Weights,
        preprocessing: Preprocessing,
        device: str = "auto",
        precision: str = "float32",
        threads: int | None = None,
    ):
        self.device = torch_place(device)
        self.precision = precision
        self.torch = import_framework("torch")
        if precision == "int8" or (precision == "float16" and self.device == "cpu"):
            raise UsageError(
                f"--precision {precision}: PyTorch does not have it on {self.device}; use float32 or bfloat16"
            )
        from fcvit.reference.network import build_reference

        if threads is not None and self.device == "cpu":
            self.torch.set_num_threads(threads)
        self.model = build_reference(weights.spec, weights.tensors).to(self.device)
        self.classes = weights.spec.num_classes
        self.preprocessing = preprocessing

    def __call__(self, images: np.ndarray) -> np.ndarray:
        given = as_input(images, self.preprocessing)
        if not len(given):
            return np.zeros((0, self.classes), np.float32)
        half = self.precision != "float32"
        dtype = getattr(self.torch, self.precision) if half else self.torch.bfloat16
        cast = self.torch.autocast(self.device.partition(":")[0], dtype, enabled=half)
        with self.torch.inference_mode(), cast:
            batch = self.torch.from_numpy(given).to(self.device)
            return self.model(batch).float().cpu().numpy()


class ExportedEngine:
    """An export of the network, run by a runtime for CPUs; one for each image size and type that comes along."""

    device = "cpu"

    def __init__(
        self,
        name: str,
        weights: Weights,
        preprocessing: Preprocessing,
        device: str = "auto",
        precision: str = "float32",
        threads: int | None = None,
        calibration: np.ndarray | None = None,
    ):
        if (precision == "int8") != (calibration is not None):
            raise UsageError("int8 and calibration images go together")
        if device not in ("auto", "cpu"):
            raise UsageError(f"--device {device}: {name} is used on the CPU; use --engine paddle")
        self.name, self.precision = name, precision
        self.weights, self.preprocessing = weights, preprocessing
        self.threads, self.calibration = threads or available_threads(), calibration
        self.loaded = functools.cache(self._load)
        size = preprocessing.input_size
        self.loaded((size, size), uint8=True)  # what is missing or wrong is said now

    def _load(self, size: tuple[int, int], uint8: bool) -> Runtime:
        interface = Interface(size, uint8, False, self.preprocessing)
        given = (self.weights, interface, self.name, self.calibration)
        with cache.exported(*given) as path:
            try:
                return RUNTIMES[self.name](path, self.threads, self.precision)
            except Exception:
                if path.exists():
                    raise
        # Somebody deleted the entry after it was checked.
        with cache.exported(*given, use_cache=False) as path:
            return RUNTIMES[self.name](path, self.threads, self.precision)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        check_input(images)
        if not len(images):
            return np.zeros((0, self.weights.spec.num_classes), np.float32)
        size = (images.shape[2], images.shape[3])
        return self.loaded(size, uint8=images.dtype == np.uint8)(images)[0]
