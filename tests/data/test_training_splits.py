"""Test the search for the splits of a training run and their classes."""

import dataclasses
import shutil
import tarfile

import pytest

from conftest import DIGITS
from fcvit.data.classes import ClassName
from fcvit.data.training_splits import find_splits
from fcvit.errors import DoesNotFit, UnreadableFile, UsageError
from fcvit.weights.reading import Weights

LEFT_RIGHT = (ClassName("left", "left"), ClassName("right", "right"))


def weights(classes=None, count=2):
    spec = dataclasses.replace(DIGITS, num_classes=count)
    return Weights(spec, {}, None, "torch", None, classes, (), ())


def test_folders_train_and_val_are_the_splits(small, squares):
    splits = find_splits(small(), None)
    assert (len(splits.train), len(splits.val), splits.classes) == (20, 6, LEFT_RIGHT)
    assert "the splits train, val" in splits.notes[0] and splits.counts().tolist() == [11, 9]
    other = shutil.copytree(squares / "val", squares.parent / "other")
    assert find_splits(small(val=str(other)), None).val.root == other
    with tarfile.open(squares.parent / "images.tar", "w") as tar:
        tar.add(squares, ".")
    tarred = find_splits(small(data=str(squares.parent / "images.tar")), None)
    assert tarred.train.listing() == splits.train.listing() and tarred.val.listing() == splits.val.listing()


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_the_validation_split_can_have_other_names(small, squares, name):
    (squares / "val").rename(squares / name)
    shutil.copytree(squares / name, squares / "test")
    splits = find_splits(small(), None)
    assert splits.val.root == squares / name and splits.classes == LEFT_RIGHT
    assert "test not used" in splits.notes[1]
    shutil.copytree(squares / name, squares / "val")
    with pytest.raises(UsageError, match=r"several validation splits \(.*val.*\).*--val"):
        find_splits(small(), None)


@pytest.mark.parametrize("names", [("Training", "Validation"), ("seg_train/seg_train", "seg_val/seg_val")])
def test_splits_with_other_names_are_found_in_a_wrapper_folder(small, squares, names):
    for old, new in zip(("train", "val"), names, strict=True):
        (squares / "up" / new).parent.mkdir(parents=True, exist_ok=True)
        (squares / old).rename(squares / "up" / new)
    splits = find_splits(small(), None)
    assert (len(splits.train), len(splits.val), splits.classes) == (20, 6, LEFT_RIGHT)
    assert f"images are in {squares / 'up'}" in splits.notes[0] and "contains the splits" in splits.notes[1]


def test_a_folder_that_can_be_a_split_or_a_class_is_rejected(small, squares):
    shutil.move(squares / "val" / "left", squares / "more")
    shutil.rmtree(squares / "val")
    with pytest.raises(UnreadableFile, match=r"if train is a split, pass .*train, and if it is a class, rename it"):
        find_splits(small(), None)
    shutil.move(squares / "train", squares / "val")
    with pytest.raises(UnreadableFile, match="contains val and other folders of images"):
        find_splits(small(), None)
    shutil.rmtree(squares / "more")
    with pytest.raises(UnreadableFile, match=r"the splits val but no training split; .*--data"):
        find_splits(small(), None)


def test_class_ids_are_utf8_text_if_folder_names_are_not(small, squares):
    for split in ("train", "val"):
        (squares / split / "left").rename(squares / split / "caf\udce9")
    splits = find_splits(small(), None)
    assert [c.id for c in splits.classes] == ["caf\\xe9", "right"] and splits.counts().tolist() == [11, 9]


def test_a_folder_named_train_can_be_a_class(small, squares):
    """A folder `train` that contains images is a class of vehicles and not a split."""
    (squares / "train" / "right").rename(squares / "train" / "train")
    splits = find_splits(small(data=str(squares / "train")), None)
    assert [c.id for c in splits.classes] == ["left", "train"]


def test_a_test_split_is_not_used_for_validation(small, squares):
    (squares / "val").rename(squares / "test")
    splits = find_splits(small(held_out=0.25), None)
    assert (len(splits.train), len(splits.val)) == (15, 5) and splits.val.root == squares / "train"


def test_every_class_keeps_a_training_image(small, squares):
    for path in [*(squares / "train" / "left").iterdir()][1:]:
        path.unlink()
    for seed in range(20):
        splits = find_splits(small(data=str(squares / "train"), held_out=0.5, seed=seed), None)
        assert splits.counts().min() >= 1
    for path in [*(squares / "train" / "right").iterdir()][1:]:
        path.unlink()
    with pytest.raises(UsageError, match=r"held_out = 0.5 of 2 images: no class has enough"):
        find_splits(small(data=str(squares / "train"), held_out=0.5), None)


def test_held_out_images_are_used_for_validation(small, squares):
    splits = find_splits(small(data=str(squares / "train"), held_out=0.25), None)
    assert (len(splits.train), len(splits.val)) == (15, 5)
    assert not set(splits.train.names) & set(splits.val.names)
    assert sorted(splits.val.labels) == [0, 0, 0, 1, 1]
    again = find_splits(small(data=str(squares / "train"), held_out=0.25, seed=1), None)
    assert again.val.names != splits.val.names
    none = find_splits(small(data=str(squares / "train")), None)
    assert none.val is None and "no validation" in none.notes[0]


def test_the_weights_define_the_classes_unless_the_head_is_new(small, squares):
    named = (ClassName("right", "r"), ClassName("left", "l"))
    splits = find_splits(small(weights="w"), weights(named))
    assert splits.classes == named and splits.train.labels[:2] == (1, 1)
    assert find_splits(small(weights="w", new_head=True), weights(named)).classes == LEFT_RIGHT
    assert find_splits(small(weights="w"), weights()).classes == LEFT_RIGHT, "in sorted order"
    listed = squares.parent / "classes.csv"
    listed.write_text("id,name\nright,R\nleft,L\nup,U\n")
    given = find_splits(small(classes=str(listed)), None)
    assert [c.name for c in given.classes] == ["R", "L", "U"] and given.counts().tolist() == [9, 11, 0]
    assert any("1 of 3 classes have no training images: up" in note for note in given.notes)
    with pytest.raises(DoesNotFit, match=r"classes.csv: contains 3 classes, but the weights have 2; .*new_head"):
        find_splits(small(classes=str(listed), weights="w"), weights())


def test_imagenets_classes_are_used_for_weights_without_a_class_list(small, squares):
    for split in ("train", "val"):
        (squares / split / "left").rename(squares / split / "n01440764")
        (squares / split / "right").rename(squares / split / "n01443537")
    splits = find_splits(small(weights="w"), weights(count=1000))
    assert len(splits.classes) == 1000 and set(splits.train.labels) == {0, 1}
    assert any("998 of 1000 classes have no training images" in note for note in splits.notes)


def test_wordnet_folders_get_imagenets_names(small, squares):
    (squares / "train" / "left").rename(squares / "train" / "n01440764")
    (squares / "val" / "left").rename(squares / "val" / "n01440764")
    assert find_splits(small(), None).classes[0] == ("n01440764", "tench")


@pytest.mark.parametrize(
    ("fields", "initial", "error", "message"),
    [
        ({"data": ""}, None, UsageError, "no data"),
        ({"data": "nowhere"}, None, UnreadableFile, "nowhere: no such folder or tar"),
        ({"weights": "w"}, weights(count=3), DoesNotFit, "2 class folders .* 3 outputs.*finetune"),
        ({"weights": "w"}, weights((ClassName("a", "a"), ClassName("b", "b"))), DoesNotFit, "new head.*finetune"),
    ],
)
def test_data_that_does_not_match_is_rejected(small, fields, initial, error, message):
    with pytest.raises(error, match=message):
        find_splits(small(**fields), initial)


def test_both_splits_must_have_the_same_classes(small, squares):
    (squares / "val" / "left").rename(squares / "val" / "lfet")
    with pytest.raises(DoesNotFit, match="lfet"):
        find_splits(small(), None)


def test_a_single_class_is_rejected(small, squares):
    shutil.rmtree(squares / "train" / "right")
    shutil.rmtree(squares / "val" / "right")
    with pytest.raises(DoesNotFit, match=r"only class is left; .* two classes"):
        find_splits(small(), None)


def test_numbered_folders_are_classes_in_the_order_of_the_numbers(small, squares):
    for split in ("train", "val"):
        (squares / split / "left").rename(squares / split / "10")
        (squares / split / "right").rename(squares / split / "2")
    assert [c.id for c in find_splits(small(), None).classes] == ["2", "10"]


def test_the_message_for_a_validation_split_without_class_folders_contains_a_remedy(small, squares):
    """Tiny-ImageNet has its validation images in one folder, with a list of their classes next to it."""
    shutil.move(squares / "val" / "left", squares / "val" / "images")
    shutil.rmtree(squares / "val" / "right")
    with pytest.raises(DoesNotFit, match=r"validation images: .* without validation images with --data .*train"):
        find_splits(small(), None)
