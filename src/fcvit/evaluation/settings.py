"""The settings of an evaluation, and the configurations and engines that follow from them."""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from cyclopts import Parameter

from fcvit import run_folder as runs
from fcvit.data.loader import DIGEST
from fcvit.data.transforms.preprocess import decoders
from fcvit.errors import UsageError
from fcvit.evaluation.protocols import AUTHORS, Protocol, protocols
from fcvit.frameworks import parse_device
from fcvit.inference.cache import PACKAGES
from fcvit.inference.engines import AUTO, CHOICES, Engine, Precision, create_engine
from fcvit.inference.exported import ExportedWeights
from fcvit.inference.quantize import calibration_images
from fcvit.models.variants import Preprocessing, resolve_preprocessing
from fcvit.tasks.base import Evaluator
from fcvit.weights.reading import Weights

MOVABLE = {"movable": True}  # metadata of an option with a path, which may be different when a run is resumed
logger = logging.getLogger("fcvit")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that determine the results of an evaluation of any task. `run.json` stores them.

    Args:
        protocol: Preprocessing: authors (the preprocessing of the weights), resize256-bilinear (resize 256 bilinear,
            crop 224), or both.
        engines: An engine in `fcvit.inference.engines.ENGINES`, or auto. Several, as in paddle,torch, are compared.
        batch_size: Batch size. auto uses the largest that fits in memory. Float32 results can differ in the last digits
            between batch sizes.
        device: auto, cpu, gpu or gpu:N.
        precision: float32, or bfloat16, float16 or int8 if the engine supports it. A lower precision is compared with
            float32.
        calibration: Folder of calibration images for int8, for example training images.
        threads: Number of CPU threads (default: one per core).
        ema: Use the EMA weights (--ema) or the raw weights (--no-ema) of a checkpoint that contains both.
        save_logits: Also write the logits to logits.npy.
        preprocessing: Preprocessing fields that replace those of the weights. The protocol is then called "custom".

    Raises:
        UsageError: A value is out of range, or two values contradict each other.
    """

    protocol: Literal["authors", "resize256-bilinear", "both"] = AUTHORS
    engines: Annotated[
        str, Parameter(name="--engine", help=f"{CHOICES}. Several, as in paddle,torch, are compared.")
    ] = AUTO
    batch_size: int | Literal["auto"] = 32
    device: str = "auto"
    precision: Precision = "float32"
    calibration: Annotated[str | None, Parameter(name="--calibrate")] = field(default=None, metadata=MOVABLE)
    threads: int | None = None
    ema: bool | None = None
    save_logits: Annotated[bool, Parameter(negative=())] = False
    preprocessing: Annotated[Mapping[str, Any] | None, Parameter(parse=False)] = None

    def __post_init__(self) -> None:
        if self.calibration is not None:
            object.__setattr__(self, "calibration", absolute(self.calibration))
        parse_device(self.device)
        if self.batch_size != "auto" and (not isinstance(self.batch_size, int) or self.batch_size < 1):
            raise UsageError(f"--batch-size {self.batch_size}: expected auto or a whole number of at least 1")
        if self.preprocessing and self.protocol != AUTHORS:
            raise UsageError(
                f"--protocol {self.protocol} fixes the preprocessing; omit it or the preprocessing options"
            )
        names = self.engines.split(",")
        if not all(names) or len(set(names)) != len(names):
            raise UsageError(f"--engine {self.engines!r}: expected different engines, separated by commas")
        if (self.precision == "int8") != (self.calibration is not None):
            raise UsageError("--precision int8 and --calibrate FOLDER require each other; give both or neither")


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One evaluation configuration: weights, engine, precision and protocol.

    Attributes:
        name: Name of the configuration and of its folder.
        weights: Weights of the network.
        engine: Name of the engine.
        precision: Precision of the computation.
        protocol: Protocol of the preprocessing.
        crop: Index of the preprocessing in `Plan.crops`.
        reference: Index of the configuration with which the outputs are compared, or None for the reference itself.
    """

    name: str
    weights: Weights
    engine: str
    precision: str
    protocol: Protocol
    crop: int
    reference: int | None


class Plan:
    """The configurations, preprocessings and engines of an evaluation, determined before the first batch.

    Args:
        settings: Settings of the run.
        loaded: Weights to evaluate.
        device: Device of this process.
        evaluator: Evaluator of the task for these weights and the data.
        check: See `create_engine`.

    Raises:
        MissingExtra, UsageError: See `create_engine`.
    """

    def __init__(
        self, settings: Settings, loaded: Sequence[Weights], device: str, evaluator: Evaluator, check: bool = True
    ):
        self.settings, self.device, self.evaluator, self.check = settings, device, evaluator, check
        self.dataset = evaluator.dataset
        # float32 is always included, since the loss of accuracy at a lower precision is the difference from it.
        self.precisions = list(dict.fromkeys(["float32", settings.precision]))
        self._engines: dict[tuple[int, str, str], Engine] = {}
        if AUTO in settings.engines.split(","):
            self._name_engines(loaded)
        self.configurations: list[Configuration] = []
        self.crops: list[Preprocessing] = []
        for weights in loaded:
            self._configure(weights)
        self.calibration = None
        if settings.calibration is not None:
            first = self.configurations[0].protocol.preprocessing
            self.calibration = calibration_images(Path(settings.calibration), first)
        self.dtype = np.dtype(
            [
                ("index", "<i4"),
                ("digest", "u1", (DIGEST,)),
                ("configurations", evaluator.dtype, (len(self.configurations),)),
            ]
        )

    def _resolved(self, weights: Weights) -> Preprocessing:
        own = resolve_preprocessing(None, weights.preprocessing, weights.spec.variant)
        return dataclasses.replace(own, **(self.settings.preprocessing or {}))

    def _name_engines(self, loaded: Sequence[Weights]) -> None:
        """Replace "auto" in the settings by the engine chosen for the first checkpoint, and the runtimes of exports."""
        settings = self.settings
        int8 = settings.precision == "int8"
        chosen = []
        for weights in [each for each in loaded if not isinstance(each, ExportedWeights)][:1]:
            name, precision = ("onnxruntime", "float32") if int8 else (AUTO, settings.precision)  # its quantizer
            given = (name, weights, self._resolved(weights), self.device, precision, settings.threads)
            engine = create_engine(*given)
            self._engines[id(weights), engine.name, engine.precision] = engine
            chosen.append(engine.name)
        chosen += [each.runtime for each in loaded if isinstance(each, ExportedWeights)]
        names = [one for name in settings.engines.split(",") for one in (chosen if name == AUTO else [name])]
        self.settings = dataclasses.replace(settings, engines=",".join(dict.fromkeys(names)))

    def _run_by(self, weights: Weights) -> tuple[list[str], list[str]]:
        """Return the engines and precisions of one weights file. An export has the engine and precision of its file.

        Raises:
            UsageError: The engine of an export was not requested.
        """
        engines = self.settings.engines.split(",")
        if not isinstance(weights, ExportedWeights):
            return engines, self.precisions
        if weights.runtime not in engines:
            raise UsageError(f"--engine {self.settings.engines}: {weights.source.path} is run by {weights.runtime}")
        return [weights.runtime], self.precisions if weights.precision == "float32" else [weights.precision]

    def _configure(self, weights: Weights) -> None:
        """Add the configurations of one weights file. Configurations share preprocessings, which are applied once."""
        engines, precisions = self._run_by(weights)
        for protocol in protocols(self.settings.protocol, self._resolved(weights), weights.spec.variant):
            # The engine normalizes, so that preprocessings which differ only in mean and std share their pixels.
            pixels = dataclasses.replace(protocol.preprocessing, mean=(0, 0, 0), std=(1, 1, 1))
            if pixels not in self.crops:
                self.crops.append(pixels)
            reference = None
            for engine, precision in ((e, p) for e in engines for p in precisions):
                suffixes = [engine] * (len(engines) > 1) + [precision] * (len(precisions) > 1)
                name = unique = "-".join([_stem(weights.source.path.name), protocol.name, *suffixes])
                number = 2
                while unique in {known.name for known in self.configurations}:
                    unique, number = f"{name}-{number}", number + 1
                crop = self.crops.index(pixels)
                self.configurations.append(Configuration(unique, weights, engine, precision, protocol, crop, reference))
                reference = len(self.configurations) - 1 if reference is None else reference

    def engines(self) -> list[Engine]:
        """Return an engine for each configuration. Configurations that differ only in the protocol share an engine.

        Raises:
            MissingExtra, UsageError: A framework, device or precision is not available.
        """
        engines = []
        for configuration in self.configurations:
            key = (id(configuration.weights), configuration.engine, configuration.precision)
            if key not in self._engines:
                self._engines[key] = create_engine(
                    configuration.engine,
                    configuration.weights,
                    configuration.protocol.preprocessing,
                    self.device,
                    configuration.precision,
                    self.settings.threads,
                    self.calibration if configuration.precision == "int8" else None,
                    self.check,
                )
            engines.append(self._engines[key])
        return engines

    def jobs(self) -> list[tuple[Engine, int]]:
        """Return the engine and the input size of each configuration."""
        sizes = [configuration.protocol.preprocessing.input_size for configuration in self.configurations]
        return list(zip(self.engines(), sizes, strict=True))

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the records, as JSON. It must be equal in all processes and when resuming.

        Paths are excluded, since they can differ between machines that have the same files.
        """
        listed = {
            "weights": [each.weights.source.sha256 for each in self.configurations],
            "configurations": [
                [each.name, each.engine, dataclasses.asdict(each.protocol)] for each in self.configurations
            ],
            "threads": self.settings.threads,
            "calibration": self.calibration is not None and hashlib.sha256(self.calibration.tobytes()).hexdigest(),
            "precision": self.settings.precision,
            "batch_size": self.settings.batch_size,
            "list_of_images": self.dataset.listing(),
            "packages": used_packages(each.engine for each in self.configurations),
        }
        return json.loads(json.dumps(listed | self.evaluator.identity()))


def used_packages(engines: Iterable[str]) -> dict[str, str]:
    """Return the versions of the packages and decoders that determine the results of engines."""
    paddle = ("paddlepaddle", "paddlepaddle-gpu")
    packages = {"paddle": paddle, "torch": ("torch",)} | PACKAGES
    names = {"fcvit", "numpy", "pillow"}.union(*(packages[engine] for engine in engines))
    return {name: version for name, version in runs.versions().items() if name in names} | decoders()


def absolute(path: str | os.PathLike[str]) -> str:
    """Return the absolute path, which stays valid when the run is resumed in another working folder."""
    return str(Path(path).absolute())


def _stem(name: str) -> str:
    """Return the name of a weights file without its extension."""
    for ending in (".pth.tar", ".pth", ".pt", ".safetensors", ".pdparams", ".onnx", ".xml", ".json"):
        name = name.removesuffix(ending)
    return name.strip(".") or "weights"
