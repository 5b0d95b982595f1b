"""Batches of decoded images, in order, from worker processes that run ahead by a bounded number.

Processes rather than threads: decoding then never waits for the interpreter that feeds the model.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol

import numpy as np
from PIL import Image

from fcvit.errors import BadImages, FcvitError
from fcvit.images.dataset import LabelledImages, Location
from fcvit.images.preprocess import decode

DIGEST = 8  # bytes kept of the SHA-256 of an image file
_CHUNK = 16  # images a task: enough that handing it over costs nothing beside decoding

Job = tuple[int, str, Location]


class View(Protocol):
    """What is made of a decoded image; workers get a copy of it.

    Called with the image and its position in the data set, it gives uint8 (3, size, size). It must depend
    on nothing else, so that the number of workers does not matter.
    """

    @property
    def size(self) -> int: ...

    def __call__(self, image: Image.Image, index: int, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images that belong together: those with the positions `number * batch_size` and on.

    Attributes:
        number: of the batch.
        indices: positions in the data set of those that could be read, (B,).
        digests: the first 8 bytes of the SHA-256 of each file.
        pixels: for each view, uint8 (B, 3, S, S).
        bad: positions of the others, with the reason.
    """

    number: int
    indices: np.ndarray
    digests: tuple[bytes, ...]
    pixels: tuple[np.ndarray, ...]
    bad: tuple[tuple[int, str], ...]


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """What a worker hands back: for every image its digest, or the reason why it has none."""

    digests: list[bytes | None]
    reasons: list[str | None]
    pixels: list[np.ndarray]


def decode_file(index: int, name: str, location: Location, views: Sequence[View]) -> tuple[bytes, list]:
    """Read an image once and make each view of it: its digest, and uint8 (3, S, S) arrays.

    Raises:
        BadImages: it cannot be read.
    """
    try:
        content = location.read()
    except OSError as error:
        raise BadImages(f"{name}: {error.strerror or error}") from error
    image = decode(io.BytesIO(content), name)
    try:
        made = [view(image, index) for view in views]
    except BadImages as error:
        raise BadImages(f"{name}: {error}") from error
    return hashlib.sha256(content).digest()[:DIGEST], made


def _decode_chunk(jobs: Sequence[Job], views: Sequence[View]) -> _Chunk:
    digests: list[bytes | None] = []
    reasons: list[str | None] = []
    pixels: list[list[np.ndarray]] = [[] for _ in views]
    for job in jobs:
        try:
            digest, made = decode_file(*job, views)
        except BadImages as error:
            digests.append(None)
            reasons.append(str(error))
            continue
        digests.append(digest)
        reasons.append(None)
        for stack, image in zip(pixels, made, strict=True):
            stack.append(image)
    return _Chunk(
        digests,
        reasons,
        [
            np.stack(stack) if stack else np.empty((0, 3, view.size, view.size), np.uint8)
            for stack, view in zip(pixels, views, strict=True)
        ],
    )


def batches(
    images: LabelledImages,
    numbers: Sequence[int],
    batch_size: int,
    views: Sequence[View],
    workers: "int | Workers",
) -> Generator[Batch]:
    """The batches of these numbers, in this order.

    Args:
        images: the data set; batch n holds the images from n * batch_size.
        workers: processes that decode; 0: this one does, between the batches.
            `Workers` that are there already are used and left.

    Raises:
        FcvitError: no worker can be started.
    """
    pieces = [
        (number, start, min(start + _CHUNK, (number + 1) * batch_size, len(images)))
        for number in numbers
        for start in range(number * batch_size, min((number + 1) * batch_size, len(images)), _CHUNK)
    ]
    if workers == 0:
        chunks = (_decode_chunk(_jobs(images, *piece[1:]), views) for piece in pieces)
        yield from _assemble(pieces, chunks)
        return
    with contextlib.ExitStack() as stack:
        pool = workers if isinstance(workers, Workers) else stack.enter_context(contextlib.closing(Workers(workers)))
        # The batch that is being put together, and enough behind it that no worker waits.
        ahead = -(-batch_size // _CHUNK) + 2 * pool.count
        yield from _assemble(pieces, _run_ahead(pool, images, pieces, views, ahead))


def _jobs(images: LabelledImages, start: int, end: int) -> list[Job]:
    return list(zip(range(start, end), images.names[start:end], images.locations[start:end], strict=True))


def _run_ahead(
    pool: "Workers",
    images: LabelledImages,
    pieces: Sequence[tuple[int, int, int]],
    views: Sequence[View],
    ahead: int,
) -> Iterator[_Chunk]:
    pending: collections.deque[tuple[list[Job], concurrent.futures.Future[_Chunk]]] = collections.deque()
    waiting = iter(pieces)
    while True:
        while len(pending) < ahead and (piece := next(waiting, None)):
            jobs = _jobs(images, *piece[1:])
            pending.append((jobs, pool.submit(jobs, views)))
        if not pending:
            return
        jobs, future = pending.popleft()
        try:
            yield future.result()
        except BrokenProcessPool:
            pool.restart()
            yield _one_by_one(pool, jobs, views)
            pending = collections.deque((jobs, pool.submit(jobs, views)) for jobs, _ in pending)


def _one_by_one(pool: "Workers", jobs: Sequence[Job], views: Sequence[View]) -> _Chunk:
    """Find the image that ends whatever process decodes it: a bad one, like any other."""
    parts = []
    for job in jobs:
        for _ in range(2):  # a process may die for another reason; the same image twice is no chance
            try:
                parts.append(pool.submit([job], views).result())
                break
            except BrokenProcessPool:
                pool.restart()
        else:
            nothing = [np.empty((0, 3, view.size, view.size), np.uint8) for view in views]
            parts.append(_Chunk([None], [f"{job[1]}: the process that decodes it ends unexpectedly"], nothing))
    return _Chunk(
        [digest for part in parts for digest in part.digests],
        [reason for part in parts for reason in part.reasons],
        [np.concatenate(stacks) for stacks in zip(*(part.pixels for part in parts), strict=True)],
    )


def _assemble(pieces: Sequence[tuple[int, int, int]], chunks: Iterator[_Chunk]) -> Iterator[Batch]:
    """Put the chunks of each batch together."""
    indices: list[int] = []
    digests: list[bytes] = []
    parts: list[list[np.ndarray]] = []
    bad: list[tuple[int, str]] = []
    for place, (number, start, _) in enumerate(pieces):
        chunk = next(chunks)
        for index, (digest, reason) in enumerate(zip(chunk.digests, chunk.reasons, strict=True), start):
            if digest is None:
                bad.append((index, str(reason)))
            else:
                indices.append(index)
                digests.append(digest)
        parts.append(chunk.pixels)
        if place + 1 == len(pieces) or pieces[place + 1][0] != number:
            pixels = tuple(stack[0] if len(stack) == 1 else np.concatenate(stack) for stack in zip(*parts, strict=True))
            yield Batch(number, np.array(indices, np.int64), tuple(digests), pixels, tuple(bad))
            indices, digests, parts, bad = [], [], [], []


class Workers:
    """Worker processes; others in their place where one dies.

    Raises:
        FcvitError: on `restart`, where not even a process without work lives.
    """

    def __init__(self, count: int):
        self.count = count
        self._start()

    def _start(self) -> None:
        # Spawned: a fork of a process in which Paddle's threads run may hang.
        context = multiprocessing.get_context("spawn")
        self.pool = concurrent.futures.ProcessPoolExecutor(self.count, mp_context=context, initializer=_begin_worker)

    def submit(self, jobs: Sequence[Job], views: Sequence[View]) -> "concurrent.futures.Future[_Chunk]":
        try:
            return self.pool.submit(_decode_chunk, jobs, views)
        except BrokenProcessPool as error:  # noticed before the result was asked for
            failed: concurrent.futures.Future[_Chunk] = concurrent.futures.Future()
            failed.set_exception(error)
            return failed

    def restart(self) -> None:
        self.close()
        self._start()
        try:
            self.pool.submit(int).result()
        except BrokenProcessPool as error:
            raise FcvitError(
                "processes that decode images end as soon as they begin: a script that calls fcvit needs "
                '`if __name__ == "__main__":`; --workers 0 decodes without processes'
            ) from error

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """A worker leaves interruptions to the process it works for, and ends when that one is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, about odd images
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
