"""Lists of images and their classes, in the forms that data sets come with, and the images that they name."""

import codecs
import csv
import itertools
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fcvit.data.folders import is_image, legible
from fcvit.data.sources import Location, Source
from fcvit.data.splits import role
from fcvit.errors import DoesNotFit, UnreadableFile
from fcvit.text import decode_text, parse_json, some

# Columns of a list with a header, the surest names first; compared without case, spaces and underscores.
_PATHS = re.findall(
    r"\w+",
    "filename fname filepath filepaths path imagepath imgpath imagefile imagename imgname file image img imageid imgid "
    "idcode id",
)
_LABELS = re.findall(
    r"\w+",
    "label labels class classes target category labelid classid targetid categoryid classindex labelname classname "
    "categoryname wnid synset predictionstring breed species diagnosis dx",
)
_UNLABELED = "without labels: the folder is the class"
_BOXES = re.compile(r"(\S+)(?: -?[\d.]+){4}")  # of Kaggle's ImageNet lists: class, and a box

Lines = Sequence[tuple[int, str]]  # numbers of lines that are not empty, and their text


class ImageList(NamedTuple):
    """A list as it is written.

    Attributes:
        labels: name of each image -> its label; None: the folder that it is in.
        notes: how the list was read, for people.
        encoding: what it is not, for messages, else "".
    """

    labels: Mapping[str, str | None]
    notes: tuple[str, ...] = ()
    encoding: str = ""


class _Row(NamedTuple):
    number: int
    name: str
    label: str | None


def read_list(path: Path) -> ImageList:
    """Read a list: an image and its class a line, CSV with or without a header, or JSON.

    Raises:
        UnreadableFile: it cannot be read, or is no such list.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableFile(f"{path}: cannot read the list: {error.strerror}") from error
    encoding = ""
    try:
        text = decode_text(content)
    except UnicodeDecodeError as error:
        if not error.encoding.startswith("utf-8"):
            raise UnreadableFile(
                f"{path}: damaged {error.encoding.upper()} text ({error.reason}); save it as UTF-8"
            ) from error
        # Names that are not UTF-8 keep their bytes, as file names do.
        text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
        encoding = "the list is not UTF-8 text"
    if "\n" not in text:  # of old Macs
        text = text.replace("\r", "\n")
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UnreadableFile(f"{path}: no images in the list; expected a path and a class index a line")
    for number, line in lines:
        if "\0" in line:
            raise _bad(path, number, line)
    rows, note = _json_rows(path, lines), "read as JSON"
    if rows is None:
        rows, note = _rows(path, lines)
    elif not rows:
        raise UnreadableFile(
            f"{path}: expected JSON of the form class -> images, image -> class, or objects with keys path and label"
        )
    labels: dict[str, str | None] = {}
    for number, name, label in rows:
        name = posixpath.normpath(name)
        if name.startswith(".."):
            raise UnreadableFile(f"{path}: line {number} names {name[:60]!r}: expected a path below --data")
        if name in labels:
            raise UnreadableFile(f"{path}: line {number}: {name[:60]} stands there twice")
        labels[name] = label
    return ImageList(labels, (f"{path.name}: {note}",) if note else (), encoding)


def _bad(path: Path, number: int, line: str) -> UnreadableFile:
    return UnreadableFile(f"{path}: line {number} is {line[:60]!r}: expected the path of an image and its class index")


def _json_rows(path: Path, lines: Lines) -> list[_Row] | None:
    """Read class -> images (Food-101), image -> class, or objects, perhaps one a line; return None: it is not JSON.

    JSON of another form has no rows.
    """
    if lines[0][1][0] not in "{[":
        return None
    try:
        content, repeated = parse_json("\n".join(line for _, line in lines))
    except RecursionError:
        return []
    except ValueError:
        try:
            parsed = [parse_json(line) for _, line in lines]
        except (ValueError, RecursionError):
            return None
        content, repeated = [value for value, _ in parsed], [key for _, keys in parsed for key in keys]
    if repeated:
        raise UnreadableFile(f"{path}: {some(repeated)[:80]} stands there twice")
    if isinstance(content, dict):
        lists = all(isinstance(names, list) for names in content.values())
        content = [(name, label) for label, names in content.items() for name in names] if lists else content.items()
    elif (
        content and all(isinstance(entry, dict) for entry in content) and (columns := _columns(names := [*content[0]]))
    ):
        content = [[entry.get(names[column]) for column in columns] for entry in content]
    rows = []
    for row in content:
        match row:
            case [str() as name, str() | int() as label] if not isinstance(label, bool):
                rows.append(_Row(1, name, str(label)))
            case [str() as name, float() as label] if label.is_integer():
                rows.append(_Row(1, name, str(label)))
            case _:
                return []
    return rows


def _columns(names: Sequence[str]) -> tuple[int, int] | None:
    """Return which columns have the path and the label, by their names."""
    header = ["".join(filter(str.isalnum, name.lower())) for name in names]
    column = next((header.index(name) for name in _PATHS if name in header), None)
    other = None if column is None or len(header) != 2 else 1 - column
    value = next((header.index(name) for name in _LABELS if name in header), other)
    return None if column is None or value is None else (column, value)


def _rows(path: Path, lines: Lines) -> tuple[list[_Row], str]:
    """Find the form in which all lines are written, and split them; in words, which form."""
    first = lines[0][1].lower()
    words = [word.replace("_", "") for word in first.split()]
    header = len(words) == 2 and words[0] in _PATHS and words[1] in _LABELS
    if len(lines) > 1 and (header or first.startswith("sep=")):
        lines = lines[1:]
    for delimiter in ",;\t|" if len(lines) > 1 else "":
        named = _fields(lines[0][1], delimiter)
        if columns := _columns(named):
            column, value = columns
            rows = []
            for number, line in lines[1:]:
                fields = _fields(line, delimiter)
                if len(fields) <= max(columns) or not fields[column] or not fields[value]:
                    raise _bad(path, number, line)
                rows.append(_Row(number, fields[column], _label(path, number, fields[value])))
            return rows, f"read by its columns {named[column]} and {named[value]}"
    if all("\t" in line for _, line in lines):
        return _without_header(_table(path, lines, "\t"))
    begun = [line.split(None, 1) for _, line in lines]
    unlabeled = [_Row(number, _unquoted(line), None) for number, line in lines]
    if all(is_image(line.strip("\"'")) for _, line in lines):
        if all(len(parts) == 2 and parts[0].isdecimal() for parts in begun):
            rows = [
                _Row(number, _unquoted(parts[1]), parts[0]) for (number, _), parts in zip(lines, begun, strict=True)
            ]
            if len(rows) > 1 and [row.label for row in rows] == [str(place) for place in range(1, len(rows) + 1)]:
                raise UnreadableFile(
                    f"{path}: do the numbers before the paths count the lines, or are they classes? if lines, leave "
                    "them out, and the folder of each image is its class; if classes, write them behind the paths"
                )
            return rows, "read as class index and path"
        if all(_has_folder(line) for _, line in lines):
            return unlabeled, _UNLABELED
    spaced = [_spaced(number, line) for number, line in lines]
    pictures = sum(is_image(name) for _, name, _ in spaced)
    for delimiter in ",;|":
        # Paths and classes may have commas in them, and spaces.
        cut = [_fields(line, delimiter) for _, line in lines]
        if (
            min(map(len, cut)) > 1
            and len(set(map(len, cut))) == 1
            and (
                sum(any(map(is_image, fields[:2])) for fields in cut) > pictures
                or (not pictures and not all(" " in line for _, line in lines))
            )
        ):
            rows, note = _without_header(_table(path, lines, delimiter))
            return rows, f"read as columns separated by {delimiter}{note and ', '}{note}"
    if all(len(parts) == 1 and _has_folder(parts[0]) for parts in begun):
        return unlabeled, _UNLABELED
    for (number, line), parts in zip(lines, begun, strict=True):
        if len(parts) == 1:
            raise _bad(path, number, line)
    return _without_header(spaced)


def _without_header(rows: list[_Row]) -> tuple[list[_Row], str]:
    """Leave out a first line that is none of an image, whatever its words are; in words, that it is left out."""
    first, *others = rows
    labels = [label for _, _, label in others if label]
    numbers = all(_number(label) is not None for label in labels)
    pictures = all(is_image(name) for _, name, _ in others) and first.label not in labels
    if not others or is_image(first.name) or _number(first.label or "") is not None or not (numbers or pictures):
        return rows, ""
    return others, f"line {first.number} taken for a header"


def _spaced(number: int, line: str) -> _Row:
    """Split a line at white space: behind the image's ending, else before the last word."""
    ended = re.match(r".*\.(\w+)[\"']?(?=\s)", line)
    cut = ended.end() if ended and is_image("x." + ended[1]) else len(line) - len(line.split()[-1])
    return _Row(number, _unquoted(line[:cut]), _unquoted(line[cut:]))


def _has_folder(name: str) -> bool:
    return "/" in name or "\\" in name


def _table(path: Path, lines: Lines, delimiter: str) -> list[_Row]:
    """Split lines without a header: path, class, and perhaps numbers such as boxes."""
    rows = []
    cut = [_fields(line, delimiter) for _, line in lines]
    if all(len(f) > 2 and {*map(_number, f[1:])} == {0, 1} for f in cut):
        raise UnreadableFile(f"{path}: has a column of 0 and 1 for each class; write the class of each image instead")
    swapped = all(len(f) == 2 and is_image(f[1]) and not is_image(f[0]) for f in cut)
    for (number, line), fields in zip(lines, cut, strict=True):
        while len(fields) > 2 and not fields[-1]:
            fields.pop()
        if len(fields) < 2 or not fields[0] or not fields[1] or None in map(_number, fields[2:]):
            raise _bad(path, number, line)
        rows.append(_Row(number, fields[swapped], fields[not swapped]))
    return rows


def _fields(line: str, delimiter: str) -> list[str]:
    try:
        return [field.strip() for field in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))]
    except csv.Error:  # an enormous field
        return [field.strip() for field in line.split(delimiter)]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _unquoted(name: str) -> str:
    name = name.strip()
    return name[1:-1] if len(name) > 2 and name[0] == name[-1] and name[0] in "\"'" else name


def _label(path: Path, number: int, text: str) -> str:
    """Return a label; of Kaggle's boxes, the class that they are all of."""
    classes = _BOXES.findall(text)
    if not classes or _BOXES.sub("", text).strip():
        return text
    if len(set(classes)) > 1:
        raise UnreadableFile(f"{path}: line {number} has boxes of several classes: {some(sorted(set(classes)))}")
    return classes[0]


def find_listed(listed: ImageList, list_file: Path, source: Source) -> tuple[dict[str, Location], dict[str, str], str]:
    """Find the images of a list, by one rule for all of them.

    The paths count from the data, less the shortest leading part that makes all of them be there; else from the only
    folder in the data from which all of them are there. Where paths are not there as they are written, other
    slashes, Unicode forms and, for names without ending, the endings of images are tried.

    Returns:
        The place and label of each image, by its name below the data; a remark on what was changed.

    Raises:
        UnreadableFile: a whole path leads to a file that is not in the data.
        DoesNotFit: images are not there, or the list's folder is another split than the data.
    """
    names = list(listed.labels)
    common, leading = _leading(names)
    endless = not any(map(is_image, names))
    every: dict[str, list[str]] = {}  # files of the data by their keys, where names are not there as written

    def find(match: Callable[[str], str | None], starts: Iterable[str]) -> tuple[str, list[str]] | None:
        for start in starts:
            each = (match(name[len(start) :]) for name in names)
            matched = [name for name in itertools.takewhile(lambda name: name is not None, each) if name]
            if len(matched) == len(names):
                return start, matched
        return None

    def as_written(name: str) -> str | None:
        return name if name and not name.startswith("/") and source.locate(name) is not None else None

    def alike(name: str) -> str | None:
        candidates = every.get(_key(name, endless), [])
        if len(candidates) > 1:
            raise DoesNotFit(f"{list_file}: {name} may be each of {some(candidates)} in {source.path}; name it in full")
        return candidates[0] if candidates else None

    _refuse_elsewhere(names[0], list_file, source)
    remark, below = "", ""
    match = find(as_written, leading)
    if match is None and any("\\" in name for name in names):
        names = [re.sub("^//+", "/", posixpath.normpath(name.replace("\\", "/"))) for name in names]
        common, leading = _leading(names)
        match = find(as_written, leading)
    if match is None:
        for name in source.tree().files:
            if not endless or is_image(name):
                every.setdefault(_key(name, endless), []).append(name)
        match = find(alike, leading)
    if match is None:
        end = "/" + _key(names[0], endless)
        starts = sorted({key[: -len(end)] for key in every if key.endswith(end)})
        whole = [start for start in starts if all(f"{start}/{_key(name, endless)}" in every for name in names)]
        if len(whole) > 1:
            raise DoesNotFit(f"{list_file}: its images are in {some(whole)} of {source.path}; name one with --data")
        if whole:
            below = whole[0]
            match = find(lambda name: alike(f"{below}/{name}"), [""])
            remark = f"; its paths count from {source.path / below}"
    if match is None:
        missing = min(
            ([name for name in names if as_written(name[len(start) :]) is None] for start in leading), key=len
        )
        remedy = f"{listed.encoding}, save it as UTF-8" if listed.encoding else "--data names what the paths count from"
        raise DoesNotFit(
            f"{len(missing)} of {len(names)} images of {list_file} are not in {source.path}: {some(missing)}; {remedy}"
        )
    start, matched = match
    if start:
        listed_roles = [named[0] for part in start.split("/") if (named := role(part))]
        here = role(source.path.name)
        if here and listed_roles and listed_roles[-1] != here[0]:
            raise DoesNotFit(
                f"{list_file}: names images of {start}, but --data {source.path} is another split; name the right "
                "folder"
            )
        remark = f"; the list's folder {start} is not in {source.path.name}, left out"
    locations: dict[str, Location] = {}
    labels: dict[str, str] = {}
    for written, name, label in zip(names, matched, listed.labels.values(), strict=True):
        location = source.locate(name)
        if name in locations or location is None:
            raise DoesNotFit(f"{list_file}: {written} and another line are both {name} in {source.path}")
        locations[name] = location
        if label is None:
            folder = posixpath.dirname(written)
            label = folder.removeprefix(common).strip("/").split("/")[0] or posixpath.basename(folder)
        labels[name] = legible(label)
    return locations, labels, remark


def _leading(names: Sequence[str]) -> tuple[str, list[str]]:
    """Return the folder that all names are in, and its leading parts, the shortest first."""
    common = ""
    if len({name.startswith("/") for name in names}) == 1:
        common = posixpath.commonpath([posixpath.dirname(name) for name in names])
    parts = [f"{part}/" for part in common.split("/")] if common else []
    return common, list(itertools.accumulate(parts, initial=""))


def _key(name: str, endless: bool) -> str:
    name = unicodedata.normalize("NFC", name)
    return posixpath.splitext(name)[0] if endless and is_image(name) else name


def _refuse_elsewhere(name: str, list_file: Path, source: Source) -> None:
    """Refuse a list whose paths lead, from a folder above the data, to files that are not in the data."""
    whole = name.startswith("/")
    if source.archive is not None or (not whole and source.locate(name) is not None):
        return
    tops = Path(source.path).absolute(), Path(source.path).resolve()
    for above in (Path("/"),) if whole else tops[0].parents:
        path = above / name
        if not path.is_file():
            continue
        if tops[0] in path.parents or tops[1] in path.resolve().parents:
            return
        raise UnreadableFile(f"{list_file}: names {str(path)[:120]}: expected a path below --data {source.path}")
