"""Load batches of images, or apply a function to images, in worker processes with bounded prefetching.

Processes are used instead of threads so that decoding does not compete with the main process for the interpreter lock.
They write their arrays into memory that they share with the main process.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from PIL import Image

from fcvit.data.shared_memory import SUPPORTED, Packed, Region, SharedMemory, WorkerMemory
from fcvit.data.sources import Location
from fcvit.data.transforms.preprocess import decode
from fcvit.errors import BadImages, FcvitError
from fcvit.interrupts import SIGNALS

DIGEST = 8  # length of the digest: the first bytes of the SHA-256 of an image file
_CHUNK = 16  # images per task, so that the transfer takes little time compared with decoding

Job = tuple[Any, ...]  # arguments of the work: position, name and location of an image, and others
Result = TypeVar("Result")
Work = Callable[..., Result]


class Samples(Protocol):
    """Samples that have a name, a location and a target, and are not read yet."""

    @property
    def names(self) -> Sequence[str]:
        """The name of each sample."""
        ...

    @property
    def locations(self) -> Sequence[Location]:
        """The location of each image."""
        ...

    @property
    def targets(self) -> Sequence[Any]:
        """The target of each sample, or the path from which a transform reads it."""
        ...

    def __len__(self) -> int: ...


class Dataset(Samples, Protocol):
    """The samples of a data set."""

    @property
    def root(self) -> Path:
        """The folder or tar archive, for messages."""
        ...

    def take(self, order: Sequence[int]) -> "Dataset":
        """Return the samples at these positions, in this order."""
        ...

    def listing(self) -> str:
        """Return a hash of names and targets, which a resumed run compares."""
        ...


class Transform(Protocol):
    """A callable that turns a decoded image and its target into an input of the network and its target.

    It is called with the image, its target and its position in the data set. It returns the pixels, uint8 (3, H, W),
    and the target. The result must depend only on the arguments, so that it is the same for any number of workers.
    Each worker has its own copy of the transform.

    A transform with a method `decode` decodes its images itself, like `fcvit.data.transforms.preprocess.decode`. All
    transforms of a batch must use the same decoder.
    """

    def __call__(self, image: Image.Image, target: Any, index: int, /) -> tuple[np.ndarray, Any]: ...


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch: the samples at the positions from `number * batch_size`.

    Attributes:
        number: Number of the batch.
        indices: Positions in the data set of the B samples that could be read, (B,).
        digests: First 8 bytes of the SHA-256 of each file.
        pixels: For each transform, uint8 (B, 3, H, W), or a list of arrays if the sizes differ.
        targets: For each transform, the target of each sample.
        bad: Positions of the samples that could not be read, with the reason.
    """

    number: int
    indices: np.ndarray
    digests: tuple[bytes, ...]
    pixels: tuple[Any, ...]
    targets: tuple[list[Any], ...]
    bad: tuple[tuple[int, str], ...]


def read_file(name: str, location: Location) -> bytes:
    """Read the bytes of an image file.

    Raises:
        BadImages: The file cannot be read.
    """
    try:
        return location.read()
    except OSError as error:
        raise BadImages(f"{name}: {error.strerror or error}") from error


def decode_file(
    index: int, name: str, location: Location, target: Any, transforms: Sequence[Transform]
) -> tuple[bytes, list[tuple[np.ndarray, Any]]]:
    """Read an image and apply each transform to it. Return its digest, and pixels and target for each transform.

    Raises:
        BadImages: The image cannot be read.
    """
    content = read_file(name, location)
    image = getattr(transforms[0], "decode", decode)(io.BytesIO(content), name)
    try:
        samples = [transform(image, target, index) for transform in transforms]
    except BadImages as error:
        raise BadImages(f"{name}: {error}") from error
    return hashlib.sha256(content).digest()[:DIGEST], samples


def batches(
    dataset: Samples,
    numbers: Sequence[int],
    batch_size: int,
    transforms: Sequence[Transform],
    workers: "int | Workers",
) -> Generator[Batch]:
    """Yield the batches with these numbers, in this order.

    Args:
        dataset: Data set to read. Batch n starts at position n * batch_size.
        numbers: Numbers of the batches.
        batch_size: Number of samples per batch.
        transforms: Transforms to apply to each image.
        workers: Number of processes that decode, or existing `Workers`, which are not closed. With 0, the calling
            process decodes between the batches.

    Raises:
        FcvitError: No worker can be started.
    """
    pieces = [
        (number, start, min(start + _CHUNK, (number + 1) * batch_size, len(dataset)))
        for number in numbers
        for start in range(number * batch_size, min((number + 1) * batch_size, len(dataset)), _CHUNK)
    ]
    columns = (range(len(dataset)), dataset.names, dataset.locations, dataset.targets)
    chunks = (list(zip(*(column[start:end] for column in columns), strict=True)) for _, start, end in pieces)
    # The chunks of the current batch are requested together. Later chunks keep the workers busy.
    work = functools.partial(decode_file, transforms=transforms)
    with contextlib.closing(_chunk_by_chunk(chunks, work, workers, -(-batch_size // _CHUNK))) as done:
        yield from _assemble(pieces, done, len(transforms))


def each(jobs: Iterable[Job], work: Work[Result], workers: "int | Workers") -> Generator[Result | BadImages]:
    """Yield the result of a function for each image, in order, or the error for an image that cannot be read.

    Args:
        jobs: Position, name and location of each image.
        work: Function that is called with these three values. It must be defined at the top level of a module, because
            worker processes import it.
        workers: Number of processes, or existing `Workers`, as in `batches`.

    Raises:
        FcvitError: No worker can be started.
    """
    remaining = iter(jobs)
    chunks = iter(lambda: tuple(itertools.islice(remaining, _CHUNK)), ())
    with contextlib.closing(_chunk_by_chunk(chunks, work, workers)) as done:
        for results in done:
            yield from results


def _chunk_by_chunk(
    chunks: Iterator[Sequence[Job]], work: Work[Result], workers: "int | Workers", needed: int = 1
) -> Generator[list[Result | BadImages]]:
    """Yield the results of each chunk. `needed` is the number of chunks that the caller uses at a time."""
    if workers == 0:
        yield from (_work(jobs, work) for jobs in chunks)
        return
    with contextlib.ExitStack() as stack:
        pool = workers if isinstance(workers, Workers) else stack.enter_context(contextlib.closing(Workers(workers)))
        yield from _run_ahead(pool, chunks, work, needed + 2 * pool.count)


def _work(jobs: Sequence[Job], work: Work[Result]) -> list[Result | BadImages]:
    results: list[Result | BadImages] = []
    for job in jobs:
        try:
            results.append(work(*job))
        except BadImages as error:
            results.append(error)
    return results


def _run_ahead(
    pool: "Workers", chunks: Iterator[Sequence[Job]], work: Work[Result], ahead: int
) -> Iterator[list[Result | BadImages]]:
    pending: collections.deque[tuple[Sequence[Job], Pending[Result]]] = collections.deque()
    try:
        while True:
            while len(pending) < ahead and (jobs := next(chunks, None)):
                pending.append((jobs, pool.submit(jobs, work)))
            if not pending:
                return
            jobs, submitted = pending.popleft()
            try:
                results = submitted.result()
            except BrokenProcessPool:
                pool.restart()
                results = _one_by_one(pool, jobs, work)
                pending = collections.deque((jobs, pool.submit(jobs, work)) for jobs, _ in pending)
            yield results
            del results, submitted  # so that their memory is free for the next chunk
    finally:
        for _, submitted in pending:
            submitted.cancel()


def _one_by_one(pool: "Workers", jobs: Sequence[Job], work: Work[Result]) -> list[Result | BadImages]:
    """Process the images of a chunk separately, and report an image that crashes its process as unreadable."""
    results: list[Result | BadImages] = []
    for job in jobs:
        for _ in range(2):  # a process can die for another reason, but two crashes are caused by the image
            try:
                results += pool.submit([job], work).result()
                break
            except BrokenProcessPool:
                pool.restart()
        else:
            results.append(BadImages(f"{job[1]}: the process that decodes it ends unexpectedly"))
    return results


def _assemble(
    pieces: Sequence[tuple[int, int, int]],
    chunks: Iterator[list[tuple[bytes, list[tuple[np.ndarray, Any]]] | BadImages]],
    transforms: int,
) -> Iterator[Batch]:
    """Assemble the batches from their chunks."""
    good: list[tuple[int, bytes, list[tuple[np.ndarray, Any]]]] = []
    bad: list[tuple[int, str]] = []
    for piece, (number, start, _) in enumerate(pieces):
        for index, result in enumerate(next(chunks), start):
            if isinstance(result, BadImages):
                bad.append((index, str(result)))
            else:
                good.append((index, *result))
        if piece + 1 == len(pieces) or pieces[piece + 1][0] != number:
            samples = [[outputs[transform] for *_, outputs in good] for transform in range(transforms)]
            yield Batch(
                number,
                np.array([index for index, *_ in good], np.int64),
                tuple(digest for _, digest, _ in good),
                tuple(stack([pixels for pixels, _ in pairs]) for pairs in samples),
                tuple([target for _, target in pairs] for pairs in samples),
                tuple(bad),
            )
            good, bad = [], []


def stack(pixels: Sequence[np.ndarray]) -> Any:
    """Stack images of equal size into one array, or return the list if their sizes differ."""
    if len({image.shape for image in pixels}) > 1:
        return pixels
    return np.stack(pixels) if pixels else np.empty((0, 3, 0, 0), np.uint8)


@dataclasses.dataclass(frozen=True)
class Pending(Generic[Result]):
    """A chunk that a worker process works on.

    Attributes:
        future: The packed results.
        memory: Memory of the process pool, or None if the results are sent through a pipe.
        lent: The bytes into which the results are written. The future has them too, because the executor keeps it
            until the worker no longer writes.
    """

    future: "concurrent.futures.Future[Any]"
    memory: SharedMemory | None = None
    lent: np.ndarray | None = None

    def result(self) -> list[Result | BadImages]:
        """Wait for the results. A dead worker process is reported as `BrokenProcessPool`."""
        results = self.future.result()
        return results if self.memory is None else self.memory.unpack(results, self.lent)

    def cancel(self) -> None:
        self.future.cancel()


class Workers:
    """A pool of worker processes that can be restarted after a process has died."""

    def __init__(self, count: int):
        self.count = count
        self._start()

    def _start(self) -> None:
        # A forked process can hang if threads of Paddle run in the parent process.
        context = multiprocessing.get_context("spawn")
        self.memory = SharedMemory() if SUPPORTED else None
        given: Any = (self.memory,)  # becomes a `WorkerMemory` in the worker
        self.pool = concurrent.futures.ProcessPoolExecutor(self.count, context, _begin_worker, given)

    def submit(self, jobs: Sequence[Job], work: Work[Result]) -> Pending[Result]:
        """Start the work on a chunk. A broken pool is reported by the result."""
        region, lent = self.memory.lend() if self.memory else (None, None)
        try:
            future = self.pool.submit(_work_and_pack, jobs, work, region)
        except BrokenProcessPool as error:
            future = concurrent.futures.Future()
            future.set_exception(error)
        future.lent = lent  # pyrefly: ignore
        return Pending(future, self.memory, lent)

    def restart(self) -> None:
        """Start new processes.

        Raises:
            FcvitError: The new processes end immediately.
        """
        self.close()
        self._start()
        try:
            self.pool.submit(int).result()
        except BrokenProcessPool as error:
            raise FcvitError(
                "the processes that decode images end immediately after the start; put the calls of fcvit in a script "
                'under `if __name__ == "__main__":`, or pass --workers 0 to decode without processes'
            ) from error

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


_memory: WorkerMemory | None = None  # in a worker process


def _work_and_pack(jobs: Sequence[Job], work: Work[Result], region: Region | None) -> list[Result | BadImages] | Packed:
    results = _work(jobs, work)
    return results if _memory is None else _memory.pack(results, region)


def _begin_worker(memory: WorkerMemory | None) -> None:
    """Ignore interruptions, which the parent process handles, and exit when the parent process dies.

    Args:
        memory: The memory shared with the parent process, which passes a `SharedMemory`.
    """
    global _memory
    _memory = memory
    for number in SIGNALS:
        if number != signal.SIGTERM:  # the pool ends its processes with SIGTERM
            signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Paddle's launcher sends SIGTERM to the process group of a training process
    os.environ.setdefault("OPENCV_FOR_THREADS_NUM", "1")  # the processes already use all cores
    warnings.simplefilter("ignore")  # Pillow warns about unusual images
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_after_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_after_parent, daemon=True).start()
