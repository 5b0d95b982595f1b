"""Figures of maps: positions, colors and labels."""

import inspect
import io

import numpy as np
import pytest
from PIL import Image

from fcvit.analysis import map_figures as analysis
from fcvit.analysis.map_figures import Scene
from fcvit.report.charts import drawing

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

RAMP = np.linspace(0, 255, 40)[:, None, None] + np.zeros((40, 60, 3))  # from black at the top to white
INPUT = "image (pale: cut off)"  # title of the input image
SEEN = np.arange(60) + 0 * np.arange(40)[:, None] < 50  # the last ten columns are outside of the crop
SCENE = Scene(RAMP.round().astype(np.uint8), SEEN)


def level(row, column, low=0.0, high=1.0):
    """Return a map of the value `low` with a square of the value `high`."""
    values = np.full((40, 60), float(low))
    values[row : row + 10, column : column + 10] = high
    values[:, 50:] = np.nan
    return values


def figure_of(rows, title="a.png: stage 1", subtitle="cat 90%", columns=4, scene=SCENE):
    with drawing():
        return inspect.unwrap(analysis.maps_figure)(scene, rows, title, subtitle, "similarity", columns)


def tiles(figure):
    """Return the pixels of all images in a figure by title, without the color bar."""
    return {axes.get_title(loc="left"): np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images}


def viridis(value):
    from matplotlib import colormaps

    return np.array(colormaps["viridis"](value)[:3])


def gray(row):
    """Return the gray value under a map in a row of the ramp."""
    return 165 + 90 * np.clip((RAMP[row, 0, 0] - np.percentile(RAMP, 1)) / np.ptp(np.percentile(RAMP, [1, 99])), 0, 1)


def test_maps_are_drawn_in_viridis_over_the_gray_image():
    rows = [analysis.Row("", ["head 1", "head 2"], np.stack([level(0, 0), level(30, 40, 0.0, 0.5)]))]
    drawn = tiles(figure_of(rows))
    assert list(drawn) == [INPUT, "head 1", "head 2"]
    for name, corner, value in (("head 1", (5, 5), 1.0), ("head 2", (35, 45), 0.5), ("head 1", (35, 45), 0.0)):
        expected = 0.7 * 255 * viridis(value) + 0.3 * gray(corner[0])
        assert np.abs(drawn[name][corner] - expected).max() <= 2, (name, corner)
    unseen = drawn["head 1"][5, 55]
    assert unseen[0] == unseen[1] == unseen[2] > 230, "no color"
    assert (drawn[INPUT][20, 5] == SCENE.image[20, 5]).all()
    assert (drawn[INPUT][20, 55] == (SCENE.image[20, 55].astype(int) + 3 * 255) // 4).all(), "pale"


@pytest.mark.parametrize("contrast", [1.0, 0.1])
def test_the_image_cannot_be_confused_with_another_value(contrast):
    """The colors of a value over black and over white differ by less than a fifth of the color scale."""
    from matplotlib.colors import Normalize

    scene, scale = Scene((RAMP * contrast).round().astype(np.uint8), SEEN), Normalize(0, 1)
    low, high = (analysis.overlay(scene, np.full((40, 60), value), scale).astype(float) for value in (0.0, 1.0))
    for value in (0.0, 0.5, 1.0):
        shown = analysis.overlay(scene, np.full((40, 60), value), scale).astype(float)
        apart = np.abs(shown[0, 5] - shown[39, 5]).max()
        assert 20 < apart <= 28, "an image with low contrast is equally visible"
    assert np.abs(low - high).max() > 5 * 28


def test_a_single_position_is_labeled_as_no_map():
    no_map = np.full((40, 60), np.nan)
    figure = figure_of([analysis.Row("", ["head 1", "head 2"], np.stack([level(0, 0), no_map]))])
    tile = next(axes for axes in figure.axes if axes.get_title(loc="left") == "head 2")
    assert [text.get_text() for text in tile.texts] == ["one position:\nno map"]
    shown = np.asarray(tile.images[0].get_array()).astype(int)
    assert np.ptp(shown, axis=2).max() == 0, "no color"
    assert shown[20, 5, 0] < shown[20, 55, 0], "pixels outside of the crop are paler"
    other = next(axes for axes in figure.axes if axes.get_title(loc="left") == "head 1")
    assert not other.texts


@pytest.mark.parametrize("values", [np.zeros((40, 60)), np.full((40, 60), 0.238697) + 1e-8 * RAMP[..., 0]])
def test_rounding_errors_of_a_constant_map_do_not_fill_the_color_scale(values):
    (bar,) = [
        axes
        for axes in figure_of([analysis.Row("", ["head 1"], values[None])]).axes
        if axes.get_label() == "<colorbar>"
    ]
    low, high = bar.get_xlim()
    assert high - low == pytest.approx(0.1, rel=1e-3)
    assert all("e" not in text.get_text() for text in bar.get_xticklabels())


def test_all_maps_share_one_labeled_color_scale():
    rows = [analysis.Row(f"stage {n}", ["head 1"], level(0, 0, 0.0, high)[None]) for n, high in ((1, 1.0), (2, 4.0))]
    figure = figure_of(rows)
    (bar,) = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert bar.get_xlabel() == "similarity"
    low, high = bar.get_xlim()
    assert low == pytest.approx(0) and high == pytest.approx(4)
    maps = [axes for axes in figure.axes if axes.get_title(loc="left") == "head 1"]
    assert [axes.get_ylabel() for axes in maps] == ["stage 1", "stage 2"]
    one, four = [np.asarray(axes.images[0].get_array())[5, 5] for axes in maps]
    assert np.abs(one - (0.7 * 255 * viridis(0.25) + 0.3 * gray(5))).max() <= 3
    assert four[0] > one[0]


def test_each_head_can_have_its_own_color_range():
    no_map = np.full((40, 60), np.nan)
    row = analysis.Row(
        "x",
        ["head 1", "head 2", "head 3", "head 4"],
        np.stack([level(0, 0, -2, 6), level(0, 0, 0, 0.5), level(0, 0, 3, 3), no_map]),
    )
    scaled = analysis.own_range(row)
    assert scaled.names == ["head 1 (-2.0 to 6.0)", "head 2 (0.0 to 0.5)", "head 3 (3.0 to 3.1)", "head 4"]
    assert np.allclose(scaled.maps[:2, 5, 5], 1) and np.allclose(scaled.maps[:3, 35, 45], 0), "each from 0 to 1"
    assert scaled.name == "x" and np.isnan(scaled.maps[3]).all()


def test_nan_does_not_change_the_colors_of_other_maps():
    rows = [analysis.Row("", ["a", "b"], np.stack([level(0, 0), np.full((40, 60), np.nan)]))]
    drawn = tiles(figure_of(rows))
    assert np.abs(drawn["a"][5, 5] - drawn["a"][35, 45].astype(float)).max() > 50


def test_a_single_row_is_wrapped():
    rows = [analysis.Row("", [f"head {n}" for n in range(1, 9)], np.stack([level(0, 0)] * 8))]
    figure = figure_of(rows)
    cell = {axes.get_title(loc="left"): axes.get_subplotspec() for axes in figure.axes if axes.images}
    position = {name: (spec.rowspan.start, spec.colspan.start) for name, spec in cell.items()}
    assert position.pop(INPUT) == (0, 0)
    assert position == {f"head {n + 1}": (n // 4, 1 + n % 4) for n in range(8)}


@pytest.mark.parametrize("shape", [(40, 21), (21, 40)])
@pytest.mark.slow
def test_labels_do_not_overlap_for_any_image_shape(shape):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    scene = Scene(np.zeros((*shape, 3), np.uint8), np.ones(shape, bool))
    row = analysis.Row("", [f"head {n} (-2.0 to 3.1)" for n in range(1, 9)], np.zeros((8, *shape)))
    figure = figure_of([row], scene=scene)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [axes._left_title for axes in figure.axes if axes.get_title(loc="left")] + [figure._suptitle]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


@pytest.mark.parametrize("count", [1, 6, 7, 30])
def test_an_overview_shows_each_image_with_its_maps_and_one_color_bar(count):
    no_map = np.full((40, 60), np.nan)
    panels = [
        analysis.Panel(
            f"{n}.png: cat 5%",
            Scene(np.full((40, 60, 3), n, np.uint8), SEEN),
            np.stack([*[level(0, 0, 0, n + 1)] * 3, no_map]),
        )
        for n in range(count)
    ]
    with drawing():
        figure = inspect.unwrap(analysis.maps_overview)(
            panels, [f"stage {n}" for n in range(1, 5)], "thirty", "similarity"
        )
    axes, bar = figure.axes
    assert bar.get_xlabel() == "similarity"
    pasted, texts = (
        np.asarray(axes.images[0].get_array()),
        [(text.get_text(), *text.get_position()) for text in axes.texts],
    )
    titles = {text: (x, y) for text, x, y in texts if "cat" in text}
    assert list(titles) == [f"{n}.png: cat 5%" for n in range(count)]
    assert sum(text == "stage 1" for text, *_ in texts) == (1 if count <= 6 else 2)
    assert sum(text.startswith("one position") for text, *_ in texts) == count
    for n, (x, y) in enumerate(titles.values()):
        assert pasted[y + 11, x + 6].tolist() == [n] * 3, "each image below its title"
        assert np.ptp(pasted[y + 11, x + 6 + 74].astype(int)) > 20, "a map to the right of it"


def test_figures_are_returned_as_png_files():
    row = analysis.Row("", ["head 1"], level(0, 0)[None])
    with Image.open(io.BytesIO(analysis.maps_figure(SCENE, [row], "a", "b", "c"))) as image:
        assert image.format == "PNG" and image.width > 900
    panel = analysis.Panel("a", SCENE, level(0, 0)[None])
    with Image.open(io.BytesIO(analysis.maps_overview([panel], ["stage 1"], "a", "b"))) as image:
        assert image.format == "PNG"
