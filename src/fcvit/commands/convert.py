"""Convert weights between frameworks and formats. The output is written only if all checks pass."""

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
from fcvit.weights.header import LAYOUTS, sidecar
from fcvit.weights.reading import Weights, cast, read_weights
from fcvit.weights.writing import SIDECAR_ENDINGS, destination_layout, staged, write_weights


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        source: The input file.
        destination: The output file.
        spec: Description of the network.
        layout: Layout of the output file: "paddle" or "torch".
        dtypes: Types of the floating-point tensors in the output file.
        tensors: Number of written tensors.
        skipped: Entries of the input file that are not weights.
        notes: Notes for the user.
        verification: Result of the numerical comparison, or None if there was none. A note then gives the reason.
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
        """Return the fields, including the result of the verification."""
        verification = self.verification
        return dataclasses.asdict(self) | {"verification": verification and verification.to_json()}

    def tables(self) -> Iterator[Any]:
        """Yield tables of the written tensors, the skipped entries, the notes and the verification."""
        from fcvit.report.tables import SHOWN, table

        written = f"{self.tensors}, {'/'.join(self.dtypes)}, {self.layout} layout, read back and identical"
        rows = [("network", self.spec), ("tensors", written)]
        if self.destination.suffix in SIDECAR_ENDINGS:
            rows.append(("header", str(sidecar(self.destination))))
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
    """Convert a checkpoint between PyTorch and Paddle. If both are installed, verify the result numerically.

    Args:
        source: PyTorch (.pth, .pth.tar, legacy format), safetensors or .pdparams file, detected from the content.
        destination: Output file: .safetensors, .pdparams or .pth.
        layout: Tensor names and layout of a .safetensors file (default: paddle).
        dtype: Type of the stored tensors (default: as in the source).
        key: Name of the set of weights, if the source has several. For example teacher or model.state_dict.
        variant: Expected variant (default: recognized from the tensors).
        new_head: Replace the head by a newly initialized head with this number of classes.
        pixels: Changes to the preprocessing stored in the output.
        preprocessing: Preprocessing to store, or changes to single fields. None keeps the preprocessing of the source,
            or uses that of the variant.
        verify: Compare the outputs of both networks numerically (default: if both frameworks are installed).
        overwrite: Replace the output if it already exists.

    Raises:
        UsageError, UnreadableFile, DoesNotFit: The conversion is not possible. Nothing is written.
        NumbersDisagree: The verification failed. Nothing is written.
        MissingExtra: `verify` is True and a framework is missing.
    """
    destination = Path(destination)
    preprocessing = (pixels.changes() if pixels else None) or preprocessing
    stored_layout = destination_layout(destination, layout)
    if destination.exists() and Path(source).exists() and destination.samefile(source):
        raise UsageError(f"{destination} is the source file; choose another name for the output")
    notes: list[str] = []
    reason = ""
    if verify:
        import_framework("paddle")
        import_framework("torch")
    elif verify is None and (missing := next((name for name in ("paddle", "torch") if not installed(name)), None)):
        reason = f": {missing} is not installed ({INSTALL[missing]})"
    else:
        reason, verify = ", as requested", verify is None
    if not verify:
        notes.append(f"names, shapes and stored values were checked, but the outputs were NOT compared{reason}")
    weights = read_weights(source, ema, variant, key=key)
    if new_head is not None:
        weights = _with_new_head(weights, new_head)
        notes.append(f"the head for {new_head} classes is newly initialized and must be trained")
    if classes is not None:
        listed = as_classes(classes)
        if len(listed) != weights.spec.num_classes:
            raise DoesNotFit(
                f"the class list has {len(listed)} classes, but {source} has {weights.spec.num_classes} outputs; "
                "pass a class list of this length, or initialize a new head with --new-head"
            )
        if new_head is None and (note := order_note(listed, weights.classes)):
            notes.append(note)
        weights = dataclasses.replace(weights, classes=listed)
    if preprocessing:
        chosen = resolve_preprocessing(preprocessing, weights.preprocessing, weights.spec.variant)
        weights = dataclasses.replace(weights, preprocessing=chosen)
    verification = None
    with staged(destination, overwrite) as temporary:
        stored = cast(weights, dtype)
        write_weights(temporary, stored, stored_layout)
        written = read_weights(temporary)
        if verify:
            verification = verify_weights(written, weights)
            require(verification)
    return Conversion(
        Path(source),
        destination,
        str(weights.spec),
        stored_layout,
        tuple(written.dtypes),
        len(written.tensors),
        weights.skipped,
        (*stored.notes, *notes),
        verification,
    )


def _with_new_head(weights: Weights, num_classes: int) -> Weights:
    if weights.spec.head != "classifier" or num_classes < 1:
        raise UsageError(f"--new-head {num_classes}: expected at least 1, and the weights of a classifier")
    width = weights.spec.variant.widths[-1]
    # The authors' initialization of Linear layers, with a fixed seed.
    weight = np.random.default_rng(0).normal(0, 0.02, (num_classes, width)).astype(np.float32)
    kind = weights.tensors["norm.weight"].dtype
    head = {"head.weight": weight.astype(kind), "head.bias": np.zeros(num_classes, kind)}
    return dataclasses.replace(
        weights,
        spec=dataclasses.replace(weights.spec, num_classes=num_classes),
        tensors={**weights.tensors, **head},
        classes=None,
    )
