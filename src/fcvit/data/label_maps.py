"""Read label maps of semantic segmentation, and check them before a training.

The files contain class indices (gray or palette images, with 8 or 16 bits) or the colors of a class list. In memory a
label map is uint8 (H, W): class indices, and 255 (`IGNORED`) for pixels that are ignored in loss and metrics.
"""

import collections
import dataclasses
import functools
import io
import shlex
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from fcvit.data.class_colors import IGNORED, Color
from fcvit.data.listed import LISTED, Listed, ListedMapping
from fcvit.data.loader import Dataset, Workers, each, read_file
from fcvit.data.sources import Location
from fcvit.data.transforms.preprocess import opened
from fcvit.errors import BadImages, DoesNotFit, UsageError, counted
from fcvit.text import some

MOST_CLASSES = 254
"""The largest number of classes."""
Kind = Literal["index", "palette", "gray", "color"]
"""The form of a label file: one channel, palette, three equal channels, or three different channels."""

_UNKNOWN = 254  # marks values without a class in the tables of `_table`
# Formats that do not keep the values. GIF renumbers them: Pillow's writer drops values that do not occur.
_LOSSY = {form: f"{form} compression changes label values" for form in ("JPEG", "WEBP", "AVIF")}
_LOSSY["GIF"] = "GIF files can renumber label values"
_LARGEST_VALUE = 65535
_LISTED = 20  # values that a message lists as an option
_DISTINCT = 1024  # a file with more different values is not a label map


class LabelFile(NamedTuple):
    """The name of a label file relative to the data set, for messages, and its location."""

    name: str
    location: Location


@dataclasses.dataclass(frozen=True)
class LabelEncoding:
    """The meaning of the values in label files.

    Attributes:
        num_classes: Number of classes, or None to count the values (only before `resolve_encoding`).
        reduce_zero_label: Whether 0 is ignored and k is class k - 1, as in ADE20K.
        ignore_index: Values in the file that are ignored. None means 255, unless it is in `label_values`.
        label_values: Value of each class in the file, for example (0, 255), or None for 0, 1, 2, ...
        palette: Color of each class, or None.
        ignored_colors: Colors that are ignored.
        color_coded: Whether classes are read from colors instead of indices. `resolve_encoding` sets it.
    """

    num_classes: int | None
    reduce_zero_label: bool = False
    ignore_index: tuple[int, ...] | None = None
    label_values: tuple[int, ...] | None = None
    palette: tuple[Color, ...] | None = None
    ignored_colors: tuple[Color, ...] = ()
    color_coded: bool = False

    def __post_init__(self):
        values = self.label_values
        if self.palette is not None and len(self.palette) != self.num_classes:
            raise UsageError(f"{len(self.palette)} colors for {self.num_classes} classes: expected one for each class")
        if self.num_classes is not None and not 1 <= self.num_classes <= MOST_CLASSES:
            raise UsageError(f"{counted(self.num_classes, 'class')}: expected 1 to {MOST_CLASSES}")
        for option, numbers in (("ignore-index", self.ignore_index), ("label-values", values)):
            if wrong := [number for number in numbers or () if not 0 <= number <= _LARGEST_VALUE]:
                raise UsageError(f"--{option} {wrong[0]}: expected 0 to {_LARGEST_VALUE}")
        if values is not None:
            if self.reduce_zero_label:
                raise UsageError("--label-values and --reduce-zero-label exclude each other; pass one of them")
            if len(set(values)) < len(values) or set(values) & set(self.ignore_index or ()):
                raise UsageError(f"--label-values {' '.join(map(str, values))}: a value repeats or is also ignored")
            if self.num_classes is not None and len(values) != self.num_classes:
                raise UsageError(
                    f"--label-values {' '.join(map(str, values))}: expected one value for each of the "
                    f"{counted(self.num_classes, 'class')}"
                )

    @property
    def ignored(self) -> frozenset[int]:
        """Return the values in a file with indices that are ignored, except the 0 of `reduce_zero_label`."""
        if self.ignore_index is not None:
            return frozenset(self.ignore_index)
        return frozenset({IGNORED} - set(self.label_values or ()))

    def mapping(self) -> dict[int, int]:
        """Return the class (or `IGNORED`) of each value in the file, or of each color as 65536 r + 256 g + b."""
        if self.color_coded:
            colors = {_code(color): index for index, color in enumerate(self.palette or ())}
            return colors | {_code(color): IGNORED for color in self.ignored_colors}
        first = int(self.reduce_zero_label)
        values = self.label_values or range(first, first + (self.num_classes or 0))
        indices = {value: index for index, value in enumerate(values)}
        if self.reduce_zero_label:
            indices[0] = IGNORED
        return indices | dict.fromkeys(self.ignored, IGNORED)

    def shown(self, values: Mapping[int, int]) -> str:
        """Return a readable list of values or colors with their numbers of pixels."""
        ordered = sorted(values.items(), key=lambda item: (-item[1], item[0]))
        return some([f"{self.shown_value(value)} ({counted(pixels, 'pixel')})" for value, pixels in ordered])

    def shown_value(self, value: int) -> str:
        return str((value >> 16, value >> 8 & 255, value & 255)) if self.color_coded else str(value)


def _code(color: Color) -> int:
    red, green, blue = color
    return red << 16 | green << 8 | blue


@functools.lru_cache(2)
def _table(encoding: LabelEncoding) -> np.ndarray:
    """Return the class of each value, uint8. The last entry is for all values outside the table."""
    table = np.full((1 << 24 if encoding.color_coded else _LARGEST_VALUE + 1) + 1, _UNKNOWN, np.uint8)
    for value, index in encoding.mapping().items():
        table[value] = index
    return table


def read_label(label: LabelFile, encoding: LabelEncoding, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read a label map.

    Args:
        label: The label file, the target of an image.
        encoding: Meaning of the values, from `resolve_encoding`.
        size: Width and height of the image after its EXIF orientation was applied, which the label map must have. None
            allows any size.

    Returns:
        uint8 (H, W): class indices, and 255 for ignored pixels.

    Raises:
        BadImages: The file cannot be read, its format does not keep values, it has another size, or it contains values
            or colors without a class. The message starts with the name of the label file.
    """
    decoded = _decode(label)
    height, width = decoded.values.shape
    if problem := _wrong_size((width, height), size) or _wrong_kind(decoded.kind, encoding):
        raise BadImages(f"{label.name}: {problem}")
    values, table = decoded.values, _table(encoding)
    if encoding.color_coded:
        codes = values if decoded.colors is None else decoded.colors[values]
    elif values.dtype.itemsize > 2:
        codes = np.where((values < 0) | (values > _LARGEST_VALUE), len(table) - 1, values)
    else:
        codes = values
    classes = table[codes]
    if (unknown := classes == _UNKNOWN).any():
        outside, pixels = np.unique((codes if encoding.color_coded else values)[unknown], return_counts=True)
        counts = dict(zip(outside.tolist(), pixels.tolist(), strict=True))
        raise BadImages(f"{label.name}: {_outside(counts, encoding)}")
    return classes


def _wrong_size(size: tuple[int, int], expected: tuple[int, int] | None) -> str:
    if expected is None or size == expected:
        return ""
    (width, height), (image_width, image_height) = size, expected
    return (
        f"{width} x {height} pixels, but its image has {image_width} x {image_height} (width x height); check that "
        "they belong together, or resize the label map with nearest-neighbor interpolation"
    )


def _wrong_kind(kind: Kind, encoding: LabelEncoding) -> str:
    if kind == "color" and not encoding.color_coded:
        return "colors instead of class indices; pass a class list with colors, or save indices in one channel"
    if kind == "index" and encoding.color_coded:
        return "class indices in one channel, but the other label maps have colors; use one form for all"
    return ""


def _outside(values: Mapping[int, int], encoding: LabelEncoding) -> str:
    """Return a message on values or colors without a class."""
    if encoding.color_coded:
        return (
            f"colors that are not in the class list: {encoding.shown(values)}; add them to the list, with the index "
            f"{IGNORED} to ignore them"
        )
    known = sorted(value for value, index in encoding.mapping().items() if index != IGNORED)
    listed = f"{known[0]} to {known[-1]}" if known and not encoding.label_values else some(known) or "none"
    return (
        f"values outside the classes ({listed}): {encoding.shown(values)}; correct them, ignore them with "
        "--ignore-index, or give the value of each class with --label-values"
    )


class _Decoded(NamedTuple):
    """A decoded label file.

    Attributes:
        kind: Form of the file.
        values: Integer (H, W): indices, or colors as 65536 r + 256 g + b.
        colors: Color of each index of a palette image, or None.
    """

    kind: Kind
    values: np.ndarray
    colors: np.ndarray | None = None


def _decode(label: LabelFile) -> _Decoded:
    """Decode a label file without conversion of its values.

    Raises:
        BadImages: The file cannot be read, or its format or mode cannot contain a label map.
    """
    content = read_file(label.name, label.location)
    with opened(io.BytesIO(content), label.name) as image:
        if image.format in _LOSSY:
            raise ValueError(f"{_LOSSY[image.format]}; save label maps as PNG")
        deep = any(";16" in str(tile) for tile in getattr(image, "tile", ()))
        if image.mode in ("RGB", "RGBA", "RGBX", "LA") and deep:
            raise ValueError("several channels with 16 bits; save indices in one channel or colors with 8 bits")
        if image.mode == "P":
            palette = np.asarray(image.getpalette("RGB"), np.int32).reshape(-1, 3)
            colors = np.zeros(256, np.int32)
            colors[: len(palette)] = palette @ np.array([1 << 16, 1 << 8, 1])
            return _Decoded("palette", np.asarray(image), colors)
        if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
            values = np.asarray(image.getchannel(0) if image.mode == "LA" else image)
            return _Decoded("index", values.astype(np.uint8) if image.mode == "1" else values)
        if image.mode not in ("RGB", "RGBA", "RGBX"):
            raise ValueError(f"mode {image.mode} cannot contain labels; save indices with 8 or 16 bits in one channel")
        red, green, blue = (np.asarray(image.getchannel(channel), np.int32) for channel in range(3))
        if (red == green).all() and (green == blue).all():
            return _Decoded("gray", red.astype(np.uint8), np.arange(256, dtype=np.int32) * 0x010101)
        return _Decoded("color", red << 16 | green << 8 | blue)


class LabelStats(NamedTuple):
    """The content of a label file, before its values are interpreted.

    Attributes:
        kind: Form of the file.
        size: Width and height in pixels.
        image_size: Width and height of its image after its EXIF orientation was applied, or None if it is unreadable.
        counts: Value -> number of pixels. The values of kind "color" are 65536 r + 256 g + b.
        colors: Color of each value, for kinds "palette" and "gray".
    """

    kind: Kind
    size: tuple[int, int]
    image_size: tuple[int, int] | None
    counts: dict[int, int]
    colors: dict[int, int]

    def coded(self, encoding: "LabelEncoding") -> dict[int, int]:
        """Return the number of pixels of each index, or of each color if the encoding is by color."""
        if not encoding.color_coded or not self.colors:
            return self.counts
        colors: collections.Counter[int] = collections.Counter()
        for value, pixels in self.counts.items():
            colors[self.colors[value]] += pixels
        return dict(colors)


def examine_label(_: int, __: str, location: Location, label: LabelFile) -> LabelStats:
    """Decode a label file, count its values and read the size of its image.

    Raises:
        BadImages: The label cannot be read or is not a label map.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about large images
        decoded = _decode(label)
        values, pixels = np.unique(decoded.values, return_counts=True)
        if len(values) > _DISTINCT:
            raise BadImages(
                f"{label.name}: {len(values):,} different values; not a label map, or it was resized with interpolation"
            )
        image_size = None
        try:
            with opened(io.BytesIO(read_file(label.name, location)), label.name) as image:
                image_size = upright_size(image)
        except BadImages:
            pass  # the reader of the images reports it
    counts = dict(zip(values.tolist(), pixels.tolist(), strict=True))
    colors = {} if decoded.colors is None else {value: int(decoded.colors[value]) for value in counts}
    height, width = decoded.values.shape
    return LabelStats(decoded.kind, (width, height), image_size, counts, colors)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height after the EXIF orientation is applied."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged tags can make Pillow raise any exception
        orientation = 1
    return (image.height, image.width) if orientation in (5, 6, 7, 8) else image.size


def scan_labels(images: Dataset, workers: "int | Workers") -> Generator[LabelStats | BadImages]:
    """Yield the content of each label file, in order, or the error for a file that cannot be read.

    Args:
        images: Images with label files.
        workers: Number of processes, or existing `Workers`. With 0, the calling process decodes.
    """
    pairs = zip(images.locations, images.targets, strict=True)
    return each(((index, label.name, at, label) for index, (at, label) in enumerate(pairs)), examine_label, workers)


def resolve_encoding(
    images: Dataset, stats: Iterable[LabelStats | BadImages], encoding: LabelEncoding, command: Sequence[str]
) -> LabelEncoding:
    """Decide whether label files contain colors or indices, and compare their values with the number of classes.

    The label files contain colors if at least as many of them have three different channels as have one. Otherwise they
    contain indices.

    Args:
        images: Images with label files.
        stats: Results of `scan_labels`, which can be iterated repeatedly.
        encoding: The encoding that the user describes.
        command: The words of the user's command line, to which messages add options.

    Returns:
        The encoding with `color_coded` and `num_classes`.

    Raises:
        UsageError: The files contain only 0 and 255, so that 255 can be a class or ignored, or an option does not fit.
        DoesNotFit: The files contain colors without a class list with colors, or the indices do not fit the classes.
    """
    colored = indexed = 0
    first_colored = ""
    first: dict[int, str] = {}  # value -> the first file without colors that contains it
    for label, one in zip(images.targets, stats, strict=True):
        if isinstance(one, BadImages):
            continue
        if one.kind == "color":  # `check_labels` reports it if the others have indices
            colored += 1
            first_colored = first_colored or label.name
            continue
        indexed += one.kind == "index" or (one.kind == "palette" and encoding.palette is None)
        for value in one.counts:
            first.setdefault(value, label.name)
    if colored and colored >= indexed:
        return _resolve_colors(first_colored, stats, dataclasses.replace(encoding, color_coded=True))
    described = encoding.ignore_index is not None or encoding.label_values is not None
    if first.keys() <= {0, IGNORED} and IGNORED in first and not described:
        words = [word for word in command if word != "--reduce-zero-label"]
        as_class, as_ignored = (
            shlex.join([*words, *more]) for more in (("--label-values", "0", "255"), ("--ignore-index", "255"))
        )
        raise UsageError(
            f"{images.root}: the label maps contain only the values 0 and 255, and 255 usually means ignored; if 255 "
            f"is the object (class 1 of 2), run: {as_class}; if pixels with 255 have no class, run: {as_ignored}"
        )
    present = sorted(first.keys() - encoding.ignored)
    if encoding.num_classes is None:
        highest = max(present, default=0)
        values = encoding.label_values or range(max(highest - encoding.reduce_zero_label, 0) + 1)
        if len(values) > MOST_CLASSES:
            remedy = "pass the class list with --classes FILE"
            if len(present) <= _LISTED and highest <= _LARGEST_VALUE and not encoding.reduce_zero_label:
                words = shlex.join([*command, "--label-values", *map(str, present)])
                remedy += f"; if each value is a class, run: {words}"
            raise DoesNotFit(
                f"{first[highest]}: contains the value {highest}, but at most {MOST_CLASSES} classes are possible; "
                f"{remedy}"
            )
        encoding = dataclasses.replace(encoding, num_classes=len(values))
    mapping, count = encoding.mapping(), encoding.num_classes or 0
    outside = [value for value in present if value not in mapping]
    if outside == [count] and not encoding.reduce_zero_label and encoding.label_values is None:
        remedy = f"if 0 means that a pixel has no class, run: {shlex.join([*command, '--reduce-zero-label=true'])}"
        if 0 in first:
            remedy += f"; if 0 is a class, such as the background, class list and weights need {count + 1} classes"
        raise DoesNotFit(
            f"{images.root}: the label maps contain the values {present[0]} to {count} ({count} in {first[count]}), "
            f"but {counted(count, 'class')} need 0 to {count - 1}; {remedy}"
        )
    if first and all(mapping.get(value) == IGNORED for value in first):
        raise DoesNotFit(
            f"{images.root}: all pixels of the label maps are ignored (values {some(sorted(first))}); check "
            "--ignore-index and --reduce-zero-label"
        )
    return encoding


def _resolve_colors(first: str, stats: Iterable[LabelStats | BadImages], encoding: LabelEncoding) -> LabelEncoding:
    """Check that colors can be read. `first` is the name of the first file with colors."""
    if encoding.palette is None:
        totals: collections.Counter[int] = collections.Counter()
        for one in stats:
            totals.update({} if isinstance(one, BadImages) or one.kind == "index" else one.coded(encoding))
        raise DoesNotFit(
            f"{first}: this label map contains colors; pass --classes FILE with the columns name, red, green, blue "
            f"(all label maps: {counted(len(totals), 'color')}: {encoding.shown(totals)})"
        )
    if encoding.reduce_zero_label or encoding.label_values or encoding.ignore_index:
        raise UsageError(
            f"{first}: this label map contains colors, but --reduce-zero-label, --label-values and --ignore-index are "
            f"for indices; list colors to ignore with the index {IGNORED} in the class list"
        )
    colors = [*encoding.palette, *encoding.ignored_colors]
    if repeated := [color for color, times in collections.Counter(colors).items() if times > 1]:
        raise DoesNotFit(
            f"{first}: this label map contains colors, but the color {repeated[0]} belongs to several classes; give "
            "each class its own color, or save label maps with indices"
        )
    return dataclasses.replace(encoding, num_classes=len(encoding.palette))


@dataclasses.dataclass(frozen=True)
class LabelCheck:
    """The content of the label files of a split.

    Attributes:
        pixels: Number of pixels of each class. 0 means that the class never occurs.
        maps: Number of label maps that contain each class.
        ignored: Number of ignored pixels.
        unknown: Value or color without a class -> number of pixels.
        kinds: Form of the files ("index", "palette", "gray", "color") -> number of files.
        bad: Position and reason of the first label files that cannot be used. The reason starts with the name.
        hints: Readable warnings about likely errors.
    """

    pixels: tuple[int, ...]
    maps: tuple[int, ...]
    ignored: int
    unknown: Mapping[str, int]
    kinds: Mapping[str, int]
    bad: Listed[tuple[int, str]]
    hints: tuple[str, ...]

    @property
    def absent(self) -> tuple[int, ...]:
        """Return the indices of the classes without pixels, which metrics leave out."""
        return tuple(index for index, pixels in enumerate(self.pixels) if not pixels)


def check_labels(images: Dataset, stats: Iterable[LabelStats | BadImages], encoding: LabelEncoding) -> LabelCheck:
    """Count the pixels of each class and find the label files that cannot be used.

    Args:
        images: Images with label files.
        stats: Result of `scan_labels`.
        encoding: Result of `resolve_encoding`.
    """
    mapping = encoding.mapping()
    pixels, maps = ([0] * (encoding.num_classes or 0) for _ in range(2))
    unknown: collections.Counter[int] = collections.Counter()
    kinds: collections.Counter[Kind] = collections.Counter()
    bad: list[tuple[int, str]] = []
    unusable = ignored = 0
    zero, mismatch = False, ""
    for index, (label, one) in enumerate(zip(images.targets, stats, strict=True)):
        if isinstance(one, BadImages):
            problem, counts = str(one), {}
        else:
            kinds[one.kind] += 1
            if one.kind != "color" or encoding.color_coded:
                zero = zero or 0 in one.counts
                mismatch = mismatch or _palette_mismatch(label.name, one, encoding, mapping)
            problem = _wrong_size(one.size, one.image_size) or _wrong_kind(one.kind, encoding)
            counts = {} if problem else one.coded(encoding)
            if outside := {value: count for value, count in counts.items() if value not in mapping}:
                unknown.update(outside)
                problem = _outside(outside, encoding)
            problem = problem and f"{label.name}: {problem}"
        if problem:
            unusable += 1
            if len(bad) < LISTED:
                bad.append((index, problem))
            continue
        present = collections.Counter[int]()
        for value, count in counts.items():
            present[mapping[value]] += count
        ignored += present.pop(IGNORED, 0)
        for label_class, count in present.items():
            pixels[label_class] += count
            maps[label_class] += 1
    return LabelCheck(
        tuple(pixels),
        tuple(maps),
        ignored,
        ListedMapping((encoding.shown_value(value), count) for value, count in sorted(unknown.items())),
        dict(sorted(kinds.items())),
        Listed(bad, unusable),
        tuple(_hints(encoding, pixels, zero, mismatch)),
    )


def _hints(encoding: LabelEncoding, pixels: Sequence[int], zero: bool, mismatch: str) -> Iterator[str]:
    """Yield warnings about likely errors.

    Args:
        encoding: Meaning of the values.
        pixels: Number of pixels of each class.
        zero: Whether the value 0 occurs.
        mismatch: Result of `_palette_mismatch` for the first file that has one.
    """
    if encoding.reduce_zero_label and len(pixels) > 1 and pixels[-2] and not pixels[-1] and zero:
        yield (
            f"label 0 is ignored and the last class (label {len(pixels)}) never occurs; if label 0 is the first class, "
            "do not use --reduce-zero-label"
        )
    plain = not encoding.color_coded and not encoding.reduce_zero_label and encoding.label_values is None
    if plain and 0 not in encoding.ignored and any(pixels) and not zero:
        yield "label 0 never occurs; if the first class is label 1, use --reduce-zero-label"
    if mismatch:
        yield mismatch


def _palette_mismatch(name: str, one: LabelStats, encoding: LabelEncoding, mapping: Mapping[int, int]) -> str:
    """Return a warning if a color in the palette of a file with indices is that of another class, or ""."""
    if encoding.color_coded or encoding.palette is None or one.kind != "palette":
        return ""
    for value, color in one.colors.items():
        index, shown = mapping.get(value, IGNORED), (color >> 16, color >> 8 & 255, color & 255)
        if index != IGNORED and shown != encoding.palette[index] and shown in encoding.palette:
            return (
                f"{name}: index {value} is read as class {index}, but its color in the file's palette is that of "
                f"class {encoding.palette.index(shown)} in the class list; check the order of the palette"
            )
    return ""
