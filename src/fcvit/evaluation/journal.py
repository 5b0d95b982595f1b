"""The journal of a run: a record of every image, appended batch by batch.

A frame holds one batch and carries a checksum, so that it is there as a whole or not at all, whatever
ended the process. A process that goes on writes a journal of its own; what several of them say
of the same batch is the same. All figures are computed from the journals.

A file begins with a magic word and the key of the run: records of other settings are refused.
A frame is: magic, number of the batch, length of the records, length of all content; CRC-32 of this and
of the content; the records (a NumPy structure that the reader must know); JSON with what has no fixed size,
a zero byte, and the chunks: bytes of any length, whose sizes are in the JSON.
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
"""Length of a run's key in bytes: a SHA-256 of everything that decides its records."""
HEAD = len(_FILE) + KEY
"""Length of what a file has before its frames, in bytes."""


class Frame(NamedTuple):
    """One batch: its number, a record for each image, and more about it as JSON and as bytes."""

    number: int
    records: np.ndarray
    extra: Any
    chunks: tuple[bytes, ...] = ()


def encode(frame: Frame) -> bytes:
    """Return the bytes of a frame."""
    records = frame.records.tobytes()
    text = json.dumps([frame.extra, [len(chunk) for chunk in frame.chunks]]).encode()
    content = b"".join([records, text, b"\0", *frame.chunks])
    head = _HEAD.pack(_MAGIC, frame.number, len(records), len(content))
    return head + _CHECKSUM.pack(zlib.crc32(head + content)) + content


def frames(content: bytes, dtype: np.dtype) -> Iterator[Frame]:
    """Yield the whole frames at the beginning of a journal without its head; nothing after a torn one is read."""
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
    """The frames of a run that are known, and the file that new ones go to.

    Args:
        dtype: of the records.
        key: of the run.
        folder: where journals are; those that are there are read. None: frames are only kept here.
        writer: who writes, part of the file's name: processes that share a folder have different ones.

    Raises:
        DoesNotFit: a journal in the folder has another key.
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
        """Take the frames of a journal."""
        head = content[:HEAD]
        if not self._head.startswith(head):
            raise DoesNotFit(f"{source}: records of other weights, images or settings; start a new run")
        for frame in frames(content[HEAD:], self._dtype):
            self.frames.setdefault(frame.number, frame)

    def append(self, frame: Frame) -> None:
        """Keep a frame; when this returns, the death of the process cannot take it away any more."""
        self.frames[frame.number] = frame
        if self._folder is None:
            return
        if self._file is None:
            self._file = self._create(self._folder)
            self._write(self._head)
        self._write(encode(frame))

    def encoded(self) -> bytes:
        """Return all frames as a journal."""
        return self._head + b"".join(encode(self.frames[number]) for number in sorted(self.frames))

    def close(self) -> None:
        """Flush what was written to the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _write(self, content: bytes) -> None:
        left = memoryview(content)
        try:
            while left:  # a disk that gets full takes a part without an error
                left = left[self._file.write(left) :]
        except OSError as error:
            error.filename = self._file.name
            raise

    def _create(self, folder: Path) -> Any:
        """Begin a new file: a frame that was torn off in an old one would hide whatever follows it."""
        number = 0
        while True:
            try:
                return (folder / f"{self._writer}-{number}.journal").open("xb", buffering=0)
            except FileExistsError:
                number += 1
