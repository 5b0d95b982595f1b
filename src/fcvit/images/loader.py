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
        FcvitError: a worker ended unexpectedly.
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
    with _pool(workers) as pool:
        # The batch that is being put together, and enough behind it that no worker waits.
        ahead = -(-batch_size // _CHUNK) + 2 * workers
        yield from _assemble(pieces, _run_ahead(pool, images, pieces, preprocessings, ahead))


def _jobs(images: LabelledImages, start: int, end: int) -> list[Job]:
    return list(zip(images.names[start:end], images.locations[start:end], strict=True))


def _run_ahead(
    pool: concurrent.futures.ProcessPoolExecutor,
    images: LabelledImages,
    pieces: Sequence[tuple[int, int, int]],
    preprocessings: Sequence[Preprocessing],
    ahead: int,
) -> Iterator[_Chunk]:
    pending: collections.deque = collections.deque()
    waiting = iter(pieces)
    try:
        while True:
            while len(pending) < ahead and (piece := next(waiting, None)):
                pending.append(pool.submit(_decode_chunk, _jobs(images, *piece[1:]), preprocessings))
            if not pending:
                return
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise FcvitError(
            "a process that decodes images ended unexpectedly: short of memory, or a script that calls fcvit "
            'without `if __name__ == "__main__":`; --workers 0 decodes without processes'
        ) from error


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


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    # Spawned: a fork of a process in which Paddle's threads run may hang.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


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
