"""Test the mapping of labels to class indices: indices, ids or names, but not numbers sorted as text."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcvit.data.class_indices import assign_classes, assign_labels
from fcvit.data.classes import ClassName
from fcvit.errors import DoesNotFit


def named(*ids, names=None):
    return tuple(map(ClassName, ids, names or ids))


def labels(values, classes, count):
    assignment = assign_labels(sorted(values), classes, count, Path("list.txt"))
    assert not assignment.counted
    return [assignment.mapping[value] for value in values], assignment.rule


@pytest.mark.parametrize("style", ["{}", "{}.0", "0{}", "{}e0", "{:.18e}", "+{}", "{}."])
def test_integers_are_indices_in_any_notation(style):
    values = [style.format(i) for i in range(12)]
    assert labels(values, None, 12) == (list(range(12)), "the numbers in list.txt are class indices")


@given(st.sets(st.integers(0, 29), min_size=1))
@settings(derandomize=True, max_examples=50, deadline=None)
def test_numbers_are_not_sorted_as_text(indices):
    assert labels([f"{i}.0" for i in indices], None, 30)[0] == list(indices)


@pytest.mark.parametrize("ids", [("0", "90", "180", "270"), ("1950", "1951", "1952", "1953"), ("1", "2", "3", "4")])
def test_numbers_that_can_only_be_ids_are_ids(ids):
    assignment = labels(ids, named(*ids), 4)
    assert assignment == ([0, 1, 2, 3], "the numbers in list.txt are the model's class ids")
    assert labels(ids[::-1], named(*"abcd", names=ids), 4)[1] == "the numbers in list.txt are the model's class names"
    assert labels([f"{ids[3]}.0", ids[0]], named(*ids), 4)[0] == [3, 0]


def test_numbers_that_can_be_indices_or_ids_are_rejected():
    classes = named("0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9")  # folders, sorted as text
    for values in (["10", "2"], ["2.0"], ["0", "1", "3"]):
        with pytest.raises(DoesNotFit, match=r"class index or the id of class .* --classes FILE"):
            labels(values, classes, 12)
    assert labels(["0", "1"], classes, 12)[0] == [0, 1]
    with pytest.raises(DoesNotFit, match="1 can be a class index or the name of class 0"):
        labels(["1"], named("a", "b", names=("1", "0")), 2)


@pytest.mark.parametrize(
    ("values", "classes", "message"),
    [
        (["1", "2", "3", "4"], None, "class 4 .* 0 to 3; .* 1, so subtract 1"),
        (["-1", "0", "2"], None, "class -1 .*; remove images without a class"),
        (["0", "0.5"], None, r"class 0\.5 .*; use integers"),
        (["0", "7"], named(*"abcd"), r"class 7 .* class id .*\(a, b, c, d\)"),
        (["0", "90", "91"], named("0", "90", "180", "270"), "class 90, 91"),
        (["1e999"], None, "class 1e999"),
        pytest.param(["9" * 5000], None, "class 9999", id="long"),
        (["10", "2", "cat", "dog"], None, "order as text"),
    ],
)
def test_numbers_that_are_not_classes_are_rejected(values, classes, message):
    with pytest.raises(DoesNotFit, match=message) as caught:
        labels(values, classes, 4)
    assert len(str(caught.value)) < 500


def test_the_message_mentions_the_numbers_of_imagenets_devkit():
    with pytest.raises(DoesNotFit, match=r"subtract 1.*devkit.*WordNet ids"):
        labels([str(i) for i in range(1, 1001)], None, 1000)


@pytest.mark.parametrize("folders", [["0.0", "1.0", "10.0", "2.0"], ["-1", "-2", "0"], ["0", "180", "270", "90"]])
def test_numeric_folder_names_with_an_ambiguous_order_are_rejected(folders):
    with pytest.raises(DoesNotFit, match=r"class folders are numbers, .*order as text.*--classes"):
        assign_classes(folders, None, len(folders), "class folders")


def test_composed_and_decomposed_letters_are_equal():
    names = ["café", "zéro", "één"]
    composed, decomposed = ([unicodedata.normalize(form, name) for name in names] for form in ("NFC", "NFD"))
    for known, given_names in ((composed, decomposed), (decomposed, composed)):
        assignment = assign_classes(sorted(given_names), named(*known), 3, "class folders")
        assert [assignment.mapping[name] for name in given_names] == [0, 1, 2] and "class ids" in assignment.rule
    both = named(composed[0], decomposed[0])  # two classes that differ only in the Unicode form
    assignment = assign_classes(sorted([decomposed[0], composed[0]]), both, 2, "class folders")
    assert assignment.mapping == {composed[0]: 0, decomposed[0]: 1}


def test_the_rule_mentions_numbers_in_names_that_are_sorted_as_text():
    labels = sorted(f"class_{number}" for number in range(12))
    assert "as text: class_10 before class_2" in assign_classes(labels, None, 12, "class folders").rule
    assert assign_classes(["a", "b"], None, 2, "class folders").rule.endswith("in sorted order")
