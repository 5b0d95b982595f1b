"""The tables of results on the terminal: the console, the one style, and listings that several commands show.

Texts from files and paths stand in them as they are: neither rich nor the terminal may read commands
out of them (see `console` and `table`).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from fcvit.errors import BadImages, counted
from fcvit.text import printable

SHOWN = 20  # rows of a list that may be long


def console(error: bool = False) -> Console:
    """The console for these tables: plain text stays plain; a pipe, which has no width, gets a wide one."""
    plain = {"markup": False, "emoji": False, "highlight": False, "stderr": error}
    terminal = Console(**plain)
    return terminal if terminal.is_terminal else Console(**plain, width=140)


class _Table(Table):
    """A table whose cells hold texts from anywhere; only a `Text` can have several lines."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row, with control characters as their escapes."""
        super().add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def table(*columns: str, title: str | None = None, right: Iterable[str] = ()) -> Table:
    """An empty table in the one style; columns named in `right` are aligned there; no columns: pairs."""
    result = _Table(title=title and printable(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    result.show_header = bool(columns)
    for column in columns or ("", ""):
        result.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return result


def lines(texts: Iterable[str]) -> Text:
    """One text below the other in a cell."""
    return Text("\n".join(map(printable, texts)))


def verdict(passed: bool, limit: str = "") -> Text:
    """pass or FAIL, in color, with the limit behind it."""
    word = ("pass", "green") if passed else ("FAIL", "bold red")
    return Text.assemble(word, f" (limit {limit})" if limit else "")


def problems(found: Sequence[Any]) -> Table:
    """Everything that does not fit, up to a screenful."""
    result = table("tensor", "expected", "found", "remedy", title=f"{len(found)} problem(s)")
    for problem in found[:SHOWN]:
        result.add_row(problem.name, problem.expected, problem.found, problem.remedy)
    if len(found) > SHOWN:
        result.add_row(f"... and {len(found) - SHOWN} more", "", "", "fcvit inspect FILE --json lists all")
    return result


def interval(bounds: tuple[float, float]) -> str:
    """Two bounds in per cent or points."""
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}"


def unreadable(found: Sequence[str | BadImages]) -> Table:
    """Images that were left out."""
    result = table("image and reason", title=f"{counted(len(found), 'image')} left out: cannot be read")
    for entry in found[:SHOWN]:
        result.add_row(str(entry))
    if len(found) > SHOWN:
        result.add_row(f"... and {len(found) - SHOWN} more")
    return result


def predictions(rows: Sequence[tuple[Path, Any]]) -> Table:
    """Return the best classes of each image."""
    result = table("image", "%", "class", "id", right=("%",))
    for path, ranked in rows:
        for place, row in enumerate(ranked):
            result.add_row("" if place else str(path), f"{100 * row.probability:.1f}", row.name, row.id)
    return result
