"""The report of a run as one HTML file: no script, nothing loaded from elsewhere, so it can be mailed and kept."""

import base64
import importlib
import importlib.resources
import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

from fcvit.errors import MissingExtra
from fcvit.text import printable

LONG = 50  # rows; a longer listing is folded up


@dataclass(frozen=True)
class Picture:
    """A PNG file with what it shows in words (`alt`); shown at the size that its resolution states, at most."""

    title: str
    png: bytes
    alt: str

    @property
    def size(self) -> tuple[int, int]:
        """Return width and height in CSS pixels, which are 1/96 of an inch."""
        with Image.open(io.BytesIO(self.png)) as image:
            scale = 96 / image.info.get("dpi", (96, 96))[0]
            return round(image.width * scale), round(image.height * scale)

    @property
    def uri(self) -> str:
        """Return the picture itself, as an address."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Listing:
    """A table; the first cell of a row says what the row is about.

    Attributes:
        rows: each with a cell for every column.
        numeric: columns that are aligned to the right.
        note: a line below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[str] = frozenset()
    note: str = ""

    def __post_init__(self):
        """Raise a ValueError where rows or `numeric` do not fit the columns."""
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"{self.title}: a row has not {len(self.columns)} cells, one for each column")
        if not self.numeric <= set(self.columns):
            raise ValueError(f"{self.title}: numeric columns that do not exist: {self.numeric - set(self.columns)}")

    @property
    def folded(self) -> bool:
        """Report whether it is so long that it is shown when asked for."""
        return len(self.rows) > LONG


@dataclass(frozen=True)
class Section:
    """One part of the report, such as one engine or run: facts in pairs, then tables, then pictures."""

    title: str
    facts: tuple[tuple[str, str], ...]
    listings: tuple[Listing, ...] = ()
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Page:
    """The whole report: what matters most in `summary`, above the sections."""

    title: str
    lead: str
    summary: tuple[Listing, ...]
    sections: tuple[Section, ...]
    footer: str


def require_report() -> None:
    """Check that reports can be made here; worth a call before long work.

    Raises:
        MissingExtra: Jinja2 or matplotlib is not installed, or does not load.
    """
    for package in ("jinja2", "matplotlib"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            reason = "is not installed" if error.name == package else f"does not load ({error})"
            raise MissingExtra(
                f"reports need {package}, which {reason}; install it with: pip install 'fcvit[report]'"
            ) from error


def render_page(page: Page) -> str:
    """Render the page as one HTML document that encodes to UTF-8, whatever its texts hold.

    Raises:
        MissingExtra: the extra `report` is not installed.
    """
    require_report()
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, finalize=_legible, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = (importlib.resources.files("fcvit") / "report" / "page.html.jinja").read_text("utf-8")
    return environment.from_string(source).render(page=page)


def _legible(value: Any) -> Any:
    """Return text without what HTML or UTF-8 cannot hold, or what turns the text after it around, each as its code."""
    return printable(value, keep="\n\t") if isinstance(value, str) and not hasattr(value, "__html__") else value
