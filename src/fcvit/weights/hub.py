"""Folders of the Hugging Face Hub: which file has the weights, the settings beside it, and the index of shards."""

import contextlib
import json
import os
from pathlib import Path

from fcvit.errors import UnreadableFile
from fcvit.text import strict_json

# What a folder calls its weights, the preferred first.
NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SETTINGS = ("config.json", "preprocessor_config.json")
MAX_JSON = 2 << 20  # bytes of a file beside weights: 21,000 classes take 1 MB
MAX_SHARDS = 1000


def file_in(path: Path) -> Path:
    """Return the weights in a folder; any other path is its own."""
    if not os.path.isdir(path):  # noqa: PTH112 -- the path's own method raises if it is too long
        return path
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    raise UnreadableFile(f"{path}: a directory, and without {NAMES[0]} or {NAMES[2]}; name the weights file")


def settings_beside(path: Path) -> dict[str, object]:
    """Read the settings beside the weights in a folder, by the names of their files."""
    settings: dict[str, object] = {}
    for name in SETTINGS if path.name in NAMES else ():
        beside = path.with_name(name)
        with contextlib.suppress(OSError, ValueError, RecursionError):  # of a pipe, too: it has no size
            if 0 < beside.stat().st_size <= MAX_JSON and isinstance(read := json.loads(beside.read_bytes()), dict):
                settings[name] = read
    return settings


def shards(path: Path, data: bytes) -> dict[str, set[str]]:
    """Return the shards that an index names, each with the names of its tensors.

    Raises:
        UnreadableFile: it is no index, names too many shards, or one that is missing or not below its folder.
    """
    try:
        if len(data) > MAX_JSON:
            raise UnreadableFile(f"JSON of over {MAX_JSON >> 20} MiB: not the index of a checkpoint")
        index = strict_json(data)
    except UnreadableFile:
        raise
    except (ValueError, RecursionError) as error:
        raise UnreadableFile("not a checkpoint: expected weights or the index of their shards, found text") from error
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise UnreadableFile("not a checkpoint: expected weights or the index of their shards, found other JSON")
    files: dict[str, set[str]] = {name: set() for name in where.values()}
    if len(files) > MAX_SHARDS:
        raise UnreadableFile(f"an index of {len(files)} shards; expected at most {MAX_SHARDS}")
    for name in files:
        if "\\" in name or Path(name).is_absolute() or ".." in Path(name).parts or not name.isprintable():
            raise UnreadableFile(f"the index names {name[:80]!r}, which is not below its own folder")
        if not (path.parent / name).is_file():
            raise UnreadableFile(f"the shard {name[:80]} of the index is missing; fetch it too")
    for tensor, name in where.items():
        files[name].add(tensor)
    return files
