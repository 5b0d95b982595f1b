"""Recipes: the fields that define a training run of any task.

Each field is declared once, with type, bounds, description and default. Validation, command-line options, `--help`
and the table in the documentation are derived from this declaration. The defaults are the authors' recipe for ImageNet
(their `train.py` and README).
"""

import difflib
import functools
import json
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from fcvit.data.transforms.augment import Interpolation
from fcvit.errors import UsageError
from fcvit.models.variants import PreprocessingChange, Variant, get_variant
from fcvit.tasks.base import DEFAULT_TASK

Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]
PositiveShare = Annotated[float, Meta(gt=0, le=1)]
Count = Annotated[int, Meta(ge=1)]
CountOrZero = Annotated[int, Meta(ge=0)]
Pixels = Annotated[int, Meta(ge=1, le=4096)]
Mean = tuple[Share, Share, Share]
Deviation = tuple[PositiveShare, PositiveShare, PositiveShare]
Table = Mapping[str, Any]
Precision = Literal["float32", "float16", "bfloat16"]
Operators = Literal["auto", "native", "plain"]
BatchNorm = Literal["average", "sync", "sync_head"]

GROUPS = ("Data and weights", "Network", "Images", "Loss", "Schedule", "Optimizer", "Run")


def _group(title: str) -> Callable[[str], Meta]:
    return lambda description: Meta(title=title, description=description)


# Each function describes a field of its group: SCHEDULE("Lowest learning rate.").
DATA, NETWORK, IMAGES, LOSS, SCHEDULE, OPTIMIZER, RUN = map(_group, GROUPS)

_BATCHNORM = "Average statistics of processes each epoch, or sync each step; sync_head: the head's, on GPUs."


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The fields of a recipe that are common to all tasks. A task adds its own fields in a subclass.

    Raises:
        UsageError: A value has the wrong type or is out of range, or two fields contradict each other.
    """

    task: Annotated[str, DATA("Task of the network.")] = DEFAULT_TASK
    data: Annotated[
        str, DATA("Class folders, or images and label maps; or a folder with both splits. May be a tar.")
    ] = ""
    val: Annotated[str | None, DATA("Validation images (default: the `val` split of `data`).")] = None
    held_out: Annotated[
        BelowOne, DATA("Fraction of images (of each class) held out for validation if there is no split.")
    ] = 0.0
    classes: Annotated[str | None, DATA("Class list: CSV with id and name, or one class per line.")] = None
    weights: Annotated[str | None, DATA("Initial checkpoint (default: the authors' initialization).")] = None
    ema: Annotated[bool | None, DATA("Use the EMA (true) or raw (false) weights if both exist.")] = None
    new_head: Annotated[bool, DATA("Initialize a new head, for classes that differ from those of `weights`.")] = False

    variant: Annotated[str, NETWORK("Variant name (see `fcvit models`). Required by `fcvit train`.")]
    options: Annotated[Table, NETWORK("Fields of `fcvit.Variant`, as in heads=4.")] = field(default_factory=dict)
    drop_path_rate: Annotated[BelowOne, NETWORK("Stochastic depth of the last block; linear from 0 at the first.")] = (
        0.1
    )
    drop_rate: Annotated[BelowOne, NETWORK("Dropout rate in the channel mixers.")] = 0.0
    input_size: Annotated[Pixels | None, NETWORK("Input size in pixels (default: of the weights or variant).")] = None
    crop_fraction: Annotated[PositiveShare | None, NETWORK("Crop fraction in evaluation.")] = None
    interpolation: Annotated[Interpolation | None, NETWORK("Interpolation in evaluation.")] = None
    mean: Annotated[Mean | None, NETWORK("Mean of the preprocessing, as in `--mean 0.5,0.5,0.5`.")] = None
    std: Annotated[Deviation | None, NETWORK("Standard deviation, as in `--std 0.5,0.5,0.5`.")] = None

    epochs: Annotated[Count, SCHEDULE("Number of epochs of the schedule, including the warm-up.")] = 300
    steps_per_epoch: Annotated[Count | None, SCHEDULE("Steps per epoch (default: one pass over the images).")] = None
    warmup_epochs: Annotated[NonNegative, SCHEDULE("Epochs of linear warm-up; with lr_update = step any number.")] = 5.0
    warmup_steps: Annotated[CountOrZero, SCHEDULE("Steps of linear warm-up. 0: warmup_epochs.")] = 0
    cooldown_epochs: Annotated[CountOrZero, SCHEDULE("Additional epochs at the final learning rate.")] = 10
    lr: Annotated[float, Meta(gt=0, lt=1000), SCHEDULE("Peak learning rate for `lr_batch` images per step.")] = 1e-3
    lr_batch: Annotated[CountOrZero, SCHEDULE("Scale `lr` by `batch_size / lr_batch`. 0: no scaling.")] = 1024
    min_lr: Annotated[NonNegative, SCHEDULE("Minimum learning rate.")] = 1e-6
    warmup_lr: Annotated[NonNegative, SCHEDULE("Learning rate at the start of the warm-up.")] = 1e-6
    lr_update: Annotated[Literal["epoch", "step"], SCHEDULE("Update the rate every epoch or step.")] = "epoch"
    schedule: Annotated[Literal["cosine", "poly", "step"], SCHEDULE("Schedule after the warm-up.")] = "cosine"
    poly_power: Annotated[Positive, SCHEDULE("Power of the `poly` schedule.")] = 0.9
    step_epochs: Annotated[tuple[Count, ...], SCHEDULE("Epochs at which the `step` schedule decays the rate.")] = ()
    step_factor: Annotated[PositiveShare, SCHEDULE("Decay factor at each of `step_epochs`.")] = 0.1

    batch_size: Annotated[int, Meta(ge=2), OPTIMIZER("Total batch size per step, over all processes.")] = 1024
    accumulate: Annotated[Count, OPTIMIZER("Micro-batches per process and step (gradient accumulation).")] = 1
    beta1: Annotated[BelowOne, OPTIMIZER("First beta of AdamW.")] = 0.9
    beta2: Annotated[BelowOne, OPTIMIZER("Second beta of AdamW.")] = 0.999
    eps: Annotated[Positive, OPTIMIZER("Epsilon of AdamW.")] = 1e-8
    weight_decay: Annotated[NonNegative, OPTIMIZER("Weight decay of AdamW.")] = 0.05
    decay_all: Annotated[bool, OPTIMIZER("Apply weight decay to norms, biases and layer scales, too.")] = False
    layer_decay: Annotated[PositiveShare, OPTIMIZER("Layer-wise decay of the learning rate, per block.")] = 1.0
    freeze: Annotated[bool, OPTIMIZER("Train only the head, with a fixed backbone and running statistics.")] = False
    clip_norm: Annotated[Positive | None, OPTIMIZER("Maximum norm of the gradient (default: no clipping).")] = None
    ema_decay: Annotated[BelowOne | None, OPTIMIZER("Maximum decay of the EMA weights (default: no EMA).")] = None

    precision: Annotated[Precision, RUN("Mixed precision for 16-bit types, if the GPU supports it.")] = "float32"
    batchnorm: Annotated[BatchNorm, RUN(_BATCHNORM)] = "average"
    report: Annotated[Literal["best", "last"], RUN("Weights that are the result of the run.")] = "best"
    operators: Annotated[Operators, RUN("CPU operators: native (this package), plain (Paddle) or auto.")] = "auto"
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1), RUN("Random seed.")] = 0
    patience: Annotated[Count | None, RUN("Stop after this many epochs without a better validation score.")] = None
    checkpoint_minutes: Annotated[NonNegative, RUN("Save the state this often within an epoch. 0: after epochs.")] = 5.0
    save_every: Annotated[Count | None, RUN("Also keep the weights of every N-th epoch.")] = None
    tensorboard: Annotated[bool, RUN("Also write a TensorBoard log (`tensorboard` extra).")] = False

    def __post_init__(self) -> None:
        for name, known in recipe_fields(type(self)).items():
            value = getattr(self, name)
            try:
                value = msgspec.convert(value.item() if isinstance(value, np.generic) else value, known.hint)
            except msgspec.ValidationError:
                raise UsageError(f"recipe: {name} = {value!r}: expected {known.expected}") from None
            object.__setattr__(self, name, value)
        for name, holds, expected in _CHECKS:
            if not holds(self):
                raise UsageError(f"recipe: {name} = {getattr(self, name)!r}: expected {expected.format(r=self)}")
        self.network()

    @property
    def peak_lr(self) -> float:
        """The peak learning rate, scaled for the batch size."""
        return self.lr * (self.batch_size / self.lr_batch if self.lr_batch else 1)

    @property
    def total_epochs(self) -> int:
        return self.epochs + self.cooldown_epochs

    def warmup(self, steps: int) -> float:
        """Return the length of the warm-up in epochs, each of the given number of steps."""
        return self.warmup_steps / steps if self.warmup_steps else self.warmup_epochs

    def network(self) -> Variant:
        """Return the variant with the architecture options of the recipe.

        Raises:
            UsageError: The variant is unknown, or an option is unknown or invalid.
        """
        known = [option.name for option in fields(Variant) if option.name not in ("name", "preprocessing")]
        for name in self.options:
            if name not in known:
                raise UsageError(f"recipe: options.{name} is not an architecture option{suggestion(name, known)}")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in self.options.items()}
        if values.get("layer_scale") == "none":  # TOML has no null
            values["layer_scale"] = None
        try:
            return replace(get_variant(self.variant), **values)
        except TypeError as error:
            raise UsageError(f"recipe: options {dict(self.options)}: {error}") from error

    def preprocessing(self) -> PreprocessingChange | None:
        """Return the preprocessing fields set in the recipe, or None if there are none."""
        names = typing.get_type_hints(PreprocessingChange)
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return typing.cast(PreprocessingChange, values) or None

    def to_toml(self) -> str:
        """Return all fields that are not None as TOML, which `read_recipe` can read."""
        values = {name: getattr(self, name) for name in recipe_fields(type(self))}
        return "".join(f"{name} = {_toml(value)}\n" for name, value in values.items() if value is not None)


_UP_TO_PEAK = "from 0 to the peak learning rate ({r.peak_lr:g})"
# Conditions between fields: (field, condition, expected value).
_CHECKS: tuple[tuple[str, Callable[[Recipe], object], str], ...] = (
    (
        "warmup_epochs",
        lambda r: r.warmup_steps or r.warmup_epochs <= r.epochs,
        "from 0 to epochs ({r.epochs}); set --warmup-epochs",
    ),
    ("min_lr", lambda r: r.min_lr <= r.peak_lr, _UP_TO_PEAK),
    ("warmup_lr", lambda r: r.warmup_lr <= r.peak_lr, _UP_TO_PEAK),
    ("step_epochs", lambda r: [*r.step_epochs] == sorted(set(r.step_epochs)), "epochs in ascending order"),
    ("step_epochs", lambda r: r.step_epochs or r.schedule != "step", "at least one epoch with schedule = 'step'"),
    ("ema", lambda r: r.ema is None or r.weights, "a checkpoint in weights"),
    ("new_head", lambda r: not r.new_head or r.weights, "a checkpoint in weights"),
    ("freeze", lambda r: not r.freeze or r.weights, "a checkpoint in weights"),
)
# Field names in other training scripts, for suggestions.
OTHER_NAMES = {
    "learning_rate": "lr",
    "bs": "batch_size",
    "wd": "weight_decay",
    "smoothing": "label_smoothing",
    "drop_path": "drop_path_rate",
    "clip_grad": "clip_norm",
    "model": "variant",
    "amp": "precision",
}


def suggestion(name: str, known: Collection[str]) -> str:
    """Return the end of a message about an unknown name: the closest known name, or all known names."""
    near = [OTHER_NAMES[name]] if OTHER_NAMES.get(name) in known else difflib.get_close_matches(name, known, 1, 0.7)
    return f"; did you mean {near[0]!r}?" if near else f" (known: {', '.join(known)})"


@dataclass(frozen=True)
class RecipeField:
    """The declaration of a recipe field, used for validation, command-line options and documentation."""

    hint: Any
    default: Any  # MISSING for a required field
    group: str
    description: str
    kind: Any  # the type without bounds and None
    optional: bool  # None is allowed: omitted in a file, "none" on the command line
    expected: str  # description of the valid values, such as "a number from 0 to below 1"

    @property
    def default_text(self) -> str:
        """The default as TOML, or an empty string if there is none."""
        return "" if self.default is MISSING or self.default in (None, "", (), {}) else _toml(self.default)

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that the command line accepts, or an empty tuple if they are not limited."""
        literals = typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()
        words = ("true", "false") if self.kind is bool else literals
        return (*words, "none") if words and self.optional else words


@functools.cache
def recipe_fields(cls: type[Recipe]) -> dict[str, RecipeField]:
    """Return the fields of a recipe by name, ordered by group."""
    hints, described = typing.get_type_hints(cls, include_extras=True), {}
    for entry in fields(cls):
        hint = hints[entry.name]
        about = next(meta for meta in hint.__metadata__ if meta.description)
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        described[entry.name] = RecipeField(hint, default, about.title, about.description, *_describe(hint))
    return dict(sorted(described.items(), key=lambda item: GROUPS.index(item[1].group)))


_BOUNDS = ("ge", "gt", "le", "lt")
_RANGES = {
    "": "",
    "ge": " of at least {}",
    "gt": " above {}",
    "gele": " from {} to {}",
    "gelt": " from {} to below {}",
    "gtle": " above {}, at most {}",
    "gtlt": " above {} and below {}",
}


def _describe(hint: Any) -> tuple[Any, bool, str]:
    """Return the type without bounds and None, whether None is allowed, and a description of the valid values."""
    kind, bounds = _peel(hint)
    optional = types.NoneType in (arguments := typing.get_args(kind))
    if optional:
        kind, bounds = _peel(arguments[0])
        arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return kind, optional, " or ".join(map(repr, arguments))
    if typing.get_origin(kind) is tuple:
        item, bounds = _peel(arguments[0])
        count = "a list of" if arguments[-1] is ... else {2: "two", 3: "three"}[len(arguments)]
        words = f"{count} {'whole numbers' if item is int else 'numbers'}"
    else:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, "a table")
    limits = {key: limit for meta in bounds for key in _BOUNDS if (limit := getattr(meta, key)) is not None}
    return kind, optional, words + _RANGES["".join(limits)].format(*limits.values())


def _peel(hint: Any) -> tuple[Any, tuple[Meta, ...]]:
    return (hint.__origin__, hint.__metadata__) if typing.get_origin(hint) is Annotated else (hint, ())


def _toml(value: object) -> str:
    """Return a value as TOML, which differs from JSON only for tables and infinity."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml(entry)}" for key, entry in value.items()) + "}"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
