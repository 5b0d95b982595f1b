"""The files of a data set, whatever contains them: a folder, tar archives, WebDataset shards or Parquet files."""

import dataclasses
import functools
import posixpath
from array import array
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fcvit.data.columns import Files, Location, Names, PartLocations, encoded
from fcvit.data.folders import is_image, left_out, legible
from fcvit.errors import UnreadableFile

_LONGEST_LABEL = 500  # characters


class Tree(NamedTuple):
    """The sorted relative paths (with /) of all folders and files at any depth, except hidden and system files."""

    folders: tuple[str, ...]
    files: Files


@dataclasses.dataclass(frozen=True, eq=False)
class Archive:
    """All files of a data set.

    Attributes:
        files: Name -> location of every file, including hidden files.
        shown: Positions of the files that are neither hidden nor system files, nor outside the archive.
        folders: Sorted paths of all folders that contain such files or have an entry in the archive.
        labeled: True if the folders are named by labels that the data contains with its images.
        classes: All labels in the order of their indices, if the data contains it.
        splits: Folders that are the splits of labeled data.
        notes: Readable notes on how the data was read.
    """

    files: Files
    shown: range | np.ndarray
    folders: tuple[str, ...]
    labeled: bool = False
    classes: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def tree(self) -> Tree:
        """The folders and files that are neither hidden nor system files, nor outside the archive."""
        return Tree(self.folders, self.files.take(self.shown))

    @functools.cached_property
    def subfolders(self) -> Mapping[str, list[str]]:
        """Folder ("" for the root) -> sorted names of the folders directly in it."""
        subfolders: dict[str, list[str]] = {name: [] for name in ("", *self.tree.folders)}
        for name in self.tree.folders:
            parent, _, last = name.rpartition("/")
            subfolders[parent].append(last)
        return subfolders


class Builder:
    """Collects files in any order. The last of several files with one name replaces the others."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.paths: dict[str, int] = {}
        self.files, self.offsets, self.sizes = array("i"), array("q"), array("q")

    def add(self, name: str, location: Any) -> None:
        """Add a file with a location of path, position and size."""
        path, offset, size = location
        self.append(encoded(name), self.paths.setdefault(path, len(self.paths)), offset, size)

    def append(self, name: bytes, path: int, offset: int, size: int) -> None:
        """Add a file by its encoded name and the number of its path."""
        self.keys.append(name + b"\0" + len(self.files).to_bytes(4))
        self.files.append(path)
        self.offsets.append(offset)
        self.sizes.append(size)

    def build(self, folders: Iterable[str] = (), kind: Any = Location, **about: Any) -> Archive:
        """Sort the files and return the archive, which must not be changed afterwards.

        Args:
            folders: Folders with an entry, in addition to those of the files.
            kind: Function that returns the location for path, position and size.
            about: Further attributes of the archive. Nothing is hidden or a system file if it is labeled.
        """
        keys, self.keys = self.keys, []
        keys.sort()
        text, starts, rows = bytearray(), array("q", [0]), array("i")
        image, hidden = bytearray(), array("i")
        parents: dict[str, None] = {}
        current, visible, labeled = "", True, about.get("labeled", False)
        endings: dict[str, bool] = {}
        for position, key in enumerate(keys):
            if position + 1 < len(keys) and keys[position + 1][:-4] == key[:-4]:
                continue
            text += key[:-4]
            rows.append(int.from_bytes(key[-4:]))
            parent, slash, last = key[:-5].decode("utf-8", "surrogatepass").rpartition("/")
            if parent != current:
                current, visible = parent, labeled or not _left_out(parent)
            ending = last[last.rfind(".") :] if last.rfind(".") > 0 else last
            if ending not in endings:
                endings[ending] = is_image(f"x{ending}" if ending != last else last)
            image.append(endings[ending])
            if not labeled and ((slash and not visible) or not last or left_out(last)):
                hidden.append(len(starts) - 1)
            elif slash:
                parents[parent] = None
            starts.append(len(text))
        keys.clear()
        names, order = Names(bytes(text), starts), np.asarray(rows, np.int64)
        columns = (np.asarray(column)[order] for column in (self.files, self.offsets, self.sizes))
        files = Files(names, PartLocations(tuple(self.paths), *columns, kind=kind), np.asarray(image, np.uint8))
        shown: range | np.ndarray = range(len(names))
        if hidden:
            shown = np.delete(np.arange(len(names), dtype=np.int32), np.asarray(hidden, np.int64))
        entries = (folder for folder in folders if not _left_out(folder))
        return Archive(files, shown, with_parents((*entries, *parents)), **about)


def with_parents(folders: Iterable[str]) -> tuple[str, ...]:
    """Return the folders and all folders that contain them, sorted."""
    every: set[str] = set()
    for folder in folders:
        while folder and folder not in every:
            every.add(folder)
            folder = posixpath.dirname(folder)
    return tuple(sorted(every))


def _left_out(path: str) -> bool:
    """Return True if a part of a path in an archive is hidden, belongs to the system, or is "" or ".."."""
    return any(not part or left_out(part) for part in path.split("/"))


def label_folder(label: str, shown: str) -> str:
    """Return the name of the folder for a label. A slash becomes a similar character.

    Args:
        label: Class index or name.
        shown: What contains the label, for messages.

    Raises:
        UnreadableFile: The label is empty or too long.
    """
    if not label or len(label) > _LONGEST_LABEL:
        raise UnreadableFile(f"{shown}: the label {label[:60]!r} is empty or too long; expected a class index or name")
    if label.isascii() and label.isdecimal():
        return str(int(label))
    return legible(label.replace("/", "\N{DIVISION SLASH}").replace("\0", " "))
