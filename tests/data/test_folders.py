"""Test the search for image files, and class lists."""

from pathlib import Path

import pytest

from fcvit.data.classes import ClassName, as_classes, imagenet, read_classes, resolve_classes
from fcvit.data.folders import find_images, images_below
from fcvit.errors import DoesNotFit, UnreadableFile

PETS = (ClassName("c1", "cat"), ClassName("d1", "dog"), ClassName("m1", "crane"), ClassName("m2", "crane"))


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_images_are_found_in_files_folders_and_patterns(tmp_path, monkeypatch):
    make(tmp_path, "in/1.png", "in/sub/2.jpg", "in/x.txt", "odd.dat", "[1].png")
    monkeypatch.chdir(tmp_path)
    names = [str(path) for path in find_images(["in", "odd.dat", "in/*.png", "[1].png"])]
    assert names == ["in/1.png", "in/sub/2.jpg", "odd.dat", "[1].png"]
    assert find_images(["in/**/*.jpg"]) == [Path("in/sub/2.jpg")]
    with pytest.raises(UnreadableFile, match=r"nope\*: no such image"):
        find_images(["in", "nope*"])


def test_skipped_files_in_a_folder_are_counted(tmp_path, monkeypatch, notes):
    make(tmp_path, "in/1.png", "in/a/2.HEIC", "in/3.heic", "in/notes", "in/.hidden", "none/1.txt", "all/1.jpg")
    monkeypatch.chdir(tmp_path)
    find_images(["in", "all", "in/notes"])
    assert notes == ["in: skipped 3 files without an image file extension: 2 .heic, 1 no extension"]


def test_imagenets_classes_have_unique_ids():
    listed = imagenet()
    assert len(listed) == 1000
    assert listed[0] == ClassName("n01440764", "tench")
    assert len({c.id for c in listed}) == 1000 and len({c.name for c in listed}) == 998


def test_outputs_are_named_by_the_list_or_imagenet_or_numbered():
    assert resolve_classes(None, PETS, 4) is PETS
    assert resolve_classes(None, None, 1000) is imagenet()
    assert resolve_classes(None, None, 2) == (ClassName("0", "class 0"), ClassName("1", "class 1"))
    with pytest.raises(DoesNotFit, match="4 classes, but the model has 5"):
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
def test_class_lists_are_read(tmp_path, text, expected):
    (tmp_path / "c.txt").write_text(text, "utf-8")
    assert read_classes(tmp_path / "c.txt") == expected


def test_an_empty_repeated_or_missing_class_list_is_rejected(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UnreadableFile, match=r"empty\.txt: .*one class per line"):
        read_classes(tmp_path / "empty.txt")
    (tmp_path / "twice.txt").write_text("cat\ncat\n")
    with pytest.raises(DoesNotFit, match=r"twice\.txt: class id 'cat' occurs twice"):
        read_classes(tmp_path / "twice.txt")
    with pytest.raises(UnreadableFile, match=r"missing\.txt: cannot read the class list"):
        read_classes(tmp_path / "missing.txt")


def test_the_index_column_of_a_class_list_gives_the_order(tmp_path):
    (tmp_path / "c.csv").write_text("index,id,name\n1,b,bee\n0,a,ant\n")
    assert read_classes(tmp_path / "c.csv") == (ClassName("a", "ant"), ClassName("b", "bee"))
    (tmp_path / "d.csv").write_text("index,id,name\n1,b,bee\n2,a,ant\n")
    with pytest.raises(DoesNotFit, match="column index must contain the numbers 0 to 1"):
        read_classes(tmp_path / "d.csv")


def test_class_lists_can_be_python_sequences():
    assert as_classes(["cat", ("d", "dog")]) == (ClassName("cat", "cat"), ClassName("d", "dog"))
    with pytest.raises(DoesNotFit, match="'cat' occurs twice"):
        as_classes(["cat", "cat"])


def test_a_cycle_of_links_is_followed_once(tmp_path):
    make(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    assert images_below(tmp_path) == [tmp_path / "a/1.png", tmp_path / "b/2.png"]


def test_a_link_to_itself_is_a_file_that_cannot_be_read(tmp_path):
    make(tmp_path, "a/1.png")
    (tmp_path / "a" / "2.png").symlink_to("2.png")
    assert images_below(tmp_path) == [tmp_path / "a/1.png", tmp_path / "a/2.png"]


def test_a_linked_folder_is_read_under_both_names(tmp_path):
    """Only a link to a folder that contains the link is not followed."""
    make(tmp_path, "3/1.png")
    (tmp_path / "4").symlink_to(tmp_path / "3")
    assert images_below(tmp_path) == [tmp_path / "3/1.png", tmp_path / "4/1.png"]
