"""Recipes: the fields that decide a training run of any task.

A field is declared once, with type, bounds, description and default. Validation, command-line options, `--help`
and the table in docs/training.md are derived from that. The defaults are the authors' recipe for ImageNet (their
`train.py` and README).
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
BatchNorm = Literal["average", "sync"]

GROUPS = ("Data and weights", "Network", "Images", "Loss", "Schedule", "Optimizer", "Run")


def _group(title: str) -> Callable[[str], Meta]:
    return lambda description: Meta(title=title, description=description)


# Each describes a field of its group: SCHEDULE("Lowest learning rate.").
DATA, NETWORK, IMAGES, LOSS, SCHEDULE, OPTIMIZER, RUN = map(_group, GROUPS)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The fields of a recipe that every task has; a task adds its own in a subclass.

    Raises:
        UsageError: a value is of the wrong type or out of range, or two fields contradict each other.
    """

    task: Annotated[str, DATA("Task of the network.")] = DEFAULT_TASK
    data: Annotated[str, DATA("Training images: class folders, in a folder or tar; or both splits.")] = ""
    val: Annotated[str | None, DATA("Validation images; else `val` beside `train`.")] = None
    held_out: Annotated[BelowOne, DATA("Share of each class held out for validation where there is no split.")] = 0.0
    classes: Annotated[str | None, DATA("Class list: CSV with id and name, or one class per line.")] = None
    weights: Annotated[str | None, DATA("Checkpoint to start from; else the authors' initialization.")] = None
    ema: Annotated[bool | None, DATA("Take the EMA (true) or raw weights of a checkpoint that has both.")] = None
    new_head: Annotated[bool, DATA("Initialize the head anew, for other classes than those of `weights`.")] = False

    variant: Annotated[str, NETWORK("A name listed by `fcvit models`; required.")]
    options: Annotated[Table, NETWORK("Fields of `fcvit.Variant`, as in heads=4.")] = field(default_factory=dict)
    drop_path_rate: Annotated[BelowOne, NETWORK("Stochastic depth of the last block, growing linearly from 0.")] = 0.1
    drop_rate: Annotated[BelowOne, NETWORK("Dropout in the channel mixers.")] = 0.0
    input_size: Annotated[Pixels | None, NETWORK("Input size in pixels; else that of the weights or variant.")] = None
    crop_fraction: Annotated[PositiveShare | None, NETWORK("Crop fraction of the evaluation.")] = None
    interpolation: Annotated[Interpolation | None, NETWORK("Interpolation of the evaluation.")] = None
    mean: Annotated[Mean | None, NETWORK("Mean of the preprocessing, as in `--mean 0.5,0.5,0.5`.")] = None
    std: Annotated[Deviation | None, NETWORK("Standard deviation of the preprocessing, in the same way.")] = None

    epochs: Annotated[Count, SCHEDULE("Epochs of the schedule, warm-up included.")] = 300
    warmup_epochs: Annotated[NonNegative, SCHEDULE("Epochs of linear warm-up; by steps also a fraction.")] = 5.0
    cooldown_epochs: Annotated[CountOrZero, SCHEDULE("Epochs after the schedule, at its last rate.")] = 10
    lr: Annotated[float, Meta(gt=0, lt=1000), SCHEDULE("Highest learning rate, for `lr_batch` images per step.")] = 1e-3
    lr_batch: Annotated[CountOrZero, SCHEDULE("The rate grows with `batch_size / lr_batch`; 0: `lr` itself.")] = 1024
    min_lr: Annotated[NonNegative, SCHEDULE("Lowest learning rate.")] = 1e-6
    warmup_lr: Annotated[NonNegative, SCHEDULE("Learning rate at the start of the warm-up.")] = 1e-6
    lr_update: Annotated[Literal["epoch", "step"], SCHEDULE("Set the rate once per epoch or at every step.")] = "epoch"
    schedule: Annotated[Literal["cosine", "poly", "step"], SCHEDULE("Course of the rate after the warm-up.")] = "cosine"
    poly_power: Annotated[Positive, SCHEDULE("Power of the schedule `poly`.")] = 0.9
    step_epochs: Annotated[tuple[Count, ...], SCHEDULE("Epochs after which the schedule `step` lowers the rate.")] = ()
    step_factor: Annotated[PositiveShare, SCHEDULE("Factor of the rate at each of `step_epochs`.")] = 0.1

    batch_size: Annotated[int, Meta(ge=2), OPTIMIZER("Images per step, over all processes together.")] = 1024
    accumulate: Annotated[Count, OPTIMIZER("Micro-batches of each process per step.")] = 1
    beta1: Annotated[BelowOne, OPTIMIZER("AdamW.")] = 0.9
    beta2: Annotated[BelowOne, OPTIMIZER("AdamW.")] = 0.999
    eps: Annotated[Positive, OPTIMIZER("AdamW.")] = 1e-8
    weight_decay: Annotated[NonNegative, OPTIMIZER("AdamW; none for parameters with fewer than two dimensions.")] = 0.05
    layer_decay: Annotated[PositiveShare, OPTIMIZER("Learning rate of a block over that of the next block.")] = 1.0
    freeze: Annotated[bool, OPTIMIZER("Train the head only; the rest keeps weights and running statistics.")] = False
    clip_norm: Annotated[Positive | None, OPTIMIZER("Largest norm of the whole gradient; else not clipped.")] = None
    ema_decay: Annotated[BelowOne | None, OPTIMIZER("Highest decay of EMA weights; else none are kept.")] = None

    precision: Annotated[Precision, RUN("A 16-bit type means mixed precision, on a GPU that has it.")] = "float32"
    batchnorm: Annotated[BatchNorm, RUN("Average the statistics of processes per epoch, or sync per step.")] = "average"
    operators: Annotated[Operators, RUN("CPU operators: this package's (native), Paddle's (plain) or auto.")] = "auto"
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1), RUN("Seed of all random draws.")] = 0
    patience: Annotated[Count | None, RUN("Stop after this many epochs without a better validation score.")] = None
    save_every: Annotated[Count | None, RUN("Also keep the weights of every N-th epoch.")] = None
    tensorboard: Annotated[bool, RUN("Also write a TensorBoard log (extra `tensorboard`).")] = False

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
        """The learning rate after the warm-up, for this batch size."""
        return self.lr * (self.batch_size / self.lr_batch if self.lr_batch else 1)

    @property
    def total_epochs(self) -> int:
        return self.epochs + self.cooldown_epochs

    def network(self) -> Variant:
        """Return the variant with its options.

        Raises:
            UsageError: there is no such variant, or an option does not fit.
        """
        known = [option.name for option in fields(Variant) if option.name not in ("name", "preprocessing")]
        for name in self.options:
            if name not in known:
                raise UsageError(f"recipe: options.{name} is no option of the architecture{suggestion(name, known)}")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in self.options.items()}
        if values.get("layer_scale") == "none":  # TOML has no null
            values["layer_scale"] = None
        try:
            return replace(get_variant(self.variant), **values)
        except TypeError as error:
            raise UsageError(f"recipe: options {dict(self.options)}: {error}") from error

    def preprocessing(self) -> PreprocessingChange | None:
        """Return the fields of the preprocessing that the recipe sets, or None."""
        names = typing.get_type_hints(PreprocessingChange)
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return typing.cast(PreprocessingChange, values) or None

    def to_toml(self) -> str:
        """Return all fields that are not None, as a file that `read_recipe` reads."""
        values = {name: getattr(self, name) for name in recipe_fields(type(self))}
        return "".join(f"{name} = {_toml(value)}\n" for name, value in values.items() if value is not None)


_HIGHEST = "from 0 to the highest rate ({r.peak_lr:g})"
# Conditions between fields: field, condition, expectation.
_CHECKS: tuple[tuple[str, Callable[[Recipe], object], str], ...] = (
    ("warmup_epochs", lambda r: r.warmup_epochs <= r.epochs, "from 0 to epochs ({r.epochs}); set --warmup-epochs too"),
    ("min_lr", lambda r: r.min_lr <= r.peak_lr, _HIGHEST),
    ("warmup_lr", lambda r: r.warmup_lr <= r.peak_lr, _HIGHEST),
    ("step_epochs", lambda r: [*r.step_epochs] == sorted(set(r.step_epochs)), "epochs in ascending order"),
    ("step_epochs", lambda r: r.step_epochs or r.schedule != "step", "at least one epoch with schedule = 'step'"),
    ("ema", lambda r: r.ema is None or r.weights, "weights to choose from"),
    ("new_head", lambda r: not r.new_head or r.weights, "weights to take the rest from"),
    ("freeze", lambda r: not r.freeze or r.weights, "weights to freeze"),
)
# Names of fields in other training scripts.
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
    """Return the end of a message about an unknown name: the nearest known one, or all of them."""
    near = [OTHER_NAMES[name]] if OTHER_NAMES.get(name) in known else difflib.get_close_matches(name, known, 1, 0.7)
    return f"; did you mean {near[0]!r}?" if near else f" (known: {', '.join(known)})"


@dataclass(frozen=True)
class RecipeField:
    """One field as a recipe declares it, for validation, options and documentation."""

    hint: Any
    default: Any  # MISSING: a recipe must state it
    group: str
    description: str
    kind: Any  # the type without bounds and None
    optional: bool  # None is a value; a file leaves the field out, "none" on the command line removes it
    expected: str  # the values in words, as "a number from 0 to below 1"

    @property
    def default_text(self) -> str:
        """The default as TOML; empty: nothing."""
        return "" if self.default is MISSING or self.default in (None, "", (), {}) else _toml(self.default)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that the command line accepts; empty: any."""
        literals = typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()
        words = ("true", "false") if self.kind is bool else literals
        return (*words, "none") if words and self.optional else words


@functools.cache
def recipe_fields(cls: type[Recipe]) -> dict[str, RecipeField]:
    """Return the fields of a recipe by name, those of a group together."""
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
    """Return the type without bounds and None, whether None is a value, and the values in words."""
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
    """Return a value as TOML, which is JSON but for tables and infinity."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml(entry)}" for key, entry in value.items()) + "}"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
