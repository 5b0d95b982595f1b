"""What an evaluation will do, settled before the first batch: images, classes, protocols, engines."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fcvit import run_folder as runs
from fcvit.data.class_folders import LabeledImages, read_dataset, read_real
from fcvit.data.class_indices import assign_classes
from fcvit.data.classes import Classes, ClassName, imagenet, read_classes, resolve_classes
from fcvit.data.loader import DIGEST, Workers
from fcvit.data.transforms.preprocess import decoders
from fcvit.errors import DoesNotFit, UsageError
from fcvit.evaluation.protocols import AUTHORS, Protocol, protocols
from fcvit.frameworks import parse_device
from fcvit.inference.cache import PACKAGES
from fcvit.inference.engines import AUTO, Engine, create_engine
from fcvit.inference.quantize import calibration_images
from fcvit.models.variants import VALIDATION_IMAGES, Preprocessing, resolve_preprocessing
from fcvit.weights.reading import Weights

PRESENT = "present"  # in place of a class list: the classes that the data has


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the figures of a run. `run.json` keeps it, so that the run can be continued.

    The fields are the arguments of `evaluate`.
    """

    weights: tuple[str, ...]
    data: str
    list_file: str | None
    engines: tuple[str, ...]
    protocol: str
    preprocessing: Mapping[str, Any] | None
    batch_size: int | Literal["auto"]
    device: str
    precision: str
    ema: bool | None
    classes: str | None
    subset: int | None
    seed: int
    real: str | None
    class_subset: str | None
    save_logits: bool
    threads: int | None = None
    calibration: str | None = None

    def sha256(self) -> str:
        """Whether `run.json` still holds what was asked for."""
        return _sha256(dataclasses.asdict(self))


def check(settings: Settings, workers: int | Workers) -> None:
    """Refuse what can be told without a file.

    Raises:
        UsageError: it was one of the arguments.
    """
    parse_device(settings.device)
    size, engines = settings.batch_size, settings.engines
    if size != "auto" and (not isinstance(size, int) or size < 1):
        raise UsageError(f"--batch-size {size}: expected auto or at least 1")
    if isinstance(workers, int) and workers < 0:
        raise UsageError(f"--workers {workers}: expected at least 0")
    if not settings.weights:
        raise UsageError("--weights: expected at least one file")
    if settings.preprocessing and settings.protocol != AUTHORS:
        raise UsageError(f"--protocol {settings.protocol} is fixed; leave it or the other preprocessing out")
    if not engines or len(set(engines)) != len(engines):
        raise UsageError(f"--engine {','.join(engines)!r}: expected different engines, separated by commas")
    if (settings.precision == "int8") != (settings.calibration is not None):
        raise UsageError("--precision int8 and --calibration FOLDER go together: its scales come from your images")


def with_engines_named(settings: Settings, loaded: Sequence[Weights], device: str) -> tuple[Settings, Engine | None]:
    """Replace "auto" in the settings by the engine that it is here, for the first weights; return that engine too.

    Raises:
        As `create_engine`; UsageError: it is one that was named besides.
    """
    if AUTO not in settings.engines:
        return settings, None
    weights = loaded[0]
    pixels = resolve_preprocessing(None, weights.preprocessing, weights.spec.variant)
    pixels = dataclasses.replace(pixels, **(settings.preprocessing or {}))
    precision = "float32" if settings.precision == "int8" else settings.precision
    found = create_engine(AUTO, weights, pixels, device, precision, settings.threads, None)
    named = dataclasses.replace(settings, engines=tuple(found.name if e == AUTO else e for e in settings.engines))
    check(named, 0)
    return named, found


@dataclasses.dataclass(frozen=True)
class Lane:
    """One way through which all images go.

    Attributes:
        name: of its folder.
        weights, engine_name, precision, protocol: what it is.
        crop: place of its crops among those that are made of an image.
        reference: place of the lane whose logits its own are compared with; None: it is that lane itself.
    """

    name: str
    weights: Weights
    engine_name: str
    precision: str
    protocol: Protocol
    crop: int
    reference: int | None


class Plan:
    """Everything that is settled before the first batch."""

    def __init__(
        self,
        settings: Settings,
        loaded: Sequence[Weights],
        device: str,
        images: LabeledImages | None = None,
    ):
        self.settings, self.device = settings, device
        # A lower precision is never measured alone: what it costs is the difference.
        self.precisions = list(dict.fromkeys(["float32", settings.precision]))
        given = read_classes(Path(settings.classes)) if settings.classes else None
        first = loaded[0].spec
        for weights in loaded:
            if weights.spec.dense or not weights.spec.num_classes:
                raise DoesNotFit(f"{weights.source.path} is {weights.spec}: it has no classes to evaluate")
            if weights.spec.num_classes != first.num_classes:
                raise DoesNotFit(
                    f"{weights.source.path} has {weights.spec.num_classes} classes, {loaded[0].source.path} "
                    f"{first.num_classes}; evaluate them one by one"
                )
        count = first.num_classes
        known = given or loaded[0].classes
        list_file = Path(settings.list_file) if settings.list_file else None
        if images is None:
            images = read_dataset(Path(settings.data), list_file, known, count)
        self.classes = named = resolve_classes(given, loaded[0].classes, count)
        if images.counted:  # the folders are all that is known of the classes
            self.classes = tuple(ClassName(label, label) for label in images.mapping)
        for weights in loaded[1:]:
            if resolve_classes(given, weights.classes, count) != named:
                raise DoesNotFit(
                    f"{weights.source.path} and {loaded[0].source.path} name other classes; evaluate them one by "
                    "one, or name the classes with --classes FILE"
                )
        self.images = images if settings.subset is None else images.subset(settings.subset, settings.seed)
        self.validation = _validation(self.images)
        self.columns = self._columns(set(images.labels), known, count)
        position = {int(column): place for place, column in enumerate(self.columns)}
        self.labels = np.array([position[label] for label in self.images.labels], np.int64)
        self.lane_classes: Classes = tuple(self.classes[column] for column in self.columns)
        self.k = min(5, len(self.columns))
        self.real = read_real(Path(settings.real), self.images) if settings.real else None
        if self.real is not None and [c.id for c in self.classes] != [c.id for c in imagenet()]:
            raise DoesNotFit(
                "--real: its labels are ImageNet's 1,000 classes in their usual order, which the model's are not, by "
                "their ids; --classes FILE gives it others"
            )
        # What may take an export comes last, when images and classes are known to fit.
        self.settings, auto = with_engines_named(settings, loaded, device)
        self._made = {} if auto is None else {(id(loaded[0]), auto.name, auto.precision): auto}
        self.lanes, self.crops = self._lanes(loaded)

    def _columns(self, present: set[int], known: Classes | None, count: int) -> np.ndarray:
        """Indices of the classes that are told apart; `present`: in the data, also where only a part is drawn."""
        class_subset = self.settings.class_subset
        if class_subset is None:
            return np.arange(count)
        if class_subset == PRESENT:
            chosen = present
        else:
            ids = sorted(c.id for c in read_classes(Path(class_subset)))
            if all(label.isdecimal() for label in ids) and known is None:
                raise DoesNotFit(f"{class_subset}: numbers name no classes; expected ids, one a line")
            what = f"classes of {Path(class_subset).name}"
            chosen = set(assign_classes(ids, self.classes, count, what).mapping.values())
        outside = present - chosen
        if outside:
            raise DoesNotFit(
                f"{class_subset}: images of {len(outside)} other classes are there, first "
                f"{self.classes[min(outside)].id}"
            )
        if len(chosen) < 2:
            raise DoesNotFit("--class-subset: a single class is told apart from nothing")
        return np.array(sorted(chosen))

    def _lanes(self, loaded: Sequence[Weights]) -> tuple[list[Lane], list[Preprocessing]]:
        settings = self.settings
        lanes: list[Lane] = []
        crops: dict[tuple, int] = {}
        kept: list[Preprocessing] = []
        for weights in loaded:
            stem = _stem(weights.source.path.name)
            resolved = resolve_preprocessing(None, weights.preprocessing, weights.spec.variant)
            resolved = dataclasses.replace(resolved, **(settings.preprocessing or {}))
            for protocol in protocols(settings.protocol, resolved, weights.spec.variant):
                # Mean and standard deviation are the engine's business: crops are made once for all.
                pixels = protocol.preprocessing
                key = (pixels.input_size, pixels.resize, pixels.interpolation)
                if key not in crops:
                    crops[key] = len(kept)
                    kept.append(pixels)
                reference = None
                ways = [(engine, precision) for engine in settings.engines for precision in self.precisions]
                for engine, precision in ways:
                    what = [engine] if len(settings.engines) > 1 else []
                    what += [precision] if len(self.precisions) > 1 else []
                    name = "-".join([stem, protocol.name, *what])
                    taken = {lane.name for lane in lanes}
                    number = 2
                    unique = name
                    while unique in taken:
                        unique, number = f"{name}-{number}", number + 1
                    lanes.append(Lane(unique, weights, engine, precision, protocol, crops[key], reference))
                    reference = len(lanes) - 1 if reference is None else reference
        return lanes, kept

    @functools.cached_property
    def engines(self) -> list[Engine]:
        """One for each lane; protocols of the same weights share theirs."""
        made = self._made
        found = []
        for lane in self.lanes:
            key = (id(lane.weights), lane.engine_name, lane.precision)
            if key not in made:
                made[key] = create_engine(
                    lane.engine_name,
                    lane.weights,
                    lane.protocol.preprocessing,
                    self.device,
                    lane.precision,
                    self.settings.threads,
                    self.calibration if lane.precision == "int8" else None,
                )
            found.append(made[key])
        return found

    @functools.cached_property
    def calibration(self) -> np.ndarray | None:
        """The images that int8 is calibrated on, cut for the first lane."""
        if self.settings.calibration is None:
            return None
        return calibration_images(Path(self.settings.calibration), self.lanes[0].protocol.preprocessing)

    def load_engines(self) -> None:
        """Build the engines now.

        Raises:
            MissingExtra, UsageError: a framework, device or precision is not there.
        """
        _ = self.engines

    def jobs(self) -> list[tuple[Engine, int]]:
        """What every batch goes through: engines and input sizes."""
        sizes = [lane.protocol.preprocessing.input_size for lane in self.lanes]
        return list(zip(self.engines, sizes, strict=True))

    def identity(self) -> dict[str, object]:
        """What decides the records of the images: a run that is continued, and every process of it, must agree.

        Paths are not in it: another machine may have the same files elsewhere.
        """
        paddle = ("paddlepaddle", "paddlepaddle-gpu")
        packages = {"paddle": paddle, "native": paddle, "torch": ("torch",)} | PACKAGES
        kept = {"fcvit", "numpy", "pillow"}.union(*(packages[engine] for engine in self.settings.engines))
        real = self.real and [sorted(classes) for classes in self.real]
        listed = {
            "weights": [lane.weights.source.sha256 for lane in self.lanes],
            "ways": [[lane.name, lane.engine_name, dataclasses.asdict(lane.protocol)] for lane in self.lanes],
            "threads": self.settings.threads,
            "calibration": self.calibration is not None and hashlib.sha256(self.calibration.tobytes()).hexdigest(),
            "precision": self.settings.precision,
            "batch_size": self.settings.batch_size,
            "list_of_images": self.images.listing(),
            "classes": _sha256([c.id for c in self.lane_classes]),
            "real_labels": _sha256(real),
            "packages": {n: v for n, v in runs.versions().items() if n in kept} | decoders(),
        }
        return json.loads(json.dumps(listed))

    @property
    def dtype(self) -> np.dtype:
        """A record of one image: what every lane made of it."""
        lane = [
            ("rank", "<i4"),
            ("loss", "<f8"),
            ("top", "<i4", (self.k,)),
            ("probability", "<f8", (self.k,)),
            ("largest", "<f8"),  # absolute difference from the reference's logits
            ("total", "<f8"),
        ]
        return np.dtype([("index", "<i4"), ("digest", "u1", (DIGEST,)), ("lanes", lane, (len(self.lanes),))])

    @property
    def batches(self) -> range:
        return range(-(-len(self.images) // int(self.settings.batch_size)))

    def batch_images(self, number: int) -> int:
        """How many images a batch has."""
        size = int(self.settings.batch_size)
        return min(size, len(self.images) - number * size)


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stem(name: str) -> str:
    """The name of a weights file without its ending."""
    for ending in (".pth.tar", ".pth", ".pt", ".safetensors", ".pdparams"):
        name = name.removesuffix(ending)
    return name.strip(".") or "weights"


def _validation(images: LabeledImages) -> Literal["all", "part", "other"]:
    """Whether these are ImageNet's validation images, by their names."""
    numbers = images.validation_numbers()
    if numbers is None or len(set(numbers)) < len(numbers):
        return "other"
    return "all" if len(numbers) == VALIDATION_IMAGES else "part"
