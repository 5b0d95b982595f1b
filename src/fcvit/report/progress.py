"""Progress of long work, with rate and time left: a bar on a terminal, now and then a line elsewhere."""

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fcvit.text import printable


class _Rate(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {self.unit}/s" if speed else f"- {self.unit}/s", style="cyan")


@contextlib.contextmanager
def progress(what: str, total: int, unit: str = "images", every: float = 10) -> Iterator[Callable[[int], None]]:
    """Yields a function to be called with how many were done since the last call.

    Args:
        every: seconds between lines where the standard error is no terminal; shorter work has none.
    """
    what = printable(what)
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(what, total, unit, every)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, advance=done)


class _Lines:
    """Progress for a log file."""

    def __init__(self, what: str, total: int, unit: str, every: float):
        self.what, self.total, self.unit, self.every = what, total, unit, every
        self.done = 0
        self.began = self.last = time.monotonic()

    def __call__(self, done: int) -> None:
        self.done += done
        now = time.monotonic()
        if now - self.last < self.every:
            return
        self.last = now
        rate = self.done / (now - self.began)
        left = (
            f"{datetime.timedelta(seconds=round((self.total - self.done) / rate))} left" if rate else "no end in sight"
        )
        line = f"{self.what}: {self.done} of {self.total} {self.unit}, {rate:.1f} {self.unit}/s, {left}"
        print(line, file=sys.stderr, flush=True)
