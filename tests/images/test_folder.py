"""Which files are images, and which class index a folder means."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcvit.classes import ClassName, as_classes, imagenet, read_classes, resolve_classes
from fcvit.errors import DoesNotFit, UnreadableFile
from fcvit.images.folder import assign_classes, find_images, read_labelled_folder

PETS = (ClassName("c1", "cat"), ClassName("d1", "dog"), ClassName("m1", "crane"), ClassName("m2", "crane"))


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_the_files_class_ids_or_names_come_first():
    assert assign_classes(["d1", "m2"], PETS, 4) == ({"d1": 1, "m2": 3}, "folders are the weights' class ids")
    assert assign_classes(["cat", "dog"], PETS, 4) == ({"cat": 0, "dog": 1}, "folders are the weights' class names")


def test_a_name_that_stands_twice_is_no_name():
    with pytest.raises(DoesNotFit, match=r"1 of 2 class folders are not among the weights' class names: crane"):
        assign_classes(["cat", "crane"], PETS, 4)


def test_wordnet_ids_for_a_thousand_outputs():
    mapping, rule = assign_classes(["n01443537", "n15075141"], None, 1000)
    assert mapping == {"n01443537": 1, "n15075141": 999}
    assert rule == "folders are ImageNet's WordNet ids"


def test_sorted_names_only_if_the_count_fits():
    mapping, rule = assign_classes(["zebra", "Ant", "bee"], None, 3)
    assert mapping == {"Ant": 0, "bee": 1, "zebra": 2}  # as Python and torchvision sort: capitals first
    assert "counted in sorted order" in rule
    with pytest.raises(DoesNotFit, match=r"2 class folders .* for a model with 3 outputs"):
        assign_classes(["ant", "bee"], None, 3)


def test_half_known_folders_are_never_guessed():
    with pytest.raises(DoesNotFit, match="1 of 4 class folders are not among the weights' class ids: wolf"):
        assign_classes(["c1", "d1", "m1", "wolf"], PETS, 4)
    with pytest.raises(DoesNotFit, match="ImageNet's WordNet ids: tench"):
        assign_classes(["n01443537", "tench"], None, 1000)


@given(st.lists(st.text("abcXYZ019_", min_size=1, max_size=6), min_size=1, max_size=12, unique=True))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_a_mapping_is_one_to_one(folders):
    mapping, _ = assign_classes(folders, None, len(folders))
    assert sorted(mapping.values()) == list(range(len(folders)))
    assert set(mapping) == set(folders)


def test_reading_a_folder(tmp_path):
    root = make(
        tmp_path, "b/2.JPEG", "b/1.png", "b/deep/3.webp", "a/x.jpg", "a/notes.txt", "a/.hidden.png", "README.md"
    )
    make(tmp_path, ".git/x.png")
    found = read_labelled_folder(root, None, 2)
    assert found.paths == ("a/x.jpg", "b/1.png", "b/2.JPEG", "b/deep/3.webp")
    assert found.labels == (0, 1, 1, 1)


@pytest.mark.parametrize(
    ("names", "message"),
    [((), "no class folders"), (("x.png",), "no class folders"), (("a/x.txt", "b/y.txt"), "hold no images")],
)
def test_folders_that_are_none(tmp_path, names, message):
    with pytest.raises(UnreadableFile, match=message):
        read_labelled_folder(make(tmp_path, *names), None, 2)


def test_a_missing_folder(tmp_path):
    with pytest.raises(UnreadableFile, match="not a folder"):
        read_labelled_folder(tmp_path / "none", None, 2)


def test_finding_images(tmp_path, monkeypatch):
    make(tmp_path, "in/1.png", "in/sub/2.jpg", "in/x.txt", "odd.dat", "[1].png")
    monkeypatch.chdir(tmp_path)
    names = [str(path) for path in find_images(["in", "odd.dat", "in/*.png", "[1].png"])]
    assert names == ["in/1.png", "in/sub/2.jpg", "odd.dat", "[1].png"]
    assert find_images(["in/**/*.jpg"]) == [Path("in/sub/2.jpg")]
    with pytest.raises(UnreadableFile, match=r"nope\*: no such image"):
        find_images(["in", "nope*"])


def test_imagenets_list():
    listed = imagenet()
    assert len(listed) == 1000
    assert listed[0] == ClassName("n01440764", "tench")
    assert len({c.id for c in listed}) == 1000 and len({c.name for c in listed}) == 998


def test_names_of_outputs():
    assert resolve_classes(None, PETS, 4) is PETS
    assert resolve_classes(None, None, 1000) is imagenet()
    assert resolve_classes(None, None, 2) == (ClassName("0", "class 0"), ClassName("1", "class 1"))
    with pytest.raises(DoesNotFit, match="4 classes are listed, but the model has 5"):
        resolve_classes(PETS, None, 5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat\ndog", (ClassName("cat", "cat"), ClassName("dog", "dog"))),  # no final newline
        ("cat\n\n dog \n", (ClassName("cat", "cat"), ClassName("dog", "dog"))),
        ('id,name\nn1,a cat\nn2,"dog, big"\n', (ClassName("n1", "a cat"), ClassName("n2", "dog, big"))),
        ("index,wnid,name\n0,n1,cat\n", (ClassName("n1", "cat"),)),
        ("\ufeffid,name\nn1,cat\n", (ClassName("n1", "cat"),)),
    ],
)
def test_reading_class_lists(tmp_path, text, expected):
    (tmp_path / "c.txt").write_text(text, "utf-8")
    assert read_classes(tmp_path / "c.txt") == expected


def test_class_lists_that_are_none(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UnreadableFile, match="expected one class per line"):
        read_classes(tmp_path / "empty.txt")
    (tmp_path / "twice.txt").write_text("cat\ncat\n")
    with pytest.raises(DoesNotFit, match="'cat' stands twice"):
        read_classes(tmp_path / "twice.txt")
    with pytest.raises(UnreadableFile, match="cannot read the class list"):
        read_classes(tmp_path / "missing.txt")


def test_wordnet_ids_also_where_the_weights_have_other_names():
    numbered = tuple(ClassName(str(i), f"class {i}") for i in range(1000))
    mapping, rule = assign_classes(["n01443537", "n15075141"], numbered, 1000)
    assert (mapping, rule) == ({"n01443537": 1, "n15075141": 999}, "folders are ImageNet's WordNet ids")


def test_counting_against_the_weights_own_classes_says_what_it_does():
    _, rule = assign_classes(["lion", "ocelot", "puma", "zebra"], PETS, 4)
    assert rule == "no folder is one of the weights' classes (cat, ...): the 4 folders are counted in sorted order"


def test_a_circle_of_links_is_walked_once(tmp_path):
    make(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    assert read_labelled_folder(tmp_path, None, 2).paths == ("a/1.png", "b/2.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_class_folder_that_cannot_be_read_is_an_error(tmp_path):
    make(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "b").chmod(0)
    with pytest.raises(UnreadableFile, match="Permission denied"):
        read_labelled_folder(tmp_path, None, 2)


def test_the_index_of_a_class_list_gives_the_order(tmp_path):
    (tmp_path / "c.csv").write_text("index,id,name\n1,b,bee\n0,a,ant\n")
    assert read_classes(tmp_path / "c.csv") == (ClassName("a", "ant"), ClassName("b", "bee"))
    (tmp_path / "d.csv").write_text("index,id,name\n1,b,bee\n2,a,ant\n")
    with pytest.raises(DoesNotFit, match="must count from 0 to 1"):
        read_classes(tmp_path / "d.csv")


def test_class_lists_in_python():
    assert as_classes(["cat", ("d", "dog")]) == (ClassName("cat", "cat"), ClassName("d", "dog"))
    with pytest.raises(DoesNotFit, match="'cat' stands twice"):
        as_classes(["cat", "cat"])
