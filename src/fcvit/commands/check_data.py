"""Check a data set before training: find unreadable images and label maps, duplicates and unusual images."""

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
from fcvit.data.class_colors import ClassList, read_class_list
from fcvit.data.classes import labels as class_labels
from fcvit.data.folders import is_image
from fcvit.data.label_maps import LabelCheck, LabelEncoding, check_labels, resolve_encoding, scan_labels
from fcvit.data.loader import each, read_file
from fcvit.data.segmentation import MapLayout, find_maps, join, read_split
from fcvit.data.sources import Location, Source, Tree, open_source
from fcvit.data.splits import find_layout
from fcvit.data.transforms.preprocess import DEEP, as_rgb, opened
from fcvit.errors import BadImages, UnreadableFile, UsageError, counted
from fcvit.report.progress import progress
from fcvit.tasks.segmentation.label_options import LabelOptions
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
        yield from _finding_tables(self._findings(), self.duplicates)

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


def _finding_tables(
    findings: Iterable[tuple[str, Sequence[str] | Mapping[str, int]]], duplicates: Sequence[DuplicateGroup]
) -> Iterator[Any]:
    """Yield a table of the findings with examples, and a table of the duplicates."""
    from fcvit.report import tables

    rows: list[Sequence[Any]] = []
    for what, names in findings:
        if isinstance(names, Mapping):  # ending -> number of files
            endings = [f"{ending or 'no extension'} ({count})" for ending, count in names.items()]
            rows += [(what, str(sum(names.values())), ", ".join(endings))] if names else []
        elif names:
            rows.append((what, str(len(names)), some(names, _EXAMPLES)))
    yield tables.table("finding", "number", "examples", rows=rows, right=("number",))
    if duplicates:
        rows = []
        for group in duplicates:
            others = len(group.images) - _EXAMPLES
            shown = tables.lines([*group.images[:_EXAMPLES], *([f"... and {others} more"] if others > 0 else [])])
            rows.append((group.match, shown, ", ".join(group.splits), ", ".join(group.classes)))
        columns, more = ("same", "images", "splits", "classes"), ("", "... and {} more groups")
        yield tables.table(*columns, rows=rows, title="duplicates", limit=_GROUPS, more=more)


@dataclasses.dataclass(frozen=True)
class MapSplit:
    """The images and label maps of one split.

    Attributes:
        name: Name of the split. "all" for a data set without splits.
        images: Number of images with a label map.
        unlabeled: Images without a label map.
        unused: Label maps without an image.
        pixels: Class -> number of pixels. 0 means that the class never occurs.
        maps: Class -> number of label maps that contain it.
        ignored: Number of ignored pixels.
        unknown: Value or color without a class -> number of pixels.
        kinds: Form of the label maps (see `fcvit.data.label_maps.Kind`) -> number of files.
    """

    name: str
    images: int
    unlabeled: tuple[str, ...]
    unused: tuple[str, ...]
    pixels: Mapping[str, int]
    maps: Mapping[str, int]
    ignored: int
    unknown: Mapping[str, int]
    kinds: Mapping[str, int]

    @property
    def absent(self) -> list[str]:
        """Return the classes without pixels. The list is empty if no label map of the split can be used."""
        usable = any(self.pixels.values()) or self.ignored
        return [label for label, pixels in self.pixels.items() if not pixels] if usable else []


@dataclasses.dataclass(frozen=True)
class MapsCheck:
    """The findings of `check_data` for images with label maps. Names are relative to the data set.

    Attributes:
        path: The data set.
        splits: Counts of each split.
        encoding: How the values in label maps were read.
        few: Classes in fewer label maps than this are listed.
        unreadable: Images and label maps that cannot be used.
        odd, modes, duplicates: As in `DataCheck`. EXIF orientations are not listed, because they are applied.
        hints: Likely errors in the label maps.
    """

    path: Path
    splits: tuple[MapSplit, ...]
    encoding: LabelEncoding
    few: int
    unreadable: tuple[Unreadable, ...]
    odd: Mapping[str, tuple[str, ...]]
    modes: Mapping[str, int]
    duplicates: tuple[DuplicateGroup, ...]
    hints: tuple[str, ...]

    @property
    def clean(self) -> bool:
        """Return whether there are no findings."""
        return not any(names for _, names in self._findings())

    @property
    def exit_code(self) -> int:
        return BadImages.exit_code if self.unreadable else 0

    def tables(self) -> Iterator[Any]:
        """Yield tables of the counts of each split, the pixels of each class, the findings and the duplicates."""
        from fcvit.report import tables

        columns = ("images", "classes", "classes without pixels", "ignored pixels")
        title = counted(sum(split.images for split in self.splits), "image")
        counts = tables.table("split", *columns, title=f"{title} with label maps", right=columns)
        for split in self.splits:
            total = sum(split.pixels.values()) + split.ignored
            ignored = f"{split.ignored / total:.1%}" if total else ""
            absent = str(len(split.absent)) if total else ""
            counts.add_row(split.name, str(split.images), str(len(split.pixels)), absent, ignored)
        yield counts
        names = [split.name for split in self.splits]
        shares = tables.table("class", *names, title="share of labeled pixels", right=names)
        for label in list(self.splits[0].pixels)[: tables.SHOWN]:
            shares.add_row(label, *(_share(split, label) for split in self.splits))
        if (more := len(self.splits[0].pixels) - tables.SHOWN) > 0:
            shares.add_row(f"... and {more} more")
        if self.clean:
            shares.caption, shares.caption_justify = "no findings", "left"
        yield shares
        if not self.clean:
            yield from _finding_tables(self._findings(), self.duplicates)
        yield from (f"hint: {hint}" for hint in self.hints)

    def _findings(self) -> Iterator[tuple[str, Sequence[str] | Mapping[str, int]]]:
        """Yield a description of each kind of finding with its items, which may be empty."""
        yield "images and label maps that cannot be used", [bad.image for bad in self.unreadable]
        yield "groups of duplicates", [group.images[0] for group in self.duplicates]
        several = [group.images[0] for group in self.duplicates if len(group.splits) > 1]
        yield "groups of duplicates in more than one split", several
        for split in self.splits:
            of = f", {split.name}" if len(self.splits) > 1 else ""
            yield f"images without a label map{of}", split.unlabeled
            yield f"label maps without an image{of}", split.unused
            yield f"classes without pixels{of}", split.absent
            few = [f"{label} ({count})" for label, count in split.maps.items() if 0 < count < self.few]
            yield f"classes in fewer than {self.few} label maps{of}", few
            unknown = [f"{value} ({counted(pixels, 'pixel')})" for value, pixels in split.unknown.items()]
            yield f"values or colors without a class{of}", unknown
        yield from ((what, self.odd.get(kind, ())) for kind, what in ODD.items())


def _share(split: MapSplit, label: str) -> str:
    pixels = split.pixels[label]
    return f"{pixels / sum(split.pixels.values()):.2%}" if pixels else "no pixels" if split.absent else ""


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
    classes: File | None = None,
    labels: Annotated[LabelOptions | None, Parameter(name="*")] = None,
    near: Annotated[float | None, Parameter(show=False)] = None,
) -> DataCheck | MapsCheck:
    """Check a data set before training: find unreadable images and label maps, duplicates and unusual images.

    Args:
        data: Folder of class folders, or of train, val and test folders with class folders; or folders images and
            annotations with label maps, such as ADE20K. Also in a tar archive.
        split: A split in a different location, as NAME=PATH. Repeat the option for more splits.
        few: List classes with fewer images (or label maps) than this. 0 disables the check.
        workers: Processes that decode images (default: one per core, at most 8). 0 uses the main process.
        classes: Class list of label maps, with the columns red, green and blue if they contain colors (default:
            classes.csv in the data set, or ADE20K's classes).
        labels: How label maps are read.
        near: Accepted for compatibility, but ignored.

    Raises:
        UsageError: An option is invalid, no data is given, two splits have the same name, or label maps contain only 0
            and 255.
        UnreadableFile: A folder or tar archive does not exist or has no images. Unreadable images are in the result.
        DoesNotFit: The label maps do not fit the class list.
    """
    if near:
        logger.info("--near has no effect: near duplicates are not searched; the next version will not accept it")
    workers = decoding_processes(workers)
    for option, value in (("few", few), ("workers", workers)):
        if value < 0:
            raise UsageError(f"--{option} {value}: expected at least 0")
    labels = labels or LabelOptions()
    options = [*(("--classes", str(classes)) if classes is not None else ()), *labels.words()]
    if data is not None and not split and (layout := find_maps(open_source(Path(data)))):
        listed = read_class_list(Path(classes)) if classes is not None else None
        return _check_maps(layout, listed, labels, few, workers, ["fcvit", "check-data", str(data), *options])
    if options:
        raise UsageError(
            f"{options[0]} is for images with label maps, but {data or 'a split'} has no folders images and "
            "annotations that contain image files"
        )
    sources = {name: (source, source.tree()) for name, source in _split_sources(data, split or ()).items()}
    images = [
        _Image(f"{part}/{name}" if len(sources) > 1 else name, part, name.rpartition("/")[0].split("/")[0], location)
        for part, (_, tree) in sources.items()
        for name, location in tree.files.items()
        if is_image(name)
    ]
    if not images:
        raise UnreadableFile(f"{', '.join(str(source.path) for source, _ in sources.values())}: no images found")
    unreadable, readable, odd = _examine_images(images, workers)
    splits = tuple(_count(name, source, tree, few) for name, (source, tree) in sources.items())
    return DataCheck(
        splits,
        few,
        unreadable,
        odd,
        _modes(readable),
        _duplicates(readable),
        _missing(splits),
    )


def _examine_images(
    images: Sequence[_Image], workers: int
) -> tuple[tuple[Unreadable, ...], dict[_Image, Examined], dict[str, tuple[str, ...]]]:
    """Return the unreadable images, the properties of the others, and the unusual images of each kind."""
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
    return tuple(unreadable), readable, {kind: names for kind, names in odd.items() if names}


def _modes(images: Mapping[_Image, Examined]) -> dict[str, int]:
    return dict(sorted(collections.Counter(examined.mode for examined in images.values()).items()))


def _check_maps(
    layout: MapLayout,
    listed: ClassList | None,
    options: LabelOptions,
    few: int,
    workers: int,
    command: Sequence[str],
) -> MapsCheck:
    """Check images with label maps. `command` is the user's command line, for messages."""
    path = layout.source.path
    if listed is None and (listed := layout.class_list()):
        origin = "ADE20K's classes" if layout.is_ade20k else f"the classes in {path / 'classes.csv'}"
        logger.info(f"{path}: checked with {origin}")
    if options.reduce_zero_label is None and layout.is_ade20k:
        logger.info(f"{path}: 0 is ignored, as in ADE20K (--no-reduce-zero-label reads it as a class)")
    splits = {name: read_split(layout, name, options.label_suffix) for name in layout.splits}
    for note in (note for split in splits.values() for note in split.notes):
        logger.info(note)
    if layout.without_labels:
        logger.info(f"{path}: not checked, because there are no label maps: {some(layout.without_labels)}")
    images = [
        _Image(name, part, "", location)
        for part, split in splits.items()
        for name, location in zip(split.names, split.locations, strict=True)
    ]
    unreadable, readable, odd = _examine_images(images, workers)
    odd.pop("rotated", None)
    everything = join(splits.values())
    with progress("checking labels", len(images)) as advance:
        stats = []
        for result in scan_labels(everything, workers):
            stats.append(result)
            advance(1)
    described = options.encoding(len(listed.classes) if listed else None, listed, layout.is_ade20k)
    encoding = resolve_encoding(everything, stats, described, command)
    names = class_labels(listed.classes) if listed else [str(index) for index in range(encoding.num_classes or 0)]
    checks: dict[str, LabelCheck] = {}
    start = 0
    for name, split in splits.items():
        checks[name] = check_labels(split, stats[start : start + len(split)], encoding)
        start += len(split)
    unusable: list[Unreadable] = []
    for name, check in checks.items():
        labels = [(splits[name].labels[index].name, reason) for index, reason in check.bad]
        unusable += [Unreadable(label, reason.removeprefix(f"{label}: ")) for label, reason in labels]
    return MapsCheck(
        path,
        tuple(
            MapSplit(
                name,
                len(split),
                split.unlabeled,
                split.unused,
                dict(zip(names, checks[name].pixels, strict=True)),
                dict(zip(names, checks[name].maps, strict=True)),
                checks[name].ignored,
                checks[name].unknown,
                checks[name].kinds,
            )
            for name, split in splits.items()
        ),
        encoding,
        few,
        (*unreadable, *unusable),
        odd,
        _modes(readable),
        _duplicates(readable),
        check_labels(everything, stats, encoding).hints,
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
