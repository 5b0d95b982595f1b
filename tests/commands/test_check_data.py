"""Test the dataset check: every problem is reported with the name of the image, and nothing else is reported."""

import dataclasses
import functools
import json
import os
import re
import shutil
import tarfile
import tracemalloc
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from fcvit.cli import main
from fcvit.commands import check_data as module
from fcvit.commands import image_checks
from fcvit.commands.image_checks import ODD, Examined, Images
from fcvit.data.columns import FolderLocations
from fcvit.data.listed import LISTED
from fcvit.data.sources import Location
from fcvit.errors import UnreadableFile, UsageError

check_data = functools.partial(module.check_data, workers=0)


def picture(seed, size=(64, 48)):
    """Return an image with shapes that depend on the seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Two classes with ten images each in train and in val. All images are different."""
    root = tmp_path_factory.mktemp("clean")
    for seed in range(40):
        split, label = divmod(seed // 10, 2)
        save(root / ("train", "val")[split] / ("cat", "dog")[label] / f"{seed % 10}.png", picture(seed))
    return root


@pytest.fixture
def data(originals, tmp_path):
    return shutil.copytree(originals, tmp_path / "data")


@pytest.fixture
def train(data):
    return data / "train"


def as_tar(folder):
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        tar.add(folder, ".")
    return path


def findings(check):
    """Return all findings that are not empty, by field name."""
    rows = {name: getattr(check, name) for name in ("odd", "missing")}
    rows["unreadable"] = [(bad.image, bad.reason) for bad in check.unreadable]
    rows["duplicates"] = [(group.match, group.images, group.splits, group.classes) for group in check.duplicates]
    for name in ("empty", "few", "other_files", "outside"):
        rows[name] = {split.name: value for split in check.splits if (value := getattr(split, name))}
    rows = {name: value for name, value in rows.items() if value}
    assert check.clean == (not rows)
    return rows


def test_clean_data(data, notes):
    check = check_data(data)
    assert findings(check) == {} and check.images == 40 and check.modes == {"RGB": 40}
    assert [(s.name, s.path, s.classes, s.imbalance) for s in check.splits] == [
        (name, data / name, {"cat": 10, "dog": 10}, 1.0) for name in ("train", "val")
    ]
    assert notes == [f"{data} has the folders train, val: each is a split"]
    assert findings(check_data(data / "train")) == {}


def test_splits_can_be_in_different_folders_and_a_test_split_is_optional(data, tmp_path, notes):
    save(data / "test" / "x.png", picture(100))  # a test set may have no class folders
    save(data / "other" / "cat" / "x.png", picture(101))
    check = check_data(data)
    assert [s.name for s in check.splits] == ["train", "val", "test"]
    assert findings(check) == {"outside": {"test": ("x.png",)}}
    assert "train, val, test: each is a split" in notes[0] and notes[0].endswith(": other")
    moved = (data / "val").rename(tmp_path / "moved")
    assert findings(check_data(data / "train", split=[f"val={moved}"])) == {}
    assert findings(check_data(split=[f"train={data / 'train'}", f"val={moved}"])) == {}
    shutil.copy(moved / "cat" / "0.png", data / "train" / "cat" / "x.png")
    (group,) = check_data(data / "train", split=[f"val={moved}"]).duplicates
    assert group.images == ("train/cat/x.png", "val/cat/0.png") and group.splits == ("train", "val")


def test_unreadable_images(train, monkeypatch):
    """Images are decoded completely, not only the header."""
    content = (train / "cat" / "3.png").read_bytes()
    (train / "cat" / "3.png").write_bytes(content[: len(content) // 2])
    (train / "dog" / "4.png").write_bytes(b"no image")
    (train / "dog" / "gone.png").symlink_to("nowhere")
    save(train / "dog" / "huge.png", picture(50, (300, 200)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 200)
    check = findings(check_data(train, few=0))
    assert [name for name, _ in check["unreadable"]] == ["cat/3.png", "dog/4.png", "dog/gone.png", "dog/huge.png"]
    reasons = [reason for _, reason in check["unreadable"]]
    facts = ["truncated", "a text file", "No such file or directory", "40,000 pixels.*MAX_IMAGE_PIXELS"]
    assert all(re.search(fact, reason) for fact, reason in zip(facts, reasons, strict=True))
    assert list(check) == ["unreadable"]


def test_misplaced_files_and_empty_folders(train):
    for name in ("cat/notes.TXT", "cat/sub/more.txt", "dog/clip.svg", "dog/README", "outside.txt", "dog/.hidden"):
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).touch()
    for name in ("empty", "bird/inner", ".git"):
        (train / name).mkdir(parents=True)
    save(train / "outside.png", picture(50))
    assert findings(check_data(train)) == {
        "other_files": {"train": {"": 1, ".svg": 1, ".txt": 2}},
        "empty": {"train": ("bird", "empty")},
        "outside": {"train": ("outside.png",)},
    }


def test_few_images_and_imbalance(train):
    (train / "dog" / "9.png").unlink()
    for index in range(8):
        save(train / "cat" / f"more{index}.png", picture(50 + index))
    check = check_data(train)
    assert findings(check) == {"few": {"train": ("dog",)}}
    assert check.splits[0].imbalance == 2.0 and check.few == 10
    assert findings(check_data(train, few=9)) == {}


def test_classes_missing_in_a_split(data):
    shutil.move(data / "val" / "dog", data / "val" / "wolf")
    assert findings(check_data(data)) == {"missing": {"dog": ("val",), "wolf": ("train",)}}


def test_exact_duplicates(data):
    shutil.copy(data / "train" / "cat" / "1.png", data / "val" / "dog" / "x.png")  # different split and class
    shutil.copy(data / "train" / "cat" / "2.png", data / "train" / "cat" / "y.png")
    picture(3).save(data / "train" / "dog" / "z.png", compress_level=0)
    assert findings(check_data(data))["duplicates"] == [
        ("file", ("train/cat/1.png", "val/dog/x.png"), ("train", "val"), ("cat", "dog")),
        ("pixels", ("train/cat/3.png", "train/dog/z.png"), ("train",), ("cat", "dog")),
        ("file", ("train/cat/2.png", "train/cat/y.png"), ("train",), ("cat",)),
    ]
    assert list(findings(check_data(data))) == ["duplicates"]


def test_equal_pixels_with_a_different_shape_are_not_duplicates(train):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    save(train / "cat" / "x.png", Image.fromarray(noise))
    save(train / "cat" / "y.png", Image.fromarray(noise.reshape(60, 40, 3)))
    assert findings(check_data(train)) == {}


def test_flat_and_small_images(train):
    """Test images of nearly uniform color, with a gradient and noise like a wall, and images below 16 pixels."""
    generator = np.random.default_rng(0)
    wall = np.linspace(190, 200, 64)[None, :, None]
    for index in range(6):
        save(
            train / "cat" / f"flat{index}.png",
            Image.fromarray((wall + generator.integers(0, 3, (64, 64, 3))).astype("u1")),
        )
        pixels = np.array([[10 + index, 200], [10, 200 - index]], np.uint8)
        save(train / "dog" / f"tiny{index}.png", Image.fromarray(pixels).resize((15, 40)))
    assert findings(check_data(train)) == {
        "odd": {
            "small": tuple(f"dog/tiny{index}.png" for index in range(6)),
            "flat": tuple(f"cat/flat{index}.png" for index in range(6)),
        }
    }


def test_unusual_images(train):
    def add(name, image, **options):
        save(train / "cat" / f"{name}.{options.pop('ending', 'png')}", image, **options)

    add("small", picture(50, (40, 31)))
    add("long", picture(51, (321, 80)))
    add("just not long", picture(52, (320, 80)))
    add("cmyk", picture(53).convert("CMYK"), ending="jpg")
    palette = picture(54).quantize(16)
    add("palette", palette)
    add("transparent", palette.rotate(180), transparency=0)
    add("alpha", picture(55).convert("RGBA"))
    deep = np.asarray(picture(56).convert("L")).astype(np.uint16)
    add("deep", Image.fromarray(deep))
    exif = Image.Exif()
    exif[0x0112] = 6
    add("rotated", picture(57), ending="jpg", exif=exif)
    exif[0x0112] = 1
    add("upright", picture(58), ending="jpg", exif=exif)
    add("tags", picture(59), ending="webp", exif=b"Exif\0\0damaged")  # reading these tags raises a SyntaxError
    add("gray", picture(60).convert("L"))
    check = check_data(train)
    expected = {
        "small": ("cat/small.png",),
        "long": ("cat/long.png",),
        "cmyk": ("cat/cmyk.jpg",),
        "transparent": ("cat/alpha.png", "cat/transparent.png"),
        "deep": ("cat/deep.png",),
        "rotated": ("cat/rotated.jpg",),
    }
    assert findings(check) == {"odd": expected}
    assert list(check.odd) == list(expected) and check.modes["P"] == 2 and check.modes["CMYK"] == 1


def add_problems(data):
    """Add one problem of most kinds to the data."""
    (data / "train" / "cat" / "0.png").write_bytes(b"?")
    (data / "train" / "cat" / "n.txt").touch()
    (data / "val" / "dog" / "9.png").unlink()
    (data / "val" / "empty").mkdir()
    save(data / "val" / ".hidden" / "h.png", picture(99))
    save(data / "val" / "cat" / "._0.png", picture(99))
    shutil.copy(data / "train" / "cat" / "1.png", data / "val" / "dog" / "x.png")
    return data


def test_a_tar_gives_the_same_findings_as_its_folder(data):
    tar = as_tar(add_problems(data))
    folder = findings(check_data(data))
    assert findings(check_data(tar)) == folder and len(folder) == 5
    inside = check_data(tar / "train", split=[f"val={tar / 'val'}"])
    assert findings(inside) == folder and inside.splits[0].path == tar / "train"
    with pytest.raises(UnreadableFile, match=r"data\.tar.* nowhere"):
        check_data(tar / "nowhere")
    with pytest.raises(UnreadableFile, match="nowhere"):
        check_data(data / "nowhere")


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_number_of_workers(data):
    assert check_data(add_problems(data), workers=2) == check_data(data)


class Crashing(NamedTuple):
    """The location of an image that crashes the decoder."""

    def read(self):
        os._exit(9)


@pytest.mark.slow
def test_an_image_that_crashes_the_decoder_does_not_end_the_check(train, monkeypatch):
    def with_crashing_image(column, rows):
        return [Crashing() if place.path.endswith("cat/5.png") else place for place in values(column, rows)]

    values = FolderLocations.values
    monkeypatch.setattr(FolderLocations, "values", with_crashing_image)
    check = check_data(train, workers=1)
    ((image, reason),) = findings(check).pop("unreadable")
    assert image == "cat/5.png" and "process" in reason and list(findings(check)) == ["unreadable"]
    assert check.modes == {"RGB": 19}


def test_the_option_near_is_accepted_without_effect(data, capsys):
    code, out, err = run(capsys, data, "--near", 0.3)
    assert code == 0 and "no findings" in out and "--near has no effect" in err


def test_invalid_arguments_are_rejected(data, tmp_path):
    for arguments, options, message in (
        ((data,), {"few": -1}, "--few -1"),
        ((data,), {"workers": -1}, "--workers -1"),
        ((data,), {"split": [f"val={data / 'val'}"]}, "already the split val"),
        ((), {}, "expected a folder"),
    ):
        with pytest.raises(UsageError, match=message):
            check_data(*arguments, **options)
    (tmp_path / "none").mkdir()
    with pytest.raises(UnreadableFile, match="none: no images"):
        check_data(tmp_path / "none")


def run(capsys, *words):
    code = main(["check-data", *map(str, words), "--workers", "0"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_line(data, capsys):
    code, out, err = run(capsys, data)
    assert code == 0 and "no findings" in out and "40 images" in out and "each is a split" in err
    shutil.copy(data / "train" / "cat" / "1.png", data / "val" / "dog" / "x.png")
    code, out, _ = run(capsys, data)
    assert code == 0 and "no findings" not in out and "val/dog/x.png" in out
    assert "groups of duplicates in more than one split   " in out
    add_problems(data)
    code, out, err = run(capsys, data)
    assert code == 6 and err.count("train/cat/0.png: not a readable image") == 1 and ".txt (1)" in out
    assert "not a readable image" not in out
    code, out, _ = run(capsys, data, "--json")
    check = json.loads(out)
    (unreadable,) = check["unreadable"]
    assert code == 6 and unreadable["image"] == "train/cat/0.png" and "a text file" in unreadable["reason"]
    assert check == json.loads(json.dumps(dataclasses.asdict(check_data(data)), default=str))
    code, out, _ = run(capsys, "--split", f"a={data / 'train'}", "--split", f"b={data / 'val'}", "--few", 0, "--json")
    assert [split["name"] for split in json.loads(out)["splits"]] == ["a", "b"] and json.loads(out)["few"] == 0


@pytest.mark.parametrize("text", ["train", "=x", "a=", "a/b=x"])
def test_invalid_split_options_are_rejected(data, capsys, text):
    code, _, err = run(capsys, data, "--split", text)
    assert code == 2 and "expected NAME=PATH" in err


def test_lists_are_shorter_in_tables_than_in_json(train, capsys):
    for index in range(30):
        save(train / "cat" / f"s{index:02d}.png", picture(100 + index, (31, 31)))
        shutil.copy(train / "cat" / f"s{index:02d}.png", train / "dog" / f"t{index:02d}.png")
    _, out, _ = run(capsys, train)
    assert "cat/s00.png, cat/s01.png, cat/s02.png, ..." in out and "... and 10 more groups" in out
    assert "s29" not in out and "s29" in run(capsys, train, "--json")[1]


def test_the_first_findings_are_listed_with_the_number_of_all(data, capsys, short_lists):
    for index in range(4):
        (data / "train" / "cat" / f"{index}.png").write_bytes(b"?")
        (data / "train" / "dog" / f"n.{index}").touch()
        (data / "val" / f"empty{index}").mkdir()
        save(data / "train" / f"x{index}.png", picture(100 + index, (31, 64)))
        shutil.copy(data / "train" / "dog" / f"{index}.png", data / "val" / "cat" / f"x{index}.png")
    shutil.copy(data / "train" / "dog" / "0.png", data / "val" / "cat" / "y.png")
    code, out, err = run(capsys, data, "--few", 30, "--json")
    check = json.loads(out)
    assert code == 6 and "4 images excluded" in err and "... and 2 more" in err
    assert check["counts"] == {
        "unreadable": 4,
        "classes not in every split": 4,
        "classes with fewer than 30 images, train": 2,
        "images outside of class folders, train": 4,
        "empty class folders, val": 4,
        "classes with fewer than 30 images, val": 2,
        "groups of duplicates": 4,
        "groups of duplicates in more than one split": 4,
        "groups of duplicates in more than one class": 4,
        ODD["small"]: 4,
        "files that are not images, train": 4,
    }
    train, val = check["splits"]
    assert [bad["image"] for bad in check["unreadable"]] == ["train/cat/0.png", "train/cat/1.png"]
    assert train["outside"] == ["x0.png", "x1.png"] and train["other_files"] == {".0": 1, ".1": 1}
    assert val["empty"] == ["empty0", "empty1"] and check["missing"] == {"empty0": ["train"], "empty1": ["train"]}
    assert check["odd"] == {"small": ["train/x0.png", "train/x1.png"]}
    first, second = check["duplicates"]
    assert first["images"] == ["train/dog/0.png", "val/cat/x0.png"] and first["number"] == 3
    assert second["images"] == ["train/dog/1.png", "val/cat/x1.png"] and second["number"] == 2
    assert check_data(data).images == 49
    _, out, _ = run(capsys, data)
    assert "... and 2 more groups" in out and re.search(r"unreadable +4 ", out)


def test_the_memory_per_image_is_small(monkeypatch):
    """Names and locations are read one after the other, and about 33 bytes per image are kept."""

    class Column(Sequence):
        def __init__(self, item):
            self.item = item

        def __len__(self):
            return 4000

        def __iter__(self):
            return map(self.item, range(4000))

        def __getitem__(self, index):
            return self.item(index)

    def examined(_, name, location):
        number = int(name[4:-4]) // 2
        return Examined(number.to_bytes(24, "little"), "RGB", 1, (9, 9))

    monkeypatch.setattr(image_checks, "examine", examined)
    names, locations = Column("cat/{:06d}.png".format), Column(lambda index: Location(str(index)))
    tracemalloc.start()
    findings = image_checks.examine_images([Images("train", names, locations, in_classes=True)], 0)
    kept = tracemalloc.get_traced_memory()[0] / 4000
    common = findings.common()
    tracemalloc.stop()
    assert kept < 50
    assert common["duplicates"].total == 2000 and common["duplicates"][1].images == ("cat/000002.png", "cat/000003.png")
    assert common["odd"]["small"].total == 4000 and len(common["odd"]["small"]) == LISTED


def test_every_kind_of_unusual_image_has_a_description(train):
    check = dataclasses.replace(check_data(train), odd=dict.fromkeys(ODD, ("x.png",)))
    _, listing = check.tables()
    shown = [*listing.columns[0].cells]
    assert shown == list(ODD.values())
