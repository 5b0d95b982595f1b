"""Find the images and label maps of a segmentation data set, in a folder or in a tar archive.

Three layouts are read: ADE20K as downloaded (`images/{training,validation}` and `annotations/{training,validation}`),
plain `images/` and `annotations/` folders, and `train/images` and `train/annotations`.
"""

import collections
import dataclasses
import hashlib
import json
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fcvit.data.class_colors import ClassList, ade20k, parse_class_list, read_class_list
from fcvit.data.folders import is_image
from fcvit.data.label_maps import LabelFile
from fcvit.data.sources import Location, Source
from fcvit.data.splits import Role, by_role, role, with_role
from fcvit.errors import DoesNotFit, UnreadableFile, UsageError, counted
from fcvit.text import some

_IMAGES = ("images", "image", "imgs", "img", "jpegimages", "leftimg8bit")
_LABELS = ("annotations", "annotation", "labels", "label", "masks", "mask", "gt", "gtfine", "segmentationclass")
_WRAPPERS = 4  # maximum number of folders around a data set
_IMAGE_SUFFIX = re.compile(r"[_-](leftImg8bit|image|img|sat|rgb)$", re.IGNORECASE)
_SUFFIX_START = re.compile(r"[_. -](?=[A-Za-z])")


@dataclasses.dataclass(frozen=True)
class LabeledMaps:
    """Images with label maps, which are not read yet (a `fcvit.data.loader.Dataset`).

    Attributes:
        root: Folder or tar archive, for messages.
        names: Image names relative to the root, with forward slashes, sorted and unique.
        locations: Location of each image.
        labels: Label file of each image.
        unlabeled: Names of images without a label file. They are not in `names`.
        unused: Names of label files without an image.
        notes: Readable notes on how images and labels were paired.
    """

    root: Path
    names: tuple[str, ...]
    locations: tuple[Location, ...]
    labels: tuple[LabelFile, ...]
    unlabeled: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def targets(self) -> tuple[LabelFile, ...]:
        """Return the label file of each image, which a transform reads with `read_label`."""
        return self.labels

    def listing(self) -> str:
        """Return the SHA-256 of the names of images and labels, which a resumed run compares."""
        return hashlib.sha256(json.dumps([self.names, [label.name for label in self.labels]]).encode()).hexdigest()

    def take(self, order: Sequence[int]) -> "LabeledMaps":
        """Return the images at these positions, in this order."""
        return dataclasses.replace(
            self,
            names=tuple(self.names[i] for i in order),
            locations=tuple(self.locations[i] for i in order),
            labels=tuple(self.labels[i] for i in order),
        )


def join(splits: Iterable[LabeledMaps]) -> LabeledMaps:
    """Return the images of several splits of a data set, in order, for checks of all label maps together."""
    splits = tuple(splits)
    return LabeledMaps(
        splits[0].root,
        tuple(name for split in splits for name in split.names),
        tuple(location for split in splits for location in split.locations),
        tuple(label for split in splits for label in split.labels),
    )


@dataclasses.dataclass(frozen=True)
class MapLayout:
    """The folders of a segmentation data set.

    Attributes:
        source: The data set, inside its wrapper folders.
        splits: Name -> folder of images and folder of labels, relative to the source. Training splits come first. A
            data set without splits has one split, "all".
        without_labels: Split folders of images without a folder of labels, such as a test set.
    """

    source: Source
    splits: Mapping[str, tuple[str, str]]
    without_labels: tuple[str, ...] = ()

    def named(self, wanted: Role) -> list[str]:
        """Return the names of the training, validation or test splits."""
        return with_role(self.splits, wanted)

    @property
    def is_ade20k(self) -> bool:
        """Return whether the data set is ADE20K's benchmark as downloaded, in which 0 means "no class"."""
        return self.source.path.name == "ADEChallengeData2016" or "objectInfo150.txt" in self.source.files()

    def class_list(self) -> ClassList | None:
        """Return ADE20K's classes, or those of the file classes.csv in the data set, or None.

        Raises:
            UnreadableFile, DoesNotFit: As in `read_class_list`.
        """
        if self.is_ade20k:
            return ade20k()
        location = self.source.locate("classes.csv")
        if location is None:
            return None
        path = self.source.path / "classes.csv"
        if self.source.archive is None:
            return read_class_list(path)
        try:
            return parse_class_list(location.read(), str(path))
        except OSError as error:
            raise UnreadableFile(f"{path}: {error.strerror or error}") from error


def find_maps(source: Source) -> MapLayout | None:
    """Find the folders of images and labels of a segmentation data set, or return None if it has another layout.

    Folders of images are named images, img, JPEGImages or leftImg8bit, folders of labels annotations, labels, masks,
    gtFine or SegmentationClass. Both must contain image files. Splits are folders in both (images/train and
    annotations/train) or around both (train/images and train/annotations).

    Raises:
        UsageError: There are several folders of images or of labels.
        UnreadableFile: A folder cannot be read, or splits of the images have no labels.
    """
    for _ in range(_WRAPPERS):
        if folders := _folder_pair(source):
            return _with_splits_inside(source, *folders)
        names = by_role(filter(role, source.folders()))
        around = {name: folders for name in names if (folders := _folder_pair(source.child(name)))}
        if around:
            splits = {name: (f"{name}/{images}", f"{name}/{labels}") for name, (images, labels) in around.items()}
            return MapLayout(source, splits, tuple(name for name in names if name not in splits))
        names = source.folders()
        if len(names) != 1 or source.has_images():
            break
        source = source.child(names[0])
    return None


def _folder_pair(source: Source) -> tuple[str, str] | None:
    """Return the names of the folder of images and of the folder of labels, or None."""
    folders = source.folders()
    images, labels = (
        [name for name in folders if name.lower() in words and source.child(name).has_images_below()]
        for words in (_IMAGES, _LABELS)
    )
    if not images or not labels:
        return None
    for names, kind in ((images, "images"), (labels, "labels")):
        if len(names) > 1:
            raise UsageError(
                f"{source.path}: several folders of {kind} ({', '.join(names)}); move all but one out of the data set"
            )
    return images[0], labels[0]


def _with_splits_inside(source: Source, images: str, labels: str) -> MapLayout:
    inside = source.child(images)
    names = [] if inside.has_images() else by_role(filter(role, inside.folders()))
    if not names:
        return MapLayout(source, {"all": (images, labels)})
    others = source.child(labels).folders()
    splits: dict[str, tuple[str, str]] = {}
    for name in names:
        same = [name] if name in others else [other for other in others if role(other) == role(name)]
        if len(same) == 1:
            splits[name] = (f"{images}/{name}", f"{labels}/{same[0]}")
    if not splits:
        raise UnreadableFile(
            f"{source.path}: {images} has the folders {some(names)}, but {labels} has no such folders; put the labels "
            "of each split into a folder with the same name"
        )
    return MapLayout(source, splits, tuple(f"{images}/{name}" for name in names if name not in splits))


def read_split(layout: MapLayout, name: str, label_suffix: str | None = None) -> LabeledMaps:
    """Find the images of a split and their label files. Neither is decoded.

    Args:
        layout: Result of `find_maps`.
        name: A key of its splits.
        label_suffix: Text between an image's name and the extension of its label file, such as `_mask` or
            `_gtFine_labelIds`. By default it is found from the names.

    Raises:
        UnreadableFile: A folder cannot be read, or no image has a label.
        UsageError: The label files have several suffixes.
        DoesNotFit: Two images or two labels have the same name except for their extensions.
    """
    folders = layout.splits[name]
    images, labels = (
        {file: location for file, location in layout.source.child(folder).tree().files.items() if is_image(file)}
        for folder in folders
    )
    root = layout.source.path
    image_folder, label_folder = (root / folder for folder in folders)
    pairing = pair(tuple(images), tuple(labels), label_suffix, str(label_folder))
    if not pairing.pairs:
        examples = [next(iter(files), "no image files") for files in (images, labels)]
        raise UnreadableFile(
            f"{label_folder}: no label has the name of an image in {image_folder} (images: {examples[0]}, labels: "
            f"{examples[1]}); rename them, or pass the end of the labels' names with --label-suffix"
        )
    unlabeled, unused = pairing.unlabeled, pairing.unused
    notes = []
    if pairing.suffix:
        notes.append(f"{label_folder}: labels have the names of the images and {pairing.suffix} at the end")
    if unlabeled:
        notes.append(f"{image_folder}: left out {counted(len(unlabeled), 'image')} without a label: {some(unlabeled)}")
    if unused:
        notes.append(f"{label_folder}: left out {counted(len(unused), 'label')} without an image: {some(unused)}")
    pairs = sorted(pairing.pairs)
    return LabeledMaps(
        root,
        tuple(f"{folders[0]}/{image}" for image, _ in pairs),
        tuple(images[image] for image, _ in pairs),
        tuple(LabelFile(f"{folders[1]}/{label}", labels[label]) for _, label in pairs),
        tuple(f"{folders[0]}/{image}" for image in unlabeled),
        tuple(f"{folders[1]}/{label}" for label in unused),
        tuple(notes),
    )


class Pairing(NamedTuple):
    """Images with their label files, and the files without a partner.

    Attributes:
        pairs: Image and label, in the order of the images.
        suffix: Text between an image's name and the extension of its label.
        unlabeled: Images without a label.
        unused: Labels without an image.
    """

    pairs: tuple[tuple[str, str], ...]
    suffix: str
    unlabeled: tuple[str, ...]
    unused: tuple[str, ...]


def pair(images: Sequence[str], labels: Sequence[str], suffix: str | None = None, shown: str = "labels") -> Pairing:
    """Pair images with the labels of the same relative path, except for the extension and a suffix of the labels.

    Without a given suffix, the suffix that fits the most labels is used. A suffix starts with `_`, `-`, `.` or a space
    and a letter, so that `image_1` is never paired with `image`. Names of images can end in `_leftImg8bit`, `_image`,
    `_img`, `_sat` or `_rgb`, which labels do not repeat.

    Args:
        images, labels: Relative paths of the files, with forward slashes.
        suffix: The suffix, with or without an extension, or None to find it.
        shown: Name of the data set in messages.

    Raises:
        UsageError: Another suffix fits at least half as many labels.
        DoesNotFit: Two images or two labels have the same name except for their extensions.
    """
    stems = {image: posixpath.splitext(image)[0] for image in images}
    label_stems = {label: posixpath.splitext(label)[0] for label in labels}
    endings = {match[0] for stem in stems.values() if (match := _IMAGE_SUFFIX.search(stem))}
    if len(endings) == 1 and not set(stems.values()) & set(label_stems.values()):
        (ending,) = endings
        if all(stem.endswith(ending) for stem in stems.values()):
            stems = {image: stem.removesuffix(ending) for image, stem in stems.items()}
    by_stem = _unique(stems, "image", shown)
    if suffix is None:
        suffix = _find_suffix(by_stem, label_stems.values(), shown)
    elif is_image(suffix):
        suffix = posixpath.splitext(suffix)[0]
    found = {label: stem.removesuffix(suffix) for label, stem in label_stems.items() if stem.endswith(suffix)}
    by_label = _unique({label: stem for label, stem in found.items() if stem in by_stem}, "label", shown)
    return Pairing(
        tuple((image, by_label[stem]) for image, stem in stems.items() if stem in by_label),
        suffix,
        tuple(image for image, stem in stems.items() if stem not in by_label),
        tuple(label for label in labels if found.get(label) not in by_label),
    )


def _unique(stems: Mapping[str, str], kind: str, shown: str) -> dict[str, str]:
    """Invert a mapping of files to their names without extension."""
    inverse: dict[str, str] = {}
    for file, stem in stems.items():
        if stem in inverse:
            raise DoesNotFit(f"{shown}: two {kind}s have the same name: {inverse[stem]} and {file}; remove one of them")
        inverse[stem] = file
    return inverse


def _find_suffix(images: Mapping[str, str], labels: Iterable[str], shown: str) -> str:
    """Return the suffix that fits the most labels. Each label counts for the image with the longest fitting name."""
    fits: collections.Counter[str] = collections.Counter()
    for stem in labels:
        folder = stem.rfind("/") + 1
        cuts = [len(stem), *(match.start() for match in reversed([*_SUFFIX_START.finditer(stem, folder)]))]
        fits.update(stem[cut:] for cut in [cut for cut in cuts if stem[:cut] in images][:1])
    ranked = fits.most_common(2)
    if len(ranked) > 1 and 2 * ranked[1][1] >= ranked[0][1]:
        names = ", ".join(repr(name) for name in sorted(fits, key=lambda name: (-fits[name], name))[:4])
        raise UsageError(f"{shown}: labels have the suffixes {names}; choose one with --label-suffix")
    return ranked[0][0] if ranked else ""
