"""The journal of an evaluation or prediction: one frame per batch, appended when the batch is computed.

A frame contains one batch and a checksum. An incomplete frame is ignored, so an interruption can lose a batch but
cannot damage the journal. A process that resumes a run writes its own journal file. Several journals may contain the
same batch, and its records are then identical. All results are computed from the journals.

A file begins with a magic string and the key of the run. A journal with another key is rejected. A frame contains:

1. the header: magic string, batch number, length of the records in bytes, length of all content in bytes
2. the CRC-32 of the header and the content
3. the content: the records (a NumPy structure that the reader must know), JSON with the values of variable size, a zero
   byte, and the chunks (byte strings of any length, with their lengths in the JSON)
"""

import array
import contextlib
import io
import itertools
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fcvit.errors import DoesNotFit

_HEAD, _CHECKSUM = struct.Struct("<4sIII"), struct.Struct("<I")
_MAGIC, _FILE = b"FCVJ", b"FCVITJ2\n"
_OFFSET_BITS = 44  # a place is the number of a file and an offset in it
KEY = 32
"""Length of the key in bytes: a SHA-256 of everything that determines the records."""
HEAD = len(_FILE) + KEY
"""Length of the file header before the first frame, in bytes."""


class Frame(NamedTuple):
    """A batch: its number, one record per image, and additional data as JSON and as bytes."""

    number: int
    records: np.ndarray
    extra: Any
    chunks: tuple[bytes, ...] = ()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file name to an OSError without one, such as the errors of open files and memory maps."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def encode(frame: Frame) -> bytes:
    """Encode a frame as bytes."""
    records = frame.records.tobytes()
    text = json.dumps([frame.extra, [len(chunk) for chunk in frame.chunks]]).encode()
    content = b"".join([records, text, b"\0", *frame.chunks])
    head = _HEAD.pack(_MAGIC, frame.number, len(records), len(content))
    return head + _CHECKSUM.pack(zlib.crc32(head + content)) + content


def frames(content: bytes, dtype: np.dtype) -> Iterator[Frame]:
    """Yield the frames of a journal without its file header, up to the first incomplete or damaged frame."""
    for _, number, records, body in _scan(io.BytesIO(content), dtype):
        yield _decode(number, records, body, dtype)


def _scan(file: BinaryIO, dtype: np.dtype) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield the position of each complete frame in a file, its number, the length of its records and its content."""
    start = file.tell()
    while len(first := file.read(_HEAD.size + _CHECKSUM.size)) == _HEAD.size + _CHECKSUM.size:
        head = first[: _HEAD.size]
        magic, number, records, size = _HEAD.unpack(head)
        body = file.read(size) if magic == _MAGIC else b""
        if (zlib.crc32(head + body),) != _CHECKSUM.unpack_from(first, _HEAD.size) or records % dtype.itemsize:
            return
        yield start, number, records, body
        start = file.tell()


def _decode(number: int, records: int, body: bytes, dtype: np.dtype) -> Frame:
    text, _, rest = body[records:].partition(b"\0")
    extra, sizes = json.loads(text)
    ends = [0, *itertools.accumulate(sizes)]
    chunks = tuple(rest[a:b] for a, b in itertools.pairwise(ends))
    return Frame(number, np.frombuffer(body[:records], dtype), extra, chunks)


class Journal:
    """The frames of a run by their number, and the file to which new frames are appended.

    Frames in files are not kept in memory. They are read again when they are needed.

    Args:
        dtype: Data type of the records.
        key: Key of the run.
        folder: Folder of the journals. Existing journals are read. If None, frames are kept in memory only.
        writer: Number in the file name. Processes that share a folder must use different numbers.

    Raises:
        DoesNotFit: The key of a journal in the folder does not match.
    """

    def __init__(self, dtype: np.dtype, key: bytes, folder: Path | None, writer: int = 0):
        assert len(key) == KEY
        self._memory: dict[int, Frame] = {}
        self._places = array.array("q")  # of each batch in the files, -1 for none: 8 bytes for a batch
        self._paths: list[Path] = []
        self._ends: dict[Path, int] = {}  # up to which each file was read
        self._readers: dict[int, BinaryIO] = {}
        self._dtype, self._head = dtype, _FILE + key
        self._folder, self._writer = folder, writer
        self._file: Any = None
        if folder is not None:
            folder.mkdir(exist_ok=True)
            self.read_folder()

    def __contains__(self, number: int) -> bool:
        return number in self._memory or (number < len(self._places) and self._places[number] >= 0)

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of all frames in ascending order."""
        stored = (number for number, place in enumerate(self._places) if place >= 0)
        return iter(sorted({*self._memory, *stored}))

    def __getitem__(self, number: int) -> Frame:
        if number in self._memory:
            return self._memory[number]
        index, offset = divmod(self._places[number], 1 << _OFFSET_BITS)
        with naming(self._paths[index]):
            if index not in self._readers:
                self._readers[index] = self._paths[index].open("rb")
            self._readers[index].seek(offset)
            for _, found, records, body in _scan(self._readers[index], self._dtype):
                assert found == number
                return _decode(number, records, body, self._dtype)
        raise OSError(None, "the journal was changed while it was in use", str(self._paths[index]))

    def read_folder(self) -> None:
        """Find the frames that were added to the files in the folder, also by other processes."""
        assert self._folder is not None
        for path in sorted(self._folder.glob("*.journal")):
            with naming(path), path.open("rb") as file:
                head = file.read(HEAD)
                if not self._head.startswith(head):
                    raise DoesNotFit(f"{path}: this run has other weights, images or settings; start a new run")
                self._ends[path] = file.seek(self._ends.get(path, HEAD))
                for start, number, _, _ in _scan(file, self._dtype):
                    self._add(path, number, start)
                    self._ends[path] = file.tell()

    def append(self, frame: Frame) -> None:
        """Add a frame and write it to the file, so that it is kept if the process is killed."""
        if self._folder is None:
            self._memory[frame.number] = frame
            return
        if self._file is None:
            self._file = self._create(self._folder)
            self._write(self._head)
            self._ends[Path(self._file.name)] = HEAD
        path, content = Path(self._file.name), encode(frame)
        self._write(content)
        self._add(path, frame.number, self._ends[path])
        self._ends[path] += len(content)

    def encoded(self, numbers: Iterable[int] | None = None) -> bytes:
        """Encode frames for `merge`, by default all frames."""
        return b"".join(encode(self[number]) for number in (self if numbers is None else numbers))

    def merge(self, content: bytes, keep: bool) -> None:
        """Add the frames that another process encoded, without replacing known frames.

        Args:
            content: Result of `encoded`.
            keep: Whether to write the frames to the file too, as `append` does.
        """
        for frame in frames(content, self._dtype):
            if frame.number not in self and keep:
                self.append(frame)
            elif frame.number not in self:
                self._memory[frame.number] = frame

    def close(self) -> None:
        """Flush the file to the disk and close all files. Frames can still be read and appended."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        if self._file is not None:
            file, self._file = self._file, None
            with file, naming(Path(file.name)):
                os.fsync(file.fileno())

    def _add(self, path: Path, number: int, offset: int) -> None:
        """Remember the place of a frame, unless it is known from another file."""
        if path not in self._paths:
            self._paths.append(path)
        self._places.extend([-1] * (number + 1 - len(self._places)))
        if self._places[number] < 0:
            self._places[number] = self._paths.index(path) << _OFFSET_BITS | offset

    def _write(self, content: bytes) -> None:
        left = memoryview(content)
        with naming(Path(self._file.name)):
            while left:  # on a disk that becomes full, write() can write a part without an error
                left = left[self._file.write(left) :]

    def _create(self, folder: Path) -> Any:
        """Create a new file, since frames after an incomplete frame in an old file would not be read."""
        number = 0
        while True:
            try:
                return (folder / f"{self._writer}-{number}.journal").open("xb", buffering=0)
            except FileExistsError:
                number += 1
