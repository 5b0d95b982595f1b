"""Lists of images and their classes, in the forms that data sets come with, and the images that they name."""

import csv
import json
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fcvit.errors import DoesNotFit, UnreadableFile
from fcvit.images.folder import is_image, legible
from fcvit.images.source import Location, Source
from fcvit.images.splits import role

_SHOWN = 5
_EXPECTED = "expected the path of an image and its class index"
# Columns of a list with a header, the surest names first; compared without case, spaces and underscores.
_PATHS = re.findall(
    r"\w+",
    """
    filename filepath filepaths path imagepath imgpath imagefile imagename imgname file image img imageid imgid id
""",
)
_LABELS = re.findall(
    r"\w+",
    """
    label labels class classes target category labelid classid targetid categoryid classindex labelname classname
    categoryname wnid synset predictionstring breed species
""",
)
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
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UnreadableFile(f"{path}: no images in the list; expected a path and a class index a line")
    for number, line in lines:
        if "\0" in line:
            raise _bad(path, number, line)
    rows, note = _json_rows(text), "read as JSON"
    if rows is None:
        rows, note = _rows(path, lines)
    elif not rows:
        raise UnreadableFile(f"{path}: expected JSON of the form class -> images, or image -> class")
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
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif content[1:2] == b"\0" or content[:1] == b"\0":  # a list begins with a character of one byte
        encoding = "utf-16-le" if content[1:2] == b"\0" else "utf-16-be"
    else:
        encoding = "utf-8-sig"
    try:
        return content.decode(encoding), ""
    except UnicodeDecodeError as error:
        if encoding != "utf-8-sig":
            raise UnreadableFile(
                f"{path}: damaged {encoding.upper()} text ({error.reason}); save it as UTF-8"
            ) from error
    return content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape"), "the list is not UTF-8 text"


def _json_rows(text: str) -> list[_Row] | None:
    """Read class -> images (Food-101), or image -> class; other JSON has no rows. None: not JSON."""
    try:
        content = json.loads(text)
    except ValueError:
        return None
    except RecursionError:
        return []
    if not isinstance(content, dict):
        return [] if isinstance(content, list) else None
    if all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in content.values()):
        return [_Row(1, name, label) for label, names in content.items() for name in names]
    if all(isinstance(label, str | int) and not isinstance(label, bool) for label in content.values()):
        return [_Row(1, name, str(label)) for name, label in content.items()]
    return []


def _rows(path: Path, lines: Sequence[tuple[int, str]]) -> tuple[list[_Row], str]:
    """Find the form in which all lines are written, and split them; in words, which form."""
    first = lines[0][1].lower()
    if len(lines) > 1 and (first.startswith("sep=") or _is_header(first.split())):
        lines = lines[1:]
    for delimiter in ",;\t":
        header = ["".join(filter(str.isalnum, field.lower())) for field in _fields(lines[0][1], delimiter)]
        column = next((header.index(name) for name in _PATHS if name in header), None)
        value = next((header.index(name) for name in _LABELS if name in header), None)
        if column is not None and value is None and len(header) == 2:
            value = 1 - column
        if column is None or value is None or len(lines) < 2:
            continue
        rows = []
        for number, line in lines[1:]:
            fields = _fields(line, delimiter)
            if len(fields) <= max(column, value) or not fields[column] or not fields[value]:
                raise _bad(path, number, line)
            rows.append(_Row(number, fields[column], _label(path, number, fields[value])))
        named = _fields(lines[0][1], delimiter)
        return rows, f"read by its columns {named[column]} and {named[value]}"
    if all("\t" in line for _, line in lines):
        return _table(path, lines, "\t"), ""
    ended = all(is_image(line.strip("\"'")) for _, line in lines)
    begun = [line.split(None, 1) for _, line in lines]
    if ended and all(len(parts) == 2 and parts[0].isdecimal() for parts in begun):
        rows = [_Row(number, _unquoted(name), label) for (number, _), (label, name) in zip(lines, begun, strict=True)]
        return rows, "read as class index and path"
    if ended and all(_has_folder(line) for _, line in lines):
        return _unlabelled(lines)
    spaced = [
        _Row(number, _unquoted(line[: -len(last)]), last) for number, line in lines for last in [line.split()[-1]]
    ]
    for delimiter in ",;":
        # Paths and classes may have commas in them, and spaces.
        cut = [_fields(line, delimiter) for _, line in lines]
        if min(map(len, cut)) < 2 or len(set(map(len, cut))) > 1:
            continue
        pictures = sum(is_image(name) for _, name, _ in spaced)
        if sum(any(map(is_image, fields[:2])) for fields in cut) > pictures or (
            not pictures and not all(" " in line for _, line in lines)
        ):
            return _table(path, lines, delimiter), f"read as columns separated by {delimiter}"
    if all(len(parts) == 1 and _has_folder(parts[0]) for parts in begun):
        return _unlabelled(lines)
    for (number, line), parts in zip(lines, begun, strict=True):
        if len(parts) == 1:
            raise _bad(path, number, line)
    return spaced, ""


def _is_header(words: Sequence[str]) -> bool:
    """Report whether a line is the header of a list with white space between path and class."""
    names = [word.replace("_", "") for word in words]
    return len(names) == 2 and names[0] in _PATHS and names[1] in _LABELS


def _has_folder(name: str) -> bool:
    return "/" in name or "\\" in name


def _unlabelled(lines: Sequence[tuple[int, str]]) -> tuple[list[_Row], str]:
    return [_Row(number, _unquoted(line), None) for number, line in lines], "without labels: the folder is the class"


def _table(path: Path, lines: Sequence[tuple[int, str]], delimiter: str) -> list[_Row]:
    """Split lines without a header: path, class, and perhaps numbers such as boxes."""
    rows = []
    cut = [_fields(line, delimiter) for _, line in lines]
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


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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
    slashes = all("/" not in name or name.startswith("/") for name in names) and any("\\" in name for name in names)
    if slashes and source.locate(names[0]) is None:
        names = [posixpath.normpath(name.replace("\\", "/")) for name in names]
    folders = [posixpath.dirname(name) for name in names]
    common = posixpath.commonpath(folders) if len({name.startswith("/") for name in names}) == 1 else ""
    leading = [""]
    for part in common.split("/"):
        if common:
            leading.append(f"{leading[-1]}{part}/")
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
            + (f"; {listed.encoding}, save it as UTF-8" if listed.encoding else "")
        )
    start, matched = found
    if start:
        _refuse_other_split(start, list_file, source)
        remark = f"; the list's folder {start} is not in {source.path.name}, left out"
    if below:
        remark = f"; its paths count from {source.path / below}"
    locations: dict[str, Location] = {}
    labels: dict[str, str] = {}
    for written, name, label, folder in zip(names, matched, listed.labels.values(), folders, strict=True):
        location = source.locate(name)
        if name in locations or location is None:
            raise DoesNotFit(f"{list_file}: {written} and another line are both {name} in {source.path}")
        locations[name] = location
        if label is None:
            rest = folder.removeprefix(common).strip("/")
            label = rest.split("/")[0] or posixpath.basename(folder)
        labels[name] = legible(label)
    return locations, labels, remark


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
