"""Tables for the terminal: the console, the common style, and tables used by several commands.

Texts from files and paths are shown literally. Rich markup and terminal control characters in them have no effect (see
`console` and `table`).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from fcvit.data.listed import total
from fcvit.errors import BadImages, counted
from fcvit.text import printable

SHOWN = 20  # maximum number of rows of a long table


def console(error: bool = False) -> Console:
    """Return the console for tables, without markup. Output that is not a terminal is 140 columns wide."""
    plain = {"markup": False, "emoji": False, "highlight": False, "stderr": error}
    terminal = Console(**plain)
    return terminal if terminal.is_terminal else Console(**plain, width=140)


class _Table(Table):
    """A table that is safe for cells with untrusted text. Only a `Text` cell can have several lines."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row, with control characters replaced by escape sequences."""
        super().add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def table(
    *columns: str,
    rows: Iterable[Sequence[RenderableType]] = (),
    title: str | None = None,
    right: Iterable[str] = (),
    limit: int | None = None,
    more: Sequence[str] = ("... and {} more",),
    number: int | None = None,
) -> Table:
    """Build a table in the common style.

    Args:
        columns: Column titles. Without titles, the table has two columns.
        rows: Cells of each row.
        title: Title of the table.
        right: Titles of the right-aligned columns.
        limit, more: Maximum number of rows, and the cells of the last row if there are more rows. In these cells, {} is
            replaced by the number of omitted rows.
        number: Number of all rows, if `rows` are only the first.
    """
    result = _Table(title=title and printable(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    result.show_header = bool(columns)
    for column in columns or ("", ""):
        result.add_column(column, justify="right" if column in right else "left", overflow="fold")
    rows = list(rows)
    for row in rows[:limit]:
        result.add_row(*row)
    left = (len(rows) if number is None else number) - min(len(rows), len(rows) if limit is None else limit)
    if left:
        result.add_row(*(cell.format(left) for cell in more))
    return result


def lines(texts: Iterable[str]) -> Text:
    """Join texts as the lines of one cell."""
    return Text("\n".join(map(printable, texts)))


def verdict(passed: bool, limit: str = "") -> Text:
    """Return "pass" or "FAIL" in color, followed by the limit."""
    word = ("pass", "green") if passed else ("FAIL", "bold red")
    return Text.assemble(word, f" (limit {limit})" if limit else "")


def problems(found: Sequence[Any]) -> Table:
    """Return a table of tensors that do not match, with at most `SHOWN` rows."""
    rows = [(problem.name, problem.expected, problem.found, problem.remedy) for problem in found]
    more = ("... and {} more", "", "", "fcvit inspect FILE --json lists all")
    columns = ("tensor", "expected", "found", "remedy")
    return table(*columns, rows=rows, title=f"{len(found)} problem(s)", limit=SHOWN, more=more)


def unreadable(found: Sequence[str | BadImages]) -> Table:
    """Return a table of images that are excluded because they, or their label maps, cannot be used."""
    number = total(found)
    title = f"{counted(number, 'image')} excluded"
    return table("image and reason", rows=[(str(entry),) for entry in found], title=title, limit=SHOWN, number=number)


def predictions(rows: Sequence[tuple[Path, Sequence[Mapping[str, Any]]]]) -> Table:
    """Return a table of the most probable classes of each image."""
    cells = [
        ("" if position else str(path), f"{100 * row['probability']:.1f}", row["name"], row["id"])
        for path, ranked in rows
        for position, row in enumerate(ranked)
    ]
    return table("image", "probability (%)", "class", "id", rows=cells, right=("probability (%)",))
