"""Hold SIGINT and SIGTERM back where the exception of a signal handler would be lost.

Python runs a signal handler between any two instructions of the main thread, also in a function that C++ code
called. A KeyboardInterrupt that leaves such a function, as the backward of a native operator is one, comes out of
Paddle as an OSError or not at all.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

_NOTE = b"fcvit: note: ending as soon as this step is done; the next Ctrl-C ends the process at once\n"


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Deliver a SIGINT or SIGTERM that comes in the block when the block is left, to the handler of before.

    In other threads than the main one this does nothing, since no handler runs there. Handlers that are not Python
    functions stay in force. The third Ctrl-C in one block ends the process, in case that the block never ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def remember(number: int, _: object) -> None:
        came.append(number)
        if (presses := came.count(signal.SIGINT)) == 2:
            os.write(2, _NOTE)  # `print` may be what was interrupted
        elif presses > 2:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)

    before = [(n, handler) for n in (signal.SIGINT, signal.SIGTERM) if callable(handler := signal.getsignal(n))]
    try:
        for number, _ in before:
            signal.signal(number, remember)
        yield
    finally:
        try:
            _restore(before)
        finally:
            if came:
                signal.raise_signal(came[0])


def _restore(handlers: list[tuple[int, Callable[..., Any]]]) -> None:
    """Each in the `finally` of another: a handler that is back may raise at once."""
    if handlers:
        try:
            signal.signal(*handlers.pop())
        finally:
            _restore(handlers)
