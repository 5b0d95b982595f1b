"""From a checkpoint to weights that fit an FCViT exactly, or to a list of everything that does not."""

import dataclasses
import os
from collections.abc import Iterable, Mapping

import numpy as np

from fcvit.classes import Classes
from fcvit.errors import DoesNotFit, UsageError
from fcvit.variants import VARIANTS, Preprocessing, Variant, get_variant
from fcvit.weights.checkpoint import Checkpoint, read_checkpoint
from fcvit.weights.dtypes import FLOATS, is_float
from fcvit.weights.names import PADDLE_STATISTICS, Entry, Form, entries, is_counter, paddle_name, recognise, torch_name

PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.")
# Parts of a detector or segmenter beside its backbone (mmdetection, mmsegmentation).
DETECTOR_PARTS = (
    "neck.",
    "rpn_head.",
    "roi_head.",
    "bbox_head.",
    "mask_head.",
    "decode_head.",
    "auxiliary_head.",
    "data_preprocessor.",
)
CLASSIFIER_ENDS = ("norm.weight", "norm.bias", "head.weight", "head.bias")
_PROBE = "patch_embed.proj.weight"


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that does not fit: which tensor, what was expected, what was found, what to do."""

    name: str
    expected: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: expected {self.expected}, found {self.found} ({self.remedy})"


class WeightsDoNotFit(DoesNotFit):
    """The tensors of a file do not fit the network; `problems` has all of them."""

    def __init__(self, source: str, form: Form, problems: list[Problem]):
        self.problems = problems
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(f"{source} does not fit {form}: {problems[0]}{more}")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights in the common form: the authors' names and PyTorch's layout, counters included.

    Attributes:
        form: the network they fit, checked name by name.
        tensors: every tensor of that network; views into the file where possible.
        source: the file they came from.
        layout: how they were stored: "paddle" or "torch".
        preprocessing, classes: what the file says of them; None: nothing.
        skipped: entries of the file that are no weights of this network.
        notes: what a person should know: counters assumed, names stripped.
    """

    form: Form
    tensors: Mapping[str, np.ndarray]
    source: Checkpoint
    layout: str
    preprocessing: Preprocessing | None
    classes: Classes | None
    skipped: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def dtypes(self) -> list[str]:
        """Types of the floating-point tensors, sorted."""
        return sorted({t.dtype.name for name, t in self.tensors.items() if not is_counter(name)})


def read_weights(
    path: str | os.PathLike[str],
    ema: bool | None = None,
    variant: str | Variant | None = None,
    backbone: bool = False,
) -> Weights:
    """Read a checkpoint of any format and fit it strictly to its network.

    Args:
        path: PyTorch (zip or older), safetensors or `.pdparams`.
        ema: choose between the averaged and the raw weights of a file with both.
        variant: what the file must be; None: its header's, else recognised from the tensors.
        backbone: read it for the dense-prediction form. Only here a detector's neck and heads, and
            a classifier's `norm` and `head`, are skipped by name; the weights may then lack the
            four norms.

    Raises:
        UnreadableFile: see `read_checkpoint`.
        UsageError: the choice between averaged and raw weights is open.
        DoesNotFit: names, shapes, kinds or values do not fit; every problem is named.
    """
    checkpoint = read_checkpoint(path)
    named, skipped = checkpoint.select(ema)
    notes: list[str] = []
    named = _strip(checkpoint, named, notes)
    header = checkpoint.header
    layout = _layout(checkpoint, named)
    if backbone:
        skipped += [name for name in named if name.startswith(DETECTOR_PARTS)]
        named = {name: t for name, t in named.items() if not name.startswith(DETECTOR_PARTS)}
    table_shapes = {
        torch_name(n): t.shape[::-1] if layout == "paddle" and t.ndim == 2 else t.shape for n, t in named.items()
    }
    expected = get_variant(variant) if variant is not None else header.form.variant if header else None
    try:
        form = header.form if header and variant is None else recognise(table_shapes, expected)
    except DoesNotFit as error:
        raise DoesNotFit(f"{checkpoint.path}: {error}") from error
    wanted = entries(form)
    tensors = {torch_name(name): _torch_layout(t, wanted.get(torch_name(name)), layout) for name, t in named.items()}
    if header:
        tensors |= {name: np.array(count, np.int64) for name, count in header.counters.items()}
    absent = [name for name in wanted if is_counter(name) and name not in tensors]
    if absent and all(name in tensors for name in wanted if not is_counter(name)):
        notes.append(f"the file has no BatchNorm counters ({len(absent)} num_batches_tracked): taken as 0")
        tensors |= {name: np.array(0, np.int64) for name in absent}
    problems = find_problems(wanted, tensors)
    if problems:
        raise WeightsDoNotFit(str(checkpoint.path), form, problems)
    if header is None and form.variant.name not in VARIANTS:
        assumed = form.variant.preprocessing
        notes.append(
            f"no named variant: preprocessing is assumed (resize {assumed.resize} {assumed.interpolation}, crop "
            f"{assumed.input_size}); state it with --input-size, --crop-fraction, --interpolation"
        )
    if backbone and not form.dense:
        skipped += [name for name in CLASSIFIER_ENDS if name in tensors]
        tensors = {name: t for name, t in tensors.items() if name not in CLASSIFIER_ENDS}
    return Weights(
        form,
        {name: tensors[name] for name in wanted if name in tensors},
        checkpoint,
        layout,
        header.preprocessing if header else None,
        header.classes if header else None,
        tuple(skipped),
        tuple(notes),
    )


def find_problems(wanted: Mapping[str, Entry], found: Mapping[str, np.ndarray]) -> list[Problem]:
    """Everything that keeps `found` from being exactly the tensors that are `wanted`."""
    problems = []
    for name, entry in wanted.items():
        tensor = found.get(name)
        if tensor is None:
            problems.append(
                Problem(name, f"shape {list(entry.shape)}", "nothing", "the file is incomplete or of another variant")
            )
        elif tensor.shape != entry.shape:
            problems.append(
                Problem(name, f"shape {list(entry.shape)}", f"{list(tensor.shape)}", "is this the right variant?")
            )
        elif is_counter(name):
            if tensor.dtype.kind not in "iu":
                problems.append(Problem(name, "a whole number", tensor.dtype.name, "save the checkpoint again"))
        elif not is_float(tensor.dtype):
            problems.append(
                Problem(name, "floating-point numbers", tensor.dtype.name, "quantised weights are not read")
            )
        elif name.endswith("running_var") and (tensor < 0).any():
            problems.append(Problem(name, "variances from 0 up", "negative ones", "the file is damaged"))
        elif not np.isfinite(tensor).all():
            bad = int(tensor.size - np.isfinite(tensor).sum())
            problems.append(
                Problem(
                    name, "finite numbers", f"{bad} infinite or NaN", "the training diverged, or the file is damaged"
                )
            )
    for name in found:
        if name not in wanted:
            problems.append(
                Problem(
                    name[:120],
                    "no such tensor",
                    f"shape {list(found[name].shape)}",
                    "a detector's: only fcvit.create_backbone skips it"
                    if name.startswith(DETECTOR_PARTS)
                    else "another model?",
                )
            )
    return problems


def _strip(checkpoint: Checkpoint, named: Mapping[str, np.ndarray], notes: list[str]) -> dict[str, np.ndarray]:
    """Strip wrappers' prefixes to a fixed point, if what is left is a model's."""
    stripped: dict[str, str] = {}
    for name in named:
        short = name
        while short.startswith(PREFIXES):
            short = short.partition(".")[2]
        if short in stripped:
            raise DoesNotFit(
                f"{checkpoint.path}: {stripped[short]!r} and {name!r} are one name once their prefixes are stripped"
            )
        stripped[short] = name
    if _PROBE in named or _PROBE not in stripped:
        return dict(named)
    notes.append(f"prefix stripped from the names: {stripped[_PROBE].removesuffix(_PROBE)}")
    return {short: named[name] for short, name in stripped.items()}


def _layout(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """Told by the names of BatchNorm's statistics, which differ between the frameworks."""
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


def _torch_layout(tensor: np.ndarray, entry: Entry | None, layout: str) -> np.ndarray:
    return tensor.T if layout == "paddle" and entry is not None and entry.transposed_in_paddle else tensor


def paddle_tensors(weights: Weights) -> dict[str, np.ndarray]:
    """Paddle's names and layout; without counters, which Paddle does not have."""
    wanted = entries(weights.form)
    return {
        paddle_name(name): tensor.T if wanted[name].transposed_in_paddle else tensor
        for name, tensor in weights.tensors.items()
        if not is_counter(name)
    }


def cast(weights: Weights, dtype: str | None) -> Weights:
    """The same weights in another floating-point type; None: as they are.

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
            found = "variances that become 0" if np.isfinite(tensor).all() else "larger ones"
            problems.append(Problem(name, f"numbers that {dtype} can hold", found, "use bfloat16 or float32"))
    if problems:
        raise WeightsDoNotFit(str(weights.source.path), weights.form, problems)
    notes = (f"{vanished} numbers are too small for {dtype} and became 0",) if vanished else ()
    return dataclasses.replace(weights, tensors=tensors, notes=(*weights.notes, *notes))
