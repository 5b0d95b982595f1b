"""Find the preprocessing in the arguments of a training script that are stored in a checkpoint."""

import collections
import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from fcvit.errors import UnreadableFile, UsageError
from fcvit.models.variants import Preprocessing, PreprocessingChange, three_channels
from fcvit.text import one_line
from fcvit.weights.pdparams import ArrayRef, single
from fcvit.weights.safe_unpickler import Opaque
from fcvit.weights.sets import words
from fcvit.weights.torch_file import TensorRef

# Words in the keys under which training scripts store their arguments or data settings.
ARGUMENT_KEYS = {
    *("args", "arguments", "opt", "opts", "option", "options", "config", "configs", "cfg", "settings", "hparams"),
    *("hyper", "hyperparameters", "preprocess", "preprocessing", "preprocessor", "normalize", "normalization"),
    *("transform", "transforms", "data", "dataset"),
}
_IMAGE_PREFIXES = ("", "image_", "img_", "pixel_", "norm_", "normalize_", "dataset_", "data_", "rgb_")
# Field -> its names in scripts, in any case. The first name that is set counts, as in timm.
NAMES = {
    "input_size": ("input_size", "img_size", "image_size"),
    "crop_fraction": ("crop_pct", "eval_crop_ratio", "crop_fraction"),
    "interpolation": ("interpolation", "resample"),
    "mean": tuple(f"{prefix}mean" for prefix in _IMAGE_PREFIXES),
    "std": tuple(f"{prefix}std" for prefix in _IMAGE_PREFIXES),
}
MAX_DEPTH = 5  # nesting of dictionaries in arguments
MAX_PARTS = 10_000  # dictionaries and lists in arguments, or names in a dictionary
MAX_NAME = 100  # characters
MAX_TEXT = 1 << 20  # characters of arguments that are stored as text
_NOTHING = ("", "null", "None", "~", [], ())
_PILLOW = {2: "bilinear", 3: "bicubic"}


def stated_preprocessing(
    top: Mapping[str, object], array: Callable[[object], np.ndarray]
) -> tuple[PreprocessingChange, list[str]]:
    """Return the fields that the arguments in a checkpoint specify, and notes on values that cannot be used.

    Args:
        top: Top-level object of the file.
        array: Function that reads a tensor of the file.
    """
    stated: dict[str, list[object]] = {}
    unread: dict[str, str] = {}
    for location, arguments, depth in _arguments(top):
        called = {f: next((n for n in names if not _unset(arguments.get(n))), None) for f, names in NAMES.items()}
        both = called["mean"] is not None and called["std"] is not None
        for field, name in called.items():
            # Deeper in the arguments, a mean or a size may not apply to the images.
            if name is None or not (both or depth == 1 or (depth <= 2 and field not in ("mean", "std"))):
                continue
            value = arguments[name]
            try:
                read = _READERS[field](_plain(value, array))
            except (ValueError, TypeError, OverflowError, UnreadableFile):
                unread.setdefault(
                    field,
                    f"{location} in the file specifies {name} {_shown(value)}, which is unused; {_remedy(field)}",
                )
                continue
            if read not in stated.setdefault(field, []):
                stated[field].append(read)
    change: Any = {}
    notes = list(unread.values())
    for field, values in stated.items():
        if len(values) == 1:
            change[field] = values[0]
        else:
            shown = " and ".join(f"{value}" for value in values[:3])
            notes.append(f"the file specifies {field} twice ({shown}), so neither value is used; {_remedy(field)}")
    _to_unit_range(change, notes)
    for field in list(change):
        try:
            Preprocessing(**{field: change[field]})
        except UsageError as error:
            notes.append(f"the training arguments in the file are not used for {field} ({error}); {_remedy(field)}")
            del change[field]
    return change, notes


def _remedy(field: str) -> str:
    return f"specify it with --{field.replace('_', '-')}"


def _arguments(top: Mapping[str, object]) -> Iterator[tuple[str, Mapping, int]]:
    """Yield possible arguments: the location, the contents and the depth, which is 1 for the arguments themselves."""
    yield "the top level", top, 0
    named = [(key, value) for key, value in top.items() if isinstance(key, str) and words(key) & ARGUMENT_KEYS]
    queue = collections.deque((key, value, 1) for key, value in named)
    seen: set[int] = set()
    while queue and len(seen) < MAX_PARTS:
        location, value, depth = queue.popleft()
        if id(value) in seen or (depth > 1 and isinstance(value, str)):
            continue
        seen.add(id(value))
        if isinstance(value, list | tuple):
            inner = [(location, part, depth) for part in value[:MAX_PARTS]]
        elif (arguments := _mapping(value)) is not None:
            yield one_line(location), arguments, depth
            inner = [
                (f"{location}.{key[:40]}", part, depth + 1) for key, part in arguments.items() if isinstance(key, str)
            ]
        else:
            continue
        if depth < MAX_DEPTH and len(queue) < MAX_PARTS:
            queue += [one for one in inner if isinstance(one[1], dict | list | tuple | Opaque)]


def _mapping(value: object) -> Mapping | None:
    """Convert a dictionary, an object's attributes and items, or YAML or JSON text to a dict with lowercase names."""
    if isinstance(value, Opaque):
        state = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
        attributes = state if isinstance(state, dict) else {}
        if value.items is None and attributes is not state:
            return None
        value = {**attributes, **(value.items or {})}
        # OmegaConf and ml_collections store their contents in an attribute.
        inner = value.get("_content", value.get("_fields", value))
        value = inner if isinstance(inner, dict) else value
    if isinstance(value, str):
        value = _text(value[:MAX_TEXT])
    if not isinstance(value, dict) or len(value) > MAX_PARTS:
        return None
    return {name.lower() if isinstance(name, str) and len(name) < MAX_NAME else name: v for name, v in value.items()}


def _text(text: str) -> Mapping:
    if text.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            read = json.loads(text)
            return read if isinstance(read, dict) else {}
    # Only the YAML that training scripts write is read: a name and a value per line, or a list below a name.
    result: dict[str, object] = {}
    items: list[str] | None = None
    for line in text.splitlines():
        if items is not None and (item := re.fullmatch(r"\s*-\s+(.+)", line)):
            items.append(item[1].strip("'\" "))
        elif pair := re.fullmatch(r"(\w+)\s*:\s*(.*)", line):
            items = []
            result[pair[1]] = pair[2].strip("'\" ") or items
    return result


def _held(value: object) -> object:
    """Return the contents of an OmegaConf value or list. Return anything else unchanged."""
    if isinstance(value, Opaque) and isinstance(value.state, dict):
        return value.state.get("_val", value.state.get("_content", value))
    return value


def _unset(value: object) -> bool:
    value = _held(value)
    return value is None or value is False or (isinstance(value, str | list | tuple) and value in _NOTHING)


def _shown(value: object) -> str:
    """Return a value as text for a message. Other values could be extremely long."""
    match value:
        case str():
            return repr(value[:60])
        case int() | float() if isinstance(value, float) or -1 << 63 < value < 1 << 63:
            return str(value)
        case list() | tuple() if len(value) <= 4 and not any(isinstance(one, list | tuple) for one in value):
            return f"[{', '.join(map(_shown, value))}]"
    return f"a value of type {type(value).__name__}"


def _plain(value: object, array: Callable[[object], np.ndarray], nested: bool = False) -> object:
    """Convert arrays, NumPy scalars and enumerations to numbers and text of Python."""
    value = _held(value)
    match value:
        case list() | tuple() if len(value) <= 4 and not nested:
            return [_plain(one, array, nested=True) for one in value]
        case TensorRef() | ArrayRef() | np.ndarray():
            numbers = array(value)
            if numbers.size > 4:
                raise ValueError("too many numbers")
            return [float(str(number)) for number in numbers.reshape(-1)]  # by way of text, so that 0.2 stays 0.2
        case Opaque() if (number := single(value)) is not None:
            return number.item()
        case Opaque(args=(str(word),)):
            return word
        case int() | float() if not isinstance(value, bool):
            return value
        case str() if len(value) <= 200:
            return value
    raise ValueError("neither numbers nor text")


def _numbers(value: object) -> list[float]:
    if isinstance(value, str):
        value = value.strip("()[] ").replace(",", " ").split()
    return [float(one) for one in (value if isinstance(value, list) else [value])]  # pyrefly: ignore


def _size(value: object) -> int:
    """Return the side length from 224, (224, 224) or (3, 224, 224)."""
    numbers = _numbers(value)
    height, width = numbers[-2:] if len(numbers) in (2, 3) else numbers * 2
    if height != width or height != int(height):
        raise ValueError("not a square with a whole number of pixels")
    return int(height)


def _fraction(value: object) -> float:
    (number,) = _numbers(value)
    return number


def _interpolation(value: object) -> str:
    word = _PILLOW.get(value, "") if isinstance(value, int) else str(value).rpartition(".")[2].lower()
    if word not in _PILLOW.values():
        raise ValueError("unsupported interpolation")
    return word


_READERS: dict[str, Callable[[object], object]] = {
    "input_size": _size,
    "crop_fraction": _fraction,
    "interpolation": _interpolation,
    "mean": lambda value: three_channels(_numbers(value), 255),
    "std": lambda value: three_channels(_numbers(value), 255),
}


def _to_unit_range(change: dict[str, Any], notes: list[str]) -> None:
    """Divide mean and standard deviation by 255 if they are for images from 0 to 255, as in some scripts."""
    mean, std = change.get("mean", (0.0,)), change.get("std", (0.0,))
    if max(*mean, *std) <= 1:
        return
    if max(mean) <= 1 and any(mean):
        notes.append(
            f"the file specifies mean {mean} and std {std} for different value ranges, so neither is used; "
            "specify both with --mean and --std"
        )
        del change["mean"], change["std"]
        return
    for field in {"mean", "std"} & change.keys():
        change[field] = tuple(number / 255 for number in change[field])
    notes.append("mean and std in the file are for images from 0 to 255 and were divided by 255")
