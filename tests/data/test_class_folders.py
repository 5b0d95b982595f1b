"""Test labeled images in class folders, lists and tar archives, and the messages for data that does not fit."""

import collections
import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fcvit.data.class_folders import LabeledImages, Location, read_dataset, read_real
from fcvit.data.class_indices import assign_classes
from fcvit.data.classes import ClassName
from fcvit.errors import DoesNotFit, FcvitError, UnreadableFile, UsageError

PETS = (ClassName("c1", "cat"), ClassName("d1", "dog"), ClassName("m1", "crane"), ClassName("m2", "crane"))
FILES = ("a/1 with space.png", "b/2.JPEG", "b/deep/3.webp", "a/z.jpg")


def make(root, *names):
    """Create files that contain their own names."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name))
    return root


def make_tar(path, *names, prefix=""):
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(prefix + name)
            member.size = len(name.encode())
            tar.addfile(member, io.BytesIO(name.encode()))
    return path


def contents(images):
    return [location.read().decode(errors="surrogateescape") for location in images.locations]


def samples(images):
    return images.names, images.labels, contents(images)


# Folders


def test_images_are_read_from_class_folders(tmp_path):
    root = make(tmp_path, *FILES, "a/notes.txt", "a/.hidden.png", "README.md", "top.png", ".git/x.png")
    dataset = read_dataset(root, None, None, 2)
    assert dataset.names == ("a/1 with space.png", "a/z.jpg", "b/2.JPEG", "b/deep/3.webp")
    assert dataset.labels == (0, 0, 1, 1) and contents(dataset) == list(dataset.names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "no class folders and no images"),
        (("x.png",), "images but no class folders.*--list"),
        (("x.zip",), r"archives \(x.zip\) but no class folders.*unpack"),
        (("a/x.txt", "b/y.txt"), "class folders contain no images"),
    ],
)
def test_a_folder_without_labeled_images_is_rejected(tmp_path, names, message):
    with pytest.raises(UnreadableFile, match=message):
        read_dataset(make(tmp_path, *names), None, None, 2)


def test_a_missing_path_is_rejected(tmp_path):
    with pytest.raises(UnreadableFile, match=r"none: no such folder or tar.*--data"):
        read_dataset(tmp_path / "none", None, None, 2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read all files")
def test_an_unreadable_class_folder_is_rejected(tmp_path):
    make(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "b").chmod(0)
    with pytest.raises(UnreadableFile, match="Permission denied"):
        read_dataset(tmp_path, None, None, 2)


def test_skipped_files_are_counted_in_notes(tmp_path):
    root = make(tmp_path, "a/1.png", "a/2.HEIC", "b/3.heic", "b/README", "b/Thumbs.db", "b/.x", "top.png", "top.txt")
    assert read_dataset(root, None, None, 2).notes == (
        f"{root}: skipped 3 files without an image file extension: 2 .heic, 1 no extension",
        f"{root}: skipped 1 image outside the class folders",
    )


def test_splits_are_not_read_as_classes(tmp_path):
    root = make(tmp_path, "up/train/a/1.png", "up/train/b/1.png", "up/val/a/2.png", "up/val/b/2.png")
    tar = make_tar(tmp_path / "x.tar", "train/a/1.png", "val/a/2.png", prefix="up/")
    for data in (root / "up", root, tar):
        with pytest.raises(DoesNotFit, match=f"the splits train, val; .* such as {data}"):
            read_dataset(data, None, None, 2)
    single = read_dataset(make(tmp_path / "single", "val/a/1.png", "val/b/2.png"), None, None, 2)
    assert single.names == ("a/1.png", "b/2.png") and "only the split val" in single.notes[0]


def test_labels_are_utf8_text_if_folder_names_are_not(tmp_path):
    """Class folders and the labels in a list get the same text. File names do not change."""
    root = make(tmp_path / "d", "caf\udce9/\udcfc.png", "zwei/2.png")
    dataset = read_dataset(root, None, None, 2)
    assert dataset.mapping == {"caf\\xe9": 0, "zwei": 1} and dataset.names[0] == "caf\udce9/\udcfc.png"
    assert dataset.listing() and contents(dataset)[1] == "zwei/2.png"
    (tmp_path / "l").write_bytes(b"caf\xe9/\xfc.png caf\xe9\nzwei/2.png zwei\n")
    listed = read_dataset(root, tmp_path / "l", None, 2)
    assert listed.mapping == dataset.mapping and listed.names == dataset.names


# Tar


@pytest.mark.parametrize(("prefix", "inner"), [("", ""), ("./", ""), ("val/", "val"), ("./up/val/", "up/val")])
def test_a_tar_archive_gives_the_same_data_as_its_folder(tmp_path, prefix, inner):
    folder = read_dataset(make(tmp_path / "f", *FILES, "a/n.txt", "a/._z.jpg"), None, None, 2)
    tar = make_tar(tmp_path / "x.tar", *FILES, "a/n.txt", "a/._z.jpg", "top.png", prefix=prefix)
    assert samples(read_dataset(tar / inner, None, None, 2)) == samples(folder)


def add(path, name, kind, linkname=""):
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, linkname
        tar.addfile(member)


def test_links_in_a_tar_archive_are_followed(tmp_path):
    """A link to a file outside the archive is an image that cannot be read."""
    path = make_tar(tmp_path / "x.tar", "a/1.png", "b/2.png")
    add(path, "a/hard.png", tarfile.LNKTYPE, "b/2.png")
    add(path, "b/soft.png", tarfile.SYMTYPE, "../a/hard.png")
    add(path, "b/out.png", tarfile.SYMTYPE, "/etc/passwd")
    add(path, "b/circle.png", tarfile.SYMTYPE, "circle.png")
    dataset = read_dataset(path, None, None, 2)
    assert dataset.names == ("a/1.png", "a/hard.png", "b/2.png", "b/circle.png", "b/out.png", "b/soft.png")
    for name, location in zip(dataset.names, dataset.locations, strict=True):
        if name in ("b/out.png", "b/circle.png"):
            with pytest.raises(OSError, match="Not a directory"):
                location.read()
        else:
            assert location.read() == (b"a/1.png" if name == "a/1.png" else b"b/2.png")


def test_only_regular_files_in_a_tar_archive_are_images(tmp_path):
    """The last of two members with the same name is used, and a folder without images is a class."""
    path = make_tar(tmp_path / "x.tar", "a/1.png", "b/2.png", "../evil.png", "/etc/evil.png")
    for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE):
        add(path, f"a/{ord(kind)}.png", kind)
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("b/2.png")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"new"))
    add(path, "empty", tarfile.DIRTYPE)
    dataset = read_dataset(path, None, None, 3)
    assert dataset.names == ("a/1.png", "b/2.png") and contents(dataset) == ["a/1.png", "new"]
    assert dataset.mapping == {"a": 0, "b": 1, "empty": 2}
    assert dataset.notes == (f"{path}: skipped 2 images with a path outside the archive (starting with / or ..)",)


def test_archives_next_to_class_folders_are_noted(tmp_path):
    for name in ("a/1.png", "b/2.png", "c.tar", "d.ZIP"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    notes = read_dataset(tmp_path, None, None, 2).notes
    assert notes == (f"{tmp_path}: skipped 2 archives next to the class folders: c.tar, d.ZIP",)


def test_a_folder_that_can_be_a_split_or_a_class_is_rejected(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "extra/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    with pytest.raises(DoesNotFit, match=r"train can be a split or a class; .*/train, .*--classes"):
        read_dataset(tmp_path, None, None, 2)
    known = tuple(ClassName(name, name) for name in ("extra", "train"))
    assert len(read_dataset(tmp_path, None, known, 2)) == 3


def test_a_sparse_file_in_a_tar_archive_is_listed_as_unreadable(tmp_path):
    """If it were skipped silently, the data set would be smaller."""
    path = make_tar(tmp_path / "x.tar", "a/1.png", "b/2.png")
    add(path, "b/holes.png", tarfile.GNUTYPE_SPARSE)
    dataset = read_dataset(path, None, None, 2)
    assert dataset.names == ("a/1.png", "b/2.png", "b/holes.png")
    with pytest.raises(OSError, match="Not a directory"):
        dataset.locations[2].read()


def test_a_damaged_or_truncated_tar_archive_is_rejected(tmp_path):
    """tarfile stops silently at a truncation between members and at a damaged header."""
    content = make_tar(tmp_path / "x.tar", *FILES).read_bytes()
    path = tmp_path / "cut.tar"
    end = len(FILES) * 1024
    for length in range(0, end + 1, 256):
        path.write_bytes(content[:length])
        with pytest.raises(UnreadableFile):
            read_dataset(path, None, None, 2)
    for header in range(0, end, 1024):
        path.write_bytes(content[:header] + b"\xff" * 30 + content[header + 30 :])
        with pytest.raises(UnreadableFile, match=r"damaged or truncated|not a readable tar"):
            read_dataset(path, None, None, 2)


def test_files_that_are_not_tar_archives_are_rejected(tmp_path):
    plain = make_tar(tmp_path / "x.tar", *FILES)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(UnreadableFile, match=r"gzip; decompress it first .*gunzip -k x.tar.gz"):
        read_dataset(tmp_path / "x.tar.gz", None, None, 2)
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff" + bytes(2000))
    with pytest.raises(UnreadableFile, match=r"photo.jpg: not a readable tar"):
        read_dataset(tmp_path / "photo.jpg", None, None, 2)
    with pytest.raises(UnreadableFile, match="no folder nowhere and no images"):
        read_dataset(plain / "nowhere", None, None, 2)


@pytest.fixture(scope="module")
def valid_tar(tmp_path_factory):
    return make_tar(tmp_path_factory.mktemp("tar") / "x.tar", *FILES)


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 10240))
@settings(
    derandomize=True, max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_modified_tar_archive_is_read_or_rejected(valid_tar, changes, length):
    """No image has bytes outside the archive."""
    broken = bytearray(valid_tar.read_bytes())
    for position, value in changes:
        broken[position % len(broken)] = value
    path = valid_tar.with_name("broken.tar")
    path.write_bytes(broken[: max(length, 600)])
    try:
        dataset = read_dataset(path, None, None, 2)
    except FcvitError as error:
        assert str(path) in str(error) or "class folders" in str(error)
        return
    for location in dataset.locations:
        assert location.offset + location.size <= path.stat().st_size and len(location.read()) == location.size


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the platform has no named pipes")
def test_a_named_pipe_is_rejected_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(OSError, match="not a regular file"):
        Location(str(tmp_path / "x.png")).read()


def test_a_file_over_the_size_limit_is_rejected(tmp_path):
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate((1 << 29) + 1)  # a sparse file, which needs no disk space
    with pytest.raises(OSError, match="512 MiB"):
        Location(str(tmp_path / "x.png")).read()


def test_a_location_reads_a_part_of_a_file(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(100)))
    assert Location(str(tmp_path / "x"), 10, 5).read() == bytes(range(10, 15))
    assert Location(str(tmp_path / "x")).read() == bytes(range(100))
    assert Location(str(tmp_path / "x"), 95, 50).read() == bytes(range(95, 100))


# Lists


@pytest.mark.parametrize("ending", ["\n", ""])
def test_a_list_gives_the_same_data_as_class_folders(tmp_path, ending):
    """The list has spaces in names, tabs, Windows line ends and a byte order mark, with and without a final newline."""
    root = make(tmp_path / "data", *FILES)
    folder = read_dataset(root, None, None, 2)
    list_file = tmp_path / "val_list.txt"
    lines = ["b/2.JPEG 1", "a/1 with space.png\t0", "", "./b/deep/3.webp  1\r", "a/z.jpg 0"]
    list_file.write_bytes(b"\xef\xbb\xbf" + ("\n".join(lines) + ending).encode())
    assert samples(read_dataset(root, list_file, None, 2)) == samples(folder)
    tar = make_tar(tmp_path / "x.tar", *FILES, "unlisted.png")
    dataset = read_dataset(tar, list_file, None, 2)
    assert samples(dataset) == samples(folder)
    assert dataset.rule == "the numbers in val_list.txt are class indices"


def test_labels_in_a_list_can_be_class_ids(tmp_path):
    root = make(tmp_path / "data", "1.png", "2.png")
    (tmp_path / "l.txt").write_text("1.png d1\n2.png m2\n")
    dataset = read_dataset(root, tmp_path / "l.txt", PETS, 4)
    assert dataset.labels == (1, 3) and dataset.rule == "labels of the list are the model's class ids"


def test_a_list_can_contain_files_without_an_ending_and_hidden_files(tmp_path):
    names = ("x.gif", "noending", ".h/y.png")
    (tmp_path / "l.txt").write_text("\n".join(f"{name} 0" for name in names))
    folder = read_dataset(make(tmp_path / "data", *names), tmp_path / "l.txt", None, 2)
    tar = read_dataset(make_tar(tmp_path / "x.tar", *names), tmp_path / "l.txt", None, 2)
    assert samples(tar) == samples(folder) and len(tar) == 3


def test_a_number_that_is_both_an_index_and_an_id_is_rejected(tmp_path):
    root = make(tmp_path / "data", "1.png")
    (tmp_path / "l.txt").write_text("1.png 1\n")
    reversed_ids = tuple(ClassName(str(3 - i), f"class {i}") for i in range(4))
    with pytest.raises(DoesNotFit, match=r"1 can be a class index or the id of class 2.*--classes"):
        read_dataset(root, tmp_path / "l.txt", reversed_ids, 4)
    same_ids = tuple(ClassName(str(i), f"class {i}") for i in range(4))
    assert read_dataset(root, tmp_path / "l.txt", same_ids, 4).labels == (1,)


def test_a_folder_in_the_list_that_the_data_lacks_is_ignored_and_noted(tmp_path):
    """Lists for ILSVRC2012 contain such a folder."""
    tar = make_tar(tmp_path / "x.tar", "1.png", "2.png")
    (tmp_path / "l.txt").write_text("val/1.png 0\nval/2.png 1\n")
    dataset = read_dataset(tar, tmp_path / "l.txt", None, 2)
    assert dataset.names == ("1.png", "2.png") and "val/ in the list is ignored because x.tar" in dataset.rule


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("1.png 0\n490\n", UnreadableFile, "line 2 is '490'; expected the path"),
        ("1.png 0\n1.png 1\n", UnreadableFile, "line 2: 1.png occurs twice"),
        ("\n \n", UnreadableFile, "no images in the list"),
        ("/etc/passwd 0\n", UnreadableFile, "expected a path below --data"),
        ("a/../../x.png 0\n", UnreadableFile, "expected a path below --data"),
        ("1.png 0\n2.png 10\n", DoesNotFit, "class 10 for a model with 10 outputs.* 0 to 9"),
        ("1.png 0\nmissing.png 1\n", DoesNotFit, r"l.txt: 1 of 2 images .*missing.png.*--data"),
        ("1.png wolf\n2.png lion\n", DoesNotFit, r"2 labels of the list \(lion, wolf\) .* 10 outputs"),
    ],
)
def test_a_list_that_does_not_fit_is_rejected(tmp_path, text, kind, message):
    root = make(tmp_path / "data", "1.png", "2.png")
    (tmp_path / "l.txt").write_text(text)
    with pytest.raises(kind, match=message):
        read_dataset(root, tmp_path / "l.txt", None, 10)


@given(st.binary(max_size=60))
@settings(
    derandomize=True, max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_bytes_as_a_list_are_rejected(tmp_path, text):
    (tmp_path / "d").mkdir(exist_ok=True)
    (tmp_path / "l.txt").write_bytes(text)
    with pytest.raises(FcvitError):
        read_dataset(tmp_path / "d", tmp_path / "l.txt", None, 10)


# Classes


def assign(labels, classes, count):
    dataset = assign_classes(labels, classes, count, "class folders")
    return dataset.mapping, dataset.rule


def test_known_ids_or_names_are_tried_first():
    assert assign(["d1", "m2"], PETS, 4) == ({"d1": 1, "m2": 3}, "class folders are the model's class ids")
    assert assign(["cat", "dog"], PETS, 4) == ({"cat": 0, "dog": 1}, "class folders are the model's class names")


def test_a_repeated_class_name_is_not_matched():
    with pytest.raises(DoesNotFit, match=r"1 of 2 class folders .*crane.* the model's class names .*--classes"):
        assign(["cat", "crane"], PETS, 4)


def test_wordnet_ids_are_known_for_1000_outputs():
    expected = ({"n01443537": 1, "n15075141": 999}, "class folders are ImageNet's WordNet ids")
    assert assign(["n01443537", "n15075141"], None, 1000) == expected
    numbered = tuple(ClassName(str(i), f"class {i}") for i in range(1000))
    assert assign(["n01443537", "n15075141"], numbered, 1000) == expected


def test_sorted_names_are_used_only_without_known_classes_and_with_an_equal_count():
    mapping, rule = assign(["Ant", "bee", "zebra"], None, 3)
    assert mapping == {"Ant": 0, "bee": 1, "zebra": 2}  # capitals first, as in Python and torchvision
    assert "in sorted order" in rule
    with pytest.raises(DoesNotFit, match=r"2 class folders \(ant, bee\) .* 3 outputs.*--classes"):
        assign(["ant", "bee"], None, 3)
    with pytest.raises(DoesNotFit, match=r"class folders \(lion, .*\) .* the model \(c1, d1, m1, m2\).*--classes"):
        assign(["lion", "ocelot", "puma", "zebra"], PETS, 4)


def test_numbers_whose_order_as_text_differs_are_rejected():
    numbers = sorted(str(i) for i in range(12))
    with pytest.raises(DoesNotFit, match=r"order as text.*--classes"):
        assign(numbers, None, 12)
    assert assign(sorted(f"{i:02d}" for i in range(12)), None, 12)[0]["11"] == 11


def test_partly_known_folders_are_rejected():
    with pytest.raises(DoesNotFit, match=r"1 of 4 class folders .*wolf.* the model's class ids .*--classes"):
        assign(["c1", "d1", "m1", "wolf"], PETS, 4)
    with pytest.raises(DoesNotFit, match=r"tench.* ImageNet's WordNet ids"):
        assign(["n01443537", "tench"], None, 1000)


@given(st.lists(st.text("abcXYZ_", min_size=1, max_size=6), min_size=1, max_size=12, unique=True))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_a_mapping_is_one_to_one(folders):
    mapping, _ = assign(sorted(folders), None, len(folders))
    assert sorted(mapping.values()) == list(range(len(folders))) and set(mapping) == set(folders)


# Samples and labels


def images(counts):
    names = [f"{label}/{i}.png" for label, count in enumerate(counts) for i in range(count)]
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return LabeledImages(Path("x"), tuple(names), tuple(Location(n) for n in names), tuple(labels), {}, "")


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.data())
@settings(derandomize=True, max_examples=80, deadline=None)
def test_every_class_keeps_its_share_in_a_subset(counts, data):
    dataset = images(counts)
    size, seed = data.draw(st.integers(1, sum(counts))), data.draw(st.integers(0, 5))
    subset = dataset.subset(size, seed)
    assert len(subset) == size and list(subset.names) == [name for name in dataset.names if name in set(subset.names)]
    drawn = collections.Counter(subset.labels)
    for label, count in enumerate(counts):
        assert abs(drawn[label] - count * size / sum(counts)) < 1
    assert [location.path for location in subset.locations] == list(subset.names)
    assert subset == dataset.subset(size, seed)


def test_the_subset_depends_on_the_seed():
    dataset = images([40, 40])
    assert dataset.subset(20, 0).names != dataset.subset(20, 1).names
    assert dataset.subset(80, 3).names == dataset.names
    for size in (0, 81):
        with pytest.raises(UsageError, match=f"--subset {size}: expected 1 to 80"):
            dataset.subset(size, 0)


def test_the_listing_hash_differs_for_different_labels():
    dataset = images([2, 2])
    assert dataset.listing() == images([2, 2]).listing() != images([3, 1]).listing()


def validation(numbers):
    names = tuple(f"x/ILSVRC2012_val_{number:08d}.JPEG" for number in numbers)
    return LabeledImages(None, names, tuple(map(Location, names)), (0,) * len(names), {}, "")


def test_real_labels_are_found_by_the_number_in_the_image_name(tmp_path):
    labels = [[i % 1000, 7] for i in range(50_000)]
    labels[1] = []
    (tmp_path / "real.json").write_text(json.dumps(labels))
    dataset = read_real(tmp_path / "real.json", validation([50_000, 2, 1]))
    assert dataset == [{999, 7}, set(), {0, 7}]
    with pytest.raises(DoesNotFit, match=r"--real: 0/0.png: .*ILSVRC2012_val_"):
        read_real(tmp_path / "real.json", images([1]))
    assert validation([50_001]).validation_numbers() is None


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "{}", "[[1]]", "[" * 100_000, json.dumps([[1000]] * 50_000), "[[true]]"])
def test_an_invalid_file_of_real_labels_is_rejected(tmp_path, text):
    (tmp_path / "real.json").write_text(text)
    with pytest.raises(UnreadableFile):
        read_real(tmp_path / "real.json", validation([1]))
