"""Look over a data set of class folders before training on it: what cannot be read, what stands there twice."""

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
LONG = 4  # longer over shorter side
FLAT = 4  # of 255, the standard deviation of the picture at 16 x 16 pixels
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
_GROUPS, _EXAMPLES = 20, 3  # shown in the tables


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
class DuplicateGroup:
    """Images that show the same picture.

    Attributes:
        match: "file": the same bytes; "pixels": the same when decoded.
        images: in the order of the splits, then by name.
        splits: that they are in.
        classes: that they are in; more than one: a label is wrong.
    """

    match: Literal["file", "pixels"]
    images: tuple[str, ...]
    splits: tuple[str, ...]
    classes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """An image by name, and why it cannot be read."""

    image: str
    reason: str


@dataclasses.dataclass(frozen=True)
class DataCheck:
    """The findings of `check_data`. Images are named class/file, with more than one split split/class/file.

    Attributes:
        splits: each with its counts.
        few: the number of images below which a class has few.
        unreadable: what no command can read; left out below.
        odd: kind (a key of `ODD`) -> images of that kind; kinds without images are left out.
        modes: Pillow's mode ("RGB", "L", ...) -> number of images.
        duplicates: groups of images with the same pixels, the worst first.
        missing: class -> splits that have class folders, but not this one.
    """

    splits: tuple[Split, ...]
    few: int
    unreadable: tuple[Unreadable, ...]
    odd: Mapping[str, tuple[str, ...]]
    modes: Mapping[str, int]
    duplicates: tuple[DuplicateGroup, ...]
    missing: Mapping[str, tuple[str, ...]]

    def __repr__(self) -> str:
        return f"DataCheck({counted(self.images, 'image')}, {'nothing found' if self.clean else 'with findings'})"

    @property
    def images(self) -> int:
        return sum(split.images for split in self.splits)

    @property
    def clean(self) -> bool:
        """Report whether there is nothing to look at. Imbalance alone is no finding."""
        return not any(names for _, names in self._findings())

    @property
    def exit_code(self) -> int:
        return BadImages.exit_code if self.unreadable else 0

    def tables(self) -> Iterator[Any]:
        """Yield the counts of each split, the findings with examples, and groups of images that show one picture."""
        from fcvit.report import tables

        columns = ("images", "classes", "smallest", "largest", "imbalance")
        counts = tables.table("split", *columns, title=counted(self.images, "image"), right=columns)
        for split in self.splits:
            sizes = [count for count in split.classes.values() if count]
            cells = [str(min(sizes)), str(max(sizes)), f"{split.imbalance:.1f}"] if sizes else []
            counts.add_row(split.name, str(split.images), str(len(split.classes)), *cells)
        if self.clean:
            counts.caption, counts.caption_justify = "nothing found", "left"
        yield counts
        if self.clean:
            return
        rows: list[Sequence[Any]] = []
        for what, names in self._findings():
            if isinstance(names, Mapping):  # ending -> number of files
                endings = [f"{ending or 'no ending'} ({count})" for ending, count in names.items()]
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
            yield tables.table(*columns, rows=rows, title="images of one picture", limit=_GROUPS, more=more)
        if self.unreadable:
            yield tables.unreadable([f"{bad.image}: {bad.reason}" for bad in self.unreadable])

    def _findings(self) -> Iterator[tuple[str, Sequence[str] | Mapping[str, int]]]:
        """Yield each kind of finding in words, with what there is of it, perhaps nothing."""
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
            yield f"classes of fewer than {self.few} images{of}", few
            yield f"images in no class folder{of}", split.outside
        yield from ((what, self.odd.get(kind, ())) for kind, what in ODD.items())
        for split in self.splits:
            yield f"files that are no images{f', {split.name}' if several else ''}", split.other_files


class Examined(NamedTuple):
    """The report of a worker on one image; digests have 16 bytes."""

    file: bytes
    pixels: bytes
    mode: str
    odd: tuple[str, ...]


class _Image(NamedTuple):
    name: str
    split: str
    label: str  # "": in no class folder
    location: Location


def check_data(
    data: File | None = None,
    *,
    split: Annotated[Sequence[str] | None, Parameter(negative=())] = None,
    few: int = 10,
    workers: int | None = None,
    near: Annotated[float | None, Parameter(show=False)] = None,
) -> DataCheck:
    """Look over class folders before training: what cannot be read, what is there twice, odd images.

    Args:
        data: Class folders, or the folders train and val (and test) of them; also a tar, or a folder in one.
        split: A split that lies elsewhere, as NAME=PATH; may be given several times.
        few: List classes with fewer images than this; 0: none.
        workers: Processes that decode images (default: one for each core, at most 8); 0: none. The result does not
            depend on it.
        near: Accepted from earlier versions, without effect.

    Raises:
        UsageError: a bad number, no data, or two splits of one name.
        UnreadableFile: no such folder or tar, or no images there. Images that cannot be read are in the result.
    """
    if near:
        logger.info("near duplicates are no longer looked for, exact ones are; --near goes with the next version")
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
        raise UnreadableFile(f"{', '.join(str(source.path) for source, _ in sources.values())}: no images in it")
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
    odd = {kind: tuple(image.name for image, seen in readable.items() if kind in seen.odd) for kind in ODD}
    splits = tuple(_count(name, source, tree, few) for name, (source, tree) in sources.items())
    return DataCheck(
        splits,
        few,
        tuple(unreadable),
        {kind: names for kind, names in odd.items() if names},
        dict(sorted(collections.Counter(seen.mode for seen in readable.values()).items())),
        _duplicates(readable),
        _missing(splits),
    )


def _split_sources(data: File | None, elsewhere: Iterable[str]) -> dict[str, Source]:
    """Return the splits by name, in the order in which they are shown."""
    splits: dict[str, Source] = {}
    if data is not None:
        layout = find_layout(open_source(Path(data)))
        source = layout.source
        for note in layout.notes:
            logger.info(note)
        if layout.splits:
            splits = dict(layout.splits)
            beside = [*layout.others, *filter(is_image, source.files())]
            ignored = f"; not looked at: {some(beside)}" if beside else ""
            logger.info(f"{source.path} has the folders {', '.join(splits)}: each is a split{ignored}")
        else:
            splits = {source.path.resolve().name: source}
            logger.info(f"{source.path} has no folders train and val: it is one split, and its folders are the classes")
    for text in elsewhere:
        name, _, path = text.partition("=")
        if not name or not path or "/" in name:
            raise UsageError(f"--split {text}: expected NAME=PATH, each name once and without /")
        if name in splits:
            raise UsageError(f"--split {text}: {splits[name].path} is already the split {name}")
        splits[name] = open_source(Path(path))
    if not splits:
        raise UsageError("check-data: expected a folder or tar of class folders, or --split NAME=PATH")
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
    labeled = [split for split in splits if split.classes]  # a test set may have no labels at all
    lacking = {
        label: tuple(split.name for split in labeled if label not in split.classes)
        for label in sorted({label for split in labeled for label in split.classes})
    }
    return {label: names for label, names in lacking.items() if names}


def examine(_: int, name: str, location: Location) -> Examined:
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
    """Group images with the same pixels; those under several labels and those that leak into another split first."""
    by_pixels: dict[bytes, list[_Image]] = {}
    for image, seen in images.items():
        by_pixels.setdefault(seen.pixels, []).append(image)
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
