"""The part of `fcvit check-data` that all kinds of data sets have in common: decode images, and compare them."""

import collections
import contextlib
import dataclasses
import hashlib
import heapq
import io
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from fcvit.data.listed import LISTED, Listed, total
from fcvit.data.loader import each, read_file
from fcvit.data.sources import Location
from fcvit.data.transforms.preprocess import DEEP, as_rgb, opened
from fcvit.errors import BadImages, counted
from fcvit.report.progress import progress
from fcvit.text import some

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
Finding = tuple[str, Sequence[str] | Mapping[str, int]]
"""A description of a kind of finding, and its items."""
_GROUPS, _EXAMPLES = 20, 3  # maximum numbers in the tables
_NAMES = 100 * LISTED  # maximum number of names in all groups of duplicates
_UNREADABLE = 1 << len(ODD)  # the bit after those of the kinds
_DIGESTS = np.dtype([("pixels", "<u8", 2), ("file", "<u8")])


@dataclasses.dataclass(frozen=True)
class DuplicateGroup:
    """A group of images with identical pixels.

    Attributes:
        match: "file" for identical files, "pixels" for different files with identical pixels.
        images: Names of the first images, sorted by split and name: at most 1,000, and about 100,000 in all groups.
        splits: Splits that contain the images.
        classes: Classes that contain the images. More than one class means that a label is wrong.
        number: Number of all images of the group.
    """

    match: Literal["file", "pixels"]
    images: tuple[str, ...]
    splits: tuple[str, ...]
    classes: tuple[str, ...]
    number: int


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """The name of an image that cannot be read, and the reason."""

    image: str
    reason: str

    def __str__(self) -> str:
        return f"{self.image}: {self.reason}"


@dataclasses.dataclass(frozen=True, repr=False)
class Check:
    """The findings about images that all kinds of data sets have in common.

    Of each kind of finding, the first 1,000 items are kept, and `counts` has the number of all items.

    Attributes:
        splits: Counts of each split.
        few: Classes with less than this are listed.
        unreadable: Images, label maps or annotations that cannot be used. `odd`, `modes` and `duplicates` leave out
            images that cannot be read.
        odd: Kind (a key of `ODD`) -> images of this kind. Kinds without images are omitted.
        modes: Pillow mode ("RGB", "L", ...) -> number of images.
        duplicates: Groups of images with identical pixels, the most serious first.
        across_splits, across_classes: Number of groups of duplicates in more than one split, and in more than one
            class.
        counts: Description of each kind of finding that occurs -> number of its items.
    """

    splits: tuple[Any, ...]
    few: int
    unreadable: tuple[Unreadable, ...]
    odd: Mapping[str, tuple[str, ...]]
    modes: Mapping[str, int]
    duplicates: tuple[DuplicateGroup, ...]
    across_splits: int
    across_classes: int
    counts: Mapping[str, int] = dataclasses.field(init=False)

    def __post_init__(self):
        counts = {what: total(items) for what, items in self.findings() if items}
        object.__setattr__(self, "counts", counts)  # the dataclass is frozen

    def __repr__(self) -> str:
        findings = "no findings" if self.clean else "with findings"
        return f"{type(self).__name__}({counted(self.images, 'image')}, {findings})"

    @property
    def images(self) -> int:
        return sum(split.images for split in self.splits)

    @property
    def clean(self) -> bool:
        """Return whether there are no findings. Class imbalance does not count as a finding."""
        return not self.counts

    @property
    def exit_code(self) -> int:
        return BadImages.exit_code if self.unreadable else 0

    def findings(self) -> Iterator[Finding]:
        """Yield each kind of finding with its items, which may be empty. Subclasses add their own."""
        names = [group.images[0] for group in self.duplicates]
        yield "groups of duplicates", Listed(names, total(self.duplicates))
        for where, members, number in (
            ("split", "splits", self.across_splits),
            ("class", "classes", self.across_classes),
        ):
            several = [
                name for name, group in zip(names, self.duplicates, strict=True) if len(getattr(group, members)) > 1
            ]
            yield f"groups of duplicates in more than one {where}", Listed(several, number)
        yield from ((what, self.odd.get(kind, ())) for kind, what in ODD.items())

    def finding_tables(self, last: Any) -> Iterator[Any]:
        """Yield the last table of the counts, a table of the findings with examples, and a table of the duplicates."""
        from fcvit.report import tables

        rows: list[Sequence[Any]] = []
        for what, names in self.findings():
            if isinstance(names, Mapping):  # ending -> number of files
                names = [f"{ending or 'no extension'} ({count})" for ending, count in names.items()]
                rows += [(what, str(self.counts[what]), some(names, tables.SHOWN))] if names else []
            elif names:
                rows.append((what, str(self.counts[what]), some(names, _EXAMPLES)))
        if not rows:
            last.caption, last.caption_justify = "no findings", "left"
        yield last
        if rows:
            yield tables.table("finding", "number", "examples", rows=rows, right=("number",))
        if self.duplicates:
            rows = []
            for group in self.duplicates:
                others = group.number - _EXAMPLES
                shown = tables.lines([*group.images[:_EXAMPLES], *([f"... and {others} more"] if others > 0 else [])])
                rows.append((group.match, shown, ", ".join(group.splits), ", ".join(group.classes)))
            columns, more = ("same", "images", "splits", "classes"), ("", "... and {} more groups")
            number = total(self.duplicates)
            yield tables.table(*columns, rows=rows, title="duplicates", limit=_GROUPS, more=more, number=number)


class Images(NamedTuple):
    """The images of a split.

    Attributes:
        split: Name of the split.
        names, locations: Name and location of each image.
        prefix: Text in front of the names in findings.
        in_classes: Whether the first folder in a name is the class of the image.
    """

    split: str
    names: Sequence[str]
    locations: Sequence[Location]
    prefix: str = ""
    in_classes: bool = False


class Examined(NamedTuple):
    """The findings of a worker about one image.

    The digests of the pixels (16 bytes) and of the file (8 bytes) are joined. Bit k of `odd` is kind k of `ODD`. The
    size is (height, width) after the EXIF orientation.
    """

    digests: bytes
    mode: str
    odd: int
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ImageFindings:
    """The findings about the images of all splits, in about 33 bytes per image, see `Check`.

    Attributes:
        splits: The images.
        reasons: Position -> reason of the first images that cannot be read. The reason can start with the name.
        modes: Pillow mode -> number of images.
        digests: Digests of the pixels and of the file of each image, `_DIGESTS` (images,).
        odd: Bits of the kinds of each image, see `Examined`, or `_UNREADABLE`, uint8 (images,).
        sizes: Height and width of each image, int32 (images, 2).
    """

    splits: Sequence[Images]
    reasons: Mapping[int, str]
    modes: Mapping[str, int]
    digests: np.ndarray
    odd: np.ndarray
    sizes: np.ndarray

    @property
    def unreadable(self) -> Listed[Unreadable]:
        """Return the images that cannot be read."""
        named = ((self.locate(position)[1], reason) for position, reason in self.reasons.items())
        items = (Unreadable(name, reason.removeprefix(f"{name}: ")) for name, reason in named)
        return Listed(items, int((~self.readable).sum()))

    @property
    def readable(self) -> np.ndarray:
        """Return which images can be read, bool (images,)."""
        return self.odd != _UNREADABLE

    def locate(self, position: Any) -> tuple[Images, str]:
        """Return the split of the image at a position in all splits, and its name in findings."""
        for images in self.splits:
            if position < len(images.names):
                return images, f"{images.prefix}{images.names[int(position)]}"
            position -= len(images.names)
        raise IndexError(position)

    def common(self) -> dict[str, Any]:
        """Return the fields of `Check` that all kinds of data sets have in common, except `unreadable`."""
        odd = {}
        for bit, kind in enumerate(ODD):
            positions = np.flatnonzero(self.odd & 1 << bit)
            if len(positions):
                odd[kind] = Listed((self.locate(i)[1] for i in positions[:LISTED]), len(positions))
        return {"odd": odd, "modes": self.modes} | self._duplicates()

    def _duplicates(self) -> dict[str, Any]:
        """Return the groups of images with identical pixels: the first, and their numbers.

        Groups with several classes and groups in several splits come first.
        """
        number = across_splits = across_classes = 0

        def groups() -> Iterator[tuple[int, str, np.ndarray, tuple[str, ...], tuple[str, ...]]]:
            nonlocal number, across_splits, across_classes
            for positions in self._same_pixels():
                splits: dict[str, None] = {}
                classes: set[str] = set()
                for images, name in map(self.locate, positions):
                    splits[images.split] = None
                    classes.add(_class_of(images, name))
                classes.discard("")
                number += 1
                across_splits += len(splits) > 1
                across_classes += len(classes) > 1
                serious = (len(splits) > 1) + (len(classes) > 1)
                yield -serious, self.locate(positions[0])[1], positions, tuple(splits), tuple(sorted(classes))

        first = heapq.nsmallest(LISTED, groups(), key=lambda group: group[:2])
        names = min(LISTED, _NAMES // max(1, len(first)))
        listed = [
            DuplicateGroup(
                "file" if len(np.unique(self.digests["file"][positions])) == 1 else "pixels",
                tuple(self.locate(position)[1] for position in positions[:names]),
                splits,
                classes,
                len(positions),
            )
            for _, _, positions, splits, classes in first
        ]
        across = {"across_splits": across_splits, "across_classes": across_classes}
        return {"duplicates": Listed(listed, number)} | across

    def _same_pixels(self) -> Iterator[np.ndarray]:
        """Yield the increasing positions of the images of each group with identical pixels."""
        positions = np.flatnonzero(self.readable)
        order = positions[np.lexsort(self.digests["pixels"][positions].T)]
        pixels = self.digests["pixels"][order]
        starts = np.flatnonzero(np.concatenate([[True], (pixels[1:] != pixels[:-1]).any(1)]))
        lengths = np.diff(starts, append=len(order))
        for start, length in zip(starts[lengths > 1].tolist(), lengths[lengths > 1].tolist(), strict=True):
            yield order[start : start + length]


def _class_of(images: Images, name: str) -> str:
    """Return the class of an image, or "" outside of class folders."""
    return name.removeprefix(images.prefix).rpartition("/")[0].split("/")[0] if images.in_classes else ""


def examine_images(splits: Sequence[Images], workers: int, upright: bool = False) -> ImageFindings:
    """Decode all images, and look for unusual properties.

    Args:
        splits: The images of each split.
        workers: Number of processes that decode.
        upright: Whether the orientation tag is applied when the images are used, so that it is not a finding.
    """
    kinds = sum(1 << bit for bit, kind in enumerate(ODD) if not (upright and kind == "rotated"))
    nothing = Examined(bytes(_DIGESTS.itemsize), "", _UNREADABLE, (0, 0))
    jobs = (
        (0, f"{images.prefix}{name}", location)
        for images in splits
        for name, location in zip(images.names, images.locations, strict=True)
    )
    digests, odd, sizes = bytearray(), bytearray(), array("i")
    modes: collections.Counter[str] = collections.Counter()
    reasons: dict[int, str] = {}  # position -> reason of the first unreadable images
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # Pillow warns about unusual images, which the result lists
        advance = stack.enter_context(progress("checking", sum(len(images.names) for images in splits)))
        for result in stack.enter_context(contextlib.closing(each(jobs, examine, workers))):
            if isinstance(result, BadImages):
                if len(reasons) < LISTED:
                    reasons[len(odd)] = str(result)
                one = nothing
            else:
                one = result
                modes[one.mode] += 1
            digests += one.digests
            odd.append(one.odd & (kinds | _UNREADABLE))
            sizes.extend(one.size)
            advance(1)
    return ImageFindings(
        splits,
        reasons=reasons,
        modes=dict(sorted(modes.items())),
        digests=np.frombuffer(digests, _DIGESTS),
        odd=np.frombuffer(odd, np.uint8),
        sizes=np.frombuffer(sizes, np.int32).reshape(-1, 2),
    )


def examine(_: int, name: str, location: Location) -> Examined:
    """Read and decode an image, and look for unusual properties.

    Raises:
        BadImages: The image cannot be read.
    """
    content = read_file(name, location)
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
    digests = pixels.digest()[:16] + hashlib.sha256(content).digest()[:8]
    width, height = rgb.size[::-1] if orientation in range(5, 9) else rgb.size
    return Examined(digests, mode, sum(1 << bit for bit, kind in enumerate(ODD) if kinds[kind]), (height, width))
