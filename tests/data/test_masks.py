"""Test that masks in COCO's forms are read as pycocotools reads them, and that hostile ones never reach its C code."""

import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fcvit.data import masks
from fcvit.data.masks import decode_segmentation, encode_segmentation, mask_area, parse_segmentation
from fcvit.errors import MissingExtra

tools = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")

bitmaps = arrays.arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 1))


def decoded(value):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return tools.decode(value)


def compressed(mask):
    encoded = tools.encode(np.asfortranarray(mask))
    return {"size": [*map(int, encoded["size"])], "counts": encoded["counts"].decode()}


def run_lengths(mask, generator=None):
    """Return uncompressed run lengths, optionally with empty runs in between, which mean the same."""
    pixels = mask.ravel("F")
    borders = np.nonzero(np.diff(pixels, prepend=0))[0]
    counts = np.diff(borders, prepend=0, append=pixels.size).tolist()
    for _ in range(generator.integers(0, 4) if generator else 0):
        position = int(generator.integers(0, len(counts) + 1))
        if position < len(counts) and counts[position]:
            part = int(generator.integers(0, counts[position] + 1))
            counts[position : position + 1] = [part, 0, counts[position] - part]
    return {"size": [*mask.shape], "counts": counts}


@pytest.mark.slow
@given(bitmaps, st.integers(1, 90), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_both_forms_of_run_lengths_give_the_mask(mask, factor, seed):
    mask = mask.repeat(factor, 0).repeat(factor, 1)
    for value in (compressed(mask), run_lengths(mask), run_lengths(mask, np.random.default_rng(seed))):
        read = parse_segmentation(value, mask.shape)
        assert np.array_equal(decode_segmentation(read, mask.shape), mask)
        encoded = encode_segmentation(read, mask.shape)
        assert encoded["counts"].decode() == compressed(mask)["counts"] and mask_area(read) == mask.sum()


@pytest.mark.slow
@given(st.text(st.characters(max_codepoint=300), max_size=12), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=500, deadline=None)
def test_any_text_is_run_lengths_or_an_error(text, height, width):
    try:
        read = parse_segmentation({"size": [height, width], "counts": text}, (height, width))
    except ValueError:
        return
    assert read.sum() == height * width and read[1:].all()
    expected = decoded({"size": [height, width], "counts": text})
    assert np.array_equal(decode_segmentation(read, (height, width)), expected)


@pytest.mark.slow
@given(bitmaps, st.integers(0, 50), st.characters(min_codepoint=40, max_codepoint=120))
@settings(max_examples=300, deadline=None)
def test_a_damaged_text_is_read_as_pycocotools_does_or_rejected(mask, position, character):
    value = compressed(mask)
    position %= len(value["counts"])
    value["counts"] = value["counts"][:position] + character + value["counts"][position + 1 :]
    try:
        read = parse_segmentation(value, mask.shape)
    except ValueError:
        return
    assert np.array_equal(decode_segmentation(read, mask.shape), decoded(value))


polygons = st.lists(st.lists(st.floats(-30, 60, width=32), min_size=6, max_size=16), min_size=1, max_size=4)


@pytest.mark.slow
@given(polygons)
@settings(max_examples=200, deadline=None)
def test_polygons_are_rasterized_and_merged_as_by_pycocotools(parts):
    even = [part[: len(part) // 2 * 2] for part in parts]
    read = parse_segmentation(even, (31, 23))
    expected = tools.merge(tools.frPyObjects(even, 31, 23))
    assert encode_segmentation(read, (31, 23)) == expected
    assert np.array_equal(decode_segmentation(read, (31, 23)), decoded(expected))


def test_short_polygons_are_left_out():
    """pycocotools takes a polygon of four numbers for a box."""
    square = [1, 1, 5, 1, 5, 5, 1, 5]
    (read,) = parse_segmentation([[0, 0, 9, 9], square, [3, 3], []], (8, 8))
    assert read.tolist() == square
    assert parse_segmentation([[0, 0, 9, 9]], (8, 8)) is None
    assert parse_segmentation([], (8, 8)) is None and parse_segmentation(None, (8, 8)) is None


def test_areas_without_rasterizing():
    assert mask_area(parse_segmentation([[0, 0, 4, 0, 4, 3, 0, 3], [5, 5, 7, 5, 5, 7]], (9, 9))) == 14


NAN, INFINITY = float("nan"), float("inf")
LONG = [0.0, 0.0, 0.0, 9e5, 9e5, 0.0]
HOSTILE = {
    "a number": (5, "neither a list of polygons nor an object"),
    "text": ("abc", "neither a list"),
    "no counts": ({"size": [4, 5]}, "neither a list"),
    "another size": ({"size": [5, 4], "counts": [20]}, r"size \[5, 4\], but the image has \[4, 5\]"),
    "a huge size": ({"size": [1 << 40, 1 << 40], "counts": [1 << 80]}, "has the size"),
    "a size of text": ({"size": ["4", "5"], "counts": [20]}, "has the size"),
    "too few": ({"size": [4, 5], "counts": [19]}, "do not add up to the 20 pixels"),
    "too many": ({"size": [4, 5], "counts": [10, 11]}, "do not add up"),
    "huge": ({"size": [4, 5], "counts": [1 << 90]}, "not whole numbers"),
    "beyond floats": ({"size": [4, 5], "counts": [10**400]}, "something else than numbers"),
    "negative": ({"size": [4, 5], "counts": [30, -10]}, "do not add up"),
    "fractions": ({"size": [4, 5], "counts": [9.5, 10.5]}, "not whole numbers"),
    "NaN": ({"size": [4, 5], "counts": [NAN, 20]}, "not whole numbers"),
    "texts": ({"size": [4, 5], "counts": ["20"]}, "something else than numbers"),
    "nested": ({"size": [4, 5], "counts": [[20]]}, "something else than numbers"),
    "no runs": ({"size": [4, 5], "counts": []}, "do not add up"),
    "an object": ({"size": [4, 5], "counts": {}}, "neither a list nor text"),
    "empty text": ({"size": [4, 5], "counts": ""}, "not compressed run lengths"),
    "unfinished text": ({"size": [4, 5], "counts": "d0d"}, "not compressed run lengths"),  # C reads beyond its end
    "a zero byte": ({"size": [4, 5], "counts": "d0\0"}, "not compressed run lengths"),
    "another character": ({"size": [4, 5], "counts": "d0ł"}, "not compressed run lengths"),
    "a long number": ({"size": [4, 5], "counts": "o" * 30 + "0"}, "more than 32 bits"),
    "a negative number": ({"size": [4, 5], "counts": "X1\\O"}, "do not add up"),
    "many runs": ({"size": [4, 5], "counts": "0" * 10_000_000}, "more run lengths than pixels"),
    "a polygon of text": ([["1", 2, 3, 4, 5, 6]], "something else than numbers"),
    "a polygon of pairs": ([[[1, 2], [3, 4], [5, 6]]], "something else than numbers"),
    "a polygon without a list": ([5], "not a list"),
    "an odd polygon": ([[1, 2, 3, 4, 5, 6, 7]], "7 coordinates, which is odd"),
    "a polygon with NaN": ([[1, 2, NAN, 4, 5, 6]], "not finite"),
    "an infinite polygon": ([[1, 2, INFINITY, 4, 5, 6]], "not finite"),
    "a polygon far away": ([[1, 2, 3, 1e9, 5, 6]], "beyond 10,000,000 pixels"),
    "a polygon of huge integers": ([[1, 2, 3, 10**400, 5, 6]], "something else than numbers"),
    "a long outline": ([[0, 0, 9000, 9000] * 5000], "longer than 1,000,000 pixels"),
    "long outlines together": ([LONG, LONG], "longer than"),
    "many polygons": ([[0, 0, 1, 1, 0, 1]] * 3000, "3,000 polygons"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_masks_are_rejected_before_pycocotools_sees_them(monkeypatch, kind):
    value, message = HOSTILE[kind]
    monkeypatch.setattr(masks, "import_framework", None)
    with pytest.raises(ValueError, match=message) as error:
        parse_segmentation(value, (4, 5))
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_without_pycocotools_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)  # makes the import fail
    monkeypatch.delitem(sys.modules, "pycocotools.mask")
    message = r"pycocotools is not installed; install it with: pip install 'fcvit\[dense\]'"
    with pytest.raises(MissingExtra, match=message):
        decode_segmentation(parse_segmentation([[0, 0, 4, 0, 4, 4]], (9, 9)), (9, 9))
