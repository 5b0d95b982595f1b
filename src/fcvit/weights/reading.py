"""Read weights that fit an FCViT exactly, or list everything that does not fit."""

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from fcvit.data.classes import Classes
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
from fcvit.weights.hub import settings_beside
from fcvit.weights.sets import DETECTOR_PARTS
from fcvit.weights.training_args import stated_preprocessing

logger = logging.getLogger("fcvit")

CLASSIFIER_ENDS = ("norm.weight", "norm.bias", "head.weight", "head.bias")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that does not fit: which tensor, what was expected, what the file has, what to do."""

    name: str
    expected: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: expected {self.expected}, found {self.found} ({self.remedy})"


class WeightsDoNotFit(DoesNotFit):
    """The tensors of a file do not fit the network; `problems` has all of them."""

    def __init__(self, source: str, spec: ModelSpec, problems: list[Problem]):
        self.problems = problems
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(f"{source} does not fit {spec}: {problems[0]}{more}")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights in the common form: the authors' names and PyTorch's layout, counters included.

    Attributes:
        spec: the network they fit, checked name by name.
        tensors: every tensor of that network; views into the file where possible.
        source: the file they came from.
        layout: how they were stored: "paddle" or "torch".
        preprocessing, classes: what the file says of them; None: nothing.
        skipped: entries of the file that are no weights of this network.
        notes: what a person should know: counters assumed, names stripped.
    """

    spec: ModelSpec
    tensors: Mapping[str, np.ndarray]
    source: Checkpoint
    layout: str
    preprocessing: Preprocessing | None
    classes: Classes | None
    skipped: tuple[str, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        return f"<Weights {self.source.path.name}: {self.spec}>"

    @property
    def dtypes(self) -> list[str]:
        """Types of the floating-point tensors, sorted."""
        return sorted({t.dtype.name for name, t in self.tensors.items() if not is_counter(name)})


def read_weights(
    path: str | os.PathLike[str],
    ema: bool | None = None,
    variant: str | Variant | None = None,
    backbone: bool = False,
    key: str | None = None,
) -> Weights:
    """Read a checkpoint of any format and fit it strictly to its network.

    Args:
        path: PyTorch (zip or older), safetensors or `.pdparams`.
        ema: choose between the averaged and the raw weights of a file with both.
        variant: what the file must be; None: its header's, else recognized from the tensors.
        backbone: read it for the dense-prediction form. Only here a detector's neck and heads, and
            a classifier's `norm` and `head`, are skipped by name; the weights may then lack the
            four norms.
        key: which of several sets of weights in the file, by the name that the error about them gives it.

    Raises:
        UnreadableFile: see `read_checkpoint`.
        UsageError: the choice between averaged and raw weights, or between other sets, is open.
        DoesNotFit: names, shapes, kinds or values do not fit; every problem is named.
    """
    checkpoint = read_checkpoint(path)
    named, skipped, notes = checkpoint.select(ema, key)
    if checkpoint.path != Path(path):
        notes.insert(0, f"{path} is a folder: {checkpoint.path.name} in it is read")
    header = checkpoint.header
    layout = _layout(checkpoint, named)
    if backbone:
        skipped += [name for name in named if name.startswith(DETECTOR_PARTS)]
        named = {name: t for name, t in named.items() if not name.startswith(DETECTOR_PARTS)}
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
            f"BatchNorm counters (num_batches_tracked) stored as {', '.join(sorted(odd))} were read as whole numbers"
        )
    absent = [name for name in wanted if is_counter(name) and name not in tensors]
    if absent and all(name in tensors for name in wanted if not is_counter(name)):
        notes.append(f"the file has no BatchNorm counters ({len(absent)} num_batches_tracked): taken as 0")
        tensors |= {name: np.array(0, np.int64) for name in absent}
    problems = find_problems(wanted, tensors)
    if problems:
        raise WeightsDoNotFit(str(checkpoint.path), spec, problems)
    preprocessing = _preprocessing(checkpoint, spec.variant, notes)
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
        header.classes if header else None,
        tuple(skipped),
        tuple(notes),
    )


def _preprocessing(checkpoint: Checkpoint, variant: Variant, notes: list[str]) -> Preprocessing | None:
    """Return the preprocessing that the header or the training arguments in a file state; None: nothing.

    Raises:
        DoesNotFit: the two contradict each other.
    """
    header, assumed = checkpoint.header, variant.preprocessing
    beside = settings_beside(checkpoint.path) if header is None else {}
    change, remarks = stated_preprocessing({**checkpoint.top, **beside}, checkpoint.array)
    notes += remarks
    known = header.preprocessing if header else None
    for field, value in change.items():
        if known is not None and not _close(getattr(known, field), value):
            raise DoesNotFit(
                f"{checkpoint.path}: its training arguments state {field} {value}, its header "
                f"{getattr(known, field)}; remove or correct {sidecar(checkpoint.path).name}"
            )
    if known is not None:
        return known
    chosen = resolve_preprocessing(change, None, variant)
    used = [f"{field} {value}" for field, value in change.items() if not _close(getattr(assumed, field), value)]
    if used:
        notes.append(f"the preprocessing follows the training arguments in the file: {', '.join(used)}")
    if header is None and variant.name not in VARIANTS and not {"input_size", "crop_fraction"} <= change.keys():
        notes.append(
            f"no named variant: preprocessing is assumed (resize {chosen.resize} {chosen.interpolation}, crop "
            f"{chosen.input_size}); state it with --input-size, --crop-fraction, --interpolation"
        )
    return chosen if change else None


def _close(one: object, other: object) -> bool:
    return one == other if isinstance(one, str) else bool(np.allclose(one, other, rtol=0, atol=1e-6))  # pyrefly: ignore


def find_problems(wanted: Mapping[str, TensorSpec], tensors: Mapping[str, np.ndarray]) -> list[Problem]:
    """Return everything that keeps `tensors` from being exactly those that are `wanted`."""
    checked = {name: _problem(name, entry, tensors.get(name)) for name, entry in wanted.items()}
    problems = [Problem(name, *problem) for name, problem in checked.items() if problem]
    for name in [name for name in tensors if name not in wanted]:
        detector = name.startswith(DETECTOR_PARTS)
        remedy = "a detector's: only fcvit.create_backbone skips it" if detector else "another model?"
        problems.append(Problem(name[:120], "no such tensor", f"shape {list(tensors[name].shape)}", remedy))
    return problems


def _problem(name: str, entry: TensorSpec, tensor: np.ndarray | None) -> tuple[str, str, str] | None:
    """Return what was expected of a tensor, what the file has and what to do; None: it fits."""
    shape = f"shape {list(entry.shape)}"
    if tensor is None:
        return shape, "nothing", "the file is incomplete or of another variant"
    if is_counter(name):
        return _counter_problem(tensor)
    if tensor.shape != entry.shape:
        return shape, f"{list(tensor.shape)}", "is this the right variant?"
    if not is_float(tensor.dtype):
        return "floating-point numbers", tensor.dtype.name, "quantized weights are not read"
    if name.endswith("running_var") and (tensor < 0).any():
        return "variances from 0 up", "negative ones", "the file is damaged"
    if bad := int(tensor.size - np.isfinite(tensor).sum()):
        return "finite numbers", f"{bad} infinite or NaN", "the training diverged, or the file is damaged"
    return None


def _plain_counters(
    wanted: Mapping[str, TensorSpec], tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], set[str]]:
    """Turn counters into whole numbers without a dimension, as PyTorch has them; also return how others were stored."""
    result, odd = dict(tensors), set()
    for name, tensor in tensors.items():
        if is_counter(name) and name in wanted and not _counter_problem(tensor):
            if tensor.shape or tensor.dtype.kind not in "iu":
                odd.add(f"{tensor.dtype.name}{list(tensor.shape) if tensor.shape else ''}")
            result[name] = np.array(int(tensor.reshape(())), np.int64)
    return result, odd


def _counter_problem(tensor: np.ndarray) -> tuple[str, str, str] | None:
    """Return what keeps a tensor from being a counter, as `_problem` does; its type and a shape such as [1] do not."""
    remedy = "save it as an int64, or leave it out: a missing one is taken as 0"
    if tensor.size != 1:
        return "shape []", f"{list(tensor.shape)}", remedy
    if tensor.dtype.kind not in "iu" and not is_float(tensor.dtype):
        return "a whole number", tensor.dtype.name, remedy
    value = tensor.reshape(()).item()
    if not 0 <= value < 1 << 63 or value != int(value):
        return "a whole number from 0 up", f"{value:g}", remedy
    return None


def _layout(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """Return the layout, by the names of BatchNorm's statistics, which differ between the frameworks."""
    last = {name.rpartition(".")[2] for name in names}
    paddle, torch = bool(last & set(PADDLE_STATISTICS.values())), bool(last & set(PADDLE_STATISTICS))
    if paddle and torch:
        raise DoesNotFit(f"{checkpoint.path} mixes Paddle's names (_mean) with PyTorch's (running_mean)")
    layout = "paddle" if paddle else "torch"
    if checkpoint.header and checkpoint.header.layout != layout:
        raise DoesNotFit(
            f"{checkpoint.path}: the header says {checkpoint.header.layout} layout, the names are those of {layout}"
        )
    return layout


def paddle_tensors(weights: Weights) -> dict[str, np.ndarray]:
    """Return tensors by Paddle's names in its layout; without counters, which Paddle does not have."""
    wanted = tensor_specs(weights.spec)
    return {
        paddle_name(name): tensor.T if wanted[name].transposed_in_paddle else tensor
        for name, tensor in weights.tensors.items()
        if not is_counter(name)
    }


def cast(weights: Weights, dtype: str | None) -> Weights:
    """Convert weights to another floating-point type; None: as they are.

    Numbers so small that they become 0 in that type are counted in a note.

    Raises:
        DoesNotFit: a number is too large for the type, or a variance becomes 0 in it.
        UsageError: not float16, bfloat16, float32 or float64.
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
            larger = "variances that become 0" if np.isfinite(tensor).all() else "larger ones"
            problems.append(Problem(name, f"numbers that {dtype} can hold", larger, "use bfloat16 or float32"))
    if problems:
        raise WeightsDoNotFit(str(weights.source.path), weights.spec, problems)
    notes = (f"{vanished} numbers are too small for {dtype} and became 0",) if vanished else ()
    return dataclasses.replace(weights, tensors=tensors, notes=(*weights.notes, *notes))
