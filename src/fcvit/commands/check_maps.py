"""The part of `fcvit check-data` for images with label maps: count the pixels of each class."""

import contextlib
import dataclasses
import itertools
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fcvit.commands.image_checks import Check, Finding, Images, Unreadable, examine_images
from fcvit.data.class_colors import ClassList
from fcvit.data.classes import labels as class_labels
from fcvit.data.label_maps import LabelEncoding, LabelStats, check_labels, resolve_encoding, scan_labels
from fcvit.data.listed import Listed, total
from fcvit.data.segmentation import MapLayout, join, read_split
from fcvit.errors import BadImages, counted
from fcvit.report.progress import progress
from fcvit.tasks.segmentation.label_options import LabelOptions
from fcvit.text import some

logger = logging.getLogger("fcvit")

_IN_MEMORY = 64 << 20  # bytes of the stored statistics


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


@dataclasses.dataclass(frozen=True, repr=False)
class MapsCheck(Check):
    """The findings of `check_data` for images with label maps. Names are relative to the data set.

    EXIF orientations are not listed, because they are applied.

    Attributes:
        path: The data set.
        encoding: How the values in label maps were read.
        hints: Likely errors in the label maps.
    """

    splits: tuple[MapSplit, ...]
    path: Path
    encoding: LabelEncoding
    hints: tuple[str, ...]

    def tables(self) -> Iterator[Any]:
        """Yield tables of the counts of each split, the pixels of each class, the findings and the duplicates."""
        from fcvit.report import tables

        columns = ("images", "classes", "classes without pixels", "ignored pixels")
        title = f"{counted(self.images, 'image')} with label maps"
        counts = tables.table("split", *columns, title=title, right=columns)
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
        yield from self.finding_tables(shares)
        yield from (f"hint: {hint}" for hint in self.hints)

    def findings(self) -> Iterator[Finding]:
        unusable = Listed([bad.image for bad in self.unreadable], total(self.unreadable))
        yield "images and label maps that cannot be used", unusable
        for split in self.splits:
            of = f", {split.name}" if len(self.splits) > 1 else ""
            yield f"images without a label map{of}", split.unlabeled
            yield f"label maps without an image{of}", split.unused
            yield f"classes without pixels{of}", split.absent
            few = [f"{label} ({count})" for label, count in split.maps.items() if 0 < count < self.few]
            yield f"classes in fewer than {self.few} label maps{of}", few
            unknown = [f"{value} ({counted(pixels, 'pixel')})" for value, pixels in split.unknown.items()]
            yield f"values or colors without a class{of}", Listed(unknown, total(split.unknown))
        yield from super().findings()


def _share(split: MapSplit, label: str) -> str:
    pixels = split.pixels[label]
    return f"{pixels / sum(split.pixels.values()):.2%}" if pixels else "no pixels" if split.absent else ""


def check_maps(
    layout: MapLayout,
    listed: ClassList | None,
    options: LabelOptions,
    few: int,
    workers: int,
    command: Sequence[str],
) -> MapsCheck:
    """Check images with label maps.

    Args:
        layout: The data set.
        listed: The class list that the user passes, or None.
        options: How label maps are read.
        few: List classes in fewer label maps than this.
        workers: Processes that decode.
        command: The words of the user's command line, for messages.

    Raises:
        UsageError: Label maps contain only 0 and 255.
        UnreadableFile: A folder or file cannot be read.
        DoesNotFit: The label maps do not fit the class list.
    """
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
    examined = examine_images(
        [Images(name, split.names, split.locations) for name, split in splits.items()], workers, upright=True
    )
    everything = join(splits.values())
    with contextlib.closing(StoredStats()) as stats:
        with (
            progress("checking labels", len(everything)) as advance,
            contextlib.closing(scan_labels(everything, workers)) as results,
        ):
            for result in results:
                stats.add(result)
                advance(1)
        described = options.encoding(len(listed.classes) if listed else None, listed, layout.is_ade20k)
        encoding = resolve_encoding(everything, stats, described, command)
        names = class_labels(listed.classes) if listed else [str(index) for index in range(encoding.num_classes or 0)]
        remaining = iter(stats)
        checks = {
            name: check_labels(split, itertools.islice(remaining, len(split)), encoding)
            for name, split in splits.items()
        }
        unusable: list[Unreadable] = []
        for name, check in checks.items():
            labels = [(splits[name].labels[index].name, reason) for index, reason in check.bad]
            unusable += [Unreadable(label, reason.removeprefix(f"{label}: ")) for label, reason in labels]
        number = total(examined.unreadable) + sum(total(check.bad) for check in checks.values())
        return MapsCheck(
            splits=tuple(
                MapSplit(
                    name,
                    len(split),
                    Listed(split.unlabeled),
                    Listed(split.unused),
                    dict(zip(names, checks[name].pixels, strict=True)),
                    dict(zip(names, checks[name].maps, strict=True)),
                    checks[name].ignored,
                    checks[name].unknown,
                    checks[name].kinds,
                )
                for name, split in splits.items()
            ),
            few=few,
            unreadable=Listed((*examined.unreadable, *unusable), number),
            path=path,
            encoding=encoding,
            hints=check_labels(everything, stats, encoding).hints,
            **examined.common(),
        )


class StoredStats:
    """The results of `scan_labels`, which can be iterated repeatedly. They are on disk if they exceed 64 MB."""

    def __init__(self):
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115
        self._encoder = msgspec.msgpack.Encoder()

    def add(self, one: LabelStats | BadImages) -> None:
        content = self._encoder.encode(str(one) if isinstance(one, BadImages) else one)
        self._file.write(len(content).to_bytes(4, "little") + content)

    def close(self) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[LabelStats | BadImages]:
        decoder = msgspec.msgpack.Decoder(LabelStats | str)
        self._file.seek(0)
        while length := self._file.read(4):
            one = decoder.decode(self._file.read(int.from_bytes(length, "little")))
            yield BadImages(one) if isinstance(one, str) else one
