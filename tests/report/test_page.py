"""Tests of the report page: valid HTML without scripts and external resources, for any text."""

import base64
import dataclasses
import functools
import io
import re
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fcvit.errors import MissingExtra
from fcvit.report.page import LONG, Listing, Page, Picture, Section, render_page, require_report

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# The elements of the template. Any other element would come from an unescaped text.
ELEMENTS = re.compile(
    "html|head|meta|title|style|body|header|h1|h2|p|nav|ul|li|a|main|section|dl|dt|dd|div|table|caption|thead|tbody"
    "|tr|th|td|details|summary|figure|figcaption|img|footer"
)


def png(width=8, height=6, **options):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "#0072B2").save(file, "PNG", **options)
    return file.getvalue()


def make_page(text="plain", rows=2, sections=2):
    listing = Listing(text, (text, "value"), ((text, text),) * rows, frozenset({"value"}), text)
    section = Section(text, ((text, text),), (listing,), (Picture(text, png(), text),))
    return Page(text, text, (listing,), (section,) * sections, text)


class Document(HTMLParser):
    """Parsed HTML: elements with attributes and text. All elements must be closed."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> does not match an open element"

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], data))

    def all(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def text(self, tag):
        return [data for name, data in self.texts if name == tag]


def check(html):
    """Check that the HTML is valid, self-contained and without scripts. Return the parsed document."""
    html.encode("utf-8")
    document = Document(html)
    assert all(ELEMENTS.fullmatch(tag) for tag, _, _ in document.elements)
    ids = [attributes["id"] for _, attributes, _ in document.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for tag, attributes, _ in document.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name == "href":
                assert value.startswith("#") and value[1:] in ids
            elif name == "aria-labelledby":
                assert value in ids
            elif name == "src":
                assert re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/]+=*", value)
            else:
                assert name in {"lang", "charset", "content", "http-equiv", "name", "id", "class", "scope", "alt",
                                "tabindex", "role", "aria-label", "width", "height", "style"}, (tag, name)  # fmt: skip
    policies = [a["content"] for a in document.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [POLICY]
    assert not re.search(r"url\(|@import|https?:", " ".join(document.text("style")))
    assert len(document.all("table")) == len(document.all("caption"))
    assert all(a.get("scope") in ("col", "row") for a in document.all("th"))
    assert all(a.get("alt") for a in document.all("img"))
    assert len(document.all("h1")) == 1
    return document


def test_the_page_contains_all_parts():
    listing = Listing("Accuracy", ("engine", "top-1 (%)"), (("Paddle", "80.1"), ("PyTorch", "80.2")),
                      frozenset({"top-1 (%)"}), "of all images")  # fmt: skip
    section = Section("Paddle", (("device", "cpu"),), (), (Picture("Some", png(), "six images"),))
    other = Section("PyTorch", (), (listing,))
    document = check(render_page(Page("Report", "The lead.", (listing,), (section, other), "The footer.")))
    assert document.text("title") == document.text("h1") == ["Report"]
    assert document.text("p") == ["The lead.", "of all images", "of all images"]
    assert document.text("h2") == ["Summary", "Paddle", "PyTorch"]
    assert document.text("dt") + document.text("dd") == ["device", "cpu"]
    assert document.text("caption") == ["Accuracy"] * 2
    assert document.text("th")[:4] == ["engine", "top-1 (%)", "Paddle", "PyTorch"]
    assert document.text("td")[:2] == ["80.1", "80.2"]
    assert document.text("figcaption") == ["Some"]
    assert document.all("img")[0]["alt"] == "six images"
    assert document.text("footer") == ["The footer."]
    assert document.text("a") == ["Summary", "Paddle", "PyTorch"]
    assert [a.get("class") for a in document.all("th")[:4]] == [None, "number", None, None]
    assert [a.get("class") for a in document.all("td")[:2]] == ["number"] * 2


def test_rendering_is_reproducible():
    assert render_page(make_page()) == render_page(make_page())


def test_a_page_with_one_section_has_no_table_of_contents():
    assert not check(render_page(make_page(sections=1))).all("nav")


def test_empty_parts_are_omitted():
    document = check(render_page(Page("Report", "", (), (Section("One", ()), Section("Two", ())), "")))
    for tag in ("p", "dl", "table", "figure", "footer"):
        assert not document.all(tag)
    assert document.text("a") == ["One", "Two"]


@pytest.mark.parametrize(("rows", "folded"), [(LONG, False), (LONG + 1, True)])
def test_long_tables_are_collapsed(rows, folded):
    document = check(render_page(make_page(rows=rows)))
    tables = [within for tag, _, within in document.elements if tag == "table"]
    assert all(("details" in within) == folded for within in tables)
    assert all("open" not in a for a in document.all("details"))
    assert len(document.all("td")) == 3 * rows


def test_wide_tables_and_pictures_are_scrollable():
    elements = check(render_page(make_page())).elements
    for position, (tag, _, within) in enumerate(elements):
        if tag in ("table", "img"):
            before, attributes, _ = elements[position - 1]
            assert (before, within[-1], attributes["class"]) == ("div", "div", "scroll")


def test_pictures_are_embedded_unchanged_in_their_nominal_size():
    for data, size in ((png(300, 200), ("300", "200")), (png(300, 200, dpi=(192, 192)), ("150", "100"))):
        section = Section("One", (), (), (Picture("Some", data, "six images"),))
        (image,) = check(render_page(Page("Report", "", (), (section,), ""))).all("img")
        assert base64.b64decode(image["src"].partition(",")[2]) == data
        assert (image["width"], image["height"]) == size


@functools.cache
def structure_of_a_plain_page():
    return [(tag, within) for tag, _, within in check(render_page(make_page())).elements]


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.text(st.characters(exclude_categories=()), min_size=1).filter(str.strip))
@example("<script>alert(1)</script>")
@example('"><img src=x onerror=alert(1)>')
@example("' onmouseover='alert(1)")
@example("</style></title></table><!--")
@example("{{ 7 * 7 }}{% raw %}&lt;&#60;")
@example("bytes-\udcff.jpg \x00 \x1b[31m \x85 \u202e \u2066")
def test_all_texts_are_escaped(text):
    document = check(render_page(make_page(text)))
    assert [(tag, within) for tag, _, within in document.elements] == structure_of_a_plain_page()
    shown = re.sub(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]",
        lambda c: c[0].encode("unicode_escape").decode(),
        text,
    )
    for tag in ("title", "h1", "dt", "caption", "footer", "td"):
        assert document.text(tag)[0] == shown
    assert document.all("img")[0]["alt"] == shown


def test_a_listing_that_does_not_match_its_columns_is_rejected():
    with pytest.raises(ValueError, match=r"a row .* 2 cells"):
        Listing("t", ("a", "b"), (("1", "2"), ("1",)))
    with pytest.raises(ValueError, match="do not exist"):
        Listing("t", ("a", "b"), (), frozenset({"c"}))


def test_the_parts_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_page().title = "other"


def test_without_the_extra_the_error_names_the_command_to_install_it(monkeypatch, tmp_path):
    require_report()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtra, match=r"jinja2, which is not installed.*pip install 'fcvit\[report\]'"):
        render_page(make_page())
    (tmp_path / "jinja2.py").write_text("raise ImportError('no such symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "jinja2")
    with pytest.raises(MissingExtra, match=r"jinja2.*\(no such symbol\)"):
        require_report()
