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


def table(
    *columns: str,
    rows: Iterable[Sequence[RenderableType]] = (),
    title: str | None = None,
    right: Iterable[str] = (),
    limit: int | None = None,
    more: Sequence[str] = ("... and {} more",),
) -> Table:
    """Build a table in the one style.

    Args:
        columns: their titles; none: two columns without titles.
        rows: the cells of each row, from the left.
        right: titles of the columns that are aligned there.
        limit, more: the largest number of rows, and the cells in the place of the others, with their number at {}.
    """
    result = _Table(title=title and printable(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    result.show_header = bool(columns)
    for column in columns or ("", ""):
        result.add_column(column, justify="right" if column in right else "left", overflow="fold")
    rows = list(rows)
    for row in rows[:limit]:
        result.add_row(*row)
    if limit is not None and len(rows) > limit:
        result.add_row(*(cell.format(len(rows) - limit) for cell in more))
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
    rows = [(problem.name, problem.expected, problem.found, problem.remedy) for problem in found]
    more = ("... and {} more", "", "", "fcvit inspect FILE --json lists all")
    columns = ("tensor", "expected", "found", "remedy")
    return table(*columns, rows=rows, title=f"{len(found)} problem(s)", limit=SHOWN, more=more)


def interval(bounds: tuple[float, float]) -> str:
    """Two bounds in per cent or points."""
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}"


def unreadable(found: Sequence[str | BadImages]) -> Table:
    """Images that were left out."""
    title = f"{counted(len(found), 'image')} left out: cannot be read"
    return table("image and reason", rows=[(str(entry),) for entry in found], title=title, limit=SHOWN)


def predictions(rows: Sequence[tuple[Path, Any]]) -> Table:
    """Return the best classes of each image."""
    cells = [
        ("" if place else str(path), f"{100 * row.probability:.1f}", row.name, row.id)
        for path, ranked in rows
        for place, row in enumerate(ranked)
    ]
    return table("image", "%", "class", "id", rows=cells, right=("%",))
