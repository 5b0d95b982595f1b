"""Read weights that fit an FCViT exactly, or report everything that does not fit."""

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from fcvit.data.classes import Classes, ClassName, Palette, check_classes, check_palette
from fcvit.errors import DoesNotFit, UsageError
from fcvit.models.spec import (
    PADDLE_STATISTICS,
    ModelSpec,
    TensorSpec,
    is_counter,
    paddle_name,
    recognize,
    tensor_specs,
    torch_name,
    torch_shapes,
)
from fcvit.models.variants import VARIANTS, Preprocessing, Variant, get_variant, resolve_preprocessing
from fcvit.weights.checkpoint import Checkpoint, read_checkpoint
from fcvit.weights.dtypes import FLOATS, is_float
from fcvit.weights.header import sidecar
from fcvit.weights.hub import read_settings
from fcvit.weights.sets import DETECTOR_PARTS
from fcvit.weights.training_args import stated_preprocessing

logger = logging.getLogger("fcvit")

CLASSIFIER_ENDS = ("norm.weight", "norm.bias", "head.weight", "head.bias")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One tensor that does not fit.

    Attributes:
        name: Name of the tensor.
        expected: Expected property, in words.
        found: Property in the file, in words.
        remedy: What the user can do.
    """

    name: str
    expected: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: expected {self.expected}, found {self.found} ({self.remedy})"


class WeightsDoNotFit(DoesNotFit):
    """The tensors of a file do not fit the network.

    Attributes:
        problems: All problems found.
    """

    def __init__(self, source: str, spec: ModelSpec, problems: list[Problem]):
        self.problems = problems
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(f"{source} does not fit {spec}: {problems[0]}{more}")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights in the common form: the authors' names and PyTorch's layout, including counters.

    Attributes:
        spec: Network that the weights fit, checked for every tensor.
        tensors: All tensors of the network, as views into the file where possible.
        source: Checkpoint that the weights were read from.
        layout: Layout in the file: "paddle" or "torch".
        preprocessing: Preprocessing that the file specifies, or None.
        classes: Class list in the file, or None.
        skipped: Entries of the file that are not weights of this network.
        notes: Notes for the user, for example about missing counters or removed prefixes.
        palette: Color of each class in the file, or None.
    """

    spec: ModelSpec
    tensors: Mapping[str, np.ndarray]
    source: Checkpoint
    layout: str
    preprocessing: Preprocessing | None
    classes: Classes | None
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    palette: Palette | None = None

    def __repr__(self) -> str:
        return f"<Weights {self.source.path.name}: {self.spec}>"

    @property
    def dtypes(self) -> list[str]:
        """Return the types of the floating-point tensors, sorted by name."""
        return sorted({t.dtype.name for name, t in self.tensors.items() if not is_counter(name)})


def read_weights(
    path: str | os.PathLike[str],
    ema: bool | None = None,
    variant: str | Variant | None = None,
    backbone: bool = False,
    key: str | None = None,
) -> Weights:
    """Read a checkpoint of any format and match it strictly with its network.

    Args:
        path: A PyTorch (zip or legacy), safetensors or `.pdparams` file.
        ema: True selects the EMA weights and False the raw weights of a file that contains both.
        variant: Expected variant. None uses the header's variant, or else detects it from the tensors.
        backbone: Read the weights for a dense-prediction backbone. Only then are a detector's neck and heads and a
            classifier's `norm` and `head` skipped by name, and the four norms may be missing.
        key: Label of the set of weights to select, as listed in the error about several sets.

    Raises:
        UnreadableFile: See `read_checkpoint`.
        UsageError: If the file contains several sets of weights and none is selected.
        DoesNotFit: If names, shapes, types or values do not fit. All problems are listed.
    """
    checkpoint = read_checkpoint(path)
    named, skipped, notes = checkpoint.select(ema, key)
    if checkpoint.path != Path(path):
        notes.insert(0, f"{path} is a folder; reading its {checkpoint.path.name}")
    header = checkpoint.header
    layout = _layout(checkpoint, named)
    if backbone:
        skipped += [name for name in named if name.startswith(DETECTOR_PARTS)]
        named = {n.removeprefix("backbone."): t for n, t in named.items() if not n.startswith(DETECTOR_PARTS)}
    table_shapes = torch_shapes({name: tensor.shape for name, tensor in named.items()})
    expected = get_variant(variant) if variant is not None else header.spec.variant if header else None
    try:
        spec = header.spec if header and variant is None else recognize(table_shapes, expected)
    except DoesNotFit as error:
        raise DoesNotFit(f"{checkpoint.path}: {error}") from error
    wanted = tensor_specs(spec)
    turned = {name for name, entry in wanted.items() if layout == "paddle" and entry.transposed_in_paddle}
    tensors = {torch_name(name): t.T if torch_name(name) in turned else t for name, t in named.items()}
    if header:
        tensors |= {name: np.array(count, np.int64) for name, count in header.counters.items()}
    tensors, odd = _plain_counters(wanted, tensors)
    if odd:
        notes.append(
            f"converted BatchNorm counters (num_batches_tracked) from {', '.join(sorted(odd))} to whole numbers"
        )
    absent = [name for name in wanted if is_counter(name) and name not in tensors]
    if absent and all(name in tensors for name in wanted if not is_counter(name)):
        notes.append(f"the file contains no BatchNorm counters ({len(absent)} num_batches_tracked); using 0")
        tensors |= {name: np.array(0, np.int64) for name in absent}
    problems = find_problems(wanted, tensors)
    if problems:
        raise WeightsDoNotFit(str(checkpoint.path), spec, problems)
    classes, palette = (header.classes, header.palette) if header else _described_classes(checkpoint, spec, notes)
    preprocessing = _preprocessing(checkpoint, spec.variant, spec.task, notes)
    if backbone and spec.head == "classifier":
        skipped += [name for name in CLASSIFIER_ENDS if name in tensors]
        tensors = {name: t for name, t in tensors.items() if name not in CLASSIFIER_ENDS}
    logger.debug(
        f"read {checkpoint.path}: {spec}, {checkpoint.format}, {layout} layout, {len(skipped)} entries skipped"
    )
    return Weights(
        spec,
        {name: tensors[name] for name in wanted if name in tensors},
        checkpoint,
        layout,
        preprocessing,
        classes,
        tuple(skipped),
        tuple(notes),
        palette,
    )


def _described_classes(
    checkpoint: Checkpoint, spec: ModelSpec, notes: list[str]
) -> tuple[Classes | None, Palette | None]:
    """Return the class names and colors in the `meta` of a file of mmsegmentation or mmdetection, if they fit."""
    meta = checkpoint.top.get("meta")
    names, colors = (meta.get(key) if isinstance(meta, dict) else None for key in ("CLASSES", "PALETTE"))
    if not spec.has_classes or names is None:
        return None, None
    try:
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError("the class names are not text")
        classes = check_classes(tuple(ClassName(name.strip(), name.strip()) for name in names), "meta")
        palette = check_palette(colors) if colors is not None else None
        if len(classes) != spec.num_classes or (palette and len(palette) != spec.num_classes):
            raise ValueError(f"{len(classes)} names for {spec.num_classes} outputs")
    except ValueError as error:
        notes.append(f"ignoring the classes in meta: {error!s:.120}")
        return None, None
    return classes, palette


def _preprocessing(checkpoint: Checkpoint, variant: Variant, task: str, notes: list[str]) -> Preprocessing | None:
    """Return the preprocessing that the header or the training arguments in the file specify, or None.

    Raises:
        DoesNotFit: If they contradict each other.
    """
    header, assumed = checkpoint.header, variant.preprocessing
    settings = read_settings(checkpoint.path) if header is None else {}
    change, remarks = stated_preprocessing({**checkpoint.top, **settings}, checkpoint.array)
    notes += remarks
    known = header.preprocessing if header else None
    for field, value in change.items():
        if known is not None and not _close(getattr(known, field), value):
            raise DoesNotFit(
                f"{checkpoint.path}: the training arguments specify {field} {value}, but the header specifies "
                f"{getattr(known, field)}; remove or correct {sidecar(checkpoint.path).name}"
            )
    if known is not None:
        return known
    chosen = resolve_preprocessing(change, None, variant)
    used = [f"{field} {value}" for field, value in change.items() if not _close(getattr(assumed, field), value)]
    if used:
        notes.append(f"using the preprocessing from the training arguments in the file: {', '.join(used)}")
    if (
        header is None
        and task == "classification"
        and variant.name not in VARIANTS
        and not {"input_size", "crop_fraction"} <= change.keys()
    ):
        notes.append(
            f"this is not a named variant, so the preprocessing is assumed (resize {chosen.resize} "
            f"{chosen.interpolation}, crop {chosen.input_size}); specify it with --input-size, --crop-fraction, "
            "--interpolation"
        )
    return chosen if change else None


def _close(one: object, other: object) -> bool:
    return one == other if isinstance(one, str) else bool(np.allclose(one, other, rtol=0, atol=1e-6))  # pyrefly: ignore


def find_problems(wanted: Mapping[str, TensorSpec], tensors: Mapping[str, np.ndarray]) -> list[Problem]:
    """Return every difference between `tensors` and the tensors that are expected in `wanted`."""
    checked = {name: _problem(name, entry, tensors.get(name)) for name, entry in wanted.items()}
    problems = [Problem(name, *problem) for name, problem in checked.items() if problem]
    for name in [name for name in tensors if name not in wanted]:
        detector = name.startswith(DETECTOR_PARTS)
        remedy = "part of a detector; only fcvit.create_backbone skips it" if detector else "is this another model?"
        problems.append(Problem(name[:120], "no such tensor", f"shape {list(tensors[name].shape)}", remedy))
    return problems


def _problem(name: str, entry: TensorSpec, tensor: np.ndarray | None) -> tuple[str, str, str] | None:
    """Return the expected property, the property found and the remedy, or None if the tensor fits."""
    shape = f"shape {list(entry.shape)}"
    if tensor is None:
        return shape, "nothing", "the file is incomplete or contains another variant"
    if is_counter(name):
        return _counter_problem(tensor)
    if tensor.shape != entry.shape:
        return shape, f"{list(tensor.shape)}", "is this the right variant?"
    if not is_float(tensor.dtype):
        return "floating-point numbers", tensor.dtype.name, "quantized weights are not supported"
    if name.endswith("running_var") and (tensor < 0).any():
        return "variances of 0 or more", "negative variances", "the file is damaged"
    if bad := int(tensor.size - np.isfinite(tensor).sum()):
        return "finite numbers", f"{bad} infinite or NaN", "the training diverged, or the file is damaged"
    return None


def _plain_counters(
    wanted: Mapping[str, TensorSpec], tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], set[str]]:
    """Convert counters to 0-d whole numbers, as in PyTorch.

    Return the tensors and a description of the types and shapes that were converted.
    """
    result, odd = dict(tensors), set()
    for name, tensor in tensors.items():
        if is_counter(name) and name in wanted and not _counter_problem(tensor):
            if tensor.shape or tensor.dtype.kind not in "iu":
                odd.add(f"{tensor.dtype.name}{list(tensor.shape) if tensor.shape else ''}")
            result[name] = np.array(int(tensor.reshape(())), np.int64)
    return result, odd


def _counter_problem(tensor: np.ndarray) -> tuple[str, str, str] | None:
    """Return why a tensor is not a counter, like `_problem`. All numeric types and a shape of [1] are accepted."""
    remedy = "save it as int64, or remove it to use 0"
    if tensor.size != 1:
        return "shape []", f"{list(tensor.shape)}", remedy
    if tensor.dtype.kind not in "iu" and not is_float(tensor.dtype):
        return "a whole number", tensor.dtype.name, remedy
    value = tensor.reshape(()).item()
    if not 0 <= value < 1 << 63 or value != int(value):
        return "a whole number of 0 or more", f"{value:g}", remedy
    return None


def _layout(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """Return the layout, detected from the names of BatchNorm statistics, which differ between the frameworks."""
    last = {name.rpartition(".")[2] for name in names}
    paddle, torch = bool(last & set(PADDLE_STATISTICS.values())), bool(last & set(PADDLE_STATISTICS))
    if paddle and torch:
        raise DoesNotFit(f"{checkpoint.path}: the file mixes Paddle names (_mean) with PyTorch names (running_mean)")
    layout = "paddle" if paddle else "torch"
    if checkpoint.header and checkpoint.header.layout != layout:
        raise DoesNotFit(
            f"{checkpoint.path}: the header specifies {checkpoint.header.layout} layout, "
            f"but the tensor names are in {layout} layout"
        )
    return layout


def paddle_tensors(weights: Weights) -> dict[str, np.ndarray]:
    """Return the tensors with Paddle's names and layout, without counters, which Paddle does not have."""
    wanted = tensor_specs(weights.spec)
    return {
        paddle_name(name): tensor.T if wanted[name].transposed_in_paddle else tensor
        for name, tensor in weights.tensors.items()
        if not is_counter(name)
    }


def cast(weights: Weights, dtype: str | None) -> Weights:
    """Convert weights to another floating-point type. Return them unchanged if `dtype` is None.

    A note counts the numbers that become 0 because they are too small for the type.

    Raises:
        DoesNotFit: If a number is too large for the type, or a variance becomes 0.
        UsageError: If the type is not float16, bfloat16, float32 or float64.
    """
    if dtype is None:
        return weights
    if dtype not in FLOATS:
        raise UsageError(f"--dtype {dtype!r}: expected one of {', '.join(FLOATS)}")
    with np.errstate(over="ignore"):
        tensors = {n: t if is_counter(n) else t.astype(FLOATS[dtype], copy=False) for n, t in weights.tensors.items()}
    problems, vanished = [], 0
    for name, tensor in tensors.items():
        lost = int(np.count_nonzero(weights.tensors[name]) - np.count_nonzero(tensor))
        vanished += lost
        if not np.isfinite(tensor).all() or (lost and name.endswith("running_var")):
            kind = "variances that become 0" if np.isfinite(tensor).all() else "larger numbers"
            problems.append(Problem(name, f"numbers that {dtype} can represent", kind, "use bfloat16 or float32"))
    if problems:
        raise WeightsDoNotFit(str(weights.source.path), weights.spec, problems)
    notes = (f"{vanished} numbers are too small for {dtype} and became 0",) if vanished else ()
    return dataclasses.replace(weights, tensors=tensors, notes=(*weights.notes, *notes))
