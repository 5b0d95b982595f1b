"""Charts and tables of attention statistics and faithfulness: every value has the right label."""

import inspect

import pytest

from fcvit.analysis import map_charts as analysis
from fcvit.analysis.faithfulness import STEPS, Curves, Estimate, Faithfulness
from fcvit.analysis.head_stats import HeadStats, LayerStats
from fcvit.report.charts import drawing

NAN = float("nan")


def figure_of(draw, *arguments):
    """Return the figure of a chart, before it becomes a PNG file."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    with drawing():
        return inspect.unwrap(draw)(*arguments)


@pytest.mark.slow
@pytest.mark.charts
def test_the_depth_chart_draws_each_measure_for_first_and_second_contexts():
    names = ["stage1.block1.context1", "stage1.block1.context2", "stage2.block1.context1", "stage2.block1.context2"]
    layers = [LayerStats(name, *(number + field / 10 for field in range(7))) for number, name in enumerate(names)]
    assert analysis.depth_chart("net", layers, 12).startswith(b"\x89PNG")
    figure = figure_of(analysis.depth_chart, "net", layers, 12)
    expected = ((0, None), (1, 3), (2, 4), (5, None), (6, None))  # index of the field of each measure and of its noise
    for axes, (field, noise) in zip(figure.axes, expected, strict=True):
        drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        assert drawn["first contexts"] == ([0, 2], [0 + field / 10, 2 + field / 10])
        assert drawn["second contexts"] == ([1, 3], [1 + field / 10, 3 + field / 10])
        assert ("noise, first contexts" in drawn) == (noise is not None)
        if noise is not None:
            assert drawn["noise, second contexts"] == ([1, 3], [1 + noise / 10, 3 + noise / 10])
        assert list(axes.lines[-1].get_xdata()) == [1.5, 1.5], "line between two stages"
    labels = [tick.get_text() for tick in figure.axes[-1].get_xticklabels()]
    assert labels == ["1.1.1", "1.1.2", "2.1.1", "2.1.2"]
    assert figure.legends and "12 images" in figure.get_suptitle()


def curves(name, start):
    """Return curves and estimates that all start at different values."""
    all_curves = [tuple(start + number + step / STEPS for step in range(STEPS)) for number in range(6)]
    estimates = [Estimate(start + number / 100, start - 1, start + 1) for number in range(5)]
    return Curves(name, *all_curves, *estimates)


@pytest.mark.slow
@pytest.mark.charts
def test_the_faithfulness_chart_draws_each_curve_in_the_right_panel():
    one, other = curves("stage1.block1.context2", 0.0), curves("occlusion", 0.5)
    figure = figure_of(analysis.faithfulness_chart, [one, other], "title", 12)
    assert analysis.faithfulness_chart([one, other], "title", 12).startswith(b"\x89PNG")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["1.1.2", "occlusion", "", ""]
    highest = max(max(line.get_ydata()) for axes in figure.axes for line in axes.lines)
    assert all(axes.get_ylim()[1] > highest for axes in figure.axes), "no curve is cut off"
    assert figure.axes[0].get_ylabel() == "deletion" and figure.axes[2].get_ylabel() == "insertion"
    for axes, expected, kind in zip(
        figure.axes, (one, other, one, other), ("deletion",) * 2 + ("insertion",) * 2, strict=True
    ):
        assert ("removed" if kind == "deletion" else "restored") in axes.get_xlabel()
        assert {line.get_label(): tuple(line.get_ydata()) for line in axes.lines} == {
            "the map": getattr(expected, kind),
            "random maps": getattr(expected, f"random_{kind}"),
            "another image's map": getattr(expected, f"other_{kind}"),
        }


@pytest.mark.charts
@pytest.mark.parametrize(("count", "across"), [(9, 9), (17, 8)])
@pytest.mark.slow
def test_many_maps_are_wrapped_into_several_rows(count, across):
    figure = figure_of(analysis.faithfulness_chart, [curves(f"{n}", 0.0) for n in range(count)], "title", 12)
    drawn = [axes for axes in figure.axes if axes.lines]
    assert len(drawn) == 2 * count and figure.axes[0].get_gridspec().ncols == across


def cells(table):
    return {str(column.header).strip(): list(column.cells) for column in table.columns}


def test_the_statistics_table_has_each_value_in_the_right_column():
    layer = LayerStats("stage3.block2.context1", 0.1, 0.2, 0.3, 0.4, 0.5, NAN, 0.7)
    (table,) = HeadStats("fcvit_tiny", 12, (layer,)).tables()
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
    single_position = LayerStats("stage4.block1.context1", *[NAN] * 7)
    (table2,) = HeadStats("x", 1, (single_position,)).tables()
    assert [list(column.cells) for column in table2.columns][:3] == [["4.1.1"], ["one position"], [""]]
    headers = [str(column.header).strip() for column in table.columns]
    noise = [("noise" in header) for header in headers[1:]]
    assert noise == [False, False, True, False, True, False, False]
    for header, word in zip(headers[1:], ("head", "entropy", "entropy", "top", "top", "layer", "query"), strict=True):
        assert word in header
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
def test_an_estimate_has_two_significant_digits_and_no_negative_zero(estimate, expected):
    assert str(estimate) == expected


def test_the_faithfulness_tables_have_each_value_in_the_right_column():
    one = curves("stage1.block1.context2", 0.25)
    last = curves("occlusion", 0.5)
    last = Curves(**{**vars(last), "occlusion": Estimate(NAN, NAN, NAN)})
    deletion, insertion, ranks = Faithfulness("net", 12, "signed", (one, last)).tables()
    assert "deletion" in deletion.title and "insertion" in insertion.title and "occlusion" in ranks.title

    def text(value):
        return f"{value:+.3f} (-0.750 to +1.250)"

    assert cells(deletion)["over random maps"][0] == text(one.deletion_over_random.mean)
    assert cells(deletion)["over another image's map"][0] == text(one.deletion_over_other.mean)
    assert cells(insertion)["over random maps"][0] == text(one.insertion_over_random.mean)
    assert cells(insertion)["over another image's map"][0] == text(one.insertion_over_other.mean)
    assert cells(ranks) == {"map": ["1.1.2"], "rank correlation": [text(one.occlusion.mean)]}
