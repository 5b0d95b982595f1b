"""Find the sets of weights in a checkpoint by names alone, and tell raw from averaged ones.

A set is a dictionary at some path of keys and a prefix of names in it: `state_dict`, `ema.module`,
or the names that begin with `teacher.`. Each is marked by the same tensor of the network.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping

from fcvit.errors import DoesNotFit
from fcvit.models.spec import is_counter, recognize, tensor_specs, torch_shapes

PROBE = "patch_embed.proj.weight"
_DOTLESS = PROBE.replace(".", "")
# Wrappers' prefixes, which may also stand before some names only (a head beside a backbone).
WRAPPERS = ("module.", "_orig_mod.", "backbone.", "model.")
# What `torch.compile` and the like put into the names of the layers that they wrap.
_INSIDE = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
# Parts of a detector or segmenter beside its backbone (mmdetection, mmsegmentation).
DETECTOR_PARTS = (
    *("neck.", "rpn_head.", "roi_head.", "bbox_head.", "mask_head."),
    *("decode_head.", "auxiliary_head.", "data_preprocessor."),
)
MAX_DEPTH = 6
MAX_SETS = 16
MAX_VISITS = 4  # of one dictionary that stands at several places

_AVERAGED = {"ema", "emas", "modelema", "emamodel", "swa", "avg", "average", "averages", "averaged", "shadow", "polyak"}
_OPTIMIZER = {"optim", "optims", "opt", "grad", "grads", "gradient", "gradients", "velocity", "moment"}
_MOMENTUM = {"momentum", "buffer", "buffers", "state"}


@dataclasses.dataclass(frozen=True)
class WeightSet:
    """One set of weights in a file.

    Attributes:
        keys: where its dictionary stands; (): it is the whole file.
        prefix: what stands before its names in that dictionary.
        entries: its names without the prefix -> what the file has there.
        others: the rest of the dictionary, if it has no other set; it may be a part of the network.
        averaged: whether these are averaged (EMA) weights.
        counted: whether a count of averaged models stands beside them, as in PyTorch's `AveragedModel`.
        probed: whether the set has the tensor that marks an FCViT.
    """

    keys: tuple[str, ...]
    prefix: str
    entries: Mapping[str, object]
    others: Mapping[str, object]
    averaged: bool
    counted: bool = False
    probed: bool = True

    @property
    def label(self) -> str:
        """The name of the set: its keys and prefix, joined by dots; "." where it has neither."""
        return ".".join((*self.keys, self.prefix.rstrip("."))).strip(".") or "."


def find_sets(top: Mapping[str, object]) -> list[WeightSet]:
    """Return the sets of weights in the object of a file, the nearest first, and not more than `MAX_SETS`."""
    raw_key = _raw_key_of_swapped(top)
    unique: dict[tuple[int, str, bool], WeightSet] = {}
    for keys, stored in _dictionaries(top):
        state = _with_dots(stored)
        prefixes = [
            name.removesuffix(PROBE)
            for name, value in state.items()
            if isinstance(name, str) and name.endswith(PROBE) and not isinstance(value, dict)
        ]
        prefixes = [p for p in prefixes if (not p or p.endswith(".")) and not any(map(_is_optimizer, p.split(".")))]
        del prefixes[MAX_SETS:]  # each costs a comparison for every name
        owners: dict[str, dict[str, object]] = {prefix: {} for prefix in sorted(prefixes, key=len, reverse=True)}
        others = {}
        for name, value in state.items() if prefixes else ():
            prefix = next((p for p in owners if isinstance(name, str) and name.startswith(p)), None)
            if prefix is None:
                others[name] = value
            else:
                owners[prefix][name.removeprefix(prefix)] = value
        stems = [n.removesuffix("n_averaged") for n in state if isinstance(n, str) and n.endswith("n_averaged")]
        both = any(map(_is_averaged, prefixes)) and not all(map(_is_averaged, prefixes))
        for prefix in prefixes:
            # A wrapper that averages may hold the raw weights, too; then the nearer name counts.
            averaged = any(map(_is_averaged, (prefix,) if both else (*keys, prefix)))
            if raw_key and keys[:1] in ((raw_key,), ("state_dict",)):
                averaged = keys[0] != raw_key
            one = WeightSet(
                keys,
                prefix,
                owners[prefix],
                others if len(prefixes) == 1 else {},
                averaged,
                any(prefix.startswith(stem) for stem in stems),
            )
            unique.setdefault((id(stored), prefix, averaged), one)  # one object under two keys is one set
    sets = list(unique.values())[:MAX_SETS]
    if len(sets) > 1 and not raw_key:
        sets = [dataclasses.replace(one, averaged=one.averaged or one.counted) for one in sets]
    return sets


def any_state(top: Mapping[str, object], tensors: tuple[type, ...]) -> list[WeightSet]:
    """Return what may be another network's weights: the dictionaries with the most tensors.

    Args:
        top: the object of a file without a set of its own.
        tensors: types that stand for a tensor.
    """
    counts = []
    for keys, state in _dictionaries(top):
        if count := sum(isinstance(value, tensors) for value in state.values()):
            averaged = any(map(_is_averaged, keys))
            counts.append((count, WeightSet(keys, "", state, {}, averaged, probed=False)))
            if not keys:
                break
    most = max((count for count, _ in counts), default=0)
    return [one for count, one in counts if 2 * count > most]


def averaged_lists(top: Mapping[str, object]) -> Iterator[tuple[str, list | tuple]]:
    """Yield lists that may hold averaged weights without their names, and where they stand."""
    for keys, here in _dictionaries(top):
        for key, value in here.items():
            if isinstance(value, list | tuple) and isinstance(key, str) and any(map(_is_averaged, (*keys, key))):
                yield ".".join((*keys, key)), value


def swapped_by(top: Mapping[str, object]) -> str | None:
    """Return a note on files whose `state_dict` holds the averaged weights; None: not one of them."""
    raw_key = _raw_key_of_swapped(top)
    return raw_key and f"state_dict of this file holds the averaged weights, {raw_key} the raw ones"


def strip_wrappers(name: str) -> str:
    """Return a name without the prefixes of wrappers, in any nesting."""
    name = _INSIDE.sub("", name)
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def makes_fcvit(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether tensors of these names and shapes, in either layout, are exactly an FCViT's; counters may lack."""
    given = {name: shape for name, shape in torch_shapes(shapes).items() if not is_counter(name)}
    try:
        wanted = tensor_specs(recognize(given))
    except DoesNotFit:
        return False
    return given == {name: entry.shape for name, entry in wanted.items() if not is_counter(name)}


def _raw_key_of_swapped(top: Mapping[str, object]) -> str | None:
    """Return the key of the raw weights where `state_dict` holds the averaged ones.

    Lightning's WeightAveraging and mmengine's EMAHook save so; other programs mean by
    `ema_state_dict` what it says.
    """
    if not isinstance(top.get("state_dict"), dict):
        return None
    if isinstance(top.get("current_model_state"), dict):
        return "current_model_state"
    averaged, meta = top.get("ema_state_dict"), top.get("meta")
    by_mmengine = "message_hub" in top or (isinstance(meta, dict) and "mmengine_version" in meta)
    if isinstance(averaged, dict) and (by_mmengine or "steps" in averaged):
        return "ema_state_dict"
    return None


def _dictionaries(top: Mapping[str, object]) -> Iterator[tuple[tuple[str, ...], Mapping]]:
    """Yield every dictionary with its path of keys, the nearest first; an optimizer's are none of weights."""
    visits: collections.Counter[int] = collections.Counter()
    queue: collections.deque[tuple[tuple[str, ...], Mapping]] = collections.deque([((), top)])
    while queue:
        keys, here = queue.popleft()
        yield keys, here
        for key, value in here.items() if len(keys) < MAX_DEPTH else ():
            if isinstance(value, dict) and isinstance(key, str) and not _is_optimizer(key):
                visits[id(value)] += 1
                if visits[id(value)] <= MAX_VISITS:
                    queue.append(((*keys, key), value))


def _with_dots(state: Mapping) -> Mapping:
    """Give the names of an average their dots back, which some wrappers take out to store it in buffers.

    `model_ema.patch_embedprojweight` becomes `model_ema.patch_embed.proj.weight`, by the names of the raw weights.
    """
    names = [name for name in state if isinstance(name, str)]
    stems = [name.removesuffix(_DOTLESS) for name in names if name.endswith(_DOTLESS)]
    prefixes = [name.removesuffix(PROBE) for name in names if name.endswith(PROBE)]
    if len(stems) != 1 or len(prefixes) != 1:
        return state
    parts = [name.removeprefix(prefixes[0]) for name in names if name.startswith(prefixes[0])]
    dotted = {stems[0] + part.replace(".", ""): f"{stems[0].rstrip('.')}.{part}" for part in parts}
    return {dotted.get(name, name) if isinstance(name, str) else name: value for name, value in state.items()}


def words(text: str) -> set[str]:
    """Return the words of a name, in lower case."""
    return set(re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", text[:200]).lower()))


def _is_averaged(text: str) -> bool:
    return bool(words(text) & _AVERAGED)


def _is_optimizer(text: str) -> bool:
    parts = words(text)
    named = bool(parts & _OPTIMIZER) or any(word.startswith(("optimizer", "optimiser")) for word in parts)
    return named or parts >= {"exp", "avg"} or ("momentum" in parts and parts <= _MOMENTUM)
