"""Read images from a folder, a tar archive, or a folder of tar archives with one class each."""

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
from fcvit.foreign import KIND_BYTES, TAR, foreign_kind

_LARGEST = 1 << 29  # largest image file, in bytes
_BLOCK = 512  # block size of the tar format, in bytes
PACKED = (".7z", ".bz2", ".gz", ".rar", ".tbz2", ".tgz", ".txz", ".xz", ".zip", ".zst")
_LEADING = re.compile(r"\A(/|\.\.(/|$))*")  # tar strips these when it extracts
_DEEPEST = 3  # nesting depth of tar archives
_INDICES = 1024  # number of tar archives whose index is cached
# The first bytes of other files -> their format and the remedy.
_OTHERS = {
    b"\x1f\x8b": ("compressed with gzip", "decompress it first (archives are read in place): gunzip -k {name}"),
    b"BZh": ("compressed with bzip2", "decompress it first (archives are read in place): bunzip2 -k {name}"),
    b"\xfd7zXZ\x00": ("compressed with xz", "decompress it first (archives are read in place): unxz -k {name}"),
    b"\x28\xb5\x2f\xfd": (
        "compressed with zstd",
        "decompress it first (archives are read in place): unzstd {name}",
    ),
    b"PK\x03\x04": ("a zip archive", "unpack it first: unzip {name} -d FOLDER"),
    b"PK\x05\x06": ("an empty zip archive", "pass a folder or a tar archive that contains images"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it first: 7z x {name}"),
    b"Rar!\x1a\x07": ("a rar archive", "unpack it first: unrar x {name}"),
    b"PAR1": ("a Parquet file", "write its images into class folders first"),
}


class Location(NamedTuple):
    """The location of an image's bytes: a file or a part of a file.

    Attributes:
        path: Path of the file.
        offset: Position of the first byte in the file.
        size: Number of bytes, or -1 for the rest of the file.
    """

    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """Return the bytes of the image.

        Raises:
            OSError: The file cannot be read, is not a regular file or is too large.
        """
        with open_file(self.path) as file:
            if (self.size if self.size >= 0 else os.fstat(file.fileno()).st_size) > _LARGEST:
                raise OSError(errno.EFBIG, f"larger than {_LARGEST >> 20} MiB")
            file.seek(self.offset)
            return file.read(self.size)


class Tree(NamedTuple):
    """The sorted relative paths (with /) of all folders and files at any depth, except hidden and system files."""

    folders: tuple[str, ...]
    files: dict[str, Location]


@dataclasses.dataclass(frozen=True)
class Archive:
    """The content of one tar archive or of several.

    Attributes:
        files: Name -> location of every file, including hidden files.
        folders: Folders with an entry in the archive. Other folders are known only from the files in them.
    """

    files: Mapping[str, Location]
    folders: tuple[str, ...]

    @functools.cached_property
    def tree(self) -> Tree:
        """The folders and files that are neither hidden nor system files, nor outside the archive."""
        files = {name: self.files[name] for name in sorted(self.files) if not _left_out(name)}
        folders: set[str] = set()
        for name in (*(f"{folder}/" for folder in self.folders if not _left_out(folder)), *files):
            while (name := posixpath.dirname(name)) and name not in folders:
                folders.add(name)
        return Tree(tuple(sorted(folders)), files)

    @functools.cached_property
    def listings(self) -> Mapping[str, tuple[list[str], list[str]]]:
        """Folder ("" for the root) -> names of the folders and of the files directly in the folder."""
        listings: dict[str, tuple[list[str], list[str]]] = {name: ([], []) for name in ("", *self.tree.folders)}
        for kind, names in enumerate((self.tree.folders, self.tree.files)):
            for name in names:
                parent, _, last = name.rpartition("/")
                listings[parent][kind].append(last)
        return listings


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder of images, or a folder inside a tar archive.

    The methods raise `UnreadableFile` if a folder cannot be read.

    Attributes:
        path: Path of the folder as a user writes it.
        archive: Archive that contains the folder, or None for a folder in the file system.
        inner: Path of the folder inside the archive, "" for the root.
    """

    path: Path
    archive: Archive | None = None
    inner: str = ""

    def child(self, name: str) -> "Source":
        """Return the subfolder with this name."""
        return Source(self.path / name, self.archive, posixpath.join(self.inner, name))

    def folders(self) -> list[str]:
        """Return the sorted names of the subfolders."""
        return (scan(self.path) if self.archive is None else self.archive.listings[self.inner])[0]

    def files(self) -> list[str]:
        """Return the sorted names of the files directly in this folder."""
        return (scan(self.path) if self.archive is None else self.archive.listings[self.inner])[1]

    def has_images(self) -> bool:
        """Return True if image files are directly in this folder."""
        return any(map(is_image, self.files()))

    def has_images_below(self) -> bool:
        """Return True if image files are in this folder at any depth, but only directly in a linked subfolder."""
        children = map(self.child, self.folders())
        return self.has_images() or any(
            child.has_images() if child.path.is_symlink() else child.has_images_below() for child in children
        )

    def tree(self) -> Tree:
        """Return all folders and files below this folder."""
        if self.archive is None:
            folders, files = contents(self.path)
            return Tree(tuple(sorted(folders)), {name: Location(f"{self.path}/{name}") for name in sorted(files)})
        prefix = f"{self.inner}/" if self.inner else ""
        folders, files = self.archive.tree
        return Tree(
            tuple(name.removeprefix(prefix) for name in folders if name.startswith(prefix)),
            {name.removeprefix(prefix): location for name, location in files.items() if name.startswith(prefix)},
        )

    def locate(self, name: str) -> Location | None:
        """Return the location of the named file, hidden or not, or None if it does not exist."""
        if self.archive is not None:
            return self.archive.files.get(posixpath.join(self.inner, name))
        path = os.path.join(self.path, name)  # noqa: PTH118
        try:
            return Location(path) if os.path.isfile(path) else None  # noqa: PTH113
        except ValueError:  # a null byte
            return None


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
        return Source(data, _join(str(data), {name: _read_tar(data / name) for name in tars}, files))
    for tar in (data, *data.parents):
        if tar.is_file():
            inner = "" if tar == data else data.relative_to(tar).as_posix()
            archive = _read_tar(tar)
            if inner not in archive.listings:
                raise UnreadableFile(
                    f"{tar}: the archive contains no folder {inner} and no images below it; pass another of its folders"
                )
            return Source(data, archive, inner)
    raise UnreadableFile(f"{data}: no such folder or tar archive; --data expects class folders or a tar of them")


def _read_tar(path: Path) -> Archive:
    """Return the index of a tar archive without unpacking it. The index is cached until the file changes."""
    try:
        status = path.stat()
        return _index(path, status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror or error}") from error


@functools.lru_cache(_INDICES)
def _index(path: Path, *_: int) -> Archive:
    """Read the index of a tar archive. The other arguments identify the file's version in the cache."""
    with open_file(path) as file:
        start = file.read(8)
        for magic, (kind, remedy) in _OTHERS.items():
            if start.startswith(magic):
                name = shlex.quote(path.name)
                raise UnreadableFile(f"{path}: not a readable tar archive: {kind}; {remedy.format(name=name)}")
        return _read_index(file, path, str(path), 0, os.fstat(file.fileno()).st_size, 0)


def _read_index(file: BinaryIO, path: Path, shown: str, start: int, end: int, depth: int) -> Archive:
    """Read the index of a tar archive and of the archives nested in it.

    Args:
        file: Open file that contains the archive.
        path: Path of the file.
        shown: Name of the archive in messages.
        start: Position of the archive's first byte in the file.
        end: Position after the archive's last byte.
        depth: Number of archives that contain this archive.

    Raises:
        UnreadableFile: The archive is damaged or truncated, or archives are nested too deeply.
    """
    files: dict[str, Location] = {}
    links: dict[str, str] = {}
    folders: list[str] = []
    first = start
    while start < end or start == first:  # archives can be joined with cat, and each ends with empty blocks
        try:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    _add_member(member, path, files, links, folders)
                # tarfile stops silently at a damaged header and at the end of the file.
                stopped = tar.offset
        except (tarfile.TarError, ValueError, EOFError) as error:
            file.seek(start)
            reason = f"invalid data at byte {start - first} of {end - first}: {error}"
            kind = foreign_kind(file.read(KIND_BYTES)) if start == first else None
            reason = kind if kind and kind != TAR else reason
            raise UnreadableFile(f"{shown}: not a readable tar archive: {reason}") from error
        file.seek(stopped)
        if stopped + _BLOCK > end or file.read(_BLOCK) != bytes(_BLOCK):
            raise UnreadableFile(
                f"{shown}: damaged or truncated at byte {stopped - first} of {end - first}; copy or download it again"
            )
        start = _skip_empty(file, stopped + _BLOCK, end)
    for name in links:
        target, steps = links[name], 0
        while target in links and steps < len(links):
            target, steps = links[target], steps + 1
        # A link to a file outside the archive is listed with a location that cannot be read, like a broken link.
        files.setdefault(name, files.get(target, Location(str(path / name))))
    if files and all(name.startswith(("/", "../")) for name in files):  # created with tar -P
        files = {_LEADING.sub("", name): location for name, location in files.items()}
        folders = [_LEADING.sub("", name) for name in folders]
    archive = Archive(files, tuple(folders))
    tars = {name: location for name, location in archive.tree.files.items() if name.lower().endswith(".tar")}
    if not tars or any(map(is_image, archive.tree.files)):
        return archive
    if depth == _DEEPEST:
        raise UnreadableFile(
            f"{shown}: tar archives are nested more than {_DEEPEST} levels deep; unpack the outer archives"
        )
    inner = {
        name: _read_index(file, path, f"{shown}/{name}", location.offset, location.offset + location.size, depth + 1)
        for name, location in tars.items()
    }
    return _join(shown, inner, archive.tree.files)


def _add_member(
    member: tarfile.TarInfo, path: Path, files: dict[str, Location], links: dict[str, str], folders: list[str]
) -> None:
    name = posixpath.normpath(member.name)
    if member.isdir():
        folders.append(name)
    elif member.issparse():  # stored in pieces, so it is listed with a location that cannot be read
        files[name] = Location(str(path / name.lstrip("/")))
    elif member.isreg():
        # The last member with a name replaces earlier ones, as when the archive is unpacked.
        files[name] = Location(str(path), member.offset_data, member.size)
    elif member.islnk():
        links[name] = posixpath.normpath(member.linkname)
    elif member.issym():
        links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))


def _skip_empty(file: BinaryIO, start: int, end: int) -> int:
    """Return the position of the first block with nonzero bytes, or the end. The file position must be `start`."""
    while start < end:
        content = file.read(min(_BLOCK * 2048, end - start))
        filled = len(content) - len(content.lstrip(b"\0"))
        if filled < len(content):
            return start + filled // _BLOCK * _BLOCK
        start += len(content)
    return end


def _join(shown: str, tars: Mapping[str, Archive], siblings: Collection[str]) -> Archive:
    """Join tar archives into one archive, in which each is a class folder named like the tar archive without .tar.

    Raises:
        UnreadableFile: There are archives of other formats among the siblings, or a tar archive is not a class folder.
    """
    packed = [name for name in siblings if posixpath.splitext(name)[1].lower() in PACKED]
    if packed:
        raise UnreadableFile(
            f"{shown}: contains archives of formats that are not read, such as {packed[0]}; unpack them first"
        )
    files: dict[str, Location] = {}
    folders: list[str] = []
    for name, archive in tars.items():
        content = archive.tree.files
        if sum(map(is_image, content)) * 2 <= len(content):
            raise UnreadableFile(
                f"{shown}: {name} contains other files than images, like a WebDataset shard, so it is not a class "
                "folder; unpack the archives into class folders"
            )
        folder = name[: -len(".tar")]
        folders += [folder, *(f"{folder}/{inner}" for inner in archive.folders)]
        files |= {f"{folder}/{inner}": location for inner, location in archive.files.items()}
    return Archive(files, tuple(folders))


def _left_out(name: str) -> bool:
    """Return True if a part of a path in an archive is hidden, belongs to the system, or is "" or ".."."""
    return any(not part or left_out(part) for part in name.split("/"))
