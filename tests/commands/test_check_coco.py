"""Test the check of data with COCO's annotations: every problem is reported by name, and nothing else."""

import functools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from fcvit.cli import main
from fcvit.commands import check_data as module
from fcvit.data import coco
from fcvit.errors import UsageError
from fcvit.tasks.segmentation.label_options import LabelOptions

check_data = functools.partial(module.check_data, workers=0)
SQUARE = [[10, 10, 30, 10, 30, 30, 10, 30]]


def photo(path, seed, size=(80, 60), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, **options)


def annotation(number, image_id, category, **fields):
    box = {"bbox": [10, 10, 20, 20], "area": 400, "segmentation": SQUARE}
    return {"id": number, "image_id": image_id, "category_id": category, "iscrowd": 0, **box, **fields}


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Two splits with four images each, one cat and two dogs in each image."""
    root = tmp_path_factory.mktemp("coco") / "pets"
    for part, split in enumerate(("train", "val")):
        images = [{"id": i, "file_name": f"{i}.png", "width": 80, "height": 60} for i in range(4)]
        for i in range(4):
            photo(root / split / f"{i}.png", 10 * part + i)
        annotations = [annotation(3 * i + k, i, (1, 5, 5)[k]) for i in range(4) for k in range(3)]
        categories = [{"id": 1, "name": "cat"}, {"id": 5, "name": "dog"}]
        path = root / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return root


@pytest.fixture
def data(original, tmp_path):
    return shutil.copytree(original, tmp_path / "pets")


@pytest.fixture
def train(data):
    return data / "annotations/instances_train.json"


def run(capsys, *words):
    code = main(["check-data", *map(str, words), "--workers", "0"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def findings(check):
    return {what: list(items) for what, items in check.findings() if items}


def test_clean_data(data, capsys):
    check = check_data(data, few=4)
    assert check.clean and check.exit_code == 0 and check.images == 8 and not check.hints
    train, val = check.splits
    assert (train.name, train.images, train.empty, train.crowds, train.masks) == ("train", 4, 0, 0, 12)
    assert train.annotations == val.annotations == {"cat": 4, "dog": 8}
    assert repr(check) == "CocoCheck(8 images, no findings)"
    code, out, _ = run(capsys, data, "--few", 0)
    assert code == 0 and "no findings" in out and "8 images with annotations in COCO's format" in out
    assert findings(check_data(data)) == {
        f"classes with fewer than 10 annotations ({split})": ["cat (4)", "dog (8)"] for split in ("train", "val")
    }


def test_one_json_file_can_be_checked(data, capsys):
    code, out, _ = run(capsys, data / "annotations/instances_val.json", "--few", 0)
    assert code == 0 and "4 images" in out and "no findings" in out
    with pytest.raises(UsageError, match="--ignore-index is for images with label maps"):
        check_data(data / "annotations/instances_val.json", labels=LabelOptions(ignore_index=[0]))


def test_problems_are_listed_with_their_kind(data, train, capsys):
    (data / "train/0.png").write_bytes(b"?")
    (data / "train/1.png").unlink()
    shutil.copy(data / "train/2.png", data / "val/2.png")
    photo(data / "train/3.png", 99, (70, 60))

    def change(content):
        content["annotations"] += [annotation(90, 2, 5, iscrowd=1), annotation(91, 2, 5, bbox=[1, 2, 3])]
        content["annotations"] += [annotation(92, 2, 7), annotation(92, 3, 1, bbox=[75, 5, 20, 20], segmentation=[])]
        content["categories"].append({"id": 9, "name": "bird"})

    rewrite(train, change)
    check = check_data(data, few=0)
    assert findings(check) == {
        "images that cannot be used": ["train/0.png", "train/3.png"],
        "categories not in every split": ["bird not in val"],
        f"{coco.MISSING} (train)": ["1.png"],
        f"{coco.BAD_BOX} (train)": ["annotation 91 of train/2.png"],
        f"{coco.UNKNOWN_CATEGORY} (train)": ["annotation 92 of train/2.png (category 7)"],
        f"{coco.SAME_ID} (train)": ["annotation 92 of train/3.png"],
        f"{coco.NO_MASK} (train)": ["annotation 92 of train/3.png"],
        f"{coco.OVER_BORDER} (train)": ["annotation 92 of train/3.png"],
        f"{coco.UNUSED} (train)": ["bird"],
        "groups of duplicates": ["train/2.png"],
        "groups of duplicates in more than one split": ["train/2.png"],
    }
    assert check.splits[0].crowds == 1 and check.splits[0].masks == 10 and check.exit_code == 6
    reasons = {bad.image: bad.reason for bad in check.unreadable}
    assert reasons["train/3.png"].startswith(
        "70 x 60 pixels after the EXIF orientation, but the annotations are for 80"
    )
    code, out, err = run(capsys, data)
    assert code == 6 and "images that are listed but missing, left out (train)" in out
    assert "train/0.png: not a readable image" in err
    code, out, _ = run(capsys, data, "--json")
    assert code == 6 and json.loads(out)["splits"][0]["problems"][coco.MISSING] == ["1.png"]


def test_a_missing_image_alone_changes_the_exit_code(data):
    (data / "val/1.png").unlink()
    check = check_data(data, few=0)
    assert not check.unreadable and check.exit_code == 6


def test_the_size_is_that_of_the_upright_image(data, train):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(data / "train/3.png", 99, (60, 80), exif=exif)
    assert check_data(data, few=0).clean
    photo(data / "train/3.png", 99, (60, 80))
    (bad,) = check_data(data, few=0).unreadable
    assert bad.image == "train/3.png"


def test_boxes_as_corners_are_a_hint(data, train, capsys):
    def change(content):
        for entry in content["annotations"]:
            entry["bbox"] = [50, 10, 70, 30]

    rewrite(train, change)
    check = check_data(data)
    assert len(check.hints) == 1 and "fit as the corners x1, y1, x2, y2" in check.hints[0]
    code, out, _ = run(capsys, data)
    assert code == 0 and "hint: " in out


def test_an_invalid_file_ends_with_one_line(data, train, capsys):
    train.write_text('{"images": [], "annotations": []}')
    code, out, err = run(capsys, data)
    assert (code, out) == (3, "") and err.strip().endswith(
        "has no list 'categories'; expected annotations of instances in COCO's format"
    )
    assert len(err.strip().splitlines()) == 1


def test_other_json_files_are_named(data, notes):
    (data / "annotations/captions_val.json").write_text('{"images": [], "annotations": []}')
    check_data(data, few=0)
    assert notes == [
        f"{data}: not checked, because there are files named instances_*.json: annotations/captions_val.json"
    ]


def test_the_first_findings_are_listed_with_the_number_of_all(data, train, capsys, short_lists):
    for index in range(3):
        (data / f"val/{index}.png").write_bytes(b"?")
        photo(data / f"train/{index}.png", 99 + index, (70, 60))

    def change(content):
        content["annotations"] += [annotation(90 + index, 2, 7) for index in range(3)]

    rewrite(train, change)
    code, out, err = run(capsys, data, "--few", 0, "--json")
    check = json.loads(out)
    assert code == 6 and "6 images excluded" in err and "... and 4 more" in err
    assert check["counts"] == {"images that cannot be used": 6, f"{coco.UNKNOWN_CATEGORY} (train)": 3}
    assert [bad["image"] for bad in check["unreadable"]] == ["val/0.png", "val/1.png"]
    assert len(check["splits"][0]["problems"][coco.UNKNOWN_CATEGORY]) == 2
