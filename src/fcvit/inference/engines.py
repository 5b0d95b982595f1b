"""Engines: a batch of images in, the outputs of the network out.

`paddle`, `native` and `torch` hold the network itself; `onnxruntime`, `openvino` and `paddle-inference` an
export of it, written and checked at the first use (`fcvit.inference.cache`).
"""

import functools
import importlib.metadata
import logging
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np

from fcvit.data.transforms.preprocess import normalize
from fcvit.errors import FcvitError, MissingExtra, NumbersDisagree, UsageError
from fcvit.frameworks import import_framework, on_paddle_device, paddle_place, parse_device, torch_place
from fcvit.inference import cache
from fcvit.inference.interface import Interface, as_list
from fcvit.inference.runtimes import INSTALL, RUNTIMES, Network
from fcvit.interrupts import held_back
from fcvit.machine import available_threads
from fcvit.models.variants import Preprocessing
from fcvit.weights.reading import Weights

logger = logging.getLogger("fcvit")

Precision = Literal["float32", "float16", "bfloat16", "int8"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
AUTO = "auto"
# On a CPU, the fastest first (docs/inference.md).
_FASTEST = {
    "float32": ("onnxruntime", "openvino", "native", "torch", "paddle"),
    "bfloat16": ("openvino", "torch"),
}


class Engine:
    """A network with its weights on a device.

    Attributes:
        name: a key of `ENGINES`.
        device: as its framework calls it, "cpu" on a CPU.
        precision: one of `PRECISIONS`.
    """

    name: str
    device = "cpu"

    def __init__(
        self,
        weights: Weights,
        preprocessing: Preprocessing,
        device: str = "auto",
        precision: str = "float32",
        threads: int | None = None,
        calibration: np.ndarray | None = None,
    ):
        self.weights, self.preprocessing, self.precision = weights, preprocessing, precision
        self.threads, self.calibration = threads, calibration
        self.load(device)

    def load(self, device: str) -> None:
        """Get ready for the first batch."""
        raise NotImplementedError

    def compute(self, images: np.ndarray) -> list[np.ndarray]:
        """Return all outputs for images as in a call, at least one."""
        raise NotImplementedError

    def __call__(self, images: np.ndarray) -> Any:
        """Compute the outputs of the network for a batch.

        Args:
            images: uint8 RGB or normalized float32, (B, 3, H, W), B from 0.

        Returns:
            float32, B first: the array of a network with one output, such as the logits; else the list of all.

        Raises:
            UsageError: images of another type or shape.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.shape[2] or not images.shape[3]:
            raise UsageError(f"images of shape {images.shape}: expected (batch, 3, height, width)")
        if images.dtype not in (np.uint8, np.float32):
            raise UsageError(f"images of type {images.dtype}: expected uint8 (RGB) or float32 (normalized)")
        if len(images):
            outputs = self.compute(images)
        else:
            shapes = self.weights.spec.outputs(images.shape[2], images.shape[3])
            outputs = [np.zeros((0, *shape), np.float32) for shape in shapes.values()]
        return outputs[0] if len(outputs) == 1 else outputs

    def normalized(self, images: np.ndarray) -> np.ndarray:
        return normalize(images, self.preprocessing) if images.dtype == np.uint8 else images


class PaddleEngine(Engine):
    """The Paddle network as it is; in half precision by Paddle's automatic mixed precision."""

    name = "paddle"

    def load(self, device: str) -> None:
        from fcvit.models.build import build_network

        self.device = paddle_place(device)
        self.paddle = import_framework("paddle")
        amp, on_gpu = self.paddle.amp, self.device != "cpu"
        has = {"float32": True, "float16": on_gpu and amp.is_float16_supported()}
        has["bfloat16"] = on_gpu and amp.is_bfloat16_supported()
        if not has.get(self.precision):  # on the CPU Paddle would compute in float32 and not say so
            raise UsageError(f"--precision {self.precision}: Paddle does not have it on {self.device}; use float32")
        if self.threads is not None and not on_gpu:
            self.paddle.base.core.set_num_threads(self.threads)
        with on_paddle_device(self.device):
            self.model: Any = build_network(self.weights)

    def compute(self, images: np.ndarray) -> list[np.ndarray]:
        batch = self.normalized(images)
        half = self.precision != "float32"
        cast = self.paddle.amp.auto_cast(enable=half, dtype=self.precision if half else "float16")
        with held_back(), on_paddle_device(self.device), self.paddle.no_grad(), cast:
            outputs = as_list(self.model(self.paddle.to_tensor(batch)))
            return [output.astype("float32").numpy() for output in outputs]


class NativeEngine(PaddleEngine):
    """The Paddle network by our own operators, on a CPU; float32 as it trains there."""

    name = "native"

    def load(self, device: str) -> None:
        super().load("cpu" if device == "auto" else device)
        if self.device != "cpu":
            raise UsageError(f"--device {device}: the native operators are for the CPU; use --engine paddle")
        accelerate(self.model, self.threads)


def accelerate(model: Any, threads: int | None = None) -> None:
    """Let the native operators compute a Paddle network on the CPU, as `fcvit.native.network.accelerate` does.

    Nothing else imports `fcvit.native`.
    """
    from fcvit.native import build, network

    network.accelerate(model)
    if threads is not None:
        build.operators().omp_set_num_threads(threads)


class TorchEngine(Engine):
    """The PyTorch reference as it is; in half precision by PyTorch's automatic mixed precision."""

    name = "torch"

    def load(self, device: str) -> None:
        self.device = torch_place(device)
        self.torch = import_framework("torch")
        if self.precision == "int8" or (self.precision == "float16" and self.device == "cpu"):
            raise UsageError(
                f"--precision {self.precision}: PyTorch does not have it on {self.device}; use float32 or bfloat16"
            )
        from fcvit.reference.build import build_reference

        if self.threads is not None and self.device == "cpu":
            self.torch.set_num_threads(self.threads)
        self.model: Any = build_reference(self.weights.spec, self.weights.tensors).to(self.device)

    def compute(self, images: np.ndarray) -> list[np.ndarray]:
        half = self.precision != "float32"
        dtype = getattr(self.torch, self.precision) if half else self.torch.bfloat16
        cast = self.torch.autocast(self.device.partition(":")[0], dtype, enabled=half)
        with self.torch.inference_mode(), cast:
            outputs = as_list(self.model(self.torch.from_numpy(self.normalized(images)).to(self.device)))
            return [output.float().cpu().numpy() for output in outputs]


class ExportedEngine(Engine):
    """An export of the network, run by a runtime for CPUs; one for each image size and type that comes along."""

    def __init__(self, *arguments: Any, name: str, **options: Any):
        self.name = name
        super().__init__(*arguments, **options)

    def load(self, device: str) -> None:
        if (self.precision == "int8") != (self.calibration is not None):
            raise UsageError("int8 and calibration images go together")
        if device not in ("auto", "cpu"):
            raise UsageError(f"--device {device}: {self.name} is used on the CPU; use --engine paddle")
        self.network = functools.cache(self._load)
        size = self.preprocessing.input_size
        self.network((size, size), uint8=True)  # what is missing or wrong is reported now

    def _load(self, size: tuple[int, int], uint8: bool) -> Network:
        interface = Interface(size, uint8, False, self.preprocessing)
        export = (self.weights, interface, self.name, self.calibration)
        options = (self.threads or available_threads(), self.precision)
        with cache.exported(*export) as path:
            try:
                return RUNTIMES[self.name](path, *options)
            except Exception:
                if path.exists():
                    raise
        # Somebody deleted the entry after it was checked.
        with cache.exported(*export, use_cache=False) as path:
            return RUNTIMES[self.name](path, *options)

    def compute(self, images: np.ndarray) -> list[np.ndarray]:
        return self.network((images.shape[2], images.shape[3]), uint8=images.dtype == np.uint8)(images)


ENGINES: dict[str, Callable[..., Engine]] = {
    "paddle": PaddleEngine,
    "native": NativeEngine,
    "torch": TorchEngine,
    **{name: functools.partial(ExportedEngine, name=name) for name in RUNTIMES},
}
"""Name -> what creates it, with the arguments of `Engine`."""
_NAMES = ", ".join(ENGINES)
CHOICES = f"auto (the fastest installed engine that passes the numerical check), {_NAMES} (native: our CPU operators)"
"""The values of `--engine` for its help."""


def create_engine(
    name: str,
    weights: Weights,
    preprocessing: Preprocessing,
    device: str = "auto",
    precision: str = "float32",
    threads: int | None = None,
    calibration: np.ndarray | None = None,
) -> Engine:
    """Create the engine of that name for these weights.

    Args:
        name: a key of `ENGINES`, or "auto": Paddle on a GPU; on a CPU the fastest one that is installed and
            computes the right numbers.
        weights: of any network.
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
    if name != AUTO and name not in ENGINES:
        raise UsageError(f"--engine {name!r}: expected {AUTO}, {', '.join(ENGINES)}")
    logger.debug(f"engine {name}: device {device}, {precision}, threads {threads or 'by default'}")
    arguments = (weights, preprocessing, device, precision, threads)
    return _fastest(*arguments) if name == AUTO else ENGINES[name](*arguments, calibration)


def _fastest(weights: Weights, preprocessing: Preprocessing, device: str, *options: Any) -> Engine:
    on_gpu = device.startswith("gpu") or (device == "auto" and _has_gpu())
    precision = options[0]
    names = ("paddle",) if on_gpu else _FASTEST.get(precision, ("paddle",))
    reasons: list[str] = []
    faster = ""
    for name in names:
        try:
            engine = ENGINES[name](weights, preprocessing, device, *options)
        except (MissingExtra, NumbersDisagree) as error:
            if on_gpu:
                raise
            reasons.append(f"{name}: {error}")
            if isinstance(error, NumbersDisagree):
                logger.info(f"engine {name} is passed over: {error}")
            elif name in INSTALL and not faster:
                faster = f"; a faster one: {INSTALL[name]}"
        else:
            logger.info(f"engine: {engine.name}{faster}")
            return engine
    raise MissingExtra(f"no engine can compute in {precision} here; {reasons[-1]}")


def _has_gpu() -> bool:
    """Return whether Paddle would find a GPU, without importing a build that has no support for them."""
    try:
        return bool(importlib.metadata.version("paddlepaddle-gpu")) and paddle_place() != "cpu"
    except (importlib.metadata.PackageNotFoundError, FcvitError):
        return False
