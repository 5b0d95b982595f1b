"""Open a folder of images, tar archives, WebDataset shards or Parquet files, which all look like a folder."""

import dataclasses
import functools
import os
import posixpath
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from fcvit.data.archives import Archive, Tree
from fcvit.data.columns import Files, FolderLocations, Location, Names, encoded
from fcvit.data.folders import is_image, legible, scan, walk
from fcvit.data.index_cache import indexed, stamp_of_files
from fcvit.data.tars import join, read_tar
from fcvit.errors import UnreadableFile

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

        return indexed(self.path, "folder", unchanged, lambda: _read_folder(self.path), None)


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


def open_source(data: Path) -> Source:
    """Open a folder, a tar archive, a folder inside one (`x.tar/val`), or a folder of tar archives with one class each.

    Raises:
        UnreadableFile: The path does not exist, or an archive is damaged or cannot be read.
    """
    if data.is_dir():
        folders, files = scan(data)
        tars = [name for name in files if name.lower().endswith(".tar")]
        # The archives are the data set only if more than half of the files are archives.
        if folders or any(map(is_image, files)) or len(tars) * 2 <= len(files):
            return Source(data)

        def read_tars() -> Archive:
            return join(str(data), ((name, read_tar(data / name)) for name in tars), files)

        return Source(data, _of_files(data, "tars", [data / name for name in tars], read_tars))
    for tar in (data, *data.parents):
        if tar.is_file():
            inner = "" if tar == data else data.relative_to(tar).as_posix()
            archive = _of_files(tar, "tar", [tar], functools.partial(read_tar, tar))
            if inner not in archive.subfolders:
                raise UnreadableFile(
                    f"{tar}: the archive contains no folder {inner} and no images below it; pass another of its folders"
                )
            return Source(data, archive, inner)
    raise UnreadableFile(f"{data}: no such folder or tar archive; --data expects class folders or a tar of them")


def _of_files(path: Path, kind: str, files: list[Path], read: Any, location: Any = Location) -> Archive:
    """Return the index of a data set in these files, from the cache or read now."""
    try:
        stamp = stamp_of_files(files)
    except OSError as error:
        raise UnreadableFile(f"{error.filename or path}: {error.strerror or error}") from error
    return indexed(path, kind, stamp.__eq__, lambda: (read(), stamp), location)
