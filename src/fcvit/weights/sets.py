"""Find the sets of weights in a checkpoint by names, and distinguish raw weights from EMA weights.

A set is a path of dictionary keys and a prefix of tensor names, for example `state_dict`, `ema.module`, or the names
that begin with `teacher.`. Every set is recognized by the tensor `PROBE`, which all networks have.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping

from fcvit.errors import DoesNotFit
from fcvit.models.spec import is_counter, recognize, tensor_specs, torch_shapes

PROBE = "patch_embed.proj.weight"
_DOTLESS = PROBE.replace(".", "")
# Prefixes added by wrappers. Sometimes only a part of the names has them, such as the names of a backbone.
WRAPPERS = ("module.", "_orig_mod.", "backbone.", "model.")
# Name parts that `torch.compile`, activation checkpointing and FSDP add for the layers that they wrap.
_INSIDE = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
# Prefixes of the parts of a detector or segmenter other than the backbone (mmdetection, mmsegmentation).
DETECTOR_PARTS = (
    *("neck.", "rpn_head.", "roi_head.", "bbox_head.", "mask_head."),
    *("decode_head.", "auxiliary_head.", "data_preprocessor."),
)
MAX_DEPTH = 6
MAX_SETS = 16
MAX_VISITS = 4  # of a dictionary that occurs at several positions

_AVERAGED = {"ema", "emas", "modelema", "emamodel", "swa", "avg", "average", "averages", "averaged", "shadow", "polyak"}
_OPTIMIZER = {"optim", "optims", "opt", "grad", "grads", "gradient", "gradients", "velocity", "moment"}
_MOMENTUM = {"momentum", "buffer", "buffers", "state"}


@dataclasses.dataclass(frozen=True)
class WeightSet:
    """A set of weights in a file.

    Attributes:
        keys: Keys that lead to its dictionary, or () for the top level of the file.
        prefix: Prefix of its names in the dictionary.
        entries: Values in the file by name, without the prefix.
        others: Other entries of the dictionary if it contains no other set. They may be a part of the network.
        averaged: Whether these are EMA weights.
        counted: Whether the file counts the averaged models, as PyTorch's `AveragedModel` does.
        probed: Whether the set contains the tensor `PROBE`.
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
        """Return the name of the set: its keys and prefix joined by dots, or "." if both are empty."""
        return ".".join((*self.keys, self.prefix.rstrip("."))).strip(".") or "."


def find_sets(top: Mapping[str, object]) -> list[WeightSet]:
    """Return at most `MAX_SETS` sets of weights in the top-level object of a file, in order of depth."""
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
        del prefixes[MAX_SETS:]  # each prefix is compared with every name
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
            # An EMA wrapper may contain the raw weights, too. Then only the prefix distinguishes them.
            averaged = any(map(_is_averaged, (prefix,) if both else (*keys, prefix)))
            if raw_key and keys[:1] in ((raw_key,), ("state_dict",)):
                averaged = keys[0] != raw_key
            weight_set = WeightSet(
                keys,
                prefix,
                owners[prefix],
                others if len(prefixes) == 1 else {},
                averaged,
                any(prefix.startswith(stem) for stem in stems),
            )
            unique.setdefault((id(stored), prefix, averaged), weight_set)  # an object under two keys is a single set
    sets = list(unique.values())[:MAX_SETS]
    if len(sets) > 1 and not raw_key:
        sets = [dataclasses.replace(item, averaged=item.averaged or item.counted) for item in sets]
    return sets


def any_state(top: Mapping[str, object], tensors: tuple[type, ...]) -> list[WeightSet]:
    """Return the dictionaries with the most tensors, which may be the weights of another network.

    Args:
        top: Top-level object of a file in which `find_sets` finds nothing.
        tensors: Types that represent a tensor.
    """
    counts = []
    for keys, state in _dictionaries(top):
        if count := sum(isinstance(value, tensors) for value in state.values()):
            averaged = any(map(_is_averaged, keys))
            counts.append((count, WeightSet(keys, "", state, {}, averaged, probed=False)))
            if not keys:
                break
    most = max((count for count, _ in counts), default=0)
    return [weight_set for count, weight_set in counts if 2 * count > most]


def averaged_lists(top: Mapping[str, object]) -> Iterator[tuple[str, list | tuple]]:
    """Yield the lists that may contain EMA weights without names, each as a location and the list."""
    for keys, here in _dictionaries(top):
        for key, value in here.items():
            if isinstance(value, list | tuple) and isinstance(key, str) and any(map(_is_averaged, (*keys, key))):
                yield ".".join((*keys, key)), value


def swapped_by(top: Mapping[str, object]) -> str | None:
    """Return a note if the `state_dict` of a file contains the EMA weights, or None."""
    raw_key = _raw_key_of_swapped(top)
    return raw_key and f"state_dict in this file contains the EMA weights, and {raw_key} contains the raw weights"


def strip_wrappers(name: str) -> str:
    """Return a name without the prefixes of wrappers, including nested wrappers."""
    name = _INSIDE.sub("", name)
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def makes_fcvit(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether these names and shapes, in either layout, are exactly an FCViT's, ignoring counters."""
    given = {name: shape for name, shape in torch_shapes(shapes).items() if not is_counter(name)}
    try:
        wanted = tensor_specs(recognize(given))
    except DoesNotFit:
        return False
    return given == {name: entry.shape for name, entry in wanted.items() if not is_counter(name)}


def _raw_key_of_swapped(top: Mapping[str, object]) -> str | None:
    """Return the key of the raw weights if `state_dict` contains the EMA weights, or None.

    Lightning's WeightAveraging and mmengine's EMAHook save in this form. In files of other programs, `ema_state_dict`
    contains the EMA weights.
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
    """Yield every dictionary with its path of keys in breadth-first order, except an optimizer's."""
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
    """Restore the dots in the names of EMA weights that some wrappers remove to store them in buffers.

    `model_ema.patch_embedprojweight` becomes `model_ema.patch_embed.proj.weight`, according to the raw weights' names.
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
    """Return the words in a name in lower case."""
    return set(re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", text[:200]).lower()))


def _is_averaged(text: str) -> bool:
    return bool(words(text) & _AVERAGED)


def _is_optimizer(text: str) -> bool:
    parts = words(text)
    named = bool(parts & _OPTIMIZER) or any(word.startswith(("optimizer", "optimiser")) for word in parts)
    return named or parts >= {"exp", "avg"} or ("momentum" in parts and parts <= _MOMENTUM)
