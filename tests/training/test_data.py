"""Splits, classes, order and view of training images."""

import dataclasses
import shutil
import tarfile

import numpy as np
import pytest

from conftest import DIGITS
from fcvit.data.loader import Batch
from fcvit.errors import DoesNotFit, UnreadableFile, UsageError
from fcvit.models.classes import ClassName
from fcvit.tasks.classification.training import ClassificationTraining
from fcvit.training.batches import MicroBatches, epoch_batches, steps_per_epoch
from fcvit.training.data import find_splits
from fcvit.weights.reading import Weights

LEFT_RIGHT = (ClassName("left", "left"), ClassName("right", "right"))


def weights(classes=None, count=2):
    spec = dataclasses.replace(DIGITS, num_classes=count)
    return Weights(spec, {}, None, "torch", None, classes, (), ())


def test_train_and_val_beside_each_other_are_the_splits(small, squares):
    splits = find_splits(small(), None)
    assert (len(splits.train), len(splits.val), splits.classes) == (20, 6, LEFT_RIGHT)
    assert "these are the splits" in splits.notes[0] and splits.counts().tolist() == [11, 9]
    other = shutil.copytree(squares / "val", squares.parent / "other")
    assert find_splits(small(val=str(other)), None).val.root == other
    with tarfile.open(squares.parent / "images.tar", "w") as tar:
        tar.add(squares, ".")
    tarred = find_splits(small(data=str(squares.parent / "images.tar")), None)
    assert tarred.train.listing() == splits.train.listing() and tarred.val.listing() == splits.val.listing()


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_names_of_the_validation_split(small, squares, name):
    (squares / "val").rename(squares / name)
    shutil.copytree(squares / name, squares / "test")
    splits = find_splits(small(), None)
    assert splits.val.root == squares / name and splits.classes == LEFT_RIGHT
    assert "not used: test" in splits.notes[1]
    shutil.copytree(squares / name, squares / "val")
    with pytest.raises(UsageError, match="which one validates"):
        find_splits(small(), None)


@pytest.mark.parametrize("names", [("Training", "Validation"), ("seg_train/seg_train", "seg_val/seg_val")])
def test_splits_of_other_names_below_a_folder(small, squares, names):
    for old, new in zip(("train", "val"), names, strict=True):
        (squares / "up" / new).parent.mkdir(parents=True, exist_ok=True)
        (squares / old).rename(squares / "up" / new)
    splits = find_splits(small(), None)
    assert (len(splits.train), len(splits.val), splits.classes) == (20, 6, LEFT_RIGHT)
    assert "taken for the data set" in splits.notes[0] and "these are the splits" in splits.notes[1]


def test_a_folder_that_may_be_a_split_or_a_class_is_not_guessed(small, squares):
    shutil.move(squares / "val" / "left", squares / "more")
    shutil.rmtree(squares / "val")
    with pytest.raises(UnreadableFile, match=r"if that is a split, name its folder .*train; if it is a class, rename"):
        find_splits(small(), None)
    shutil.move(squares / "train", squares / "val")
    with pytest.raises(UnreadableFile, match="beside val"):
        find_splits(small(), None)
    shutil.rmtree(squares / "more")
    with pytest.raises(UnreadableFile, match="a folder val of class folders, but none train"):
        find_splits(small(), None)


def test_classes_of_folders_that_are_not_utf8_can_be_written(small, squares):
    for split in ("train", "val"):
        (squares / split / "left").rename(squares / split / "caf\udce9")
    splits = find_splits(small(), None)
    assert [c.id for c in splits.classes] == ["caf\\xe9", "right"] and splits.counts().tolist() == [11, 9]


def test_a_train_may_be_a_class(small, squares):
    """A folder `train` with images in it is one of vehicles, not a split."""
    (squares / "train" / "right").rename(squares / "train" / "train")
    splits = find_splits(small(data=str(squares / "train")), None)
    assert [c.id for c in splits.classes] == ["left", "train"]


def test_a_test_split_alone_validates_nothing(small, squares):
    (squares / "val").rename(squares / "test")
    splits = find_splits(small(held_out=0.25), None)
    assert (len(splits.train), len(splits.val)) == (15, 5) and splits.val.root == squares / "train"


def test_every_class_keeps_an_image_to_train_on(small, squares):
    for path in [*(squares / "train" / "left").iterdir()][1:]:
        path.unlink()
    for seed in range(20):
        splits = find_splits(small(data=str(squares / "train"), held_out=0.5, seed=seed), None)
        assert splits.counts().min() >= 1
    for path in [*(squares / "train" / "right").iterdir()][1:]:
        path.unlink()
    with pytest.raises(UsageError, match="every class has too few"):
        find_splits(small(data=str(squares / "train"), held_out=0.5), None)


def test_some_images_are_held_out(small, squares):
    splits = find_splits(small(data=str(squares / "train"), held_out=0.25), None)
    assert (len(splits.train), len(splits.val)) == (15, 5)
    assert not set(splits.train.names) & set(splits.val.names)
    assert sorted(splits.val.labels) == [0, 0, 0, 1, 1]
    again = find_splits(small(data=str(squares / "train"), held_out=0.25, seed=1), None)
    assert again.val.names != splits.val.names
    none = find_splits(small(data=str(squares / "train")), None)
    assert none.val is None and "no validation" in none.notes[0]


def test_classes_are_those_of_the_weights_unless_the_head_is_new(small, squares):
    named = (ClassName("right", "r"), ClassName("left", "l"))
    kept = find_splits(small(weights="w"), weights(named))
    assert kept.classes == named and kept.train.labels[:2] == (1, 1)
    assert find_splits(small(weights="w", new_head=True), weights(named)).classes == LEFT_RIGHT
    assert find_splits(small(weights="w"), weights()).classes == LEFT_RIGHT, "counted in sorted order"
    listed = squares.parent / "classes.csv"
    listed.write_text("id,name\nright,R\nleft,L\nup,U\n")
    given = find_splits(small(classes=str(listed)), None)
    assert [c.name for c in given.classes] == ["R", "L", "U"] and given.counts().tolist() == [9, 11, 0]
    assert any("1 of 3 classes have no training images: up" in note for note in given.notes)
    with pytest.raises(DoesNotFit, match="3 classes, the weights have 2"):
        find_splits(small(classes=str(listed), weights="w"), weights())


def test_imagenets_classes_are_known_to_weights_that_do_not_name_them(small, squares):
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
    ("fields", "weights_of", "error", "message"),
    [
        ({"data": ""}, None, UsageError, "no data"),
        ({"data": "nowhere"}, None, UnreadableFile, "nowhere: no such folder or tar"),
        ({"weights": "w"}, weights(count=3), DoesNotFit, "2 class folders .* 3 outputs.*finetune"),
        ({"weights": "w"}, weights((ClassName("a", "a"), ClassName("b", "b"))), DoesNotFit, "finetune.* a new head"),
    ],
)
def test_what_does_not_go_together_is_said(small, fields, weights_of, error, message):
    with pytest.raises(error, match=message):
        find_splits(small(**fields), weights_of)


def test_classes_of_the_splits_must_be_the_same(small, squares):
    (squares / "val" / "left").rename(squares / "val" / "lfet")
    with pytest.raises(DoesNotFit, match="lfet"):
        find_splits(small(), None)


def test_one_class_is_none(small, squares):
    shutil.rmtree(squares / "train" / "right")
    shutil.rmtree(squares / "val" / "right")
    with pytest.raises(DoesNotFit, match="one class"):
        find_splits(small(), None)


def test_a_step_must_divide_evenly():
    assert MicroBatches(12, 2, 1, 3).images == 2 and MicroBatches(12, 2, 1, 3).numbers(2) == [3, 4, 5, 9, 10, 11]
    with pytest.raises(UsageError, match="not divisible by 3"):
        MicroBatches(8, 3)
    with pytest.raises(UsageError, match="leaves 1 image"):
        MicroBatches(8, 2, 0, 4)
    assert steps_per_epoch(20, 8) == 2
    with pytest.raises(UsageError, match="only 7 training images"):
        steps_per_epoch(7, 8)


def epoch(recipe, number, division=None, workers=0):
    task = ClassificationTraining(recipe, None)
    transform, division = task.transform(number), division or MicroBatches(8)
    batches = epoch_batches(task.train, recipe.seed, number, transform, division, workers)
    return [(batch.number, batch.pixels[0], np.array(batch.targets[0])) for batch in batches]


def same(one, other):
    return all((a[1] == b[1]).all() and (a[2] == b[2]).all() for a, b in zip(one, other, strict=True))


def test_order_and_views_follow_from_seed_and_epoch_alone(small):
    first = epoch(small(), 0)
    assert [(number, pixels.shape, len(labels)) for number, pixels, labels in first] == [
        (0, (8, 3, 32, 32), 8),
        (1, (8, 3, 32, 32), 8),
    ]
    assert same(epoch(small(), 0), first)
    assert not same(epoch(small(), 1), first) and not same(epoch(small(seed=1), 0), first)


@pytest.mark.slow
def test_workers_do_not_matter(small):
    assert same(epoch(small(), 3, workers=2), epoch(small(), 3))


def test_who_does_a_part_does_not_matter(small):
    """Four parts of a step in one process, or in two: the same images with the same augmentation."""
    alone = epoch(small(), 0, MicroBatches(8, accumulate=4))
    shared = [part for rank in range(2) for part in epoch(small(), 0, MicroBatches(8, 2, rank, 2))]
    assert same(alone, sorted(shared, key=lambda part: part[0]))
    assert (
        np.concatenate([labels for _, _, labels in alone]) == np.concatenate([p[2] for p in epoch(small(), 0)])
    ).all()


def test_the_networks_input_is_mixed_normalized_and_erased(small):
    pixels = np.full((4, 3, 32, 32), 51, np.uint8)
    off = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "label_smoothing": 0.0}
    colors = {"input_size": 32, "mean": (0.2, 0.2, 0.1), "std": (1.0, 1.0, 0.5)}

    def network_input(labels, epoch=0, **fields):
        batch = Batch(0, np.arange(4), (), (pixels,), (labels,), ())
        return ClassificationTraining(small(**{**off, **colors, **fields}), None).inputs(batch, epoch)

    images, targets = network_input([0, 1, 1, 0])
    assert images == pytest.approx(np.broadcast_to(np.array([0, 0, 0.2])[:, None, None], images.shape), abs=1e-7)
    assert targets.tolist() == [[1, 0], [0, 1], [0, 1], [1, 0]]
    erased, _ = network_input([0] * 4, erasing=1.0)
    assert all((image != clean).any() for image, clean in zip(erased, images, strict=True))
    again, _ = network_input([0] * 4, 1, erasing=1.0)
    assert (again != erased).any(), "another rectangle in another epoch"
    assert len({network_input([0, 0, 1, 1], e, mixup=1.0)[1][0, 0] for e in range(5)}) == 5, "another share each"
    _, mixed = network_input([0, 0, 1, 1], mixup=1.0)
    assert mixed.sum(1) == pytest.approx(1) and 0 < mixed[0, 0] < 1


def test_classes_of_numbered_folders_are_in_the_order_of_the_numbers(small, squares):
    for split in ("train", "val"):
        (squares / split / "left").rename(squares / split / "10")
        (squares / split / "right").rename(squares / split / "2")
    assert [c.id for c in find_splits(small(), None).classes] == ["2", "10"]


def test_a_validation_split_without_its_classes_says_how_to_train_without_it(small, squares):
    """Tiny-ImageNet has its validation images in one folder, with a list of their classes beside."""
    shutil.move(squares / "val" / "left", squares / "val" / "images")
    shutil.rmtree(squares / "val" / "right")
    with pytest.raises(DoesNotFit, match=r"validation images: .* or train without it: --data .*train"):
        find_splits(small(), None)
