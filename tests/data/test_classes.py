"""Test class lists in common formats, which are read in the order of their numbers or rejected."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcvit.data.classes import ClassName, imagenet, order_note, read_classes, resolve_classes
from fcvit.errors import DoesNotFit, FcvitError, UnreadableFile

PLAIN = (("cat", "cat"), ("dog", "dog"), ("eel", "eel"))
WORDNET = (("n01440764", "tench, Tinca tinca"), ("n01443537", "goldfish"))


def read(tmp_path, content, name="classes.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tuple(map(tuple, read_classes(path)))


@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog\neel\n",
        "0 cat\n1 dog\n2 eel",
        "2 eel\n0 cat\n1 dog",
        "1: dog\n2: eel\n0: cat\n",
        "1,dog\n0,cat\n2,eel",
        "2\teel\n1\tdog\n0\tcat",
        "1. cat\n3. eel\n2. dog",
        "1) cat\n3) eel\n2) dog",
        "[0] cat\n[2] eel\n[1] dog",
        "1|dog\n0|cat\n2|eel",
        "0: 'cat',\n1: 'dog',\n2: 'eel'",
        "eel 2\ncat 0\ndog 1",
        "cat,0\neel,2\ndog,1",
        "index,name\n2,eel\n0,cat\n1,dog\n",
        "Index;Class\n2;eel\n0;cat\n1;dog\n",
        "idx\tlabel\n2\teel\n0\tcat\n1\tdog\n",
        "{0: 'cat', 1: 'dog', 2: 'eel'}",
        "{2: 'eel',\n 0: 'cat',\n 1: \"dog\",\n}\n",
        '["cat", "dog", "eel"]',
        '[\n  "cat",\n  "dog",\n  "eel"\n]\n',
        "['cat', 'dog', 'eel',]",
        '{"2": "eel", "0": "cat", "1": "dog"}',
        '{"eel": 2, "cat": 0, "dog": 1}',
        '{"id2label": {"1": "dog", "0": "cat", "2": "eel"}, "label2id": {"eel": 2, "cat": 0, "dog": 1}, "size": 3}',
        '[{"name": "cat"}, {"name": "dog"}, {"name": "eel"}]',
        "path: x\nnames:\n  2: eel\n  0: cat\n  1: dog\n",
        "names:\n- cat\n- 'dog'\n- eel\nnc: 3\n",
        "names: ['cat', 'dog', 'eel']\n",
        "1 - dog\n0 - cat\n2 - eel\n",
        "1 -> dog\n0 -> cat\n2 -> eel\n",
        "dog => 1\ncat => 0\neel => 2\n",
        "#1 dog\n#0 cat\n#2 eel\n",
        "'1': 'dog',\n'0': 'cat',\n'2': 'eel'\n",
        "ClassId,SignName\n1,dog\n0,cat\n2,eel\n",
        "category\tnumber\ndog\t1\ncat\t0\neel\t2\n",
        "index,name\n2.0,eel\n0.0,cat\n1.0,dog\n",
        '"cat"\n"dog"\n"eel"\n',
        "- cat\n- dog\n- eel\n",
        "id2label:\n  2: eel # last\n  0: cat\n  1: dog\n",
        "classes = ['cat', 'dog', 'eel']\n",
        '{"eel": 2.0, "cat": 0.0, "dog": 1.0}',
        '{"1": {"name": "dog"}, "0": {"name": "cat"}, "2": {"name": "eel"}}',
        '{"features": {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}}',
    ],
)
def test_numbers_give_the_order_in_any_format(tmp_path, text):
    assert read(tmp_path, text) == PLAIN
    assert read(tmp_path, text.encode("utf-16")) == PLAIN
    assert read(tmp_path, text.encode("utf-16-le")) == PLAIN
    assert read(tmp_path, b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()) == PLAIN


@pytest.mark.parametrize(
    "text",
    [
        "n01440764 tench, Tinca tinca\nn01443537 goldfish",
        "1,n01443537,goldfish\n0,n01440764,tench, Tinca tinca",
        '{"1": ["n01443537", "goldfish"], "0": ["n01440764", "tench, Tinca tinca"]}',
        '[["n01440764", "tench, Tinca tinca"], ["n01443537", "goldfish"]]',
        'index,wnid,name\n1,n01443537,goldfish\n0,n01440764,"tench, Tinca tinca"\n',
        "n01443537 2 goldfish\nn01440764 1 tench, Tinca tinca",
    ],
)
def test_ids_and_names_are_read(tmp_path, text):
    assert read(tmp_path, text) == WORDNET


@pytest.mark.parametrize(
    "lines",
    [
        ["0", "90", "180", "270"],
        ["1950", "1951"],
        ["001.cat", "002.dog"],
        ["01 apple", "02 pear"],
        ["0_cat", "1_dog"],
        ["1.5 mm", "0.5 mm"],
        ["2012 BMW", "1994 Ford"],
        ["2012 - BMW", "1994 - Ford"],
        ["digit 1", "digit 0"],
        ["[red]x", "{a} b"],
        ["tench, Tinca tinca", "crane"],
    ],
)
def test_plain_lines_are_names(tmp_path, lines):
    assert [c[0] for c in read(tmp_path, "\n".join(lines))] == lines


def test_the_id_of_a_repeated_name_contains_its_index(tmp_path):
    expected = (("crane (0)", "crane"), ("dog", "dog"), ("crane (2)", "crane"))
    assert read(tmp_path, '["crane", "dog", "crane"]') == read(tmp_path, "0: crane\n1: dog\n2: crane") == expected


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("0 cat\n0 dog\n2 eel", DoesNotFit, "must be 0 to 2, each exactly once"),
        ("0: cat\n5: dog", DoesNotFit, "must be 0 to 1"),
        ("002 cat\n000 dog\n001 eel", DoesNotFit, "must be 0 to 2.*7 instead of 007"),
        ("1_cat\n0_dog", DoesNotFit, "must be 0 to 1"),
        ("id,name\n1,cat\n0,dog", DoesNotFit, "ids are the numbers 0 to 1 .*add a column named index"),
        ('{"0": "cat", "0": "dog"}', DoesNotFit, "'0' occurs twice"),
        ("{0: 'cat', 0: 'dog'}", DoesNotFit, "'0' occurs twice"),
        ("{0: 'cat', 2: 'dog'}", DoesNotFit, "indices from 0 to 1"),
        ('{"n01440764": "tench", "n01443537": "goldfish"}', DoesNotFit, "a list of names in the order of the outputs"),
        ("{0: 1, 1: 0}", DoesNotFit, "both the keys and the values"),
        (
            '{"names": ["a", "b"], "label2id": {"b": 0, "a": 1}}',
            DoesNotFit,
            "label2id and names do not contain",
        ),
        ("{0: 'cat', 1: print('x')}", UnreadableFile, "neither valid JSON .* nor a Python"),
        ("{0: 'cat', 1: 'dog'", UnreadableFile, "neither valid JSON .* nor a Python"),
        pytest.param("[[" * 50_000, UnreadableFile, "cannot read the class list", id="nested"),
        ('["cat", null]', UnreadableFile, "a pair of id and name, not 'None'"),
        ('["a", "\\ud800"]', UnreadableFile, r"ud800' is not valid text"),
        (b"caf\xe9\n", UnreadableFile, "not UTF-8 or UTF-16.*save it as UTF-8"),
        ("{}", UnreadableFile, "no class.*one class per line"),
    ],
)
def test_an_invalid_or_ambiguous_list_is_rejected(tmp_path, text, kind, message):
    with pytest.raises(kind, match=rf"classes\.txt: .*{message}"):
        read(tmp_path, text)


@given(st.binary(max_size=40) | st.text("0123 ,:[]{}'\"ab\n", max_size=40).map(str.encode))
@settings(derandomize=True, max_examples=150, deadline=None)
def test_random_content_is_read_or_rejected(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(content)
    try:
        classes = read_classes(path)
    except FcvitError as error:
        assert "any.txt" in str(error) and len(str(error)) < 500
        return
    assert classes and len({c.id for c in classes}) == len(classes)


def test_imagenets_1000_names_are_read(tmp_path):
    names = [c.name for c in imagenet()]
    assert [c[1] for c in read(tmp_path, json.dumps(names))] == names
    assert read(tmp_path, "\n".join(names)) == read(tmp_path, json.dumps(names))  # although two names occur twice


def test_a_list_with_another_order_than_the_weights_is_reported(notes):
    own = tuple(ClassName(f"c{i}", name) for i, name in enumerate(("cat", "dog", "eel")))
    named = tuple(ClassName(name, name) for name in ("dog", "Cat", "eel"))
    note = order_note(named, own)
    assert "2 of its 3 classes" in note and "output 0 is 'dog' in the list and 'cat' in the weights" in note
    assert resolve_classes(named, own, 3) == named and "another order" in notes[0]
    for listed in (own, tuple(ClassName(c.name, c.name) for c in own), tuple(ClassName(x, x) for x in "abc")):
        assert order_note(listed, own) == ""
    assert "another order than in ImageNet" in order_note(imagenet()[::-1], None)
    assert order_note(imagenet(), None) == order_note(named, None) == ""
