"""What labels mean: indices, ids or names, and never numbers sorted as text."""

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


@pytest.mark.parametrize("form", ["{}", "{}.0", "0{}", "{}e0", "{:.18e}", "+{}", "{}."])
def test_whole_numbers_are_indices_however_they_are_written(form):
    values = [form.format(i) for i in range(12)]
    assert labels(values, None, 12) == (list(range(12)), "the numbers in list.txt are class indices")


@given(st.sets(st.integers(0, 29), min_size=1))
@settings(derandomize=True, max_examples=50, deadline=None)
def test_numbers_are_never_counted_as_text(indices):
    assert labels([f"{i}.0" for i in indices], None, 30)[0] == list(indices)


@pytest.mark.parametrize("ids", [("0", "90", "180", "270"), ("1950", "1951", "1952", "1953"), ("1", "2", "3", "4")])
def test_numbers_that_can_only_be_ids_are_ids(ids):
    assignment = labels(ids, named(*ids), 4)
    assert assignment == ([0, 1, 2, 3], "the numbers in list.txt are the model's class ids")
    assert labels(ids[::-1], named(*"abcd", names=ids), 4)[1] == "the numbers in list.txt are the model's class names"
    assert labels([f"{ids[3]}.0", ids[0]], named(*ids), 4)[0] == [3, 0]


def test_numbers_that_can_be_both_are_refused():
    classes = named("0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9")  # folders, sorted as text
    for values in (["10", "2"], ["2.0"], ["0", "1", "3"]):
        with pytest.raises(DoesNotFit, match=r"the index of a class, or the id of class .* --classes FILE"):
            labels(values, classes, 12)
    assert labels(["0", "1"], classes, 12)[0] == [0, 1]
    with pytest.raises(DoesNotFit, match="is 1 the index of a class, or the name of class 0"):
        labels(["1"], named("a", "b", names=("1", "0")), 2)


@pytest.mark.parametrize(
    ("values", "classes", "message"),
    [
        (["1", "2", "3", "4"], None, "class 4 .* expected 0 to 3; they count from 1: subtract 1 from each"),
        (["-1", "0", "2"], None, "class -1 .*; leave out images without a class"),
        (["0", "0.5"], None, "class 0.5 .*; an index is a whole number"),
        (["0", "7"], named(*"abcd"), r"class 7 .*, and no ids of its classes \(a, b, c, d\)"),
        (["0", "90", "91"], named("0", "90", "180", "270"), "class 90, 91"),
        (["1e999"], None, "class 1e999"),
        pytest.param(["9" * 5000], None, "class 9999", id="long"),
        (["10", "2", "cat", "dog"], None, "sorted as text"),
    ],
)
def test_numbers_that_are_no_classes_are_refused(values, classes, message):
    with pytest.raises(DoesNotFit, match=message) as caught:
        labels(values, classes, 4)
    assert len(str(caught.value)) < 500


def test_the_devkits_numbers_are_named():
    with pytest.raises(DoesNotFit, match=r"count from 1.*devkit has another order: write WordNet ids"):
        labels([str(i) for i in range(1, 1001)], None, 1000)


@pytest.mark.parametrize("folders", [["0.0", "1.0", "10.0", "2.0"], ["-1", "-2", "0"], ["0", "180", "270", "90"]])
def test_folders_that_are_numbers_are_not_sorted_as_text(folders):
    with pytest.raises(DoesNotFit, match="sorted as text"):
        assign_classes(folders, None, len(folders), "class folders")


def test_letters_match_composed_or_not():
    names = ["café", "zéro", "één"]
    composed, apart = ([unicodedata.normalize(form, name) for name in names] for form in ("NFC", "NFD"))
    for known, given_names in ((composed, apart), (apart, composed)):
        assignment = assign_classes(sorted(given_names), named(*known), 3, "class folders")
        assert [assignment.mapping[name] for name in given_names] == [0, 1, 2] and "class ids" in assignment.rule
    both = named(composed[0], apart[0])  # two classes: only the exact form tells them apart
    assignment = assign_classes(sorted([apart[0], composed[0]]), both, 2, "class folders")
    assert assignment.mapping == {composed[0]: 0, apart[0]: 1}


def test_the_rule_says_where_numbers_in_names_are_sorted_as_text():
    labels = sorted(f"class_{number}" for number in range(12))
    assert assign_classes(labels, None, 12, "class folders").rule.endswith("as text: class_10 before class_2")
    assert assign_classes(["a", "b"], None, 2, "class folders").rule.endswith("are counted in sorted order")
