"""Show the progress of long work, with rate and time left: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import datetime
import logging
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from fcvit.text import printable


@contextlib.contextmanager
def progress(
    what: str, total: int, unit: str = "images", every: float = 10, after: Callable[[float], float] | None = None
) -> Iterator[Callable[[int], None]]:
    """Yield a function to be called with how many were done since the last call; `--quiet` shows nothing.

    Args:
        every: seconds between lines where the standard error is no terminal; shorter work has none.
        after: gives the seconds of the work that follows, from the rate; then the time left of all is shown too.
    """
    if logging.getLogger("fcvit").level >= logging.ERROR:  # --quiet
        yield lambda _: None
        return
    what = printable(what)
    console = Console(stderr=True)
    estimate = _Estimate(total, unit, after)
    if not console.is_terminal:
        yield _Lines(what, estimate, every)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), estimate)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)

        def advance(done: int) -> None:
            estimate.add(done)
            bar.update(task, advance=done)

        yield advance


class _Estimate(ProgressColumn):
    """Rate and time left, from all that was done: a single step may take longer than any fixed window."""

    def __init__(self, total: int, unit: str, after: Callable[[float], float] | None):
        super().__init__()
        self.total, self.unit, self.after = total, unit, after
        self.done = 0
        self.began = self.now = time.monotonic()

    def add(self, done: int) -> None:
        self.done += done
        self.now = time.monotonic()

    def __str__(self) -> str:
        seconds = self.now - self.began
        if not self.done or seconds <= 0:
            return "time left unknown"
        rate = self.done / seconds
        left = (self.total - self.done) / rate
        of_all = f", {duration(left + self.after(rate))} left in all" if self.after else ""
        return f"{rate:.1f} {self.unit}/s, {duration(left)} left{of_all}"

    def render(self, task: Task) -> Text:
        return Text(str(self), style="cyan")


class _Lines:
    """Progress for a log file."""

    def __init__(self, what: str, estimate: _Estimate, every: float):
        self.what, self.estimate, self.every = what, estimate, every
        self.last = estimate.began

    def __call__(self, done: int) -> None:
        estimate = self.estimate
        estimate.add(done)
        if estimate.now - self.last >= self.every:
            self.last = estimate.now
            of = f"{estimate.done} of {estimate.total} {estimate.unit}"
            print(f"{self.what}: {of}, {estimate}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as 0:03:20."""
    return str(datetime.timedelta(seconds=round(seconds)))
