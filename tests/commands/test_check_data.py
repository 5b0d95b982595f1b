"""Looking over a data set: each trouble is found by name, and nothing else is."""

import dataclasses
import inspect
import io
import json
import os
import shutil
import tarfile
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from fcvit import cli
from fcvit.cli import main
from fcvit.commands import check_data as module
from fcvit.commands.check_data import check_data
from fcvit.data import near_duplicates as similar
from fcvit.data.near_duplicates import MAX_DIFFERENCE, SIDE, fingerprint, similar_pairs
from fcvit.data.sources import Source
from fcvit.errors import UnreadableFile, UsageError
from fcvit.report import tables


def picture(seed, size=(64, 48)):
    """Something with forms in it, like no picture of another seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Two classes of ten pictures in train, and of ten others in val."""
    root = tmp_path_factory.mktemp("clean")
    for seed in range(40):
        split, label = divmod(seed // 10, 2)
        save(root / ("train", "val")[split] / ("cat", "dog")[label] / f"{seed % 10}.png", picture(seed))
    return root


@pytest.fixture
def data(originals, tmp_path):
    return shutil.copytree(originals, tmp_path / "data")


@pytest.fixture
def one(data):
    return data / "train"


def as_tar(folder):
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        tar.add(folder, ".")
    return path


def findings(found):
    """What is not empty, under its name."""
    rows = {name: getattr(found, name) for name in ("odd", "missing")}
    rows["unreadable"] = [(bad.image, bad.reason) for bad in found.unreadable]
    for name in ("duplicates", "near_duplicates"):
        rows[name] = [(group.match, group.images, group.splits, group.classes) for group in getattr(found, name)]
    for name in ("empty", "few", "other_files", "outside"):
        rows[name] = {split.name: value for split in found.splits if (value := getattr(split, name))}
    rows = {name: value for name, value in rows.items() if value}
    assert found.clean == (not rows)
    return rows


def test_clean_data(data, notes):
    notes = notes
    found = check_data(data)
    assert findings(found) == {} and found.images == 40 and found.modes == {"RGB": 40}
    assert [(s.name, s.path, s.classes, s.imbalance) for s in found.splits] == [
        (name, data / name, {"cat": 10, "dog": 10}, 1.0) for name in ("train", "val")
    ]
    assert notes == [f"{data} has the folders train, val: each is a split"]
    assert findings(check_data(data / "train")) == {}


def test_the_splits_may_lie_elsewhere_and_a_third_may_be_there(data, tmp_path, notes):
    save(data / "test" / "x.png", picture(100))  # without classes, as a test set may be
    save(data / "other" / "cat" / "x.png", picture(101))
    notes = notes
    found = check_data(data)
    assert [s.name for s in found.splits] == ["train", "val", "test"]
    assert findings(found) == {"outside": {"test": ("x.png",)}}
    assert notes[0].endswith("train, val, test: each is a split; not looked at: other")
    moved = (data / "val").rename(tmp_path / "elsewhere")
    for arguments in ((data / "train", {"val": moved}), (None, {"train": data / "train", "val": moved})):
        assert findings(check_data(*arguments)) == {}
    shutil.copy(moved / "cat" / "0.png", data / "train" / "cat" / "x.png")
    (group,) = check_data(data / "train", {"val": moved}).duplicates
    assert group.images == ("train/cat/x.png", "val/cat/0.png") and group.splits == ("train", "val")


def test_images_that_cannot_be_read(one, monkeypatch):
    """Decoded to the end, not only the header."""
    whole = (one / "cat" / "3.png").read_bytes()
    (one / "cat" / "3.png").write_bytes(whole[: len(whole) // 2])
    (one / "dog" / "4.png").write_bytes(b"no image")
    (one / "dog" / "gone.png").symlink_to("nowhere")
    save(one / "dog" / "huge.png", picture(50, (300, 200)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 200)
    found = findings(check_data(one, few=0))
    assert [name for name, _ in found["unreadable"]] == ["cat/3.png", "dog/4.png", "dog/gone.png", "dog/huge.png"]
    reasons = [reason for _, reason in found["unreadable"]]
    assert "truncated" in reasons[0] and reasons[1:] == [
        "not an image that can be read: a text file",
        "No such file or directory",
        "over the limit of 40,000 pixels; make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS",
    ]
    assert list(found) == ["unreadable"]


def test_files_and_folders_that_are_out_of_place(one):
    for name in ("cat/notes.TXT", "cat/sub/more.txt", "dog/clip.svg", "dog/README", "beside.txt", "dog/.hidden"):
        (one / name).parent.mkdir(exist_ok=True)
        (one / name).touch()
    for name in ("empty", "bird/inner", ".git"):
        (one / name).mkdir(parents=True)
    save(one / "lonely.png", picture(50))
    assert findings(check_data(one)) == {
        "other_files": {"train": {"": 1, ".svg": 1, ".txt": 2}},
        "empty": {"train": ("bird", "empty")},
        "outside": {"train": ("lonely.png",)},
    }


def test_few_images_and_imbalance(one):
    (one / "dog" / "9.png").unlink()
    for index in range(8):
        save(one / "cat" / f"more{index}.png", picture(50 + index))
    found = check_data(one)
    assert findings(found) == {"few": {"train": ("dog",)}}
    assert found.splits[0].imbalance == 2.0 and found.few == 10
    assert findings(check_data(one, few=9)) == {}


def test_classes_that_are_not_in_every_split(data):
    shutil.move(data / "val" / "dog", data / "val" / "wolf")
    assert findings(check_data(data)) == {"missing": {"dog": ("val",), "wolf": ("train",)}}


def test_exact_duplicates(data):
    shutil.copy(data / "train" / "cat" / "1.png", data / "val" / "dog" / "x.png")  # the worst: both
    shutil.copy(data / "train" / "cat" / "2.png", data / "train" / "cat" / "y.png")
    picture(3).save(data / "train" / "dog" / "z.png", compress_level=0)
    assert findings(check_data(data))["duplicates"] == [
        ("file", ("train/cat/1.png", "val/dog/x.png"), ("train", "val"), ("cat", "dog")),
        ("pixels", ("train/cat/3.png", "train/dog/z.png"), ("train",), ("cat", "dog")),
        ("file", ("train/cat/2.png", "train/cat/y.png"), ("train",), ("cat",)),
    ]
    assert list(findings(check_data(data))) == ["duplicates"]


def test_the_same_bytes_of_another_shape_are_no_duplicates(one):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    save(one / "cat" / "x.png", Image.fromarray(noise))
    save(one / "cat" / "y.png", Image.fromarray(noise.reshape(60, 40, 3)))
    assert findings(check_data(one)) == {}


def test_near_duplicates(data):
    """Encoded again, smaller, cropped: one group, with the exact copy of one of them in it."""
    original = picture(10, (320, 240))
    save(data / "train" / "dog" / "0.png", original)
    save(data / "train" / "dog" / "a.jpg", original, quality=70)
    save(data / "val" / "cat" / "b.png", original.resize((160, 120)))
    save(data / "val" / "dog" / "c.png", original.crop((5, 4, 315, 236)))
    shutil.copy(data / "val" / "dog" / "c.png", data / "val" / "dog" / "d.png")
    found = check_data(data)
    names = ("train/dog/0.png", "train/dog/a.jpg", "val/cat/b.png", "val/dog/c.png", "val/dog/d.png")
    assert findings(found) == {
        "duplicates": [("file", names[3:], ("val",), ("dog",))],
        "near_duplicates": [("near", names, ("train", "val"), ("cat", "dog"))],
    }
    difference = found.near_duplicates[0].difference
    assert 0.05 < difference <= MAX_DIFFERENCE
    assert findings(check_data(data, near=0)).keys() == {"duplicates"}
    (group,) = check_data(data, near=difference / 2).near_duplicates
    assert group.images == names[:3]


def test_pictures_that_say_little_are_not_all_alike(one):
    """Of almost one color, a little darker on one side as walls are, with noise; and smaller than a thumbnail."""
    generator = np.random.default_rng(0)
    wall = np.linspace(190, 200, 64)[None, :, None]
    for index in range(6):
        save(
            one / "cat" / f"flat{index}.png",
            Image.fromarray((wall + generator.integers(0, 3, (64, 64, 3))).astype("u1")),
        )
        pixels = np.array([[10 + index, 200], [10, 200 - index]], np.uint8)
        save(one / "dog" / f"tiny{index}.png", Image.fromarray(pixels).resize((15, 40)))
    assert findings(check_data(one)) == {
        "odd": {
            "small": tuple(f"dog/tiny{index}.png" for index in range(6)),
            "flat": tuple(f"cat/flat{index}.png" for index in range(6)),
        }
    }


def test_odd_images(one):
    def add(name, image, **options):
        save(one / "cat" / f"{name}.{options.pop('ending', 'png')}", image, **options)

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
    add("tags", picture(59), ending="webp", exif=b"Exif\0\0damaged")  # reading them raises a SyntaxError
    add("gray", picture(60).convert("L"))
    found = check_data(one)
    expected = {
        "small": ("cat/small.png",),
        "long": ("cat/long.png",),
        "cmyk": ("cat/cmyk.jpg",),
        "transparent": ("cat/alpha.png", "cat/transparent.png"),
        "deep": ("cat/deep.png",),
        "rotated": ("cat/rotated.jpg",),
    }
    assert findings(found) == {"odd": expected}
    assert list(found.odd) == list(expected) and found.modes["P"] == 2 and found.modes["CMYK"] == 1


def trouble(data):
    """Some of everything."""
    (data / "train" / "cat" / "0.png").write_bytes(b"?")
    (data / "train" / "cat" / "n.txt").touch()
    (data / "val" / "dog" / "9.png").unlink()
    (data / "val" / "empty").mkdir()
    save(data / "val" / ".hidden" / "h.png", picture(99))
    save(data / "val" / "cat" / "._0.png", picture(99))
    shutil.copy(data / "train" / "cat" / "1.png", data / "val" / "dog" / "x.png")
    for index in range(6):
        save(data / "train" / "dog" / f"again{index}.jpg", Image.open(data / "val" / "cat" / f"{index}.png"))
    return data


def test_a_tar_is_the_folder_it_was_made_of(data):
    tar = as_tar(trouble(data))
    folder = findings(check_data(data))
    assert findings(check_data(tar)) == folder and len(folder) == 6
    inside = check_data(tar / "train", {"val": tar / "val"})
    assert findings(inside) == folder and inside.splits[0].path == tar / "train"
    with pytest.raises(UnreadableFile, match="no folder nowhere in it"):
        check_data(tar / "nowhere")
    with pytest.raises(UnreadableFile, match="no such folder or tar"):
        check_data(data / "nowhere")


@pytest.mark.slow
def test_the_number_of_workers_does_not_matter(data):
    assert check_data(trouble(data), workers=2) == check_data(data)


class Deadly(NamedTuple):
    """Where an image is that crashes its decoder."""

    def read(self):
        os._exit(9)


@pytest.mark.slow
def test_an_image_that_crashes_its_decoder_does_not_end_the_check(one, monkeypatch):
    def deadly(source):
        tree = read(source)
        return tree._replace(files=tree.files | {"cat/5.png": Deadly()})

    read = Source.tree
    monkeypatch.setattr(Source, "tree", deadly)
    found = check_data(one, workers=1)
    assert findings(found) == {"unreadable": [("cat/5.png", "the process that decodes it ends unexpectedly")]}
    assert found.modes == {"RGB": 19}


def test_requests_that_are_wrong(data, tmp_path):
    for arguments, options, message in (
        ((data,), {"few": -1}, "--few -1"),
        ((data,), {"workers": -1}, "--workers -1"),
        ((data,), {"near": 1.5}, "--near 1.5"),
        ((data, {"val": data / "val"}), {}, "already the split val"),
        ((None,), {}, "expected a folder"),
    ):
        with pytest.raises(UsageError, match=message):
            check_data(*arguments, **options)
    (tmp_path / "none").mkdir()
    with pytest.raises(UnreadableFile, match="no images in it"):
        check_data(tmp_path / "none")


def run(capsys, *words):
    code = main(["check-data", *map(str, words), "--workers", "0"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_line(data, capsys):
    code, out, err = run(capsys, data)
    assert code == 0 and "nothing found" in out and "40 images" in out and "each is a split" in err
    shutil.copy(data / "train" / "cat" / "1.png", data / "val" / "dog" / "x.png")
    code, out, _ = run(capsys, data)
    assert code == 0 and "nothing found" not in out and "val/dog/x.png" in out
    assert "groups of duplicates in more than one split   " in out
    trouble(data)
    code, out, _ = run(capsys, data)
    assert code == 6 and "train/cat/0.png: not an image" in out and ".txt (1)" in out
    code, out, _ = run(capsys, data, "--json")
    found = json.loads(out)
    assert code == 6 and found["unreadable"] == [
        {"image": "train/cat/0.png", "reason": "not an image that can be read: a text file"}
    ]
    assert found == json.loads(json.dumps(dataclasses.asdict(check_data(data)), default=str))
    code, out, _ = run(capsys, "--split", f"a={data / 'train'}", "--split", f"b={data / 'val'}", "--few", 0, "--json")
    assert [split["name"] for split in json.loads(out)["splits"]] == ["a", "b"] and json.loads(out)["few"] == 0
    code, out, _ = run(capsys, data, "--near", 0, "--json")
    assert json.loads(out)["duplicates"] and not json.loads(out)["near_duplicates"]


@pytest.mark.parametrize("text", ["train", "=x", "a=", "a/b=x"])
def test_splits_that_are_no_pairs(data, capsys, text):
    code, _, err = run(capsys, data, "--split", text)
    assert code == 2 and "expected NAME=PATH" in err


def test_long_lists_are_shortened_in_the_table_only(one, capsys):
    for index in range(30):
        save(one / "cat" / f"s{index:02d}.png", picture(100 + index, (31, 31)))
        shutil.copy(one / "cat" / f"s{index:02d}.png", one / "dog" / f"t{index:02d}.png")
    _, out, _ = run(capsys, one)
    assert "cat/s00.png, cat/s01.png, cat/s02.png, ..." in out and "... and 10 more groups" in out
    assert "s29" not in out and "s29" in run(capsys, one, "--json")[1]


def test_every_kind_of_oddity_is_shown_in_words(one):
    found = dataclasses.replace(check_data(one), odd=dict.fromkeys(module.ODD, ("x.png",)))
    listing = tables.data_check(found)[1]
    shown = [*listing.columns[0].cells]
    assert shown == list(module.ODD.values())


# Pairs


def prints(images):
    marks = [fingerprint(image) for image in images]
    hashes = np.frombuffer(b"".join(mark.hash for mark in marks), np.uint8).reshape(-1, 8)
    return hashes, np.frombuffer(b"".join(mark.thumbnail for mark in marks), np.uint8).reshape(-1, SIDE * SIDE * 3)


def test_pairs_are_those_that_comparing_everything_finds():
    """Each of forty, and itself encoded again, in a crowd of others."""
    images = []
    for seed in range(40):
        images.append(picture(seed))
        buffer = io.BytesIO()
        images[-1].save(buffer, "JPEG", quality=70)
        images.append(Image.open(buffer).convert("RGB"))
    hashes, thumbnails = prints([*images, *(picture(100 + seed) for seed in range(300))])
    passes = []
    pairs = similar_pairs(hashes, thumbnails, advance=passes.append)
    assert [pair[:2] for pair in pairs] == [(2 * index, 2 * index + 1) for index in range(40)]
    assert sum(passes) == module.PASSES
    standard = thumbnails - thumbnails.mean(1, keepdims=True)
    standard /= standard.std(1, keepdims=True)
    for first, second, difference in pairs:
        assert difference == pytest.approx(np.sqrt(np.square(standard[first] - standard[second]).mean()), abs=1e-3)


def test_hashes_that_differ_in_six_bits_always_meet():
    """Two of the eight bytes are the same, whichever the bits; thumbnails then decide."""
    generator = np.random.default_rng(0)
    _, (thumbnail, other) = prints([picture(0), picture(1)])
    for _ in range(200):
        one = generator.integers(0, 2, 64)
        two = one.copy()
        two[generator.choice(64, 6, replace=False)] ^= 1
        hashes = np.packbits([one, two], axis=1)
        assert len(similar_pairs(hashes, np.stack([thumbnail, thumbnail]))) == 1
        assert not similar_pairs(hashes, np.stack([thumbnail, other]))


def test_a_crowd_of_equal_hashes_stays_cheap(monkeypatch):
    """Neighbours only are compared, and each pair of thumbnails once; those that are alike still meet."""
    compared = []

    def difference(first, second):
        compared.append(len(first))
        return real(first, second)

    real = similar._difference
    monkeypatch.setattr(similar, "_difference", difference)
    thumbnails = np.random.default_rng(0).integers(0, 256, (400, SIDE * SIDE * 3), np.uint8)
    thumbnails[201] = thumbnails[200]
    (pair,) = similar_pairs(np.zeros((400, 8), np.uint8), thumbnails)
    assert pair == (200, 201, pytest.approx(0, abs=1e-3)) and sum(compared) == sum(400 - step for step in range(1, 257))


def test_the_default_of_the_command_line_is_that_of_the_function():
    defaults = [inspect.signature(function).parameters for function in (check_data, cli.check_data)]
    assert [(d["few"].default, d["near"].default) for d in defaults] == [(10, MAX_DIFFERENCE)] * 2


def test_nothing_to_compare():
    assert similar_pairs(np.empty((0, 8), np.uint8), np.empty((0, SIDE * SIDE * 3), np.uint8)) == []
