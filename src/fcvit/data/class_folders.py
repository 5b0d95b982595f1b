"""Read labeled images from class folders, from a list file, or from a tar archive without unpacking it.

Image names are relative to the folder or archive and are sorted. The same images under the same names
therefore give the same data set, wherever they are stored.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from fcvit.data.class_indices import Assignment, assign_classes, assign_declared, assign_labels
from fcvit.data.classes import Classes, imagenet
from fcvit.data.columns import Files, Integers, taken
from fcvit.data.folders import ENDINGS, count_non_images, legible
from fcvit.data.lists import find_listed, read_list
from fcvit.data.sources import Location, Source, open_source
from fcvit.data.splits import find_layout
from fcvit.data.tars import PACKED
from fcvit.errors import DoesNotFit, UnreadableFile, UsageError, counted
from fcvit.models.variants import IMAGENET_CLASSES, VALIDATION_IMAGES
from fcvit.text import some

_BLOCK = 4096  # images whose names are encoded at once
_VALIDATION_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})(?!\d)")


@dataclasses.dataclass(frozen=True)
class LabeledImages:
    """The locations and class labels of a data set's images, which are not read yet.

    Attributes:
        root: Folder or tar archive, for messages.
        names: Image names relative to the root, with forward slashes, sorted and unique.
        locations: Location of each image.
        labels: Class index of each image.
        mapping: Class folder, or label in the list -> class index.
        rule: Readable description of how the mapping was found.
        counted: True if no classes were known, so that the sorted labels are the model's classes.
        notes: Readable notes on which folder is the data set and which files were skipped.
    """

    root: Path
    names: Sequence[str]
    locations: Sequence[Location]
    labels: Sequence[int]
    mapping: Mapping[str, int]
    rule: str
    counted: bool = False
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def targets(self) -> Sequence[int]:
        """Return the class index of each image (the `targets` of `fcvit.data.loader.Dataset`)."""
        return self.labels

    def listing(self) -> str:
        """Return the SHA-256 of names and labels, which a resumed run compares."""
        digest = hashlib.sha256(b"[[")
        for column, end in ((self.names, b"], ["), (self.labels, b"]]")):
            for start in range(0, len(column), _BLOCK):
                block = json.dumps(column[start : start + _BLOCK])[1:-1]
                digest.update((", " * (start > 0) + block).encode())
            digest.update(end)
        return digest.hexdigest()

    def validation_numbers(self) -> list[int] | None:
        """Return each image's number in ImageNet's validation set, 1 to 50,000, or None if a name has no number."""
        numbers = []
        for name in self.names:
            match = _VALIDATION_NUMBER.search(name)
            if match is None or not 1 <= int(match[1]) <= VALIDATION_IMAGES:
                return None
            numbers.append(int(match[1]))
        return numbers

    def take(self, order: Sequence[int]) -> "LabeledImages":
        """Return the images at these positions, in this order."""
        columns = {name: taken(getattr(self, name), order) for name in ("names", "locations", "labels")}
        return dataclasses.replace(self, **columns)

    def subset(self, count: int, seed: int) -> "LabeledImages":
        """Draw a stratified sample: each class keeps its share, rounded to an integer number of images.

        The sample is drawn by hashes of the seed and the names. It is the same on every machine and does not depend on
        the order of the images.

        Raises:
            UsageError: The count is less than 1 or more than the number of images.
        """
        if not 1 <= count <= len(self):
            raise UsageError(f"--subset {count}: expected 1 to {len(self)} (the number of images in the data set)")
        by_class: dict[int, list[int]] = {}
        for index, label in enumerate(self.labels):
            by_class.setdefault(label, []).append(index)
        exact = {label: Fraction(len(members) * count, len(self)) for label, members in by_class.items()}
        quota = {label: int(part) for label, part in exact.items()}
        # The remaining images go to the largest remainders. Ties are broken by hash, so that no class is favored.
        by_remainder = sorted(exact, key=lambda label: (quota[label] - exact[label], _draw(seed, str(label))))
        for label in by_remainder[: count - sum(quota.values())]:
            quota[label] += 1
        chosen = []
        for label, members in by_class.items():
            chosen += sorted(members, key=lambda i: _draw(seed, self.names[i]))[: quota[label]]
        return self.take(sorted(chosen))


def _draw(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{name}".encode("utf-8", "surrogateescape")).digest()


def read_dataset(
    data: Path | Source, list_file: Path | None, classes: Classes | None, num_classes: int
) -> LabeledImages:
    """Find the images in a folder or tar archive, and their classes, for a model with `num_classes` outputs.

    Args:
        data: A folder, a tar archive, or a folder inside one (`x.tar/val`). Without a list file it contains one folder
            per class, possibly inside wrapper folders. Files next to the class folders are ignored. A `Source` is used
            without a search for wrapper folders or splits.
        list_file: File with the class of each image, in a format that `fcvit.data.lists.read_list` reads.
        classes: Known classes of the model, or None.

    Raises:
        UnreadableFile: The data or the list does not exist or cannot be read, or there are no images.
        DoesNotFit: The classes cannot be mapped to the model's classes, listed images do not exist, or the folders are
            splits, of which only one can be read.
    """
    if list_file is not None:
        source = open_source(data, labels=False) if isinstance(data, Path) else data
        listed = read_list(list_file)
        locations, labels, remark = find_listed(listed, list_file, source)
        try:
            assignment = assign_labels(sorted(set(labels.values())), classes, num_classes, list_file)
        except DoesNotFit as error:
            if not listed.encoding_problem:
                raise
            raise DoesNotFit(f"{error} ({listed.encoding_problem}, save it as UTF-8)") from error
        assignment = assignment._replace(rule=assignment.rule + remark)
        notes = listed.notes
        names = sorted(labels)
        indices = [assignment.mapping[labels[name]] for name in names]
        return LabeledImages(
            source.path,
            tuple(names),
            tuple(locations[name] for name in names),
            Integers(indices),
            *assignment,
            notes=notes,
        )
    source, notes = (data, ()) if isinstance(data, Source) else _one_split(data, classes, num_classes)
    folders, files = source.folders(), source.tree().files
    notes += source.content.notes
    folder_of = np.full(len(files), -1, np.int32)
    for number, folder in enumerate(folders):
        inside = files.names.under(f"{folder}/")
        folder_of[inside.start : inside.stop] = number
    notes += _check_contents(source, folders, files, folder_of >= 0)
    assignment = _assign(source, classes, num_classes)
    order = np.flatnonzero(files.is_image() & (folder_of >= 0))
    if not len(order):
        raise UnreadableFile(f"{source.path}: the class folders contain no images ({', '.join(sorted(ENDINGS))})")
    images = files.take(order)
    indices = np.array([assignment.mapping[legible(folder)] for folder in folders], np.int32)
    labels = Integers(indices[folder_of[order]])
    return LabeledImages(source.path, images.names, images.locations, labels, *assignment, notes=notes)


def _assign(source: Source, classes: Classes | None, num_classes: int) -> Assignment:
    """Map the class folders, or the labels that the data contains, to the class indices of a model."""
    folders = sorted(map(legible, source.folders()))
    if source.content.classes:
        return assign_declared(folders, source.content.classes, classes, num_classes, source.path)
    if source.content.labeled:
        return assign_labels(folders, classes, num_classes, source.path)
    return assign_classes(folders, classes, num_classes, "class folders")


def known_classes(classes: Classes | None, num_classes: int) -> frozenset[str]:
    """Return the ids and names of all known classes, including ImageNet's for a model with 1,000 outputs."""
    listed = (*(classes or ()), *(imagenet() if num_classes == IMAGENET_CLASSES else ()))
    return frozenset(text for named in listed for text in named)


def _one_split(data: Path, classes: Classes | None, num_classes: int) -> tuple[Source, tuple[str, ...]]:
    """Find the class folders in a path or inside its wrapper folders, and reject more than one split."""
    layout = find_layout(open_source(data), known_classes(classes, num_classes))
    path, names = layout.source.path, list(layout.splits)
    if layout.doubt:
        raise DoesNotFit(
            f"{path}: {layout.doubt} can be a split or a class; for the split, pass {path / layout.doubt}, and for the "
            "class, pass the model's classes in their order with --classes FILE"
        )
    if len(names) > 1:
        labeled = [name for name in names if layout.splits[name].folders()]
        example = next((name for name in (*layout.named("val"), *labeled[::-1]) if name in labeled), names[0])
        raise DoesNotFit(
            f"{path}: contains the splits {', '.join(names)}; pass the folder of one split, such as {path / example}"
        )
    if names:
        note = f"{path}: contains only the split {names[0]}, so its folders are the classes"
        return layout.splits[names[0]], (*layout.notes, note)
    return layout.source, layout.notes


def _check_contents(source: Source, folders: Sequence[str], files: Files, inside: np.ndarray) -> tuple[str, ...]:
    """Return notes on the files that are skipped, and reject a source without class folders.

    `inside` tells for each file whether it is in a class folder, bool (files,).
    """
    path, images = source.path, files.is_image()
    others = files.take(np.flatnonzero(~images))
    packed = [name for name in others if name.lower().endswith((".tar", *PACKED))]
    if not folders:
        if packed:
            raise UnreadableFile(
                f"{path}: contains archives ({some(packed)}) but no class folders; pass one tar archive or a folder "
                "that contains only tar archives with one class each, and unpack other archives first"
            )
        if not images.any():
            raise UnreadableFile(f"{path}: contains no class folders and no images ({', '.join(sorted(ENDINGS))})")
        if source.content.labeled:
            raise UnreadableFile(f"{path}: the images have no labels; training and evaluation need them")
        raise UnreadableFile(
            f"{path}: contains images but no class folders; put the images of each class into a folder, or for fcvit "
            "eval pass the class of each image with --list FILE"
        )
    packed = [name for name in packed if "/" not in name]
    every = source.archive.files if source.archive is not None else files
    stray = sum(int(every.take(every.names.under(start)).is_image().sum()) for start in ("/", "../"))
    outside = int((images & ~inside).sum())
    notes = (
        packed and f"skipped {counted(len(packed), 'archive')} next to the class folders: {some(packed)}",
        stray and f"skipped {counted(stray, 'image')} with a path outside the archive (starting with / or ..)",
        count_non_images(name for name in others if "/" in name),
        outside and f"skipped {counted(outside, 'image')} outside the class folders",
    )
    return tuple(f"{path}: {note}" for note in notes if note)


def read_real(path: Path, images: LabeledImages) -> list[frozenset[int]]:
    """Read ImageNet-ReaL's labels (Beyer et al. 2020, `real.json`): the set of correct classes of each image.

    A set can be empty.

    Raises:
        UnreadableFile: The file cannot be read or is not such a list.
        DoesNotFit: The image names are not those of ImageNet's validation images.
    """
    numbers = images.validation_numbers()
    if numbers is None:
        raise DoesNotFit(
            f"--real: {images.names[0]}: expected ImageNet's validation images, named ILSVRC2012_val_ and eight digits"
        )
    try:
        labels = json.loads(path.read_bytes())
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(f"{path}: not a JSON file ({str(error)[:80]})") from error
    if (
        not isinstance(labels, list)
        or len(labels) != VALIDATION_IMAGES
        or not all(isinstance(classes, list) for classes in labels)
        or not all(type(c) is int and 0 <= c < IMAGENET_CLASSES for classes in labels for c in classes)
    ):
        raise UnreadableFile(f"{path}: expected a list of {VALIDATION_IMAGES:,} lists of class indices from 0 to 999")
    return [frozenset(labels[number - 1]) for number in numbers]
