"""Open a checkpoint of any format and select its weights as named NumPy tensors.

The format is detected from the content. Nothing in the file is executed, and neither framework is needed. The file
is read into memory once and the tensors are views into these bytes, so later changes to the file have no effect.
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
from fcvit.models.spec import HEADS, LAST_NAMES, is_counter, is_statistic
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
MEMORY = "memory"  # weights taken from a model instead of a file
_PICKLED_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of PyTorch's legacy format
# Files that are often passed by mistake: extension -> what is wrong and which file to pass instead.
_ENDINGS = {
    ".onnx": "an exported ONNX graph does not contain the weights' names; pass the checkpoint it was exported from",
    ".xml": "an exported OpenVINO network without the weights' names; pass the checkpoint it was exported from",
    ".pdiparams": "an exported Paddle network does not contain the names of its weights; pass the checkpoint it was "
    "exported from, or to predict and eval its .json file",
    ".pdmodel": "an exported network of Paddle 2, which is not supported; pass the training's .pdparams",
    ".pdopt": "this is the state of Paddle's optimizer; pass the .pdparams file that was saved with it",
}
_MOMENTS = ("_moment1_0", "_velocity_0", "LR_Scheduler")  # name endings in the state of Paddle's optimizers
_HEAD = 512  # bytes at the beginning of a file that are used to detect its format
MAX_NAME = 256  # characters in a tensor's name
_TENSORS = (np.ndarray, torch_file.TensorRef, pdparams.ArrayRef, torch_file.Refused, tuple)
_MODELS = ("model", "state_dict", "net", "ema")  # keys under which training scripts store a pickled model


class Selection(NamedTuple):
    """Named tensors selected from a checkpoint, the names of the skipped entries, and notes for the user."""

    tensors: dict[str, np.ndarray]
    skipped: list[str]
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `select` returns its weights.

    Attributes:
        path: Path of the file.
        format: Name of the detected format.
        top: Top-level dictionary of the file.
        header: Header with metadata of converted weights, or None if the file has no header.
        data: Contents of the file, or of the index if the checkpoint is sharded.
        shards: Checkpoints listed in the index of a sharded checkpoint.
    """

    path: Path
    format: str
    top: dict
    header: Header | None
    data: bytes
    shards: "tuple[Checkpoint, ...]" = ()

    @functools.cached_property
    def sha256(self) -> str:
        """Return the SHA-256 of the file and its shards in hexadecimal, or "" for weights from a model."""
        if not self.data:
            return ""
        digest = hashlib.sha256(self.data)
        for shard in self.shards:
            digest.update(shard.sha256.encode())
        return digest.hexdigest()

    @property
    def size(self) -> int:
        """Return the size of the file and its shards in bytes."""
        return len(self.data) + sum(len(shard.data) for shard in self.shards)

    @functools.cached_property
    def sets(self) -> list[WeightSet]:
        """Return the sets of weights in the file, found by tensor names.

        Raises:
            UnreadableFile: If the file contains a pickled model instead of weights.
        """
        sets = find_sets(self.top) or any_state(self.top, _TENSORS)
        for name, value in self.top.items() if not sets else ():
            if isinstance(value, Opaque) and (
                name in _MODELS or (isinstance(value.state, dict) and "_parameters" in value.state)
            ):
                raise UnreadableFile(
                    f"{self.path}: the file contains a pickled model, which only the model's own code can load; "
                    "save its weights in PyTorch with torch.save(model.state_dict(), FILE)"
                )
        return sets or [WeightSet((), "", self.top, {}, averaged=False, probed=False)]

    @property
    def has_ema(self) -> bool:
        return any(weight_set.averaged for weight_set in self.sets)

    def select(self, ema: bool | None = None, key: str | None = None) -> Selection:
        """Return the weights as named tensors, without the prefixes that wrappers add to the names.

        Args:
            ema: True selects the EMA weights and False the raw weights of a file that contains both.
            key: Label of the set of weights to select, as listed in the error about several sets.

        Raises:
            UsageError: If the file contains several sets and none is selected, or the selected set does not exist.
            UnreadableFile: If the file contains no weights, or tensors of an unsupported kind.
            DoesNotFit: If two names are equal after their prefixes are removed.
        """
        chosen = self._choose(ema, key)
        tensors, rest = self._tensors(chosen)
        notes = []
        if len(chosen.keys) > 1 or not set(chosen.keys) <= {"state_dict", "model"}:
            notes.append(f"using the weights stored under: {one_line('.'.join(chosen.keys))}")
        if removed := _removed_prefix(chosen):
            notes.append(f"removed this prefix from the tensor names: {one_line(removed)}")
        if note := swapped_by(self.top):
            notes.append(note)
        if chosen.averaged and not any(map(is_statistic, tensors)):
            raw = [weight_set for weight_set in self.sets if not weight_set.averaged and self._fits(weight_set)]
            if len(raw) == 1:  # EMAs without buffers are evaluated with the raw model's statistics
                tensors |= {name: t for name, t in self._tensors(raw[0])[0].items() if is_statistic(name)}
                notes.append("the EMA weights contain no BatchNorm statistics; using those of the raw weights")
        if chosen.probed and (foreign := [name for name in rest if name != pdparams.NAME_TABLE]):
            shown = ", ".join(map(one_line, foreign[:3])) + (f", ... ({len(foreign)})" if len(foreign) > 3 else "")
            notes.append(f"skipped entries that are not weights of the network: {shown}")
        skipped, here = [], self.top
        for depth, part in enumerate(chosen.keys):
            skipped += [one_line(".".join((*chosen.keys[:depth], str(name)))) for name in here if name != part]
            here = here[part]
        skipped += [
            one_line(weight_set.label)
            for weight_set in self.sets
            if weight_set.keys == chosen.keys and weight_set != chosen
        ]
        return Selection(tensors, skipped + rest, notes)

    def _choose(self, ema: bool | None, key: str | None) -> WeightSet:
        """Return the set of weights that fits the request."""
        labels = ", ".join(one_line(weight_set.label) for weight_set in self.sets)
        if key is not None:
            named = [weight_set for weight_set in self.sets if weight_set.label == key]
            if len(named) != 1:
                raise UsageError(
                    f"{self.path}: there is no set of weights {one_line(key)!r}; expected one of: {labels}"
                )
            return named[0]
        averaged = [weight_set for weight_set in self.sets if weight_set.averaged]
        raw = [weight_set for weight_set in self.sets if not weight_set.averaged]
        which = one_line(averaged[0].label) if averaged else ""
        if averaged and not ema and not raw:
            raise UsageError(f"{self.path}: the file contains only EMA weights ({which}); select them with --ema")
        if ema is None and averaged:
            raise UsageError(
                f"{self.path}: the file contains EMA weights ({which}) and raw weights; "
                "select one set with --ema or --no-ema (in Python: ema=True or False)"
            )
        if not averaged and ema is not False and (where := self._nameless_average()):
            raise UsageError(
                f"{self.path}: the file contains raw weights, and EMA weights ({one_line(where)}) as a list without "
                "tensor names, which cannot be read; select the raw weights with --no-ema "
                "(in Python: ema=False), or copy the EMA weights into the model and save its state_dict()"
            )
        if ema and not averaged and not raw[0].counted:
            raise UsageError(f"{self.path}: the file contains no EMA weights; remove --ema")
        chosen = averaged if ema and averaged else raw
        fitting = [weight_set for weight_set in chosen if self._fits(weight_set)] if len(chosen) > 1 else chosen
        if len(fitting) != 1:
            raise UsageError(
                f"{self.path}: the file contains several sets of weights "
                f"({', '.join(one_line(weight_set.label) for weight_set in chosen)}); select one with --key NAME "
                "in fcvit inspect, or save it to its own file with fcvit convert --key NAME"
            )
        return fitting[0]

    def _nameless_average(self) -> str | None:
        """Return the location of EMA weights stored as a list without names, or None if there are none."""

        def weights(value: object) -> bool:
            if isinstance(value, dict):
                return bool(find_sets(value))
            state = value.state if isinstance(value, pdparams.ArrayRef) else None
            shape = state[1] if isinstance(state, tuple) and len(state) > 1 else getattr(value, "shape", None)
            return isinstance(shape, tuple) and len(shape) == 4  # the shape of a convolution's weight

        return next((where for where, values in averaged_lists(self.top) if any(map(weights, values))), None)

    def _fits(self, weight_set: WeightSet) -> bool:
        try:
            tensors, _ = self._tensors(weight_set)
        except (UnreadableFile, DoesNotFit):
            return False
        return makes_fcvit({name: tensor.shape for name, tensor in tensors.items()})

    def _tensors(self, weight_set: WeightSet) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return the tensors of a set of weights, and the names in its dictionary that were skipped.

        The other entries of the dictionary are skipped if the set is a complete classifier. Otherwise they are part of
        the network, such as a head stored next to its backbone, and their names lose the wrappers' prefixes.
        """
        if not all(isinstance(name, str) for name in (*weight_set.entries, *weight_set.others)):
            raise UnreadableFile(f"{self.path}: the name of an entry is not text")
        parent = _parent(weight_set.prefix)
        if (removed := _removed_prefix(weight_set)) != weight_set.prefix:
            trunk = weight_set.prefix.removeprefix(removed)
            entries = {trunk + name: value for name, value in weight_set.entries.items()}
            rest = {name.removeprefix(removed): value for name, value in weight_set.others.items()}
            return self._arrays(weight_set, entries | rest)
        if weight_set.others and not any(name.startswith(DETECTOR_PARTS) for name in weight_set.others):
            alone, rest = self._arrays(weight_set, weight_set.entries)
            if "head.weight" in alone and makes_fcvit({name: tensor.shape for name, tensor in alone.items()}):
                return alone, rest + list(weight_set.others)
        if not weight_set.probed:
            return self._arrays(weight_set, weight_set.entries)
        joined = dict(weight_set.entries)
        for name in [name for name in weight_set.entries if strip_wrappers(name) != name] + list(weight_set.others):
            short = strip_wrappers(name.removeprefix(parent) if name in weight_set.others else name)
            if short in joined:
                both = f"{weight_set.prefix + short!r} and {name!r}"
                raise DoesNotFit(f"{self.path}: {both} are the same name after their prefixes are removed")
            joined[short] = weight_set.others[name] if name in weight_set.others else joined.pop(name)
        return self._arrays(weight_set, joined)

    def _arrays(self, weight_set: WeightSet, entries: Mapping[str, object]) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return the tensors among the entries, and the names of entries that are not weights, such as counters.

        Raises:
            UnreadableFile: If a tensor cannot be read, or the tensors are far larger than the file.
        """
        tensors: dict[str, np.ndarray] = {}
        rest: list[str] = []
        total = 0
        for name, value in entries.items():
            if name == pdparams.NAME_TABLE:
                rest.append(name)
                continue
            if len(name) > MAX_NAME or not name.isprintable():
                raise UnreadableFile(f"{self.path}: an entry has an invalid tensor name: {one_line(name)}")
            foreign = weight_set.probed and name.rpartition(".")[2] not in LAST_NAMES
            if foreign and not isinstance(value, _TENSORS):
                rest.append(name)
                continue
            try:
                number = pdparams.single(value) if is_counter(name) else None
                array = self.array(value) if number is None else number
            except UnreadableFile as error:
                raise UnreadableFile(f"{self.path}: {name[:80]}: {one_line(error)}") from error
            # Counters such as n_averaged or steps. A fraction may be a parameter of another architecture, but among
            # EMA weights it is the decay.
            if foreign and array.size == 1 and "." not in name and (weight_set.averaged or array.dtype.kind in "iub"):
                rest.append(name)
                continue
            tensors[name] = array
            total += array.nbytes
            # Tensors may share a storage, but no valid checkpoint expands to more than four times its size.
            if total > 4 * self.size:
                raise UnreadableFile(
                    f"{self.path}: the tensors are over four times as large as the file, which is unsafe to load"
                )
        return tensors, rest

    def array(self, value: object) -> np.ndarray:
        """Return one entry of the file as an array.

        Raises:
            UnreadableFile: If the entry is not a plain tensor.
        """
        match value:
            case np.ndarray():
                return value
            case torch_file.TensorRef():
                return value.array(self.size)
            case pdparams.ArrayRef():
                array = value.array(self.size)
                # Only Paddle stores bfloat16 as uint16.
                return array if self.format == PDPARAMS or array.dtype != BFLOAT16 else array.view(np.uint16)
            case torch_file.Refused():
                raise UnreadableFile(f"a {value.name} is not supported; save it again as a plain dense tensor")
            case (str(), pdparams.ArrayRef() as reference):
                return self.array(reference)
            case _:
                kind = value.name if isinstance(value, Opaque) else type(value).__name__
                raise UnreadableFile(f"expected a tensor, found a {kind[:60]}; the file is not a state dict")


def _parent(prefix: str) -> str:
    """Return the prefix that a backbone shares with a head next to it."""
    return prefix[: prefix.rfind(".", 0, -1) + 1]


def _removed_prefix(weight_set: WeightSet) -> str:
    """Return the prefix that is not part of the tensor names of the network.

    In a segmenter or detector, the names of the trunk begin with `backbone.`, next to those of neck and head.
    """
    parent = _parent(weight_set.prefix)
    trunk = weight_set.prefix.removeprefix(parent)
    complete = any(
        head.prefix == trunk and parent + head.marker in weight_set.others for head in HEADS.values() if trunk
    )
    return parent if complete else weight_set.prefix


def read_checkpoint(path: str | os.PathLike[str], *, shards: bool = True) -> Checkpoint:
    """Open a PyTorch (zip or legacy), safetensors or Paddle checkpoint. The format is detected from the content.

    Args:
        path: A checkpoint file, a folder with the file names of the Hugging Face Hub, or the index of a sharded
            checkpoint.
        shards: Whether to accept the index of a sharded checkpoint.

    Raises:
        UnreadableFile: If the file is missing, empty, in another format, damaged or unsafe.
    """
    path = hub.file_in(Path(path))
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise UnreadableFile("expected a file, found a directory or a device")
        with path.open("rb") as file:
            _kind(file.read(_HEAD), path.suffix)  # reject other files before reading them into memory
        return _parse(path, read_file(path), shards)
    except UnreadableFile as error:
        raise UnreadableFile(f"{path}: {one_line(error)}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableFile(f"{path}: cannot be opened: {reason}") from error
    except MemoryError as error:
        raise UnreadableFile(f"{path}: the file is larger than the free memory of this machine") from error


def read_file(path: Path) -> bytes:
    """Read a file into memory.

    Raises:
        OSError: If the file cannot be read.
        UnreadableFile: If another program changed the file during reading.
    """
    with path.open("rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        data = file.readall()
        after = os.fstat(file.fileno())
    if not before.st_size == len(data) == after.st_size or before.st_mtime_ns != after.st_mtime_ns:
        raise UnreadableFile("the file changed while it was read; try again when it is completely written")
    return data


def _kind(head: bytes, suffix: str) -> str:
    """Detect the format from the first bytes of a file. Its extension only makes the error more specific."""
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
        raise UnreadableFile("a tar archive, or a PyTorch file from before 2017; extract it, or save it again")
    what = foreign_kind(head[:KIND_BYTES])
    if what in (None, TEXT):
        what = "expected a PyTorch .pth, safetensors or Paddle .pdparams file"
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
            raise UnreadableFile("expected a shard, found another index of shards")
        return _read_shards(path, data)
    else:
        top = {ZIP: torch_file.read_zip, LEGACY: torch_file.read_legacy, PDPARAMS: pdparams.read}[kind](data)
    if not isinstance(top, dict):
        what = top.name if isinstance(top, Opaque) else type(top).__name__
        raise UnreadableFile(
            f"expected a dictionary of weights, found a {what[:60]}; "
            "save the weights in PyTorch with torch.save(model.state_dict(), FILE)"
        )
    if kind == PDPARAMS and any(isinstance(name, str) and name.endswith(_MOMENTS) for name in top):
        raise UnreadableFile(_ENDINGS[".pdopt"])
    checkpoint = Checkpoint(path, kind, top, header, data)
    if header is None and os.path.isfile(sidecar(path)):  # noqa: PTH113 -- Path.is_file raises for a path that is too long
        checkpoint = dataclasses.replace(checkpoint, header=read_sidecar(path, checkpoint.sha256))
    return checkpoint


def _read_shards(path: Path, data: bytes) -> Checkpoint:
    """Read the tensors of all shards of an index, and check that each shard contains what the index lists."""
    names = hub.shards(path, data)
    parts = tuple(read_checkpoint(path.parent / name, shards=False) for name in names)
    tensors = {}
    for (name, expected), part in zip(names.items(), parts, strict=True):
        if wrong := sorted(expected ^ {str(tensor) for tensor in part.top}):
            raise UnreadableFile(
                f"{wrong[0][:80]} is {'missing from' if wrong[0] in expected else 'in'} the shard {name[:80]}, "
                "which contradicts the index; download all shards again"
            )
        tensors |= {tensor: part.array(value) for tensor, value in part.top.items()}
    return Checkpoint(path, f"{parts[0].format} in {len(parts)} shards", tensors, None, data, parts)
