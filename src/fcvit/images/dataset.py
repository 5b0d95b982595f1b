"""Labelled images as people have them: class folders, a list file, a tar that is read in place.

Wherever the images are, each has a name relative to the folder or tar, and names are sorted: the same
images under the same names are the same data set.
"""

import dataclasses
import errno
import hashlib
import json
import os
import posixpath
import re
import stat
import tarfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fcvit.class_indices import Assignment, assign_classes, assign_labels
from fcvit.classes import Classes
from fcvit.errors import DoesNotFit, UnreadableFile, UsageError
from fcvit.images.folder import ENDINGS, contents, images_below
from fcvit.variants import IMAGENET_CLASSES, VALIDATION_IMAGES

_SHOWN = 5
_LARGEST = 1 << 29  # bytes of an image file
_BLOCK = 512  # of a tar
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_VALIDATION_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})(?!\d)")


class Location(NamedTuple):
    """Where the bytes of an image are: a file, or a part of one."""

    path: str
    offset: int = 0
    size: int = -1  # -1: to the end

    def read(self) -> bytes:
        """The bytes.

        Raises:
            OSError: it cannot be read.
        """
        # A pipe would keep us waiting for ever.
        with open(os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb", buffering=0) as file:  # noqa: PTH123
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a plain file")
            if max(self.size, status.st_size if self.size < 0 else 0) > _LARGEST:
                raise OSError(errno.EFBIG, f"more than {_LARGEST >> 20} MiB")
            if self.offset:
                file.seek(self.offset)
            parts = []
            missing = self.size
            while part := file.read(missing):  # one system call reads at most 2 GiB
                parts.append(part)
                missing = -1 if self.size < 0 else missing - len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Images with their classes, not yet read.

    Attributes:
        root: the folder or tar, for messages.
        names: relative to it, with /, sorted, each once.
        locations: where each is.
        labels: the class index of each.
        mapping: class folder, or label of the list -> class index.
        rule: how the mapping was found, for people.
        counted: whether no classes were known, and the labels are the model's classes in sorted order.
    """

    root: Path
    names: tuple[str, ...]
    locations: tuple[Location, ...]
    labels: tuple[int, ...]
    mapping: Mapping[str, int]
    rule: str
    counted: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def listing(self) -> str:
        """SHA-256 of names and labels: whether a run goes on over the same list of images."""
        content = json.dumps([self.names, self.labels])
        return hashlib.sha256(content.encode()).hexdigest()

    def validation_numbers(self) -> list[int] | None:
        """Of each image its number in ImageNet's validation set, 1 to 50,000; None: not such images."""
        found = [_VALIDATION_NUMBER.search(name) for name in self.names]
        numbers = [int(match[1]) for match in found if match]
        if len(numbers) < len(found) or not all(1 <= number <= VALIDATION_IMAGES for number in numbers):
            return None
        return numbers

    def take(self, order: Sequence[int]) -> "LabelledImages":
        """Those at these positions, in this order."""
        return dataclasses.replace(
            self,
            names=tuple(self.names[i] for i in order),
            locations=tuple(self.locations[i] for i in order),
            labels=tuple(self.labels[i] for i in order),
        )

    def subset(self, count: int, seed: int) -> "LabelledImages":
        """A stratified sample: every class keeps its share, to the nearest whole image.

        Drawn by hashes of seed and name, so that it is the same on every machine and does not depend on
        the order of the images.

        Raises:
            UsageError: no such number of images.
        """
        if not 1 <= count <= len(self):
            raise UsageError(f"--subset {count}: expected 1 to {len(self)}, the images that are there")
        by_class: dict[int, list[int]] = {}
        for index, label in enumerate(self.labels):
            by_class.setdefault(label, []).append(index)
        exact = {label: Fraction(len(members) * count, len(self)) for label, members in by_class.items()}
        quota = {label: int(part) for label, part in exact.items()}
        # What is left goes to the largest remainders, ties by hash: else low classes would always have it.
        by_remainder = sorted(exact, key=lambda label: (quota[label] - exact[label], _draw(seed, str(label))))
        for label in by_remainder[: count - sum(quota.values())]:
            quota[label] += 1
        chosen = []
        for label, members in by_class.items():
            chosen += sorted(members, key=lambda i: _draw(seed, self.names[i]))[: quota[label]]
        return self.take(sorted(chosen))


def _draw(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{name}".encode("utf-8", "surrogateescape")).digest()


def read_dataset(data: Path, list_file: Path | None, classes: Classes | None, num_classes: int) -> LabelledImages:
    """Find the images of a folder or tar, and the class of each, for a model with `num_classes` outputs.

    Args:
        data: a folder, a tar, or a folder inside a tar (`x.tar/val`). Without a list it holds one folder
            a class; hidden folders are none, files beside them are ignored.
        list_file: one image a line: its name, white space, its class index (or class id).
        classes: what is known of the model's classes, or None.

    Raises:
        UnreadableFile: nothing there, no images, a list or tar that is none.
        DoesNotFit: the classes cannot be mapped to the model's, or listed images are not there.
    """
    tar, inner = _find(data)
    members: dict[str, Location] | None = None
    folders: list[str] = []
    if tar is not None:
        members, folders = _read_tar(tar, inner, list_file is not None)
    if list_file is not None:
        labels, assignment = _from_list(list_file, members, data, classes, num_classes)
    elif members is not None:
        labels, assignment = _from_folders(folders, members, data, classes, num_classes)
    else:
        labels, assignment = _from_folders(_folders_below(data), _names_below(data), data, classes, num_classes)
    names = tuple(sorted(labels))
    return LabelledImages(
        data,
        names,
        tuple(members[name] if members is not None else Location(str(data / name)) for name in names),
        tuple(assignment.mapping[labels[name]] for name in names),
        *assignment,
    )


def class_folders(data: Path) -> list[str]:
    """Names of the folders at the top of a folder or tar, sorted; hidden ones left out.

    Raises:
        UnreadableFile: there is no such folder or tar, or no images in it.
    """
    tar, inner = _find(data)
    return sorted(_folders_below(data) if tar is None else _read_tar(tar, inner, False)[1])


class Tree(NamedTuple):
    """What is in a folder or tar; hidden things are left out.

    Attributes:
        folders: at any depth, relative to it, with /, sorted.
        files: likewise, of any kind, and where each is.
    """

    folders: tuple[str, ...]
    files: dict[str, Location]

    def tops(self) -> tuple[str, ...]:
        """The folders at the top: the classes, or the splits."""
        return tuple(name for name in self.folders if "/" not in name)

    def below(self, folder: str) -> "Tree":
        """What is in one of the folders."""
        prefix = f"{folder}/"
        return Tree(
            tuple(name.removeprefix(prefix) for name in self.folders if name.startswith(prefix)),
            {name.removeprefix(prefix): place for name, place in self.files.items() if name.startswith(prefix)},
        )


def read_tree(data: Path) -> Tree:
    """Every folder and file of a folder, a tar, or a folder inside a tar (`x.tar/val`), read once.

    Raises:
        UnreadableFile: nothing there, or a tar that is none.
    """
    tar, inner = _find(data)
    if tar is None:
        folders, files = contents(data)
        names = [path.relative_to(data).as_posix() for path in files]
        places = [Location(str(path)) for path in files]
        return Tree(
            tuple(sorted(path.relative_to(data).as_posix() for path in folders)),
            dict(sorted(zip(names, places, strict=True))),
        )
    members, directories = _index(tar)
    files_in = {name: members[name] for name in sorted(members) if not _hidden(name)}
    # A tar need not have a member for each folder.
    above = {str(parent) for name in files_in for parent in PurePosixPath(name).parents}
    found = Tree(tuple(sorted(name for name in {*directories, *above} if not _hidden(name))), files_in)
    if not inner:
        return found
    if inner not in found.folders:
        raise UnreadableFile(f"{tar}: no folder {inner} in it")
    return found.below(inner)


def _find(data: Path) -> tuple[Path | None, str]:
    """The tar that a path names or passes through, and the folder in it; None: a folder."""
    if data.is_dir():
        return None, ""
    for tar in (data, *data.parents):
        if tar.is_file():
            return tar, "" if tar == data else data.relative_to(tar).as_posix()
    raise UnreadableFile(f"{data}: no such folder or tar; --data expects class folders, or --list beside it")


def _folders_below(root: Path) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise UnreadableFile(f"{root}: {error.strerror}") from error


def _names_below(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in images_below(root)]


def _index(path: Path) -> tuple[dict[str, Location], list[str]]:
    """Name -> place of every file in a tar, and the folders that are members of it."""
    files: dict[str, Location] = {}
    links: dict[str, str] = {}
    directories: list[str] = []
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(6)
        if kind := next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None):
            raise tarfile.ReadError(f"compressed with {kind}; it is read in place, decompress it first")
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = posixpath.normpath(member.name)
                if member.isdir():
                    directories.append(name)
                elif member.issparse():  # its bytes do not stand in the tar as they are: listed as unreadable
                    files[name] = Location(str(path / name))
                elif member.isreg():
                    # The last member of a name counts, as it does when the tar is unpacked.
                    files[name] = Location(str(path), member.offset_data, member.size)
                elif member.islnk():
                    links[name] = posixpath.normpath(member.linkname)
                elif member.issym():
                    links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            # tarfile takes a damaged header, and the end of the file, for the end of the tar.
            stopped = tar.offset
            file.seek(stopped)
            ended = file.read(_BLOCK) == bytes(_BLOCK)
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror or error}") from error
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise UnreadableFile(f"{path}: not a tar that can be read: {error}") from error
    if not ended:
        raise UnreadableFile(f"{path}: damaged or cut off at byte {stopped} of {size}; fetch it again")
    for name in links:
        target, steps = links[name], 0
        while target in links and steps < len(links):
            target, steps = links[target], steps + 1
        # One that leads out of the tar is an image that cannot be read, as it would be in a folder.
        files.setdefault(name, files.get(target, Location(str(path / name))))
    return files, directories


def _read_tar(path: Path, inner: str, all_files: bool) -> tuple[dict[str, Location], list[str]]:
    """Name -> place of every image (or file) in a tar below `inner`, and the folders at the top."""
    files, directories = _index(path)
    prefix = f"{inner}/" if inner else ""
    found = {name.removeprefix(prefix): place for name, place in files.items() if name.startswith(prefix)}
    tops = {name.removeprefix(prefix).split("/")[0]: None for name in directories if name.startswith(prefix)}
    if not all_files:
        found = {name: place for name, place in found.items() if is_image(name) and not _hidden(name)}
    tops |= {name.split("/")[0]: None for name in found if "/" in name}
    if not found:
        where = f" below {inner}" if inner else ""
        raise UnreadableFile(f"{path}: no images in it{where} ({', '.join(sorted(ENDINGS))})")
    return found, [name for name in tops if not name.startswith(".")]


def is_image(name: str) -> bool:
    """By its ending."""
    return posixpath.splitext(name)[1].lower() in ENDINGS


def _hidden(name: str) -> bool:
    """In anything hidden, or outside of the tar."""
    return any(not part or part[0] == "." for part in name.split("/"))


def _from_folders(
    folders: Sequence[str],
    names: Sequence[str] | Mapping[str, Location],
    data: Path,
    classes: Classes | None,
    num_classes: int,
) -> tuple[dict[str, str], Assignment]:
    """Name -> class folder for every image in one."""
    if not folders:
        raise UnreadableFile(
            f"{data}: no class folders in it; --data expects one folder of images a class, or --list FILE that "
            "says the class of each image"
        )
    assignment = assign_classes(sorted(folders), classes, num_classes, "class folders")
    labels = {name: name.split("/")[0] for name in names if "/" in name}
    if not labels:
        raise UnreadableFile(f"{data}: its class folders hold no images ({', '.join(sorted(ENDINGS))})")
    return labels, assignment


def _from_list(
    list_file: Path,
    members: Mapping[str, Location] | None,
    data: Path,
    classes: Classes | None,
    num_classes: int,
) -> tuple[dict[str, str], Assignment]:
    """Name -> label for every line of a list; `members`: of a tar."""
    listed = _read_list(list_file)

    def missing(names: Sequence[str]) -> list[str]:
        if members is not None:
            return [name for name in names if name not in members]
        return [name for name in names if not (data / name).is_file()]

    gone = missing(list(listed))
    remark = ""
    common = posixpath.commonpath([posixpath.dirname(name) for name in listed])
    if len(gone) == len(listed) and common:
        # Lists often name the images from one folder further up (val/ILSVRC2012_val_...).
        shorter = {name.removeprefix(f"{common}/"): label for name, label in listed.items()}
        still = missing(list(shorter))
        if len(still) < len(shorter):
            listed, gone, remark = shorter, still, f"; the list's folder {common}/ is not in {data.name}, left out"
    if gone:
        raise DoesNotFit(f"{len(gone)} of {len(listed)} images of {list_file} are not in {data}: {_some(gone)}")
    assignment = assign_labels(sorted(set(listed.values())), classes, num_classes, list_file)
    return listed, assignment._replace(rule=assignment.rule + remark)


def _read_list(path: Path) -> dict[str, str]:
    """Name -> label, as written."""
    try:
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UnreadableFile(f"{path}: cannot read the list: {error.strerror}") from error
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        parts = line.strip().rsplit(None, 1)
        if not parts:
            continue
        if len(parts) == 1 or "\0" in line:
            raise UnreadableFile(
                f"{path}: line {number} is {line.strip()[:60]!r}: expected the path of an image and its class index"
            )
        name, label = posixpath.normpath(parts[0].strip()), parts[1]
        if name.startswith(("/", "..")):
            raise UnreadableFile(f"{path}: line {number} names {name[:60]!r}: expected a path below --data")
        if name in found:
            raise UnreadableFile(f"{path}: line {number}: {name} stands there twice")
        found[name] = label
    if not found:
        raise UnreadableFile(f"{path}: no images in the list; expected a path and a class index a line")
    return found


def read_real(path: Path, images: LabelledImages) -> list[frozenset[int]]:
    """ImageNet-ReaL's labels (Beyer et al. 2020, `real.json`): the right classes of each image, perhaps none.

    Raises:
        UnreadableFile: the file is not such a list.
        DoesNotFit: the images are not ImageNet's validation images, by their names.
    """
    numbers = images.validation_numbers()
    if numbers is None:
        raise DoesNotFit(f"--real: {images.names[0]}: expected images named ILSVRC2012_val_ and eight digits")
    try:
        labels = json.loads(path.read_bytes())
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(f"{path}: not JSON ({str(error)[:80]})") from error
    if not isinstance(labels, list) or len(labels) != VALIDATION_IMAGES or not all(map(_is_class_list, labels)):
        raise UnreadableFile(f"{path}: expected a list of {VALIDATION_IMAGES:,} lists of classes from 0 to 999")
    return [frozenset(labels[number - 1]) for number in numbers]


def _is_class_list(value: object) -> bool:
    return isinstance(value, list) and all(type(c) is int and 0 <= c < IMAGENET_CLASSES for c in value)


def _some(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:_SHOWN])) + (", ..." if len(values) > _SHOWN else "")
