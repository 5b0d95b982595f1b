"""Read the index of tar archives, which are not unpacked."""

import dataclasses
import os
import posixpath
import re
import shlex
import tarfile
import zlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import BinaryIO

from fcvit.data.archives import Archive, Builder
from fcvit.data.columns import Location, encoded
from fcvit.data.folders import open_file
from fcvit.errors import UnreadableFile
from fcvit.foreign import KIND_BYTES, TAR, foreign_kind

_BLOCK = 512  # block size of the tar format, in bytes
_AHEAD = 1 << 16  # bytes that are read at once in an archive of small files
PACKED = (".7z", ".bz2", ".gz", ".rar", ".tbz2", ".tgz", ".txz", ".xz", ".zip", ".zst")
_LEADING = re.compile(r"\A(/|\.\.(/|$))*")  # tar strips these when it extracts
_DEEPEST = 3  # nesting depth of tar archives
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
}


def read_tar(path: Path) -> Archive:
    """Return the index of a tar archive without unpacking it.

    Raises:
        UnreadableFile: The archive is damaged or truncated, or archives are nested too deeply.
    """
    try:
        with open_file(path) as file:
            start = file.read(8)
            for magic, (kind, remedy) in _OTHERS.items():
                if start.startswith(magic):
                    name = shlex.quote(path.name)
                    raise UnreadableFile(f"{path}: not a readable tar archive: {kind}; {remedy.format(name=name)}")
            return _read_index(file, path, str(path), 0, os.fstat(file.fileno()).st_size, 0)
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror or error}") from error


@dataclasses.dataclass
class _Members:
    """The members of an archive that were read so far. Links are resolved at the end."""

    path: str
    files: Builder = dataclasses.field(default_factory=Builder)
    links: dict[str, str] = dataclasses.field(default_factory=dict)
    folders: list[str] = dataclasses.field(default_factory=list)

    def add(self, member: tarfile.TarInfo) -> None:
        name = posixpath.normpath(member.name)
        if member.isdir():
            self.folders.append(name)
        elif member.issparse():  # stored in pieces, so it is listed with a location that cannot be read
            self.files.add(name, Location(f"{self.path}/{name.lstrip('/')}"))
        elif member.isreg():
            # The last member with a name replaces earlier ones, as when the archive is unpacked.
            self.files.add(name, Location(self.path, member.offset_data, member.size))
        elif member.islnk():
            self.links[name] = posixpath.normpath(member.linkname)
        elif member.issym():
            self.links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))

    def build(self) -> Archive:
        """Return all files and folders, with links as further names of their files."""
        archive = self.files.build(self.folders)
        files = archive.files
        named = [name for name in self.links if name not in files]
        outside = sum(len(files.names.under(start)) for start in ("/", "../"))
        absolute = len(files) + len(named) > 0 and outside + sum(
            name.startswith(("/", "../")) for name in named
        ) == len(files) + len(named)
        if not named and not absolute:
            return archive
        every = Builder()

        def relative(name: str) -> str:
            return _LEADING.sub("", name) if absolute else name  # created with tar -P

        for name, location in files.items():
            every.add(relative(name), location)
        for name in named:
            target, steps = self.links[name], 0
            while target in self.links and steps < len(self.links):
                target, steps = self.links[target], steps + 1
            # A link to a file outside the archive is listed with a location that cannot be read, like a broken link.
            every.add(relative(name), files[target] if target in files else Location(str(Path(self.path) / name)))
        return every.build(map(relative, self.folders))


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
    members = _Members(str(path))
    if not _read_plainly(file, start, end, members):
        members = _Members(str(path))
        _read_members(file, shown, start, end, members)
    archive = members.build()
    visible = archive.tree.files
    if visible.is_image().any():
        return archive
    tars = {name: location for name, location in visible.items() if name.lower().endswith(".tar")}
    if not tars:
        return archive
    if depth == _DEEPEST:
        raise UnreadableFile(
            f"{shown}: tar archives are nested more than {_DEEPEST} levels deep; unpack the outer archives"
        )
    inner = (
        (name, _read_index(file, path, f"{shown}/{name}", place.offset, place.offset + place.size, depth + 1))
        for name, place in tars.items()
    )
    return join(shown, inner, archive.tree.files)


def _read_members(file: BinaryIO, shown: str, start: int, end: int, members: _Members) -> None:
    """Read all members with `tarfile`, which supports every variant of the format."""
    first = start
    while start < end or start == first:  # archives can be joined with cat, and each ends with empty blocks
        try:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    members.add(member)
                    tar.members = []  # pyrefly: ignore -- would keep every member in memory
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


def _read_plainly(file: BinaryIO, start: int, end: int, members: _Members) -> bool:
    """Read members of the common kinds, ten times faster than `tarfile`. Return False if there is anything else.

    These are regular files, folders and links in the ustar, pax and GNU formats. Whatever is unusual or damaged is left
    to `_read_members`, which reports it.
    """
    if not hasattr(os, "pread"):  # Windows
        return False
    descriptor, position = file.fileno(), start
    path = members.files.paths.setdefault(members.path, 0)
    long_name, pax = b"", {}
    buffer, buffered, ahead = b"", start, _BLOCK
    try:
        while True:
            header = buffer[position - buffered : position - buffered + _BLOCK]
            if len(header) < _BLOCK:
                buffer, buffered = os.pread(descriptor, ahead, position), position
                header = buffer[:_BLOCK]
            if len(header) < _BLOCK or position + _BLOCK > end:
                return False
            if not header[0] and header == bytes(_BLOCK):
                if long_name or pax:
                    return False
                position = _skip_empty(file, position + _BLOCK, end)
                if position >= end:
                    return True
                continue
            check = header[148:156]
            # The lower half of Adler-32 is one plus the sum of the bytes, modulo 65521.
            total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(check) + 256
            if (total - _octal(check)) % 65521 or header[257:262] != b"ustar":
                return False
            size, kind = _octal(header[124:136]), header[156]
            ahead = _AHEAD if size < _AHEAD // 8 else _BLOCK  # several headers are read at once if the files are small
            data = position + _BLOCK
            if kind in b"Lx":
                content = os.pread(descriptor, size, data)
                if long_name or pax or len(content) < size or size > 1 << 20:
                    return False
                if kind == ord("L"):
                    long_name = content.partition(b"\0")[0]
                else:
                    pax = _pax_fields(content)
                position = data + -(-size // _BLOCK) * _BLOCK
                continue
            name = header[:100].partition(b"\0")[0]
            if kind == ord("5"):
                name = name.rstrip(b"/")
            if prefix := header[345:500].partition(b"\0")[0]:
                name = prefix + b"/" + name
            if long_name:
                name = long_name.removesuffix(b"/") if kind == ord("5") else long_name
            name = pax[b"path"].rstrip(b"/") if b"path" in pax else name
            size = int(pax.get(b"size", size))
            if b"//" in name or b"./" in name or name[-1:] in (b"/", b".", b"") or not name.isascii():
                if not kind and name.endswith(b"/"):
                    return False
                name = encoded(posixpath.normpath(name.decode("utf-8", "surrogateescape")))
            position = data
            if kind == ord("0") or not kind:
                members.files.append(name, path, data, size)
                position += -(-size // _BLOCK) * _BLOCK
            elif kind in b"125":
                text = name.decode("utf-8", "surrogatepass")
                link = pax.get(b"linkpath", header[157:257].partition(b"\0")[0]).decode("utf-8", "surrogateescape")
                if kind == ord("5"):
                    members.folders.append(text)
                elif kind == ord("1"):
                    members.links[text] = posixpath.normpath(link)
                else:
                    members.links[text] = posixpath.normpath(posixpath.join(posixpath.dirname(text), link))
            else:
                return False
            long_name, pax = b"", {}
    except ValueError:  # also the error for a damaged number
        return False


def _octal(field: bytes) -> int:
    """Return the number in a header. Raise ValueError if it is negative, damaged or in base 256."""
    number = int(field.rstrip(b"\0 ") or b"0", 8)
    if number < 0:
        raise ValueError(number)
    return number


def _pax_fields(content: bytes) -> dict[bytes, bytes]:
    """Return the extended header of a member. Raise ValueError if it is damaged or describes a sparse file."""
    fields, position = {}, 0
    while position < len(content) and content[position]:
        space = content.index(b" ", position)
        end = position + int(content[position:space])
        name, equals, value = content[space + 1 : end - 1].partition(b"=")
        if end <= space or content[end - 1 : end] != b"\n" or not equals:
            raise ValueError(content)
        if name.startswith((b"GNU.sparse", b"hdrcharset")):
            raise ValueError(name)
        fields[name] = value
        position = end
    return fields


def _skip_empty(file: BinaryIO, start: int, end: int) -> int:
    """Return the position of the first block with nonzero bytes, or the end."""
    file.seek(start)
    while start < end:
        content = file.read(min(_BLOCK * 2048, end - start))
        filled = len(content) - len(content.lstrip(b"\0"))
        if filled < len(content):
            return start + filled // _BLOCK * _BLOCK
        start += len(content)
    return end


def join(shown: str, tars: Iterable[tuple[str, Archive]], siblings: Collection[str]) -> Archive:
    """Join tar archives into one archive, in which each is a class folder named like the tar archive without .tar.

    Raises:
        UnreadableFile: There are archives of other formats among the siblings, or a tar archive is not a class folder.
    """
    packed = [name for name in siblings if posixpath.splitext(name)[1].lower() in PACKED]
    if packed:
        raise UnreadableFile(
            f"{shown}: contains archives of formats that are not read, such as {packed[0]}; unpack them first"
        )
    every = Builder()
    folders: list[str] = []
    for name, archive in tars:
        content = archive.tree.files
        if content.is_image().sum() * 2 <= len(content):
            raise UnreadableFile(
                f"{shown}: {name} contains other files than images, and is not a WebDataset shard either (an image and "
                "a .cls or .json file for each sample), so it is not a class folder; unpack the archives into class "
                "folders"
            )
        folder = name[: -len(".tar")]
        folders += [folder, *(f"{folder}/{inner}" for inner in archive.folders)]
        for inner, location in archive.files.items():
            every.add(f"{folder}/{inner}", location)
    return every.build(folders)
