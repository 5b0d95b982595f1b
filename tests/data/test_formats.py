"""Test that Parquet files and WebDataset shards give the same images and labels as folders, lists and tar archives."""

import contextlib
import dataclasses
import io
import json
import random
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from conftest import SMALL
from fcvit.data import parquet
from fcvit.data.class_folders import read_dataset
from fcvit.data.classes import ClassName
from fcvit.data.loader import Workers, batches
from fcvit.data.sources import open_source
from fcvit.data.training_splits import find_splits
from fcvit.data.transforms.preprocess import CenterCrop
from fcvit.errors import DoesNotFit, FcvitError, MissingExtra, UnreadableFile
from fcvit.models.variants import Preprocessing
from fcvit.training.recipe import Recipe

CLASSES = ("rose", "tulip", "lily")
KNOWN = tuple(ClassName(name, name) for name in CLASSES)


def image(seed, side=12):
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


IMAGES = [(f"{number:02d}.png", number * 7 % 3, image(number)) for number in range(24)]


def write_folder(root, images=IMAGES):
    for name, label, content in images:
        (root / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        (root / CLASSES[label] / name).write_bytes(content)
    return root


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(root, images=IMAGES, count=3, stem="flowers", label=lambda label: ("cls", str(label))):
    root.mkdir(exist_ok=True)
    for shard in range(count):
        members = []
        for name, index, content in images[shard::count]:
            key, (ending, text) = name.partition(".")[0], label(index)
            members += [(f"{key}.{ending}", text.encode()), (name, content)]
        write_tar(root / f"{stem}-{shard:04d}.tar", members)
    return root


def write_parquet(path, images=IMAGES, names=CLASSES, **options):
    arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(exist_ok=True)
    column = [{"bytes": content, "path": name} for name, _, content in images]
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    table = arrow.table({"image": arrow.array(column, kind), "label": [label for _, label, _ in images]})
    if names:
        label = {"names": list(names), "_type": "ClassLabel"}
        features = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path, **({"row_group_size": 5} | options))
    return path


def samples(dataset):
    return [
        (name, label, location.read())
        for name, label, location in zip(dataset.names, dataset.labels, dataset.locations, strict=True)
    ]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return samples(read_dataset(write_folder(tmp_path_factory.mktemp("flowers")), None, KNOWN, 3))


def test_parquet_files_are_read_like_a_folder(tmp_path, expected):
    for part in range(2):
        write_parquet(tmp_path / f"train-{part:05d}-of-00002.parquet", IMAGES[part::2])
    dataset = read_dataset(tmp_path, None, KNOWN, 3)
    assert samples(dataset) == expected
    assert f"{tmp_path}: read as 2 Parquet files with 24 images" in dataset.notes
    assert samples(read_dataset(tmp_path / "train-*.parquet", None, None, 3)) == expected
    assert len(read_dataset(tmp_path / "train-00001-of-00002.parquet", None, KNOWN, 3)) == 12


def test_shards_are_read_like_a_folder(tmp_path, expected):
    by_name = write_shards(tmp_path / "a", label=lambda label: ("json", json.dumps({"label": CLASSES[label]})))
    dataset = read_dataset(by_name, None, KNOWN, 3)
    assert samples(dataset) == expected
    assert f"{by_name}: read as 3 WebDataset shards with 24 images" in dataset.notes
    by_index = write_shards(tmp_path / "b")
    by_content = {content: label for _, label, content in expected}
    for pattern in (
        "",
        "flowers-{0000..0002}.tar",
        "flowers-*.tar",
        "flowers-000[0-2].tar",
        "flowers-{0000,0001,0002}.tar",
    ):
        dataset = read_dataset(by_index / pattern, None, KNOWN, 3)
        assert {content: label for _, label, content in samples(dataset)} == by_content
    single = read_dataset(by_index / "flowers-0001.tar", None, KNOWN, 3)
    assert len(single) == 8 and list(single.labels) == [int(name[0]) for name in single.names]


def test_a_file_of_a_brace_pattern_that_is_missing_is_an_error(tmp_path):
    write_shards(tmp_path)
    for pattern, message in (
        ("flowers-{0000..0003}.tar", r"flowers-0003\.tar: no such file"),
        ("other-*.tar", r"no such file"),
        ("flowers-{5..1}.tar", "is empty"),
        ("flowers-{0..999999999}.tar", "more than 100,000"),
        ("flowers-{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}.tar", "more than 100,000"),
    ):
        with pytest.raises(UnreadableFile, match=message):
            open_source(tmp_path / pattern)


def test_names_that_repeat_get_the_name_of_their_shard_or_row(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", [("0.png", IMAGES[shard][2]), ("0.cls", b"1")])
    dataset = read_dataset(tmp_path, None, KNOWN, 3)
    assert dataset.names == ("1/0/0.png", "1/1/0.png")
    assert [location.read() for location in dataset.locations] == [IMAGES[0][2], IMAGES[1][2]]
    path = write_parquet(tmp_path / "x.parquet", [("a.png", 0, IMAGES[0][2]), ("b/a.png", 0, IMAGES[1][2])])
    assert read_dataset(path, None, KNOWN, 3).names == ("rose/x-000000.png", "rose/x-000001.png")
    path = write_parquet(tmp_path / "y.parquet", [(None, 0, IMAGES[0][2]), ("", 2, IMAGES[1][2])])
    assert read_dataset(path, None, KNOWN, 3).names == ("lily/y-000001.png", "rose/y-000000.png")


@pytest.mark.parametrize("kind", ["parquet", "shards", "parquet folders"])
def test_splits_are_found_by_the_names_of_the_files(tmp_path, kind):
    parts = {"train": IMAGES[:16], "validation": IMAGES[16:]}
    for split, images in parts.items():
        if kind == "shards":
            write_shards(tmp_path, images, 2, f"flowers-{split}")
        elif kind == "parquet":
            write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", images)
        else:
            write_parquet(tmp_path / split / "0000.parquet", images)
    if kind == "parquet":  # a test split without labels
        write_parquet(tmp_path / "test-00000-of-00001.parquet", [(f"t{name}", -1, c) for name, _, c in IMAGES[:4]])
    splits = find_splits(Recipe(**{**SMALL, "data": str(tmp_path)}), None)
    assert [c.id for c in splits.classes] == (["0", "1", "2"] if kind == "shards" else list(CLASSES))
    for split, name in ((splits.train, "train"), (splits.val, "validation")):
        assert sorted(location.read() for location in split.locations) == sorted(c for *_, c in parts[name])
        assert {split.locations[i].read(): label for i, label in enumerate(split.labels)} == {
            content: label for _, label, content in parts[name]
        }
    with pytest.raises(DoesNotFit, match=r"contains the splits .*pass the folder of one split, such as"):
        read_dataset(tmp_path, None, KNOWN, 3)
    inner = f"flowers-{'validation'}" if kind == "shards" else "validation"
    assert len(read_dataset(tmp_path / inner, None, KNOWN, 3)) == 8
    if kind == "parquet":
        assert len(open_source(tmp_path / "test").tree().files) == 4
        with pytest.raises(UnreadableFile, match="the images have no labels"):
            read_dataset(tmp_path / "test", None, KNOWN, 3)
        write_parquet(tmp_path / "extra.parquet")
        with pytest.raises(UnreadableFile, match=r"files of splits and others \(extra\); pass the files of one split"):
            open_source(tmp_path)


def test_class_names_in_a_file_are_checked_against_those_of_the_model(tmp_path):
    """ImageNet's class names in other copies are lists of synonyms, so that their indices are used."""
    synonyms = write_parquet(tmp_path / "a.parquet", names=("rose, Rosa", "tulip, Tulipa", "lily, Lilium"))
    assert dict(read_dataset(synonyms, None, KNOWN, 3).mapping)["tulip, Tulipa"] == 1
    permuted = write_parquet(tmp_path / "b.parquet", names=("tulip, Tulipa", "rose, Rosa", "lily, Lilium"))
    with pytest.raises(DoesNotFit, match=r"class 0 is tulip, Tulipa, which is the id of class 1 of the model"):
        read_dataset(permuted, None, KNOWN, 3)
    swapped = write_parquet(tmp_path / "c.parquet", names=("tulip", "rose", "lily"))
    assert dict(read_dataset(swapped, None, KNOWN, 3).mapping) == {"tulip": 1, "rose": 0, "lily": 2}
    with pytest.raises(DoesNotFit, match=r"3 classes of b\.parquet"):
        read_dataset(permuted, None, None, 5)
    numbers = write_parquet(tmp_path / "d.parquet", names=())
    assert sorted(set(read_dataset(numbers, None, KNOWN, 3).labels)) == [0, 1, 2]


def test_a_path_that_can_be_read_in_two_ways_is_reported(tmp_path):
    """Class folders in a tar archive stay the classes, so that earlier runs can be resumed."""
    members = [(f"{CLASSES[label]}/{name}", content) for name, label, content in IMAGES]
    labels = [(f"{CLASSES[label]}/{name[:2]}.cls", b"0") for name, label, _ in IMAGES]
    path = write_tar(tmp_path / "x.tar", members + labels)
    dataset = read_dataset(path, None, KNOWN, 3)
    assert sorted(set(dataset.labels)) == [0, 1, 2]
    assert f"to use the labels, pass the pattern '{tmp_path}/x[.]tar'" in dataset.notes[0]
    assert set(read_dataset(tmp_path / "x[.]tar", None, KNOWN, 3).labels) == {0}
    (tmp_path / "list.txt").write_text("01.png 2\n02.png 1\n")
    flat = write_tar(
        tmp_path / "flat.tar", [(n, c) for n, _, c in IMAGES] + [(f"{n[:2]}.cls", b"0") for n, *_ in IMAGES]
    )
    listed = read_dataset(flat, tmp_path / "list.txt", KNOWN, 3)
    assert listed.names == ("01.png", "02.png") and listed.labels == (2, 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "NONE"},
        {"compression": "ZSTD", "use_dictionary": False},
        {"compression": "GZIP", "data_page_version": "2.0"},
        {"data_page_size": 1, "use_dictionary": False},
        {"data_page_size": 1, "row_group_size": 100},
        {"compression": "LZ4"},
        {"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}},
    ],
    ids=lambda options: ",".join(map(str, options.values())) or "default",
)
def test_images_are_read_from_all_encodings_of_parquet(tmp_path, options, monkeypatch):
    """Also rows that repeat an image, which a dictionary stores once, and rows without an image."""
    images = [*IMAGES, ("24.png", 0, IMAGES[3][2]), ("25.png", 0, None), ("26.png", -1, IMAGES[4][2])]
    path = write_parquet(tmp_path / "x.parquet", images, **options)
    files = open_source(path).tree().files
    contents = {}
    for name, location in files.items():
        contents[name.rpartition("/")[2]] = location
    for name, _, content in images:
        if content is None:
            with pytest.raises(OSError, match="contains no bytes of an image"):
                contents[name].read()
        else:
            assert contents[name].read() == content
    assert "26.png" in files
    by_page = [location.page >= 0 for location in files.locations]
    assert all(by_page) or not any(by_page)
    assert any(by_page) == (options.get("compression") != "LZ4" and "column_encoding" not in options)


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}], ids=str)
def test_single_images_of_a_large_page_are_decompressed(tmp_path, options, monkeypatch):
    """Snappy's blocks are independent, and an image is in several of them."""
    images = [(f"{number}.png", 0, image(number, 160 + number)) for number in range(6)]
    path = write_parquet(tmp_path / "x.parquet", images, row_group_size=100, **options)
    locations = open_source(path).tree().files.locations
    assert [location.read() for location in locations] == [content for *_, content in images]
    sizes, decompress = [], parquet._decompress
    monkeypatch.setattr(parquet, "_decompress", lambda *args: sizes.append(args[1]) or decompress(*args))
    for location, (*_, content) in zip(locations, images, strict=True):
        assert location.read() == content
        assert len(sizes) == 1 and sizes.pop() <= len(content) + 2 * parquet._BLOCK


def test_blocks_of_snappy_are_used_only_if_they_are_independent():
    def literal(size):
        return b"\xf4" + (size - 1).to_bytes(2, "little") + bytes(size)

    def copy(offset):
        return b"\x0e" + offset.to_bytes(2, "little")  # four bytes

    block = parquet._BLOCK
    start, total = parquet._as_varint(4 * block), 4 * block
    assert len(parquet._snappy_blocks(start + literal(block) * 4, total)) == 5
    inside = literal(block) * 3 + literal(block - 4) + copy(block - 4)
    assert len(parquet._snappy_blocks(start + inside, total)) == 5
    before = literal(block) * 3 + literal(block - 4) + copy(block - 3)
    assert not parquet._snappy_blocks(start + before, total)
    across = literal(block - 2) + copy(4) + literal(block - 2) + literal(block) * 2
    assert not parquet._snappy_blocks(start + across, total)


def test_damaged_labels_in_shards_are_rejected_in_one_line(tmp_path):
    for content, message in (
        ([("1.png", b"x"), ("1.cls", b"\xff\xfe")], "1.cls: not a readable label"),
        ([("1.png", b"x"), ("1.cls", b"")], "is empty or too long"),
        ([("1.png", b"x"), ("1.json", b"[" * 5000)], "1.json: not a readable label"),
        ([("1.png", b"x"), ("1.json", b"[1]")], "1.json: not a readable label: not an object"),
        ([("1.png", b"x"), ("1.json", b'{"label": [1]}')], "1.json: not a readable label"),
        ([("1.png", b"x"), ("1.jpg", b"x"), ("1.cls", b"0")], "1.jpg and 1.png are images of one sample"),
    ):
        write_tar(tmp_path / "x.tar", content)
        with pytest.raises(UnreadableFile, match=message) as error:
            open_source(tmp_path / "[x].tar")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("column", ["none", "two", "labels", "type", "range"])
def test_parquet_files_of_other_contents_are_rejected(tmp_path, column):
    arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = {"image": [b"x"]}
    table, message = {
        "none": ({"x": [1]}, "no column with the bytes of images"),
        "two": ({"a": [b"x"], "b": [b"y"]}, r"several columns of images \(a, b\)"),
        "labels": (images | {"label": [0], "target": [1]}, r"several columns of labels \(label, target\)"),
        "type": (images | {"label": [0.5]}, "label has the type double"),
        "range": (images | {"label": [7]}, "label 7, but the file names 3 classes"),
    }[column]
    features = {"info": {"features": {"label": {"names": CLASSES, "_type": "ClassLabel"}}}}
    table = arrow.table(table)
    if column == "range":
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UnreadableFile, match=message):
        open_source(tmp_path / "x.parquet")


def test_pyarrow_is_needed_only_for_parquet(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fcvit\[parquet\]'"):
        open_source(path)
    assert len(read_dataset(write_shards(tmp_path / "s"), None, KNOWN, 3)) == 24


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A Parquet file with pages of three kinds, and a shard, as bytes."""
    folder = tmp_path_factory.mktemp("originals")
    parquet_file = write_parquet(folder / "x.parquet", data_page_size=1)
    shard = write_shards(folder / "s", count=1) / "flowers-0000.tar"
    return {"parquet": parquet_file.read_bytes(), "tar": shard.read_bytes()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_damaged_files_are_rejected_or_lose_single_images(originals, tmp_path, kind):
    """Every damage is an error in one line, or an image that cannot be read or has other bytes."""
    for seed in range(80):
        generator = random.Random(seed)
        content = bytearray(originals[kind])
        for _ in range(generator.randint(1, 3)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        if seed % 4 == 0:
            del content[generator.randrange(len(content)) :]
        path = tmp_path / f"{seed}.{kind}"
        path.write_bytes(content)
        check_damaged(path)


def check_damaged(path):
    try:
        dataset = read_dataset(path, None, KNOWN, 3)
    except FcvitError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return
    for location in dataset.locations:
        try:
            location.read()
        except OSError as error:
            assert "\n" not in str(error)


@pytest.mark.slow
def test_workers_and_evaluation_give_the_same_for_every_format(tmp_path, digits_pth):
    """The pixels and metrics are those of the folder, to the last bit."""
    from fcvit.commands.evaluate import evaluate

    (tmp_path / "classes.txt").write_text("\n".join([*CLASSES, *"abcdefg"]))
    paths = [
        write_folder(tmp_path / "folder"),
        write_tar(tmp_path / "x.tar", [(f"{CLASSES[label]}/{name}", content) for name, label, content in IMAGES]),
        write_shards(tmp_path / "shards", label=lambda label: ("json", json.dumps({"cls": CLASSES[label]}))),
        write_parquet(tmp_path / "x.parquet"),
    ]
    options = {"classes": tmp_path / "classes.txt", "engines": "paddle", "batch_size": 12, "workers": 0}
    results = [evaluate(digits_pth, path, **options).report.results[0] for path in paths]
    assert len({repr(dataclasses.replace(result, seconds=0.0)) for result in results}) == 1
    crops = [CenterCrop(Preprocessing(input_size=8))]
    with contextlib.closing(Workers(1)) as workers:
        loaded = [next(iter(batches(read_dataset(path, None, KNOWN, 3), [0], 24, crops, workers))) for path in paths]
    for batch in loaded:
        assert (batch.pixels[0] == loaded[0].pixels[0]).all() and batch.digests == loaded[0].digests
        assert batch.targets == loaded[0].targets and not batch.bad
