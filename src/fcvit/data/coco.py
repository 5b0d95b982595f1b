"""Read the annotations of object detection and instance segmentation in COCO's JSON format.

Three layouts are read: COCO as downloaded (`annotations/instances_val2017.json` and `val2017/`), one JSON file with its
images, and a JSON file in each of the folders of splits (`train/` and `valid/`). Images keep the order of their ids, as
in pycocotools. Boxes are x, y, width, height, with the upper left corner of the image at 0, 0.

Entries that pycocotools or mmdetection 2.19 would reject or misread are left out or corrected, and each is listed by
kind in `CocoImages.problems`.
"""

import collections
import dataclasses
import functools
import hashlib
import io
import json
import posixpath
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from PIL import Image

from fcvit.data.classes import Classes, ClassName
from fcvit.data.label_maps import upright_size
from fcvit.data.loader import read_file
from fcvit.data.masks import Segmentation, encode_segmentation, mask_area, parse_segmentation
from fcvit.data.sources import Location, Source, open_source
from fcvit.data.splits import Role, by_role, role, with_role
from fcvit.data.transforms.preprocess import opened
from fcvit.errors import BadImages, DoesNotFit, UnreadableFile, counted
from fcvit.text import decode_text, parse_json, some

MIN_SIDE = 32
"""Training images with a shorter side, in pixels, are left out, as in mmdetection."""

_FOLDERS = ("annotations", "annotation", "labels")  # names of folders of JSON files
_PREFIX = "instances_"
_MOST_FILES = 20  # a folder of more JSON files has another format, such as one file for each image
_WRAPPERS = 4  # maximum number of folders around a data set
_LARGEST_SIDE = 1 << 16  # largest width and height in pixels
_LARGEST_ID = 1 << 53
_TOLERANCE = 1.0  # pixels by which a box can reach over the border without a note
_WHOLE = re.compile(r"-?[0-9]{1,18}")

# Kinds of problems. The texts are shown in front of a number and examples.
NO_FILE_NAME = "images without a usable id or file name, left out"
MISSING = "images that are listed but missing, left out"
AMBIGUOUS = "images whose name fits several files, left out"
SAME_IMAGE_ID = "different images with the same id, left out"
SAME_FILE = "images listed twice, of which the first is used"
NO_SIZE = "images without width and height in the JSON file, which are read from the image"
BAD_SIZE = "images whose size is neither in the JSON file nor readable, left out"
TEXT_IDS = "ids written as text, read as numbers"
SAME_ID = "annotations whose id occurs twice"
NOT_ANNOTATION = "annotations without a usable image_id, left out"
UNKNOWN_IMAGE = "annotations of an image that is not listed, left out"
UNKNOWN_CATEGORY = "annotations of a category that is not listed, left out"
BAD_BOX = "annotations without a box of four finite numbers, left out"
BAD_CROWD = "annotations whose iscrowd is not 0 or 1, left out"
NO_CROWD = "annotations without iscrowd, read as 0"
NO_AREA = "annotations without area, computed from the mask or the box"
OUTSIDE = "boxes outside of the image, not used for training"
OVER_BORDER = "boxes over the border of the image, cut in training"
TINY = "boxes with a side or an area under one pixel, not used for training"
BAD_MASK = "masks that cannot be read, so that the annotation has only a box"
SHORT_POLYGON = "polygons of fewer than three points, left out"
NO_MASK = "annotations without a mask, left out where masks are trained or evaluated"
UNUSED = "categories that are never used, which have no AP"
UNUSABLE_IMAGES = (NO_FILE_NAME, MISSING, AMBIGUOUS, SAME_IMAGE_ID, BAD_SIZE)
"""The problems for which images are left out."""


class Instances(NamedTuple):
    """The annotated instances of an image.

    Attributes:
        size: Height and width of the image in pixels, after its EXIF orientation was applied.
        boxes: x, y, width and height in pixels, float64 (n, 4).
        labels: Class index, int64 (n).
        areas: Area in square pixels, which decides between small, medium and large, float64 (n).
        crowd: Whether it is a group of objects, bool (n).
        ignored: Whether the annotation has the mark `ignore`, bool (n). mmdetection does not train on it.
        masks: Polygons or run lengths (see `fcvit.data.masks`), or None without a mask.
    """

    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    ignored: np.ndarray
    masks: tuple[Segmentation | None, ...]

    def take(self, chosen: np.ndarray) -> "Instances":
        """Return the instances for which a bool array (n) is true."""
        return Instances(
            self.size,
            self.boxes[chosen],
            self.labels[chosen],
            self.areas[chosen],
            self.crowd[chosen],
            self.ignored[chosen],
            tuple(mask for mask, keep in zip(self.masks, chosen, strict=True) if keep),
        )

    def corners(self) -> np.ndarray:
        """Return the boxes as x1, y1, x2, y2, float32 (n, 4), added in float64 as in mmdetection."""
        return np.concatenate([self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]], 1).astype(np.float32)

    def inside(self) -> np.ndarray:
        """Return which boxes have a common area with the image, bool (n)."""
        low, high = self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]
        return np.all(np.minimum(high, self.size[::-1]) > np.maximum(low, 0), axis=1)

    def trainable(self, with_masks: bool) -> np.ndarray:
        """Return which instances mmdetection trains on, bool (n): no crowds, inside the image, sides of 1 pixel."""
        large = (self.areas > 0) & (self.boxes[:, 2:] >= 1).all(1)
        masked = np.array([mask is not None for mask in self.masks], bool) if with_masks else True
        return self.inside() & large & ~self.crowd & ~self.ignored & masked


@dataclasses.dataclass(frozen=True)
class CocoImages:
    """Images with annotated instances (a `fcvit.data.loader.Dataset`). Neither images nor masks are decoded yet.

    Attributes:
        root: Folder or tar archive, for messages.
        file: The JSON file, for messages.
        names: Image names relative to the root, with forward slashes, in the order of the ids.
        locations: Location of each image.
        ids: Id of each image in the JSON file. They are texts if one of them is not a number.
        targets: The instances of each image.
        classes: One class for each label, in the order of the category ids.
        category_ids: Category id of each label.
        problems: Kind of problem, such as `MISSING` -> the entries concerned.
        corners: Whether the boxes look like x1, y1, x2, y2 instead of x, y, width, height.
    """

    root: Path
    file: Path
    names: tuple[str, ...]
    locations: tuple[Location, ...]
    ids: tuple[int, ...] | tuple[str, ...]
    targets: tuple[Instances, ...]
    classes: Classes
    category_ids: tuple[int, ...]
    problems: Mapping[str, tuple[str, ...]]
    corners: bool = False

    def __len__(self) -> int:
        return len(self.names)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return a readable note for each kind of problem."""
        notes = [f"{self.file}: {kind} ({len(items):,}): {some(items, 3)}" for kind, items in self.problems.items()]
        return (*notes, *self.hints)

    @property
    def hints(self) -> tuple[str, ...]:
        """Return likely errors that concern all annotations."""
        return (f"{self.file}: {_CORNERS}",) if self.corners else ()

    @property
    def landscape(self) -> np.ndarray:
        """Return which images are wider than high, bool (images). mmdetection never mixes both in a batch."""
        return np.array([width > height for height, width in (target.size for target in self.targets)], bool)

    def listing(self) -> str:
        """Return the SHA-256 of names, ids and instances, which a resumed run compares."""
        digest = hashlib.sha256(json.dumps([self.names, self.ids, self.category_ids]).encode())
        for target in self.targets:
            digest.update(repr((target.size, len(target.masks))).encode())
            for array in target[1:-1]:
                digest.update(array.tobytes())
            for mask in target.masks:
                for part in mask if isinstance(mask, tuple) else () if mask is None else (mask,):
                    digest.update(len(part).to_bytes(8, "big") + part.tobytes())
        return digest.hexdigest()

    def take(self, order: Sequence[int]) -> "CocoImages":
        """Return the images at these positions, in this order."""
        return dataclasses.replace(
            self,
            names=tuple(self.names[i] for i in order),
            locations=tuple(self.locations[i] for i in order),
            ids=tuple(self.ids[i] for i in order),
            targets=tuple(self.targets[i] for i in order),
        )

    def with_classes(self, classes: Classes) -> "CocoImages":
        """Return the same images with the labels of a class list, whose names are compared with those of the file.

        Instances of other categories are left out, as in mmdetection. A class that the file does not have gets a new
        category id.

        Raises:
            DoesNotFit: No class has the name of a category, or a name belongs to several of them.
        """
        own = {name.name: label for label, name in enumerate(self.classes)}
        if len(own) < len(self.classes) or len({name.name for name in classes}) < len(classes):
            raise DoesNotFit(
                f"{self.file}: several classes have the same name, so they cannot be compared; rename them"
            )
        known = [own.get(name.name, -1) for name in classes]
        if max(known, default=-1) < 0:
            raise DoesNotFit(
                f"{self.file}: has the categories {some(own)}, but the classes are {some(n.name for n in classes)}; "
                "rename the categories, or pass the weights for these"
            )
        table = np.full(len(self.classes) + 1, -1)
        for label, old in enumerate(known):
            table[old] = label
        table[-1] = -1
        targets = (target._replace(labels=table[target.labels]) for target in self.targets)
        free = max(self.category_ids) + 1
        return dataclasses.replace(
            self,
            targets=tuple(target.take(target.labels >= 0) for target in targets),
            classes=classes,
            category_ids=tuple(self.category_ids[old] if old >= 0 else free + i for i, old in enumerate(known)),
        )

    def ground_truth(self, with_masks: bool) -> dict[str, Any]:
        """Return the instances as the content of a COCO file, for `fcvit.metrics.detection.evaluate`.

        Annotations are numbered from 1, because pycocotools takes a match with annotation 0 for no match. With masks,
        instances without a mask are left out, and the others have compressed run lengths.

        Raises:
            MissingExtra: pycocotools is needed for masks and is not installed.
        """
        annotations: list[dict[str, Any]] = []
        for image, target in zip(self.ids, self.targets, strict=True):
            for index, (box, label, mask) in enumerate(zip(target.boxes, target.labels, target.masks, strict=True)):
                if with_masks and mask is None:
                    continue
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": self.category_ids[label],
                        "bbox": box.tolist(),
                        "area": float(target.areas[index]),
                        "iscrowd": int(target.crowd[index]),
                    }
                )
                if with_masks and mask is not None:
                    annotations[-1]["segmentation"] = encode_segmentation(mask, target.size)
        sizes = (target.size for target in self.targets)
        return {
            "images": [{"id": i, "height": h, "width": w} for i, (h, w) in zip(self.ids, sizes, strict=True)],
            "annotations": annotations,
            "categories": [
                {"id": category, "name": c.name} for category, c in zip(self.category_ids, self.classes, strict=True)
            ],
        }


_CORNERS = (
    "most boxes reach beyond their images, but fit as the corners x1, y1, x2, y2; write x, y, width, height, where "
    "width = x2 - x1"
)


def training_images(images: CocoImages, with_masks: bool) -> tuple[CocoImages, tuple[str, ...]]:
    """Return the images to train on, with the instances that mmdetection uses, and notes on what was left out.

    Images without such an instance, and images with a side shorter than `MIN_SIDE`, are left out.

    Args:
        images: The training split.
        with_masks: Whether masks are trained. Instances without a mask are then left out.

    Raises:
        DoesNotFit: The boxes are corners, or no image can be used.
    """
    if images.hints:
        raise DoesNotFit(images.hints[0])
    targets = [target.take(target.trainable(with_masks)) for target in images.targets]
    large = [min(target.size) >= MIN_SIDE for target in targets]
    chosen = [index for index, target in enumerate(targets) if large[index] and len(target.boxes)]
    if not chosen:
        masked = any(mask is not None for target in images.targets for mask in target.masks)
        remedy = (
            ""
            if masked or not with_masks
            else "; the annotations have no masks, so train a network without a mask head"
        )
        raise DoesNotFit(
            f"{images.file}: no image has an annotation that can be trained, inside the image and with sides of at "
            f"least 1 pixel{remedy}"
        )
    left_out = {
        f"with a side under {MIN_SIDE} pixels": large.count(False),
        "without a usable annotation": large.count(True) - len(chosen),
    }
    notes = tuple(f"{images.file}: left out {counted(n, 'image')} {why}" for why, n in left_out.items() if n)
    return dataclasses.replace(images, targets=tuple(targets)).take(chosen), notes


@dataclasses.dataclass(frozen=True)
class CocoLayout:
    """The JSON files of a data set.

    Attributes:
        source: The data set, inside its wrapper folders.
        splits: Name -> JSON file relative to the source. Training splits come first. A data set without splits has one
            split, "all".
        others: JSON files that are not read.
    """

    source: Source
    splits: Mapping[str, str]
    others: tuple[str, ...] = ()

    def named(self, wanted: Role) -> list[str]:
        """Return the names of the training, validation or test splits."""
        return with_role(self.splits, wanted)


def find_coco(data: Path) -> CocoLayout | None:
    """Find the JSON files of a data set in COCO's format, or return None if it has another format.

    JSON files are searched in the folder annotations, next to the images, and in folders that are named after splits.
    If the names of some begin with `instances_`, only these are read.

    Args:
        data: Folder, tar archive, or JSON file.

    Raises:
        UnreadableFile: The data cannot be read.
    """
    if data.is_file() and data.suffix.lower() == ".json":
        inside = data.parent.name.lower() in _FOLDERS
        source = Source(data.parent.parent if inside else data.parent)
        return CocoLayout(source, _split_names([data.relative_to(source.path).as_posix()]))
    source = open_source(data)
    for _ in range(_WRAPPERS):
        folders = source.folders()
        places = ["", *(name for name in folders if name.lower() in _FOLDERS)]
        found = [file for place in places for file in _coco_files(source, place)]
        if not found:
            inner = [[name, *(f"{name}/{folder}" for folder in _FOLDERS)] for name in by_role(filter(role, folders))]
            found = [file for places in inner for place in places for file in _coco_files(source, place)]
        if found:
            chosen = [file for file in found if posixpath.basename(file).startswith(_PREFIX)] or found
            return CocoLayout(source, _split_names(chosen), tuple(file for file in found if file not in chosen))
        if len(folders) != 1 or source.has_images():
            break
        source = source.child(folders[0])
    return None


def _coco_files(source: Source, place: str) -> list[str]:
    """Return the JSON files of a folder that contain images and annotations."""
    for name in filter(None, place.split("/")):
        if name not in source.folders():
            return []
        source = source.child(name)
    names = [name for name in source.files() if name.lower().endswith(".json")]
    if len(names) > _MOST_FILES:
        return []
    return [
        posixpath.join(place, name) for name in names if _mentions(source.locate(name), b'"images"', b'"annotations"')
    ]


def _mentions(location: Location | None, *words: bytes) -> bool:
    try:
        content = location.read() if location is not None else b""
    except OSError:
        return False
    return all(word in content for word in words)


def _split_names(files: Sequence[str]) -> dict[str, str]:
    """Return the name of the split of each JSON file: its own name, its folder's name, or "all" for a single file."""
    named: dict[str, str] = {}
    for file in files:
        stem = posixpath.splitext(posixpath.basename(file))[0].removeprefix(_PREFIX)
        parents = [part for part in file.split("/")[:-1] if role(part)]
        name = stem if role(stem) or not parents else parents[-1]
        named[file if name in named else name] = file
    if len(named) == 1 and not role(next(iter(named))):
        return {"all": files[0]}
    return {name: named[name] for name in by_role(named)}


def read_coco(layout: CocoLayout, name: str) -> CocoImages:
    """Read the annotations of a split and find its images.

    Args:
        layout: Result of `find_coco`.
        name: A key of its splits.

    Raises:
        UnreadableFile: The JSON file cannot be read or is not in COCO's format, or no image or annotation can be used.
        DoesNotFit: Categories repeat.
    """
    source, relative = layout.source, layout.splits[name]
    path = source.path / relative
    content = _read_json(source, relative)
    problems = _Problems()
    categories = _categories(content["categories"], path, problems)
    finder = _Finder(source, name, relative)
    images, left_out = _images(content["images"], finder, problems)
    if content["images"] and not images:
        kind, items = next(iter(problems.found.items()))
        raise UnreadableFile(
            f"{path}: none of the {counted(len(content['images']), 'image')} can be used ({kind}: {items[0]}); the "
            f"images are searched by their file_name in {source.path}"
        )
    labels = {one.id: label for label, one in enumerate(categories)}
    _add_annotations(content["annotations"], path, images, left_out, labels, problems)
    ordered = sorted(images.values(), key=lambda image: image.id)
    targets = tuple(image.instances() for image in ordered)
    used = set(np.unique(np.concatenate([target.labels for target in targets])).tolist()) if targets else set()
    problems.found[UNUSED] = [one.name for label, one in enumerate(categories) if label not in used]
    times = collections.Counter(one.name for one in categories)
    return CocoImages(
        source.path,
        path,
        tuple(image.name for image in ordered),
        tuple(image.location for image in ordered),
        tuple(image.id for image in ordered),
        targets,
        tuple(ClassName(c.name if times[c.name] == 1 else f"{c.name} ({c.id})", c.name) for c in categories),
        tuple(one.id for one in categories),
        {kind: tuple(items) for kind, items in problems.found.items() if items},
        _are_corners(targets),
    )


class _Problems:
    """The entries with a problem, by kind."""

    def __init__(self):
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, entry: str) -> None:
        self.found.setdefault(kind, []).append(entry)


def _read_json(source: Source, relative: str) -> dict[str, list[Any]]:
    """Read a JSON file and check that it contains lists of images, annotations and categories."""
    path, location = source.path / relative, source.locate(relative)
    try:
        if location is None:
            raise UnreadableFile(f"{path}: no such file")
        content, repeated = parse_json(decode_text(location.read()))
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror or error}") from error
    except RecursionError as error:
        raise UnreadableFile(f"{path}: nested too deeply for COCO annotations") from error
    except ValueError as error:
        if isinstance(error, UnreadableFile):
            raise
        raise UnreadableFile(f"{path}: not a JSON file ({str(error)[:80]}); download or export it again") from error
    if repeated:
        raise UnreadableFile(
            f"{path}: the key {repeated[0][:40]!r} occurs twice in one object; remove one, because programs differ in "
            "the one they read"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UnreadableFile(f"{path}: has no list {key!r}; expected annotations of instances in COCO's format")
    return content


class _Category(NamedTuple):
    id: int
    name: str


def _categories(entries: list[Any], path: Path, problems: _Problems) -> list[_Category]:
    """Return the categories in the order of their ids."""
    categories: dict[int, str] = {}
    for index, entry in enumerate(entries):
        number = _id(entry.get("id"), "categories", problems) if isinstance(entry, dict) else None
        if not isinstance(number, int) or not isinstance(entry.get("name"), str) or not entry["name"].strip():
            raise UnreadableFile(f"{path}: categories[{index}] has no name or no whole number as id; add them")
        if categories.setdefault(number, entry["name"]) != entry["name"]:
            raise DoesNotFit(
                f"{path}: the categories {categories[number][:40]!r} and {entry['name'][:40]!r} have the same id "
                f"{number}; give each its own"
            )
    if not categories:
        raise UnreadableFile(f"{path}: the list of categories is empty; list every class with its id and name")
    return [_Category(number, categories[number].strip()) for number in sorted(categories)]


def _id(value: Any, what: str, problems: _Problems) -> int | str | None:
    """Return an id as a number if it is one or the text of one, other text as it is, and None for anything else."""
    if type(value) is int:
        return value if abs(value) < _LARGEST_ID else None
    if isinstance(value, float) and value.is_integer() and abs(value) < _LARGEST_ID:
        return int(value)
    if not isinstance(value, str):
        return None
    if not _WHOLE.fullmatch(value):
        return value
    problems.add(TEXT_IDS, f"{what}: {value}")
    return int(value)


@dataclasses.dataclass
class _Image:
    """An image with its annotations while they are read."""

    id: Any
    name: str
    location: Location
    size: tuple[int, int]
    boxes: list[tuple[float, ...]] = dataclasses.field(default_factory=list)
    labels: list[int] = dataclasses.field(default_factory=list)
    areas: list[float] = dataclasses.field(default_factory=list)
    crowd: list[bool] = dataclasses.field(default_factory=list)
    ignored: list[bool] = dataclasses.field(default_factory=list)
    masks: list[Segmentation | None] = dataclasses.field(default_factory=list)

    def instances(self) -> Instances:
        return Instances(
            self.size,
            np.array(self.boxes, np.float64).reshape(-1, 4),
            np.array(self.labels, np.int64),
            np.array(self.areas, np.float64),
            np.array(self.crowd, bool),
            np.array(self.ignored, bool),
            tuple(self.masks),
        )


class _Finder:
    """Finds the file of an image by its `file_name`, which can contain folders, backslashes or a URL.

    The file whose path has the most last parts in common is taken. Among equals, a file in a folder with the split's
    name comes first, then in a folder of the same role. A file in the folder of another split is taken only if
    `file_name` contains this folder.
    """

    def __init__(self, source: Source, split: str, relative: str):
        self.files = source.tree().files
        self.words = {split, posixpath.splitext(posixpath.basename(relative))[0].removeprefix(_PREFIX)}
        self.role = next((named[0] for word in self.words if (named := role(word))), None)
        self.beside = posixpath.dirname(relative)
        self.by_tail: dict[str, list[str]] = {}  # last part and last two parts of the path -> files
        for file in self.files:
            parts = file.rsplit("/", 2)
            for tail in {parts[-1], "/".join(parts[-2:])}:
                self.by_tail.setdefault(tail, []).append(file)
        self.rank = functools.cache(self._rank)

    def _rank(self, folder: str) -> tuple[int, bool]:
        parts = [part for part in folder.split("/") if part]
        roles = {named[0] for part in parts if (named := role(part))}
        same = 2 if self.words & {*parts} else 1 if self.role in roles else -1 if self.role and roles else 0
        return same, folder == self.beside

    def find(self, file_name: str) -> list[str]:
        """Return the best files, which are several if they are equally good."""
        if "://" in file_name:
            file_name = urllib.parse.unquote(urllib.parse.urlsplit(file_name).path)
        parts = [part for part in file_name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        keys: dict[str, tuple[int, tuple[int, bool]]] = {}
        for file in self.by_tail.get("/".join(parts[-2:])) or self.by_tail.get(parts[-1] if parts else "", ()):
            common, rank = _common_tail(file.split("/"), parts), self.rank(posixpath.dirname(file))
            if rank[0] >= 0 or any(map(role, parts[-common:-1])):
                keys[file] = common, rank
        best = max(keys.values(), default=None)
        return [file for file, key in keys.items() if key == best]


def _common_tail(first: Sequence[str], second: Sequence[str]) -> int:
    pairs = zip(reversed(first), reversed(second), strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _images(entries: list[Any], finder: _Finder, problems: _Problems) -> tuple[dict[Any, _Image], set[Any]]:
    """Return the images by their id, and the ids of the images that are left out.

    All ids are texts if one of them is not a number.
    """
    listed: dict[int | str, list[dict[str, Any]]] = {}
    for index, entry in enumerate(entries):
        number = _id(entry.get("id"), "images", problems) if isinstance(entry, dict) else None
        if number is None or not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
            problems.add(NO_FILE_NAME, f"images[{index}]")
            continue
        listed.setdefault(number, []).append(entry)
    as_text = any(isinstance(number, str) for number in listed)
    images: dict[Any, _Image] = {}
    used: set[str] = set()
    for number, (entry, *others) in listed.items():
        file_name = entry["file_name"]
        if any(other["file_name"] != file_name for other in others):
            problems.add(SAME_IMAGE_ID, f"{number} ({some([e['file_name'] for e in (entry, *others)], 3, 60)})")
            continue
        files = finder.find(file_name)
        if len(files) != 1:
            problems.add(AMBIGUOUS if files else MISSING, file_name[:200])
            continue
        (name,) = files
        if others or name in used:
            problems.add(SAME_FILE, file_name)
        if name in used:
            continue
        used.add(name)
        size = _size(entry, name, finder.files[name], problems)
        if size is not None:
            identity = str(number) if as_text else number
            images[identity] = _Image(identity, name, finder.files[name], size)
    return images, {identity for number in listed if (identity := str(number) if as_text else number) not in images}


def _size(entry: dict[str, Any], name: str, location: Location, problems: _Problems) -> tuple[int, int] | None:
    """Return height and width of an image from its entry, or from its file if they are not in the entry."""
    height, width = entry.get("height"), entry.get("width")
    limit = Image.MAX_IMAGE_PIXELS
    if _is_number(height) and _is_number(width) and min(height, width) >= 1 and not (height % 1 or width % 1):
        height, width = int(height), int(width)
        if max(height, width) <= _LARGEST_SIDE and (not limit or height * width <= 2 * limit):
            return height, width
    else:
        problems.add(NO_SIZE, name)
        try:
            with opened(io.BytesIO(read_file(name, location)), name) as image:
                width, height = upright_size(image)
                return height, width
        except BadImages as error:
            problems.add(BAD_SIZE, str(error))
            return None
    problems.add(BAD_SIZE, f"{name} ({width} x {height} pixels)")
    return None


def _is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number, which can be used as a float."""
    return type(value) in (int, float) and abs(value) < 1e15  # NaN is not less than anything


def _add_annotations(
    entries: list[Any],
    path: Path,
    images: Mapping[Any, _Image],
    left_out: set[Any],
    labels: Mapping[int, int],
    problems: _Problems,
) -> None:
    """Add the annotations that can be used to their images."""
    as_text = any(isinstance(number, str) for number in (*images, *left_out))
    added = skipped = 0
    seen: set[Any] = set()
    for index, entry in enumerate(entries):
        number = _id(entry.get("image_id"), "annotations", problems) if isinstance(entry, dict) else None
        identity = str(number) if as_text else number
        if number is None:
            problems.add(NOT_ANNOTATION, f"annotations[{index}]")
        elif identity in images:
            shown = f"annotation {entry.get('id', index)!s:.20} of {images[identity].name}"
            added += _add_annotation(entry, shown, images[identity], labels, problems)
            if isinstance(key := entry.get("id"), int | str):
                if key in seen:
                    problems.add(SAME_ID, shown)
                seen.add(key)
        elif identity in left_out:
            skipped += 1
        else:
            problems.add(UNKNOWN_IMAGE, f"annotation {entry.get('id', index)!s:.20} of image {number!s:.40}")
    if entries and not added and not skipped:
        kind, items = [*problems.found.items()][-1]
        raise UnreadableFile(
            f"{path}: none of the {counted(len(entries), 'annotation')} can be used ({kind}: {items[0]}); expected "
            "boxes of instances in COCO's format"
        )


def _add_annotation(
    entry: dict[str, Any], shown: str, image: _Image, labels: Mapping[int, int], problems: _Problems
) -> bool:
    """Add an annotation to its image, unless it cannot be used. Return whether it was added."""
    category = _id(entry.get("category_id"), "annotations", problems)
    if category not in labels:
        problems.add(UNKNOWN_CATEGORY, f"{shown} (category {entry.get('category_id')!s:.20})")
        return False
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) < 0:
        problems.add(BAD_BOX, shown)
        return False
    crowd = entry.get("iscrowd")
    if crowd is None:
        problems.add(NO_CROWD, shown)
    elif crowd not in (0, 1):
        problems.add(BAD_CROWD, shown)
        return False
    mask = None
    segmentation = entry.get("segmentation")
    try:
        mask = parse_segmentation(segmentation, image.size)
    except ValueError as error:
        problems.add(BAD_MASK, f"{shown}: {error}")
    else:
        if isinstance(segmentation, list) and any(len(polygon) < 6 for polygon in segmentation):
            problems.add(SHORT_POLYGON, shown)
        if mask is None:
            problems.add(NO_MASK, shown)
    x, y, width, height = box
    area = entry.get("area")
    if not _is_number(area) or area < 0:
        problems.add(NO_AREA, shown)
        area = width * height if mask is None else mask_area(mask)
    right, bottom = x + width - image.size[1], y + height - image.size[0]
    if max(x - image.size[1], y - image.size[0]) >= 0 or min(x + width, y + height) <= 0:
        problems.add(OUTSIDE, shown)
    elif min(x, y) < -_TOLERANCE or max(right, bottom) > _TOLERANCE:
        problems.add(OVER_BORDER, shown)
    elif min(width, height) < 1 or area <= 0:
        problems.add(TINY, shown)
    image.boxes.append((x, y, width, height))
    image.labels.append(labels[category])
    image.areas.append(area)
    image.crowd.append(bool(crowd))
    image.ignored.append(bool(entry.get("ignore")))
    image.masks.append(mask)
    return True


def _are_corners(targets: Sequence[Instances]) -> bool:
    """Return whether most boxes reach beyond their image, but nearly all fit as corners."""
    boxes = np.concatenate([target.boxes for target in targets]) if targets else np.zeros((0, 4))
    sizes = np.repeat([target.size[::-1] for target in targets], [len(target.boxes) for target in targets], 0)
    if not len(boxes):
        return False
    low, high, limit = boxes[:, :2], boxes[:, 2:], sizes + _TOLERANCE
    beyond = (low + high > limit).any(1)
    fit = ((low <= high) & (high <= limit)).all(1)
    return bool(beyond.mean() > 0.5 and fit.mean() > 0.95)


def different_size(size: tuple[int, int], listed: tuple[int, int]) -> str:
    """Return a message for an image whose size is not that of its annotations. Sizes are (height, width)."""
    return (
        f"{size[1]} x {size[0]} pixels after the EXIF orientation, but the annotations are for "
        f"{listed[1]} x {listed[0]} (width x height); correct width and height in the JSON file, or use the "
        "original image"
    )
