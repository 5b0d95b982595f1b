"""Decode text from files, and make text safe for terminals and spreadsheets."""

import codecs
import collections
import csv
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from fcvit.errors import UnreadableFile

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, because it starts with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Control characters, line separators, overrides of the writing direction, and surrogates.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Spreadsheets interpret a cell that starts with one of these as a formula. Leading quotes keep the escape reversible.
_FORMULA = re.compile("'*[=+\\-@\t\r\n]")


def decode_text(content: bytes) -> str:
    """Decode UTF-8, or UTF-16 or UTF-32 with a byte-order mark, or UTF-16 without a mark if it contains ASCII.

    Raises:
        UnicodeDecodeError: The content has none of these encodings.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding)
    if b"\0" in content[:2] or 8 * content.count(0) > len(content):
        return content.decode("utf-16-be" if content[::2].count(0) > content[1::2].count(0) else "utf-16-le")
    return content.decode("utf-8")


def printable(text: str, keep: str = "") -> str:
    r"""Replace characters that control a terminal by their escapes, for example \x1b.

    Args:
        text: Any text, for example a name from a file.
        keep: Unsafe characters to keep, for example a line feed in text with several lines.
    """
    return _UNSAFE.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)


def one_line(text: object) -> str:
    """Make text from a file safe for a message: one line, at most 300 characters, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:300])


def some(values: Iterable[object], shown: int = 5, length: int | None = None) -> str:
    """Join the first values with commas, each cut to `length` characters, and end with "..." if values are left out."""
    texts = list(map(str, values))
    return ", ".join(text[:length] for text in texts[:shown]) + (", ..." if len(texts) > shown else "")


def repeats(values: Iterable[str]) -> list[str]:
    """Return the values that occur more than once."""
    return [value for value, times in collections.Counter(values).items() if times > 1]


def parse_json(text: str | bytes) -> tuple[Any, list[str]]:
    """Parse JSON. Also return keys that occur more than once in one object, of which `json` keeps the last value."""
    repeated: list[str] = []

    def build(pairs: list[tuple[str, object]]) -> dict[str, object]:
        value = dict(pairs)
        if len(value) < len(pairs):
            repeated.extend(repeats(key for key, _ in pairs))
        return value

    return json.loads(text, object_pairs_hook=build), repeated


def strict_json(text: str | bytes) -> Any:
    """Parse JSON and reject repeated keys, which different programs interpret differently.

    Raises:
        UnreadableFile: A key occurs more than once in one object.
        ValueError, RecursionError: The text is not JSON, or it is nested too deeply.
    """
    value, repeated = parse_json(text)
    if repeated:
        raise UnreadableFile("two entries of one name in the header: rejected, as programs differ in the one they read")
    return value


def escape_json(text: str) -> str:
    """Escape the characters in JSON text that `printable` replaces. The parsed values stay the same."""
    return re.sub(_UNSAFE, lambda match: match[0] if match[0] == "\n" else f"\\u{ord(match[0]):04x}", text)


def interval(bounds: tuple[float, float]) -> str:
    """Format an interval in percent or percentage points. Return an empty string if it is undefined (NaN)."""
    return "" if math.isnan(bounds[0]) else f"{bounds[0]:.2f} to {bounds[1]:.2f}"


def csv_text(rows: Iterable[Sequence[object]], line_end: str = "\r\n") -> str:
    """Return rows as CSV in which spreadsheets execute no cell. `csv_value` restores the original cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=line_end)
    writer.writerows(
        [f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell for cell in row] for row in rows
    )
    return text.getvalue()


def csv_value(cell: str) -> str:
    """Restore the original value of a cell from `csv_text`."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
