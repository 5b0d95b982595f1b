"""Test segmentation data: layouts, pairs of images and labels, label maps, and their check before a training."""

import dataclasses
import functools
import io
import itertools
import json
import os
import pickle
import re
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from fcvit.cli import main
from fcvit.commands import check_data as module
from fcvit.commands import check_maps
from fcvit.data.class_colors import ade20k, parse_class_list, read_class_list
from fcvit.data.classes import ClassName
from fcvit.data.label_maps import (
    LabelEncoding,
    LabelFile,
    check_labels,
    examine_label,
    read_label,
    resolve_encoding,
    scan_labels,
)
from fcvit.data.listed import total
from fcvit.data.loader import batches
from fcvit.data.segmentation import LabeledMaps, find_maps, join, pair, read_split
from fcvit.data.sources import Location, open_source
from fcvit.errors import BadImages, DoesNotFit, UnreadableFile, UsageError
from fcvit.tasks.segmentation.label_options import LabelOptions

check_data = functools.partial(module.check_data, workers=0)
COLORS = ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 128))
COMMAND = ("fcvit", "check-data", "my data")


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels))
    image.save(path, **options)
    return path


def photo(path, seed=0, size=(40, 36)):
    pixels = np.random.default_rng(zlib.crc32(f"{path}{seed}".encode())).integers(0, 256, (7, 7, 3), np.uint8)
    return save(path, Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def blocks(*values, size=(40, 36), dtype=np.uint8):
    """A label map with vertical stripes of the given values."""
    width, height = size
    return np.repeat(np.array(values, dtype)[None], height, 0).repeat(-(-width // len(values)), 1)[:, :width]


def plain(root, *names, values=(0, 1, 2), suffix="", images="images", annotations="annotations", ending=".jpg"):
    for name in names:
        photo(root / images / f"{name}{ending}")
        save(root / annotations / f"{name}{suffix}.png", blocks(*values))
    return root


def as_tar(folder):
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        tar.add(folder, folder.name)
    return path


def all_of(folder, **options):
    layout = find_maps(open_source(folder))
    return join([read_split(layout, name, **options) for name in layout.splits])


def resolved(folder, encoding, command=COMMAND):
    images = all_of(folder)
    stats = list(scan_labels(images, 0))
    return images, stats, resolve_encoding(images, stats, encoding, command)


def label_file(path):
    return LabelFile(path.name, Location(str(path)))


# Layouts


def test_ade20k_is_read_as_downloaded(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for split, short in (("training", "train"), ("validation", "val")):
        plain(root, *(f"{split}/ADE_{short}_{i:08d}" for i in (2, 1)), values=(0, 150))
    (root / "objectInfo150.txt").touch()
    layout = find_maps(open_source(tmp_path))
    assert layout.is_ade20k and layout.class_list() is ade20k()
    assert layout.named("train") == ["training"] and layout.named("val") == ["validation"]
    images = read_split(layout, "validation")
    assert images.root == root
    assert images.names == tuple(f"images/validation/ADE_val_0000000{i}.jpg" for i in (1, 2))
    assert [label.name for label in images.targets] == [
        f"annotations/validation/ADE_val_0000000{i}.png" for i in (1, 2)
    ]
    encoding = LabelEncoding(150, reduce_zero_label=True)
    assert np.array_equal(np.unique(read_label(images.targets[0], encoding)), [149, 255])


@pytest.mark.parametrize(
    ("images", "annotations", "splits"),
    [
        ("images", "annotations", {"all": ("images", "annotations")}),
        ("JPEGImages", "SegmentationClass", {"all": ("JPEGImages", "SegmentationClass")}),
        ("images/train", "annotations/train", {"train": ("images/train", "annotations/train")}),
        ("imgs/training", "masks/train", {"training": ("imgs/training", "masks/train")}),
        ("train/images", "train/masks", {"train": ("train/images", "train/masks")}),
        ("images/berlin", "annotations/berlin", {"all": ("images", "annotations")}),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_layout_is_found_in_a_folder_and_in_a_tar(tmp_path, images, annotations, splits, packed):
    root = plain(tmp_path / "set", "a", images=images, annotations=annotations)
    layout = find_maps(open_source(as_tar(root) if packed else tmp_path))
    assert layout.splits == splits
    (pair_read,) = (read_split(layout, name) for name in layout.splits)
    assert pair_read.names == (f"{images}/a.jpg",) and pair_read.labels[0].name == f"{annotations}/a.png"
    assert np.array_equal(read_label(pair_read.labels[0], LabelEncoding(3)), blocks(0, 1, 2))


@pytest.mark.parametrize("names", [("cat/1.png", "dog/1.png"), ("images/1.png",), ("images/1.png", "labels/1.txt")])
def test_other_layouts_are_not_segmentation_data(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_maps(open_source(tmp_path)) is None


def test_two_folders_of_labels_are_ambiguous(tmp_path):
    plain(plain(tmp_path, "a"), "a", annotations="masks")
    with pytest.raises(UsageError, match=r"several folders of labels \(annotations, masks\)"):
        find_maps(open_source(tmp_path))


def test_splits_without_labels_are_named(tmp_path):
    plain(tmp_path, "train/a")
    photo(tmp_path / "images/test/b.jpg")
    assert find_maps(open_source(tmp_path)).without_labels == ("images/test",)
    (tmp_path / "annotations/train").rename(tmp_path / "annotations/other")
    with pytest.raises(UnreadableFile, match="annotations has no such folders"):
        find_maps(open_source(tmp_path))


# Pairs


def test_missing_labels_and_labels_without_images_are_reported(tmp_path):
    plain(tmp_path, "train/a", "train/b", "train/c")
    (tmp_path / "annotations/train/b.png").unlink()
    (tmp_path / "images/train/c.jpg").unlink()
    (tmp_path / "annotations/train/notes.txt").touch()
    images = all_of(tmp_path)
    layout = find_maps(open_source(tmp_path))
    images = read_split(layout, "train")
    assert images.names == ("images/train/a.jpg",)
    assert images.unlabeled == ("images/train/b.jpg",) and images.unused == ("annotations/train/c.png",)
    assert "left out 1 image without a label: b.jpg" in images.notes[0]
    assert "left out 1 label without an image: c.png" in images.notes[1]
    (tmp_path / "annotations/train/a.png").rename(tmp_path / "annotations/train/x.png")
    with pytest.raises(UnreadableFile, match=r"no label has the name of an image.*a\.jpg.*--label-suffix"):
        read_split(find_maps(open_source(tmp_path)), "train")


@pytest.mark.parametrize(
    ("images", "labels", "suffix", "found"),
    [
        (["a.jpg", "a_1.jpg"], ["a.png", "a_1.png"], None, {"a": "a", "a_1": "a_1"}),
        (["a.jpg", "b.jpg"], ["a_mask.png", "b_mask.png"], None, {"a": "a_mask", "b": "b_mask"}),
        (["a.jpg"], ["a_1.png"], None, {}),  # the label of another image
        (["a.jpg", "a_b.jpg"], ["a_b_mask.png", "a_mask.png"], None, {"a": "a_mask", "a_b": "a_b_mask"}),
        (
            ["x/1_leftImg8bit.png"],
            ["x/1_gtFine_labelIds.png", "x/1_gtFine_color.png"],
            "_gtFine_labelIds.png",
            {"x/1_leftImg8bit": "x/1_gtFine_labelIds"},
        ),
        (["x/a.jpg"], ["y/a.png"], None, {}),
        (["7_sat.jpg", "8_sat.jpg"], ["7_mask.png"], None, {"7_sat": "7_mask"}),
        (["a_img.jpg"], ["a_img.png"], None, {"a_img": "a_img"}),
        (["a.jpg"], ["a.jpg.png"], None, {"a": "a.jpg"}),
    ],
)
def test_pairs_by_name_and_suffix(images, labels, suffix, found):
    pairing = pair(images, labels, suffix)
    assert {Path(i).with_suffix("").as_posix(): label[:-4] for i, label in pairing.pairs} == found
    assert {*pairing.unlabeled} == {*images} - {i for i, _ in pairing.pairs}
    assert {*pairing.unused} == {*labels} - {label for _, label in pairing.pairs}


def test_ambiguous_names_are_rejected():
    labels = [f"{n}_gtFine_{kind}.png" for n in "ab" for kind in ("color", "labelIds")]
    with pytest.raises(UsageError, match="'_gtFine_color', '_gtFine_labelIds'; choose one with --label-suffix"):
        pair(["a_leftImg8bit.png", "b_leftImg8bit.png"], labels)
    with pytest.raises(DoesNotFit, match=r"two images have the same name: a\.jpg and a\.png"):
        pair(["a.jpg", "a.png"], ["a.png"])
    with pytest.raises(DoesNotFit, match=r"two labels have the same name: a\.png and a\.tif"):
        pair(["a.jpg"], ["a.png", "a.tif"])


stems = st.text("ab1_-.", min_size=1, max_size=5).filter(lambda text: not text.startswith("."))
names = st.builds("{}{}".format, st.sampled_from(["", "x/", "y/"]), stems)


@pytest.mark.slow
@given(
    st.sets(names, min_size=1, max_size=12),
    st.sets(names, max_size=12),
    st.sampled_from(["", "_mask", "_gtFine_labelIds", " L", "-seg.map"]),
    st.randoms(),
)
@settings(max_examples=300, deadline=None)
def test_every_image_gets_its_own_label_and_no_other(images, missing, suffix, random):
    """With a known suffix, exactly the labels of existing images are paired, in whatever order the files are listed."""
    labeled = images - missing
    labels = [f"{name}{suffix}.png" for name in [*labeled, *(missing - images)]]
    files = [f"{name}.jpg" for name in images]
    random.shuffle(labels)
    random.shuffle(files)
    pairing = pair(files, labels, suffix)
    assert {*pairing.pairs} == {(f"{name}.jpg", f"{name}{suffix}.png") for name in labeled}
    assert {*pairing.unlabeled} == {f"{name}.jpg" for name in images - labeled}
    assert {*pairing.unused} == {f"{name}{suffix}.png" for name in missing - images}


@pytest.mark.slow
@given(st.sets(st.from_regex(r"[a-z]{2}[0-9]{1,2}", fullmatch=True), min_size=2, max_size=9), st.data())
@settings(max_examples=100, deadline=None)
def test_the_suffix_is_found_from_the_names(images, data):
    suffix = data.draw(st.sampled_from(["", "_mask", "_L", ".label", "_gtFine_labelTrainIds"]))
    labeled = data.draw(st.sets(st.sampled_from(sorted(images)), min_size=1))
    pairing = pair([f"{name}.jpg" for name in images], [f"{name}{suffix}.png" for name in labeled])
    assert pairing.suffix == suffix
    assert {*pairing.pairs} == {(f"{name}.jpg", f"{name}{suffix}.png") for name in labeled}


@pytest.mark.slow
@given(st.lists(names, max_size=8, unique=True), st.lists(names, max_size=8, unique=True))
@settings(max_examples=300, deadline=None)
def test_no_file_is_lost_or_used_twice(images, labels):
    images, labels = [f"{name}.jpg" for name in images], [f"{name}.png" for name in labels]
    try:
        pairing = pair(images, labels)
    except UsageError:
        return
    assert sorted([*(i for i, _ in pairing.pairs), *pairing.unlabeled]) == sorted(images)
    assert sorted([*(label for _, label in pairing.pairs), *pairing.unused]) == sorted(labels)
    assert all(label == f"{image[:-4]}{pairing.suffix}.png" for image, label in pairing.pairs)


def test_a_data_set_is_a_dataset_of_the_loader(tmp_path):
    images = all_of(plain(tmp_path, "b", "a", "c"))
    assert images.take([2, 0]).names == ("images/c.jpg", "images/a.jpg")
    assert images.take([2, 0]).targets == (images.labels[2], images.labels[0])
    assert images.listing() == all_of(tmp_path).listing() != images.take([0, 1]).listing()
    assert pickle.loads(pickle.dumps(images)) == images
    encoding = LabelEncoding(3)

    def transform(image, target, _):
        return np.asarray(image).transpose(2, 0, 1), read_label(target, encoding, image.size)

    save(tmp_path / "annotations/b.png", blocks(0, 3))
    (batch,) = batches(images, [0], 3, [transform], 0)
    assert batch.indices.tolist() == [0, 2] and batch.targets[0][0].shape == (36, 40)
    ((index, reason),) = batch.bad
    assert index == 1 and reason.startswith("images/b.jpg: annotations/b.png: values outside the classes (0 to 2): 3")


# Label maps


def png(array, bits, color_type, size=None):
    """Encode an array as a PNG image with a number of bits, a color type and a size that Pillow does not write."""
    height, width = size or array.shape[:2]
    rows = array.astype(">u2" if bits == 16 else "u1").reshape(len(array), -1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)),
        (b"IDAT", zlib.compress(data)),
    ]
    body = (
        struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c))
        for kind, c in [*chunks, (b"IEND", b"")]
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def encoded(classes, form):
    """Encode a label map in one of the accepted forms. Return the bytes."""
    content = io.BytesIO()
    if form == "gray 16":
        return png(classes.astype(np.uint16), 16, 0)
    if form == "palette":
        image = Image.fromarray(classes)
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette([*itertools.chain(*COLORS)] + [255] * 756)
    elif form == "three channels":
        image = Image.fromarray(np.repeat(classes[..., None], 3, 2))
    elif form == "color":
        image = Image.fromarray(np.array([*COLORS, *[(255, 0, 255)] * 252], np.uint8)[classes])
    elif form == "alpha":
        image = Image.fromarray(np.dstack([classes, 255 - classes]))
    else:
        image = Image.fromarray(classes)
    image.save(content, form if form in ("TIFF", "BMP") else "PNG")
    return content.getvalue()


@pytest.mark.slow
@given(
    arrays.arrays(
        np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.sampled_from([0, 1, 2, 3, 255])
    ),
    st.sampled_from(["gray", "gray 16", "palette", "three channels", "color", "alpha", "TIFF", "BMP"]),
)
@settings(max_examples=300, deadline=None)
def test_every_form_of_a_label_map_is_decoded_to_the_same_classes(tmp_path_factory, classes, form):
    path = tmp_path_factory.getbasetemp() / "label.png"
    path.write_bytes(encoded(classes, form))
    encoding = LabelEncoding(4, palette=COLORS, ignored_colors=((255, 0, 255),), color_coded=form == "color")
    read = read_label(label_file(path), encoding, classes.shape[::-1])
    assert read.dtype == np.uint8 and np.array_equal(read, classes)
    if form == "color":
        stats = examine_label(0, "", Location("none"), label_file(path))
        assert stats.kind in ("color", "gray") and sum(stats.counts.values()) == classes.size


@pytest.mark.slow
@given(
    arrays.arrays(np.uint16, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.integers(0, 400)),
    st.integers(1, 254),
    st.booleans(),
    st.one_of(st.none(), st.sets(st.integers(0, 400), max_size=3)),
)
@settings(max_examples=300, deadline=None)
def test_values_are_mapped_as_documented(tmp_path_factory, values, count, reduce, ignore):
    """Compare with a second implementation, pixel by pixel. The scan and the reader must agree."""
    path = tmp_path_factory.getbasetemp() / "label16.png"
    path.write_bytes(png(values, 16, 0))
    encoding = LabelEncoding(count, reduce, None if ignore is None else tuple(ignore))

    def expected(value):
        if value in ({255} if ignore is None else ignore) or (reduce and value == 0):
            return 255
        return value - reduce if value - reduce < count else None

    wanted = [[expected(int(value)) for value in row] for row in values]
    outside = {int(value) for value in values.ravel() if expected(int(value)) is None}
    images = LabeledMaps(Path("x"), ("i",), (Location("none"),), (label_file(path),))
    check = check_labels(images, list(scan_labels(images, 0)), encoding)
    assert {int(value) for value in check.unknown} == outside
    if outside:
        with pytest.raises(BadImages, match=r"^label16\.png: values outside the classes") as error:
            read_label(label_file(path), encoding)
        assert check.bad == ((0, str(error.value)),)
    else:
        read = read_label(label_file(path), encoding)
        assert read.tolist() == wanted and not check.bad
        assert check.pixels == tuple((read == index).sum() for index in range(count))
        assert check.ignored == (read == 255).sum()


def test_reduce_zero_label_maps_as_mmsegmentation(tmp_path):
    """mmsegmentation: label[label == 0] = 255; label -= 1; label[label == 254] = 255."""
    values = np.array([[0, 1, 2, 150, 255]], np.uint8)
    read = read_label(label_file(save(tmp_path / "a.png", values)), LabelEncoding(150, reduce_zero_label=True))
    reference = values.copy()
    reference[reference == 0] = 255
    reference -= 1
    reference[reference == 254] = 255
    assert np.array_equal(read, reference)


def test_label_values_take_the_place_of_the_numbering(tmp_path):
    path = save(tmp_path / "a.png", blocks(0, 255))
    assert np.array_equal(read_label(label_file(path), LabelEncoding(2, label_values=(0, 255))), blocks(0, 1))
    ignoring = LabelEncoding(2, ignore_index=(255,))
    assert np.array_equal(read_label(label_file(path), ignoring), blocks(0, 255))
    path = save(tmp_path / "b.png", blocks(7, 8, 11, 255))
    encoding = LabelEncoding(2, label_values=(8, 11), ignore_index=(7, 255))
    assert np.array_equal(read_label(label_file(path), encoding), blocks(255, 0, 1, 255))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 255}, "255 classes: expected 1 to 254"),
        ({"num_classes": 2, "label_values": (0, 1, 2)}, "one value for each of the 2 classes"),
        ({"num_classes": 2, "label_values": (1, 1)}, "a value repeats"),
        ({"num_classes": 2, "label_values": (0, 255), "ignore_index": (255,)}, "also ignored"),
        ({"num_classes": 2, "label_values": (0, 1), "reduce_zero_label": True}, "exclude each other"),
        ({"num_classes": 2, "ignore_index": (-1,)}, "--ignore-index -1: expected 0 to 65535"),
        ({"num_classes": 2, "palette": COLORS}, "4 colors for 2 classes"),
    ],
)
def test_contradictory_options_are_rejected(options, message):
    with pytest.raises(UsageError, match=message):
        LabelEncoding(**options)


def truncated():
    noise = np.random.default_rng(0).integers(0, 3, (64, 64), np.uint8)
    return encoded(noise, "gray")[:-400]


def as_file(array, form):
    content = io.BytesIO()
    Image.fromarray(array).save(content, form)
    return content.getvalue()


HOSTILE = {
    "empty": (b"", "an empty file"),
    "text": (b"0 1 2\n", "a text file"),
    "pickle": (pickle.dumps([1]), "a Python pickle"),
    "truncated": (truncated(), "truncated"),
    "no pixels": (png(np.zeros((1, 1), np.uint8), 8, 0)[:33], "truncated|not a readable image|broken"),
    "huge": (png(np.zeros((1, 1)), 8, 0, (1 << 15, 1 << 15)), "over the limit of"),
    "jpeg": (as_file(blocks(0, 1), "JPEG"), "JPEG compression changes label values; save label maps as PNG"),
    "gif": (as_file(blocks(0, 1), "GIF"), "GIF files can renumber label values"),
    "deep color": (png(np.zeros((4, 4, 3)), 16, 2), "several channels with 16 bits"),
    "float": (as_file(np.zeros((4, 4), np.float32), "TIFF"), "mode F cannot contain labels"),
    "negative": (
        as_file(np.full((4, 4), -1, np.int32), "TIFF"),
        r"values outside the classes \(0 to 3\): -1 \(16 pixels\)",
    ),
    "large": (as_file(np.full((4, 4), 70000, np.int32), "TIFF"), "70000"),
    "color": (encoded(blocks(0, 1), "color"), "colors instead of class indices; pass a class list with colors"),
    "bad palette index": (encoded(np.full((2, 2), 200, np.uint8), "palette"), r"200 \(4 pixels\)"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_label_files_are_reported_by_path(tmp_path, kind):
    content, message = HOSTILE[kind]
    (tmp_path / "label.png").write_bytes(content)
    with pytest.raises(BadImages, match=rf"^label\.png: .*({message})") as error:
        read_label(label_file(tmp_path / "label.png"), LabelEncoding(4))
    assert "\n" not in str(error.value)
    plain(tmp_path, "a")
    images = all_of(tmp_path)
    (tmp_path / "annotations/a.png").write_bytes(content)
    (result,) = scan_labels(images, 0)
    if isinstance(result, BadImages):
        assert str(result).startswith("annotations/a.png: ")
    else:
        (bad,) = check_labels(images, [result], LabelEncoding(4)).bad
        assert bad[1].startswith("annotations/a.png: ")


def circle(path):
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (circle, "Too many levels of symbolic links"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (os.mkfifo, "not a regular file"),
    ],
    ids=["link to itself", "broken link", "device", "pipe"],
)
@pytest.mark.parametrize("folder", ["images", "annotations"])
def test_files_that_are_not_files_are_listed_and_the_others_checked(tmp_path, capsys, folder, make, message):
    path = next(plain(tmp_path, "a", "b").glob(f"{folder}/a.*"))
    path.unlink()
    make(path)
    (tmp_path / "annotations" / "loop").symlink_to(tmp_path)
    code, out, err = run(capsys, tmp_path)
    assert code == 6 and f"{folder}/{path.name}: {message}" in err and "Traceback" not in err
    assert "2 images with label maps" in out and "no pixels" not in out


def test_a_folder_in_place_of_a_label_is_a_missing_label(tmp_path):
    plain(tmp_path, "a", "b")
    (tmp_path / "annotations/a.png").unlink()
    (tmp_path / "annotations/a.png").mkdir()
    images = all_of(tmp_path)
    assert images.names == ("images/b.jpg",)
    assert read_split(find_maps(open_source(tmp_path)), "all").unlabeled == ("images/a.jpg",)


def test_missing_and_oversized_files_are_reported_by_path(tmp_path):
    with pytest.raises(BadImages, match=r"^gone\.png: No such file"):
        read_label(label_file(tmp_path / "gone.png"), LabelEncoding(4))
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(BadImages, match=r"^sparse\.png: larger than 512 MiB"):
        read_label(label_file(tmp_path / "sparse.png"), LabelEncoding(4))


@pytest.mark.slow
@given(st.binary(max_size=60), st.integers(8, 400), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_damaged_files_raise_only_bad_images(tmp_path_factory, insert, position, byte):
    content = bytearray(encoded(np.tile(np.arange(4, dtype=np.uint8), (9, 9)), "palette"))
    position %= len(content)
    content[position : position + 1] = bytes([byte]) + insert
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(content)
    for read in (
        lambda label: read_label(label, LabelEncoding(4)),
        lambda label: examine_label(0, "", Location("x"), label),
    ):
        try:
            read(label_file(path))
        except BadImages as error:
            assert str(error).startswith("damaged.png: ")


def test_a_label_map_has_the_size_of_its_upright_image(tmp_path):
    plain(tmp_path, "a")
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "images/a.jpg", Image.new("RGB", (36, 40)), exif=exif)  # 40 x 36 when displayed
    images, stats, encoding = resolved(tmp_path, LabelEncoding(3))
    assert not check_labels(images, stats, encoding).bad
    save(tmp_path / "images/a.jpg", Image.new("RGB", (36, 40)))
    check = check_labels(images, list(scan_labels(images, 0)), encoding)
    message = "annotations/a.png: 40 x 36 pixels, but its image has 36 x 40 (width x height); check that they belong"
    ((index, reason),) = check.bad
    assert index == 0 and reason.startswith(message) and not any(check.pixels)
    with pytest.raises(BadImages, match=re.escape(message)):
        read_label(images.labels[0], encoding, (36, 40))


# Check


@pytest.mark.parametrize("three_channels", [False, True])
@pytest.mark.parametrize("values", [(0, 255), (255,)])
def test_masks_of_0_and_255_are_never_guessed(tmp_path, values, three_channels):
    plain(tmp_path, "a", "b", values=values)
    if three_channels:
        save(tmp_path / "annotations/a.png", np.repeat(blocks(*values)[..., None], 3, 2))
    for encoding in (LabelEncoding(2), LabelEncoding(None), LabelEncoding(5), LabelEncoding(1, reduce_zero_label=True)):
        with pytest.raises(UsageError, match="only the values 0 and 255") as error:
            resolved(tmp_path, encoding, (*COMMAND, *(["--reduce-zero-label"] if encoding.reduce_zero_label else [])))
        assert re.findall(r"run: (fcvit [^;]*)", str(error.value)) == [
            "fcvit check-data 'my data' --label-values 0 255",
            "fcvit check-data 'my data' --ignore-index 255",
        ]
    as_class = resolved(tmp_path, LabelEncoding(None, label_values=(0, 255)))
    assert as_class[2].num_classes == 2 and check_labels(*as_class).pixels[1] > 0
    if 0 in values:
        ignored = resolved(tmp_path, LabelEncoding(2, ignore_index=(255,)))
        assert check_labels(*ignored).absent == (1,)
    save(tmp_path / "annotations/b.png", blocks(0, 1, 255))  # another value settles it
    assert resolved(tmp_path, LabelEncoding(2))[2].num_classes == 2


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ((0, 1, 2, 3), {}, "values 0 to 3 .*3 classes need 0 to 2.*--reduce-zero-label=true; if 0 is a class"),
        ((1, 2, 3, 255), {}, "values 1 to 3 .*3 in annotations/a.png.*--reduce-zero-label=true$"),
        ((0,), {"reduce_zero_label": True}, r"all pixels of the label maps are ignored \(values 0\)"),
        ((7,), {"ignore_index": (7,)}, "all pixels"),
    ],
)
def test_the_label_range_is_compared_with_the_class_count(tmp_path, values, options, message):
    plain(tmp_path, "a", values=values)
    with pytest.raises(DoesNotFit, match=message):
        resolved(tmp_path, LabelEncoding(3, **options))


def test_more_values_than_classes_can_be_are_reported_with_the_command_that_lists_them(tmp_path):
    plain(tmp_path, "a", "b")
    for name, values in (("a", (0, 1)), ("b", (0, 256, 512))):
        save(tmp_path / f"annotations/{name}.png", blocks(*values, dtype=np.uint16))
    with pytest.raises(DoesNotFit, match=r"^annotations/b\.png: contains the value 512.*--classes FILE") as error:
        resolved(tmp_path, LabelEncoding(None))
    command = "fcvit check-data 'my data' --label-values 0 1 256 512"
    assert str(error.value).endswith(f"run: {command}")
    assert not check_labels(*resolved(tmp_path, LabelEncoding(None, label_values=(0, 1, 256, 512)))).bad
    save(tmp_path / "annotations/b.png", Image.fromarray(np.arange(300, dtype=np.uint16).reshape(10, 30)))
    with pytest.raises(DoesNotFit, match=r"the value 299, .*--classes FILE$"):
        resolved(tmp_path, LabelEncoding(None))


def test_labels_that_start_at_1_are_a_hint(tmp_path):
    plain(tmp_path, "a", "b", values=(1, 2, 3))
    (hint,) = check_labels(*resolved(tmp_path, LabelEncoding(None))).hints
    assert hint == "label 0 never occurs; if the first class is label 1, use --reduce-zero-label"
    assert not check_labels(*resolved(tmp_path, LabelEncoding(None, reduce_zero_label=True))).hints
    save(tmp_path / "annotations/b.png", blocks(0, 3))
    assert not check_labels(*resolved(tmp_path, LabelEncoding(None))).hints


def test_a_suspicious_reduce_zero_label_is_a_hint(tmp_path):
    plain(tmp_path, "a", values=(0, 1, 2))
    (hint,) = check_labels(*resolved(tmp_path, LabelEncoding(3, reduce_zero_label=True))).hints
    assert "do not use --reduce-zero-label" in hint
    assert not check_labels(*resolved(tmp_path, LabelEncoding(2, reduce_zero_label=True))).hints
    assert not check_labels(*resolved(tmp_path, LabelEncoding(3))).hints


def test_absent_classes_and_unknown_values_are_counted(tmp_path):
    plain(tmp_path, "a", "b", values=(0, 2))
    save(tmp_path / "annotations/b.png", blocks(0, 200))
    check = check_labels(*resolved(tmp_path, LabelEncoding(4)))
    assert check.pixels == (720, 0, 720, 0) and check.maps == (1, 0, 1, 0) and check.absent == (1, 3)
    assert check.unknown == {"200": 720}
    assert check.bad[0][1].startswith("annotations/b.png: values outside the classes (0 to 3): 200 (720 pixels)")


def test_color_coded_labels_need_a_class_list_with_colors(tmp_path):
    plain(tmp_path, "a", "b")
    for name, form in (("a", "color"), ("b", "palette")):
        (tmp_path / f"annotations/{name}.png").write_bytes(encoded(blocks(0, 1, 2, 3), form))
    with pytest.raises(DoesNotFit, match=r"annotations/a.png: .*colors.*red, green, blue.*4 colors: \(0, 0, 0\)"):
        resolved(tmp_path, LabelEncoding(4))
    known = LabelEncoding(4, palette=COLORS)
    images, stats, encoding = resolved(tmp_path, known)
    assert encoding.color_coded and check_labels(images, stats, encoding).pixels == (720,) * 4
    for label in images.labels:  # a palette image in a data set of colors is read by its colors
        assert np.array_equal(read_label(label, encoding), blocks(0, 1, 2, 3))
    fewer = LabelEncoding(3, palette=COLORS[:3])
    check = check_labels(*resolved(tmp_path, fewer))
    assert check.unknown == {"(128, 128, 128)": 720}
    assert "colors that are not in the class list: (128, 128, 128) (360 pixels)" in check.bad[0][1]
    with pytest.raises(BadImages, match=r"annotations/a.png: colors that are not in the class list: \(128, 128, 128\)"):
        read_label(images.labels[0], resolved(tmp_path, fewer)[2])
    void = LabelEncoding(3, palette=COLORS[:3], ignored_colors=COLORS[3:])
    assert check_labels(*resolved(tmp_path, void)).ignored == 720
    with pytest.raises(DoesNotFit, match=r"color \(0, 0, 0\) belongs to several classes"):
        resolved(tmp_path, LabelEncoding(4, palette=(*COLORS[:3], COLORS[0])))
    with pytest.raises(UsageError, match="for indices"):
        resolved(tmp_path, dataclasses.replace(known, reduce_zero_label=True))
    save(tmp_path / "annotations/b.png", blocks(0, 1))
    assert "annotations/b.png: class indices in one channel" in check_labels(*resolved(tmp_path, known)).bad[0][1]


@pytest.mark.parametrize("palette", [None, COLORS])
def test_a_few_color_images_among_indices_are_listed(tmp_path, palette):
    """One wrong file does not change how the others are read."""
    plain(tmp_path, "a", "b", "c", "d", values=(0, 1, 2, 3))
    (tmp_path / "annotations/b.png").write_bytes(encoded(blocks(0, 1), "color"))
    images, stats, encoding = resolved(tmp_path, LabelEncoding(4 if palette else None, palette=palette))
    assert encoding == LabelEncoding(4, palette=palette)
    check = check_labels(images, stats, encoding)
    assert [index for index, _ in check.bad] == [1] and check.pixels == (3 * 360,) * 4 and not check.hints
    assert check.bad[0][1].startswith("annotations/b.png: colors instead of class indices; pass a class list")


def test_gray_colors_in_a_color_coded_data_set_are_colors(tmp_path):
    plain(tmp_path, "a", "b")
    (tmp_path / "annotations/a.png").write_bytes(encoded(blocks(1, 2), "color"))
    (tmp_path / "annotations/b.png").write_bytes(encoded(blocks(0, 3), "color"))  # black and gray only
    images, stats, encoding = resolved(tmp_path, LabelEncoding(4, palette=COLORS))
    assert [one.kind for one in stats] == ["color", "gray"]
    assert np.array_equal(read_label(images.labels[1], encoding), blocks(0, 3))


def test_a_palette_in_another_order_than_the_class_list_is_a_hint(tmp_path):
    plain(tmp_path, "a")
    (tmp_path / "annotations/a.png").write_bytes(encoded(blocks(0, 1), "palette"))
    assert not check_labels(*resolved(tmp_path, LabelEncoding(4, palette=COLORS))).hints
    (hint,) = check_labels(*resolved(tmp_path, LabelEncoding(4, palette=COLORS[::-1]))).hints
    assert "index 0 is read as class 0, but its color in the file's palette is that of class 3" in hint


def test_a_photograph_is_not_a_label_map(tmp_path):
    plain(tmp_path, "a")
    photo(tmp_path / "annotations/a.png")
    (result,) = scan_labels(all_of(tmp_path), 0)
    assert re.match(r"annotations/a.png: 1,\d+ different values; not a label map", str(result))


# Class lists


def test_ade20k_has_150_classes_with_colors():
    listed = ade20k()
    assert len(listed.classes) == len(listed.palette) == 150
    assert listed.classes[0] == ClassName("wall", "wall") and listed.palette[0] == (120, 120, 120)
    assert listed.classes[7].name == "bed" and listed.palette[6] == listed.palette[48] == (140, 140, 140)
    assert listed.classes[149].name == "flag" and listed.palette[149] == (92, 0, 255)


def test_class_lists_with_and_without_colors(tmp_path):
    path = tmp_path / "classes.csv"
    path.write_text("index,name,red,green,blue\n1,dog,4,5,6\n0,cat,1,2,3\n255,void,0,0,0\n")
    listed = read_class_list(path)
    assert [c.name for c in listed.classes] == ["cat", "dog"]
    assert listed.palette == ((1, 2, 3), (4, 5, 6)) and listed.ignored_colors == ((0, 0, 0),)
    path.write_text("Name, R, G, B\na,1,2,3\na,4,5,6\n")
    assert read_class_list(path).classes == (ClassName("a (0)", "a"), ClassName("a (1)", "a"))
    path.write_text("cat\ndog\n")
    assert read_class_list(path) == ((ClassName("cat", "cat"), ClassName("dog", "dog")), None, ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,r,g,b\na,1,2,256\n", "line 2: the color 1, 2, 256"),
        ("name,r,g,b\na,1,2\n", "line 2: the color"),
        ("index,name,r,g,b\n0,a,1,2,3\n0,b,1,2,3\n", "line 3: the index 0 repeats"),
        ("index,name,r,g,b\n1,a,1,2,3\n", "must contain 0 to 0"),
    ],
)
def test_invalid_class_lists_are_rejected(text, message):
    with pytest.raises(DoesNotFit, match=f"list.csv: .*{message}"):
        parse_class_list(text.encode(), "list.csv")


@given(st.binary(max_size=80) | st.text(max_size=80).map(lambda text: f"name,r,g,b\n{text}".encode("utf-8", "replace")))
@settings(max_examples=200, deadline=None)
def test_any_content_is_a_class_list_or_an_error_of_the_package(content):
    try:
        listed = parse_class_list(content, "list")
    except (DoesNotFit, UnreadableFile):
        return
    assert listed is None or len(listed.classes) == len(listed.palette)


# fcvit check-data


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "streets"
    for split in ("train", "val"):
        plain(root, *(f"{split}/{i}" for i in range(3)))
    (root / "classes.csv").write_text("index,name,red,green,blue\n0,sky,1,1,1\n1,road,2,2,2\n2,car,3,3,3\n")
    return root


@pytest.mark.parametrize("packed", [False, True])
def test_clean_segmentation_data(data, packed, notes):
    check = check_data(as_tar(data) if packed else data, few=0)
    assert check.clean and check.exit_code == 0 and check.encoding.num_classes == 3
    assert [(s.name, s.images) for s in check.splits] == [("train", 3), ("val", 3)]
    assert check.splits[0].pixels == {"sky": 3 * 504, "road": 3 * 504, "car": 3 * 432}
    assert check.splits[1].maps == {"sky": 3, "road": 3, "car": 3}
    assert len(notes) == 1 and "classes.csv" in notes[0]


def run(capsys, *words):
    code = main(["check-data", *map(str, words), "--workers", "0"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_problems_of_segmentation_data(data, capsys):
    (data / "images/train/0.jpg").write_bytes(b"?")
    save(data / "annotations/train/1.png", blocks(0, 9))
    (data / "annotations/val/2.png").unlink()
    save(data / "annotations/val/old.png", blocks(0, 1))
    exif = Image.Exif()
    exif[0x0112] = 3
    photo(data / "images/val/1.jpg").write_bytes(
        save(data / "upside down.jpg", Image.open(data / "images/val/1.jpg"), exif=exif).read_bytes()
    )
    for index in (0, 1):
        save(data / f"annotations/val/{index}.png", blocks(0, 1))
    (data / "images/val/0.jpg").write_bytes((data / "images/train/2.jpg").read_bytes())
    code, out, err = run(capsys, data)
    assert code == 6
    for text in (
        "images without a label map, val ",
        "images/val/2.jpg",
        "label maps without an image, val ",
        "annotations/val/old.png",
        "classes without pixels, val ",
        "no pixels",
        "groups of duplicates in more than one split ",
        "9 (720 pixels)",
        "classes in fewer than 10 label maps, train ",
    ):
        assert text in out
    assert "images/train/0.jpg: not a readable image" in err
    assert "annotations/train/1.png: values outside the classes (0 to 2)" in err
    assert "EXIF" not in out  # the orientation is applied
    assert run(capsys, data, "--json")[0] == 6


def test_the_first_findings_are_listed_with_the_number_of_all(data, capsys, short_lists):
    for index in range(3):
        save(data / f"annotations/train/{index}.png", blocks(0, 7 + index))
        (data / f"annotations/val/{index}.png").write_bytes(b"?")
        photo(data / f"images/val/more{index}.jpg")
        save(data / f"annotations/val/old{index}.png", blocks(0, 1))
    code, out, err = run(capsys, data, "--few", "0", "--json")
    check = json.loads(out)
    assert code == 6 and "6 images excluded" in err and "... and 4 more" in err
    assert check["counts"] == {
        "images and label maps that cannot be used": 6,
        "values or colors without a class, train": 3,
        "images without a label map, val": 3,
        "label maps without an image, val": 3,
    }
    assert [bad["image"] for bad in check["unreadable"]] == [f"annotations/train/{index}.png" for index in (0, 1)]
    assert check["splits"][0]["unknown"] == {"7": 720, "8": 720}
    assert check["splits"][1]["unlabeled"] == [f"images/val/more{index}.jpg" for index in (0, 1)]


def test_the_content_of_label_maps_can_be_on_disk(data, monkeypatch):
    (data / "annotations/val/1.png").write_bytes(b"?")
    check = check_data(data)
    monkeypatch.setattr(check_maps, "_IN_MEMORY", 1)
    assert check_data(data) == check and total(check.unreadable) == 1


def test_classes_are_not_called_absent_if_no_label_map_can_be_used(data, capsys):
    for path in data.glob("annotations/val/*.png"):
        save(path, blocks(0, 9))
    code, out, err = run(capsys, data)
    assert code == 6 and err.count("values outside the classes") == 3 and "3 images excluded" in err
    assert "no pixels" not in out and "classes without pixels, val" not in out


def test_the_command_line_offers_two_meanings_of_255(tmp_path, capsys):
    root = plain(tmp_path / "my masks", "a", "b", values=(0, 255), suffix="_mask", annotations="masks")
    code, _, err = run(capsys, root)
    assert code == 2 and err.count("run: fcvit check-data") == 2
    for option in (("--label-values", 0, 255), ("--ignore-index", 255)):
        assert " ".join(map(str, option)) in err
        assert run(capsys, root, *option)[0] == 0


def test_the_command_line_reduces_the_zero_label(data, capsys):
    for name in ("train/0", "train/1", "val/0"):
        save(data / f"annotations/{name}.png", blocks(0, 1, 2, 3))
    code, _, err = run(capsys, data)
    assert code == 4 and f"run: fcvit check-data {data} --reduce-zero-label=true" in err
    assert run(capsys, data, "--reduce-zero-label=true")[0] == 0


def test_options_of_label_maps_need_label_maps(tmp_path):
    photo(tmp_path / "cat/a.jpg")
    with pytest.raises(UsageError, match="--ignore-index is for images with label maps"):
        check_data(tmp_path, labels=LabelOptions(ignore_index=[0]))


def test_ade20k_is_checked_with_its_own_classes(tmp_path, notes):
    root = plain(tmp_path / "ADEChallengeData2016", "training/a", "validation/b", values=(0, 1, 150))
    check = check_data(root)
    assert check.encoding.reduce_zero_label and check.encoding.num_classes == 150
    assert check.splits[0].pixels["wall"] and check.splits[0].pixels["flag"]
    assert any("0 is ignored, as in ADE20K" in note for note in notes)
    with pytest.raises(DoesNotFit, match="values 0 to 150"):
        check_data(root, labels=LabelOptions(reduce_zero_label=False))


@pytest.mark.slow
def test_the_check_does_not_depend_on_the_number_of_workers(data):
    save(data / "annotations/train/1.png", blocks(0, 9))
    assert check_data(data, workers=2) == check_data(data)
