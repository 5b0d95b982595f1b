"""The journal of an evaluation run: one record per image, appended batch by batch.

A frame contains one batch and a checksum. An incomplete frame is ignored, so an interruption can lose a batch but
cannot damage the journal. A process that resumes a run writes its own journal file. Several journals may contain the
same batch, and its records are then identical. All metrics are computed from the journals.

A file begins with a magic string and the key of the run. A journal with another key is rejected. A frame contains:

1. the header: magic string, batch number, length of the records in bytes, length of all content in bytes
2. the CRC-32 of the header and the content
3. the content: the records (a NumPy structure that the reader must know), JSON with the values of variable size, a zero
   byte, and the chunks (byte strings of any length, with their lengths in the JSON)
"""

import itertools
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fcvit.errors import DoesNotFit

_HEAD, _CHECKSUM = struct.Struct("<4sIII"), struct.Struct("<I")
_MAGIC, _FILE = b"FCVJ", b"FCVITJ2\n"
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


def encode(frame: Frame) -> bytes:
    """Encode a frame as bytes."""
    records = frame.records.tobytes()
    text = json.dumps([frame.extra, [len(chunk) for chunk in frame.chunks]]).encode()
    content = b"".join([records, text, b"\0", *frame.chunks])
    head = _HEAD.pack(_MAGIC, frame.number, len(records), len(content))
    return head + _CHECKSUM.pack(zlib.crc32(head + content)) + content


def frames(content: bytes, dtype: np.dtype) -> Iterator[Frame]:
    """Yield the frames of a journal without its file header, up to the first incomplete or damaged frame."""
    start = 0
    while (body := start + _HEAD.size + _CHECKSUM.size) <= len(content):
        head = content[start : start + _HEAD.size]
        magic, number, records, size = _HEAD.unpack(head)
        (checksum,) = _CHECKSUM.unpack_from(content, start + _HEAD.size)
        start = body + size
        if magic != _MAGIC or zlib.crc32(head + content[body:start]) != checksum or records % dtype.itemsize:
            return
        text, _, rest = content[body + records : start].partition(b"\0")
        extra, sizes = json.loads(text)
        ends = [0, *itertools.accumulate(sizes)]
        chunks = tuple(rest[a:b] for a, b in itertools.pairwise(ends))
        yield Frame(number, np.frombuffer(content[body : body + records], dtype), extra, chunks)


class Journal:
    """The frames of a run in memory, and the file to which new frames are appended.

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
        self.frames: dict[int, Frame] = {}
        self._dtype, self._head = dtype, _FILE + key
        self._folder, self._writer = folder, writer
        self._file: Any = None
        if folder is not None:
            folder.mkdir(exist_ok=True)
            for path in sorted(folder.glob("*.journal")):
                self.merge(path.read_bytes(), str(path))

    def merge(self, content: bytes, source: str) -> None:
        """Add the frames of a journal, without replacing known frames."""
        head = content[:HEAD]
        if not self._head.startswith(head):
            raise DoesNotFit(f"{source}: these records have other weights, images or settings; start a new run")
        for frame in frames(content[HEAD:], self._dtype):
            self.frames.setdefault(frame.number, frame)

    def append(self, frame: Frame) -> None:
        """Add a frame and write it to the file, so that it is kept if the process is killed."""
        self.frames[frame.number] = frame
        if self._folder is None:
            return
        if self._file is None:
            self._file = self._create(self._folder)
            self._write(self._head)
        self._write(encode(frame))

    def encoded(self) -> bytes:
        """Encode all frames as the content of a journal file."""
        return self._head + b"".join(encode(self.frames[number]) for number in sorted(self.frames))

    def close(self) -> None:
        """Flush the file to the disk and close it."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _write(self, content: bytes) -> None:
        left = memoryview(content)
        try:
            while left:  # on a disk that becomes full, write() can write a part without an error
                left = left[self._file.write(left) :]
        except OSError as error:
            error.filename = self._file.name
            raise

    def _create(self, folder: Path) -> Any:
        """Create a new file, since frames after an incomplete frame in an old file would not be read."""
        number = 0
        while True:
            try:
                return (folder / f"{self._writer}-{number}.journal").open("xb", buffering=0)
            except FileExistsError:
                number += 1
