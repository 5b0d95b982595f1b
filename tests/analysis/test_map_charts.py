"""Charts and tables of what maps measure, read back: every figure under its own name."""

import pytest
from fcvit.analysis.heads import Heads, Measures, NetworkMeasures
from fcvit.analysis.trust import STEPS, Curves, Estimate, Trust

from fcvit.analysis import map_charts as task
from fcvit.report import tables
from fcvit.report.charts import drawing

NAN = float("nan")


def lines(axes):
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


@pytest.mark.charts
def test_measures_over_depth_stand_side_by_side_on_one_scale():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    one = task.Depth("fcvit_tiny", ["1.1.1", "1.1.2"], [task.Line("a", [0, 1]), task.Line("b", [5, NAN], [7, 8])])
    other = task.Depth("vit", ["1", "2", "3"], [task.Line("a", [0, 3, 2]), task.Line("b", [1, 2, 3], [4, 5, 6])])
    with drawing():
        figure = task._depth([one, other], 12)
        assert task.depth_chart([one, other], 12).startswith(b"\x89PNG")
    by_place = sorted(figure.axes, key=lambda axes: (-axes.get_position().y0, axes.get_position().x0))
    assert [axes.get_title(loc="left") for axes in by_place] == ["a", "a", "b", "b"]
    assert [list(axes.lines[0].get_ydata()) for axes in by_place[:3]] == [
        [0, 1],
        [0, 3, 2],
        pytest.approx([5, NAN], nan_ok=True),
    ]
    assert lines(by_place[2])["noise"] == [7, 8] and len(by_place[0].lines) == 1
    assert by_place[0].get_ylim() == by_place[1].get_ylim() and by_place[2].get_ylim() == by_place[3].get_ylim()
    assert [tick.get_text() for tick in by_place[2].get_xticklabels()] == ["1.1.1", "1.1.2"]
    assert figure.legends, "what the lines are"
    assert any("12 images" in text.get_text() for text in figure.texts)


@pytest.mark.charts
def test_first_and_second_contexts_are_lines_of_their_own():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    names = ["1.1.1", "1.1.2", "2.1.1", "2.1.2"]
    groups = ["first contexts", "second contexts"] * 2
    one = task.Depth("net", names, [task.Line("a", [1, 2, 3, 4], [5, 6, 7, 8])], groups, [2])
    with drawing():
        (axes,) = task._depth([one], 3).axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert drawn["first contexts"] == ([0, 2], [1, 3]) and drawn["second contexts"] == ([1, 3], [2, 4])
    assert drawn["noise first contexts"] == ([0, 2], [5, 7]) and drawn["noise second contexts"] == ([1, 3], [6, 8])
    assert [list(line.get_xdata()) for line in axes.lines][-1] == [1.5, 1.5], "the end of a stage"


def curves(name, start):
    """Seven curves, told apart by where they begin."""
    found = [tuple(start + number + step / STEPS for step in range(STEPS)) for number in range(6)]
    estimates = [Estimate(start + number / 100, start - 1, start + 1) for number in range(5)]
    return Curves(name, *found, *estimates)


@pytest.mark.charts
def test_curves_and_their_controls_are_drawn_where_they_belong():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    one, other = curves("stage1.block1.context2", 0.0), curves("occlusion", 0.5)
    with drawing():
        figure = task._trust([one, other], "title", 12)
        assert task.trust_chart([one, other], "title", 12).startswith(b"\x89PNG")
    by_place = sorted(figure.axes, key=lambda axes: (-axes.get_position().y0, axes.get_position().x0))
    assert [axes.get_title(loc="left") for axes in by_place] == ["1.1.2", "occlusion", "", ""]
    highest = max(max(line.get_ydata()) for axes in by_place for line in axes.lines)
    assert all(axes.get_ylim()[1] > highest for axes in by_place), "no curve is cut off"
    assert by_place[0].get_ylabel() == "deletion" and by_place[2].get_ylabel() == "insertion"
    for axes, expected, what in zip(
        by_place, (one, other, one, other), ("deletion",) * 2 + ("insertion",) * 2, strict=True
    ):
        assert ("removed" if what == "deletion" else "returned") in axes.get_xlabel()
        assert lines(axes) == {
            "the map": list(getattr(expected, what)),
            "random maps": list(getattr(expected, f"random_{what}")),
            "another image's map": list(getattr(expected, f"other_{what}")),
        }


@pytest.mark.charts
@pytest.mark.parametrize(("count", "across"), [(9, 9), (65, 8)])
def test_many_maps_are_broken_into_bands(count, across):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    with drawing():
        figure = task._trust([curves(f"{n}", 0.0) for n in range(count)], "title", 12)
    boxes = [axes.get_position() for axes in figure.axes]
    assert len({round(box.x0, 6) for box in boxes}) == across and len(boxes) == 2 * count
    assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)


def cells(table):
    return {str(column.header).strip(): list(column.cells) for column in table.columns}


def test_the_table_of_heads_has_each_figure_in_its_column():
    layer = Measures("stage3.block2.context1", 0.1, 0.2, 0.3, 0.4, 0.5, NAN, 0.7)
    (table,) = tables.heads(Heads(12, (NetworkMeasures("fcvit_tiny", (layer,)),), (), None))
    assert table.title == "fcvit_tiny, 12 images"
    assert [list(column.cells) for column in table.columns] == [
        ["3.2.1"],
        ["0.100"],
        ["0.200"],
        ["0.400"],
        ["0.300"],
        ["0.500"],
        [""],
        ["0.700"],
    ]
    alone = Measures("stage4.block1.context1", *[NAN] * 7)
    (table2,) = tables.heads(Heads(1, (NetworkMeasures("x", (alone,)),), (), None))
    assert [list(column.cells) for column in table2.columns][:3] == [["4.1.1"], ["one position"], [""]]
    headers = [str(column.header).strip() for column in table.columns]
    assert headers[1:] == ["between heads", "entropy", "of noise", "top tenth", "of noise", "kept", "queries agree"]
    assert layer.noise_entropy == 0.4 and layer.top_decile == 0.3


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (Estimate(0.0004, -0.00002, 0.0009), "+0.00040 (-0.00002 to +0.00090)"),
        (Estimate(-0.0001, -0.2, 0.2), "+0.000 (-0.200 to +0.200)"),
        (Estimate(0.5, 0.5, 0.5), "+0.500 (+0.500 to +0.500)"),
        (Estimate(NAN, NAN, NAN), ""),
    ],
)
def test_an_estimate_has_the_digits_that_count_and_no_minus_nothing(estimate, expected):
    assert tables._estimate(estimate) == expected


def test_the_tables_of_trust_have_each_figure_in_its_column():
    one = curves("stage1.block1.context2", 0.25)
    last = curves("occlusion", 0.5)
    last = Curves(**{**vars(last), "occlusion": Estimate(NAN, NAN, NAN)})
    deletion, insertion, ranks = tables.trust(Trust("net", 12, "signed", (one, last), (), None))
    assert "deletion" in deletion.title and "insertion" in insertion.title and "occlusion" in ranks.title

    def text(value):
        return f"{value:+.3f} (-0.750 to +1.250)"

    assert cells(deletion)["random maps"][0] == text(one.deletion_over_random.mean)
    assert cells(deletion)["another image's"][0] == text(one.deletion_over_other.mean)
    assert cells(insertion)["random maps"][0] == text(one.insertion_over_random.mean)
    assert cells(insertion)["another image's"][0] == text(one.insertion_over_other.mean)
    assert cells(ranks) == {"map": ["1.1.2"], "rank correlation": [text(one.occlusion.mean)]}
