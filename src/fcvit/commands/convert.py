"""Convert weights between frameworks and formats: all checked, then written, or nothing."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fcvit.commands import verify as verification
from fcvit.data.classes import ClassName, as_classes, order_note
from fcvit.errors import DoesNotFit, UsageError
from fcvit.frameworks import INSTALL, import_framework, installed
from fcvit.models.variants import Preprocessing, PreprocessingChange, Variant, resolve_preprocessing
from fcvit.weights.reading import Weights, cast, read_weights
from fcvit.weights.writing import destination_layout, staged, write_weights


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was done.

    Attributes:
        source, destination: the files.
        form: the network, in words.
        layout: of the destination: "paddle" or "torch".
        dtypes: of its floating-point tensors.
        tensors: how many were written.
        skipped: entries of the source that are no weights.
        notes: what a person should know.
        verification: None where the numbers were not compared; a note says why.
    """

    source: Path
    destination: Path
    spec: str
    layout: str
    dtypes: tuple[str, ...]
    tensors: int
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    verification: verification.Verification | None


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    layout: str | None = None,
    dtype: str | None = None,
    ema: bool | None = None,
    key: str | None = None,
    variant: str | Variant | None = None,
    classes: Sequence[ClassName | str] | str | os.PathLike[str] | None = None,
    preprocessing: Preprocessing | PreprocessingChange | None = None,
    new_head: int | None = None,
    verify: bool | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Convert a checkpoint of any format.

    Args:
        source: PyTorch (zip or older), safetensors or `.pdparams`; told by content.
        destination: its ending tells the format: `.safetensors`, `.pdparams` or `.pth`.
        layout: "paddle" or "torch"; None: the ending's own (safetensors: paddle).
        dtype: float16, bfloat16, float32 or float64; None: as in the source.
        ema: choose the averaged (True) or raw (False) weights of a file that has both.
        key: which of several sets of weights in the source; see `fcvit.weights.reading.read_weights`.
        variant: what the source must be; None: its header's, else recognized from the tensors.
        classes: a class list or the path of one (see `read_classes`); None: the source's own.
        preprocessing: to store; a change replaces single fields; None: the source's own, else the variant's.
        new_head: replace the head by a fresh one for that many classes.
        verify: compare the numbers with the source; None: if both frameworks are installed.
        overwrite: allow an existing destination.

    Raises:
        UsageError, UnreadableFile, DoesNotFit: nothing is written.
        NumbersDisagree: a gate failed; nothing is written.
        MissingExtra: `verify` is True and a framework is missing.
    """
    destination = Path(destination)
    layout = destination_layout(destination, layout)
    if destination.exists() and Path(source).exists() and destination.samefile(source):
        raise UsageError(f"{destination} is the source itself; choose another name for the output")
    notes: list[str] = []
    if verify:
        import_framework("paddle")
        import_framework("torch")
    elif verify is None:
        verify = verification.can_verify()
        if not verify:
            missing = next(name for name in ("paddle", "torch") if not installed(name))
            notes.append(
                f"names, shapes and read-back were checked, but the numbers were NOT compared: {missing} "
                f"is not installed ({INSTALL[missing]})"
            )
    else:
        notes.append("names, shapes and read-back were checked, but the numbers were NOT compared, as asked")
    weights = read_weights(source, ema, variant, key=key)
    if new_head is not None:
        weights = _with_new_head(weights, new_head)
        notes.append(f"the head for {new_head} classes is fresh and must be trained")
    if classes is not None:
        listed = as_classes(classes)
        if len(listed) != weights.spec.num_classes:
            raise DoesNotFit(
                f"{len(listed)} classes are listed, but {source} has {weights.spec.num_classes} outputs; "
                "give the right list, or ask for a fresh head with --new-head"
            )
        if new_head is None and (note := order_note(listed, weights.classes)):
            notes.append(note)
        weights = dataclasses.replace(weights, classes=listed)
    if preprocessing:
        chosen = resolve_preprocessing(preprocessing, weights.preprocessing, weights.spec.variant)
        weights = dataclasses.replace(weights, preprocessing=chosen)
    proof = None
    with staged(destination, overwrite) as temporary:
        stored = cast(weights, dtype)
        write_weights(temporary, stored, layout)
        written = read_weights(temporary)
        if verify:
            proof = verification.verify_weights(written, weights)
            verification.require(proof)
    return Conversion(
        Path(source),
        destination,
        str(weights.spec),
        layout,
        tuple(written.dtypes),
        len(written.tensors),
        weights.skipped,
        (*stored.notes, *notes),
        proof,
    )


def _with_new_head(weights: Weights, num_classes: int) -> Weights:
    if weights.spec.head != "classifier" or num_classes < 1:
        raise UsageError(f"--new-head {num_classes}: expected at least 1, for a classifier")
    width = weights.spec.variant.widths[-1]
    # The authors' initialization of Linear layers, repeatable.
    weight = np.random.default_rng(0).normal(0, 0.02, (num_classes, width)).astype(np.float32)
    kind = weights.tensors["norm.weight"].dtype
    head = {"head.weight": weight.astype(kind), "head.bias": np.zeros(num_classes, kind)}
    return dataclasses.replace(
        weights,
        spec=dataclasses.replace(weights.spec, num_classes=num_classes),
        tensors={**weights.tensors, **head},
        classes=None,
    )
