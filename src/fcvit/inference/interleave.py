"""Measure contenders in turn, each in a process of its own that waits while another one computes.

They share no allocator, no pool of threads and no thread that still spins. They are called in turn, round after round:
a noisy minute hits all alike, and ratios are those of neighbors in time.
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
        about: what `load` returned beside the function.
        rounds: for each round what the calls returned, in their order.
    """

    about: Any
    rounds: list[list[Any]] = dataclasses.field(default_factory=list)


def interleave(
    load: Load,
    jobs: Sequence[Job],
    rounds: int,
    *,
    calls: int = 3,
    seconds: float = 0.3,
    pause: float = 0.2,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[Job, Timing | FcvitError]:
    """Give every contender a turn in each round; one that fails is left out from then on.

    A turn is a call that is not counted, since it finds caches cold, and then the calls that are.

    Args:
        load: a job -> the function to call, which returns what it measured, and anything to send back; can be pickled.
        jobs: what distinguishes the contenders.
        rounds: from 1.
        calls, seconds: counted calls of a turn, and their time together, at least.
        pause: seconds after a turn, until threads that spin for more work have gone to sleep.
        advance: called with the number of turns that are done; loading counts as one.

    Returns:
        For each job its measurements, or the error that ended it.
    """
    timings: dict[Job, Timing] = {}
    errors: dict[Job, FcvitError] = {}
    workers: dict[Job, Worker] = {}

    def answer(job: Job, turns_left: int, ask: bool = False) -> Any:
        """Return the next answer of a process; stop it where that is an error."""
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
    """Return a function that calls `function` and returns the seconds it took."""

    def call() -> float:
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    return call


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios of neighbors in time."""
    return statistics.median(one / other for one, other in zip(numerators, denominators, strict=True))


Worker: TypeAlias = tuple[Any, Connection]


def _start(load: Load, job: Any, calls: int, seconds: float) -> Worker:
    """Start a process that leaves Ctrl-C to this one, which gets it afterwards and ends the others."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(load, job, calls, seconds, theirs), daemon=True)
    before = None
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        resource_tracker.ensure_running()  # or it would start with the process, and undo this
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return process, ours


def _receive(worker: Worker, ask: bool = False) -> Any:
    """Return the next answer of a process, or an error if it has ended; `ask` for a turn first."""
    process, pipe = worker
    try:
        if ask:
            pipe.send(True)
        return pipe.recv()
    except (EOFError, OSError):
        process.join()
    if process.exitcode >= 0:
        return FcvitError(f"its process ended with exit code {process.exitcode}")
    name = signal.Signals(-process.exitcode).name
    return FcvitError(f"its process ended by {name}{'; out of memory?' if name == 'SIGKILL' else ''}")


def _stop(worker: Worker) -> None:
    process, pipe = worker
    pipe.close()
    process.terminate()
    process.join(5)
    process.kill()  # a library may not end when it is told to
    process.join()


def _work(load: Load, job: Any, calls: int, seconds: float, pipe: Connection) -> None:
    """Load, answer, then take a turn for each message: the main function of a process."""
    try:
        notes: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: notes.append(record.getMessage())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        function, about = load(job)
        pipe.send((notes, about))
        while pipe.recv():
            function()
            began = time.perf_counter()
            samples: list[Any] = []
            while len(samples) < calls or time.perf_counter() - began < seconds:
                samples.append(function())
            pipe.send(samples)
    except (EOFError, BrokenPipeError):  # the other end has gone
        return
    except FcvitError as error:
        pipe.send(error)
    except Exception as error:  # of whatever library: the others go on
        lines = str(error).strip().splitlines()
        pipe.send(FcvitError(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__))
