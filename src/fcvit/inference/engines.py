"""Engines that compute the outputs of a network for a batch of images.

`paddle` and `torch` run the network itself. `native` is this package's engine in C++. `onnxruntime`, `openvino` and
`paddle-inference` run an export, which is written at the first use. `native` and exports are checked at the first use
(`fcvit.inference.cache`). `FileEngine` runs the files of `fcvit export`.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from fcvit.data.transforms.preprocess import normalize
from fcvit.data.transforms.segmentation import normalize as normalize_padded
from fcvit.errors import FcvitError, MissingExtra, NumbersDisagree, UnreadableFile, UsageError
from fcvit.frameworks import import_framework, on_paddle_device, paddle_place, parse_device, torch_place
from fcvit.inference import cache
from fcvit.inference.detector import (
    BINS,
    TRUNK,
    checked,
    detect_with_parts,
    detector_layers,
    part_outputs,
    parts,
    run_part,
)
from fcvit.inference.exported import ExportedWeights
from fcvit.inference.interface import Interface, input_shape, output_shapes
from fcvit.inference.native_network import NativeNetwork, unsupported
from fcvit.inference.runtimes import DYNAMIC, INSTALL, RUNTIMES, Network
from fcvit.interrupts import held_back
from fcvit.machine import own_threads
from fcvit.models.mask_rcnn.detections import Detections
from fcvit.models.spec import HEADS
from fcvit.models.variants import Preprocessing
from fcvit.native import build
from fcvit.text import one_line
from fcvit.weights.reading import Weights

logger = logging.getLogger("fcvit")

Precision = Literal["float32", "float16", "bfloat16", "int8"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
AUTO = "auto"
_OTHER_SIZE = "export with --size or --dynamic, or for segmentation use --window"
# Engines for a CPU by precision, the fastest first (docs/guides/export.md).
_FASTEST = {
    "float32": ("native", "onnxruntime", "openvino", "torch", "paddle"),
    "bfloat16": ("openvino", "torch"),
}


class Engine:
    """A network with its weights on a device.

    Attributes:
        name: A key of `ENGINES`.
        device: Device name in the framework's notation, "cpu" for a CPU.
        precision: One of `PRECISIONS`.
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
        check: bool = True,
    ):
        self.weights, self.preprocessing, self.precision = weights, preprocessing, precision
        self.threads, self.calibration, self.check = threads, calibration, check
        self.load(device)

    def load(self, device: str) -> None:
        """Load the network onto the device."""
        raise NotImplementedError

    def compute(self, images: np.ndarray) -> list[np.ndarray]:
        """Return all outputs for a batch of at least one image, in one of the formats of `__call__`."""
        raise NotImplementedError

    def find(
        self, images: np.ndarray, image_sizes: np.ndarray, scale_factors: np.ndarray | None
    ) -> Sequence[Detections]:
        """Return the detections in at least one image, normalized float32. See `detect`."""
        raise NotImplementedError

    def __call__(self, images: np.ndarray) -> Any:
        """Compute the outputs of the network for a batch. For a detector, these are the outputs of its trunk.

        Args:
            images: uint8 RGB or normalized float32, (B, 3, H, W). B may be 0.

        Returns:
            float32 outputs with the batch as first dimension: an array if the network has one output, for example
            the logits, otherwise a list of arrays.

        Raises:
            UsageError: The images have another type or shape.
        """
        _require_images(images)
        if len(images):
            outputs = self.compute(images)
        else:
            spec = self.weights.spec
            shapes = part_outputs(spec, parts(spec)[0], images.shape[2], images.shape[3])
            outputs = [np.zeros((0, *shape), np.float32) for shape in shapes.values()]
        return outputs[0] if len(outputs) == 1 else outputs

    def detect(
        self,
        images: np.ndarray,
        image_sizes: np.ndarray | Sequence[tuple[int, int]],
        scale_factors: np.ndarray | Sequence[np.ndarray] | None = None,
    ) -> list[Detections]:
        """Return the detections in each image. The network must be a detector.

        Args:
            images: uint8 RGB, or float32 that is normalized and 0 in the padding, (B, 3, H, W). B may be 0.
            image_sizes: Height and width of each image without its padding on the right and below, (B, 2).
            scale_factors: New over old width, height, width and height of each image, (B, 4). The boxes are then in
                pixels of the original images, otherwise in pixels of the input.

        Raises:
            UsageError: The images have another type or shape.
            NumbersDisagree: The outputs of the network are not finite.
        """
        _require_images(images)
        if not len(images):
            return []
        scales = None if scale_factors is None else np.asarray(scale_factors)
        return list(self.find(self.normalized(images, image_sizes), np.asarray(image_sizes), scales))

    def normalized(
        self, images: np.ndarray, image_sizes: np.ndarray | Sequence[tuple[int, int]] | None = None
    ) -> np.ndarray:
        """Normalize uint8 images. With image sizes, round like the authors, and set the padding to 0."""
        if images.dtype != np.uint8:
            return images
        if image_sizes is None:
            return normalize(images, self.preprocessing)
        return normalize_padded(
            images, self.preprocessing, [(int(height), int(width)) for height, width in image_sizes]
        )


def _require_images(images: np.ndarray) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.shape[2] or not images.shape[3]:
        raise UsageError(f"images of shape {images.shape}: expected (batch, 3, height, width)")
    if images.dtype not in (np.uint8, np.float32):
        raise UsageError(f"images of type {images.dtype}: expected uint8 (RGB) or float32 (normalized)")


class PaddleEngine(Engine):
    """The Paddle network. Half precision uses Paddle's automatic mixed precision."""

    name = "paddle"

    def load(self, device: str) -> None:
        from fcvit.models.build import build_network

        self.device = paddle_place(device)
        self.paddle = import_framework("paddle")
        amp, on_gpu = self.paddle.amp, self.device != "cpu"
        has = {"float32": True, "float16": on_gpu and amp.is_float16_supported()}
        has["bfloat16"] = on_gpu and amp.is_bfloat16_supported()
        if not has.get(self.precision):  # on a CPU, Paddle would silently compute in float32
            raise UsageError(f"--precision {self.precision}: Paddle does not support it on {self.device}; use float32")
        if self.threads is not None and not on_gpu:
            self.paddle.base.core.set_num_threads(self.threads)
        with on_paddle_device(self.device):
            self.model: Any = build_network(self.weights)
        for name, layer in detector_layers(self.model, self.weights.spec).items():
            layer.register_forward_post_hook(checked(name, lambda x: x.astype("float32")))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Compute on the device, in the precision and without gradients."""
        half = self.precision != "float32"
        cast = self.paddle.amp.auto_cast(enable=half, dtype=self.precision if half else "float16")
        with held_back(), on_paddle_device(self.device), self.paddle.no_grad(), cast:
            yield

    def compute(self, images: np.ndarray) -> list[np.ndarray]:
        batch = self.normalized(images)
        with self.running():
            outputs = run_part(self.model, parts(self.weights.spec)[0], self.paddle.to_tensor(batch))
            return [output.astype("float32").numpy() for output in outputs]

    def find(
        self, images: np.ndarray, image_sizes: np.ndarray, scale_factors: np.ndarray | None
    ) -> Sequence[Detections]:
        with self.running():
            return self.model(self.paddle.to_tensor(images), image_sizes, scale_factors)


def accelerate(model: Any) -> None:
    """Run a Paddle network with the native operators on the CPU. See `fcvit.native.network.accelerate`."""
    from fcvit.native import network  # imports Paddle

    network.accelerate(model)


class TorchEngine(Engine):
    """The PyTorch reference. Half precision uses PyTorch's automatic mixed precision."""

    name = "torch"

    def load(self, device: str) -> None:
        self.device = torch_place(device)
        self.torch = import_framework("torch")
        if self.precision == "int8" or (self.precision == "float16" and self.device == "cpu"):
            raise UsageError(
                f"--precision {self.precision}: PyTorch does not support it on {self.device}; use float32 or bfloat16"
            )
        from fcvit.reference.build import build_reference

        if self.threads is not None and self.device == "cpu":
            self.torch.set_num_threads(self.threads)
        self.model: Any = build_reference(self.weights.spec, self.weights.tensors).to(self.device)
        for name, layer in detector_layers(self.model, self.weights.spec).items():
            layer.register_forward_hook(checked(name, lambda x: x.float()))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Compute in the precision and without gradients."""
        half = self.precision != "float32"
        dtype = getattr(self.torch, self.precision) if half else self.torch.bfloat16
        with self.torch.inference_mode(), self.torch.autocast(self.device.partition(":")[0], dtype, enabled=half):
            yield

    def compute(self, images: np.ndarray) -> list[np.ndarray]:
        batch = self.torch.from_numpy(self.normalized(images)).to(self.device)
        with self.running():
            outputs = run_part(self.model, parts(self.weights.spec)[0], batch)
            return [output.float().cpu().numpy() for output in outputs]

    def find(
        self, images: np.ndarray, image_sizes: np.ndarray, scale_factors: np.ndarray | None
    ) -> Sequence[Detections]:
        with self.running():
            results = self.model(self.torch.from_numpy(images).to(self.device), image_sizes, scale_factors)
        arrays = [[x if x is None else x.cpu().numpy() for x in result] for result in results]
        return list(itertools.starmap(Detections, arrays))


class ExportedEngine(Engine):
    """An export of the network, run by a CPU runtime.

    Each image size and data type has its own export, unless the head accepts any size and the runtime supports it.
    """

    network: Callable[..., Network]  # the network for an image size, type of pixels and part

    def __init__(self, *arguments: Any, name: str, **options: Any):
        self.name = name
        super().__init__(*arguments, **options)

    def load(self, device: str) -> None:
        if (self.precision == "int8") != (self.calibration is not None):
            raise UsageError("precision int8 and calibration images must be passed together")
        if device not in ("auto", "cpu"):
            raise UsageError(f"--device {device}: {self.name} runs only on the CPU; use --engine paddle")
        self.network = functools.cache(self._load)
        size = self._size(*2 * (self.preprocessing.input_size,))
        names = parts(self.weights.spec)
        if names != ("",) and (size or self.calibration is not None):
            problem = "int8" if size is None else f"--engine {self.name}"
            raise UsageError(f"{problem} is not available for detectors; use onnxruntime or openvino in float32")
        for part in names:  # report missing packages and wrong numbers now
            self.network(size, uint8=not part, part=part)

    def _size(self, height: int, width: int) -> tuple[int, int] | None:
        any_size = HEADS[self.weights.spec.head].any_size and self.name in DYNAMIC
        return None if any_size else (height, width)

    def _load(self, size: tuple[int, int] | None, uint8: bool, part: str) -> Network:
        interface = Interface(size, uint8, False, self.preprocessing, part)
        export = (self.weights, interface, self.name, self.calibration)
        # All RoIs of a head are computed at once, because many weights are read for each batch.
        options = (self.threads or own_threads(), self.precision, part not in BINS)
        with cache.exported(*export) as path:
            try:
                return RUNTIMES[self.name](path, *options)
            except Exception:
                if path.exists():
                    raise
        # The entry was deleted after it was checked.
        with cache.exported(*export, use_cache=False) as path:
            return RUNTIMES[self.name](path, *options)

    def compute(self, images: np.ndarray) -> list[np.ndarray]:
        if parts(self.weights.spec) != ("",):
            return self.network(None, uint8=False, part=TRUNK)(self.normalized(images))
        return self.network(self._size(*images.shape[2:]), uint8=images.dtype == np.uint8, part="")(images)

    def find(
        self, images: np.ndarray, image_sizes: np.ndarray, scale_factors: np.ndarray | None
    ) -> Sequence[Detections]:
        spec = self.weights.spec
        networks = {part: self.network(None, uint8=False, part=part) for part in parts(spec)}
        return detect_with_parts(networks, spec.options, images, image_sizes, scale_factors)


class NativeEngine(ExportedEngine):
    """This package's engine in C++, in float32. It needs no export, and one network takes images of any size and type.

    Loading compiles the library if it is not in the cache.
    """

    def load(self, device: str) -> None:
        if self.precision != "float32":
            raise UsageError(f"--precision {self.precision}: the native engine computes only in float32")
        if device not in ("auto", "cpu"):
            raise UsageError(f"--device {device}: the native engine runs only on the CPU; use --engine paddle")
        if reason := unsupported(self.weights.spec):
            raise MissingExtra(f"{reason}; use --engine onnxruntime")
        networks: dict[str, Network] = {
            part: NativeNetwork(self.weights, self.preprocessing, self.threads or own_threads(), part)
            for part in parts(self.weights.spec)
        }
        if self.check:
            cache.check_once(self.weights, networks, self.preprocessing, build.key())
        self.network = lambda size, uint8, part: networks[part]


class FileEngine(ExportedEngine):
    """The files of an export, run as they are: with their image size, type of pixels and precision."""

    def load(self, device: str) -> None:
        assert isinstance(self.weights, ExportedWeights)
        path, given = self.weights.source.path, self.preprocessing
        self.graphs = self.weights.graphs
        if device not in ("auto", "cpu"):
            raise UsageError(f"--device {device}: {path} runs only on the CPU; pass the checkpoint")
        networks: dict[str, Network] = {}
        for part, (file, interface) in self.graphs.items():
            known = interface.preprocessing
            if interface.uint8 and (known.mean, known.std) != (given.mean, given.std):
                raise UsageError(f"{path}: the export normalizes with its own mean and std; they cannot be changed")
            networks[part] = self._run_once(file, interface)
        self.network = lambda size, uint8, part: networks[part]

    def _run_once(self, file: Path, interface: Interface) -> Network:
        """Load a graph, and check the shapes of its outputs for one input."""
        fixed = dataclasses.replace(interface, size=interface.size or (64, 64))
        shape = [side or 0 for side in input_shape(self.weights.spec, fixed)[1]]
        try:
            options = (self.threads or own_threads(), self.precision, interface.part not in BINS)
            network = RUNTIMES[self.name](file, *options)
            outputs = network(np.zeros((1, *shape), np.uint8 if interface.uint8 else np.float32))
        except FcvitError:
            raise
        except Exception as error:  # runtimes raise errors of their own
            raise UnreadableFile(f"{file}: {self.name} cannot run it: {one_line(error)}") from error
        expected = output_shapes(self.weights.spec, fixed)
        if [output.shape[1:] for output in outputs] != [*expected.values()]:
            raise UnreadableFile(f"{file}: the shapes of the outputs differ from those in the description")
        return network

    def compute(self, images: np.ndarray) -> list[np.ndarray]:
        if parts(self.weights.spec) != ("",):
            return super().compute(images)
        path, (_, interface) = self.weights.source.path, self.graphs[""]
        if interface.size not in (None, images.shape[2:]):
            expected, given = (" x ".join(map(str, size or ())) for size in (interface.size, images.shape[2:]))
            raise UsageError(f"{path}: the export takes images of {expected}, but they have {given}; {_OTHER_SIZE}")
        if interface.uint8 and images.dtype != np.uint8:
            raise UsageError(f"{path}: the export takes uint8 images, but they are normalized; pass the checkpoint")
        outputs = self.network(None, uint8=False, part="")(images if interface.uint8 else self.normalized(images))
        if not interface.probabilities:
            return outputs
        # The softmax of the logarithm of probabilities gives the probabilities.
        return [np.log(np.maximum(output, np.finfo(np.float32).tiny)) for output in outputs]


ENGINES: dict[str, Callable[..., Engine]] = {
    "paddle": PaddleEngine,
    "native": functools.partial(NativeEngine, name="native"),
    "torch": TorchEngine,
    **{name: functools.partial(ExportedEngine, name=name) for name in RUNTIMES},
}
"""Name -> function that creates the engine, with the arguments of `Engine`."""
_NAMES = ", ".join(ENGINES)
CHOICES = (
    f"auto (the fastest installed engine that passes the numerical check), {_NAMES} "
    "(native: this package's engine in C++)"
)
"""The values of `--engine`, for its help text."""


def create_engine(
    name: str,
    weights: Weights,
    preprocessing: Preprocessing,
    device: str = "auto",
    precision: str = "float32",
    threads: int | None = None,
    calibration: np.ndarray | None = None,
    check: bool = True,
) -> Engine:
    """Create an engine for the given weights.

    Args:
        name: A key of `ENGINES`, or "auto": Paddle on a GPU, and on a CPU the fastest installed engine that passes
            the numerical check.
        weights: Weights of any network. Those of an export are run by its runtime.
        preprocessing: Mean and standard deviation of the images, and the image size of the first export.
        device: auto, cpu, gpu or gpu:N.
        precision: One of `PRECISIONS`.
        threads: Number of CPU threads. Some frameworks can only change it for the entire process. None keeps the
            framework's setting, and uses one thread per core for the native engine and an export.
        calibration: uint8 images (B, 3, H, W) for int8, which only engines that run exports support.
        check: False skips the numerical check of the native engine, for weights that are used only once. Exports are
            always checked.

    Raises:
        UsageError: The engine, device or precision is unknown, or the device does not support the precision.
        MissingExtra: The framework is not installed.
        NumbersDisagree: The outputs of the export do not match the weights.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision!r}: expected {', '.join(PRECISIONS)}")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise UsageError(f"--threads {threads!r:.40}: expected an integer of at least 1")
    parse_device(device)
    if name != AUTO and name not in ENGINES:
        raise UsageError(f"--engine {name!r}: expected {AUTO}, {', '.join(ENGINES)}")
    logger.debug(f"engine {name}: device {device}, {precision}, threads {threads or 'default'}")
    arguments = (weights, preprocessing, device, precision, threads)
    if isinstance(weights, ExportedWeights):
        if name not in (AUTO, weights.runtime):
            raise UsageError(f"--engine {name}: {weights.source.path} is run by {weights.runtime}; omit --engine")
        known = weights.precision
        if "int8" in (precision, known) and precision not in ("float32", known):
            raise UsageError(f"--precision {precision}: {weights.source.path} has {known}; omit --precision")
        precision = "int8" if known == "int8" else precision
        return FileEngine(weights, preprocessing, device, precision, threads, name=weights.runtime)
    return _fastest(*arguments) if name == AUTO else ENGINES[name](*arguments, calibration, check)


def _fastest(weights: Weights, preprocessing: Preprocessing, device: str, *options: Any) -> Engine:
    on_gpu = device.startswith("gpu") or (device == "auto" and _has_gpu())
    precision = options[0]
    names = ("paddle",) if on_gpu else _FASTEST.get(precision, ("paddle",))
    reasons: list[str] = []
    faster = ""
    for name in names:
        if name == "native" and not unsupported(weights.spec) and not build.is_built():
            faster = f"; for a faster engine: {build.COMMAND}"  # compiling takes too long for a short command
            continue
        try:
            engine = ENGINES[name](weights, preprocessing, device, *options)
        except (MissingExtra, NumbersDisagree) as error:
            if on_gpu:
                raise
            reasons.append(f"{name}: {error}")
            log = logger.info if isinstance(error, NumbersDisagree) else logger.debug
            log(f"skipping engine {reasons[-1]}")
            if isinstance(error, MissingExtra) and name in INSTALL and not faster:
                faster = f"; for a faster engine: {INSTALL[name]}"
        else:
            logger.info(f"engine: {engine.name}{faster}")
            return engine
    raise MissingExtra(f"no engine is available for {precision}: {reasons[-1]}")


def _has_gpu() -> bool:
    """Return whether Paddle finds a GPU, without importing a build of Paddle that has no GPU support."""
    try:
        return bool(importlib.metadata.version("paddlepaddle-gpu")) and paddle_place() != "cpu"
    except (importlib.metadata.PackageNotFoundError, FcvitError):
        return False
