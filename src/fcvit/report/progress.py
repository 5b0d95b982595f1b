"""Show progress with rate and time left: a bar on a terminal, or a line every few seconds otherwise."""

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
    what: str,
    total: int,
    unit: str = "images",
    every: float = 10,
    after: Callable[[float], float] | None = None,
    start: int = 0,
) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the number of items done since its last call. `--quiet` disables the display.

    Args:
        what: Description of the work.
        total: Total number of items.
        unit: Name of the items.
        every: Seconds between lines if standard error is not a terminal.
        after: Function that returns the seconds of the remaining work after this, given the rate. If it is given, the
            total time left is shown as well.
        start: Number of items that were done before.
    """
    if logging.getLogger("fcvit").level >= logging.ERROR:  # --quiet
        yield lambda _: None
        return
    what = printable(what)
    console = Console(stderr=True)
    estimate = _Estimate(total, unit, after, start)
    if not console.is_terminal:
        last = estimate.began

        def print_line(done: int) -> None:
            nonlocal last
            estimate.add(done)
            if estimate.now - last >= every:
                last = estimate.now
                print(f"{what}: {estimate.done} of {total} {unit}, {estimate}", file=sys.stderr, flush=True)

        yield print_line
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), estimate)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, completed=start)

        def advance(done: int) -> None:
            estimate.add(done)
            bar.update(task, advance=done)

        yield advance


class _Estimate(ProgressColumn):
    """The rate and the time left, averaged over all items, since one step can take longer than a fixed window."""

    def __init__(self, total: int, unit: str, after: Callable[[float], float] | None, start: int):
        super().__init__()
        self.total, self.unit, self.after = total, unit, after
        self.start = self.done = start
        self.began = self.now = time.monotonic()

    def add(self, done: int) -> None:
        self.done += done
        self.now = time.monotonic()

    def __str__(self) -> str:
        seconds = self.now - self.began
        if self.done == self.start or seconds <= 0:
            return "time left unknown"
        rate = (self.done - self.start) / seconds
        left = (self.total - self.done) / rate
        in_total = f", {duration(left + self.after(rate))} left in total" if self.after else ""
        return f"{rate:.1f} {self.unit}/s, {duration(left)} left{in_total}"

    def render(self, task: Task) -> Text:
        return Text(str(self), style="cyan")


def duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds, for example 0:03:20."""
    return str(datetime.timedelta(seconds=round(seconds)))
