"""Check that an exported network computes what its weights say: the float32 error ratio on real images.

Exporters and runtimes have written and computed wrong numbers without an error; so nothing is used or
handed out that was not run. The reference is the network itself in float64, the yardstick its float32,
by PyTorch where it is installed and else by Paddle (whose own error is the larger one, so the limit for the
same file is then wider by about half).
"""

import dataclasses
from importlib import resources

import numpy as np
from PIL import Image

from fcvit.errors import MissingExtra, NumbersDisagree
from fcvit.frameworks import INSTALL, import_framework, installed, on_paddle_device
from fcvit.inference.interface import Interface, as_list
from fcvit.inference.runtimes import Network
from fcvit.metrics.classification import softmax
from fcvit.models.spec import ModelSpec
from fcvit.verification.equivalence import RATIO_LIMIT, error_ratio, images_needed
from fcvit.weights.reading import Weights


@dataclasses.dataclass(frozen=True)
class Check:
    """The error of an export.

    Attributes:
        images: their number, height and width.
        yardstick: the framework whose float32 the error is measured by: "torch" or "paddle".
        ratio: rms error of the export over that of the yardstick, over all images; the larger one of the images
            in one batch and each alone.
        largest: absolute difference from float64.
    """

    images: tuple[int, int, int]
    yardstick: str
    ratio: float
    largest: float

    @property
    def passed(self) -> bool:
        return self.ratio <= RATIO_LIMIT


def check_export(network: Network, weights: Weights, interface: Interface, images: np.ndarray, what: str) -> Check:
    """Run `images` through an export and through the network that it was made from, and compare.

    Args:
        network: the export, loaded.
        weights: what it was made from.
        interface: how it was made.
        images: uint8 RGB (B, 3, H, W), B from 1.
        what: the name of the export in the error.

    Raises:
        MissingExtra: neither PyTorch nor Paddle is installed.
        NumbersDisagree: the error is too large.
    """
    exact, single, yardstick = reference(weights, interface, images)
    expected, measure = (np.concatenate([o.ravel() for o in run]) for run in (exact, single))
    batch = pixels(images, interface)
    together = network(batch)
    # All of them alone: the error of a single image's few logits over that of another's few is a matter of luck.
    alone = [np.concatenate(parts) for parts in zip(*(network(image[None]) for image in batch), strict=True)]
    ratio = largest = 0.0
    for outputs in (together, alone):
        values = np.full(expected.shape, np.nan, np.float32)
        if [o.shape for o in outputs] == [o.shape for o in exact]:
            values = np.concatenate([o.ravel() for o in outputs])
        ratio = max(ratio, error_ratio(values, measure, expected))
        largest = max(largest, float(np.abs(values - expected).max()))
    if not ratio <= RATIO_LIMIT:
        raise NumbersDisagree(
            f"{what} computes other numbers than its weights: {ratio:.3g} times the rounding error of {yardstick}'s "
            f"float32 (limit {RATIO_LIMIT}), largest difference {largest:.2g}"
        )
    return Check((len(images), *images.shape[2:]), yardstick, ratio, largest)


def sample_images(spec: ModelSpec, size: tuple[int, int]) -> np.ndarray:
    """Return the package's handwritten digits, enlarged, as many as a check needs: uint8 (B, 3, H, W)."""
    with resources.files("fcvit").joinpath("assets/digits_held_out.npz").open("rb") as file:
        digits = np.load(file, allow_pickle=False)["images"]
    height, width = size
    count = images_needed(spec.num_classes or spec.variant.widths[-1], height * width)
    chosen = [Image.fromarray(digit).resize((width, height), Image.Resampling.BICUBIC) for digit in digits[:count]]
    gray = np.stack([np.asarray(image) for image in chosen])
    # Each channel of its own, or the network would see but one.
    return np.stack([gray, 255 - gray, np.roll(gray, 1, axis=0)], axis=1)


def pixels(images: np.ndarray, interface: Interface) -> np.ndarray:
    """Return what a network of that interface takes for uint8 images, normalized in float64."""
    return images if interface.uint8 else _normalized(images, interface).astype(np.float32)


def _normalized(images: np.ndarray, interface: Interface) -> np.ndarray:
    mean, std = (np.array(v)[:, None, None] for v in (interface.preprocessing.mean, interface.preprocessing.std))
    return (images / 255 - mean) / std


def require_reference() -> None:
    """Check that PyTorch or Paddle is installed.

    Raises:
        MissingExtra: neither is.
    """
    if not (installed("torch") or installed("paddle")):
        raise MissingExtra(f"an export is checked against PyTorch or Paddle; install one: {INSTALL['paddle']}")


def reference(
    weights: Weights, interface: Interface, images: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray], str]:
    """Return the outputs in float64, those in float32, and the framework that computed them.

    Raises:
        MissingExtra: neither PyTorch nor Paddle is installed.
        NumbersDisagree: numbers that are not finite in float32, which no runtime can be measured by.
    """
    require_reference()
    framework = "torch" if installed("torch") else "paddle"
    normalized = _normalized(images, interface)
    exact, single = (compute(framework, weights, normalized.astype(dtype)) for dtype in ("float64", "float32"))
    if not all(np.isfinite(output).all() for output in single):
        raise NumbersDisagree(
            f"{weights.source.path}: what it computes is not finite in float32; the weights are damaged, or too large"
        )
    if interface.probabilities:
        exact, single = ([softmax(outputs[0]).astype(outputs[0].dtype)] for outputs in (exact, single))
    return exact, single, framework


def compute(framework: str, weights: Weights, images: np.ndarray) -> list[np.ndarray]:
    """Return the outputs for normalized images by "torch" or "paddle", in the precision of the images."""
    if framework == "torch":
        torch = import_framework("torch")
        from fcvit.reference.build import build_reference

        model = build_reference(weights.spec, weights.tensors, getattr(torch, images.dtype.name))
        with torch.inference_mode():
            return [output.numpy() for output in as_list(model(torch.from_numpy(images)))]
    paddle = import_framework("paddle")
    from fcvit.models.build import build_network

    with on_paddle_device("cpu"), paddle.no_grad():
        outputs = build_network(weights, images.dtype.name)(paddle.to_tensor(images))
    return [output.numpy() for output in as_list(outputs)]
