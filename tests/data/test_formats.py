"""Test that Parquet files and WebDataset shards give the same images and labels as folders, lists and tar archives."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from fcvit.data.class_folders import read_dataset
from fcvit.data.classes import ClassName
from fcvit.data.sources import open_source

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
    for pattern in (
        "flowers-{0000..0002}.tar",
        "flowers-*.tar",
        "flowers-000[0-2].tar",
        "flowers-{0000,0001,0002}.tar",
    ):
        dataset = read_dataset(by_index / pattern, None, KNOWN, 3)
        assert sorted(content for *_, content in samples(dataset)) == sorted(content for *_, content in expected)
        assert {content: label for _, label, content in samples(dataset)} == {c: label for _, label, c in expected}
    single = read_dataset(by_index / "flowers-0001.tar", None, None, 3)
    assert len(single) == 8 and single.names[0] == "0/03.png" if False else len(single) == 8


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
