"""Read zips of uncompressed files in PyTorch's layout, the only layout that all programs read in the same way.

The file is a single archive from the first byte to the last. Its entries are in the order of the directory, without
gaps and below one folder, and no two names differ only in case. Other zips can show different contents to different
programs.
"""

import dataclasses
import struct
import zlib

from fcvit.errors import UnreadableFile

MAX_DIRECTORY = 2 << 20  # bytes: the largest variant with optimizer and EMA needs 0.6 MB
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_RECORD, _LOCAL = struct.Struct("<4s4x2H4x3L3H8xL"), struct.Struct("<4s22x2H")
_UNLIKE = "PyTorch does not write this layout, and programs could read it differently; save it again with torch.save"


@dataclasses.dataclass
class Member:
    """A file in the zip. `check_layout` sets `start`."""

    name: bytes
    flags: int
    method: int
    crc: int
    stored: int
    size: int
    header: int
    start: int = 0

    def __str__(self) -> str:
        return self.name[:60].decode(errors="replace")

    def content(self, data: bytes) -> memoryview:
        """Return the contents of the file after checking them against the recorded checksum."""
        view = memoryview(data)[self.start : self.start + self.size]
        # The checksum is 0 in files saved with torch.serialization.set_crc32_options(False).
        if self.crc and zlib.crc32(view) != self.crc:
            raise UnreadableFile(f"{self} does not match its checksum; download or copy the file again")
        return view


def directory(data: bytes) -> tuple[dict[bytes, Member], int]:
    """Read the directory of the zip. Return its entries by lowercase name, and the position where it begins.

    Raises:
        UnreadableFile: If the zip is truncated, damaged, too large, or contains data after the directory.
    """
    if data.rfind(b"PK\5\6") < 0:
        raise UnreadableFile("the zip is truncated (it has no directory); download or copy the file again")
    try:
        return _directory(data)
    except struct.error as error:
        raise UnreadableFile(f"damaged zip ({error}); download or copy the file again") from error


def _directory(data: bytes) -> tuple[dict[bytes, Member], int]:
    stop = len(data) - _END.size
    signature, _, _, _, *stated, comment = _END.unpack_from(data, stop)
    if signature != b"PK\5\6" or comment:
        raise UnreadableFile(f"the zip contains data after its directory: {_UNLIKE}")
    count, size, start = stated
    locator = stop - _LOCATOR.size
    if data[max(locator, 0) : stop].startswith(b"PK\6\7"):  # PyTorch always writes the 64-bit records, too
        stop = locator - _END64.size
        signature, length, *_, count, size, start = _END64.unpack_from(data, stop)
        agree = all(t in (n, m) for t, n, m in zip(stated, (count, size, start), (_MAX16, _MAX32, _MAX32), strict=True))
        position = _LOCATOR.unpack_from(data, locator)[2]
        if (signature, length, position) != (b"PK\6\6", _END64.size - 12, stop) or not agree:
            raise UnreadableFile("damaged zip (its end records contradict each other); download or copy the file again")
    if size > MAX_DIRECTORY:
        raise UnreadableFile(f"not a checkpoint: the directory of the zip takes {size} bytes")
    if start + size != stop:
        raise UnreadableFile(f"damaged zip (its directory is not at the recorded position): {_UNLIKE}")
    entries: dict[bytes, Member] = {}
    position = start
    while position < stop:
        signature, flags, method, crc, stored, size, names, more, comment, header = _RECORD.unpack_from(data, position)
        if signature != b"PK\1\2":
            raise UnreadableFile("damaged zip (a directory record is invalid); download or copy the file again")
        position += _RECORD.size
        name, extra = data[position : position + names], data[position + names : position + names + more]
        position += names + more + comment
        size, stored, header = _wide((size, stored, header), extra)
        # PyTorch ignores case when it looks up names.
        entry = Member(name, flags, method, crc, stored, size, header)
        if entries.setdefault(name.lower(), entry) is not entry:
            raise UnreadableFile(
                "the zip has two entries with the same name, so other programs could read different weights"
            )
    # Checking a small file could take very long if entries shared their bytes.
    if sum(entry.stored for entry in entries.values()) > len(data):
        raise UnreadableFile("the entries of the zip are together larger than the file: damaged or manipulated")
    if position != stop or len(entries) != count:
        raise UnreadableFile("damaged zip (its directory does not have the recorded length); download or copy it again")
    return entries, start


def _wide(numbers: tuple[int, ...], extra: bytes) -> tuple[int, ...]:
    """Return the size, stored size and position, each from the 64-bit field if it does not fit in 32 bits."""
    position = 0
    while position < len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{length // 8}Q", extra, position + 4))
            return tuple(next(values, number) if number == _MAX32 else number for number in numbers)
        position += 4 + length
    return numbers


def check_layout(data: bytes, entries: dict[bytes, Member], end: int) -> None:
    """Find where each file starts, and check that headers and contents fill the zip up to its directory at `end`.

    Raises:
        UnreadableFile: If a file is compressed, encrypted or damaged, or the layout is not PyTorch's.
    """
    position = 0
    for entry in entries.values():
        if entry.method or entry.size != entry.stored:
            raise UnreadableFile(f"{entry} is compressed, which PyTorch never does; save it again with torch.save")
        if entry.flags & 1:
            raise UnreadableFile(f"{entry} is encrypted")
        if entry.header != position or data[position : position + 4] != b"PK\3\4":
            raise UnreadableFile(f"{entry} is not at the expected position (damaged or truncated?): {_UNLIKE}")
        _, names, more = _LOCAL.unpack_from(data, position)
        position += _LOCAL.size
        if data[position : position + names] != entry.name:
            raise UnreadableFile(f"{entry} has a different name in its own header: damaged or manipulated")
        entry.start = position + names + more
        position = entry.start + entry.size
        if position > end:
            raise UnreadableFile(f"{entry} extends past the end of the file: truncated")
        for layout in ("<4s3L", "<4sL2Q"):  # the sizes may be repeated after the contents
            sizes = (entry.size & _MAX32,) * 2 if layout == "<4s3L" else (entry.size,) * 2
            again = struct.pack(layout, b"PK\7\x08", entry.crc, *sizes)
            if entry.flags & 8 and data.startswith(again, position):
                position += len(again)
                break
    folders = {entry.name.partition(b"/")[:2] for entry in entries.values()}
    outside = any(b"/" not in entry.name or b"\0" in entry.name for entry in entries.values())
    if position != end or len(folders) != 1 or outside:
        raise UnreadableFile(f"the zip has gaps, or its files are not in a single folder: {_UNLIKE}")
