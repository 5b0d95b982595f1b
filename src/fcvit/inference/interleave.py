"""Measure contenders alternately, each in its own process. Only one process computes at a time.

The processes share no memory allocator and no thread pool. The contenders are called in rounds, so background load
affects all of them, and ratios compare measurements that are adjacent in time.
"""

import dataclasses
import logging
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, TypeAlias, TypeVar

from fcvit.errors import FcvitError

logger = logging.getLogger("fcvit")

Job = TypeVar("Job", bound=Hashable)
Load: TypeAlias = "Callable[[Any], tuple[Callable[[], Any], Any]]"


@dataclasses.dataclass
class Timing:
    """The measurements of one contender.

    Attributes:
        about: Second return value of `load`.
        rounds: Return values of the counted calls in each round, in order.
    """

    about: Any
    rounds: list[list[Any]] = dataclasses.field(default_factory=list)


def interleave(
    load: Load,
    jobs: Sequence[Job],
    rounds: int,
    *,
    calls: int = 3,
    seconds: float = 0.4,
    pause: float = 0.2,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[Job, Timing | FcvitError]:
    """Measure every contender once per round. A contender that fails is skipped from then on.

    A turn of a contender begins with calls that are not counted, at least one and for at least `seconds`, because its
    caches are cold, and a virtual machine may be slow just after a pause. Then come the counted calls.

    Args:
        load: Picklable function that takes a job. It returns the function to call, which returns a measurement, and
            an object to return in `Timing.about`.
        jobs: One job per contender.
        rounds: Number of rounds, at least 1.
        calls, seconds: Minimum number of counted calls per turn, and their minimum total time.
        pause: Seconds to wait after a turn, so that threads that spin for more work go to sleep.
        advance: Progress callback that gets the number of finished turns. Loading counts as a turn.

    Returns:
        The measurements of each job, or the error that ended it.
    """
    timings: dict[Job, Timing] = {}
    errors: dict[Job, FcvitError] = {}
    workers: dict[Job, Worker] = {}

    def answer(job: Job, turns_left: int, ask: bool = False) -> Any:
        """Return the next answer of a process. Stop the process if the answer is an error."""
        result = _receive(workers[job], ask)
        advance(1)
        if isinstance(result, FcvitError):
            errors[job] = result
            _stop(workers.pop(job))
            advance(turns_left)
        return result

    try:
        for job in jobs:
            workers[job] = _start(load, job, calls, seconds)
            if not isinstance(result := answer(job, rounds), FcvitError):
                for note in result[0]:
                    logger.info(note)
                timings[job] = Timing(result[1])
        for turn in range(1, rounds + 1):
            for job in list(workers):
                if not isinstance(result := answer(job, rounds - turn, ask=True), FcvitError):
                    timings[job].rounds.append(result)
                time.sleep(pause)
        return {**timings, **errors}
    finally:
        for worker in workers.values():
            _stop(worker)


def timed(function: Callable[[], Any]) -> Callable[[], float]:
    """Return a function that calls `function` and returns its time in seconds."""

    def call() -> float:
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    return call


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios of measurements that are adjacent in time."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


Worker: TypeAlias = tuple[Any, Connection]


def _start(load: Load, job: Any, calls: int, seconds: float) -> Worker:
    """Start a worker process with SIGINT blocked. Ctrl-C interrupts only this process, which stops the workers."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(load, job, calls, seconds, theirs), daemon=True)
    before = None
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        resource_tracker.ensure_running()  # otherwise it starts with the process and unblocks SIGINT
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return process, ours


def _receive(worker: Worker, ask: bool = False) -> Any:
    """Return the next answer of a process, or an error if the process has ended. `ask` requests a turn first."""
    process, pipe = worker
    try:
        if ask:
            pipe.send(True)
        return pipe.recv()
    except (EOFError, OSError):
        process.join()
    if process.exitcode >= 0:
        return FcvitError(f"the process ended with exit code {process.exitcode}")
    name = signal.Signals(-process.exitcode).name
    return FcvitError(f"the process was ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}")


def _stop(worker: Worker) -> None:
    process, pipe = worker
    pipe.close()
    process.terminate()
    process.join(5)
    process.kill()  # a library may ignore the request to terminate
    process.join()


def _work(load: Load, job: Any, calls: int, seconds: float, pipe: Connection) -> None:
    """Run a worker process: load the job, then take one turn for each message."""
    try:
        notes: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: notes.append(record.getMessage())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        function, about = load(job)
        pipe.send((notes, about))
        while pipe.recv():
            began = time.perf_counter()
            function()
            while time.perf_counter() - began < seconds:
                function()
            began = time.perf_counter()
            samples: list[Any] = []
            while len(samples) < calls or time.perf_counter() - began < seconds:
                samples.append(function())
            pipe.send(samples)
    except (EOFError, BrokenPipeError):  # the parent process has ended
        return
    except FcvitError as error:
        pipe.send(error)
    except Exception as error:  # from any library, while the other contenders continue
        lines = str(error).strip().splitlines()
        pipe.send(FcvitError(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__))
