"""Text from files, and text for people: encodings, what a terminal obeys, what a spreadsheet executes."""

import codecs
import collections
import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from fcvit.errors import UnreadableFile

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark begins it
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Control characters, line separators, overrides of the writing direction, and halves of characters.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# A spreadsheet takes a cell that begins so for a formula. The quotes make the mark itself reversible.
_FORMULA = re.compile("'*[=+\\-@\t\r\n]")


def decode_text(content: bytes) -> str:
    """Decode UTF-8, or UTF-16 or UTF-32 with a byte-order mark; also UTF-16 without one, if it has ASCII in it.

    Raises:
        UnicodeDecodeError: it is none of these.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding)
    if b"\0" in content[:2] or 8 * content.count(0) > len(content):
        return content.decode("utf-16-be" if content[::2].count(0) > content[1::2].count(0) else "utf-16-le")
    return content.decode("utf-8")


def printable(text: str, keep: str = "") -> str:
    r"""Replace what a terminal obeys instead of showing it by its escape, such as \x1b.

    Args:
        text: anything, such as a name from a file.
        keep: unsafe characters that stay, such as a line feed in text of several lines.
    """
    return _UNSAFE.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)


def one_line(text: object) -> str:
    """Return a file's own words for a message: one line, of bearable length, nothing that a terminal obeys."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:300])


def some(values: Iterable[object], shown: int = 5, length: int | None = None) -> str:
    """Join the first values with commas, each cut to `length` characters, and mark that there are more."""
    texts = list(map(str, values))
    return ", ".join(text[:length] for text in texts[:shown]) + (", ..." if len(texts) > shown else "")


def repeats(values: Iterable[str]) -> list[str]:
    """Return the values that occur more than once."""
    return [value for value, times in collections.Counter(values).items() if times > 1]


def parse_json(text: str | bytes) -> tuple[Any, list[str]]:
    """Parse JSON; also return the keys that stand twice in one object, of which `json` would take the last."""
    repeated: list[str] = []

    def build(pairs: list[tuple[str, object]]) -> dict[str, object]:
        repeated.extend(repeats(key for key, _ in pairs))
        return dict(pairs)

    return json.loads(text, object_pairs_hook=build), repeated


def strict_json(text: str | bytes) -> Any:
    """Parse JSON that says the same to every program.

    Raises:
        UnreadableFile: a key stands twice in one object.
        ValueError, RecursionError: it is no JSON, or nested too deeply.
    """
    value, repeated = parse_json(text)
    if repeated:
        raise UnreadableFile("two entries of one name in the header: refused, it could show other weights to others")
    return value


def escape_json(text: str) -> str:
    """Escape in JSON what `printable` replaces; the values stay the same."""
    return re.sub(_UNSAFE, lambda match: match[0] if match[0] == "\n" else f"\\u{ord(match[0]):04x}", text)


def csv_text(rows: Iterable[Sequence[object]], line_end: str = "\r\n") -> str:
    """Write rows as CSV that a spreadsheet opens without executing a cell; `csv_value` gives the cells back."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=line_end)
    writer.writerows(
        [f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell for cell in row] for row in rows
    )
    return text.getvalue()


def csv_value(cell: str) -> str:
    """Return a cell of `csv_text` as it was before."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
