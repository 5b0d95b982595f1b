"""Recipes: everything that decides a training run, as one flat table in a TOML file.

The defaults are the authors' recipe for ImageNet (their `train.py` and README); the recipes that come
with the package, in `fcvit/recipes`, state what they rely on.
"""

import dataclasses
import difflib
import importlib.resources
import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fcvit.data.transforms.augment import Augmentation
from fcvit.errors import UnreadableFile, UsageError
from fcvit.models.variants import Preprocessing, PreprocessingChange, Variant, get_variant, three_channels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides a run. In a file, a field that may be None is left out to be so.

    Data and weights:
        data: training images: class folders, in a folder or tar; with folders `train` and `val`, both splits.
        val: validation images; None: `val` beside `train`, else `held_out` of the training images.
        held_out: share of every class that is kept for validation where there is none; 0: no validation.
        classes: class list; None: the sorted folders of the training images.
        weights: a checkpoint to start from; None: the authors' initialization.
        ema: the averaged or the raw weights of a checkpoint that has both.
        new_head: start the head anew although `weights` has one, for other classes.

    Network:
        variant: a name of `fcvit.VARIANTS`; options: fields of `fcvit.Variant` to be replaced.
        drop_path_rate, drop_rate: 0 <= rate < 1; stochastic depth of the last block, dropout in the mixers.
        input_size, crop_fraction, interpolation, mean, std: of the preprocessing; None: that of weights or variant.

    Images (see `fcvit.data.transforms.augment.Augmentation` and `fcvit.data.transforms.mixing.mix`):
        crop, crop_scale, crop_ratio, crop_interpolation, padding, flip, rand_augment, magnitude,
        magnitude_std, operation_probability, erasing, mixup, cutmix, mix_switch.

    Loss:
        label_smoothing: 0 to 1, shared by all classes.
        class_weights: "balanced": images of rare classes count more, as much as all classes count alike.

    Schedule: a cosine over `epochs` from `lr` to `min_lr`, the first `warmup_epochs` replaced by a line
    from `warmup_lr`, then `cooldown_epochs` at `min_lr`.
        lr: for `lr_batch` images a step, and in proportion for others; lr_batch 0: as it stands.
        lr_update: the rate is set once an "epoch" (the authors) or every "step", where a warm-up may end within one.

    Optimizer: AdamW, no decay on parameters of fewer than two dimensions.
        batch_size: images a step, of all processes together.
        accumulate: parts of a process's share of a step that go through the network one after the other.
        beta1, beta2, eps, weight_decay: AdamW's.
        layer_decay: the rate of each block over that of the next one.
        freeze: train the head alone; the rest keeps its weights and running statistics, and drops nothing.
        clip_norm: largest norm of the gradient, over all parameters; None: not clipped.
        ema_decay: keep averaged weights beside, at most this slow; None: none.
        precision: "float32", or "float16" or "bfloat16" by automatic mixed precision on a device that has it.
        batchnorm: running statistics are local and averaged after an epoch ("average"), or batches are
            normalized over all processes ("sync"; not on a CPU).
        operators: "native": our own operators for the CPU, "plain": Paddle's; "auto": native where they
            can be had.

    Run:
        seed: of every draw.
        patience: stop after so many epochs without a better top-1; None: never.
        save_every: keep the weights of every so many epochs too; None: only last and best.
        tensorboard: write a TensorBoard log as well.
    """

    variant: str
    data: str = ""
    val: str | None = None
    held_out: float = 0.0
    classes: str | None = None
    weights: str | None = None
    ema: bool | None = None
    new_head: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    drop_path_rate: float = 0.1
    drop_rate: float = 0.0
    input_size: int | None = None
    crop_fraction: float | None = None
    interpolation: Literal["bilinear", "bicubic"] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    crop: Literal["resized", "padded", "centre"] = "resized"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    padding: int = 4
    flip: float = 0.5
    rand_augment: int = 2
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    operation_probability: float = 0.5
    erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_switch: float = 0.5
    label_smoothing: float = 0.1
    class_weights: Literal["none", "balanced"] = "none"
    epochs: int = 300
    warmup_epochs: float = 5
    cooldown_epochs: int = 10
    lr: float = 1e-3
    lr_batch: int = 1024
    min_lr: float = 1e-6
    warmup_lr: float = 1e-6
    lr_update: Literal["epoch", "step"] = "epoch"
    batch_size: int = 1024
    accumulate: int = 1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    freeze: bool = False
    clip_norm: float | None = None
    ema_decay: float | None = None
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    batchnorm: Literal["average", "sync"] = "average"
    operators: Literal["auto", "native", "plain"] = "auto"
    seed: int = 0
    patience: int | None = None
    save_every: int | None = None
    tensorboard: bool = False
    task: str = "classification"
    schedule: Literal["cosine", "poly", "step"] = "cosine"
    poly_power: float = 0.9
    step_epochs: typing.ClassVar[tuple[int, ...]] = ()
    step_factor: float = 0.1

    def __post_init__(self) -> None:
        for name, value in _fields(self):
            object.__setattr__(self, name, _typed(name, value))
        limits: tuple[tuple[str, bool, str], ...] = (
            ("batch_size", self.batch_size >= 2, "at least 2"),
            ("held_out", 0 <= self.held_out < 1, "from 0 to below 1"),
            ("mixup", 0 <= self.mixup <= 1000, "from 0 (off) to 1000"),
            ("cutmix", 0 <= self.cutmix <= 1000, "from 0 (off) to 1000"),
            ("mix_switch", 0 <= self.mix_switch <= 1, "from 0 to 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to below 1"),
            ("epochs", self.epochs >= 1, "at least 1"),
            (
                "warmup_epochs",
                0 <= self.warmup_epochs <= self.epochs,
                f"from 0 to epochs ({self.epochs}); set --warmup-epochs too",
            ),
            ("cooldown_epochs", self.cooldown_epochs >= 0, "at least 0"),
            ("lr", 0 < self.lr < 1e3, "more than 0"),
            ("lr_batch", self.lr_batch >= 0, "at least 1, or 0"),
            ("min_lr", 0 <= self.min_lr <= self.peak_lr, f"from 0 to the highest rate ({self.peak_lr:g})"),
            ("warmup_lr", 0 <= self.warmup_lr <= self.peak_lr, f"from 0 to the highest rate ({self.peak_lr:g})"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
            ("beta1", 0 <= self.beta1 < 1, "from 0 to below 1"),
            ("beta2", 0 <= self.beta2 < 1, "from 0 to below 1"),
            ("eps", self.eps > 0, "more than 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("layer_decay", 0 < self.layer_decay <= 1, "more than 0, at most 1"),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "more than 0"),
            ("ema_decay", self.ema_decay is None or 0 <= self.ema_decay < 1, "from 0 to below 1"),
            ("seed", 0 <= self.seed < 1 << 63, "from 0 to 2^63 - 1"),
            ("patience", self.patience is None or self.patience >= 1, "at least 1"),
            ("save_every", self.save_every is None or self.save_every >= 1, "at least 1"),
            ("ema", self.ema is None or self.weights is not None, "weights to choose from"),
            ("new_head", not self.new_head or self.weights is not None, "weights to take the rest from"),
            ("freeze", not self.freeze or self.weights is not None, "weights to freeze"),
        )
        for name, good, expected in limits:
            if not good:
                raise UsageError(f"recipe: {name} = {getattr(self, name)!r}: expected {expected}")
        for name in ("drop_path_rate", "drop_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"recipe: {name} = {getattr(self, name)!r}: expected from 0 to below 1")
        self.network()
        self.preprocessing()
        self.augmentation(32)

    @property
    def peak_lr(self) -> float:
        """The rate that the warm-up leads to, for this batch."""
        return self.lr * (self.batch_size / self.lr_batch if self.lr_batch else 1)

    @property
    def total_epochs(self) -> int:
        return self.epochs + self.cooldown_epochs

    def network(self) -> Variant:
        """The variant with its options.

        Raises:
            UsageError: there is no such variant, or an option does not fit.
        """
        variant = get_variant(self.variant)
        known = [f.name for f in dataclasses.fields(Variant) if f.name not in ("name", "preprocessing")]
        for name in self.options:
            if name not in known:
                raise UsageError(f"recipe: options.{name} is no option of the architecture{_suggestion(name, known)}")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in self.options.items()}
        if values.get("layer_scale") == "none":  # TOML has no word for nothing
            values["layer_scale"] = None
        try:
            return dataclasses.replace(variant, **values)
        except TypeError as error:
            raise UsageError(f"recipe: options {dict(self.options)}: {error}") from error

    def augmentation(self, size: int) -> Augmentation:
        """What happens to training images, for an input of `size` pixels.

        Raises:
            UsageError: a field is out of range.
        """
        names = [field.name for field in dataclasses.fields(Augmentation) if field.name != "size"]
        return Augmentation(size=size, **{name: getattr(self, name) for name in names})

    def preprocessing(self) -> PreprocessingChange | None:
        """The fields of the preprocessing that the recipe sets."""
        change: PreprocessingChange = {}
        if self.input_size is not None:
            change["input_size"] = self.input_size
        if self.crop_fraction is not None:
            change["crop_fraction"] = self.crop_fraction
        if self.interpolation is not None:
            change["interpolation"] = self.interpolation
        for name in ("mean", "std"):
            if (value := getattr(self, name)) is not None:
                try:
                    change[name] = three_channels(value)
                except ValueError as error:
                    raise UsageError(f"recipe: {name} = {value}: {error}") from None
        Preprocessing(**change)  # out of range is said now
        return change or None

    def to_toml(self) -> str:
        """All fields, as a file that `read_recipe` reads."""
        lines = [f"{name} = {_toml(value)}" for name, value in _fields(self) if value is not None]
        return "\n".join(lines) + "\n"


def _fields(recipe: Recipe) -> list[tuple[str, Any]]:
    return [(field.name, getattr(recipe, field.name)) for field in dataclasses.fields(recipe)]


def read_recipe(source: str, overrides: Mapping[str, object] | None = None) -> Recipe:
    """A recipe from a file, single fields replaced.

    Args:
        source: path of a TOML file, or the name of a recipe that comes with the package (see `shipped`).
        overrides: field -> value, or -> text as on the command line, read as TOML where it is; "none"
            takes a field out that may be. `options.NAME` is an option of the architecture. Hyphens count as
            underscores.

    Raises:
        UnreadableFile: no such file, or not TOML.
        UsageError: an unknown field (the nearest is suggested), a value of the wrong kind or out of range.
    """
    path, name = Path(source), source.removesuffix(".toml")
    try:
        if path.is_file() or name not in shipped():
            fields = tomllib.loads(path.read_text("utf-8"))
        else:
            fields = shipped_fields(name)
    except OSError as error:
        known = ", ".join(shipped())
        raise UnreadableFile(f"{source}: {error.strerror}; expected a TOML file, or one of {known}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UnreadableFile(f"{source}: not TOML: {error}") from error
    return build_recipe(fields, overrides or {}, source)


def build_recipe(fields: Mapping[str, object], overrides: Mapping[str, object], source: str) -> Recipe:
    """The same from fields that are read already; `source` is what messages call them."""
    merged: dict[str, Any] = dict(fields)
    for key, value in overrides.items():
        name, _, option = key.replace("-", "_").partition(".")
        if isinstance(value, str) and not (_is_text(name) and value != "none"):
            value = _value(value)
        if name == "options" and option:
            merged["options"] = {**merged.get("options", {}), option: value}
        elif option:
            raise UsageError(f"--{key}: only options.NAME has a dot in it")
        elif value == "none" and not _hint_allows(name, "none"):
            merged[name] = None
        else:
            merged[name] = value
    known = [field.name for field in dataclasses.fields(Recipe)]
    for name in merged:
        if name not in known:
            raise UsageError(f"{source}: no field {name!r} in a recipe{_suggestion(name, known)}")
    if "variant" not in merged:
        raise UsageError(
            f"{source}: no variant; expected one of fcvit models (fcvit finetune takes that of the weights)"
        )
    return Recipe(**merged)


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = importlib.resources.files("fcvit") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def shipped_fields(name: str) -> dict[str, Any]:
    """The fields of one of them, as its file says."""
    return tomllib.loads((importlib.resources.files("fcvit") / "recipes" / f"{name}.toml").read_text("utf-8"))


def _suggestion(name: str, known: list[str]) -> str:
    near = [_ELSEWHERE[name]] if _ELSEWHERE.get(name) in known else difflib.get_close_matches(name, known, 1, 0.7)
    return f"; did you mean {near[0]!r}?" if near else f" (known: {', '.join(known)})"


def _value(text: str) -> object:
    """A word of the command line: a TOML value, numbers with commas between, or else text."""
    if re.fullmatch(r"[\d.eE+-]+(\s*,\s*[\d.eE+-]+)+", text):
        text = f"[{text}]"
    try:
        return tomllib.loads(f"value = {text}")["value"] if "\n" not in text else text
    except tomllib.TOMLDecodeError:
        return text


def _toml(value: object) -> str:
    """JSON is TOML, but for tables."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml(entry)}" for key, entry in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


_HINTS = typing.get_type_hints(Recipe)
# What other training scripts call a field.
_ELSEWHERE = {
    "learning_rate": "lr",
    "bs": "batch_size",
    "wd": "weight_decay",
    "smoothing": "label_smoothing",
    "drop_path": "drop_path_rate",
    "clip_grad": "clip_norm",
    "model": "variant",
    "amp": "precision",
}


def _is_text(name: str) -> bool:
    """Whether any word is a value of this field: a path may look like a number."""
    hint = _HINTS.get(name)
    return hint in (str, str | None)


def _hint_allows(name: str, word: str) -> bool:
    hint = _HINTS.get(name)
    return typing.get_origin(hint) is Literal and word in typing.get_args(hint)


def _typed(name: str, value: Any) -> Any:
    """The value as the kind of its field: whole numbers where fractions may be, lists as tuples.

    Raises:
        UsageError: it is of another kind.
    """
    hint = _HINTS[name]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if typing.get_origin(hint) is typing.Union:
        kinds = typing.get_args(hint)
    for kind in kinds:
        origin = typing.get_origin(kind)
        if kind is type(None):
            if value is None:
                return None
        elif origin is Literal:
            if value in typing.get_args(kind):
                return value
        elif origin is tuple:
            count = len(typing.get_args(kind))
            if isinstance(value, list | tuple) and len(value) == count and all(map(_is_number, value)):
                return tuple(map(float, value))
        elif kind is float:
            if _is_number(value):
                return float(value)
        elif kind is int:
            if type(value) is int:
                return value
        elif kind is bool or kind is str:
            if isinstance(value, kind):
                return value
        elif isinstance(value, Mapping):
            return dict(value)
    raise UsageError(f"recipe: {name} = {value!r}: expected {_described(kinds)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _described(kinds: tuple[Any, ...]) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "nothing"}
    found = []
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            found += [repr(value) for value in typing.get_args(kind)]
        else:
            numbers = {2: "two numbers", 3: "three numbers"}.get(len(typing.get_args(kind)))
            found.append(words.get(kind) or (numbers if typing.get_origin(kind) is tuple else "a table"))
    return " or ".join(found)
