"""Folders with the file names of the Hugging Face Hub: the weights file, the settings files and the index of shards."""

import contextlib
import json
import os
from pathlib import Path

from fcvit.errors import UnreadableFile
from fcvit.text import strict_json

# Names of the weights in a folder, in order of preference.
NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SETTINGS = ("config.json", "preprocessor_config.json")
MAX_JSON = 2 << 20  # bytes of a JSON file: 21,000 classes take 1 MB
MAX_SHARDS = 1000


def file_in(path: Path) -> Path:
    """Return the path of the weights in a folder. Return any other path unchanged."""
    if not os.path.isdir(path):  # noqa: PTH112 -- Path.is_dir raises for a path that is too long
        return path
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    raise UnreadableFile(
        f"{path}: this directory contains neither {NAMES[0]} nor {NAMES[2]}; pass the path of the weights file"
    )


def read_settings(path: Path) -> dict[str, object]:
    """Read the settings files in the folder of the weights. Return their contents by file name."""
    settings: dict[str, object] = {}
    for name in SETTINGS if path.name in NAMES else ():
        file = path.with_name(name)
        with contextlib.suppress(OSError, ValueError, RecursionError):  # skips pipes as well, which have size 0
            if 0 < file.stat().st_size <= MAX_JSON and isinstance(read := json.loads(file.read_bytes()), dict):
                settings[name] = read
    return settings


def shards(path: Path, data: bytes) -> dict[str, set[str]]:
    """Return the shards listed in an index, each with the names of its tensors.

    Raises:
        UnreadableFile: If the file is not an index, lists too many shards, or lists a shard that is missing or outside
            the folder of the index.
    """
    try:
        if len(data) > MAX_JSON:
            raise UnreadableFile(f"JSON of over {MAX_JSON >> 20} MiB is too large for the index of a checkpoint")
        index = strict_json(data)
    except UnreadableFile:
        raise
    except (ValueError, RecursionError) as error:
        raise UnreadableFile("not a checkpoint: expected weights or an index of shards, found text") from error
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        what = "an exported Paddle network" if isinstance(index, dict) and "program" in index else "other JSON"
        raise UnreadableFile(f"not a checkpoint: expected weights or an index of shards, found {what}")
    files: dict[str, set[str]] = {name: set() for name in where.values()}
    if len(files) > MAX_SHARDS:
        raise UnreadableFile(f"the index lists {len(files)} shards; expected at most {MAX_SHARDS}")
    for name in files:
        if "\\" in name or Path(name).is_absolute() or ".." in Path(name).parts or not name.isprintable():
            raise UnreadableFile(f"the index lists {name[:80]!r}, which is outside the folder of the index")
        if not (path.parent / name).is_file():
            raise UnreadableFile(f"the shard {name[:80]} is listed in the index but missing; download it too")
    for tensor, name in where.items():
        files[name].add(tensor)
    return files
