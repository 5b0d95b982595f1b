"""Where images lie: a folder, a tar that is read in place, or tars of one class each, in one view."""

import dataclasses
import errno
import functools
import os
import posixpath
import re
import shlex
import tarfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fcvit.data.folders import contents, is_image, left_out, open_file, scan
from fcvit.errors import UnreadableFile
from fcvit.foreign import KIND_BYTES, foreign_kind

_LARGEST = 1 << 29  # bytes of an image file
_BLOCK = 512  # of a tar
PACKED = (".7z", ".bz2", ".gz", ".rar", ".tbz2", ".tgz", ".txz", ".xz", ".zip", ".zst")
_LEADING = re.compile(r"\A(/|\.\.(/|$))*")  # what tar leaves out where it unpacks
_DEEPEST = 3  # tars in tars in tars
_INDICES = 1024  # tars whose index is remembered
# What else people have, by its first bytes, and how it becomes a folder or a tar.
_OTHERS = {
    b"\x1f\x8b": ("compressed with gzip", "it is read in place, decompress it first: gunzip -k {name}"),
    b"BZh": ("compressed with bzip2", "it is read in place, decompress it first: bunzip2 -k {name}"),
    b"\xfd7zXZ\x00": ("compressed with xz", "it is read in place, decompress it first: unxz -k {name}"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "it is read in place, decompress it first: unzstd {name}"),
    b"PK\x03\x04": ("a zip archive", "unpack it first: unzip {name} -d FOLDER"),
    b"PK\x05\x06": ("an empty zip archive", "expected a folder or a tar with images"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it first: 7z x {name}"),
    b"Rar!\x1a\x07": ("a rar archive", "unpack it first: unrar x {name}"),
    b"PAR1": ("a Parquet file", "write its images into class folders first"),
}


class Location(NamedTuple):
    """Where the bytes of an image are: a file, or a part of one."""

    path: str
    offset: int = 0
    size: int = -1  # -1: to the end

    def read(self) -> bytes:
        """Return the bytes, or raise an OSError."""
        with open_file(self.path) as file:
            if (self.size if self.size >= 0 else os.fstat(file.fileno()).st_size) > _LARGEST:
                raise OSError(errno.EFBIG, f"more than {_LARGEST >> 20} MiB")
            file.seek(self.offset)
            return file.read(self.size)


class Tree(NamedTuple):
    """All folders and files at any depth, relative, with /, sorted; what is hidden or the system's is left out."""

    folders: tuple[str, ...]
    files: dict[str, Location]


@dataclasses.dataclass(frozen=True)
class Archive:
    """The content of a tar, or of several.

    Attributes:
        files: name -> place of every file, hidden ones too.
        folders: those that the archive names; others are known from the files in them.
    """

    files: Mapping[str, Location]
    folders: tuple[str, ...]

    @functools.cached_property
    def tree(self) -> Tree:
        """The folders and files that are not left out."""
        files = {name: self.files[name] for name in sorted(self.files) if not _left_out(name)}
        folders: set[str] = set()
        for name in (*(f"{folder}/" for folder in self.folders if not _left_out(folder)), *files):
            while (name := posixpath.dirname(name)) and name not in folders:
                folders.add(name)
        return Tree(tuple(sorted(folders)), files)

    @functools.cached_property
    def listings(self) -> Mapping[str, tuple[list[str], list[str]]]:
        """Folder ("" the top) -> names of the folders and of the files directly in it."""
        listings: dict[str, tuple[list[str], list[str]]] = {name: ([], []) for name in ("", *self.tree.folders)}
        for kind, names in enumerate((self.tree.folders, self.tree.files)):
            for name in names:
                above, _, last = name.rpartition("/")
                listings[above][kind].append(last)
        return listings


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder, or a folder in an archive. Its methods raise `UnreadableFile` where a folder cannot be read.

    Attributes:
        path: as the user would name it.
        archive: that it is in; None: a folder of the file system.
        inner: its name in the archive, "" the top.
    """

    path: Path
    archive: Archive | None = None
    inner: str = ""

    def child(self, name: str) -> "Source":
        """Return a folder in it."""
        return Source(self.path / name, self.archive, posixpath.join(self.inner, name))

    def folders(self) -> list[str]:
        """Return the names of the folders directly in it, sorted."""
        return (scan(self.path) if self.archive is None else self.archive.listings[self.inner])[0]

    def files(self) -> list[str]:
        """Return the names of the files directly in it, sorted."""
        return (scan(self.path) if self.archive is None else self.archive.listings[self.inner])[1]

    def has_images(self) -> bool:
        """Report whether image files are directly in it."""
        return any(map(is_image, self.files()))

    def has_images_below(self) -> bool:
        """Report whether image files are in it or in the folders in it; of linked folders, in those alone."""
        children = map(self.child, self.folders())
        return self.has_images() or any(
            child.has_images() if child.path.is_symlink() else child.has_images_below() for child in children
        )

    def tree(self) -> Tree:
        """Read everything in it."""
        if self.archive is None:
            folders, files = contents(self.path)
            return Tree(tuple(sorted(folders)), {name: Location(f"{self.path}/{name}") for name in sorted(files)})
        prefix = f"{self.inner}/" if self.inner else ""
        folders, files = self.archive.tree
        return Tree(
            tuple(name.removeprefix(prefix) for name in folders if name.startswith(prefix)),
            {name.removeprefix(prefix): place for name, place in files.items() if name.startswith(prefix)},
        )

    def locate(self, name: str) -> Location | None:
        """Return the place of a file by its name, hidden or not; None: there is none."""
        if self.archive is not None:
            return self.archive.files.get(posixpath.join(self.inner, name))
        path = os.path.join(self.path, name)  # noqa: PTH118
        try:
            return Location(path) if os.path.isfile(path) else None  # noqa: PTH113
        except ValueError:  # a null byte
            return None


def open_source(data: Path) -> Source:
    """Open a folder, a tar, a folder inside a tar (`x.tar/val`), or a folder of tars with one class each.

    Raises:
        UnreadableFile: nothing there, or a tar that cannot be read whole.
    """
    if data.is_dir():
        folders, files = scan(data)
        tars = [name for name in files if name.lower().endswith(".tar")]
        # One tar among other files is not the data set.
        if folders or any(map(is_image, files)) or len(tars) * 2 <= len(files):
            return Source(data)
        return Source(data, _joined(str(data), {name: _read_tar(data / name) for name in tars}, files))
    for tar in (data, *data.parents):
        if tar.is_file():
            inner = "" if tar == data else data.relative_to(tar).as_posix()
            archive = _read_tar(tar)
            if inner not in archive.listings:
                raise UnreadableFile(f"{tar}: no folder {inner} in it, and no images in it below {inner}")
            return Source(data, archive, inner)
    raise UnreadableFile(f"{data}: no such folder or tar; --data expects class folders, or a tar of them")


def _read_tar(path: Path) -> Archive:
    """Read the index of a tar, once as long as the file stays the same; nothing is unpacked."""
    try:
        status = path.stat()
        return _index(path, status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror or error}") from error


@functools.lru_cache(_INDICES)
def _index(path: Path, *_: int) -> Archive:
    """Read the index of the tar whose status has these numbers."""
    with open_file(path) as file:
        start = file.read(8)
        for magic, (kind, remedy) in _OTHERS.items():
            if start.startswith(magic):
                name = shlex.quote(path.name)
                raise UnreadableFile(f"{path}: not a tar that can be read: {kind}; {remedy.format(name=name)}")
        return _read_index(file, path, str(path), 0, os.fstat(file.fileno()).st_size, 0)


def _read_index(file: BinaryIO, path: Path, shown: str, start: int, end: int, depth: int) -> Archive:
    """Read the index of the tar between two places of a file, `depth` tars deep, and of the tars in it."""
    files: dict[str, Location] = {}
    links: dict[str, str] = {}
    folders: list[str] = []
    first = start
    while start < end or start == first:  # of tars put together with cat, each ends with empty blocks
        try:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    _add_member(member, path, files, links, folders)
                # tarfile takes a damaged header, and the end of the file, for the end of the tar.
                stopped = tar.offset
        except (tarfile.TarError, ValueError, EOFError) as error:
            file.seek(start)
            reason = f"no tar at byte {start - first} of {end - first}: {error}"
            reason = reason if start > first else foreign_kind(file.read(KIND_BYTES)) or error
            raise UnreadableFile(f"{shown}: not a tar that can be read: {reason}") from error
        file.seek(stopped)
        if stopped + _BLOCK > end or file.read(_BLOCK) != bytes(_BLOCK):
            raise UnreadableFile(
                f"{shown}: damaged or cut off at byte {stopped - first} of {end - first}; fetch it again"
            )
        start = _skip_empty(file, stopped + _BLOCK, end)
    for name in links:
        target, steps = links[name], 0
        while target in links and steps < len(links):
            target, steps = links[target], steps + 1
        # One that leads out of the tar is an image that cannot be read, as it would be in a folder.
        files.setdefault(name, files.get(target, Location(str(path / name))))
    if files and all(name.startswith(("/", "../")) for name in files):  # made with tar -P
        files = {_LEADING.sub("", name): place for name, place in files.items()}
        folders = [_LEADING.sub("", name) for name in folders]
    archive = Archive(files, tuple(folders))
    tars = {name: place for name, place in archive.tree.files.items() if name.lower().endswith(".tar")}
    if not tars or any(map(is_image, archive.tree.files)):
        return archive
    if depth == _DEEPEST:
        raise UnreadableFile(f"{shown}: tars in tars, more than {_DEEPEST} deep; unpack the outer ones")
    inner = {
        name: _read_index(file, path, f"{shown}/{name}", place.offset, place.offset + place.size, depth + 1)
        for name, place in tars.items()
    }
    return _joined(shown, inner, archive.tree.files)


def _add_member(
    member: tarfile.TarInfo, path: Path, files: dict[str, Location], links: dict[str, str], folders: list[str]
) -> None:
    name = posixpath.normpath(member.name)
    if member.isdir():
        folders.append(name)
    elif member.issparse():  # its bytes do not stand in the tar as they are: listed as unreadable
        files[name] = Location(str(path / name.lstrip("/")))
    elif member.isreg():
        # The last member of a name counts, as it does when the tar is unpacked.
        files[name] = Location(str(path), member.offset_data, member.size)
    elif member.islnk():
        links[name] = posixpath.normpath(member.linkname)
    elif member.issym():
        links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))


def _skip_empty(file: BinaryIO, start: int, end: int) -> int:
    """Return the first block that is not empty, or the end; the file stands at the start."""
    while start < end:
        content = file.read(min(_BLOCK * 2048, end - start))
        filled = len(content) - len(content.lstrip(b"\0"))
        if filled < len(content):
            return start + filled // _BLOCK * _BLOCK
        start += len(content)
    return end


def _joined(shown: str, tars: Mapping[str, Archive], beside: Collection[str]) -> Archive:
    """Join tars to one archive, in which each is a class folder by its name without .tar; refuse other tars."""
    packed = [name for name in beside if posixpath.splitext(name)[1].lower() in PACKED]
    if packed:
        raise UnreadableFile(
            f"{shown}: has tars and other archives, which are not read ({packed[0]}); unpack them first"
        )
    files: dict[str, Location] = {}
    folders: list[str] = []
    for name, archive in tars.items():
        content = archive.tree.files
        if sum(map(is_image, content)) * 2 <= len(content):
            raise UnreadableFile(
                f"{shown}: expected tars that are class folders, with images only, but {name} has other files, as "
                "WebDataset's shards have; unpack them into class folders"
            )
        folder = name[: -len(".tar")]
        folders += [folder, *(f"{folder}/{inner}" for inner in archive.folders)]
        files |= {f"{folder}/{inner}": place for inner, place in archive.files.items()}
    return Archive(files, tuple(folders))


def _left_out(name: str) -> bool:
    """Report whether a part of a name in a tar is left out, or leads out of the tar."""
    return any(not part or left_out(part) for part in name.split("/"))
