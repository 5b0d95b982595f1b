"""Engines: a batch of images in, logits out.

Every engine takes uint8 RGB or normalised float32, (B, 3, H, W), and gives float32 (B, classes).
"""

from typing import Protocol

import numpy as np

from fcvit.errors import UsageError
from fcvit.frameworks import import_framework, on_paddle_device, paddle_place, torch_place
from fcvit.images.preprocess import normalise
from fcvit.variants import Preprocessing
from fcvit.weights.reading import Weights

ENGINES = ("paddle", "native", "torch")
PRECISIONS = ("float32", "float16", "bfloat16")


class Engine(Protocol):
    """What the tasks need of whatever computes the logits."""

    name: str
    device: str
    precision: str

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 RGB or normalised float32 (B, 3, H, W) -> float32 (B, classes)."""
        ...


def create_engine(
    name: str, weights: Weights, preprocessing: Preprocessing, device: str = "auto", precision: str = "float32"
) -> Engine:
    """The engine of that name, holding these weights.

    Raises:
        UsageError: no such engine, device or precision, or the device does not have the precision.
        MissingExtra: its framework is not installed.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision!r}: expected {', '.join(PRECISIONS)}")
    if name == "paddle":
        return PaddleEngine(weights, preprocessing, device, precision)
    if name == "native":
        return NativeEngine(weights, preprocessing, device, precision)
    if name == "torch":
        return TorchEngine(weights, preprocessing, device, precision)
    raise UsageError(f"--engine {name!r}: expected {', '.join(ENGINES)}")


def as_input(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """What a network takes: uint8 images normalised, float32 ones as they are.

    Raises:
        UsageError: another type or shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise UsageError(f"images of shape {images.shape}: expected (batch, 3, height, width)")
    if images.dtype == np.uint8:
        return normalise(images, preprocessing)
    if images.dtype == np.float32:
        return images
    raise UsageError(f"images of type {images.dtype}: expected uint8 (RGB) or float32 (normalised)")


class PaddleEngine:
    """The Paddle network, as it is; in half precision by Paddle's automatic mixed precision."""

    name = "paddle"

    def __init__(
        self, weights: Weights, preprocessing: Preprocessing, device: str = "auto", precision: str = "float32"
    ):
        from fcvit.loading import build_classifier

        self.device = paddle_place(device)
        self.precision = precision
        self.paddle = import_framework("paddle")
        amp = self.paddle.amp
        has = {"float32": True, "float16": self.device != "cpu" and amp.is_float16_supported()}
        has["bfloat16"] = self.device != "cpu" and amp.is_bfloat16_supported()
        if not has[precision]:  # on the CPU Paddle would compute in float32 and not say so
            raise UsageError(f"--precision {precision}: Paddle does not have it on {self.device}; use float32")
        with on_paddle_device(self.device):
            self.model = build_classifier(weights)
        self.preprocessing = preprocessing

    def __call__(self, images: np.ndarray) -> np.ndarray:
        half = self.precision != "float32"
        cast = self.paddle.amp.auto_cast(enable=half, dtype=self.precision if half else "float16")
        with on_paddle_device(self.device), self.paddle.no_grad(), cast:
            logits = self.model(self.paddle.to_tensor(as_input(images, self.preprocessing)))
            return logits.astype("float32").numpy()


class NativeEngine(PaddleEngine):
    """The Paddle network by our own operators, on a CPU; float32 as it trains there."""

    name = "native"

    def __init__(
        self, weights: Weights, preprocessing: Preprocessing, device: str = "auto", precision: str = "float32"
    ):
        super().__init__(weights, preprocessing, "cpu" if device == "auto" else device, precision)
        if self.device != "cpu":
            raise UsageError(f"--device {device}: the native operators are for the CPU; use --engine paddle")
        from fcvit.native.network import accelerate

        accelerate(self.model)


class TorchEngine:
    """The PyTorch twin, as it is; in half precision by PyTorch's automatic mixed precision."""

    name = "torch"

    def __init__(
        self, weights: Weights, preprocessing: Preprocessing, device: str = "auto", precision: str = "float32"
    ):
        self.device = torch_place(device)
        self.precision = precision
        self.torch = import_framework("torch")
        if precision == "float16" and self.device == "cpu":
            raise UsageError("--precision float16: PyTorch does not have it on the CPU; use float32 or bfloat16")
        from fcvit.torch_twin import build_twin

        self.model = build_twin(weights.form, weights.tensors).to(self.device)
        self.preprocessing = preprocessing

    def __call__(self, images: np.ndarray) -> np.ndarray:
        half = self.precision != "float32"
        dtype = getattr(self.torch, self.precision) if half else self.torch.bfloat16
        cast = self.torch.autocast(self.device.partition(":")[0], dtype, enabled=half)
        with self.torch.inference_mode(), cast:
            batch = self.torch.from_numpy(as_input(images, self.preprocessing)).to(self.device)
            return self.model(batch).float().cpu().numpy()
