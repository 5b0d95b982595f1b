"""Open a checkpoint of any format, told by content, and pick its weights: named NumPy tensors.

Nothing in the file is executed, neither framework is needed, and the tensors are views into the
mapped file.
"""

import dataclasses
import functools
import hashlib
import mmap
import os
from pathlib import Path

import numpy as np

from fcvit.errors import DoesNotFit, UnreadableFile, UsageError
from fcvit.foreign import KIND_BYTES, TEXT, foreign_kind
from fcvit.weights import pdparams, safetensors_file, torch_file
from fcvit.weights.header import KEY, Header
from fcvit.weights.inert_pickle import Opaque

ZIP, LEGACY, SAFETENSORS, PDPARAMS = "pytorch (zip)", "pytorch (older)", "safetensors", "pdparams"
MEMORY = "memory"  # no file at all: a model's
_PICKLED_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of PyTorch's older format
MAX_NAME = 256  # characters of a tensor's name
MAX_SIDECAR = 2 << 20  # bytes: 21,000 classes take 1 MB
_STATES = ("state_dict", "model")
_EMA_STATES = ("state_dict_ema", "model_ema", "ema_state_dict")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened file. `path`, `format` and `header` say what it is, `select` gives the tensors."""

    path: Path
    format: str
    top: dict
    header: Header | None
    data: mmap.mmap | bytes

    @functools.cached_property
    def sha256(self) -> str:
        """Of the whole file, in hexadecimal; of weights that were never in one, nothing."""
        if not self.data:
            return ""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def has_ema(self) -> bool:
        return any(isinstance(self.top.get(key), dict) for key in _EMA_STATES)

    def select(self, ema: bool | None = None) -> tuple[dict[str, np.ndarray], list[str]]:
        """The weights as named tensors, and the names of what is left out (optimiser, args, ...).

        Args:
            ema: the averaged weights (True) or the raw ones (False) of a file that has both.

        Raises:
            UsageError: the file has both and `ema` is None, or none and `ema` is True.
            UnreadableFile: no weights, or tensors of a kind that is not read.
            DoesNotFit: several sets of weights and no way to tell.
        """
        key = self._container(ema)
        state = self.top if key is None else self.top[key]
        skipped = [] if key is None else [_one_line(name) for name in self.top if name != key]
        tensors: dict[str, np.ndarray] = {}
        total = 0
        for name, value in state.items():
            if name == pdparams.NAME_TABLE:
                skipped.append(name)
                continue
            if not isinstance(name, str):
                raise UnreadableFile(f"{self.path}: an entry whose name is not text")
            if len(name) > MAX_NAME or not name.isprintable():
                raise UnreadableFile(f"{self.path}: an entry whose name is not one of a tensor: {_one_line(name)}")
            try:
                tensors[name] = self._array(value)
            except UnreadableFile as error:
                raise UnreadableFile(f"{self.path}: {name[:80]}: {_one_line(error)}") from error
            total += tensors[name].nbytes
            # Views of one storage may share numbers, but no honest file repeats itself four times.
            if total > 4 * len(self.data):
                raise UnreadableFile(f"{self.path}: its tensors are over four times its size: absurd, refused")
        return tensors, skipped

    def _container(self, ema: bool | None) -> str | None:
        """The key of the chosen state dict; None: the file is one itself."""
        raw = [key for key in _STATES if isinstance(self.top.get(key), dict)]
        averaged = [key for key in _EMA_STATES if isinstance(self.top.get(key), dict)]
        if ema is None and averaged:
            raise UsageError(
                f"{self.path} has averaged weights ({averaged[0]}) beside the raw ones: "
                "choose with --ema or --no-ema (in Python: ema=True or False)"
            )
        if ema and not averaged:
            raise UsageError(f"{self.path} has no averaged weights; leave out --ema")
        chosen = averaged if ema else raw
        if len(chosen) > 1:
            raise DoesNotFit(
                f"{self.path} has several sets of weights ({', '.join(chosen)}); save the one you mean alone"
            )
        if chosen:
            return chosen[0]
        if averaged:
            raise UsageError(f"{self.path} has averaged weights only; choose them with --ema")
        if any(isinstance(self.top.get(key), Opaque) for key in _STATES):
            raise UnreadableFile(
                f"{self.path} holds a whole pickled model, which only its own code can load; "
                "in PyTorch: torch.save(model.state_dict(), FILE)"
            )
        return None

    def _array(self, value: object) -> np.ndarray:
        match value:
            case np.ndarray():
                return value
            case torch_file.TensorRef() | pdparams.ArrayRef():
                return value.array(len(self.data))
            case torch_file.Refused():
                raise UnreadableFile(f"a {value.name} is not read; save it again as a plain dense tensor")
            case (str(), pdparams.ArrayRef() as reference):
                return reference.array(len(self.data))
            case _:
                kind = value.name if isinstance(value, Opaque) else type(value).__name__
                raise UnreadableFile(f"is a {kind[:60]}, expected a tensor; the file is not a state dict")


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a PyTorch (zip or older), safetensors or Paddle file; what it is is told by its content.

    Raises:
        UnreadableFile: missing, empty, of another kind, damaged, or unsafe.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for its other end
            raise UnreadableFile(f"{path}: a directory or a device, not a file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise UnreadableFile(f"{path}: the file is empty")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        if isinstance(error, UnreadableFile):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableFile(f"{path}: cannot be opened: {reason}") from error
    try:
        return _parse(path, data)
    except UnreadableFile as error:
        raise UnreadableFile(f"{path}: {_one_line(error)}") from error


def _one_line(text: object) -> str:
    """A file's own words as part of a message: one line, of bearable length, nothing a terminal obeys."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:300])


def _parse(path: Path, data: mmap.mmap) -> Checkpoint:
    head = data[:64]
    header: Header | None = None
    if head.startswith(b"PK\x03\x04"):
        kind, top = ZIP, torch_file.read_zip(data)
    elif safetensors_file.looks_like(head):
        kind = SAFETENSORS
        top, metadata = safetensors_file.read(path, data)
        header = Header.from_json(metadata[KEY]) if KEY in metadata else None
    elif head.startswith(b"\x80") and _PICKLED_MAGIC in head[:32]:
        kind, top = LEGACY, torch_file.read_legacy(data)
    elif head.startswith(b"\x80"):
        kind, top = PDPARAMS, pdparams.read(data)
    else:
        if data[257:262] == b"ustar":
            raise UnreadableFile("a tar archive (or PyTorch's format of before 2017); unpack it, or save it again")
        what = foreign_kind(data[:KIND_BYTES])
        expected = "expected PyTorch's .pth, safetensors or Paddle's .pdparams"
        raise UnreadableFile(f"not a checkpoint: {expected if what in (None, TEXT) else what}")
    if not isinstance(top, dict):
        what = top.name if isinstance(top, Opaque) else type(top).__name__
        raise UnreadableFile(
            f"holds a {what[:60]}, not a dictionary of weights; in PyTorch: torch.save(model.state_dict(), FILE)"
        )
    checkpoint = Checkpoint(path, kind, top, header, data)
    if header is None and os.path.isfile(sidecar(path)):  # noqa: PTH113 -- the path's own method raises if it is too long
        header = _read_sidecar(checkpoint)
    return dataclasses.replace(checkpoint, header=header)


def sidecar(path: Path) -> Path:
    """Where the header of a format without one stands: the file's whole name with `.json` added."""
    return path.with_name(path.name + ".json")


def _read_sidecar(checkpoint: Checkpoint) -> Header:
    path = sidecar(checkpoint.path)
    try:
        if path.stat().st_size > MAX_SIDECAR:
            raise UnreadableFile(f"{path.name} beside it is over {MAX_SIDECAR >> 20} MiB: not a header")
        header = Header.from_json(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableFile(f"{path.name} beside it cannot be read ({error}); mend or remove it") from error
    if header.weights_sha256 != checkpoint.sha256:
        raise UnreadableFile(
            f"{path.name} beside it describes other weights (SHA-256 differs); remove it or restore both"
        )
    return header
