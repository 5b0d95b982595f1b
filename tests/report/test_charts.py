"""Charts: what stands in them, and that no name and no setting can spoil one."""

import io
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
from fcvit.report.charts import confusion_chart, reliability_chart

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


def ten(mistake=3):
    matrix = np.diag(np.arange(10) * 7)  # no image of the first class
    matrix[2, 3], matrix[9, 1] = mistake, 1
    return matrix


def too_sure():
    confidence = np.linspace(0.001, 1, 600)
    return calibration(confidence, np.arange(600) % 10 / 10 < confidence**3)


@pytest.fixture
def figures(monkeypatch):
    """The figures of the charts that the test draws."""
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *given, **how: drawn.append(figure) or save(figure, *given, **how)
    )
    return drawn


def words(figures):
    """What stands in the charts."""
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
def test_a_chart_is_a_png_the_same_bytes_twice_and_others_of_other_data(draw, data, other):
    png = draw(data)
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        assert set(image.info) == {"dpi"}  # no date, no version
        assert image.width / image.info["dpi"][0] * 96 == pytest.approx(768, abs=1)
    assert draw(data) == png
    assert draw(other) != png


def test_a_matrix_names_its_classes_and_writes_its_counts(figures):
    confusion_chart(ten(), TEN, "a title")
    found = words(figures)
    assert {"a title", "4 mistakes in 319 images", "true class", "predicted class"} <= set(found)
    assert "share of the true class's images" in found
    assert "A gray row is a class without images." in found
    for name in NAMES:
        assert found.count(name) == 2
    assert {"3", "1", "7", "14", "63"} <= set(found)
    assert "0" not in found


def test_of_many_classes_the_worst_pairs_are_shown(figures):
    classes, matrix = imagenet(), np.diag(np.full(1000, 50))
    cranes = [i for i, c in enumerate(classes) if c.name == "crane"]
    assert len(cranes) == 2
    matrix[cranes[0], cranes[1]] = 50
    matrix[0, 1:41] = np.arange(41, 1, -1)
    confusion_chart(matrix, classes, "many")
    found = words(figures)
    assert "910 mistakes in 50,910 images" in found
    assert "Shown: the 30 most frequent of 41 pairs of classes, 833 mistakes" in found
    pairs = [text for text in found if text.count(" → ") == 1 and not text.startswith("true class")]
    assert pairs[:2] == [
        f"crane ({classes[cranes[0]].id}) → crane ({classes[cranes[1]].id})",
        "tench → goldfish",
    ]
    assert len(pairs) == 30
    assert "50   (50 %)" in found
    assert "41   (5 %)" in found


def test_no_mistakes_and_no_images_are_said(figures):
    many = tuple(ClassName(str(i), f"class {i}") for i in range(31))
    for matrix, classes, said in (
        (np.diag([3] * 31), many, "No mistakes in 93 images"),
        (np.zeros((31, 31), int), many, "No images"),
        (np.diag([1]), many[:1], "No mistakes in 1 image"),
    ):
        confusion_chart(matrix, classes, "t")
        assert said in words(figures)


def test_a_matrix_of_another_size_is_refused():
    with pytest.raises(DoesNotFit, match=r"\(10, 10\) for 9 classes"):
        confusion_chart(ten(), TEN[:9], "t")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (too_sure(), "Expected calibration error (ECE): 19.37 %, 600 images in 15 bins"),
        (Calibration(0.0, (0,) * 15, (0.0,) * 15, (0.0,) * 15), "No images"),
        (
            Calibration(0.2, (10**7, 1), (0.3, 0.8), (0.1, 1.0)),
            "Expected calibration error (ECE): 20.00 %, 10,000,001 images in 2 bins",
        ),
    ],
)
def test_reliability_says_its_error_and_its_counts(figures, found, said):
    reliability_chart(found, "calibrated?")
    assert {said, "accuracy", "images", "confidence: probability of the predicted class"} <= set(words(figures))
    assert {f"{count:,}" for count in found.counts if count} <= set(words(figures))


def test_the_gap_shows_its_direction(figures):
    """Vermilion where confidence is too high, sky blue where it is too low; both from accuracy to confidence."""
    reliability_chart(Calibration(0.2, (10, 10), (0.4, 0.6), (0.1, 0.9)), "t")
    from matplotlib.colors import to_rgb

    gaps = [bar for bar in figures[0].axes[0].patches if bar.get_hatch()]
    assert [to_rgb(bar.get_edgecolor()) for bar in gaps] == [to_rgb("#D55E00"), to_rgb("#56B4E9")]
    ends = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in gaps]
    assert np.allclose(ends, [(0.1, 0.4), (0.9, 0.6)])


def test_hostile_names_are_drawn_without_a_warning(figures):
    classes = tuple(ClassName(f"n{i}", name) for i, name in enumerate(HOSTILE))
    confusion_chart(np.eye(len(classes), dtype=int), classes, "".join(HOSTILE))
    found = words(figures)
    assert {"$\\nosuch{$", "cat (n5)", "cat (n6)", "n7", "a b c", "n11", "abc"} <= set(found)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=2, max_size=5))
@example([("q" * 300 + "a", "W" * 300), ("q" * 300 + "b", "W" * 300)])
def test_labels_are_short_no_two_alike_and_drawn_without_a_warning(pairs):
    from matplotlib.figure import Figure

    with charts.drawing():
        labels = charts._names(tuple(ClassName(identity, name) for identity, name in pairs))
        figure = Figure((0.1, 0.1))
        for label in labels:
            figure.text(0, 0, label)
        figure.savefig(io.BytesIO())
    assert len(set(labels)) == len(pairs)
    # Left-to-right marks: between two Hebrew names the arrow would point from the second to the first.
    assert all(label.startswith("\u200e") and label.endswith("\u200e") for label in labels)
    assert all(2 < len(label) < 80 for label in labels)


def set_now():
    # Only to ask for the backend would load pyplot.
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}


def test_a_users_settings_neither_change_the_chart_nor_are_changed(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # may not be imported
    usual = confusion_chart(np.eye(2, dtype=int), TEN[:2], "t")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "text.usetex": True, "axes.grid": True}):
        before = set_now()
        assert confusion_chart(np.eye(2, dtype=int), TEN[:2], "t") == usual
        assert set_now() == before


def test_importing_the_report_loads_neither_extra():
    code = """
import sys, fcvit.report.charts, fcvit.report.page
print([m for m in ("matplotlib", "jinja2") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"matplotlib, which is not installed.*pip install 'fcvit\[report\]'"):
        confusion_chart(ten(), TEN, "t")
