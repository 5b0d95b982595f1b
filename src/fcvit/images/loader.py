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

import numpy as np

from fcvit.errors import BadImages, FcvitError
from fcvit.images.dataset import LabelledImages, Location
from fcvit.images.preprocess import crop, decode
from fcvit.variants import Preprocessing

DIGEST = 8  # bytes kept of the SHA-256 of an image file
_CHUNK = 16  # images a task: enough that handing it over costs nothing beside decoding

Job = tuple[str, Location]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images that belong together: those with the positions `number * batch_size` and on.

    Attributes:
        number: of the batch.
        indices: positions in the data set of those that could be read, (B,).
        digests: the first 8 bytes of the SHA-256 of each file.
        pixels: for each preprocessing, uint8 (B, 3, S, S).
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


def decode_file(name: str, location: Location, preprocessings: Sequence[Preprocessing]) -> tuple[bytes, list]:
    """Read an image once and crop it for each preprocessing: its digest, and uint8 (3, S, S) arrays.

    Raises:
        BadImages: it cannot be read.
    """
    try:
        content = location.read()
    except OSError as error:
        raise BadImages(f"{name}: {error.strerror or error}") from error
    image = decode(io.BytesIO(content), name)
    try:
        crops = [crop(image, preprocessing) for preprocessing in preprocessings]
    except BadImages as error:
        raise BadImages(f"{name}: {error}") from error
    return hashlib.sha256(content).digest()[:DIGEST], crops


def _decode_chunk(jobs: Sequence[Job], preprocessings: Sequence[Preprocessing]) -> _Chunk:
    digests: list[bytes | None] = []
    reasons: list[str | None] = []
    pixels: list[list[np.ndarray]] = [[] for _ in preprocessings]
    for name, location in jobs:
        try:
            digest, crops = decode_file(name, location, preprocessings)
        except BadImages as error:
            digests.append(None)
            reasons.append(str(error))
            continue
        digests.append(digest)
        reasons.append(None)
        for stack, image in zip(pixels, crops, strict=True):
            stack.append(image)
    return _Chunk(
        digests,
        reasons,
        [
            np.stack(stack) if stack else np.empty((0, 3, p.input_size, p.input_size), np.uint8)
            for stack, p in zip(pixels, preprocessings, strict=True)
        ],
    )


def batches(
    images: LabelledImages,
    numbers: Sequence[int],
    batch_size: int,
    preprocessings: Sequence[Preprocessing],
    workers: int,
) -> Generator[Batch]:
    """The batches of these numbers, in this order.

    Args:
        images: the data set; batch n holds the images from n * batch_size.
        workers: processes that decode; 0: this one does, between the batches.

    Raises:
        FcvitError: no worker can be started.
    """
    pieces = [
        (number, start, min(start + _CHUNK, (number + 1) * batch_size, len(images)))
        for number in numbers
        for start in range(number * batch_size, min((number + 1) * batch_size, len(images)), _CHUNK)
    ]
    if not workers:
        chunks = (_decode_chunk(_jobs(images, *piece[1:]), preprocessings) for piece in pieces)
        yield from _assemble(pieces, chunks)
        return
    with contextlib.closing(_Workers(workers)) as pool:
        # The batch that is being put together, and enough behind it that no worker waits.
        ahead = -(-batch_size // _CHUNK) + 2 * workers
        yield from _assemble(pieces, _run_ahead(pool, images, pieces, preprocessings, ahead))


def _jobs(images: LabelledImages, start: int, end: int) -> list[Job]:
    return list(zip(images.names[start:end], images.locations[start:end], strict=True))


def _run_ahead(
    pool: "_Workers",
    images: LabelledImages,
    pieces: Sequence[tuple[int, int, int]],
    preprocessings: Sequence[Preprocessing],
    ahead: int,
) -> Iterator[_Chunk]:
    pending: collections.deque[tuple[list[Job], concurrent.futures.Future[_Chunk]]] = collections.deque()
    waiting = iter(pieces)
    while True:
        while len(pending) < ahead and (piece := next(waiting, None)):
            jobs = _jobs(images, *piece[1:])
            pending.append((jobs, pool.submit(jobs, preprocessings)))
        if not pending:
            return
        jobs, future = pending.popleft()
        try:
            yield future.result()
        except BrokenProcessPool:
            pool.restart()
            yield _one_by_one(pool, jobs, preprocessings)
            pending = collections.deque((jobs, pool.submit(jobs, preprocessings)) for jobs, _ in pending)


def _one_by_one(pool: "_Workers", jobs: Sequence[Job], preprocessings: Sequence[Preprocessing]) -> _Chunk:
    """Find the image that ends whatever process decodes it: a bad one, like any other."""
    parts = []
    for job in jobs:
        for _ in range(2):  # a process may die for another reason; the same image twice is no chance
            try:
                parts.append(pool.submit([job], preprocessings).result())
                break
            except BrokenProcessPool:
                pool.restart()
        else:
            nothing = [np.empty((0, 3, p.input_size, p.input_size), np.uint8) for p in preprocessings]
            parts.append(_Chunk([None], [f"{job[0]}: the process that decodes it ends unexpectedly"], nothing))
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


class _Workers:
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

    def submit(
        self, jobs: Sequence[Job], preprocessings: Sequence[Preprocessing]
    ) -> "concurrent.futures.Future[_Chunk]":
        try:
            return self.pool.submit(_decode_chunk, jobs, preprocessings)
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
