"""Test that printed text cannot control a terminal or a spreadsheet, and that file types are detected."""

import csv
import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcvit.foreign import foreign_kind
from fcvit.run_folder import to_json
from fcvit.text import csv_text, csv_value, printable

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\n\u202ex\u2066\u2028\ud800"


@given(st.text())
def test_printable_text_contains_no_control_characters(text):
    assert not set(printable(text + EVIL)) & {*map(chr, range(32)), *map(chr, range(0x7F, 0xA0)), "\u202e", "\ud800"}


def test_ordinary_text_is_not_changed():
    for text in ("naïve 👩‍👩‍👧 می‌خواهم 日本\u3000語 [red]x[/red] :dog:", "a\u00a0b"):
        assert printable(text) == text
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b" and printable("\udcff") == "\\udcff"


def test_json_escapes_control_characters_and_keeps_the_values():
    text = to_json({EVIL: [EVIL]})
    assert printable(text, keep="\n") == text and json.loads(text) == {EVIL: [EVIL]}


@given(st.lists(st.text("='+-@\t\r\n\"ab,", max_size=5), min_size=1))
def test_formulas_in_csv_are_escaped_and_can_be_restored(cells):
    rows = list(csv.reader(io.StringIO(csv_text([[*cells, "end"]]), newline="")))
    assert [csv_value(cell) for cell in rows[0]] == [*cells, "end"]
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) for cell in rows[0])


def test_negative_numbers_in_csv_are_not_escaped():
    assert csv_text([(-1.5, 2, "0.5", "x=1")]) == "-1.5,2,0.5,x=1\r\n"


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer.*git lfs pull"),
        (b"\xef\xbb\xbf\r\n <!DOCTYPE html><html>", "web page"),
        (b'<?xml version="1.0"?>\n<svg xmlns=', "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "AVIF"),
        (b"\0\0\0\x20ftypmif1\0\0\0\0mif1avif", "AVIF"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "a video"),
        (b"%PDF-1.7\n", "PDF"),
        (b"PK\x03\x04\x14\0", "ZIP"),
        (b"\x93NUMPY\x01\0", "NumPy"),
        (bytes(257) + b"ustar", "tar"),
        (bytes(512), "zeros only"),
        ("a class list: 日本".encode()[:-1], "a text file"),
        (b"\xff\xd8\xff\xe0", "a JPEG image"),
    ],
)
def test_file_types_are_detected_from_the_first_bytes(head, kind):
    assert re.search(kind, foreign_kind(head) or "")
    assert foreign_kind(b"\x01\x02\x03\xfe") is None
