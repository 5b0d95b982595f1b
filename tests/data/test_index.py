"""Test that the index of a data set is small, complete, kept while the data is the same, and read again otherwise."""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcvit.commands.cache import cache
from fcvit.data import index_cache, sources, tars
from fcvit.data.archives import Builder
from fcvit.data.class_folders import LabeledImages, read_dataset
from fcvit.data.columns import Integers, Location, taken
from fcvit.data.sources import open_source
from fcvit.errors import UnreadableFile

NAMES = ("a/1.png", "a/2.png", "a-b/1.png", "b/é.jpg", "b/\udce9.jpg", "b/notes.txt")


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Keep also the index of a small data set, in an empty cache. Return the names of the formats that were read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_cache, "_MIN_FILES", 1)
    monkeypatch.setattr(index_cache, "_memory", {})
    read = []
    for name in ("_read_folder", "read_tar", "read_shards", "read_parquet"):
        function = getattr(sources, name)
        monkeypatch.setattr(
            sources, name, lambda *args, name=name, function=function: read.append(name) or function(*args)
        )
    return read


def forget():
    index_cache._memory.clear()


def make(root, names=NAMES):
    for name in names:
        path = root / os.fsencode(name).decode("utf-8", "surrogateescape")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogatepass"))
    settle(root)
    return root


def settle(root):
    """Make the folders older, because the index of a folder that was just changed is not kept."""
    for folder, *_ in os.walk(root):
        status = Path(folder).stat()
        os.utime(folder, ns=(status.st_atime_ns, status.st_mtime_ns - 10_000_000_000))


def make_tar(path, names=NAMES, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name in names:
            content = name.encode("utf-8", "surrogatepass")
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def contents(source):
    tree = source.tree()
    return tree.folders, {name: location.read() for name, location in tree.files.items()}


def test_files_of_a_folder_and_of_a_tar_archive_are_sorted_as_text(tmp_path):
    folder, tar = contents(open_source(make(tmp_path / "f"))), contents(open_source(make_tar(tmp_path / "x.tar")))
    assert folder == tar and list(folder[1]) == sorted(NAMES) and folder[0] == ("a", "a-b", "b")
    files = open_source(tmp_path / "f").tree().files
    assert [name in files for name in (*NAMES, "a", "a/", "", "b/zzz", "0")] == [True] * 6 + [False] * 5
    assert open_source(tmp_path / "f").child("a").files() == ["1.png", "2.png"]


@given(st.lists(st.text(max_size=6), max_size=40), st.randoms())
@settings(derandomize=True, max_examples=60, deadline=None)
def test_the_listing_hash_is_that_of_earlier_versions(names, random):
    """Runs that were started by them can be resumed."""
    names = [name.replace("\0", "") + str(number) for number, name in enumerate(names)]
    builder = Builder()
    for number, name in enumerate(names):
        builder.add(name, Location("x", number, 1))
    files = builder.build(labeled=True).files
    labels = [random.randrange(1000) for _ in names]
    dataset = LabeledImages(Path("x"), files.names, files.locations, Integers(labels), {}, "")
    assert dataset.listing() == hashlib.sha256(json.dumps([sorted(names), labels]).encode()).hexdigest()
    order = random.sample(range(len(names)), len(names) // 2)
    part = dataset.take(order)
    expected = [sorted(names)[i] for i in order]
    assert part.listing() == hashlib.sha256(json.dumps([expected, [labels[i] for i in order]]).encode()).hexdigest()
    assert [names[location.offset] for location in part.locations] == expected == list(part.names)
    assert part.take(range(1, len(part))).names == tuple(expected[1:]) == taken(tuple(expected), range(1, len(part)))


def test_an_image_takes_less_than_100_bytes(tmp_path):
    """The names are as long as those of ImageNet in a folder of splits."""
    builder, count = Builder(), 2000
    for number in range(count):
        builder.add(f"train/n01440764/n01440764_{number:05d}.JPEG", Location("x.tar", number << 40, 110_000))
    files = builder.build().files
    dataset = LabeledImages(Path("x"), files.names, files.locations, Integers(range(count)), {}, "")
    shuffled = dataset.take(np.random.default_rng(0).permutation(count))
    places = files.locations
    arrays = [files.image, places.files, places.offsets, places.sizes, dataset.labels.content]
    orders = [column.order for column in (shuffled.names, shuffled.locations, shuffled.labels)]
    size = len(files.names.text) + sum(np.asarray(array).nbytes for array in (*arrays, files.names.starts, *orders))
    assert 70 < size / count < 100


MEMBERS = st.lists(
    st.tuples(
        st.sampled_from(["file", "file", "file", "folder", "hard", "soft", "fifo"]),
        st.one_of(
            st.from_regex(r"(\./|/|\.\./)?[ab]{1,2}(/[ab.]{1,3}){0,2}", fullmatch=True),
            st.sampled_from(["x" * 120 + "/1.png", "d" * 90 + "/" + "e" * 90, "é.png", "a//b", "a/./b", "caf\udce9"]),
        ),
        st.binary(max_size=1200),
    ),
    max_size=12,
)


@pytest.mark.slow
@given(MEMBERS, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.booleans())
@settings(derandomize=True, max_examples=80, deadline=None)
def test_a_tar_archive_is_read_as_tarfile_reads_it(tmp_path_factory, members, form, twice):
    buffer = io.BytesIO()
    kinds = {
        "file": tarfile.REGTYPE,
        "folder": tarfile.DIRTYPE,
        "hard": tarfile.LNKTYPE,
        "soft": tarfile.SYMTYPE,
        "fifo": tarfile.FIFOTYPE,
    }
    for _ in range(1 + twice):
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            for number, (kind, name, content) in enumerate(members):
                member = tarfile.TarInfo(name)
                member.type, member.linkname, member.mtime = kinds[kind], members[0][1], number + 0.5
                member.size = len(content) if kind == "file" else 0
                with contextlib.suppress(ValueError):  # the name is too long for the format
                    tar.addfile(member, io.BytesIO(content))
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    path.write_bytes(buffer.getvalue())
    with path.open("rb") as file:
        plain, complete = tars._Members(str(path)), tars._Members(str(path))
        understood = tars._read_plainly(file, 0, len(buffer.getvalue()), plain)
        tars._read_members(file, str(path), 0, len(buffer.getvalue()), complete)
    assert understood or any(kind == "fifo" for kind, *_ in members) or form == tarfile.GNU_FORMAT
    if understood:
        assert (plain.links, plain.folders) == (complete.links, complete.folders)
        one, other = plain.build(), complete.build()
        assert list(one.files.items()) == list(other.files.items()) and one.folders == other.folders
        assert one.tree.files.names == other.tree.files.names


def test_an_index_is_kept_until_the_folder_changes(tmp_path, kept, monkeypatch):
    root = make(tmp_path / "f")
    first = contents(open_source(root))
    forget()
    assert contents(open_source(root)) == first and kept == ["_read_folder"]
    monkeypatch.chdir(tmp_path)
    assert open_source(Path("f")).tree().files["a/1.png"].path == "f/a/1.png" and kept == ["_read_folder"]
    (root / "a" / "3.png").write_bytes(b"new")
    assert "a/3.png" in contents(open_source(root))[1] and len(kept) == 2
    settle(root)
    (root / "c").mkdir()
    assert "c" in contents(open_source(root))[0]
    entry = cache().entries
    assert len(entry) == 1 and entry[0][0].startswith("index/") and cache(clear=True).removed


def test_the_index_of_a_folder_that_was_just_changed_is_not_kept(tmp_path, kept):
    root = make(tmp_path / "f")
    (root / "a" / "3.png").touch()
    for _ in range(2):
        assert "a/3.png" in open_source(root).tree().files
    assert kept == ["_read_folder"] * 2 and not cache().entries


def test_an_index_is_kept_until_a_file_changes(tmp_path, kept):
    path = make_tar(tmp_path / "x.tar")
    first = contents(open_source(path))
    forget()
    assert contents(open_source(path)) == first and kept == ["read_tar"]
    shutil.copy(path, tmp_path / "y.tar")
    (tmp_path / "y.tar").replace(path)  # the same content at another time
    assert contents(open_source(path)) == first and kept == ["read_tar"] * 2
    status = path.stat()
    content = path.read_bytes().replace(b"a-b/1.png", b"a-b/7.png")
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the same size and time
    with pytest.raises(UnreadableFile, match=r"damaged|not a readable"):
        open_source(path)  # the checksum in the header does not match


def test_a_small_data_set_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    contents(open_source(make_tar(tmp_path / "x.tar")))
    contents(open_source(make(tmp_path / "f")))
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_not_used(tmp_path, kept, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = make_tar(tmp_path / "x.tar")
    for _ in range(2):
        forget()
        assert len(contents(open_source(path))[1]) == len(NAMES)
    assert kept == ["read_tar"] * 2


@given(st.data())
@settings(derandomize=True, max_examples=60, deadline=None)
def test_a_damaged_index_is_read_again(indexed_tar, data):
    path, entry, original, expected = indexed_tar
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    entry.write_bytes(content)
    forget()
    assert contents(open_source(path)) == expected


@pytest.fixture(scope="module")
def indexed_tar(tmp_path_factory):
    folder = tmp_path_factory.mktemp("indexed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setattr(index_cache, "_MIN_FILES", 1)
        path = make_tar(folder / "x.tar")
        expected = contents(open_source(path))
        (entry,) = (folder / "cache").glob("fcvit/index/*/*")
        yield path, entry, entry.read_bytes(), expected


def read_often(path, cache_home, barrier, results):
    os.environ["XDG_CACHE_HOME"] = cache_home
    index_cache._MIN_FILES = 1
    barrier.wait()
    end = time.monotonic() + 0.5
    lengths = set()
    while time.monotonic() < end:
        index_cache._memory.clear()
        lengths.add(len(open_source(path).tree().files))
        for entry in Path(cache_home).glob("fcvit/index/*/*.safetensors"):
            entry.unlink(missing_ok=True)
    results.put(lengths)


@pytest.mark.slow
def test_processes_can_read_and_write_an_index_at_once(tmp_path):
    path = make_tar(tmp_path / "x.tar")
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=read_often, args=(path, str(tmp_path / "cache"), barrier, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [{len(NAMES)}] * 2
    for process in processes:
        process.join(60)
    assert not list((tmp_path / "cache").glob("fcvit/index/*/.*")), "a temporary file is left"


def test_labels_are_counted_once_per_folder(tmp_path):
    """The names of folders that begin with each other do not mix."""
    root = make(tmp_path, ("a/1.png", "a/b/2.png", "a-b/3.png", "a.b/4.png", "ab/5.png", "top.png"))
    dataset = read_dataset(root, None, None, 4)
    assert dict(zip(dataset.names, dataset.labels, strict=True)) == {
        "a/1.png": 0,
        "a/b/2.png": 0,
        "a-b/3.png": 1,
        "a.b/4.png": 2,
        "ab/5.png": 3,
    }
