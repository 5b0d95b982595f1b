"""Write weights files atomically: a reader finds either the complete, checked file or no file."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from fcvit.errors import NumbersDisagree, UsageError
from fcvit.models.spec import is_counter
from fcvit.models.variants import resolve_preprocessing
from fcvit.run_folder import staged_files
from fcvit.weights import pdparams, safetensors_file, torch_file
from fcvit.weights.checkpoint import read_checkpoint
from fcvit.weights.header import KEY, LAYOUTS, Header, sidecar
from fcvit.weights.reading import Weights, paddle_tensors, read_weights

# File extension -> supported layouts, the default first.
ENDINGS = {".safetensors": ("paddle", "torch"), ".pdparams": ("paddle",), ".pth": ("torch",)}
SIDECAR_ENDINGS = (".pdparams", ".pth")  # formats without their own header


def destination_layout(path: Path, layout: str | None = None) -> str:
    """Return the layout to write: the requested layout, or the default of the file extension.

    Raises:
        UsageError: If the extension or layout is unknown, or the extension does not support the layout.
    """
    if path.suffix not in ENDINGS:
        raise UsageError(f"{path}: unknown file extension; expected one of {', '.join(ENDINGS)}")
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"--layout {layout!r}: expected {' or '.join(LAYOUTS)}")
    if layout is not None and layout not in ENDINGS[path.suffix]:
        raise UsageError(
            f"{path}: a {path.suffix} file always has {ENDINGS[path.suffix][0]} layout; "
            f"use .safetensors for {layout} layout"
        )
    return layout or ENDINGS[path.suffix][0]


@contextlib.contextmanager
def staged(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` if the block succeeds and removed if it fails.

    A header that is written next to the temporary file (see `sidecar`) is renamed with it.

    Raises:
        UsageError, UnreadableFile: See `fcvit.run_folder.staged_files`.
    """
    # The header is renamed first. If the process stops between the two renames, the header's hash reveals it.
    names = [sidecar(path), path] if path.suffix in SIDECAR_ENDINGS else [path]
    with staged_files(names, overwrite) as folder:
        yield folder / path.name


def write_weights(path: Path, weights: Weights, layout: str | None = None) -> None:
    """Write weights in the format that the extension of `path` specifies, and verify them by reading them back.

    A safetensors file contains the header. Other formats have it in a separate `FILE.json`. The write is not atomic:
    pass a `staged` path.

    Raises:
        UsageError: See `destination_layout`.
        NumbersDisagree: If the tensors that are read back differ from the written ones.
    """
    layout = destination_layout(path, layout)
    tensors: Mapping[str, np.ndarray] = paddle_tensors(weights) if layout == "paddle" else weights.tensors
    header = Header(
        weights.spec,
        layout,
        resolve_preprocessing(None, weights.preprocessing, weights.spec.variant),
        weights.classes,
        {name: int(t) for name, t in weights.tensors.items() if is_counter(name)},
        weights.source.sha256,
        palette=weights.palette,
    )
    if path.suffix not in SIDECAR_ENDINGS:
        # A single entry, because the library writes several entries in an order that changes from run to run.
        safetensors_file.write(path, tensors, {KEY: header.to_json()})
    else:
        with path.open("wb") as file:
            if path.suffix == ".pdparams":
                pdparams.write(file, tensors)
            else:
                torch_file.write_zip(file, tensors)
        header = dataclasses.replace(header, weights_sha256=read_checkpoint(path).sha256)
        sidecar(path).write_text(header.to_json(), "utf-8")
    different = differing_tensors(weights, read_weights(path))
    if different:
        raise NumbersDisagree(
            f"{path}: {len(different)} tensor(s) differ when read back, first {different[0]}; check the disk"
        )


def differing_tensors(one: Weights, other: Weights) -> list[str]:
    """Return the names of the tensors that are not equal bit for bit, including missing tensors."""
    names = dict.fromkeys([*one.tensors, *other.tensors])
    return [name for name in names if not _same_bits(one.tensors.get(name), other.tensors.get(name))]


def _same_bits(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    unsigned = np.dtype(f"u{one.dtype.itemsize}")
    return bool(np.array_equal(one.view(unsigned) if one.ndim else one, other.view(unsigned) if other.ndim else other))
