"""Test that COCO's JSON files are read as pycocotools and mmdetection read them, and problems are reported by name."""

import dataclasses
import json
import pickle
import re
import tarfile
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import golden_json
from fcvit.data import coco
from fcvit.data.classes import ClassName
from fcvit.data.coco import find_coco, read_coco, training_images
from fcvit.errors import DoesNotFit, FcvitError, UnreadableFile

SAMPLE = golden_json("detection/coco_annotations.json")
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]  # not in the order of the ids
SQUARE = [[10, 10, 30, 10, 30, 30, 10, 30]]


def image(number, **fields):
    return {"id": number, "file_name": f"{number}.png", "width": 80, "height": 60, **fields}


def annotation(number, image_id=1, **fields):
    box = {"bbox": [10, 10, 20, 20], "area": 400, "segmentation": SQUARE}
    return {"id": number, "image_id": image_id, "category_id": 3, "iscrowd": 0, **box, **fields}


def content(images=(1, 2), annotations=None, categories=CATEGORIES):
    images = [image(one) if isinstance(one, int) else one for one in images]
    return {
        "images": images,
        "annotations": [annotation(5)] if annotations is None else annotations,
        "categories": categories,
    }


def without(entry, *keys):
    return {key: value for key, value in entry.items() if key not in keys}


def write(root, value, file="annotations/instances_val2017.json", folder="val2017", names=None):
    """Write a JSON file and empty image files. The reader does not decode images."""
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    if names is None:
        names = [one["file_name"] for one in value["images"]]
    for name in names:
        (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
        (root / folder / name).touch()
    return root


def read(root, split=None):
    layout = find_coco(root)
    return read_coco(layout, split or next(iter(layout.splits)))


def read_content(tmp_path, *arguments, **options):
    return read(write(tmp_path, content(*arguments, **options)))


# Layouts


def test_coco_is_read_as_downloaded(tmp_path, notes):
    for split in ("train2017", "val2017"):
        write(tmp_path / "coco", SAMPLE, f"annotations/instances_{split}.json", split)
    (tmp_path / "coco/annotations/captions_val2017.json").write_text('{"images": [], "annotations": []}')
    layout = find_coco(tmp_path)
    assert [*layout.splits] == ["train2017", "val2017"] and layout.named("val") == ["val2017"]
    assert layout.others == ("annotations/captions_val2017.json",)
    images = read_coco(layout, "val2017")
    assert images.ids == (86, 89, 309, 508, 544) and images.names[0] == "val2017/000000000086.jpg"
    assert images.category_ids[0] == 1 and images.category_ids[79] == 90 and images.category_ids[11] == 13
    assert images.classes[0] == ClassName("person", "person") and images.classes[79].name == "toothbrush"
    assert [len(target.boxes) for target in images.targets] == [3, 10, 4, 0, 17]
    first = SAMPLE["annotations"][[a["image_id"] for a in SAMPLE["annotations"]].index(86)]
    assert images.targets[0].boxes[0].tolist() == first["bbox"] and images.targets[0].areas[0] == first["area"]
    assert images.targets[0].size == (640, 512)
    assert sum(target.crowd.sum() for target in images.targets) == 1
    assert [*images.problems] == [coco.UNUSED]


def test_the_ground_truth_equals_the_file(tmp_path):
    """Only the numbers of the annotations are new, because pycocotools takes 0 for "no match"."""
    truth = read(write(tmp_path, SAMPLE)).ground_truth(with_masks=False)
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
    expected = sorted(SAMPLE["annotations"], key=lambda one: one["image_id"])
    assert [[a[k] for k in keys] for a in truth["annotations"]] == [[a[k] for k in keys] for a in expected]
    assert [a["id"] for a in truth["annotations"]] == list(range(1, 35))
    assert truth["images"][0] == {"id": 86, "height": 640, "width": 512}
    assert [c["id"] for c in truth["categories"]] == [c["id"] for c in SAMPLE["categories"]]


def test_the_masks_of_the_ground_truth_equal_those_of_pycocotools(tmp_path):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    from pycocotools.coco import COCO

    api = COCO()
    api.dataset = SAMPLE
    api.createIndex()
    expected = sorted(SAMPLE["annotations"], key=lambda one: one["image_id"])
    truth = read(write(tmp_path, SAMPLE)).ground_truth(with_masks=True)
    assert [a["segmentation"] for a in truth["annotations"]] == [api.annToRLE(a) for a in expected]


@pytest.mark.parametrize(
    ("file", "folder", "split"),
    [
        ("annotations/instances_val2017.json", "val2017", "val2017"),
        ("annotations/instances_val.json", "images", "val"),
        ("annotations/instances_val.json", "images/val", "val"),
        ("annotations.json", "", "all"),
        ("labels.JSON", "pictures", "all"),
        ("train/_annotations.coco.json", "train", "train"),
        ("train/annotations/a.json", "train/images", "train"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_layout_is_found_in_a_folder_and_in_a_tar(tmp_path, file, folder, split, packed):
    root = data = write(tmp_path / "set", content(), file, folder)
    if packed:
        data = tmp_path / "set.tar"
        with tarfile.open(data, "w") as tar:
            tar.add(root, "set")
    layout = find_coco(data)
    assert layout.splits == {split: file}
    images = read_coco(layout, split)
    assert images.names == tuple(f"{folder}/{n}.png".lstrip("/") for n in (1, 2)) and images.locations[0].read() == b""


@pytest.mark.parametrize(("file", "folder"), [("annotations/a.json", "b"), ("x.json", ""), ("annotations/x.json", "")])
def test_a_json_file_can_be_passed(tmp_path, file, folder):
    write(tmp_path / "set", content(), file, folder)
    assert len(read(tmp_path / "set" / file)) == 2


def test_other_data_is_not_coco(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/1.png").touch()
    (tmp_path / "classes.json").write_text('["cat"]')
    (tmp_path / "pipe.json").symlink_to("nowhere")
    assert find_coco(tmp_path) is None
    for index in range(30):  # one file for each image, as Labelme writes
        (tmp_path / f"{index}.json").write_text('{"images": [], "annotations": []}')
    assert find_coco(tmp_path) is None


# Images


@pytest.mark.parametrize(
    "file_name",
    [
        "a b.png",
        "val2017/a b.png",
        "C:\\photos\\a b.png",
        "..\\a b.png",
        "/data/x/a b.png",
        "https://x.org/y/a%20b.png?z=1",
    ],
)
def test_images_are_found_by_the_last_part_of_their_name(tmp_path, file_name):
    value = content([image(1, file_name=file_name)])
    assert read(write(tmp_path, value, names=["a b.png"])).names == ("val2017/a b.png",)


def test_the_image_of_the_right_split_is_used(tmp_path):
    for split in ("train", "val"):
        write(tmp_path, content([1]), f"annotations/instances_{split}.json", f"images/{split}2017")
    assert read(tmp_path, "train").names == ("images/train2017/1.png",)
    assert read(tmp_path, "val").names == ("images/val2017/1.png",)
    (tmp_path / "images/train2017/1.png").unlink()
    with pytest.raises(UnreadableFile, match=r"missing, left out: 1\.png"):  # not the image of the other split
        read(tmp_path, "train")
    write(tmp_path, content([image(1, file_name="val2017/1.png")]), "annotations/instances_train.json", names=[])
    assert read(tmp_path, "train").names == ("images/val2017/1.png",)
    value = content([image(1, file_name="b/1.png"), image(2, file_name="a/1.png")])
    folders = read(write(tmp_path / "folders", value))
    assert folders.names == ("val2017/b/1.png", "val2017/a/1.png")


def test_an_ambiguous_name_is_reported(tmp_path):
    images = read(write(tmp_path, content(), names=["a/1.png", "b/1.png", "2.png"]))
    assert images.names == ("val2017/2.png",) and images.problems[coco.AMBIGUOUS] == ("1.png",)


def test_missing_images_are_left_out_with_their_annotations(tmp_path):
    value = content([1, 2, 3], [annotation(1, 1), annotation(2, 2), annotation(3, 99)])
    images = read(write(tmp_path, value, names=["2.png", "3.png"]))
    assert images.ids == (2, 3) and [len(target.boxes) for target in images.targets] == [1, 0]
    assert images.problems[coco.MISSING] == ("1.png",)
    assert images.problems[coco.UNKNOWN_IMAGE] == ("annotation 3 of image 99",)
    assert any("images that are listed but missing, left out (1): 1.png" in note for note in images.notes)
    with pytest.raises(
        UnreadableFile, match=r"none of the 2 images can be used \(.*missing.*: 1\.png\); the images are"
    ):
        read(write(tmp_path / "none", content(), names=[]))


def test_doubled_images_are_reported(tmp_path):
    same_file = image(4, file_name="1.png")
    other_file = image(2, file_name="1.png")
    images = read(write(tmp_path, content([1, 1, 2, other_file, 3, same_file])))
    assert images.ids == (1, 3)
    assert images.problems[coco.SAME_IMAGE_ID] == ("2 (2.png, 1.png)",)
    assert images.problems[coco.SAME_FILE] == ("1.png", "1.png")


@pytest.mark.parametrize("fields", [{"width": -1, "height": -1}, {"width": None}, {"height": 0}, {"width": "80"}])
def test_a_missing_size_is_read_from_the_image(tmp_path, fields):
    write(tmp_path, content([image(1, **fields), image(2, **fields), 3]))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (70, 50)).save(tmp_path / "val2017/1.png", exif=exif)
    images = read(tmp_path)
    assert images.ids == (1, 3) and images.targets[0].size == (70, 50)  # upright
    assert images.problems[coco.NO_SIZE] == ("val2017/1.png", "val2017/2.png")
    assert images.problems[coco.BAD_SIZE] == ("val2017/2.png: not a readable image: an empty file",)


def test_images_of_impossible_size_are_left_out(tmp_path):
    images = read_content(tmp_path, [image(1, width=10**9, height=10**9), image(2, width=30_000, height=30_000), 3], [])
    assert images.ids == (3,) and len(images.problems[coco.BAD_SIZE]) == 2


def test_ids_can_be_text(tmp_path):
    """Numbers in text are numbers, and other ids are kept."""
    value = content(["1", 2], [annotation("5", "1"), annotation("6", 2.0)], [{"id": "3", "name": "cat"}])
    value["images"] = [image(2), image("1")]
    images = read(write(tmp_path / "numbers", value))
    assert images.ids == (1, 2) and images.category_ids == (3,)
    assert images.problems[coco.TEXT_IDS] == ("categories: 3", "images: 1", "annotations: 1")
    value["images"] = [image(2), image("a7")]
    value["annotations"] = [annotation("x", "a7"), annotation("y", 2)]
    images = read(write(tmp_path / "names", value))
    assert images.ids == ("2", "a7") and [len(target.boxes) for target in images.targets] == [1, 1]


# Annotations


@pytest.mark.parametrize(
    ("fields", "kind", "kept"),
    [
        ({"category_id": 4}, "UNKNOWN_CATEGORY", False),
        ({"category_id": [3]}, "UNKNOWN_CATEGORY", False),
        ({"category_id": True}, "UNKNOWN_CATEGORY", False),
        ({"image_id": None}, "NOT_ANNOTATION", False),
        ({"image_id": {}}, "NOT_ANNOTATION", False),
        ({"bbox": [1, 2, 3]}, "BAD_BOX", False),
        ({"bbox": "1,2,3,4"}, "BAD_BOX", False),
        ({"bbox": [1, 2, "3", 4]}, "BAD_BOX", False),
        ({"bbox": [1, 2, float("nan"), 4]}, "BAD_BOX", False),
        ({"bbox": [1, float("inf"), 3, 4]}, "BAD_BOX", False),
        ({"bbox": [1, 2, 3, 10**400]}, "BAD_BOX", False),
        ({"bbox": [30, 30, -5, 5]}, "BAD_BOX", False),
        ({"bbox": None}, "BAD_BOX", False),
        ({"iscrowd": 2}, "BAD_CROWD", False),
        ({"iscrowd": "0"}, "BAD_CROWD", False),
        ({"iscrowd": None}, "NO_CROWD", True),
        ({"area": None}, "NO_AREA", True),
        ({"area": float("nan")}, "NO_AREA", True),
        ({"bbox": [81, 10, 20, 20]}, "OUTSIDE", True),
        ({"bbox": [-20, 10, 20, 20]}, "OUTSIDE", True),
        ({"bbox": [70, 10, 20, 20]}, "OVER_BORDER", True),
        ({"bbox": [10, 10, 20, 0.5]}, "TINY", True),
        ({"area": 0}, "TINY", True),
        ({"segmentation": [[1, 2, 3]]}, "SHORT_POLYGON", True),
        ({"segmentation": {"size": [1, 1], "counts": [1]}}, "BAD_MASK", True),
        ({"segmentation": []}, "NO_MASK", True),
        ({"segmentation": None}, "NO_MASK", True),
    ],
)
def test_each_problem_of_an_annotation_is_reported(tmp_path, fields, kind, kept):
    images = read_content(tmp_path, annotations=[annotation(5), annotation(17, **fields)])
    (shown, *_) = images.problems.pop(getattr(coco, kind))
    assert shown.startswith("annotations[1]" if "image_id" in fields else "annotation 17 of val2017/1.png")
    images.problems.pop(coco.UNUSED)
    assert {*images.problems} <= ({coco.NO_MASK} if kind == "SHORT_POLYGON" else set())
    assert len(images.targets[0].boxes) == 1 + kept


def test_doubled_annotation_ids_are_reported_and_harmless(tmp_path):
    images = read_content(tmp_path, annotations=[annotation(5), annotation(5), annotation(5)])
    assert len(images.problems[coco.SAME_ID]) == 2 and len(images.targets[0].boxes) == 3
    assert [a["id"] for a in images.ground_truth(False)["annotations"]] == [1, 2, 3]


def test_missing_areas_are_those_of_the_masks(tmp_path):
    entries = [without(annotation(1), "area"), without(annotation(2, segmentation=None, bbox=[0, 0, 4, 5]), "area")]
    counts = {"size": [60, 80], "counts": [3, 7, 4790]}
    entries.append(without(annotation(3, segmentation=counts), "area", "iscrowd"))
    (target, _) = read_content(tmp_path, annotations=entries).targets
    assert target.areas.tolist() == [400, 20, 7] and not target.crowd.any()


def test_labels_follow_the_category_ids(tmp_path):
    images = read_content(tmp_path, annotations=[annotation(1), annotation(2, category_id=7)])
    assert [c.name for c in images.classes] == ["cat", "dog"] and images.category_ids == (3, 7)
    assert images.targets[0].labels.tolist() == [0, 1]
    assert read_content(tmp_path / "b").problems[coco.UNUSED] == ("dog",)


def test_classes_can_have_another_order_than_the_categories(tmp_path):
    images = read_content(tmp_path, annotations=[annotation(1), annotation(2, category_id=7), annotation(3)])
    ordered = tuple(ClassName(name, name) for name in ("dog", "bird", "cat"))
    moved = images.with_classes(ordered)
    assert moved.targets[0].labels.tolist() == [2, 0, 2] and moved.category_ids == (7, 9, 3)
    fewer = images.with_classes(ordered[:2])
    assert fewer.targets[0].labels.tolist() == [0] and len(fewer.targets[0].masks) == 1
    with pytest.raises(DoesNotFit, match="has the categories cat, dog, but the classes are bird"):
        images.with_classes(ordered[1:2])
    with pytest.raises(DoesNotFit, match="several classes have the same name"):
        images.with_classes((*ordered, ClassName("other", "dog")))


def test_categories_of_the_same_name_keep_their_ids(tmp_path):
    same = [{"id": 1, "name": "cat"}, {"id": 3, "name": "cat"}, {"id": 3, "name": "cat"}]
    images = read_content(tmp_path, categories=same)
    assert images.classes == (ClassName("cat (1)", "cat"), ClassName("cat (3)", "cat"))


@pytest.mark.parametrize(("corners", "scale"), [(False, 1), (False, 2), (True, 1)])
def test_boxes_as_corners_are_recognized(tmp_path, corners, scale):
    """Boxes of another scale reach over the border too, but do not fit as corners."""
    generator = np.random.default_rng(0)
    low = generator.uniform(0, 50, (40, 2)) * [1.2, 0.8]
    high = low + generator.uniform(2, 20, (40, 2))
    boxes = (scale * np.concatenate([low, high if corners else high - low], 1)).tolist()
    value = content(annotations=[annotation(i, bbox=box) for i, box in enumerate(boxes)])
    images = read(write(tmp_path, value))
    assert images.corners == corners and bool(images.hints) == corners
    if corners:
        message = "instances_val2017.json: most boxes reach beyond their images, but fit as the corners x1, y1, x2, y2"
        assert message in images.notes[-1]
        with pytest.raises(DoesNotFit, match=message):
            training_images(images, False)


# Training images


def reference_filter(images, with_masks=False):
    """Return the ids of the images that mmdetection trains on, and their number of boxes, from its documented rules."""
    kept = {}
    for number, target in zip(images.ids, images.targets, strict=True):
        height, width = target.size
        count = 0
        for (x, y, w, h), area, crowd, ignored in zip(
            target.boxes, target.areas, target.crowd, target.ignored, strict=True
        ):
            inside_w, inside_h = max(0, min(x + w, width) - max(x, 0)), max(0, min(y + h, height) - max(y, 0))
            if not (ignored or crowd or inside_w * inside_h == 0 or area <= 0 or w < 1 or h < 1):
                count += 1
        if count and min(width, height) >= 32:
            kept[number] = count
    return kept


def test_only_images_with_usable_annotations_are_trained_on(tmp_path):
    sizes = {1: (80, 60), 2: (80, 31), 3: (32, 32), 4: (60, 80), 5: (50, 50), 6: (80, 60)}
    small = {"bbox": [1, 1, 5, 5]}
    entries = [
        annotation(1, 1),
        annotation(2, 1, ignore=True),
        annotation(3, 1, iscrowd=1),
        annotation(4, 2, **small),
        annotation(5, 3, **small),
        annotation(6, 4, bbox=[5, 5, 0.9, 5]),
        annotation(7, 4, **small, segmentation=[]),
        annotation(8, 6, area=0),
        annotation(9, 6, bbox=[80, 1, 5, 5]),
        annotation(10, 6, bbox=[75.5, 1, 1, 5], category_id=7),
    ]
    images = read_content(tmp_path, [image(n, width=w, height=h) for n, (w, h) in sizes.items()], entries)
    trained, notes = training_images(images, with_masks=False)
    assert {n: len(t.boxes) for n, t in zip(trained.ids, trained.targets, strict=True)} == reference_filter(images)
    assert trained.ids == (1, 3, 4, 6) and trained.landscape.tolist() == [True, False, False, True]
    assert trained.targets[3].labels.tolist() == [1] and trained.targets[3].corners().tolist() == [[75.5, 1, 76.5, 6]]
    assert trained.targets[0].corners().dtype == np.float32
    assert notes == tuple(
        f"{images.file}: left out 1 image {why}"
        for why in ("with a side under 32 pixels", "without a usable annotation")
    )
    assert training_images(images, with_masks=True)[0].ids == (1, 3, 6)
    with pytest.raises(DoesNotFit, match="no image has an annotation that can be trained"):
        training_images(images.take([1]), False)
    unmasked = read_content(tmp_path / "b", annotations=[annotation(1, segmentation=[])])
    with pytest.raises(DoesNotFit, match="the annotations have no masks, so train a network without a mask head"):
        training_images(unmasked, True)


boxes = st.tuples(*[st.integers(-3, 12)] * 2, *[st.sampled_from([0, 0.5, 1, 2, 9])] * 2)


@pytest.mark.slow
@given(st.lists(st.tuples(boxes, st.integers(0, 1), st.booleans(), st.sampled_from([0, 1, 50]), st.integers(1, 3))))
@settings(max_examples=100, deadline=None)
def test_the_filter_equals_the_rules_of_mmdetection(tmp_path_factory, rows):
    entries = [
        annotation(index, number, bbox=list(box), iscrowd=crowd, ignore=ignore, area=area)
        for index, (box, crowd, ignore, area, number) in enumerate(rows)
    ]
    images = [image(1, width=32, height=40), image(2, width=10, height=90), image(3, width=99, height=32)]
    data = read(write(tmp_path_factory.getbasetemp() / "filter", content(images, entries)))
    data = dataclasses.replace(data, corners=False)  # some examples fit
    expected = reference_filter(data)
    try:
        trained, _ = training_images(data, with_masks=False)
    except DoesNotFit:
        assert not expected
        return
    assert {n: len(t.boxes) for n, t in zip(trained.ids, trained.targets, strict=True)} == expected


def test_a_data_set_is_a_dataset_of_the_loader(tmp_path):
    images = read_content(tmp_path, [3, 1, 2], [annotation(1, 3), annotation(2, 1, segmentation=None)])
    assert images.ids == (1, 2, 3) and len(images) == 3
    assert images.take([2, 0]).names == ("val2017/3.png", "val2017/1.png")
    assert images.take([2, 0]).targets == (images.targets[2], images.targets[0])
    again = pickle.loads(pickle.dumps(images))
    assert again.listing() == images.listing() == read(tmp_path).listing() != images.take([0, 1]).listing()
    changed = [
        content([3, 1, 2], [annotation(1, 3, **fields), annotation(2, 1, segmentation=None)])
        for fields in ({"area": 5}, {"iscrowd": 1}, {"category_id": 7}, {"segmentation": [[1, 1, 9, 9, 1, 9]]})
    ]
    listings = {read(write(tmp_path / str(i), value)).listing() for i, value in enumerate(changed)}
    assert len(listings | {images.listing()}) == 5


# Hostile files

HOSTILE = {
    "empty": ("", "not a JSON file"),
    "a list": ("[]", "has no list 'images'"),
    "text": ('"images annotations"', "has no list 'images'"),
    "truncated": (json.dumps(content())[:-40], "not a JSON file"),
    "deep": ('{"images": ' + "[" * 100_000, "nested too deeply"),
    "deep objects": ('{"images": ' + '{"a":' * 100_000, "nested too deeply"),
    "a long number": ('{"images": ' + "1" * 100_000 + "}", "not a JSON file"),
    "repeated keys": (
        '{"images": [], "images": [], "annotations": [], "categories": []}',
        "the key 'images' occurs twice",
    ),
    "repeated keys inside": (json.dumps(content())[:-1] + ', "x": {"a": 1, "a": 2}}', "the key 'a' occurs twice"),
    "images of objects": (json.dumps({**content(), "images": {}}), "has no list 'images'"),
    "no categories": (json.dumps(without(content(), "categories")), "has no list 'categories'"),
    "no category": (json.dumps({**content(), "categories": []}), "list of categories is empty"),
    "a category without a name": (json.dumps({**content(), "categories": [{"id": 1}]}), r"categories\[0\] has no name"),
    "a category of text": (json.dumps({**content(), "categories": ["cat"]}), r"categories\[0\] has no name"),
    "a category id of text": (
        json.dumps({**content(), "categories": [{"id": "a", "name": "b"}]}),
        "no name or no whole",
    ),
    "a huge category id": (
        json.dumps({**content(), "categories": [{"id": 1 << 60, "name": "b"}]}),
        "no name or no whole",
    ),
    "two names": (
        json.dumps({**content(), "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}),
        "'a' and 'b' have the same id 1",
    ),
    "images of numbers": (json.dumps({**content(), "images": [1, None, "x"]}), r"none of the 3 images .*images\[0\]"),
    "annotations of numbers": (json.dumps({**content(), "annotations": [1, None, []]}), r"none of the 3 annotations"),
    "captions": (
        json.dumps({**content(), "annotations": [{"image_id": 1, "id": 2, "caption": "a cat"}]}),
        "none of the 1 annotation can be used .*expected boxes",
    ),
    "bytes": ("\ud800", "not a JSON file"),
    "a pickle": ("\x80\x04cos\nsystem\n(S'exit'\ntR.", "not a JSON file"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_rejected_in_one_line(tmp_path, kind):
    text, message = HOSTILE[kind]
    path = write(tmp_path, content()) / "annotations/instances_val2017.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(FcvitError, match=rf"^{re.escape(str(path))}: .*{message}") as error:
        read(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(path)) + 500


def test_a_missing_file_and_a_huge_file_are_rejected(tmp_path):
    path = write(tmp_path, content()) / "annotations/instances_val2017.json"
    layout = find_coco(tmp_path)
    with path.open("wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(UnreadableFile, match="larger than 512 MiB"):
        read_coco(layout, "val2017")
    assert find_coco(tmp_path) is None
    path.unlink()
    with pytest.raises(UnreadableFile, match="no such file"):
        read_coco(layout, "val2017")


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.floats(),
    st.sampled_from(
        [1 << 70, -(10**30), "1", "", "a", "1.png", "\\", "://", "http://[x", [], {}, [1, 1, 5, 5], [[0] * 6]]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.sampled_from(["size", "counts", "id"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def entries_of(example):
    return st.lists(
        st.one_of(
            values,
            st.fixed_dictionaries(
                {}, optional={key: st.one_of(st.just(value), values) for key, value in example.items()}
            ),
            st.fixed_dictionaries({key: st.just(value) for key, value in example.items()}),
        ),
        max_size=4,
    )


@pytest.mark.slow
@given(entries_of(image(1)), entries_of(annotation(1, ignore=0)), entries_of(CATEGORIES[1]))
@settings(max_examples=250, deadline=None)
def test_any_json_is_read_or_an_error_of_the_package(tmp_path_factory, images, annotations, categories):
    root = write(tmp_path_factory.getbasetemp() / "any", content(), names=["1.png", "a"])
    value = {"images": images, "annotations": annotations, "categories": categories}
    path = write(root, value, names=[]) / "annotations/instances_val2017.json"
    try:
        data = read(path)
        data.ground_truth(with_masks=False)
        training_images(data, with_masks=True)
    except FcvitError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return
    assert all(np.isfinite(target.boxes).all() and np.isfinite(target.areas).all() for target in data.targets)


@pytest.mark.slow
def test_many_annotations_are_read_quickly(tmp_path):
    """It takes 3 seconds, half of them in Python's JSON parser. The machine can be shared, so the limit is generous."""
    text, entry = json.dumps(content([1], [])), json.dumps(annotation(1))
    (tmp_path / "a.json").write_text(
        text.replace('"annotations": []', f'"annotations": [{",".join([entry] * 100_000)}]')
    )
    (tmp_path / "1.png").touch()
    start = time.process_time()
    assert len(read(tmp_path).targets[0].boxes) == 100_000
    assert time.process_time() - start < 30
