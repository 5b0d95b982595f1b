"""Make sure that no SIGINT, SIGTERM or SIGUSR1 is lost.

Python can run a signal handler between any two instructions of the main thread, also in a function called by C code.
A KeyboardInterrupt raised there may be swallowed or replaced by another error. Paddle turns it into an OSError in the
backward pass of a native operator, class creation turns it into a RuntimeError, and an import in C into an ImportError.
"""

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""The signals that interrupt a command. Schedulers such as Slurm can send SIGUSR1 before they end a job."""
SAME_PRESS = 1.0
"""Seconds in which several signals count as one. Paddle's launcher forwards signals that the terminal already sent."""

_NOTE = b"fcvit: note: stopping after the current step; press Ctrl-C again to stop at once\n"
_STACK = 64  # bytes, more than any system's `stack_t`
_raised: list[BaseException] = []  # exceptions that signal handlers raised in the open `kept` blocks


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Delay these signals until the end of the block, then pass them to the previous handler.

    The third Ctrl-C in one block ends the process, in case the block never finishes. This does nothing outside the
    main thread, because only the main thread runs signal handlers.
    """
    received: list[int] = []

    def remember(number: int, _: object) -> None:
        received.append(number)
        if (presses := received.count(signal.SIGINT)) == 2:
            os.write(2, _NOTE)  # not `print`, which may be the interrupted call
        elif presses > 2:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)

    try:
        with _handled(lambda _: remember):
            yield
    finally:
        if received:
            signal.raise_signal(received[0])


@contextlib.contextmanager
def remembered() -> Iterator[Callable[[], bool]]:
    """Remember the signals in a block instead of raising an exception, and yield a function that tells if one arrived.

    The block finishes its work and ends by itself. If it ends without an error after a signal, a KeyboardInterrupt is
    raised. Ctrl-C after the first signal is passed to the previous handler, which stops the block at once. Repeated
    SIGTERM and SIGUSR1 are ignored, because Paddle's launcher sends SIGTERM several times. Signals that the process
    ignores stay ignored.
    """
    first: list[float] = []

    def remembering(before: Callable[..., Any] | None) -> Callable[..., Any]:
        def handler(number: int, frame: object) -> None:
            if not first:
                first.append(time.monotonic())
            elif number == signal.SIGINT and time.monotonic() - first[0] > SAME_PRESS:
                if before is None:
                    raise KeyboardInterrupt
                before(number, frame)

        return handler

    with _handled(remembering, default=True):
        yield lambda: bool(first)
    if first:
        raise KeyboardInterrupt


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Deliver signals after the block, because Paddle's key-value store fails if they interrupt it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Raise the exception of a signal handler again if the block ends with a different error.

    Call `check` regularly and at the end of the block, to raise exceptions that were swallowed.
    """

    def keeping(before: Callable[..., Any]) -> Callable[..., Any]:
        def handler(*given: object) -> None:
            try:
                before(*given)
            except BaseException as error:
                _raised.append(error)
                raise

        return handler

    if not _in_main_thread():
        yield
        return
    start = len(_raised)
    try:
        with _handled(keeping):
            yield
    except Exception as error:
        if len(_raised) > start:
            raise _raised[start] from error
        raise
    finally:
        del _raised[start:]


def check() -> None:
    """Raise again any exception that a signal handler raised in an open `kept` block, or that waits to be raised."""
    if _raised and _in_main_thread():
        raise _raised[0]


def raise_later(error: BaseException) -> None:
    """Raise an error of another thread in the main thread, at its next call of `check`."""
    _raised.append(error)


@contextlib.contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Restore the alternate signal stack of this thread at the end of a block.

    A library may set its own signal stack and free it later. The next Ctrl-C would then end the process with SIGSEGV.
    """
    change = None if os.name == "nt" else ctypes.CDLL(None).sigaltstack
    before = ctypes.create_string_buffer(_STACK)
    known = change is not None and change(None, before) == 0
    try:
        yield
    finally:
        if change is not None and known:
            change(before, None)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def _handled(change: Callable[[Any], Callable[..., Any]], default: bool = False) -> Iterator[None]:
    """Replace the handlers of the signals for a block, in the main thread only.

    Args:
        change: Function that returns the new handler, given the previous one.
        default: Replace the system's default handler, too, for which `change` gets None. Otherwise only Python
            functions are replaced.
    """
    before: list[tuple[int, Any]] = []
    if _in_main_thread():
        handlers = [(number, signal.getsignal(number)) for number in SIGNALS]
        before += [
            (n, handler) for n, handler in handlers if callable(handler) or (default and handler is signal.SIG_DFL)
        ]
    try:
        for number, handler in tuple(before):
            signal.signal(number, change(handler if callable(handler) else None))
        yield
    finally:
        _restore(before)


def _restore(handlers: list[tuple[int, Any]]) -> None:
    """Restore signal handlers. Nested `finally` clauses are needed because a restored handler may raise at once."""
    if handlers:
        try:
            signal.signal(*handlers.pop())
        finally:
            _restore(handlers)
