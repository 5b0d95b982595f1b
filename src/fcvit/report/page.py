"""The report of a run as a single HTML file, without scripts or external resources."""

import base64
import importlib
import importlib.resources
import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

from fcvit.errors import MissingExtra
from fcvit.text import printable

LONG = 50  # tables with more rows are collapsed


@dataclass(frozen=True)
class Picture:
    """A PNG file with a title and an alternative text. Its resolution sets its maximum size on the page."""

    title: str
    png: bytes
    alt: str

    @property
    def size(self) -> tuple[int, int]:
        """Return width and height in CSS pixels (1/96 inch)."""
        with Image.open(io.BytesIO(self.png)) as image:
            scale = 96 / image.info.get("dpi", (96, 96))[0]
            return round(image.width * scale), round(image.height * scale)

    @property
    def uri(self) -> str:
        """Return the PNG file as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Listing:
    """A table of the page. The first cell of each row is a row header.

    Attributes:
        title: Caption of the table.
        columns: Column titles.
        rows: Rows, with one cell per column.
        numeric: Titles of the right-aligned columns.
        note: Line below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[str] = frozenset()
    note: str = ""

    def __post_init__(self):
        """Raise a ValueError if the rows or `numeric` do not match the columns."""
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"{self.title}: a row does not have {len(self.columns)} cells, one per column")
        if not self.numeric <= set(self.columns):
            raise ValueError(f"{self.title}: these numeric columns do not exist: {self.numeric - set(self.columns)}")

    @property
    def folded(self) -> bool:
        """Return True if the table is collapsed because it has more than `LONG` rows."""
        return len(self.rows) > LONG


@dataclass(frozen=True)
class Section:
    """A section of the report, such as one configuration: pairs of names and values, tables and pictures."""

    title: str
    facts: tuple[tuple[str, str], ...]
    listings: tuple[Listing, ...] = ()
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Page:
    """The report page. The tables in `summary` come before the sections."""

    title: str
    lead: str
    summary: tuple[Listing, ...]
    sections: tuple[Section, ...]
    footer: str


def require_report() -> None:
    """Check that the packages for reports are installed. Call this before a long computation.

    Raises:
        MissingExtra: Jinja2 or Matplotlib is not installed or cannot be imported.
    """
    for package in ("jinja2", "matplotlib"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            reason = "is not installed" if error.name == package else f"cannot be imported ({error})"
            raise MissingExtra(
                f"reports need {package}, which {reason}; install it with: pip install 'fcvit[report]'"
            ) from error


def render_page(page: Page) -> str:
    """Render the page as an HTML document that can always be encoded as UTF-8.

    Raises:
        MissingExtra: The `report` extra is not installed.
    """
    require_report()
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, finalize=_legible, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = (importlib.resources.files("fcvit") / "report" / "page.html.jinja").read_text("utf-8")
    return environment.from_string(source).render(page=page)


def _legible(value: Any) -> Any:
    """Replace characters that HTML or UTF-8 cannot represent, or that change the text direction, by their codes."""
    return printable(value, keep="\n\t") if isinstance(value, str) and not hasattr(value, "__html__") else value
