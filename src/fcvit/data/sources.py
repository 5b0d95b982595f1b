"""Open a folder of images, tar archives, WebDataset shards or Parquet files, which all look like a folder."""

import dataclasses
import functools
import glob
import itertools
import math
import os
import posixpath
import re
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from fcvit.data.archives import Archive, Tree
from fcvit.data.columns import Files, FolderLocations, Location, Names, encoded
from fcvit.data.folders import is_image, legible, scan, walk
from fcvit.data.index_cache import indexed, stamp_of_files
from fcvit.data.parquet import ParquetLocation, read_parquet
from fcvit.data.shards import has_class_folders, is_shard, read_shards
from fcvit.data.splits import role
from fcvit.data.tars import join, read_tar
from fcvit.errors import UnreadableFile

_PATTERN = re.compile(r"[*?]|\[.+\]|\{.+\}")
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_MOST_FILES = 100_000  # files of one pattern
_SETTLED = 2_000_000_000  # age in ns from which the time of a folder changes with every further change


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder of images, or a folder inside a tar archive.

    The methods raise `UnreadableFile` if a folder cannot be read.

    Attributes:
        path: Path of the folder as a user writes it.
        archive: Archive that contains the folder, or None for a folder in the file system.
        inner: Path of the folder inside the archive or inside the folder that is read, "" for the root.
        folder: Folder in the file system that is read, including this folder.
    """

    path: Path
    archive: Archive | None = None
    inner: str = ""
    folder: "_Folder | None" = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.archive is None and self.folder is None:
            object.__setattr__(self, "folder", _Folder(self.path))

    @property
    def content(self) -> Archive:
        """All files of the data that contains this folder. A folder in the file system is read on first use."""
        if self.archive is not None:
            return self.archive
        assert self.folder is not None
        return self.folder.content

    def child(self, name: str) -> "Source":
        """Return the subfolder with this name."""
        return Source(self.path / name, self.archive, posixpath.join(self.inner, name), self.folder)

    def folders(self) -> list[str]:
        """Return the sorted names of the subfolders."""
        try:
            return self.content.subfolders[self.inner]
        except KeyError as error:
            raise UnreadableFile(f"{self.path}: no such folder") from error

    def classes(self) -> list[str]:
        """Return the classes: the names of the subfolders, or all labels in the order of their indices."""
        content, folders = self.content, sorted(map(legible, self.folders()))
        if content.classes:
            return [*content.classes]
        if content.labeled and folders and all(folder.isdecimal() for folder in folders):
            return [str(index) for index in range(max(map(int, folders)) + 1)]
        return folders

    def files(self) -> list[str]:
        """Return the sorted names of the files directly in this folder."""
        return list(self.content.tree.files.directly(self.inner))

    def has_images(self) -> bool:
        """Return True if image files are directly in this folder."""
        return any(map(is_image, self.content.tree.files.directly(self.inner)))

    def has_images_below(self) -> bool:
        """Return True if image files are in this folder at any depth."""
        return bool(self.tree().files.is_image().any())

    def tree(self) -> Tree:
        """Return all folders and files below this folder."""
        prefix = f"{self.inner}/" if self.inner else ""
        folders, files = self.content.tree
        inside = tuple(name.removeprefix(prefix) for name in folders if name.startswith(prefix))
        return Tree(inside, files.below(self.inner))

    def locate(self, name: str) -> Location | None:
        """Return the location of the named file, hidden or not, or None if it does not exist."""
        if self.archive is not None:
            return self.archive.files.get(posixpath.join(self.inner, name))
        path = os.path.join(self.path, name)  # noqa: PTH118
        try:
            return Location(path) if os.path.isfile(path) else None  # noqa: PTH113
        except ValueError:  # a null byte
            return None


@dataclasses.dataclass
class _Folder:
    """A folder in the file system that is read once, for all sources in it."""

    path: Path

    @functools.cached_property
    def content(self) -> Archive:
        def unchanged(stamp: Any) -> bool:
            try:
                return all(_folder_stamp((self.path / inner).stat()) == known for inner, known in stamp.items())
            except OSError:
                return False

        return indexed(self.path, self.path, "folder", unchanged, lambda: _read_folder(self.path), None)


def _folder_stamp(status: os.stat_result) -> list[int]:
    return [status.st_mtime_ns, status.st_ino]


def _read_folder(path: Path) -> tuple[Archive, Any]:
    """Return the index of a folder and its stamp, or None as the stamp if a folder was changed just before."""
    began = time.time_ns()
    text, starts, image, folders = bytearray(), array("q", [0]), bytearray(), []
    visited: dict[str, os.stat_result] = {}
    for name in walk(path, visited):
        if name.endswith("/"):
            folders.append(name[:-1])
        else:
            text += encoded(name) + b"\0"
            starts.append(len(text))
            image.append(is_image(name))
    names = Names(bytes(text), starts)
    files = Files(names, FolderLocations(str(path), names), np.asarray(image, np.uint8))
    settled = all(began - status.st_mtime_ns > _SETTLED for status in visited.values())
    stamp = {inner: _folder_stamp(status) for inner, status in visited.items()} if settled else None
    return Archive(files, range(len(files)), tuple(sorted(folders))), stamp


def open_source(data: Path, labels: bool = True) -> Source:
    """Open the images at a path, whatever contains them.

    Args:
        data: A folder, a tar archive, a Parquet file, or a folder of tar archives or of Parquet files. Also a folder
            inside one of these (`x.tar/val`), and a pattern of shards or Parquet files (`train-{0000..0123}.tar`,
            `train-*.parquet`).
        labels: Whether a tar archive with a label for each image is read as a WebDataset shard.

    Raises:
        UnreadableFile: The path does not exist, or a file is damaged or cannot be read.
        MissingExtra: A package that reads the format is not installed.
    """
    if data.is_dir():
        folders, files = scan(data)
        tars = [data / name for name in files if name.lower().endswith(".tar")]
        if parquet := [] if any(map(is_image, files)) else _parquet_files(data):
            return Source(data, _parquet(data, data, parquet))
        # The archives are the data set only if more than half of the files are archives.
        if folders or any(map(is_image, files)) or len(tars) * 2 <= len(files):
            return Source(data)
        return Source(data, _of_files(data, data, "tars", tars, lambda: _read_tars(data, tars, files)))
    for path in (data, *data.parents):
        inner = "" if path == data else data.relative_to(path).as_posix()
        if path.is_file():
            if _is_parquet(path):
                return _inside(data, _parquet(path, path, [path]), inner)
            kind = "tar" if labels else "tar without labels"
            return _inside(data, _of_files(path, path, kind, [path], functools.partial(_read_tar, path, labels)), inner)
        if path.is_dir():
            container = open_source(path) if role(inner.partition("/")[0]) else None
            if container is not None and container.archive is not None:
                return _inside(data, container.archive, inner)
            break
        if _PATTERN.search(path.name) and (paths := _expand(path)):
            if len({_is_parquet(one) for one in paths}) > 1:
                raise UnreadableFile(f"{path}: the pattern matches Parquet files and others; pass one format")
            base = _base(path)
            if _is_parquet(paths[0]):
                return _inside(data, _parquet(path, base, paths), inner)
            shards = functools.partial(read_shards, path, paths)
            return _inside(data, _of_files(path, base, "shards", paths, shards), inner)
    raise UnreadableFile(f"{data}: no such folder or tar archive; --data expects class folders or a tar of them")


def _inside(data: Path, archive: Archive, inner: str) -> Source:
    if inner not in archive.subfolders:
        path = data if not inner else data.parents[inner.count("/")]
        raise UnreadableFile(
            f"{path}: the archive contains no folder {inner} and no images below it; pass another of its folders"
        )
    return Source(data, archive, inner)


def _of_files(path: Path, base: Path, kind: str, files: list[Path], read: Any, location: Any = Location) -> Archive:
    """Return the index of a data set in these files, from the cache or read now."""
    try:
        stamp = stamp_of_files(files)
    except OSError as error:
        raise UnreadableFile(f"{error.filename or path}: {error.strerror or error}") from error
    return indexed(path, base, kind, stamp.__eq__, lambda: (read(), stamp), location)


def _read_tar(path: Path, labels: bool) -> Archive:
    """Read a tar archive: a WebDataset shard if its images have labels and are not in class folders."""
    archive = read_tar(path)
    if not labels or not is_shard(archive.tree.files):
        return archive
    if not has_class_folders(archive.tree.files):
        return read_shards(path, [path])
    pattern = f"'{path.with_suffix('')}[.]tar'"
    note = f"{path}: its folders are used as classes, not its labels; to use the labels, pass the pattern {pattern}"
    return dataclasses.replace(archive, notes=(note,))


def _read_tars(data: Path, tars: list[Path], files: list[str]) -> Archive:
    """Read tar archives with one class each, or WebDataset shards."""
    first = read_tar(tars[0]).tree.files
    if first.is_image().sum() * 2 <= len(first) and is_shard(first):
        return read_shards(data, tars)
    return join(str(data), ((path.name, read_tar(path)) for path in tars), files)


def _parquet(path: Path, base: Path, files: list[Path]) -> Archive:
    return _of_files(path, base, "parquet", files, lambda: read_parquet(base, files), ParquetLocation)


def _is_parquet(path: Path) -> bool:
    return path.name.lower().endswith(".parquet")


def _parquet_files(data: Path) -> list[Path]:
    """Return the Parquet files of a data set: in its folder, or in its only folder, or in folders named as splits."""
    folders, files = scan(data)
    paths = [data / name for name in files if _is_parquet(data / name)]
    if paths or any(map(is_image, files)):
        return paths
    if len(folders) == 1:
        return _parquet_files(data / folders[0])
    if not folders or not all(map(role, folders)):
        return []
    return [data / folder / name for folder in folders for name in scan(data / folder)[1] if _is_parquet(Path(name))]


def _base(pattern: Path) -> Path:
    """Return the last folder of a pattern whose path contains no pattern."""
    folder = pattern.parent
    while _PATTERN.search(str(folder)):
        folder = folder.parent
    return folder


def _expand(pattern: Path) -> list[Path]:
    """Return the files of a pattern with braces ({0000..0123} or {a,b}) and the signs of the shell (*, ?, []).

    Raises:
        UnreadableFile: A file that braces name does not exist, or there are too many.
    """
    parts: list[list[str]] = []
    end = 0
    for match in _BRACES.finditer(text := str(pattern)):
        first, last, words = match.groups()
        parts += [text[end : match.start()]], (words.split(",") if words else _numbers(pattern, first, last))
        end = match.end()
    parts.append([text[end:]])
    if math.prod(map(len, parts)) > _MOST_FILES:
        raise UnreadableFile(f"{pattern}: names more than {_MOST_FILES:,} files")
    paths: list[Path] = []
    for text in map("".join, itertools.product(*parts)):
        matches = sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else [text]
        if not matches or not Path(matches[0]).is_file():
            raise UnreadableFile(f"{text}: no such file; expected all files of the pattern {pattern.name}")
        paths += map(Path, matches)
    return paths


def _numbers(pattern: Path, first: str, last: str) -> list[str]:
    """Return the numbers of a range, with as many digits as the first."""
    count = int(last) - int(first) + 1
    if not 1 <= count <= _MOST_FILES:
        raise UnreadableFile(f"{pattern}: {first}..{last} is empty or names more than {_MOST_FILES:,} files")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
