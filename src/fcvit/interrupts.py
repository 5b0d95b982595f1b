"""Let no SIGINT or SIGTERM get lost.

Python runs a signal handler between any two instructions of the main thread, also in a function that C code called.
The KeyboardInterrupt that the handler raises there may come out as another error or not at all: Paddle makes an
OSError of one that leaves the backward of a native operator, a class that is being made a RuntimeError, an import in
C an ImportError.
"""

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

_NOTE = b"fcvit: note: ending as soon as this step is done; the next Ctrl-C ends the process at once\n"
_STACK = 64  # bytes, more than any system's `stack_t`
_raised: list[BaseException] = []  # by signal handlers, in the `kept` blocks that are open


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Deliver a SIGINT or SIGTERM that comes in the block when the block is left, to the handler of before.

    The third Ctrl-C in one block ends the process, in case that the block never ends. In other threads than the main
    one, which runs all handlers, this does nothing.
    """
    came: list[int] = []

    def remember(number: int, _: object) -> None:
        came.append(number)
        if (presses := came.count(signal.SIGINT)) == 2:
            os.write(2, _NOTE)  # `print` may be what was interrupted
        elif presses > 2:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)

    try:
        with _handled(lambda _: remember):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Raise what a signal handler raised in the block, where another error leaves the block.

    Call `check` now and then, and at the end, for what was swallowed.
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
    """Raise what a signal handler has raised in a `kept` block that is still open."""
    if _raised and _in_main_thread():
        raise _raised[0]


@contextlib.contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Put the stack that signal handlers of this thread run on back at the end of a block.

    A library that leaves its own there may free it later: then the next Ctrl-C ends the process by SIGSEGV.
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
def _handled(change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace the handlers of both signals for a block, where they are Python functions, in the main thread."""
    before: list[tuple[int, Callable[..., Any]]] = []
    if _in_main_thread():
        before += [(n, handler) for n in (signal.SIGINT, signal.SIGTERM) if callable(handler := signal.getsignal(n))]
    try:
        for number, handler in tuple(before):
            signal.signal(number, change(handler))
        yield
    finally:
        _restore(before)


def _restore(handlers: list[tuple[int, Callable[..., Any]]]) -> None:
    """Each in the `finally` of another: a handler that is back may raise at once."""
    if handlers:
        try:
            signal.signal(*handlers.pop())
        finally:
            _restore(handlers)
