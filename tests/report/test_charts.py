"""Tests of the charts: their texts, unusual names, and independence of user settings."""

import io
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fcvit.data.classes import ClassName, imagenet
from fcvit.errors import DoesNotFit, MissingExtra
from fcvit.metrics.classification import Calibration, calibration
from fcvit.report import charts
from fcvit.report.charts import confusion_chart, pixel_confusion_chart, reliability_chart

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytestmark = pytest.mark.slow  # each chart takes half a second

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay")
TEN = tuple(ClassName(f"n{i}", name) for i, name in enumerate(NAMES))
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
HOSTILE = (
    "$\\nosuch{$", "\u6c49\u5b57", "\u05d0\u05d1\u05d2", "W" * 300, "i" * 300, "cat", "cat", "\x00\x1b[31m",
    "a\tb\nc", "<script>", "\udcff.png", "", "\ufdfa", "z" + "\u0335\u0361\u0348" * 50, "\U0001f99d", "\u202eabc",
)  # fmt: skip


def ten_classes(errors=3):
    matrix = np.diag(np.arange(10) * 7)  # no image of the first class
    matrix[2, 3], matrix[9, 1] = errors, 1
    return matrix


def overconfident():
    confidence = np.linspace(0.001, 1, 600)
    return calibration(confidence, np.arange(600) % 10 / 10 < confidence**3)


@pytest.fixture
def figures(monkeypatch):
    """The Matplotlib figures that the test draws."""
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *given, **how: drawn.append(figure) or save(figure, *given, **how)
    )
    return drawn


def text_lines(figures):
    """Return the visible lines of text in the charts."""
    from matplotlib.text import Text

    texts = [
        text.get_text().replace("\u200e", "")
        for figure in figures
        for text in figure.findobj(Text)
        if text.get_visible()
    ]
    return [line for text in texts if text.strip() for line in text.split("\n")]


@pytest.mark.parametrize(
    ("draw", "data", "other"),
    [
        (lambda matrix: confusion_chart(matrix, TEN[:3], "t"), np.diag([1, 2, 3]), np.diag([1, 2, 4])),
        (
            lambda accuracy: reliability_chart(Calibration(0.1, (0, 10), (0.0, 0.8), (0.0, accuracy)), "t"),
            0.9,
            0.7,
        ),
    ],
)
def test_charts_are_reproducible_png_files(draw, data, other):
    png = draw(data)
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        assert set(image.info) == {"dpi"}  # neither date nor version
        assert image.width / image.info["dpi"][0] * 96 == pytest.approx(768, abs=1)
    assert draw(data) == png
    assert draw(other) != png


def test_a_confusion_matrix_shows_its_classes_and_counts(figures):
    confusion_chart(ten_classes(), TEN, "a title")
    lines = text_lines(figures)
    assert {"a title", "4 errors in 319 images", "true class", "predicted class"} <= set(lines)
    assert any("of the images of the true class" in line for line in lines)
    assert any("gray row" in line and "without images" in line for line in lines)
    for name in NAMES:
        assert lines.count(name) == 2
    assert {"3", "1", "7", "14", "63"} <= set(lines)
    assert "0" not in lines


def test_the_confusion_of_pixels_shows_percentages_of_the_largest_classes(figures):
    matrix = np.diag(np.arange(10) * 10**9)  # more pixels than int32 can count, and none of the first class
    matrix[9, 1], matrix[9, 8] = 10**9, 2 * 10**9
    pixel_confusion_chart(matrix, TEN, "pixels", largest=2)
    lines = text_lines(figures)
    assert "Percentage of the pixels of each class. 2 classes with 41.7% of all pixels" in lines
    assert {"100", "75", "17", "8", "all other classes"} <= set(lines)  # 9, 2 and 1 of 12 billion pixels
    assert (lines.count("jay"), lines.count("ibis"), lines.count("hen")) == (2, 2, 0)
    pixel_confusion_chart(np.zeros((10, 10), np.int64), TEN, "nothing")
    assert any("0.0% of all pixels" in line for line in text_lines(figures))


def test_for_many_classes_the_most_frequent_errors_are_shown(figures):
    classes, matrix = imagenet(), np.diag(np.full(1000, 50))
    cranes = [i for i, c in enumerate(classes) if c.name == "crane"]
    assert len(cranes) == 2
    matrix[cranes[0], cranes[1]] = 50
    matrix[0, 1:41] = np.arange(41, 1, -1)
    confusion_chart(matrix, classes, "many")
    lines = text_lines(figures)
    assert "910 errors in 50,910 images" in lines
    assert any(re.fullmatch(r"Shown: the 30 .* of 41 .* 833 errors", line) for line in lines)
    pairs = [text for text in lines if text.count(" → ") == 1 and not text.startswith("true class")]
    assert pairs[:2] == [
        f"crane ({classes[cranes[0]].id}) → crane ({classes[cranes[1]].id})",
        "tench → goldfish",
    ]
    assert len(pairs) == 30
    assert "50   (50%)" in lines
    assert "41   (5%)" in lines


def test_charts_without_errors_or_without_images(figures):
    many = tuple(ClassName(str(i), f"class {i}") for i in range(31))
    for matrix, classes, expected in (
        (np.diag([3] * 31), many, "No errors in 93 images"),
        (np.zeros((31, 31), int), many, "No images"),
        (np.diag([1]), many[:1], "No errors in 1 image"),
    ):
        confusion_chart(matrix, classes, "t")
        assert expected in text_lines(figures)


def test_a_matrix_with_a_different_number_of_classes_is_rejected():
    with pytest.raises(DoesNotFit, match=r"\(10, 10\).* 9 classes"):
        confusion_chart(ten_classes(), TEN[:9], "t")


@pytest.mark.parametrize(
    ("bins", "expected"),
    [
        (overconfident(), "Expected calibration error (ECE): 0.1937, 600 images in 15 bins"),
        (Calibration(0.0, (0,) * 15, (0.0,) * 15, (0.0,) * 15), "No images"),
        (
            Calibration(0.2, (10**7, 1), (0.3, 0.8), (0.1, 1.0)),
            "Expected calibration error (ECE): 0.2000, 10,000,001 images in 2 bins",
        ),
    ],
)
def test_a_reliability_diagram_shows_the_error_and_the_counts(figures, bins, expected):
    reliability_chart(bins, "calibrated?")
    lines = set(text_lines(figures))
    assert {expected, "accuracy", "images", "confidence (probability of the predicted class)"} <= lines
    assert {f"{count:,}" for count in bins.counts if count} <= lines


def test_overconfident_and_underconfident_gaps_have_different_colors(figures):
    """Gaps from accuracy to confidence are vermilion if the confidence is too high and sky blue if it is too low."""
    reliability_chart(Calibration(0.2, (10, 10), (0.4, 0.6), (0.1, 0.9)), "t")
    from matplotlib.colors import to_rgb

    gaps = [bar for bar in figures[0].axes[0].patches if bar.get_hatch()]
    assert [to_rgb(bar.get_edgecolor()) for bar in gaps] == [to_rgb("#D55E00"), to_rgb("#56B4E9")]
    ends = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in gaps]
    assert np.allclose(ends, [(0.1, 0.4), (0.9, 0.6)])


def test_unusual_names_are_drawn_without_a_warning(figures):
    classes = tuple(ClassName(f"n{i}", name) for i, name in enumerate(HOSTILE))
    confusion_chart(np.eye(len(classes), dtype=int), classes, "".join(HOSTILE))
    lines = text_lines(figures)
    assert {"$\\nosuch{$", "cat (n5)", "cat (n6)", "n7", "a b c", "n11", "abc"} <= set(lines)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=2, max_size=5))
@example([("q" * 300 + "a", "W" * 300), ("q" * 300 + "b", "W" * 300)])
def test_labels_are_short_and_unique_and_drawn_without_a_warning(pairs):
    from matplotlib.figure import Figure

    with charts.drawing():
        labels = charts._names(tuple(ClassName(identity, name) for identity, name in pairs))
        figure = Figure((0.1, 0.1))
        for label in labels:
            figure.text(0, 0, label)
        figure.savefig(io.BytesIO())
    assert len(set(labels)) == len(pairs)
    # Without left-to-right marks, the arrow between two Hebrew names would point from the second to the first.
    assert all(label.startswith("\u200e") and label.endswith("\u200e") for label in labels)
    assert all(2 < len(label) < 80 for label in labels)


def current_settings():
    # Reading the backend would import pyplot.
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}


def test_user_settings_neither_affect_the_charts_nor_are_changed(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing pyplot fails
    expected = confusion_chart(np.eye(2, dtype=int), TEN[:2], "t")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "text.usetex": True, "axes.grid": True}):
        before = current_settings()
        assert confusion_chart(np.eye(2, dtype=int), TEN[:2], "t") == expected
        assert current_settings() == before


def test_importing_the_report_package_imports_no_extra():
    code = """
import sys, fcvit.report.charts, fcvit.report.page
print([m for m in ("matplotlib", "jinja2") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_without_matplotlib_the_error_names_the_command_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"matplotlib, which is not installed.*pip install 'fcvit\[report\]'"):
        confusion_chart(ten_classes(), TEN, "t")
