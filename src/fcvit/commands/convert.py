"""Convert weights between frameworks and formats: all checked, then written, or nothing."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter

from fcvit.commands.options import Classes, Ema, File, Flag, Output, PreprocessingOptions
from fcvit.data.classes import as_classes, order_note
from fcvit.errors import DoesNotFit, UsageError
from fcvit.frameworks import INSTALL, import_framework, installed
from fcvit.models.variants import resolve_preprocessing
from fcvit.verification.comparison import Verification, require, verify_weights
from fcvit.weights.dtypes import FLOATS
from fcvit.weights.header import LAYOUTS
from fcvit.weights.reading import Weights, cast, read_weights
from fcvit.weights.writing import destination_layout, staged, write_weights


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        source, destination: the files.
        spec: the network, in words.
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
    verification: Verification | None

    def __repr__(self) -> str:
        return f"<Conversion {self.destination}: {self.spec}>"

    def to_json(self) -> dict[str, Any]:
        """Return the fields, with the outcome of the verification."""
        proof = self.verification
        return dataclasses.asdict(self) | {"verification": proof and proof.to_json()}

    def tables(self) -> Iterator[Any]:
        """Show what was written, and what was left out."""
        from fcvit.report.tables import SHOWN, table

        written = f"{self.tensors}, {'/'.join(self.dtypes)}, {self.layout} layout, read back bit for bit"
        rows = [("network", self.spec), ("tensors", written)]
        if self.skipped:
            more = f", ... ({len(self.skipped)})" if len(self.skipped) > SHOWN else ""
            rows.append(("skipped", ", ".join(self.skipped[:SHOWN]) + more))
        rows += [("note", note) for note in self.notes]
        yield table(rows=rows, title=f"{self.source} -> {self.destination}")
        if self.verification:
            yield from self.verification.tables()


def convert(
    source: File,
    /,
    destination: Annotated[File, Output],
    *,
    layout: Annotated[str | None, Parameter(choices=LAYOUTS)] = None,
    dtype: Annotated[str | None, Parameter(choices=tuple(FLOATS))] = None,
    ema: Ema = None,
    key: str | None = None,
    variant: Annotated[Any, Parameter()] = None,
    classes: Classes = None,
    new_head: int | None = None,
    pixels: Annotated[PreprocessingOptions | None, Parameter(name="*")] = None,
    preprocessing: Annotated[Any, Parameter(parse=False)] = None,
    verify: bool | None = None,
    overwrite: Flag = False,
) -> Conversion:
    """Convert a checkpoint between PyTorch and Paddle, checked and, with both installed, verified.

    Args:
        source: PyTorch (.pth, .pth.tar, older format), safetensors or .pdparams; the format is detected.
        destination: The file to write: .safetensors, .pdparams or .pth.
        layout: Names and layout of a .safetensors file (default: paddle).
        dtype: Type to store (default: as in the source).
        key: Take this one of several sets of weights in the source, such as teacher or model.state_dict.
        variant: What the file must be (default: recognized from its tensors).
        new_head: Replace the head by a fresh one for this many classes.
        pixels: Fields of the preprocessing to store.
        preprocessing: to store; a change replaces single fields; None: the source's own, else the variant's.
        verify: Compare the numbers with the source (default: if both frameworks are installed).
        overwrite: Replace the output if it already exists.

    Raises:
        UsageError, UnreadableFile, DoesNotFit: nothing is written.
        NumbersDisagree: the verification failed; nothing is written.
        MissingExtra: `verify` is True and a framework is missing.
    """
    destination = Path(destination)
    preprocessing = (pixels.changes() if pixels else None) or preprocessing
    stored_layout = destination_layout(destination, layout)
    if destination.exists() and Path(source).exists() and destination.samefile(source):
        raise UsageError(f"{destination} is the source itself; choose another name for the output")
    notes: list[str] = []
    reason = ""
    if verify:
        import_framework("paddle")
        import_framework("torch")
    elif verify is None and (missing := next((name for name in ("paddle", "torch") if not installed(name)), None)):
        reason = f": {missing} is not installed ({INSTALL[missing]})"
    else:
        reason, verify = ", as asked", verify is None
    if not verify:
        notes.append(f"names, shapes and read-back were checked, but the numbers were NOT compared{reason}")
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
        write_weights(temporary, stored, stored_layout)
        written = read_weights(temporary)
        if verify:
            proof = verify_weights(written, weights)
            require(proof)
    return Conversion(
        Path(source),
        destination,
        str(weights.spec),
        stored_layout,
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
