"""Test the distinction between folders of splits and class folders with similar names."""

import pytest

from fcvit.data.folders import SYSTEM
from fcvit.data.sources import Source
from fcvit.data.splits import find_layout, role


def make(root, folders, images):
    for folder in folders.split():
        (root / folder).mkdir(parents=True)
        if images:
            (root / folder / "1.png").touch()
    return root


@pytest.mark.parametrize(
    ("name", "split", "rest"),
    [
        ("train", "train", ()),
        ("TRAIN", "train", ()),
        ("Training", "train", ()),
        ("seg_train", "train", ("seg",)),
        ("TrainSet", "train", ()),
        ("trainset", "train", ()),
        ("training_set", "train", ()),
        ("train-images", "train", ()),
        ("train2017", "train", ()),
        ("ILSVRC2012_img_train", "train", ("ilsvrc",)),
        ("训练集", "train", ()),
        ("valid", "val", ()),
        ("Validation Set", "val", ()),
        ("dev", "val", ()),
        ("testimages", "test", ()),
        ("Test_256", "test", ()),
    ],
)
def test_folder_names_of_splits_are_recognized(name, split, rest):
    assert role(name) == (split, rest)


@pytest.mark.parametrize(
    "name", ["strain", "pretrained", "trainval", "train_test", "contest", "2019", "images", "", "é"]
)
def test_other_folder_names_are_not_splits(name):
    assert role(name) is None


@pytest.mark.parametrize(
    ("folders", "splits", "others"),
    [
        ("train/a train/b val/a", ["train", "val"], ()),
        ("Training/a Testing/a", ["Training", "Testing"], ()),
        ("test dev/a train/a", ["train", "dev", "test"], ()),
        ("my_train/a my_eval/a", ["my_train", "my_eval"], ()),
        ("train/a train/b val_small/a val_small/b", ["train", "val_small"], ()),
        ("train/a train/b val_small/c val_small/d", [], ()),
        ("train/a test_set", ["train", "test_set"], ()),
        ("flowers_train/a flowers_test/a", ["flowers_train", "flowers_test"], ()),
        ("train/a val/a other/a more", ["train", "val"], ("more", "other")),
        ("train/a test/a train_masks/a test_masks/a", ["train", "test"], ("test_masks", "train_masks")),
        ("val/a test/a", ["val", "test"], ()),
        ("train test", ["train", "test"], ()),  # splits without classes, because no data set has only these two classes
        ("train car bus", [], ()),
        ("train test car bus", [], ()),
        ("train/x car/x bus/y", [], ()),
        ("cat/train cat/test dog/train dog/test", [], ()),
        ("test a b", [], ()),
        ("freight_train/x driving_test/x", [], ()),
        ("a b", [], ()),
    ],
)
def test_splits_are_distinguished_from_classes(tmp_path, folders, splits, others):
    layout = find_layout(Source(make(tmp_path, folders, True)))
    assert (list(layout.splits), layout.others, layout.doubt) == (splits, others, "")


def test_a_single_split_is_recognized_if_no_other_folder_has_images(tmp_path):
    make(make(tmp_path, "train/a train/b", True), "annotations/deep", False)
    layout = find_layout(Source(tmp_path))
    assert list(layout.splits) == ["train"] and layout.others == ("annotations",)
    make(tmp_path, "car", True)
    assert find_layout(Source(tmp_path)).doubt == "train"


def test_a_single_split_next_to_folders_with_the_same_classes_is_in_doubt(tmp_path):
    make(tmp_path, "train/a train/b query/a query/b gallery/a gallery/b", True)
    assert find_layout(Source(tmp_path)).doubt == "train"


def test_folders_with_the_same_folders_are_classes_with_a_note(tmp_path):
    make(tmp_path, "fold1/a fold1/b fold2/a fold2/b", True)
    layout = find_layout(Source(tmp_path))
    assert not layout.splits and not layout.doubt
    assert "fold1, fold2" in layout.notes[0] and "contains the folders a, b" in layout.notes[0]


@pytest.mark.parametrize(
    ("folders", "below"),
    [
        ("flowers/flowers/rose flowers/flowers/tulip", "flowers/flowers"),
        ("Data/CLS-LOC/train/a Data/CLS-LOC/val/a", "Data/CLS-LOC"),
        ("test_dataset/train/a test_dataset/val/a", "test_dataset"),
        ("rose", ""),
        ("images/a labels", ""),
    ],
)
def test_wrapper_folders_are_entered(tmp_path, folders, below):
    layout = find_layout(Source(make(tmp_path, folders, True)))
    assert layout.source.path == tmp_path / below and bool(layout.notes) == bool(below)


def test_a_wrapper_folder_is_entered_next_to_folders_without_images(tmp_path):
    make(make(tmp_path, "imgs/train/a imgs/val/a", True), "labels/deep", False)
    assert find_layout(Source(tmp_path)).source.path == tmp_path / "imgs"


def test_a_folder_that_repeats_the_name_of_its_split_is_entered(tmp_path):
    make(tmp_path, "seg_train/seg_train/a seg_train/seg_train/b seg_test/images/a val/a/deep", True)
    paths = [split.path for split in find_layout(Source(tmp_path)).splits.values()]
    assert paths == [tmp_path / "seg_train/seg_train", tmp_path / "seg_test/images"]


def test_folders_named_after_known_classes_are_classes(tmp_path):
    layout = find_layout(Source(make(tmp_path, "train/a test/a", True)), {"train", "test", "bus"})
    assert not layout.splits
    single = find_layout(Source(make(tmp_path / "one", "cat/x cat/y", True)), {"cat"})
    assert single.source.path == tmp_path / "one"


def test_system_folders_are_skipped(tmp_path):
    for name in SYSTEM:
        (tmp_path / name.upper()).mkdir()
    make(tmp_path, "a b", True)
    assert Source(tmp_path).folders() == ["a", "b"] and Source(tmp_path).tree().folders == ("a", "b")
