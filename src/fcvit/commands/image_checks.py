"""The part of `fcvit check-data` that all kinds of data sets have in common: decode images, and compare them."""

import collections
import contextlib
import dataclasses
import hashlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image

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


@dataclasses.dataclass(frozen=True, repr=False)
class Check:
    """The findings about images that all kinds of data sets have in common.

    Attributes:
        splits: Counts of each split.
        few: Classes with less than this are listed.
        unreadable: Images, label maps or annotations that cannot be used. `odd`, `modes` and `duplicates` leave out
            images that cannot be read.
        odd: Kind (a key of `ODD`) -> images of this kind. Kinds without images are omitted.
        modes: Pillow mode ("RGB", "L", ...) -> number of images.
        duplicates: Groups of images with identical pixels, the most serious first.
    """

    splits: tuple[Any, ...]
    few: int
    unreadable: tuple[Unreadable, ...]
    odd: Mapping[str, tuple[str, ...]]
    modes: Mapping[str, int]
    duplicates: tuple[DuplicateGroup, ...]

    def __repr__(self) -> str:
        findings = "no findings" if self.clean else "with findings"
        return f"{type(self).__name__}({counted(self.images, 'image')}, {findings})"

    @property
    def images(self) -> int:
        return sum(split.images for split in self.splits)

    @property
    def clean(self) -> bool:
        """Return whether there are no findings. Class imbalance does not count as a finding."""
        return not any(names for _, names in self.findings())

    @property
    def exit_code(self) -> int:
        return BadImages.exit_code if self.unreadable else 0

    def findings(self) -> Iterator[Finding]:
        """Yield each kind of finding with its items, which may be empty. Subclasses add their own."""
        for where, groups in (
            ("", self.duplicates),
            (" in more than one split", [group for group in self.duplicates if len(group.splits) > 1]),
            (" in more than one class", [group for group in self.duplicates if len(group.classes) > 1]),
        ):
            yield f"groups of duplicates{where}", [group.images[0] for group in groups]
        yield from ((what, self.odd.get(kind, ())) for kind, what in ODD.items())

    def finding_tables(self, last: Any) -> Iterator[Any]:
        """Yield the last table of the counts, a table of the findings with examples, and a table of the duplicates."""
        from fcvit.report import tables

        rows: list[Sequence[Any]] = []
        for what, names in self.findings():
            if isinstance(names, Mapping):  # ending -> number of files
                endings = [f"{ending or 'no extension'} ({count})" for ending, count in names.items()]
                rows += [(what, str(sum(names.values())), ", ".join(endings))] if names else []
            elif names:
                rows.append((what, str(len(names)), some(names, _EXAMPLES)))
        if not rows:
            last.caption, last.caption_justify = "no findings", "left"
        yield last
        if rows:
            yield tables.table("finding", "number", "examples", rows=rows, right=("number",))
        if self.duplicates:
            rows = []
            for group in self.duplicates:
                others = len(group.images) - _EXAMPLES
                shown = tables.lines([*group.images[:_EXAMPLES], *([f"... and {others} more"] if others > 0 else [])])
                rows.append((group.match, shown, ", ".join(group.splits), ", ".join(group.classes)))
            columns, more = ("same", "images", "splits", "classes"), ("", "... and {} more groups")
            yield tables.table(*columns, rows=rows, title="duplicates", limit=_GROUPS, more=more)


class Examined(NamedTuple):
    """The findings of a worker about one image.

    The digests of the file and the pixels have 16 bytes each. The size is (height, width) after the EXIF orientation.
    """

    file: bytes
    pixels: bytes
    mode: str
    odd: tuple[str, ...]
    size: tuple[int, int]


class CheckedImage(NamedTuple):
    """An image of a data set. The label is "" outside of class folders."""

    name: str
    split: str
    label: str
    location: Location


@dataclasses.dataclass(frozen=True)
class ImageFindings:
    """The findings about the images of a data set, see `Check`. `readable` has the properties of each image."""

    unreadable: tuple[Unreadable, ...]
    readable: Mapping[CheckedImage, Examined]
    odd: Mapping[str, tuple[str, ...]]

    @property
    def modes(self) -> dict[str, int]:
        return dict(sorted(collections.Counter(examined.mode for examined in self.readable.values()).items()))

    @property
    def duplicates(self) -> tuple[DuplicateGroup, ...]:
        return _duplicates(self.readable)


def examine_images(images: Sequence[CheckedImage], workers: int, upright: bool = False) -> ImageFindings:
    """Decode all images, and look for unusual properties.

    Args:
        images: The images.
        workers: Number of processes that decode.
        upright: Whether the orientation tag is applied when the images are used, so that it is not a finding.
    """
    unreadable: list[Unreadable] = []
    readable: dict[CheckedImage, Examined] = {}
    jobs = [(index, image.name, image.location) for index, image in enumerate(images)]
    with progress("checking", len(images)) as advance, contextlib.closing(each(jobs, examine, workers)) as results:
        for image, result in zip(images, results, strict=True):
            if isinstance(result, BadImages):
                unreadable.append(Unreadable(image.name, str(result).removeprefix(f"{image.name}: ")))
            else:
                readable[image] = result
            advance(1)
    kinds = [kind for kind in ODD if not (upright and kind == "rotated")]
    odd = {kind: tuple(image.name for image, one in readable.items() if kind in one.odd) for kind in kinds}
    return ImageFindings(tuple(unreadable), readable, {kind: names for kind, names in odd.items() if names})


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
    width, height = rgb.size[::-1] if orientation in range(5, 9) else rgb.size
    return Examined(*digests, mode, tuple(kind for kind, applies in kinds.items() if applies), (height, width))


def _duplicates(images: Mapping[CheckedImage, Examined]) -> tuple[DuplicateGroup, ...]:
    """Group images with identical pixels. Groups with several labels and groups in several splits come first."""
    by_pixels: dict[bytes, list[CheckedImage]] = {}
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
