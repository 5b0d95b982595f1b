"""Keep the indexes of large data sets, in memory and in `$XDG_CACHE_HOME/fcvit/index` (`~/.cache/fcvit/index`).

An index has a stamp, which identifies the version of the data: the size, time and a content sample of each file, or the
time of each folder. An index is used only while its stamp is that of the data. It is written to a temporary file and
then renamed, so a reader finds a complete index, also if several processes write it at once. A damaged index is ignored
and written again. If it cannot be written, it is read from the data each time. The cache may be deleted at any time.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fcvit import run_folder as runs
from fcvit.data.archives import Archive
from fcvit.data.columns import Column, Files, FolderLocations, Names, PartLocations
from fcvit.data.folders import open_file

LAYOUT = 1  # version of the layout of an index
_MIN_FILES = 10_000  # files from which an index is written to the disk
_IN_MEMORY = 16  # indexes that are kept in memory
_SAMPLE = 4096  # bytes of one sampled block
_FILE = "index.safetensors"
_memory: dict[tuple[str, str, str], tuple[Any, Archive]] = {}


def indexed(
    path: Path,
    base: Path,
    kind: str,
    unchanged: Callable[[Any], bool],
    read: Callable[[], tuple[Archive, Any]],
    location: Any,
) -> Archive:
    """Return the index of a data set, from the cache or read now.

    Args:
        path: Path of the data.
        base: Path that all paths of its locations begin with.
        kind: Name of the format.
        unchanged: Function that returns whether a stamp, as JSON, is that of the data.
        read: Function that reads the index and returns it with its stamp, or None as the stamp if the index must not be
            kept.
        location: Function that returns a location for path, position and size. None for a folder in the file system.
    """
    key = kind, os.path.abspath(path)  # noqa: PTH100 -- links are not resolved
    known = *key, str(path)
    stamp, archive = _memory.pop(known, (None, None))
    if archive is None or not unchanged(stamp):
        entry = _entry(*key)
        stamp, archive = _load(entry, key, str(base), location)
        if archive is None or not unchanged(stamp):
            archive, stamp = read()
            if stamp is None:
                return archive
            if len(archive.files) >= _MIN_FILES:
                _save(entry, key, str(base), stamp, archive)
    _memory[known] = stamp, archive
    while len(_memory) > _IN_MEMORY:
        del _memory[next(iter(_memory))]
    return archive


def stamp_of_files(paths: Iterable[Path]) -> list[list[Any]]:
    """Return the name, size, time and a hash of a content sample of each file.

    Raises:
        OSError: A file cannot be read.
    """
    paths = list(paths)
    blocks = max(2, 64 // len(paths)) if paths else 0
    stamp = []
    for path in paths:
        with open_file(path) as file:
            status = os.fstat(file.fileno())
            sample = hashlib.sha256()
            for start in np.linspace(0, max(status.st_size - _SAMPLE, 0), blocks).astype(np.int64).tolist():
                file.seek(start)
                sample.update(file.read(_SAMPLE))
        stamp.append([path.name, status.st_size, status.st_mtime_ns, sample.hexdigest()[:16]])
    return stamp


def _entry(kind: str, path: str) -> Path:
    name = hashlib.sha256(os.fsencode(f"{LAYOUT} {kind} {path}")).hexdigest()[:32]
    return runs.cache_root() / "index" / name / _FILE


def _columns(archive: Archive) -> dict[str, np.ndarray]:
    files = archive.files
    columns = {
        "text": np.frombuffer(files.names.text, np.uint8),
        "starts": np.asarray(files.names.starts),
        "image": files.image,
    }
    if not isinstance(archive.shown, range):
        columns["shown"] = archive.shown
    if isinstance(files.locations, PartLocations):
        columns |= {name: getattr(files.locations, name) for name in ("files", "offsets", "sizes")}
    return columns


def _digest(columns: dict[str, np.ndarray], about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(columns):
        digest.update(f"{name} {columns[name].dtype} {columns[name].shape}\0".encode())
        digest.update(columns[name].data if columns[name].size else b"")
    return digest.hexdigest()


def _save(entry: Path, key: tuple[str, str], root: str, stamp: Any, archive: Archive) -> None:
    """Write an index. Do nothing if the cache cannot be written or is full."""
    from safetensors.numpy import save_file

    columns = _columns(archive)
    about = {
        "key": [LAYOUT, *key],
        "root": root,
        "stamp": stamp,
        "folders": archive.folders,
        "paths": getattr(archive.files.locations, "paths", ()),
        "labeled": archive.labeled,
        "classes": archive.classes,
        "splits": archive.splits,
        "notes": archive.notes,
    }
    about |= {"sha256": _digest(columns, about)}
    with contextlib.suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=runs.TEMPORARY, dir=entry.parent)
        os.close(descriptor)
        try:
            save_file(columns, temporary, {"about": json.dumps(about)})
            os.replace(temporary, entry)
        except Exception as error:  # safetensors has its own error for a full disk
            Path(temporary).unlink(missing_ok=True)
            if not isinstance(error, OSError) and "SafetensorError" not in type(error).__name__:
                raise


def _load(entry: Path, key: tuple[str, str], root: str, location: Any) -> tuple[Any, Archive | None]:
    """Return the stamp and the index, or None if there is none or it is damaged."""
    if not entry.is_file():
        return None, None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(entry, "np") as file:
            about = json.loads((file.metadata() or {})["about"])
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
        if about.pop("sha256") != _digest(columns, about) or about["key"] != [LAYOUT, *key]:
            return None, None
        names = Names(columns.pop("text").tobytes(), columns["starts"])
        places: Column[Any]
        if location is None:
            places = FolderLocations(root, names)
        else:
            paths = [root + path.removeprefix(about["root"]) for path in about["paths"]]
            places = PartLocations(paths, *(columns[name] for name in ("files", "offsets", "sizes")), kind=location)
        files = Files(names, places, columns["image"])
        shown = columns.get("shown", range(len(files)))
        parts = (tuple(about[name]) for name in ("classes", "splits", "notes"))
        return about["stamp"], Archive(files, shown, tuple(about["folders"]), about["labeled"], *parts)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, None
