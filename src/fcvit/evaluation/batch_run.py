"""Compute the batches of an evaluation or prediction: several processes, workers, the journal, and how it continues.

A run computes a frame for each batch of a data set and appends it to a journal. Batches are assigned to processes by
their number, and the same batch gives the same frame in any process. A resumed run, or a run of several processes,
therefore has the same frames as an uninterrupted run in one process.
"""

import collections
import contextlib
import hashlib
import json
import logging
import os
import shlex
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fcvit import interrupts
from fcvit.data.loader import DIGEST, Batch, Samples, Transform, Workers, batches, read_file
from fcvit.data.sources import Location
from fcvit.errors import BadImages, DoesNotFit, UnreadableFile, UsageError
from fcvit.evaluation.journal import Frame, Journal, encode, naming
from fcvit.evaluation.request import sha256
from fcvit.inference.batch_size import fitting_batch_size
from fcvit.inference.engines import Engine
from fcvit.processes import Processes
from fcvit.report.progress import progress

JOURNALS = "journals"
_SAMPLE = 64  # number of images whose content is checked when a run is resumed with moved data
_READ_TOGETHER = 16  # images of a batch whose sizes differ
_SENT = 1 << 24  # bytes of frames that a process sends at a time
logger = logging.getLogger("fcvit")


class BatchRun:
    """The computation of all batches of a data set.

    Args:
        dataset: Samples of the run.
        batch_size: Number of samples per batch. Batch n starts at position n * batch_size.
        dtype: Data type of the records in the frames. It has the fields `index` and `digest`.
        identity: Everything that determines the frames, as JSON.
        processes: Processes that share the work.
        folder: Folder of the run, or None to keep the frames in memory.

    Attributes:
        batches: Numbers of all batches.
        journal: The journal, while it is open.
        resume_command: The command that continues the run.
    """

    journal: Journal

    def __init__(
        self,
        dataset: Samples,
        batch_size: int,
        dtype: np.dtype,
        identity: Mapping[str, object],
        processes: Processes,
        folder: Path | None,
    ):
        self.dataset, self.batch_size, self.dtype = dataset, batch_size, dtype
        self.processes, self.folder = processes, folder
        self.batches = range(-(-len(dataset) // batch_size))
        self.resume_command = f"fcvit resume {shlex.quote(str(folder))}"
        if folder is not None:
            processes.resume_with(self.resume_command)
        self._key = sha256(identity)
        self._readable: tuple[str, Location] | None = None  # an image that was read

    @contextlib.contextmanager
    def opened(self) -> Iterator[Journal]:
        """Open the journal for a block, and add the resume command to its errors and interruptions.

        Raises:
            UnreadableFile: A file cannot be read or written in the block.
        """
        try:
            folder = self.folder and self.folder / JOURNALS
            self.journal = Journal(self.dtype, self._key, folder, self.processes.rank)
            with interrupts.kept(), contextlib.closing(self.journal):
                yield self.journal
                interrupts.check()
        except KeyboardInterrupt:
            if self.folder is not None and self.processes.first:
                logger.info(f"resume with: {self.resume_command}")
            raise
        except OSError as error:
            if self.folder is None or isinstance(error, BrokenPipeError):  # the process that reads our output has ended
                raise
            raise UnreadableFile(f"{describe(error, self.folder)}; resume with: {self.resume_command}") from error
        self.processes.gather(b"")  # wait for all processes: the first one hosts the key-value store

    def compute(
        self,
        title: str,
        prepare: Callable[[], Callable[[Batch], Frame]],
        transforms: Sequence[Transform],
        workers: "int | Workers",
        strict: bool = False,
    ) -> Generator[Frame]:
        """Compute the batches of this process that are not in the journal. Append and yield each frame.

        Args:
            title: Description of the work.
            prepare: Function that returns the computation of a batch. It is called if a batch is missing.
            transforms: Transforms of an image (see `fcvit.data.loader.batches`).
            workers: Number of processes that decode, or existing `Workers`.
            strict: Whether to stop at the first image that cannot be read.

        Raises:
            BadImages: An image cannot be read and `strict` is set.
            OSError: Images that were read before cannot be read any more.
        """
        processes, journal = self.processes, self.journal
        # Batches are assigned by their number: an assignment of the missing ones would differ between processes.
        mine = self.batches[processes.rank :: processes.count]
        missing = [number for number in mine if number not in journal]
        if not missing:
            return
        if done := sum(self._images(number) for number in journal):
            logger.info(f"{done} of {len(self.dataset)} images were already done")
        compute = prepare()
        title = title if processes.count == 1 else f"{title} (process 1 of {processes.count})"
        with contextlib.ExitStack() as stack:
            total = sum(map(self._images, missing))
            advance = stack.enter_context(progress(title, total)) if processes.first else lambda _: None
            loaded = batches(self.dataset, missing, self.batch_size, transforms, workers)
            stack.enter_context(contextlib.closing(loaded))
            for batch in loaded:
                if len(batch.indices):
                    index = int(batch.indices[-1])
                    self._readable = self.dataset.names[index], self.dataset.locations[index]
                if batch.bad:
                    self._require_source()
                    if strict:
                        raise BadImages(f"{batch.bad[0][1]} (--strict stops at the first image that cannot be read)")
                frame = compute(batch)
                journal.append(frame)
                interrupts.check()
                advance(len(batch.indices) + len(batch.bad))
                yield frame

    def in_order(self, computed: Generator[Frame]) -> Iterator[Frame]:
        """Yield all frames in the order of the data set in the first process, and none in the others.

        One process yields each frame when it is computed. Several processes compute all frames first.

        Args:
            computed: Result of `compute`.
        """
        with contextlib.closing(computed):
            if self.processes.count > 1:
                for _ in computed:
                    pass
                self.gather()
            for number in self.batches if self.processes.first else ():
                yield self.journal[number] if number in self.journal else next(computed)
            for _ in computed:  # end the progress bar
                pass

    def _require_source(self) -> None:
        """Check that an image which was read can still be read, so that a lost disk is not recorded as bad images."""
        if self._readable is None:
            return
        name, location = self._readable
        try:
            location.read()
        except OSError as error:
            reason = f"{error.strerror or error} (this image was read before, so its folder or disk is missing)"
            raise OSError(error.errno, reason, name) from error

    def _images(self, number: int) -> int:
        """Return the number of samples in a batch."""
        return min(self.batch_size, len(self.dataset) - number * self.batch_size)

    def gather(self) -> None:
        """Make the frames of all processes known to the first one.

        It reads those in its folder. Processes on machines that do not share the folder send theirs, a part at a time.
        """
        processes, journal = self.processes, self.journal
        if processes.count == 1:
            return
        journal.close()
        if self.folder is not None:
            processes.gather(b"")  # now the files of all processes are complete
            if processes.first:
                journal.read_folder()
        known = np.array([number in journal for number in self.batches], np.uint8)
        received = np.frombuffer(processes.broadcast(known.tobytes()), np.uint8)
        mine = collections.deque(number for number in journal if not (processes.first or received[number]))
        more = True
        while more:
            part = b"".join(_part(journal, mine))
            messages = processes.gather((b"+" if mine else b"-") + part)
            for message in messages:
                journal.merge(message[1:], keep=True)
            more = bool(processes.broadcast(b"+" if any(message[:1] == b"+" for message in messages) else b""))
        if processes.first:
            lost = [number for number in self.batches if number not in journal]
            assert not lost, f"no process computed batches {lost[:5]}"

    def check_files(self, root: Path) -> None:
        """Check that the content of a sample of the images in the journal is unchanged. The journal must be closed.

        Raises:
            DoesNotFit: An image has changed.
        """
        assert self.folder is not None
        journal = Journal(self.dtype, self._key, self.folder / JOURNALS)
        numbers = list(journal)
        numbers = numbers[:: -(-len(numbers) // _SAMPLE) or 1]
        with contextlib.closing(journal):
            for number in numbers:
                records = journal[number].records
                for record in records[:: -(-len(records) * len(numbers) // _SAMPLE) or 1]:
                    name = self.dataset.names[int(record["index"])]
                    content = read_file(name, self.dataset.locations[int(record["index"])])
                    if hashlib.sha256(content).digest()[:DIGEST] != record["digest"].tobytes():
                        raise DoesNotFit(
                            f"{root}: {name} is not the image that was read in {self.folder}; restore it or start a "
                            "new run"
                        )


def _part(journal: Journal, numbers: collections.deque[int]) -> Iterator[bytes]:
    """Take the next numbers and yield their frames, up to a size."""
    size = 0
    while size < _SENT and numbers:
        content = encode(journal[numbers.popleft()])
        size += len(content)
        yield content


def new_records(batch: Batch, dtype: np.dtype) -> np.ndarray:
    """Return the records of a batch with the position and the digest of each sample that could be read."""
    records = np.zeros(len(batch.indices), dtype)
    records["index"] = batch.indices
    if len(records):
        records["digest"] = np.frombuffer(b"".join(batch.digests), np.uint8).reshape(-1, DIGEST)
    return records


def chosen_batch_size(
    size: Any, at_once: int | None, jobs: Callable[[], Sequence[tuple[Engine, int]]], processes: Processes
) -> int:
    """Replace the batch size "auto" by one that fits in memory.

    Args:
        size: Number of samples per batch, or "auto".
        at_once: Number of samples that are computed together, or None for a whole batch.
        jobs: Function that returns the engines and their input sizes.
        processes: Processes that share the work.
    """
    if size != "auto":
        return int(size)
    if at_once == 1:
        fitting = (_READ_TOGETHER, f"{_READ_TOGETHER} images are read together, and computed one by one")
    else:
        fitting = fitting_batch_size(jobs()) if processes.first else (0, "")
    size, reason = json.loads(processes.broadcast(json.dumps(fitting).encode()))
    logger.info(f"batch size: {reason}")
    return int(size)


def check_workers(workers: object) -> None:
    if isinstance(workers, int) and workers < 0:
        raise UsageError(f"--workers {workers}: expected a whole number of at least 0")


def check_identity(now: Mapping[str, object], before: Mapping[str, object], folder: Path) -> None:
    """Check that a resumed run computes the same frames.

    Raises:
        DoesNotFit: Weights, images, settings or packages have changed.
    """
    for key in now:
        if before.get(key) != now[key]:
            raise DoesNotFit(
                f"{folder}: {_describe_change(key, before.get(key), now[key])} since the run started, so the "
                "results would differ from those of an uninterrupted run; start a new run"
            )


def agreed_identity(identity: Mapping[str, Any], processes: Processes) -> Mapping[str, Any]:
    """Return the identity of a run, after checking that it is equal in all processes.

    Raises:
        DoesNotFit: The identity in this process differs from the one in process 0.
    """
    first = json.loads(processes.broadcast(json.dumps(identity).encode()))
    for key in identity:
        if first.get(key) != identity[key]:
            change = _describe_change(key, first.get(key), identity[key])
            raise DoesNotFit(f"process {processes.rank} differs from process 0; {change}")
    return identity


def _describe_change(key: str, before: object, now: object) -> str:
    """Describe a change of the identity, with the names and versions of changed packages."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        listed = ", ".join(f"{name} {before.get(name, 'absent')} to {now.get(name, 'absent')}" for name in names)
        return f"{key} changed ({listed})"
    return f"{key.replace('_', ' ')} changed"


def shared_folder(folder: Path | None, processes: Processes, writer: str = "") -> Path:
    """Return the run folder in every process, and create it on machines that do not share it.

    Args:
        folder: The folder in the first process.
        processes: The processes of the run.
        writer: Option with which all processes write into the same file, or "".

    Raises:
        UsageError: There is such an option, but the machines do not share the folder.
    """
    path = Path(os.fsdecode(processes.broadcast(os.fsencode(folder.absolute()) if folder else b"")))
    with naming(path):
        path.mkdir(parents=True, exist_ok=True)
    if not processes.share(path):
        if writer:
            raise UsageError(f"{writer}: the machines do not share {path}; use a shared folder, or omit it")
        logger.info(f"{path}: each machine keeps the records of its own images, so resume the run on the same machines")
    return folder if folder is not None else path


def describe(error: OSError, folder: Path) -> str:
    """Return the file and the reason of an error."""
    return f"{error.filename or folder}: {error.strerror or error}"
