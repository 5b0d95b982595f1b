"""Class folders, lists and tars: the same images are the same data set, and what does not fit is refused by name."""

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
    """Files whose content is their name."""
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


def content(images):
    return images.names, images.labels, contents(images)


# Folders


def test_class_folders(tmp_path):
    root = make(tmp_path, *FILES, "a/notes.txt", "a/.hidden.png", "README.md", "top.png", ".git/x.png")
    dataset = read_dataset(root, None, None, 2)
    assert dataset.names == ("a/1 with space.png", "a/z.jpg", "b/2.JPEG", "b/deep/3.webp")
    assert dataset.labels == (0, 0, 1, 1) and contents(dataset) == list(dataset.names)


@pytest.mark.parametrize(
    ("names", "message"),
    [((), "no class folders"), (("x.png",), "no class folders"), (("a/x.txt", "b/y.txt"), "hold no images")],
)
def test_folders_that_are_none(tmp_path, names, message):
    with pytest.raises(UnreadableFile, match=message):
        read_dataset(make(tmp_path, *names), None, None, 2)


def test_nothing_there(tmp_path):
    with pytest.raises(UnreadableFile, match="no such folder or tar"):
        read_dataset(tmp_path / "none", None, None, 2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_class_folder_that_cannot_be_read_is_an_error(tmp_path):
    make(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "b").chmod(0)
    with pytest.raises(UnreadableFile, match="Permission denied"):
        read_dataset(tmp_path, None, None, 2)


def test_what_is_left_out_of_class_folders_is_counted(tmp_path):
    root = make(tmp_path, "a/1.png", "a/2.HEIC", "b/3.heic", "b/README", "b/Thumbs.db", "b/.x", "top.png", "top.txt")
    assert read_dataset(root, None, None, 2).notes == (
        f"{root}: left out 3 files without an image's ending: 2 .heic, 1 no ending",
        f"{root}: left out 1 image outside of class folders",
    )


def test_splits_are_never_classes(tmp_path):
    root = make(tmp_path, "up/train/a/1.png", "up/train/b/1.png", "up/val/a/2.png", "up/val/b/2.png")
    tar = make_tar(tmp_path / "x.tar", "train/a/1.png", "val/a/2.png", prefix="up/")
    for data in (root / "up", root, tar):
        with pytest.raises(DoesNotFit, match=f"holds the splits train, val; name the folder of one, such as {data}"):
            read_dataset(data, None, None, 2)
    alone = read_dataset(make(tmp_path / "alone", "val/a/1.png", "val/b/2.png"), None, None, 2)
    assert alone.names == ("a/1.png", "b/2.png") and "holds the split val alone" in alone.notes[0]


def test_class_folders_that_are_not_utf8_get_names_that_are(tmp_path):
    """The same names in a list; the files keep theirs."""
    root = make(tmp_path / "d", "caf\udce9/\udcfc.png", "zwei/2.png")
    dataset = read_dataset(root, None, None, 2)
    assert dataset.mapping == {"caf\\xe9": 0, "zwei": 1} and dataset.names[0] == "caf\udce9/\udcfc.png"
    assert dataset.listing() and contents(dataset)[1] == "zwei/2.png"
    (tmp_path / "l").write_bytes(b"caf\xe9/\xfc.png caf\xe9\nzwei/2.png zwei\n")
    listed = read_dataset(root, tmp_path / "l", None, 2)
    assert listed.mapping == dataset.mapping and listed.names == dataset.names


# Tar


@pytest.mark.parametrize(("prefix", "inner"), [("", ""), ("./", ""), ("val/", "val"), ("./up/val/", "up/val")])
def test_a_tar_is_the_folder_it_was_made_of(tmp_path, prefix, inner):
    folder = read_dataset(make(tmp_path / "f", *FILES, "a/n.txt", "a/._z.jpg"), None, None, 2)
    tar = make_tar(tmp_path / "x.tar", *FILES, "a/n.txt", "a/._z.jpg", "top.png", prefix=prefix)
    assert content(read_dataset(tar / inner, None, None, 2)) == content(folder)


def add(path, name, kind, linkname=""):
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, linkname
        tar.addfile(member)


def test_links_in_a_tar_are_what_they_name(tmp_path):
    """As in a folder; one that leads out of the tar is an image that cannot be read."""
    path = make_tar(tmp_path / "x.tar", "a/1.png", "b/2.png")
    add(path, "a/hard.png", tarfile.LNKTYPE, "b/2.png")
    add(path, "b/soft.png", tarfile.SYMTYPE, "../a/hard.png")
    add(path, "b/out.png", tarfile.SYMTYPE, "/etc/passwd")
    add(path, "b/circle.png", tarfile.SYMTYPE, "circle.png")
    dataset = read_dataset(path, None, None, 2)
    assert dataset.names == ("a/1.png", "a/hard.png", "b/2.png", "b/circle.png", "b/out.png", "b/soft.png")
    for name, place in zip(dataset.names, dataset.locations, strict=True):
        if name in ("b/out.png", "b/circle.png"):
            with pytest.raises(OSError, match="Not a directory"):
                place.read()
        else:
            assert place.read() == (b"a/1.png" if name == "a/1.png" else b"b/2.png")


def test_only_files_of_a_tar_are_images(tmp_path):
    """The last of two members of one name is the file; a folder without images is a class too."""
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
    assert dataset.notes == (f"{path}: left out 2 images whose names lead out of the tar (/ or ..)",)


def test_archives_beside_class_folders_are_noted(tmp_path):
    for name in ("a/1.png", "b/2.png", "c.tar", "d.ZIP"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    notes = read_dataset(tmp_path, None, None, 2).notes
    assert notes == (f"{tmp_path}: left out 2 archives beside the class folders: c.tar, d.ZIP",)


def test_a_folder_that_may_be_a_split_is_not_taken_for_a_class(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "extra/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    with pytest.raises(DoesNotFit, match=r"is train a split or a class\? if a split, name .*/train; if a class"):
        read_dataset(tmp_path, None, None, 2)
    known = tuple(ClassName(name, name) for name in ("extra", "train"))
    assert len(read_dataset(tmp_path, None, known, 2)) == 3


def test_a_sparse_file_of_a_tar_is_listed_as_unreadable(tmp_path):
    """Not dropped without a word: the data set would be smaller."""
    path = make_tar(tmp_path / "x.tar", "a/1.png", "b/2.png")
    add(path, "b/holes.png", tarfile.GNUTYPE_SPARSE)
    dataset = read_dataset(path, None, None, 2)
    assert dataset.names == ("a/1.png", "b/2.png", "b/holes.png")
    with pytest.raises(OSError, match="Not a directory"):
        dataset.locations[2].read()


def test_a_tar_that_is_cut_or_damaged_is_never_taken_for_a_smaller_one(tmp_path):
    """tarfile itself stops without a word at a cut between members, and at a damaged header."""
    whole = make_tar(tmp_path / "x.tar", *FILES).read_bytes()
    path = tmp_path / "cut.tar"
    end = len(FILES) * 1024
    for length in range(0, end + 1, 256):
        path.write_bytes(whole[:length])
        with pytest.raises(UnreadableFile):
            read_dataset(path, None, None, 2)
    for header in range(0, end, 1024):
        path.write_bytes(whole[:header] + b"\xff" * 30 + whole[header + 30 :])
        with pytest.raises(UnreadableFile, match=r"damaged or cut off|not a tar"):
            read_dataset(path, None, None, 2)


def test_tars_that_are_none(tmp_path):
    plain = make_tar(tmp_path / "x.tar", *FILES)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(UnreadableFile, match=r"compressed with gzip; .* decompress it first"):
        read_dataset(tmp_path / "x.tar.gz", None, None, 2)
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff" + bytes(2000))
    with pytest.raises(UnreadableFile, match="not a tar that can be read"):
        read_dataset(tmp_path / "photo.jpg", None, None, 2)
    with pytest.raises(UnreadableFile, match="no images in it below nowhere"):
        read_dataset(plain / "nowhere", None, None, 2)


@pytest.fixture(scope="module")
def sound_tar(tmp_path_factory):
    return make_tar(tmp_path_factory.mktemp("tar") / "x.tar", *FILES)


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 10240))
@settings(
    derandomize=True, max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_tar_is_read_or_refused(sound_tar, changes, length):
    """And never gives bytes that are not in it."""
    broken = bytearray(sound_tar.read_bytes())
    for place, value in changes:
        broken[place % len(broken)] = value
    path = sound_tar.with_name("broken.tar")
    path.write_bytes(broken[: max(length, 600)])
    try:
        dataset = read_dataset(path, None, None, 2)
    except FcvitError as error:
        assert str(path) in str(error) or "class folders" in str(error)
        return
    for location in dataset.locations:
        assert location.offset + location.size <= path.stat().st_size and len(location.read()) == location.size


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_no_image_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(OSError, match="not a plain file"):
        Location(str(tmp_path / "x.png")).read()


def test_an_enormous_file_is_not_read(tmp_path):
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate((1 << 29) + 1)  # takes no place on the disk
    with pytest.raises(OSError, match="more than 512 MiB"):
        Location(str(tmp_path / "x.png")).read()


def test_a_part_of_a_file(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(100)))
    assert Location(str(tmp_path / "x"), 10, 5).read() == bytes(range(10, 15))
    assert Location(str(tmp_path / "x")).read() == bytes(range(100))
    assert Location(str(tmp_path / "x"), 95, 50).read() == bytes(range(95, 100))


# Lists


@pytest.mark.parametrize("ending", ["\n", ""])
def test_a_list_gives_what_the_folders_give(tmp_path, ending):
    """Names with spaces, tabs, Windows line ends, a byte order mark, with and without a final newline."""
    root = make(tmp_path / "data", *FILES)
    folder = read_dataset(root, None, None, 2)
    list_file = tmp_path / "val_list.txt"
    lines = ["b/2.JPEG 1", "a/1 with space.png\t0", "", "./b/deep/3.webp  1\r", "a/z.jpg 0"]
    list_file.write_bytes(b"\xef\xbb\xbf" + ("\n".join(lines) + ending).encode())
    assert content(read_dataset(root, list_file, None, 2)) == content(folder)
    tar = make_tar(tmp_path / "x.tar", *FILES, "unlisted.png")
    dataset = read_dataset(tar, list_file, None, 2)
    assert content(dataset) == content(folder)
    assert dataset.rule == "the numbers in val_list.txt are class indices"


def test_a_list_may_name_classes(tmp_path):
    root = make(tmp_path / "data", "1.png", "2.png")
    (tmp_path / "l.txt").write_text("1.png d1\n2.png m2\n")
    dataset = read_dataset(root, tmp_path / "l.txt", PETS, 4)
    assert dataset.labels == (1, 3) and dataset.rule == "labels of the list are the model's class ids"


def test_a_list_may_name_any_file(tmp_path):
    """Also one without an ending, or hidden; in a tar as in a folder."""
    names = ("x.gif", "noending", ".h/y.png")
    (tmp_path / "l.txt").write_text("\n".join(f"{name} 0" for name in names))
    folder = read_dataset(make(tmp_path / "data", *names), tmp_path / "l.txt", None, 2)
    tar = read_dataset(make_tar(tmp_path / "x.tar", *names), tmp_path / "l.txt", None, 2)
    assert content(tar) == content(folder) and len(tar) == 3


def test_a_number_that_is_an_index_and_an_id_is_not_guessed(tmp_path):
    root = make(tmp_path / "data", "1.png")
    (tmp_path / "l.txt").write_text("1.png 1\n")
    reversed_ids = tuple(ClassName(str(3 - i), f"class {i}") for i in range(4))
    with pytest.raises(DoesNotFit, match="is 1 the index of a class, or the id of class 2"):
        read_dataset(root, tmp_path / "l.txt", reversed_ids, 4)
    same_ids = tuple(ClassName(str(i), f"class {i}") for i in range(4))
    assert read_dataset(root, tmp_path / "l.txt", same_ids, 4).labels == (1,)


def test_the_folder_of_a_list_that_the_data_do_not_have(tmp_path):
    """As lists for ILSVRC2012 have it; said aloud."""
    tar = make_tar(tmp_path / "x.tar", "1.png", "2.png")
    (tmp_path / "l.txt").write_text("val/1.png 0\nval/2.png 1\n")
    dataset = read_dataset(tar, tmp_path / "l.txt", None, 2)
    assert dataset.names == ("1.png", "2.png") and "the list's folder val/ is not in x.tar, left out" in dataset.rule


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("1.png 0\n490\n", UnreadableFile, "line 2 is '490': expected the path of an image and its class index"),
        ("1.png 0\n1.png 1\n", UnreadableFile, "line 2: 1.png stands there twice"),
        ("\n \n", UnreadableFile, "no images in the list"),
        ("/etc/passwd 0\n", UnreadableFile, "expected a path below --data"),
        ("a/../../x.png 0\n", UnreadableFile, "expected a path below --data"),
        ("1.png 0\n2.png 10\n", DoesNotFit, "class 10 for a model with 10 outputs; expected 0 to 9"),
        ("1.png 0\nmissing.png 1\n", DoesNotFit, r"1 of 2 images of .*l.txt are not in .*: missing.png"),
        ("1.png wolf\n2.png lion\n", DoesNotFit, r"2 labels of the list \(lion, wolf\) for a model with 10 outputs"),
    ],
)
def test_lists_that_do_not_fit(tmp_path, text, kind, message):
    root = make(tmp_path / "data", "1.png", "2.png")
    (tmp_path / "l.txt").write_text(text)
    with pytest.raises(kind, match=message):
        read_dataset(root, tmp_path / "l.txt", None, 10)


@given(st.binary(max_size=60))
@settings(
    derandomize=True, max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_bytes_as_a_list(tmp_path, text):
    (tmp_path / "d").mkdir(exist_ok=True)
    (tmp_path / "l.txt").write_bytes(text)
    with pytest.raises(FcvitError):
        read_dataset(tmp_path / "d", tmp_path / "l.txt", None, 10)


# Classes


def assign(labels, classes, count):
    dataset = assign_classes(labels, classes, count, "class folders")
    return dataset.mapping, dataset.rule


def test_known_ids_or_names_come_first():
    assert assign(["d1", "m2"], PETS, 4) == ({"d1": 1, "m2": 3}, "class folders are the model's class ids")
    assert assign(["cat", "dog"], PETS, 4) == ({"cat": 0, "dog": 1}, "class folders are the model's class names")


def test_a_name_that_stands_twice_is_no_name():
    with pytest.raises(DoesNotFit, match=r"1 of 2 class folders are not among the model's class names: crane"):
        assign(["cat", "crane"], PETS, 4)


def test_wordnet_ids_for_a_thousand_outputs():
    expected = ({"n01443537": 1, "n15075141": 999}, "class folders are ImageNet's WordNet ids")
    assert assign(["n01443537", "n15075141"], None, 1000) == expected
    numbered = tuple(ClassName(str(i), f"class {i}") for i in range(1000))
    assert assign(["n01443537", "n15075141"], numbered, 1000) == expected


def test_sorted_names_only_where_no_classes_are_known_and_the_count_fits():
    mapping, rule = assign(["Ant", "bee", "zebra"], None, 3)
    assert mapping == {"Ant": 0, "bee": 1, "zebra": 2}  # as Python and torchvision sort: capitals first
    assert "counted in sorted order" in rule
    with pytest.raises(DoesNotFit, match=r"2 class folders \(ant, bee\) for a model with 3 outputs"):
        assign(["ant", "bee"], None, 3)
    with pytest.raises(DoesNotFit, match=r"no class folders \(lion, .*\) are classes of the model \(c1, d1, m1, m2\)"):
        assign(["lion", "ocelot", "puma", "zebra"], PETS, 4)


def test_numbers_that_sort_otherwise_as_text_are_not_guessed():
    numbers = sorted(str(i) for i in range(12))
    with pytest.raises(DoesNotFit, match="sorted as text"):
        assign(numbers, None, 12)
    assert assign(sorted(f"{i:02d}" for i in range(12)), None, 12)[0]["11"] == 11


def test_half_known_folders_are_never_guessed():
    with pytest.raises(DoesNotFit, match="1 of 4 class folders are not among the model's class ids: wolf"):
        assign(["c1", "d1", "m1", "wolf"], PETS, 4)
    with pytest.raises(DoesNotFit, match="ImageNet's WordNet ids: tench"):
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
def test_every_class_keeps_its_share(counts, data):
    whole = images(counts)
    size, seed = data.draw(st.integers(1, sum(counts))), data.draw(st.integers(0, 5))
    part = whole.subset(size, seed)
    assert len(part) == size and list(part.names) == [name for name in whole.names if name in set(part.names)]
    drawn = collections.Counter(part.labels)
    for label, count in enumerate(counts):
        assert abs(drawn[label] - count * size / sum(counts)) < 1
    assert [location.path for location in part.locations] == list(part.names)
    assert part == whole.subset(size, seed)


def test_the_seed_draws():
    whole = images([40, 40])
    assert whole.subset(20, 0).names != whole.subset(20, 1).names
    assert whole.subset(80, 3).names == whole.names
    for size in (0, 81):
        with pytest.raises(UsageError, match="expected 1 to 80"):
            whole.subset(size, 0)


def test_the_listing_tells_lists_apart():
    whole = images([2, 2])
    assert whole.listing() == images([2, 2]).listing() != images([3, 1]).listing()


def validation(numbers):
    names = tuple(f"x/ILSVRC2012_val_{number:08d}.JPEG" for number in numbers)
    return LabeledImages(None, names, tuple(map(Location, names)), (0,) * len(names), {}, "")


def test_reals_labels_are_found_by_the_number_in_the_name(tmp_path):
    labels = [[i % 1000, 7] for i in range(50_000)]
    labels[1] = []
    (tmp_path / "real.json").write_text(json.dumps(labels))
    dataset = read_real(tmp_path / "real.json", validation([50_000, 2, 1]))
    assert dataset == [{999, 7}, set(), {0, 7}]
    with pytest.raises(DoesNotFit, match="expected images named ILSVRC2012_val_"):
        read_real(tmp_path / "real.json", images([1]))
    assert validation([50_001]).validation_numbers() is None


@pytest.mark.parametrize("text", ["", "{}", "[[1]]", "[" * 100_000, json.dumps([[1000]] * 50_000), "[[true]]"])
def test_real_labels_that_are_none(tmp_path, text):
    (tmp_path / "real.json").write_text(text)
    with pytest.raises(UnreadableFile):
        read_real(tmp_path / "real.json", validation([1]))
