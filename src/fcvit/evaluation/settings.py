"""The settings of an evaluation, and what follows from them before the first batch: configurations and engines."""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
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
from fcvit.inference.quantize import calibration_images
from fcvit.models.variants import Preprocessing, resolve_preprocessing
from fcvit.tasks.base import Evaluator
from fcvit.weights.reading import Weights

MOVABLE = {"movable": True}  # metadata of an option that names a file, which may be elsewhere when a run continues
logger = logging.getLogger("fcvit")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that decide the numbers of an evaluation of any task; `run.json` stores them.

    Args:
        protocol: authors (the preprocessing that belongs to the weights), resize256-bilinear (Resize 256 bilinear,
            crop 224), or both at once.
        engines: A name of `fcvit.inference.engines.ENGINES`, or auto; two, as in paddle,torch, are compared.
        batch_size: Images at a time; auto tries what fits. Float32 sums depend on it in the last digits.
        device: auto, cpu, gpu or gpu:N.
        precision: float32, or bfloat16, float16, int8 where the engine has it, measured beside float32.
        calibration: Folder of images that int8 takes its scales from, such as training images.
        threads: Threads that compute on a CPU (default: one for each core).
        ema: Take the averaged (--ema) or the raw (--no-ema) weights of files with both.
        save_logits: Keep logits.npy beside the predictions.
        preprocessing: Another preprocessing, or fields of it, which makes the protocol "custom".

    Raises:
        UsageError: a value out of range, or two that exclude each other.
    """

    protocol: Literal["authors", "resize256-bilinear", "both"] = AUTHORS
    engines: Annotated[
        str, Parameter(name="--engine", help=f"{CHOICES}; several, as in paddle,torch, are compared.")
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
            raise UsageError(f"--batch-size {self.batch_size}: expected auto or at least 1")
        if self.preprocessing and self.protocol != AUTHORS:
            raise UsageError(f"--protocol {self.protocol} is fixed; leave it or the other preprocessing out")
        names = self.engines.split(",")
        if not all(names) or len(set(names)) != len(names):
            raise UsageError(f"--engine {self.engines!r}: expected different engines, separated by commas")
        if (self.precision == "int8") != (self.calibration is not None):
            raise UsageError("--precision int8 and --calibrate FOLDER go together: its scales come from your images")


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One way through which all samples go: weights, protocol, engine, precision.

    Attributes:
        name: of its folder.
        crop: position of its preprocessing among those that are applied to an image.
        reference: position of the configuration whose outputs its own are compared with; None: it is that one.
    """

    name: str
    weights: Weights
    engine: str
    precision: str
    protocol: Protocol
    crop: int
    reference: int | None


class Plan:
    """Everything that is settled before the first batch.

    Args:
        settings: of the run.
        loaded: the weights.
        device: of this process.
        evaluator: the task's, for these weights and the data.

    Raises:
        As `create_engine`.
    """

    def __init__(self, settings: Settings, loaded: Sequence[Weights], device: str, evaluator: Evaluator):
        self.settings, self.device, self.evaluator = settings, device, evaluator
        self.dataset = evaluator.dataset
        # A lower precision is never measured alone: what it costs is the difference.
        self.precisions = list(dict.fromkeys(["float32", settings.precision]))
        self._engines: dict[tuple[int, str, str], Engine] = {}
        if AUTO in settings.engines.split(","):
            self._name_engines(loaded[0])
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

    def _name_engines(self, weights: Weights) -> None:
        """Replace "auto" in the settings by the engine that it is here, for the first weights."""
        settings = self.settings
        precision = "float32" if settings.precision == "int8" else settings.precision
        given = (AUTO, weights, self._resolved(weights), self.device, precision, settings.threads)
        engine = create_engine(*given)
        names = [engine.name if name == AUTO else name for name in settings.engines.split(",")]
        self.settings = dataclasses.replace(settings, engines=",".join(names))
        self._engines[id(weights), engine.name, engine.precision] = engine

    def _configure(self, weights: Weights) -> None:
        """Add the configurations of one weights file; each preprocessing is applied once for all."""
        engines = self.settings.engines.split(",")
        for protocol in protocols(self.settings.protocol, self._resolved(weights), weights.spec.variant):
            # Mean and standard deviation are the engine's business.
            pixels = dataclasses.replace(protocol.preprocessing, mean=(0, 0, 0), std=(1, 1, 1))
            if pixels not in self.crops:
                self.crops.append(pixels)
            reference = None
            for engine, precision in ((e, p) for e in engines for p in self.precisions):
                what = [engine] * (len(engines) > 1) + [precision] * (len(self.precisions) > 1)
                name = unique = "-".join([_stem(weights.source.path.name), protocol.name, *what])
                number = 2
                while unique in {one.name for one in self.configurations}:
                    unique, number = f"{name}-{number}", number + 1
                crop = self.crops.index(pixels)
                self.configurations.append(Configuration(unique, weights, engine, precision, protocol, crop, reference))
                reference = len(self.configurations) - 1 if reference is None else reference

    def engines(self) -> list[Engine]:
        """Return an engine for each configuration; protocols of the same weights share theirs.

        Raises:
            MissingExtra, UsageError: a framework, device or precision is not available.
        """
        engines = []
        for one in self.configurations:
            key = (id(one.weights), one.engine, one.precision)
            if key not in self._engines:
                self._engines[key] = create_engine(
                    one.engine,
                    one.weights,
                    one.protocol.preprocessing,
                    self.device,
                    one.precision,
                    self.settings.threads,
                    self.calibration if one.precision == "int8" else None,
                )
            engines.append(self._engines[key])
        return engines

    def jobs(self) -> list[tuple[Engine, int]]:
        """Return what every batch goes through: engines and input sizes."""
        sizes = [one.protocol.preprocessing.input_size for one in self.configurations]
        return list(zip(self.engines(), sizes, strict=True))

    def identity(self) -> dict[str, Any]:
        """Return what decides the records: a run that is continued, and every process of it, must agree.

        Paths are not in it: another machine may have the same files elsewhere.
        """
        paddle = ("paddlepaddle", "paddlepaddle-gpu")
        packages = {"paddle": paddle, "native": paddle, "torch": ("torch",)} | PACKAGES
        names = {"fcvit", "numpy", "pillow"}.union(*(packages[one.engine] for one in self.configurations))
        listed = {
            "weights": [one.weights.source.sha256 for one in self.configurations],
            "configurations": [[one.name, one.engine, dataclasses.asdict(one.protocol)] for one in self.configurations],
            "threads": self.settings.threads,
            "calibration": self.calibration is not None and hashlib.sha256(self.calibration.tobytes()).hexdigest(),
            "precision": self.settings.precision,
            "batch_size": self.settings.batch_size,
            "list_of_images": self.dataset.listing(),
            "packages": {name: version for name, version in runs.versions().items() if name in names} | decoders(),
        }
        return json.loads(json.dumps(listed | self.evaluator.identity()))

    @property
    def batches(self) -> range:
        return range(-(-len(self.dataset) // int(self.settings.batch_size)))

    def batch_images(self, number: int) -> int:
        """Return how many samples a batch has."""
        size = int(self.settings.batch_size)
        return min(size, len(self.dataset) - number * size)


def absolute(path: str | os.PathLike[str]) -> str:
    """Return a path for another working folder; words that are no paths stay."""
    return str(Path(path).absolute())


def _stem(name: str) -> str:
    """Return the name of a weights file without its ending."""
    for ending in (".pth.tar", ".pth", ".pt", ".safetensors", ".pdparams"):
        name = name.removesuffix(ending)
    return name.strip(".") or "weights"
