"""Look over a data set of class folders before training on it: what cannot be read, what stands there twice."""

import collections
import contextlib
import dataclasses
import hashlib
import io
import logging
import posixpath
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from fcvit.data.folders import is_image
from fcvit.data.loader import each, read_file
from fcvit.data.near_duplicates import FLAT, MAX_DIFFERENCE, PASSES, SIDE, fingerprint, similar_pairs
from fcvit.data.sources import Location, Tree, open_source
from fcvit.data.splits import find_layout
from fcvit.data.transforms.preprocess import DEEP, as_rgb, opened
from fcvit.errors import BadImages, UnreadableFile, UsageError
from fcvit.report.progress import progress

logger = logging.getLogger("fcvit")

SMALL = 32  # pixels of the shorter side
LONG = 4  # longer over shorter side
# Kinds of images that networks learn from otherwise than people see them; none keeps one from training.
ODD = {
    "small": f"a side of fewer than {SMALL} pixels",
    "long": f"longer than {LONG} times the shorter side",
    "flat": "almost of one color",
    "cmyk": "CMYK, converted without its color profile",
    "transparent": "transparency, which is dropped",
    "deep": "16 or 32 bits a channel, reduced to 8",
    "rotated": "an EXIF orientation, which is not applied",
}


@dataclasses.dataclass(frozen=True)
class Split:
    """Counts of one split.

    Attributes:
        name: train, val, or what it was called.
        path: the folder or tar.
        classes: class folder -> number of images by their ending, unreadable ones too; sorted by name.
        empty: class folders without images.
        few: those with fewer images than asked for, but some.
        imbalance: images of the largest class over those of the smallest that has any; None: no class has.
        other_files: ending (lower case, "" for none) -> number of files that are no images, in class folders.
        outside: images in no class folder: checked, but not trained on.
    """

    name: str
    path: Path
    classes: Mapping[str, int]
    empty: tuple[str, ...]
    few: tuple[str, ...]
    imbalance: float | None
    other_files: Mapping[str, int]
    outside: tuple[str, ...]

    @property
    def images(self) -> int:
        return sum(self.classes.values()) + len(self.outside)


@dataclasses.dataclass(frozen=True)
class Same:
    """Images that show the same picture.

    Attributes:
        match: "file": the same bytes; "pixels": the same when decoded; "near": nearly the same, at least two.
        images: in the order of the splits, then by name.
        splits: that they are in.
        classes: that they are in; more than one: a label is wrong.
        difference: of "near", the largest of a pair (see `fcvit.data.near_duplicates`); else 0.
    """

    match: Literal["file", "pixels", "near"]
    images: tuple[str, ...]
    splits: tuple[str, ...]
    classes: tuple[str, ...]
    difference: float = 0.0


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """An image by name, and why it cannot be read."""

    image: str
    reason: str


@dataclasses.dataclass(frozen=True)
class DataCheck:
    """What was found. Images are named class/file, with more than one split split/class/file.

    Attributes:
        splits: each with its counts.
        few: the number of images below which a class has few.
        unreadable: what no command can read; left out below.
        odd: kind (a key of `ODD`) -> images of that kind; kinds without images are left out.
        modes: Pillow's mode ("RGB", "L", ...) -> number of images.
        duplicates: groups of images with the same pixels, the worst first.
        near_duplicates: groups of which some are not quite the same, the worst first.
        missing: class -> splits that have class folders, but not this one.
    """

    splits: tuple[Split, ...]
    few: int
    unreadable: tuple[Unreadable, ...]
    odd: Mapping[str, tuple[str, ...]]
    modes: Mapping[str, int]
    duplicates: tuple[Same, ...]
    near_duplicates: tuple[Same, ...]
    missing: Mapping[str, tuple[str, ...]]

    @property
    def images(self) -> int:
        return sum(split.images for split in self.splits)

    @property
    def clean(self) -> bool:
        """Whether there is nothing to look at. Imbalance alone is no finding."""
        return not (
            self.unreadable
            or self.odd
            or self.duplicates
            or self.near_duplicates
            or self.missing
            or any(split.empty or split.few or split.other_files or split.outside for split in self.splits)
        )


class Facts(NamedTuple):
    """What a worker finds out about an image; digests are of 16 bytes, `hash` is empty where it says nothing."""

    file: bytes
    pixels: bytes
    mode: str
    odd: tuple[str, ...]
    hash: bytes
    thumbnail: bytes


class _Image(NamedTuple):
    name: str
    split: str
    label: str  # "": in no class folder
    location: Location


def check_data(
    data: Path | None,
    splits: Mapping[str, Path] | None = None,
    *,
    few: int = 10,
    near: float = MAX_DIFFERENCE,
    workers: int = 0,
) -> DataCheck:
    """Decode every image of a data set, and compare all of them.

    Args:
        data: class folders, or the folders train and val (and test) that hold them: a folder, a tar, or a folder
            in a tar. None: only `splits`.
        splits: name -> folder or tar of class folders, for splits that lie elsewhere.
        few: classes with fewer images are listed; 0: none.
        near: how much pictures may differ that are nearly the same, 0 to 1; 0: these are not looked for.
        workers: processes that decode; 0: this one. The result does not depend on it.

    Raises:
        UsageError: a bad number, no data, or two splits of one name.
        UnreadableFile: no such folder or tar, or no images there. Images that cannot be read are in the result.
    """
    if few < 0:
        raise UsageError(f"--few {few}: expected at least 0")
    if not 0 <= near <= 1:
        raise UsageError(f"--near {near}: expected 0 to 1")
    if workers < 0:
        raise UsageError(f"--workers {workers}: expected at least 0")
    trees = _find_splits(data, splits or {})
    images = list(_images(trees))
    if not images:
        raise UnreadableFile(f"{', '.join(str(path) for path, _ in trees.values())}: no images in it")
    unreadable: list[Unreadable] = []
    facts: dict[int, Facts] = {}
    thumbnails = np.empty((len(images), SIDE * SIDE * 3), np.uint8)
    jobs = [(index, image.name, image.location) for index, image in enumerate(images)]
    with progress("checking", len(images)) as advance, contextlib.closing(each(jobs, examine, workers)) as results:
        for (index, name, _), found in zip(jobs, results, strict=True):
            if isinstance(found, BadImages):
                unreadable.append(Unreadable(name, str(found).removeprefix(f"{name}: ")))
            else:
                thumbnails[index] = np.frombuffer(found.thumbnail, np.uint8)
                facts[index] = found._replace(thumbnail=b"")  # of a million images it would be kept twice
            advance(1)
    duplicates, near_duplicates = _same(images, facts, thumbnails, near)
    counted = tuple(_count(name, path, tree, few) for name, (path, tree) in trees.items())
    return DataCheck(
        counted,
        few,
        tuple(unreadable),
        {
            kind: names
            for kind in ODD
            if (names := tuple(images[index].name for index, found in facts.items() if kind in found.odd))
        },
        dict(sorted(collections.Counter(found.mode for found in facts.values()).items())),
        duplicates,
        near_duplicates,
        _missing(counted),
    )


def _find_splits(data: Path | None, elsewhere: Mapping[str, Path]) -> dict[str, tuple[Path, Tree]]:
    """Name -> path and content, in the order in which they are shown."""
    if data is None and not elsewhere:
        raise UsageError("check-data: expected a folder or tar of class folders, or --split NAME=PATH")
    found: dict[str, tuple[Path, Tree]] = {}
    if data is not None:
        layout = find_layout(open_source(data))
        source = layout.source
        for note in layout.notes:
            logger.info(note)
        if layout.splits:
            found = {name: (split.path, split.tree()) for name, split in layout.splits.items()}
            beside = [*layout.others, *filter(is_image, source.files())]
            logger.info(
                f"{source.path} has the folders {', '.join(found)}: each is a split"
                + (f"; not looked at: {', '.join(beside[:5])}{', ...' if len(beside) > 5 else ''}" if beside else "")
            )
        else:
            found = {source.path.resolve().name: (source.path, source.tree())}
            logger.info(f"{source.path} has no folders train and val: it is one split, and its folders are the classes")
    for name, path in elsewhere.items():
        if name in found:
            raise UsageError(f"--split {name}={path}: {found[name][0]} is already the split {name}")
        found[name] = (path, open_source(path).tree())
    return found


def _images(trees: Mapping[str, tuple[Path, Tree]]) -> Iterable[_Image]:
    for split, (_, tree) in trees.items():
        for name, location in tree.files.items():
            if is_image(name):
                label = name.split("/")[0] if "/" in name else ""
                yield _Image(f"{split}/{name}" if len(trees) > 1 else name, split, label, location)


def _count(name: str, path: Path, tree: Tree, few: int) -> Split:
    classes = dict.fromkeys(tree.tops(), 0)
    others: collections.Counter[str] = collections.Counter()
    outside = []
    for file in tree.files:
        if not is_image(file):
            others.update([posixpath.splitext(file)[1].lower()] if "/" in file else [])
        elif "/" in file:
            classes[file.split("/")[0]] += 1
        else:
            outside.append(file)
    sizes = [count for count in classes.values() if count]
    return Split(
        name,
        path,
        classes,
        tuple(label for label, count in classes.items() if not count),
        tuple(label for label, count in classes.items() if 0 < count < few),
        max(sizes) / min(sizes) if sizes else None,
        dict(sorted(others.items())),
        tuple(outside),
    )


def _missing(splits: Sequence[Split]) -> dict[str, tuple[str, ...]]:
    labeled = [split for split in splits if split.classes]  # a test set may have no labels at all
    lacking = {
        label: tuple(split.name for split in labeled if label not in split.classes)
        for label in sorted({label for split in labeled for label in split.classes})
    }
    return {label: names for label, names in lacking.items() if names}


def examine(_: int, name: str, location: Location) -> Facts:
    """Read and decode an image.

    Raises:
        BadImages: it cannot be read.
    """
    content = read_file(name, location)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's about odd images: what is odd is in the result
        with opened(io.BytesIO(content), name) as image:
            mode, transparent = image.mode, image.has_transparency_data
            rgb = as_rgb(image)
            orientation = 1
            with contextlib.suppress(Exception):  # damaged tags do not keep an image from being read
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    mark = fingerprint(rgb)
    shorter, longer = sorted(rgb.size)
    kinds = {
        "small": shorter < SMALL,
        "long": longer > LONG * shorter,
        "flat": mark.contrast < FLAT,
        "cmyk": mode == "CMYK",
        "transparent": transparent,
        "deep": mode.startswith(DEEP),
        "rotated": orientation in range(2, 9),
    }
    tells = shorter >= SIDE and not kinds["flat"]
    return Facts(
        hashlib.sha256(content).digest()[:16],
        _pixel_digest(rgb),
        mode,
        tuple(kind for kind, so in kinds.items() if so),
        mark.hash if tells else b"",
        mark.thumbnail,
    )


def _pixel_digest(image: Image.Image) -> bytes:
    digest = hashlib.sha256(f"{image.width} x {image.height}\n".encode())
    digest.update(image.tobytes())
    return digest.digest()[:16]


def _same(
    images: Sequence[_Image], facts: Mapping[int, Facts], thumbnails: np.ndarray, limit: float
) -> tuple[tuple[Same, ...], tuple[Same, ...]]:
    """Groups with the same pixels, and groups that are nearly the same."""
    by_pixels: dict[bytes, list[int]] = {}
    for index, found in facts.items():
        by_pixels.setdefault(found.pixels, []).append(index)
    exact = [
        _group(images, "file" if len({facts[index].file for index in members}) == 1 else "pixels", members)
        for members in by_pixels.values()
        if len(members) > 1
    ]
    # One of each picture is compared; the others of its group come with it.
    telling = [members[0] for members in by_pixels.values() if limit and facts[members[0]].hash]
    hashes = np.frombuffer(b"".join(facts[index].hash for index in telling), np.uint8).reshape(-1, 8)
    with progress("comparing", PASSES, "passes") as advance:
        pairs = similar_pairs(hashes, thumbnails[telling], limit, advance)
    parents = list(range(len(telling)))

    def root(place: int) -> int:
        while parents[place] != place:
            parents[place] = place = parents[parents[place]]
        return place

    for pair in pairs:
        parents[root(pair.second)] = root(pair.first)
    alike: dict[int, set[int]] = {}
    differences: dict[int, float] = {}
    for pair in pairs:
        top = root(pair.first)
        alike.setdefault(top, set()).update((pair.first, pair.second))
        differences[top] = max(differences.get(top, 0.0), pair.difference)
    near = []
    for top, places in alike.items():
        members = sorted(index for place in places for index in by_pixels[facts[telling[place]].pixels])
        near.append(_group(images, "near", members, round(differences[top], 3)))
    return tuple(sorted(exact, key=_worst_first)), tuple(sorted(near, key=_worst_first))


def _group(
    images: Sequence[_Image], match: Literal["file", "pixels", "near"], members: Sequence[int], difference: float = 0.0
) -> Same:
    chosen = [images[index] for index in members]
    return Same(
        match,
        tuple(image.name for image in chosen),
        tuple(dict.fromkeys(image.split for image in chosen)),
        tuple(sorted({image.label for image in chosen} - {""})),
        difference,
    )


def _worst_first(group: Same) -> tuple[int, float, tuple[str, ...]]:
    return -(len(group.classes) > 1) - (len(group.splits) > 1), group.difference, group.images
