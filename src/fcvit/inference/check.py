"""Check an exported network against its weights by the float32 error ratio on real images.

Exporters and runtimes have produced wrong numbers without an error, so every export is run before it is used or
published. It is compared with the network in float64. Its error is divided by the error of the network in float32,
computed with PyTorch if it is installed and otherwise with Paddle. Paddle's float32 error is larger, so the limit
for the same file is then wider by about half.
"""

import dataclasses
from importlib import resources

import numpy as np
from PIL import Image

from fcvit.errors import MissingExtra, NumbersDisagree
from fcvit.frameworks import INSTALL, import_framework, installed, on_paddle_device
from fcvit.inference.detector import BINS, run_part
from fcvit.inference.interface import Interface, output_shapes
from fcvit.inference.runtimes import Network
from fcvit.metrics.classification import softmax
from fcvit.models.spec import ModelSpec
from fcvit.verification.equivalence import RATIO_LIMIT, error_ratio, images_needed
from fcvit.weights.reading import Weights
from fcvit.weights.synthetic import synthetic_input

CHECKED_SIZES = ((96, 128), (97, 65))  # heights and widths with which an export for any size is checked
_FEATURES = 4  # number of RoIs with which a head is checked


@dataclasses.dataclass(frozen=True)
class Check:
    """The measured error of an export.

    Attributes:
        images: Number, height and width of the images, or of the RoI features.
        yardstick: The framework that computed the float32 error to compare with: "torch" or "paddle".
        ratio: RMS error of the export over the RMS error of that framework, over all images. It is the largest ratio of
            the groups of outputs, such as the maps, with all images in one batch and with each image alone.
        largest: Largest absolute difference from float64.
        part: Part of a detector, or "".
    """

    images: tuple[int, int, int]
    yardstick: str
    ratio: float
    largest: float
    part: str = ""

    @property
    def passed(self) -> bool:
        return self.ratio <= RATIO_LIMIT


def check_export(network: Network, weights: Weights, interface: Interface, images: np.ndarray, what: str) -> Check:
    """Compare the outputs of an export and of its source network for `images`.

    Args:
        network: The loaded export.
        weights: Weights that the export was made from.
        interface: Interface of the export.
        images: Input of the export, from `sample_inputs` or uint8 RGB (B, 3, H, W), B at least 1.
        what: Name of the export for the error message.

    Raises:
        MissingExtra: Neither PyTorch nor Paddle is installed.
        NumbersDisagree: The error is too large.
    """
    exact, single, yardstick = reference(weights, interface, images)
    batch = pixels(images, interface)
    together = network(batch)
    # Pool the images: the error ratio over the few logits of one image varies too much.
    alone = [np.concatenate(parts) for parts in zip(*(network(image[None]) for image in batch), strict=True)]
    # The levels of an output belong together: `features.0`, `features.1`.
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(output_shapes(weights.spec, interface)):
        groups.setdefault(name.partition(".")[0], []).append(index)
    ratio = largest = 0.0
    for outputs in (together, alone):
        if [o.shape for o in outputs] != [o.shape for o in exact]:
            outputs = [np.full(o.shape, np.nan, np.float32) for o in exact]
        for group in groups.values():
            values, measure, expected = (
                np.concatenate([run[index].ravel() for index in group]) for run in (outputs, single, exact)
            )
            ratio = max(ratio, error_ratio(values, measure, expected))
            largest = max(largest, float(np.abs(values - expected).max()))
    if not ratio <= RATIO_LIMIT:
        raise NumbersDisagree(
            f"{what}: the outputs do not match the weights, with {ratio:.3g} times the float32 rounding error of "
            f"{yardstick} (limit {RATIO_LIMIT}) and a largest difference of {largest:.2g}"
        )
    return Check((len(images), *images.shape[2:]), yardstick, ratio, largest, interface.part)


def sample_inputs(spec: ModelSpec, interface: Interface) -> list[np.ndarray]:
    """Return batches to check an export with: images, of two sizes if it accepts any, or features of a head."""
    if interface.part not in BINS:
        return [sample_images(spec, size) for size in ((interface.size,) if interface.size else CHECKED_SIZES)]
    side = BINS[interface.part]
    return [synthetic_input((_FEATURES, spec.options.neck, side, side), interface.part)]


def sample_images(spec: ModelSpec, size: tuple[int, int]) -> np.ndarray:
    """Return enlarged handwritten digits from the package, as many as a check needs: uint8 (B, 3, H, W)."""
    with resources.files("fcvit").joinpath("assets/digits_held_out.npz").open("rb") as file:
        digits = np.load(file, allow_pickle=False)["images"]
    height, width = size
    count = images_needed(spec.num_classes or spec.variant.widths[-1], height * width)
    chosen = [Image.fromarray(digit).resize((width, height), Image.Resampling.BICUBIC) for digit in digits[:count]]
    gray = np.stack([np.asarray(image) for image in chosen])
    # Three different channels: with equal channels, exchanging them would go unnoticed.
    return np.stack([gray, 255 - gray, np.roll(gray, 1, axis=0)], axis=1)


def pixels(images: np.ndarray, interface: Interface) -> np.ndarray:
    """Return uint8 images in the form that the interface takes, normalized in float64 where needed.

    Features of a head are not changed.
    """
    return images if interface.uint8 or interface.part in BINS else _normalized(images, interface).astype(np.float32)


def _normalized(images: np.ndarray, interface: Interface) -> np.ndarray:
    if interface.part in BINS:
        return images.astype(np.float64)
    mean, std = (np.array(v)[:, None, None] for v in (interface.preprocessing.mean, interface.preprocessing.std))
    return (images / 255 - mean) / std


def require_reference() -> None:
    """Check that PyTorch or Paddle is installed.

    Raises:
        MissingExtra: Neither is installed.
    """
    if not (installed("torch") or installed("paddle")):
        raise MissingExtra(f"engines are checked against PyTorch or Paddle; install one: {INSTALL['paddle']}")


def reference(
    weights: Weights, interface: Interface, images: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray], str]:
    """Return the float64 outputs, the float32 outputs and the framework that computed them.

    Raises:
        MissingExtra: Neither PyTorch nor Paddle is installed.
        NumbersDisagree: The float32 outputs are not finite, so no runtime can be compared with them.
    """
    require_reference()
    framework = "torch" if installed("torch") else "paddle"
    normalized = _normalized(images, interface)
    exact, single = (
        compute(framework, weights, normalized.astype(dtype), interface.part) for dtype in ("float64", "float32")
    )
    if not all(np.isfinite(output).all() for output in single):
        raise NumbersDisagree(
            f"{weights.source.path}: the float32 outputs are not finite; the weights are damaged or too large"
        )
    if interface.probabilities:
        exact, single = ([softmax(outputs[0]).astype(outputs[0].dtype)] for outputs in (exact, single))
    return exact, single, framework


def compute(framework: str, weights: Weights, images: np.ndarray, part: str = "") -> list[np.ndarray]:
    """Return the outputs of "torch" or "paddle" for normalized images, in the precision of the images.

    For a part of a detector, the images are its input.
    """
    if framework == "torch":
        torch = import_framework("torch")
        from fcvit.reference.build import build_reference

        model = build_reference(weights.spec, weights.tensors, getattr(torch, images.dtype.name))
        with torch.inference_mode():
            return [output.numpy() for output in run_part(model, part, torch.from_numpy(images))]
    paddle = import_framework("paddle")
    from fcvit.models.build import build_network

    with on_paddle_device("cpu"), paddle.no_grad():
        outputs = run_part(build_network(weights, images.dtype.name), part, paddle.to_tensor(images))
    return [output.numpy() for output in outputs]
