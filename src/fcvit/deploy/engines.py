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

ENGINES = ("paddle", "torch")


class Engine(Protocol):
    """What the tasks need of whatever computes the logits."""

    name: str
    device: str

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 RGB or normalised float32 (B, 3, H, W) -> float32 (B, classes)."""
        ...


def create_engine(name: str, weights: Weights, preprocessing: Preprocessing, device: str = "auto") -> Engine:
    """The engine of that name, holding these weights.

    Raises:
        UsageError: no such engine or device.
        MissingExtra: its framework is not installed.
    """
    if name == "paddle":
        return PaddleEngine(weights, preprocessing, device)
    if name == "torch":
        return TorchEngine(weights, preprocessing, device)
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
    """The Paddle network, as it is."""

    name = "paddle"

    def __init__(self, weights: Weights, preprocessing: Preprocessing, device: str = "auto"):
        from fcvit.loading import build_classifier

        self.device = paddle_place(device)
        self.paddle = import_framework("paddle")
        with on_paddle_device(self.device):
            self.model = build_classifier(weights)
        self.preprocessing = preprocessing

    def __call__(self, images: np.ndarray) -> np.ndarray:
        with on_paddle_device(self.device), self.paddle.no_grad():
            return self.model(self.paddle.to_tensor(as_input(images, self.preprocessing))).numpy()


class TorchEngine:
    """The PyTorch twin, as it is."""

    name = "torch"

    def __init__(self, weights: Weights, preprocessing: Preprocessing, device: str = "auto"):
        self.device = torch_place(device)
        self.torch = import_framework("torch")
        from fcvit.torch_twin import build_twin

        self.model = build_twin(weights.form, weights.tensors).to(self.device)
        self.preprocessing = preprocessing

    def __call__(self, images: np.ndarray) -> np.ndarray:
        with self.torch.inference_mode():
            batch = self.torch.from_numpy(as_input(images, self.preprocessing)).to(self.device)
            return self.model(batch).cpu().numpy()
