"""Lists of images and their classes, in the forms that data sets come with, and the images that they name."""

import collections
import csv
import itertools
import json
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fcvit.data.folders import is_image, legible
from fcvit.data.sources import Location, Source
from fcvit.data.splits import role
from fcvit.errors import DoesNotFit, UnreadableFile
from fcvit.text import decode_text

_SHOWN = 5
_EXPECTED = "expected the path of an image and its class index"
# Columns of a list with a header, the surest names first; compared without case, spaces and underscores.
_PATHS = re.findall(
    r"\w+",
    """
    filename fname filepath filepaths path imagepath imgpath imagefile imagename imgname file image img imageid imgid
    idcode id
""",
)
_LABELS = re.findall(
    r"\w+",
    """
    label labels class classes target category labelid classid targetid categoryid classindex labelname classname
    categoryname wnid synset predictionstring breed species diagnosis dx
""",
)
_DELIMITERS = ",;\t|"
_BOXES = re.compile(r"(\S+)(?: -?[\d.]+){4}")  # of Kaggle's ImageNet lists: class, and a box


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
    text, encoding = _decode(path, content)
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
    return UnreadableFile(f"{path}: line {number} is {line[:60]!r}: {_EXPECTED}")


def _decode(path: Path, content: bytes) -> tuple[str, str]:
    """Decode a list; names in it that are not UTF-8 keep their bytes, as file names do."""
    try:
        return decode_text(content), ""
    except UnicodeDecodeError as error:
        if not error.encoding.startswith("utf-8"):
            raise UnreadableFile(
                f"{path}: damaged {error.encoding.upper()} text ({error.reason}); save it as UTF-8"
            ) from error
    return content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape"), "the list is not UTF-8 text"


def _json_rows(path: Path, lines: Sequence[tuple[int, str]]) -> list[_Row] | None:
    """Read class -> images (Food-101), image -> class, or objects, perhaps one a line; other JSON has no rows.

    None: not JSON.
    """

    twice: list[str] = []

    def pairs(found: list[tuple[str, object]]) -> dict:
        twice.extend(key for key, times in collections.Counter(key for key, _ in found).items() if times > 1)
        return dict(found)

    def parse(text: str) -> Any:
        return json.loads(text, object_pairs_hook=pairs)

    if lines[0][1][0] not in "{[":
        return None
    try:
        content = parse("\n".join(line for _, line in lines))
    except ValueError:
        try:
            content = [parse(line) for _, line in lines]
        except (ValueError, RecursionError):
            return None
    except RecursionError:
        return []
    if twice:
        raise UnreadableFile(f"{path}: {_some(twice)[:80]} stands there twice")
    if isinstance(content, list) and content and all(isinstance(entry, dict) for entry in content):
        columns = _columns(list(content[0]))
        if columns is not None:
            content = [[entry.get(list(content[0])[column]) for column in columns] for entry in content]
    if isinstance(content, dict):
        if all(isinstance(names, list) for names in content.values()):
            content = [[name, label] for label, names in content.items() for name in names]
        else:
            content = [[name, label] for name, label in content.items()]
    right = isinstance(content, list) and all(
        isinstance(row, list)
        and len(row) == 2
        and isinstance(row[0], str)
        and (type(row[1]) in (str, int) or (type(row[1]) is float and row[1].is_integer()))
        for row in content
    )
    return [_Row(1, name, str(label)) for name, label in content] if right else []


def _columns(names: Sequence[str]) -> tuple[int, int] | None:
    """Return which columns have the path and the label, by their names."""
    header = ["".join(filter(str.isalnum, name.lower())) for name in names]
    column = next((header.index(name) for name in _PATHS if name in header), None)
    value = next((header.index(name) for name in _LABELS if name in header), None)
    if column is not None and value is None and len(header) == 2:
        value = 1 - column
    return None if column is None or value is None else (column, value)


def _rows(path: Path, lines: Sequence[tuple[int, str]]) -> tuple[list[_Row], str]:
    """Find the form in which all lines are written, and split them; in words, which form."""
    first = lines[0][1].lower()
    if len(lines) > 1 and (first.startswith("sep=") or _is_header(first.split())):
        lines = lines[1:]
    for delimiter in _DELIMITERS:
        columns = _columns(_fields(lines[0][1], delimiter))
        if columns is None or len(lines) < 2:
            continue
        column, value = columns
        rows = []
        for number, line in lines[1:]:
            fields = _fields(line, delimiter)
            if len(fields) <= max(column, value) or not fields[column] or not fields[value]:
                raise _bad(path, number, line)
            rows.append(_Row(number, fields[column], _label(path, number, fields[value])))
        named = _fields(lines[0][1], delimiter)
        return rows, f"read by its columns {named[column]} and {named[value]}"
    if all("\t" in line for _, line in lines):
        return _without_header(_table(path, lines, "\t"))
    ended = all(is_image(line.strip("\"'")) for _, line in lines)
    begun = [line.split(None, 1) for _, line in lines]
    if ended and all(len(parts) == 2 and parts[0].isdecimal() for parts in begun):
        rows = [_Row(number, _unquoted(name), label) for (number, _), (label, name) in zip(lines, begun, strict=True)]
        if len(rows) > 1 and [row.label for row in rows] == [str(place) for place in range(1, len(rows) + 1)]:
            raise UnreadableFile(
                f"{path}: do the numbers before the paths count the lines, or are they classes? if lines, leave them "
                "out, and the folder of each image is its class; if classes, write them behind the paths"
            )
        return rows, "read as class index and path"
    if ended and all(_has_folder(line) for _, line in lines):
        return _unlabeled(lines)
    spaced = [_spaced(number, line) for number, line in lines]
    for delimiter in ",;|":
        # Paths and classes may have commas in them, and spaces.
        cut = [_fields(line, delimiter) for _, line in lines]
        if min(map(len, cut)) < 2 or len(set(map(len, cut))) > 1:
            continue
        pictures = sum(is_image(name) for _, name, _ in spaced)
        if sum(any(map(is_image, fields[:2])) for fields in cut) > pictures or (
            not pictures and not all(" " in line for _, line in lines)
        ):
            rows, note = _without_header(_table(path, lines, delimiter))
            return rows, f"read as columns separated by {delimiter}{note and ', '}{note}"
    if all(len(parts) == 1 and _has_folder(parts[0]) for parts in begun):
        return _unlabeled(lines)
    for (number, line), parts in zip(lines, begun, strict=True):
        if len(parts) == 1:
            raise _bad(path, number, line)
    return _without_header(spaced)


def _without_header(rows: list[_Row]) -> tuple[list[_Row], str]:
    """Leave out a first line that is none of an image, whatever its words are; in words, that it is left out."""
    first, *others = rows
    labels = [label for _, _, label in others if label]
    numbers = all(map(_is_number, labels))
    pictures = all(is_image(name) for _, name, _ in others) and first.label not in labels
    if not others or is_image(first.name) or _is_number(first.label or "") or not (numbers or pictures):
        return rows, ""
    return others, f"line {first.number} taken for a header"


def _spaced(number: int, line: str) -> _Row:
    """Split a line at white space: behind the image's ending, else before the last word."""
    ended = re.match(r".*\.(\w+)[\"']?(?=\s)", line)
    cut = ended.end() if ended and is_image("x." + ended[1]) else len(line) - len(line.split()[-1])
    return _Row(number, _unquoted(line[:cut]), _unquoted(line[cut:]))


def _is_header(words: Sequence[str]) -> bool:
    """Report whether a line is the header of a list with white space between path and class."""
    names = [word.replace("_", "") for word in words]
    return len(names) == 2 and names[0] in _PATHS and names[1] in _LABELS


def _has_folder(name: str) -> bool:
    return "/" in name or "\\" in name


def _unlabeled(lines: Sequence[tuple[int, str]]) -> tuple[list[_Row], str]:
    return [_Row(number, _unquoted(line), None) for number, line in lines], "without labels: the folder is the class"


def _table(path: Path, lines: Sequence[tuple[int, str]], delimiter: str) -> list[_Row]:
    """Split lines without a header: path, class, and perhaps numbers such as boxes."""
    rows = []
    cut = [_fields(line, delimiter) for _, line in lines]
    if all(len(f) > 2 and {*map(_number, f[1:])} == {0, 1} for f in cut):
        raise UnreadableFile(f"{path}: has a column of 0 and 1 for each class; write the class of each image instead")
    swapped = all(len(f) == 2 and is_image(f[1]) and not is_image(f[0]) for f in cut)
    for (number, line), fields in zip(lines, cut, strict=True):
        while len(fields) > 2 and not fields[-1]:
            fields.pop()
        if len(fields) < 2 or not fields[0] or not fields[1] or not all(map(_is_number, fields[2:])):
            raise _bad(path, number, line)
        name, label = (fields[1], fields[0]) if swapped else (fields[0], fields[1])
        rows.append(_Row(number, name, label))
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


def _is_number(text: str) -> bool:
    return _number(text) is not None


def _unquoted(name: str) -> str:
    name = name.strip()
    return name[1:-1] if len(name) > 2 and name[0] == name[-1] and name[0] in "\"'" else name


def _label(path: Path, number: int, text: str) -> str:
    """Return a label; of Kaggle's boxes, the class that they are all of."""
    found = _BOXES.findall(text)
    if not found or _BOXES.sub("", text).strip():
        return text
    if len(set(found)) > 1:
        raise UnreadableFile(
            f"{path}: line {number} has boxes of several classes: {', '.join(sorted(set(found))[:_SHOWN])}"
        )
    return found[0]


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
            matched = []
            for name in names:
                found = match(name[len(start) :])
                if found is None:
                    break
                matched.append(found)
            else:
                return start, matched
        return None

    def as_written(name: str) -> str | None:
        return name if name and not name.startswith("/") and source.locate(name) is not None else None

    def alike(name: str) -> str | None:
        candidates = every.get(_key(name, endless), [])
        if len(candidates) > 1:
            raise DoesNotFit(
                f"{list_file}: {name} may be each of {_some(candidates)} in {source.path}; name it in full"
            )
        return candidates[0] if candidates else None

    _refuse_elsewhere(names[0], list_file, source)
    remark, below = "", ""
    found = find(as_written, leading)
    if found is None and any("\\" in name for name in names):
        names = [re.sub("^//+", "/", posixpath.normpath(name.replace("\\", "/"))) for name in names]
        common, leading = _leading(names)
        found = find(as_written, leading)
    if found is None:
        for name in source.tree().files:
            if not endless or is_image(name):
                every.setdefault(_key(name, endless), []).append(name)
        found = find(alike, leading)
        if found is None:
            end = "/" + _key(names[0], endless)
            starts = {key[: -len(end)] for key in every if key.endswith(end)}
            whole = [start for start in sorted(starts) if all(f"{start}/{_key(n, endless)}" in every for n in names)]
            if len(whole) > 1:
                raise DoesNotFit(
                    f"{list_file}: its images are in {_some(whole)} of {source.path}; name one with --data"
                )
            if whole:
                below = whole[0]
                found = find(lambda name: alike(f"{below}/{name}"), [""])
    if found is None:
        best = min(leading, key=lambda start: sum(as_written(name[len(start) :]) is None for name in names))
        gone = [name for name in names if as_written(name[len(best) :]) is None]
        raise DoesNotFit(
            f"{len(gone)} of {len(names)} images of {list_file} are not in {source.path}: {_some(gone)}"
            + (
                f"; {listed.encoding}, save it as UTF-8"
                if listed.encoding
                else "; --data names what the paths count from"
            )
        )
    start, matched = found
    if start:
        _refuse_other_split(start, list_file, source)
        remark = f"; the list's folder {start} is not in {source.path.name}, left out"
    if below:
        remark = f"; its paths count from {source.path / below}"
    locations: dict[str, Location] = {}
    labels: dict[str, str] = {}
    for written, name, label in zip(names, matched, listed.labels.values(), strict=True):
        location = source.locate(name)
        if name in locations or location is None:
            raise DoesNotFit(f"{list_file}: {written} and another line are both {name} in {source.path}")
        locations[name] = location
        if label is None:
            folder = posixpath.dirname(written)
            rest = folder.removeprefix(common).strip("/")
            label = rest.split("/")[0] or posixpath.basename(folder)
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


def _refuse_other_split(leading: str, list_file: Path, source: Source) -> None:
    """Refuse the images of a split in place of those of another."""
    listed = [named[0] for part in leading.split("/") if (named := role(part))]
    here = role(source.path.name)
    if here and listed and listed[-1] != here[0]:
        raise DoesNotFit(
            f"{list_file}: names images of {leading}, but --data {source.path} is another split; name the right folder"
        )


def _some(values: Sequence[str]) -> str:
    return ", ".join(values[:_SHOWN]) + (", ..." if len(values) > _SHOWN else "")
