"""Read class lists with colors, such as ADE20K's."""

import collections
import colorsys
import csv
import functools
import importlib.resources
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fcvit.data.classes import Classes, ClassName, as_classes, check_classes, read_classes
from fcvit.data.sources import Location
from fcvit.errors import DoesNotFit, UnreadableFile
from fcvit.models.variants import ADE20K_CLASSES
from fcvit.text import decode_text
from fcvit.weights.reading import Weights

IGNORED = 255
"""The class index of pixels that are ignored in loss and metrics."""
Color = tuple[int, int, int]

_CHANNELS = (("red", "r"), ("green", "g"), ("blue", "b"))
_NAMES = ("name", "class_name", "label", "class")


class ClassList(NamedTuple):
    """A class list, optionally with colors.

    Attributes:
        classes: Ids and names, in the order of the class indices.
        palette: The color of each class, or None. Colors can repeat, as two of ADE20K's do.
        ignored_colors: Colors of pixels without a class (rows with the index 255).
    """

    classes: Classes
    palette: tuple[Color, ...] | None = None
    ignored_colors: tuple[Color, ...] = ()


@functools.cache
def ade20k() -> ClassList:
    """Return the 150 classes and colors of ADE20K (SceneParse150), in the order of mmsegmentation 0.19."""
    content = (importlib.resources.files("fcvit") / "assets" / "ade20k_classes.csv").read_bytes()
    listed = parse_class_list(content, "the bundled list")
    assert listed is not None
    return listed


def class_list(given: "Sequence[ClassName | tuple[str, str] | str] | str | os.PathLike[str]") -> ClassList:
    """Return a class list from its path, from (id, name) pairs or from names.

    Raises:
        UnreadableFile, DoesNotFit: As in `read_class_list`.
    """
    if isinstance(given, str | os.PathLike):
        return read_class_list(Path(given))
    return ClassList(as_classes(given))


def read_class_list(path: Path) -> ClassList:
    """Read a class list. Colors are read from a CSV file with the columns name, red, green and blue (or r, g, b).

    A column `index` gives the order. Rows with the index 255 give colors of pixels to ignore. Other formats are those
    of `fcvit.data.classes.read_classes`, without colors.

    Raises:
        UnreadableFile: The file cannot be read or contains no class.
        DoesNotFit: Indices or ids repeat or are missing, or a color is not three numbers from 0 to 255.
    """
    try:
        content = Location(str(path)).read()
    except OSError as error:
        raise UnreadableFile(f"{path}: cannot read the class list: {error.strerror or error}") from error
    return parse_class_list(content, str(path)) or ClassList(read_classes(path))


def parse_class_list(content: bytes, source: str) -> ClassList | None:
    """Parse a CSV class list with colors, or return None if the content has no columns for names and colors.

    Raises:
        UnreadableFile, DoesNotFit: As in `read_class_list`.
    """
    try:
        rows = list(csv.DictReader(decode_text(content).splitlines(), skipinitialspace=True))
    except (UnicodeDecodeError, csv.Error):
        return None
    columns = {column.strip().lower(): column for column in (rows[0] if rows else ()) if column}
    name = next((columns[key] for key in _NAMES if key in columns), None)
    channels = [next((columns[key] for key in keys if key in columns), None) for keys in _CHANNELS]
    if name is None or None in channels:
        return None
    entries: dict[int, tuple[str, Color]] = {}
    ignored: list[Color] = []
    for line, row in enumerate(rows, 2):
        texts = [str(row[column or ""]).strip() for column in channels]
        if not all(re.fullmatch("[0-9]{1,3}", text) and int(text) <= 255 for text in texts):
            raise DoesNotFit(f"{source}: line {line}: the color {', '.join(texts):.60} is not three numbers, 0 to 255")
        red, green, blue = map(int, texts)
        text = str(row[columns["index"]]).strip() if "index" in columns else str(len(entries))
        if not re.fullmatch("[0-9]{1,3}", text) or int(text) in entries:
            raise DoesNotFit(f"{source}: line {line}: the index {text:.60} repeats or is not a number from 0 to 255")
        if int(text) == IGNORED:
            ignored.append((red, green, blue))
        else:
            entries[int(text)] = (str(row[name]).strip(), (red, green, blue))
    if sorted(entries) != list(range(len(entries))):
        raise DoesNotFit(f"{source}: the column index must contain 0 to {len(entries) - 1}, each exactly once")
    names = [entries[index][0] for index in range(len(entries))]
    times = collections.Counter(names)
    classes = tuple(ClassName(n if times[n] == 1 else f"{n} ({index})", n) for index, n in enumerate(names))
    palette = tuple(entries[index][1] for index in range(len(entries)))
    return ClassList(check_classes(classes, source), palette, tuple(ignored))


def classes_of(weights: Weights, listed: ClassList | None) -> ClassList:
    """Return the classes of a segmentation network or a detector with their colors.

    The classes are those of the list, else of the weights, else ADE20K's for segmentation with 150 classes, else
    numbers. Colors are those of the list or the weights, else `default_palette`, or `bright_colors` for detection.

    Raises:
        DoesNotFit: The list has another number of classes than the network.
    """
    count, segmentation = weights.spec.num_classes, weights.spec.task == "segmentation"
    if listed and len(listed.classes) != count:
        raise DoesNotFit(f"the class list has {len(listed.classes)} classes, but {weights.source.path} has {count}")
    if listed is None and weights.classes is not None:
        listed = ClassList(weights.classes)
    if listed is None and segmentation and count == ADE20K_CLASSES:
        return ade20k()
    classes = listed.classes if listed else tuple(ClassName(str(index), f"class {index}") for index in range(count))
    colors = (listed.palette if listed else None) or weights.palette
    return ClassList(classes, colors or (default_palette if segmentation else bright_colors)(count))


def default_palette(count: int) -> tuple[Color, ...]:
    """Return the colors of PASCAL VOC for classes without colors: the bits of the index, from the highest bit down."""
    colors = []
    for index in range(count):
        number, color = index + 1, [0, 0, 0]
        for bit in range(7, -1, -1):
            for channel in range(3):
                color[channel] |= (number >> channel & 1) << bit
            number >>= 3
        colors.append((color[0], color[1], color[2]))
    return tuple(colors)


def bright_colors(count: int) -> tuple[Color, ...]:
    """Return colors that are visible as lines on dark photographs. Neighbors in the list differ clearly.

    The hue advances by the golden section of the circle.
    """
    shades = ((0.85, 1.0), (0.55, 1.0), (0.7, 0.85))  # saturation and value
    colors = (colorsys.hsv_to_rgb((0.04 + index * 0.618034) % 1, *shades[index % 3]) for index in range(count))
    return tuple((round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in colors)
