"""Test that folders and tar archives are read completely or rejected, without blocking."""

import io
import os
import tarfile

import pytest
from PIL import Image

from conftest import SMALL
from fcvit.commands.check_data import check_data
from fcvit.data import sources
from fcvit.data.class_folders import read_dataset
from fcvit.data.folders import ENDINGS, FORMATS, find_images, images_below, is_image, legible
from fcvit.data.sources import open_source
from fcvit.data.tars import read_tar
from fcvit.data.training_splits import find_splits
from fcvit.data.transforms.preprocess import decode
from fcvit.errors import BadImages, UnreadableFile
from fcvit.training.recipe import Recipe


def tar_of(*names, content=b"x"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            data = content if isinstance(name, str) else b""
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def tar_with(**members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name.replace("_", "."))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def files(path, content):
    path.write_bytes(content)
    return {name: location.read() for name, location in open_source(path).tree().files.items()}


def test_concatenated_tar_archives_are_read_to_the_end(tmp_path):
    first, second = tar_of("a/1.png", "b/1.png", content=b"old"), tar_of("a/1.png", "c/2.png", content=b"new")
    path = tmp_path / "x.tar"
    assert files(path, first + second) == {"a/1.png": b"new", "b/1.png": b"old", "c/2.png": b"new"}
    with pytest.raises(UnreadableFile, match=r"not a readable tar archive: .* byte 10240 of 20480|damaged"):
        files(path, first + b"\xff" * 300 + second[300:])
    for length in range(len(first) + 1, len(first) + 1537, 512):
        with pytest.raises(UnreadableFile):
            files(path, (first + second)[:length])


def test_a_tar_archive_is_indexed_once_until_it_changes(tmp_path, monkeypatch):
    """Training, evaluation and check-data share the index."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of("train/a/1.png", "train/b/1.png", "val/a/2.png", "val/b/2.png", content=image.getvalue()))
    other = tar_of("c/1.png", "d/1.png")
    opened = []
    monkeypatch.setattr(sources, "read_tar", lambda path: opened.append(1) or read_tar(path))
    splits = find_splits(Recipe(**{**SMALL, "data": str(path)}), None)
    assert read_dataset(path / "val", None, None, 2).names == splits.val.names
    assert check_data(path, workers=0).images == 4 and len(opened) == 1
    path.write_bytes(other)
    assert read_dataset(path, None, None, 2).names == ("c/1.png", "d/1.png") and len(opened) == 2


def test_nested_tar_archives_are_folders_and_read_in_place(tmp_path):
    rose, tulip = tar_of("1.png", "2.png"), tar_of("./3.png", content=b"three")
    path = tmp_path / "x.tar"
    inner = {"rose/1.png": b"x", "rose/2.png": b"x", "tulip/3.png": b"three"}
    nested = tar_with(rose_tar=rose, tulip_tar=tulip)
    assert files(path, nested) == inner
    assert files(path, tar_with(train_tar=nested)) == {f"train/{name}": data for name, data in inner.items()}
    with pytest.raises(UnreadableFile, match=r"x.tar/rose.tar: damaged or truncated at byte"):
        files(path, tar_with(rose_tar=rose[:1800], tulip_tar=tulip))
    for _ in range(4):
        nested = tar_with(a_tar=nested)
    with pytest.raises(UnreadableFile, match=r"nested more than 3 levels.*unpack"):
        files(path, nested)


def test_tar_archives_that_are_not_class_folders_are_rejected(tmp_path):
    shard = tar_with(**{"1_png": b"x", "1_txt": b"0", "2_png": b"x", "2_txt": b"1"})
    for name in ("0.tar", "1.tar"):
        (tmp_path / name).write_bytes(shard)
    with pytest.raises(UnreadableFile, match=r"0.tar contains other files.*WebDataset.*unpack"):
        open_source(tmp_path)
    with pytest.raises(UnreadableFile, match=r"not read, such as b.zip; unpack"):
        files(tmp_path / "x", tar_with(a_tar=tar_of("1.png"), b_zip=b"PK"))


def test_a_tar_archive_next_to_images_or_folders_is_not_a_class(tmp_path):
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(tar_of("1.png"))
    assert open_source(tmp_path).folders() == ["a", "b"]
    (tmp_path / "rose").mkdir()
    assert open_source(tmp_path).folders() == ["rose"]
    content = tar_of("rose/1.png") + tar_with(more_tar=tar_of("1.png"))
    assert list(files(tmp_path / "x.tar", content)) == ["more.tar", "rose/1.png"]


def test_absolute_paths_are_used_if_an_archive_contains_no_others(tmp_path):
    assert list(files(tmp_path / "x.tar", tar_of("/a/1.png", "/b/2.png"))) == ["a/1.png", "b/2.png"]
    assert list(files(tmp_path / "x.tar", tar_of("/a/1.png", "b/2.png"))) == ["b/2.png"]


@pytest.mark.parametrize(
    ("start", "remedy"),
    [(b"PK\x03\x04", "unzip"), (b"BZh9", "bunzip2"), (b"\xfd7zXZ\x00", "unxz"), (b"Rar!\x1a\x07\x01", "unrar")],
)
def test_the_message_for_other_archives_contains_the_unpack_command(tmp_path, start, remedy):
    path = tmp_path / "my photos"
    with pytest.raises(UnreadableFile, match=f"{remedy}.* 'my photos'"):
        files(path, start + bytes(1000))


@pytest.mark.parametrize(
    "name", ["__MACOSX/a/1.png", "a/@eaDir/1.png/x.png", "lost+found/1.png", "a/._1.png", "a/Thumbs.db"]
)
def test_system_files_are_skipped_in_folders_and_tar_archives(tmp_path, name):
    assert list(files(tmp_path / "x.tar", tar_of(name, "a/1.png"))) == ["a/1.png"]
    for file in (name, "a/1.png"):
        path = tmp_path / "d" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert list(open_source(tmp_path / "d").tree().files) == ["a/1.png"]
    assert images_below(tmp_path / "d") == [tmp_path / "d/a/1.png"]
    assert find_images([f"{tmp_path}/d/**/*.png"]) == [tmp_path / "d/a/1.png"]


def test_names_that_begin_with_two_dots_are_treated_as_absolute_paths(tmp_path):
    assert list(files(tmp_path / "x.tar", tar_of("../../d/a/1.png", "../../d/b/2.png"))) == ["d/a/1.png", "d/b/2.png"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:44\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    ],
)
def test_the_message_contains_the_format_of_a_file_that_is_not_a_tar_archive(tmp_path, content, kind):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UnreadableFile, match=rf"x\.tar: not a readable tar archive: {kind}"):
        open_source(tmp_path / "x.tar")


def test_endings_match_the_formats_that_pillow_decodes(tmp_path):
    known = Image.registered_extensions()
    assert all(known.get(ending, "JPEG") == name for name, endings in FORMATS.items() for ending in endings)
    missed = {ending for ending, name in known.items() if name in FORMATS} - ENDINGS
    assert not {ending for ending in missed if not ending.startswith(".pfm")}
    for ending in (".gif", ".jfif", ".jpe", *FORMATS.get("AVIF", ())):
        Image.new("RGB", (20, 10), "red").save(tmp_path / f"x{ending}")
        assert is_image(f"x{ending.upper()}") and decode(tmp_path / f"x{ending}").size == (20, 10)
    assert not is_image("x.heic") and not is_image(".png") and not is_image("png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the platform has no named pipes")
def test_a_named_pipe_is_an_image_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    assert images_below(tmp_path) == [tmp_path / "x.jpg"]
    with pytest.raises(BadImages, match=r"x.jpg: not a regular file"):
        decode(tmp_path / "x.jpg")


def test_bytes_that_are_not_utf8_are_escaped_in_names():
    assert legible("caf\udce9") == "caf\\xe9" and legible("café") == "café" and legible("cat") == "cat"
