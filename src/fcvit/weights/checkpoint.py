"""Open a checkpoint of any format, detected from the content, and select its weights: named NumPy tensors.

Nothing in the file is executed, neither framework is needed, and the tensors are views into the bytes
of the file, which are read once: nobody can change or cut the file under them.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fcvit.errors import DoesNotFit, UnreadableFile, UsageError
from fcvit.foreign import KIND_BYTES, TEXT, foreign_kind
from fcvit.models.spec import LAST_NAMES, is_counter, is_statistic
from fcvit.text import one_line
from fcvit.weights import hub, pdparams, safetensors_file, torch_file
from fcvit.weights.dtypes import BFLOAT16
from fcvit.weights.header import KEY, Header, read_sidecar, sidecar
from fcvit.weights.safe_unpickler import Opaque
from fcvit.weights.sets import (
    DETECTOR_PARTS,
    WeightSet,
    any_state,
    averaged_lists,
    find_sets,
    makes_fcvit,
    strip_wrappers,
    swapped_by,
)

ZIP, LEGACY, SAFETENSORS, PDPARAMS = "pytorch (zip)", "pytorch (older)", "safetensors", "pdparams"
INDEX = "index of shards"
MEMORY = "memory"  # no file at all: a model's
_PICKLED_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of PyTorch's older format
# Files beside weights, by the endings of their names -> what they are and what to give instead.
_ENDINGS = {
    ".onnx": "an exported ONNX graph, without the names of the weights; give the checkpoint that it was exported from",
    ".pdiparams": "an exported Paddle network's weights, without their names; give the .pdparams of the training",
    ".pdmodel": "an exported Paddle network without its weights; give the .pdparams of the training",
    ".pdopt": "the state of Paddle's optimizer; the weights are in the .pdparams beside it",
}
_MOMENTS = ("_moment1_0", "_velocity_0", "LR_Scheduler")  # ends of names in the state of Paddle's optimizers
_HEAD = 512  # bytes at the beginning of a file that tell what it is
MAX_NAME = 256  # characters of a tensor's name
_TENSORS = (np.ndarray, torch_file.TensorRef, pdparams.ArrayRef, torch_file.Refused, tuple)
_MODELS = ("model", "state_dict", "net", "ema")  # where whole pickled models stand


class Selection(NamedTuple):
    """Weights of a file as named tensors, the names of what is left out, and what a person should know of both."""

    tensors: dict[str, np.ndarray]
    skipped: list[str]
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened file. `path`, `format` and `header` say what it is, `select` gives the tensors.

    `shards`: the files that an index names; `data` is then the index.
    """

    path: Path
    format: str
    top: dict
    header: Header | None
    data: bytes
    shards: "tuple[Checkpoint, ...]" = ()

    @functools.cached_property
    def sha256(self) -> str:
        """The digest of the whole file, in hexadecimal; empty for weights that were never in one."""
        if not self.data:
            return ""
        digest = hashlib.sha256(self.data)
        for shard in self.shards:
            digest.update(shard.sha256.encode())
        return digest.hexdigest()

    @property
    def size(self) -> int:
        """The bytes of the file and of the shards that it names."""
        return len(self.data) + sum(len(shard.data) for shard in self.shards)

    @functools.cached_property
    def sets(self) -> list[WeightSet]:
        """The sets of weights in the file, found by names.

        Raises:
            UnreadableFile: none, but a whole pickled model.
        """
        sets = find_sets(self.top) or any_state(self.top, _TENSORS)
        for name, value in self.top.items() if not sets else ():
            if isinstance(value, Opaque) and (
                name in _MODELS or (isinstance(value.state, dict) and "_parameters" in value.state)
            ):
                raise UnreadableFile(
                    f"{self.path} holds a whole pickled model, which only its own code can load; "
                    "in PyTorch: torch.save(model.state_dict(), FILE)"
                )
        return sets or [WeightSet((), "", self.top, {}, averaged=False, probed=False)]

    @property
    def has_ema(self) -> bool:
        return any(one.averaged for one in self.sets)

    def select(self, ema: bool | None = None, key: str | None = None) -> Selection:
        """Return the weights as named tensors, without what stands before their names in the file.

        Args:
            ema: the averaged weights (True) or the raw ones (False) of a file that has both.
            key: which of several sets, by the name that the error about them gives it.

        Raises:
            UsageError: several sets and no way to tell, or not the one that was asked for.
            UnreadableFile: no weights, or tensors of a kind that is not read.
            DoesNotFit: two names become one without their prefixes.
        """
        chosen = self._choose(ema, key)
        tensors, rest = self._tensors(chosen)
        notes = []
        if len(chosen.keys) > 1 or not set(chosen.keys) <= {"state_dict", "model"}:
            notes.append(f"weights taken from: {one_line('.'.join(chosen.keys))}")
        if chosen.prefix:
            notes.append(f"prefix stripped from the names: {one_line(chosen.prefix)}")
        if note := swapped_by(self.top):
            notes.append(note)
        if chosen.averaged and not any(map(is_statistic, tensors)):
            raw = [one for one in self.sets if not one.averaged and self._fits(one)]
            if len(raw) == 1:  # such averages are evaluated so
                tensors |= {name: t for name, t in self._tensors(raw[0])[0].items() if is_statistic(name)}
                notes.append("the averaged weights are stored without BatchNorm's statistics: the raw ones' are used")
        if chosen.probed and (foreign := [name for name in rest if name != pdparams.NAME_TABLE]):
            shown = ", ".join(map(one_line, foreign[:3])) + (f", ... ({len(foreign)})" if len(foreign) > 3 else "")
            notes.append(f"entries that are no weights of the network were left out: {shown}")
        skipped, here = [], self.top
        for depth, part in enumerate(chosen.keys):
            skipped += [one_line(".".join((*chosen.keys[:depth], str(name)))) for name in here if name != part]
            here = here[part]
        skipped += [one_line(one.label) for one in self.sets if one.keys == chosen.keys and one != chosen]
        return Selection(tensors, skipped + rest, notes)

    def _choose(self, ema: bool | None, key: str | None) -> WeightSet:
        """Return the one set that fits the request."""
        labels = ", ".join(one_line(one.label) for one in self.sets)
        if key is not None:
            named = [one for one in self.sets if one.label == key]
            if len(named) != 1:
                raise UsageError(f"{self.path} has no set of weights {one_line(key)!r}; expected one of: {labels}")
            return named[0]
        averaged = [one for one in self.sets if one.averaged]
        raw = [one for one in self.sets if not one.averaged]
        which = one_line(averaged[0].label) if averaged else ""
        if averaged and not ema and not raw:
            raise UsageError(f"{self.path} has averaged weights only ({which}); choose them with --ema")
        if ema is None and averaged:
            raise UsageError(
                f"{self.path} has averaged weights ({which}) beside the raw ones: "
                "choose with --ema or --no-ema (in Python: ema=True or False)"
            )
        if not averaged and ema is not False and (where := self._nameless_average()):
            raise UsageError(
                f"{self.path} has averaged weights ({one_line(where)}) as a list, which does not say their names and "
                "is not read, beside the raw ones: choose the raw ones with --no-ema (in Python: ema=False), or copy "
                "the averaged ones into the model and save its state_dict()"
            )
        if ema and not averaged and not raw[0].counted:
            raise UsageError(f"{self.path} has no averaged weights; leave out --ema")
        chosen = averaged if ema and averaged else raw
        fitting = [one for one in chosen if self._fits(one)] if len(chosen) > 1 else chosen
        if len(fitting) != 1:
            raise UsageError(
                f"{self.path} has several sets of weights ({', '.join(one_line(one.label) for one in chosen)}): "
                "choose one with --key NAME in fcvit inspect, or write it alone with fcvit convert --key NAME"
            )
        return fitting[0]

    def _nameless_average(self) -> str | None:
        """Return where averaged weights stand in a list, which does not say their names; None: nowhere."""

        def weights(value: object) -> bool:
            if isinstance(value, dict):
                return bool(find_sets(value))
            state = value.state if isinstance(value, pdparams.ArrayRef) else None
            shape = state[1] if isinstance(state, tuple) and len(state) > 1 else getattr(value, "shape", None)
            return isinstance(shape, tuple) and len(shape) == 4  # of a convolution

        return next((where for where, values in averaged_lists(self.top) if any(map(weights, values))), None)

    def _fits(self, one: WeightSet) -> bool:
        try:
            tensors, _ = self._tensors(one)
        except (UnreadableFile, DoesNotFit):
            return False
        return makes_fcvit({name: tensor.shape for name, tensor in tensors.items()})

    def _tensors(self, one: WeightSet) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return the tensors of a set, and the names in its dictionary that are not among them.

        The rest of the dictionary is left out if the set is a whole classifier without it. Else it belongs to
        the network, its names stripped of wrappers' prefixes, as a head beside a backbone does.
        """
        if not all(isinstance(name, str) for name in (*one.entries, *one.others)):
            raise UnreadableFile(f"{self.path}: an entry whose name is not text")
        if one.others and not any(name.startswith(DETECTOR_PARTS) for name in one.others):
            alone, rest = self._arrays(one, one.entries)
            if "head.weight" in alone and makes_fcvit({name: tensor.shape for name, tensor in alone.items()}):
                return alone, rest + list(one.others)
        if not one.probed:
            return self._arrays(one, one.entries)
        joined = dict(one.entries)
        parent = one.prefix[: one.prefix.rfind(".", 0, -1) + 1]  # of a head beside a backbone
        for name in [name for name in one.entries if strip_wrappers(name) != name] + list(one.others):
            short = strip_wrappers(name.removeprefix(parent) if name in one.others else name)
            if short in joined:
                both = f"{one.prefix + short!r} and {name!r}"
                raise DoesNotFit(f"{self.path}: {both} are one name once their prefixes are stripped")
            joined[short] = one.others[name] if name in one.others else joined.pop(name)
        return self._arrays(one, joined)

    def _arrays(self, one: WeightSet, entries: Mapping[str, object]) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return the tensors among entries, and the names of those that are no weights, such as an average's counters.

        Raises:
            UnreadableFile: one cannot be read, or they are absurdly large.
        """
        tensors: dict[str, np.ndarray] = {}
        rest: list[str] = []
        total = 0
        for name, value in entries.items():
            if name == pdparams.NAME_TABLE:
                rest.append(name)
                continue
            if len(name) > MAX_NAME or not name.isprintable():
                raise UnreadableFile(f"{self.path}: an entry whose name is not one of a tensor: {one_line(name)}")
            foreign = one.probed and name.rpartition(".")[2] not in LAST_NAMES
            if foreign and not isinstance(value, _TENSORS):
                rest.append(name)
                continue
            try:
                number = pdparams.single(value) if is_counter(name) else None
                array = self.array(value) if number is None else number
            except UnreadableFile as error:
                raise UnreadableFile(f"{self.path}: {name[:80]}: {one_line(error)}") from error
            # Such as n_averaged or steps. A fraction may be a parameter of another architecture; that of an
            # average is its decay.
            if foreign and array.size == 1 and "." not in name and (one.averaged or array.dtype.kind in "iub"):
                rest.append(name)
                continue
            tensors[name] = array
            total += array.nbytes
            # Views of one storage may share numbers, but no honest file repeats itself four times.
            if total > 4 * self.size:
                raise UnreadableFile(f"{self.path}: its tensors are over four times its size: absurd, refused")
        return tensors, rest

    def array(self, value: object) -> np.ndarray:
        """Return one entry of the file as an array.

        Raises:
            UnreadableFile: it is no plain tensor.
        """
        match value:
            case np.ndarray():
                return value
            case torch_file.TensorRef():
                return value.array(self.size)
            case pdparams.ArrayRef():
                array = value.array(self.size)
                # Only Paddle means bfloat16 by uint16.
                return array if self.format == PDPARAMS or array.dtype != BFLOAT16 else array.view(np.uint16)
            case torch_file.Refused():
                raise UnreadableFile(f"a {value.name} is not read; save it again as a plain dense tensor")
            case (str(), pdparams.ArrayRef() as reference):
                return self.array(reference)
            case _:
                kind = value.name if isinstance(value, Opaque) else type(value).__name__
                raise UnreadableFile(f"is a {kind[:60]}, expected a tensor; the file is not a state dict")


def read_checkpoint(path: str | os.PathLike[str], *, shards: bool = True) -> Checkpoint:
    """Open a PyTorch (zip or older), safetensors or Paddle file; the format is detected from the content.

    Args:
        path: the file; or a folder of the Hugging Face Hub; or the index of a file in several shards.
        shards: follow an index.

    Raises:
        UnreadableFile: missing, empty, of another kind, damaged, or unsafe.
    """
    path = hub.file_in(Path(path))
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for its other end
            raise UnreadableFile("a directory or a device, not a file")
        with path.open("rb") as file:
            _kind(file.read(_HEAD), path.suffix)  # before much memory is taken for something else
        return _parse(path, read_file(path), shards)
    except UnreadableFile as error:
        raise UnreadableFile(f"{path}: {one_line(error)}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableFile(f"{path}: cannot be opened: {reason}") from error
    except MemoryError as error:
        raise UnreadableFile(f"{path}: larger than the free memory of this machine") from error


def read_file(path: Path) -> bytes:
    """Read a whole file into memory at once.

    Raises:
        OSError: it cannot be read.
        UnreadableFile: another program wrote to it meanwhile.
    """
    with path.open("rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        data = file.readall()
        after = os.fstat(file.fileno())
    if not before.st_size == len(data) == after.st_size or before.st_mtime_ns != after.st_mtime_ns:
        raise UnreadableFile("the file changed while it was read; wait until it is written, then try again")
    return data


def _kind(head: bytes, suffix: str) -> str:
    """Tell the format by the first bytes of a file; the ending of its name only says why it is none."""
    if not head:
        raise UnreadableFile("the file is empty")
    if head.startswith(b"PK\3\4"):
        return ZIP
    if safetensors_file.looks_like(head):
        return SAFETENSORS
    if head.startswith(b"\x80"):
        return LEGACY if _PICKLED_MAGIC in head[:32] else PDPARAMS
    if head.lstrip().startswith(b"{"):
        return INDEX
    if head[257:262] == b"ustar":
        raise UnreadableFile("a tar archive (or PyTorch's format of before 2017); unpack it, or save it again")
    what = foreign_kind(head[:KIND_BYTES])
    if what in (None, TEXT):
        what = "expected PyTorch's .pth, safetensors or Paddle's .pdparams"
    raise UnreadableFile(_ENDINGS.get(suffix, f"not a checkpoint: {what}"))


def _parse(path: Path, data: bytes, shards: bool) -> Checkpoint:
    kind = _kind(data[:_HEAD], path.suffix)
    header: Header | None = None
    top: object
    if kind == SAFETENSORS:
        top, metadata = safetensors_file.read(data)
        header = Header.from_json(metadata[KEY]) if KEY in metadata else None
    elif kind == INDEX:
        if not shards:
            raise UnreadableFile("an index of shards in place of a shard")
        return _read_shards(path, data)
    else:
        top = {ZIP: torch_file.read_zip, LEGACY: torch_file.read_legacy, PDPARAMS: pdparams.read}[kind](data)
    if not isinstance(top, dict):
        what = top.name if isinstance(top, Opaque) else type(top).__name__
        raise UnreadableFile(
            f"holds a {what[:60]}, not a dictionary of weights; in PyTorch: torch.save(model.state_dict(), FILE)"
        )
    if kind == PDPARAMS and any(isinstance(name, str) and name.endswith(_MOMENTS) for name in top):
        raise UnreadableFile(_ENDINGS[".pdopt"])
    checkpoint = Checkpoint(path, kind, top, header, data)
    if header is None and os.path.isfile(sidecar(path)):  # noqa: PTH113 -- the path's own method raises if it is too long
        checkpoint = dataclasses.replace(checkpoint, header=read_sidecar(path, checkpoint.sha256))
    return checkpoint


def _read_shards(path: Path, data: bytes) -> Checkpoint:
    """Read the tensors of all shards that an index names, each checked to be where it says."""
    names = hub.shards(path, data)
    parts = tuple(read_checkpoint(path.parent / name, shards=False) for name in names)
    tensors = {}
    for (name, expected), part in zip(names.items(), parts, strict=True):
        if wrong := sorted(expected ^ {str(tensor) for tensor in part.top}):
            raise UnreadableFile(
                f"{wrong[0][:80]} is {'missing from' if wrong[0] in expected else 'in'} the shard {name[:80]}, "
                "other than the index says; fetch all shards again"
            )
        tensors |= {tensor: part.array(value) for tensor, value in part.top.items()}
    return Checkpoint(path, f"{parts[0].format} in {len(parts)} shards", tensors, None, data, parts)
