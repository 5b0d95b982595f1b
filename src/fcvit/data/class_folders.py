"""Labeled images as people have them: class folders, a list file, a tar that is read in place.

Wherever the images are, each has a name relative to the folder or tar, and names are sorted: the same
images under the same names are the same data set.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from fcvit.data.class_indices import assign_classes, assign_labels
from fcvit.data.classes import Classes, imagenet
from fcvit.data.folders import ENDINGS, is_image, legible, no_images
from fcvit.data.lists import find_listed, read_list
from fcvit.data.sources import PACKED, Location, Source, open_source
from fcvit.data.splits import find_layout
from fcvit.errors import DoesNotFit, UnreadableFile, UsageError, counted
from fcvit.models.variants import IMAGENET_CLASSES, VALIDATION_IMAGES
from fcvit.text import some

_VALIDATION_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})(?!\d)")


@dataclasses.dataclass(frozen=True)
class LabeledImages:
    """Images with their classes, not yet read.

    Attributes:
        root: the folder or tar, for messages.
        names: relative to it, with /, sorted, each once.
        locations: where each is.
        labels: the class index of each.
        mapping: class folder, or label of the list -> class index.
        rule: how the mapping was found, for people.
        counted: whether no classes were known, and the labels are the model's classes in sorted order.
        notes: what was taken for the data set, and what was left out, for people.
    """

    root: Path
    names: tuple[str, ...]
    locations: tuple[Location, ...]
    labels: tuple[int, ...]
    mapping: Mapping[str, int]
    rule: str
    counted: bool = False
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def targets(self) -> tuple[int, ...]:
        """Give a task the label of each image."""
        return self.labels

    def listing(self) -> str:
        """Return the SHA-256 of names and labels, by which a resumed run knows its images."""
        return hashlib.sha256(json.dumps([self.names, self.labels]).encode()).hexdigest()

    def validation_numbers(self) -> list[int] | None:
        """Return each image's number in ImageNet's validation set, 1 to 50,000; None: they are not such images."""
        matches = [_VALIDATION_NUMBER.search(name) for name in self.names]
        numbers = [int(match[1]) if match else 0 for match in matches]
        return numbers if all(1 <= number <= VALIDATION_IMAGES for number in numbers) else None

    def take(self, order: Sequence[int]) -> "LabeledImages":
        """Return the images at these positions, in this order."""
        return dataclasses.replace(
            self,
            names=tuple(self.names[i] for i in order),
            locations=tuple(self.locations[i] for i in order),
            labels=tuple(self.labels[i] for i in order),
        )

    def subset(self, count: int, seed: int) -> "LabeledImages":
        """Draw a stratified sample, in which every class keeps its share to the nearest whole image.

        It is drawn by hashes of seed and name: the same on every machine and in every order of the images.

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


def read_dataset(
    data: Path | Source, list_file: Path | None, classes: Classes | None, num_classes: int
) -> LabeledImages:
    """Find the images of a folder or tar, and the class of each, for a model with `num_classes` outputs.

    Args:
        data: a folder, a tar, or a folder inside a tar (`x.tar/val`). Without a list it holds one folder a class,
            perhaps below folders that only wrap them; files beside them are ignored. A source is taken as it is.
        list_file: the class of each image, in a form that `fcvit.data.lists.read_list` knows.
        classes: what is known of the model's classes, or None.

    Raises:
        UnreadableFile: nothing there, no images, a list or tar that is none.
        DoesNotFit: the classes cannot be mapped to the model's, listed images are not there, or the folders are
            splits: one of them is expected.
    """
    if list_file is not None:
        source = open_source(data) if isinstance(data, Path) else data
        listed = read_list(list_file)
        locations, labels, remark = find_listed(listed, list_file, source)
        try:
            assignment = assign_labels(sorted(set(labels.values())), classes, num_classes, list_file)
        except DoesNotFit as error:
            if not listed.encoding:
                raise
            raise DoesNotFit(f"{error}; {listed.encoding}, save it as UTF-8") from error
        assignment = assignment._replace(rule=assignment.rule + remark)
        notes = listed.notes
    else:
        source, notes = (data, ()) if isinstance(data, Source) else _one_split(data, classes, num_classes)
        folders, locations = sorted(map(legible, source.folders())), source.tree().files
        notes += _check_contents(source, folders, locations)
        assignment = assign_classes(folders, classes, num_classes, "class folders")
        labels = {name: legible(name.split("/")[0]) for name in locations if "/" in name and is_image(name)}
        if not labels:
            raise UnreadableFile(f"{source.path}: its class folders hold no images ({', '.join(sorted(ENDINGS))})")
    names = tuple(sorted(labels))
    return LabeledImages(
        source.path,
        names,
        tuple(locations[name] for name in names),
        tuple(assignment.mapping[labels[name]] for name in names),
        *assignment,
        notes=notes,
    )


def known_classes(classes: Classes | None, num_classes: int) -> frozenset[str]:
    """Return ids and names that are surely those of classes."""
    listed = (*(classes or ()), *(imagenet() if num_classes == IMAGENET_CLASSES else ()))
    return frozenset(text for named in listed for text in named)


def _one_split(data: Path, classes: Classes | None, num_classes: int) -> tuple[Source, tuple[str, ...]]:
    """Find the class folders of a path, below folders that wrap them; refuse several splits at once."""
    layout = find_layout(open_source(data), known_classes(classes, num_classes))
    path, names = layout.source.path, list(layout.splits)
    if layout.doubt:
        raise DoesNotFit(
            f"{path}: is {layout.doubt} a split or a class? if a split, name {path / layout.doubt}; if a class, name "
            "the model's classes, in its order, with --classes FILE"
        )
    if len(names) > 1:
        labeled = [name for name in names if layout.splits[name].folders()]
        one = next((name for name in (*layout.named("val"), *labeled[::-1]) if name in labeled), names[0])
        raise DoesNotFit(f"{path} holds the splits {', '.join(names)}; name the folder of one, such as {path / one}")
    if names:
        note = f"{path} holds the split {names[0]} alone: its folders are the classes"
        return layout.splits[names[0]], (*layout.notes, note)
    return layout.source, layout.notes


def _check_contents(source: Source, folders: Sequence[str], files: Mapping[str, Location]) -> tuple[str, ...]:
    """Say what is left out, in class folders and beside them; refuse a source without class folders."""
    path = source.path
    packed = [name for name in files if name.lower().endswith((".tar", *PACKED))]
    if not folders:
        if packed:
            raise UnreadableFile(
                f"{path}: no class folders in it, but archives: {some(packed)}; name one tar, or a folder with "
                "nothing but tars of one class each; unpack others first"
            )
        if not any(map(is_image, files)):
            raise UnreadableFile(f"{path}: no class folders and no images in it ({', '.join(sorted(ENDINGS))})")
        raise UnreadableFile(
            f"{path}: no class folders in it, but images; expected one folder of images a class. For fcvit eval, "
            "--list FILE may say the class of each image instead"
        )
    packed = [name for name in packed if "/" not in name]
    stray = [name for name in (source.archive.files if source.archive else ()) if name.startswith(("/", "../"))]
    outside = sum("/" not in name and is_image(name) for name in files)
    notes = (
        packed and f"left out {counted(len(packed), 'archive')} beside the class folders: {some(packed)}",
        (count := sum(map(is_image, stray)))
        and f"left out {counted(count, 'image')} whose names lead out of the tar (/ or ..)",
        no_images(name for name in files if "/" in name),
        outside and f"left out {counted(outside, 'image')} outside of class folders",
    )
    return tuple(f"{path}: {note}" for note in notes if note)


def read_real(path: Path, images: LabeledImages) -> list[frozenset[int]]:
    """Read ImageNet-ReaL's labels (Beyer et al. 2020, `real.json`): the right classes of each image, perhaps none.

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
    if (
        not isinstance(labels, list)
        or len(labels) != VALIDATION_IMAGES
        or not all(isinstance(classes, list) for classes in labels)
        or not all(type(c) is int and 0 <= c < IMAGENET_CLASSES for classes in labels for c in classes)
    ):
        raise UnreadableFile(f"{path}: expected a list of {VALIDATION_IMAGES:,} lists of classes from 0 to 999")
    return [frozenset(labels[number - 1]) for number in numbers]
