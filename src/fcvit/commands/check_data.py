"""Check a dataset of class folders before training: find unreadable images, duplicates and unusual images."""

import collections
import contextlib
import dataclasses
import hashlib
import io
import logging
import posixpath
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from cyclopts import Parameter
from PIL import ExifTags, Image

from fcvit.commands.options import File, decoding_processes
from fcvit.data.folders import is_image
from fcvit.data.loader import each, read_file
from fcvit.data.sources import Location, Source, Tree, open_source
from fcvit.data.splits import find_layout
from fcvit.data.transforms.preprocess import DEEP, as_rgb, opened
from fcvit.errors import BadImages, UnreadableFile, UsageError, counted
from fcvit.report.progress import progress
from fcvit.text import some

logger = logging.getLogger("fcvit")

SMALL = 32  # pixels of the shorter side
LONG = 4  # ratio of the longer side to the shorter side
FLAT = 4  # standard deviation of pixel values (0 to 255) at 16 x 16 pixels
# Kinds of images that look different to the network than to people. They can still be used for training.
ODD = {
    "small": f"a side shorter than {SMALL} pixels",
    "long": f"the longer side over {LONG} times the shorter side",
    "flat": "almost uniform color",
    "cmyk": "CMYK, converted without its color profile",
    "transparent": "transparency, which is dropped",
    "deep": "16 or 32 bits per channel, reduced to 8",
    "rotated": "an EXIF orientation, which is not applied",
}
_GROUPS, _EXAMPLES = 20, 3  # maximum numbers in the tables


@dataclasses.dataclass(frozen=True)
class Split:
    """The counts of one split.

    Attributes:
        name: Name of the split, for example train or val.
        path: The folder or tar archive.
        classes: Class folder -> number of files with an image extension, including unreadable images. Sorted by name.
        empty: Class folders without images.
        few: Class folders with at least one image, but fewer than the limit.
        imbalance: Size of the largest class divided by the size of the smallest class that has images. None if no
            class has images.
        other_files: Extension (lower case, "" for none) -> number of files in class folders that are not images.
        outside: Images outside of class folders. They are checked, but not used for training.
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
class DuplicateGroup:
    """A group of images with identical pixels.

    Attributes:
        match: "file" for identical files, "pixels" for different files with identical pixels.
        images: Names of the images, sorted by split and name.
        splits: Splits that contain the images.
        classes: Classes that contain the images. More than one class means that a label is wrong.
    """

    match: Literal["file", "pixels"]
    images: tuple[str, ...]
    splits: tuple[str, ...]
    classes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """The name of an image that cannot be read, and the reason."""

    image: str
    reason: str

    def __str__(self) -> str:
        return f"{self.image}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class DataCheck:
    """The findings of `check_data`.

    Images are named class/file if there is one split, and split/class/file if there are several.

    Attributes:
        splits: Counts of each split.
        few: Classes with fewer images than this are listed.
        unreadable: Images that cannot be read. The following fields do not include them.
        odd: Kind (a key of `ODD`) -> images of this kind. Kinds without images are omitted.
        modes: Pillow mode ("RGB", "L", ...) -> number of images.
        duplicates: Groups of images with identical pixels, the most serious first.
        missing: Class -> splits that have class folders, but not for this class.
    """

    splits: tuple[Split, ...]
    few: int
    unreadable: tuple[Unreadable, ...]
    odd: Mapping[str, tuple[str, ...]]
    modes: Mapping[str, int]
    duplicates: tuple[DuplicateGroup, ...]
    missing: Mapping[str, tuple[str, ...]]

    def __repr__(self) -> str:
        return f"DataCheck({counted(self.images, 'image')}, {'no findings' if self.clean else 'with findings'})"

    @property
    def images(self) -> int:
        return sum(split.images for split in self.splits)

    @property
    def clean(self) -> bool:
        """Return whether there are no findings. Class imbalance does not count as a finding."""
        return not any(names for _, names in self._findings())

    @property
    def exit_code(self) -> int:
        return BadImages.exit_code if self.unreadable else 0

    def tables(self) -> Iterator[Any]:
        """Yield tables of the counts of each split, the findings with examples, and the duplicates."""
        from fcvit.report import tables

        columns = ("images", "classes", "smallest", "largest", "imbalance")
        counts = tables.table("split", *columns, title=counted(self.images, "image"), right=columns)
        for split in self.splits:
            sizes = [count for count in split.classes.values() if count]
            cells = [str(min(sizes)), str(max(sizes)), f"{split.imbalance:.1f}"] if sizes else []
            counts.add_row(split.name, str(split.images), str(len(split.classes)), *cells)
        if self.clean:
            counts.caption, counts.caption_justify = "no findings", "left"
        yield counts
        if self.clean:
            return
        rows: list[Sequence[Any]] = []
        for what, names in self._findings():
            if isinstance(names, Mapping):  # ending -> number of files
                endings = [f"{ending or 'no extension'} ({count})" for ending, count in names.items()]
                rows += [(what, str(sum(names.values())), ", ".join(endings))] if names else []
            elif names:
                rows.append((what, str(len(names)), some(names, _EXAMPLES)))
        yield tables.table("finding", "number", "examples", rows=rows, right=("number",))
        if self.duplicates:
            rows = []
            for group in self.duplicates:
                others = len(group.images) - _EXAMPLES
                shown = tables.lines([*group.images[:_EXAMPLES], *([f"... and {others} more"] if others > 0 else [])])
                rows.append((group.match, shown, ", ".join(group.splits), ", ".join(group.classes)))
            columns, more = ("same", "images", "splits", "classes"), ("", "... and {} more groups")
            yield tables.table(*columns, rows=rows, title="duplicates", limit=_GROUPS, more=more)

    def _findings(self) -> Iterator[tuple[str, Sequence[str] | Mapping[str, int]]]:
        """Yield a description of each kind of finding with its items, which may be empty."""
        several = len(self.splits) > 1
        yield "unreadable", [bad.image for bad in self.unreadable]
        for where, groups in (
            ("", self.duplicates),
            (" in more than one split", [group for group in self.duplicates if len(group.splits) > 1]),
            (" in more than one class", [group for group in self.duplicates if len(group.classes) > 1]),
        ):
            yield f"groups of duplicates{where}", [group.images[0] for group in groups]
        yield "classes not in every split", [f"{label} not in {', '.join(n)}" for label, n in self.missing.items()]
        for split in self.splits:
            of = f", {split.name}" if several else ""
            yield f"empty class folders{of}", split.empty
            few = [f"{label} ({split.classes[label]})" for label in split.few]
            yield f"classes with fewer than {self.few} images{of}", few
            yield f"images outside of class folders{of}", split.outside
        yield from ((what, self.odd.get(kind, ())) for kind, what in ODD.items())
        for split in self.splits:
            yield f"files that are not images{f', {split.name}' if several else ''}", split.other_files


class Examined(NamedTuple):
    """The findings of a worker about one image. The digests of the file and the pixels have 16 bytes each."""

    file: bytes
    pixels: bytes
    mode: str
    odd: tuple[str, ...]


class _Image(NamedTuple):
    name: str
    split: str
    label: str  # "" outside of class folders
    location: Location


def check_data(
    data: File | None = None,
    *,
    split: Annotated[Sequence[str] | None, Parameter(negative=())] = None,
    few: int = 10,
    workers: int | None = None,
    near: Annotated[float | None, Parameter(show=False)] = None,
) -> DataCheck:
    """Check class folders before training: find unreadable images, duplicates and unusual images.

    Args:
        data: Folder of class folders, or of train, val and test folders with class folders. Also in a tar archive.
        split: A split in a different location, as NAME=PATH. Repeat the option for more splits.
        few: List classes with fewer images than this. 0 disables the check.
        workers: Processes that decode images (default: one per core, at most 8). 0 uses the main process.
        near: Accepted for compatibility, but ignored.

    Raises:
        UsageError: A number is invalid, no data is given, or two splits have the same name.
        UnreadableFile: A folder or tar archive does not exist or has no images. Unreadable images are in the result.
    """
    if near:
        logger.info("--near has no effect: near duplicates are not searched; the next version will not accept it")
    workers = decoding_processes(workers)
    for option, value in (("few", few), ("workers", workers)):
        if value < 0:
            raise UsageError(f"--{option} {value}: expected at least 0")
    sources = {name: (source, source.tree()) for name, source in _split_sources(data, split or ()).items()}
    images = [
        _Image(f"{part}/{name}" if len(sources) > 1 else name, part, name.rpartition("/")[0].split("/")[0], location)
        for part, (_, tree) in sources.items()
        for name, location in tree.files.items()
        if is_image(name)
    ]
    if not images:
        raise UnreadableFile(f"{', '.join(str(source.path) for source, _ in sources.values())}: no images found")
    unreadable: list[Unreadable] = []
    readable: dict[_Image, Examined] = {}
    jobs = [(index, image.name, image.location) for index, image in enumerate(images)]
    with progress("checking", len(images)) as advance, contextlib.closing(each(jobs, examine, workers)) as results:
        for image, result in zip(images, results, strict=True):
            if isinstance(result, BadImages):
                unreadable.append(Unreadable(image.name, str(result).removeprefix(f"{image.name}: ")))
            else:
                readable[image] = result
            advance(1)
    odd = {kind: tuple(image.name for image, examined in readable.items() if kind in examined.odd) for kind in ODD}
    splits = tuple(_count(name, source, tree, few) for name, (source, tree) in sources.items())
    return DataCheck(
        splits,
        few,
        tuple(unreadable),
        {kind: names for kind, names in odd.items() if names},
        dict(sorted(collections.Counter(examined.mode for examined in readable.values()).items())),
        _duplicates(readable),
        _missing(splits),
    )


def _split_sources(data: File | None, extra_splits: Iterable[str]) -> dict[str, Source]:
    """Return the source of each split by name, in display order."""
    splits: dict[str, Source] = {}
    if data is not None:
        layout = find_layout(open_source(Path(data)))
        source = layout.source
        for note in layout.notes:
            logger.info(note)
        if layout.splits:
            splits = dict(layout.splits)
            others = [*layout.others, *filter(is_image, source.files())]
            ignored = f"; ignored: {some(others)}" if others else ""
            logger.info(f"{source.path} has the folders {', '.join(splits)}: each is a split{ignored}")
        else:
            splits = {source.path.resolve().name: source}
            logger.info(f"{source.path} has no folders train and val: its folders are the classes of one split")
    for text in extra_splits:
        name, _, path = text.partition("=")
        if not name or not path or "/" in name:
            raise UsageError(f"--split {text}: expected NAME=PATH with unique names that contain no /")
        if name in splits:
            raise UsageError(f"--split {text}: {splits[name].path} is already the split {name}; choose another name")
        splits[name] = open_source(Path(path))
    if not splits:
        raise UsageError("check-data: expected a folder or tar archive of class folders, or --split NAME=PATH")
    return splits


def _count(name: str, source: Source, tree: Tree, few: int) -> Split:
    inside = [file for file in tree.files if "/" in file]
    images = collections.Counter(file.split("/")[0] for file in inside if is_image(file))
    others = collections.Counter(posixpath.splitext(file)[1].lower() for file in inside if not is_image(file))
    classes = {label: images[label] for label in source.folders()}
    sizes = [count for count in classes.values() if count]
    return Split(
        name,
        source.path,
        classes,
        tuple(label for label, count in classes.items() if not count),
        tuple(label for label, count in classes.items() if 0 < count < few),
        max(sizes) / min(sizes) if sizes else None,
        dict(sorted(others.items())),
        tuple(file for file in tree.files if "/" not in file and is_image(file)),
    )


def _missing(splits: Sequence[Split]) -> dict[str, tuple[str, ...]]:
    labeled = [split for split in splits if split.classes]  # a test set may be unlabeled
    lacking = {
        label: tuple(split.name for split in labeled if label not in split.classes)
        for label in sorted({label for split in labeled for label in split.classes})
    }
    return {label: names for label, names in lacking.items() if names}


def examine(_: int, name: str, location: Location) -> Examined:
    """Read and decode an image, and look for unusual properties.

    Raises:
        BadImages: The image cannot be read.
    """
    content = read_file(name, location)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about unusual images, which the result lists
        with opened(io.BytesIO(content), name) as image:
            mode, transparent = image.mode, image.has_transparency_data
            rgb = as_rgb(image)
            orientation = 1
            with contextlib.suppress(Exception):  # an image with damaged tags is still readable
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    shorter, longer = sorted(rgb.size)
    kinds = {
        "small": shorter < SMALL,
        "long": longer > LONG * shorter,
        "flat": np.asarray(rgb.resize((16, 16), Image.Resampling.BOX)).std() < FLAT,
        "cmyk": mode == "CMYK",
        "transparent": transparent,
        "deep": mode.startswith(DEEP),
        "rotated": orientation in range(2, 9),
    }
    pixels = hashlib.sha256(f"{rgb.width} x {rgb.height}\n".encode())
    pixels.update(rgb.tobytes())
    digests = hashlib.sha256(content).digest()[:16], pixels.digest()[:16]
    return Examined(*digests, mode, tuple(kind for kind, applies in kinds.items() if applies))


def _duplicates(images: Mapping[_Image, Examined]) -> tuple[DuplicateGroup, ...]:
    """Group images with identical pixels. Groups with several labels and groups in several splits come first."""
    by_pixels: dict[bytes, list[_Image]] = {}
    for image, examined in images.items():
        by_pixels.setdefault(examined.pixels, []).append(image)
    groups = [
        DuplicateGroup(
            "file" if len({images[member].file for member in members}) == 1 else "pixels",
            tuple(member.name for member in members),
            tuple(dict.fromkeys(member.split for member in members)),
            tuple(sorted({member.label for member in members} - {""})),
        )
        for members in by_pixels.values()
        if len(members) > 1
    ]
    return tuple(sorted(groups, key=lambda g: (-(len(g.classes) > 1) - (len(g.splits) > 1), g.images)))
