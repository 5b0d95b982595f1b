"""Test image lists in common formats, and the search for the listed images."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fcvit.data.lists import find_listed, read_list
from fcvit.data.sources import open_source
from fcvit.errors import DoesNotFit, FcvitError, UnreadableFile


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


def read(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return dict(read_list(path).labels)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b.jpg,3\nc.jpg,4\n", {"a b.jpg": "3", "c.jpg": "4"}),
        ("a.jpg, great white\nb.jpg, crane\n", {"a.jpg": "great white", "b.jpg": "crane"}),
        ("a, b.jpg 0\nc.jpg 1\n", {"a, b.jpg": "0", "c.jpg": "1"}),
        ('"a, b.jpg",0\nc.jpg,1\n', {"a, b.jpg": "0", "c.jpg": "1"}),
        ("'a b.jpg' 0\n", {"a b.jpg": "0"}),
        ("a b.jpg\tgreat white\n", {"a b.jpg": "great white"}),
        ("id,breed\n000bec,husky\n", {"000bec": "husky"}),
        ("class id,filepaths,labels,data set\n0,t/x y.jpg,RED BIRD,test\n", {"t/x y.jpg": "RED BIRD"}),
        ("file_name label\na b.jpg 1\n", {"a b.jpg": "1"}),
        ("sep=;\nfile;class\na.jpg;1\n", {"a.jpg": "1"}),
        ("Image Name;Category\na.jpg;1\n", {"a.jpg": "1"}),
        ("0 a/b.jpg\n1 a/c d.jpg\n", {"a/b.jpg": "0", "a/c d.jpg": "1"}),
        ("rose,a.jpg\ntulip,b.jpg\n", {"a.jpg": "rose", "b.jpg": "tulip"}),
        ("ice cream/1 2.jpg\nrose/3.jpg\n", {"ice cream/1 2.jpg": None, "rose/3.jpg": None}),
        ('{"a.jpg": 3, "b.jpg": "x"}', {"a.jpg": "3", "b.jpg": "x"}),
        ("a.jpg 0\r\nb.jpg 1\r\n".encode("utf-16-be"), {"a.jpg": "0", "b.jpg": "1"}),
        (b"b\xfc.jpg 0\n", {"b\udcfc.jpg": "0"}),
        ("a.jpg red lily\nb.jpg 'rose'\n", {"a.jpg": "red lily", "b.jpg": "rose"}),
        ("a.jpg|0\nb.jpg|1\n", {"a.jpg": "0", "b.jpg": "1"}),
        ("x,y\na.jpg,rose\nb.jpg,tulip\n", {"a.jpg": "rose", "b.jpg": "tulip"}),
        ("# path class\na.jpg 0\nb.jpg 1\n", {"a.jpg": "0", "b.jpg": "1"}),
        ("id_code,diagnosis\na,0\nb,2\n", {"a": "0", "b": "2"}),
        ("a 0\nb.jpg 1\n", {"a": "0", "b.jpg": "1"}),
        ("a.jpg 0\rb.jpg 1\r", {"a.jpg": "0", "b.jpg": "1"}),
        ("a.jpg 0\nb.jpg 1\n".encode("utf-32"), {"a.jpg": "0", "b.jpg": "1"}),
        ("\u82b1.jpg 0\nb.jpg 1\n".encode("utf-16-le"), {"\u82b1.jpg": "0", "b.jpg": "1"}),
        ('[["a.jpg", 0], ["b.jpg", 1.0]]', {"a.jpg": "0", "b.jpg": "1.0"}),
        ('[{"width": 9, "file_name": "a.jpg", "label": "x"}]', {"a.jpg": "x"}),
        ('{"file_name": "a.jpg", "label": 0}\n{"file_name": "b.jpg", "label": 1}\n', {"a.jpg": "0", "b.jpg": "1"}),
    ],
)
def test_lists_are_read_in_common_formats(tmp_path, text, expected):
    assert read(tmp_path / "l", text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.jpg,\n", "line 2 is 'a.jpg,'"),
        ("a.jpg\tx\tnot a number\n", "line 1 is"),
        ("ImageId,PredictionString\na,n1 1 2 3 4 n2 1 2 3 4\n", r"boxes of several classes \(n1, n2\)"),
        (b"\xff\xfea\x00\x00\xd8b\x00", "damaged UTF-16.* save it as UTF-8"),
        ("[1, 2]", "expected JSON with class -> images"),
        ('{"a.jpg": 0, "a.jpg": 1}', "a.jpg occurs twice"),
        ("a.jpg,0,1\nb.jpg,1,0\n", "a column of 0 and 1; write the class of each image"),
        ("1 x/a.jpg\n2 y/b.jpg\n", "numbers before the paths can be line numbers or classes"),
        ("a/1.jpg 0\na/2.jpg\n", "line 2 is 'a/2.jpg'"),
    ],
)
def test_an_invalid_or_ambiguous_list_is_rejected(tmp_path, text, message):
    with pytest.raises(UnreadableFile, match=f"l: .*{message}"):
        read(tmp_path / "l", text)


def find(root, text, tmp_path):
    read(tmp_path / "l.txt", text)
    locations, labels, remark = find_listed(read_list(tmp_path / "l.txt"), tmp_path / "l.txt", open_source(root))
    assert all(locations[name].path == f"{root}/{name}" for name in labels)
    return sorted(labels.items()), remark


def test_the_shortest_missing_prefix_is_removed_from_all_paths(tmp_path):
    """A longer prefix is not removed even if files with the remaining names exist."""
    root = make(tmp_path / "images", "val/1.jpg", "val/2.jpg", "1.jpg", "2.jpg")
    pairs, remark = find(root, "images/val/1.jpg 0\nimages/val/2.jpg 1\n", tmp_path)
    assert pairs == [("val/1.jpg", "0"), ("val/2.jpg", "1")] and "images/ in the list is ignored" in remark
    assert find(root, "val/1.jpg 0\nval/2.jpg 1\n", tmp_path)[1] == ""
    with pytest.raises(DoesNotFit, match=r"1 of 2 images are not in .*images/val/3.jpg.*--data"):
        find(root, "images/val/1.jpg 0\nimages/val/3.jpg 1\n", tmp_path)
    with pytest.raises(DoesNotFit, match="2 of 2 images are not in"):  # two different prefixes
        find(root, "a/val/1.jpg 0\nb/val/2.jpg 1\n", tmp_path)


@pytest.mark.parametrize("prefix", ["C:/some\\where\\", "\\\\server\\share\\", "val\\", "val/"])
def test_windows_paths_are_read(tmp_path, prefix):
    root = make(tmp_path / "d", "val/a/1.jpg", "val/b/2.jpg")
    prefix += "" if prefix.startswith("val") else "val\\"
    pairs, _ = find(root, f"{prefix}a\\1.jpg 0\n{prefix}b\\2.jpg 1\n", tmp_path)
    assert pairs == [("val/a/1.jpg", "0"), ("val/b/2.jpg", "1")]


def test_a_list_of_another_split_is_rejected(tmp_path):
    root = make(tmp_path / "val", "1.jpg", "2.jpg")
    with pytest.raises(DoesNotFit, match=r"images are in train/, but --data .*val is another split"):
        find(root, "train/1.jpg 0\ntrain/2.jpg 1\n", tmp_path)
    assert find(root, "valid/1.jpg 0\nvalid/2.jpg 1\n", tmp_path)[0]


def test_images_outside_the_data_are_rejected(tmp_path):
    root = make(tmp_path / "here", "1.jpg")
    make(tmp_path / "there", "1.jpg")
    for name in ("there/1.jpg", f"{tmp_path}/there/1.jpg"):
        with pytest.raises(UnreadableFile, match=r"there/1.jpg is outside the data; .*--data"):
            find(root, f"{name} 0\n", tmp_path)
    (tmp_path / "link").symlink_to(root)
    assert find(tmp_path / "link", f"{root}/1.jpg 0\n", tmp_path)[0] == [("1.jpg", "0")]


def test_the_only_folder_that_contains_all_images_is_used(tmp_path):
    root = make(tmp_path / "d", "a/1.jpg", "a/2.jpg", "b/c/1.jpg")
    pairs, remark = find(root, "1.jpg 0\n2.jpg 1\n", tmp_path)
    assert pairs == [("a/1.jpg", "0"), ("a/2.jpg", "1")] and f"paths are relative to {root}/a" in remark
    with pytest.raises(DoesNotFit, match=r"several folders .*\(a, b/c\).*--data"):
        find(root, "1.jpg 0\n", tmp_path)


def test_a_name_without_ending_must_match_a_single_image(tmp_path):
    root = make(tmp_path / "d", "1.jpg", "2.png", "2.txt")
    assert find(root, "1 5\n2 6\n", tmp_path)[0] == [("1.jpg", "5"), ("2.png", "6")]
    make(root, "1.png")
    with pytest.raises(DoesNotFit, match=r"1 matches several files .*\(1.jpg, 1.png\)"):
        find(root, "1 5\n2 6\n", tmp_path)


def test_composed_and_decomposed_letters_are_equal(tmp_path):
    root = make(tmp_path / "d", "e\u0301 1.jpg", "\u00e9 2.jpg")
    pairs, _ = find(root, "\u00e9 1.jpg 0\ne\u0301 2.jpg 1\n", tmp_path)
    assert pairs == [("e\u0301 1.jpg", "0"), ("\u00e9 2.jpg", "1")]
    make(root, "\u00e9 1.jpg")
    assert find(root, "\u00e9 1.jpg 0\n", tmp_path)[0] == [("\u00e9 1.jpg", "0")]


def test_two_lines_with_the_same_image_are_rejected(tmp_path):
    root = make(tmp_path / "d", "\u00e9.jpg", "x.jpg")
    with pytest.raises(DoesNotFit, match="another line name the same file \u00e9"):
        find(root, "\u00e9.jpg 0\ne\u0301.jpg 1\n", tmp_path)


def test_the_message_mentions_that_a_list_is_not_utf8(tmp_path):
    root = make(tmp_path / "d", "\u00fc.jpg")
    with pytest.raises(DoesNotFit, match="the list is not UTF-8 text, save it as UTF-8"):
        find(root, b"\xfc.jpg 0\n", tmp_path)


def test_a_line_without_label_uses_its_folder_as_the_label(tmp_path):
    root = make(tmp_path / "d", "images/a/1.jpg", "images/b/deep/2.jpg")
    assert find(root, "images/a/1\nimages/b/deep/2\n", tmp_path)[0] == [
        ("images/a/1.jpg", "a"),
        ("images/b/deep/2.jpg", "b"),
    ]
    assert find(root, "images/a/1.jpg\n", tmp_path)[0] == [("images/a/1.jpg", "a")]


@given(
    st.text(st.sampled_from('a/\\ .,;\t\n"0é{}[]:\0\ud800'), max_size=40).map(lambda t: t.encode("utf-8", "replace"))
)
@settings(
    derandomize=True, max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_text_is_read_or_rejected(tmp_path, text):
    root = make(tmp_path / "d", "a", "a.a")
    (tmp_path / "l.txt").write_bytes(text)
    try:
        locations, _, _ = find_listed(read_list(tmp_path / "l.txt"), tmp_path / "l.txt", open_source(root))
    except FcvitError as error:
        assert "\n" not in str(error).replace(text.decode(), "")
        return
    assert set(locations) <= {"a", "a.a"}


def test_json_of_other_formats_is_rejected(tmp_path):
    for content in ("[" * 100_000, json.dumps({"a": [1]}), json.dumps({"a": None}), '{"a": 1e999}'):
        with pytest.raises(FcvitError):
            read(tmp_path / "l", content)
