"""Read lists of images and their classes in common data set formats, and find the listed images."""

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

# Column names in the header of a list, most specific first. Case, spaces and underscores are ignored.
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
_UNLABELED = "no labels, so the folder of each image is its class"
_BOXES = re.compile(r"(\S+)(?: -?[\d.]+){4}")  # class and box in Kaggle's ImageNet lists

Lines = Sequence[tuple[int, str]]  # line number and text of each line that is not empty


class ImageList(NamedTuple):
    """Image names and labels as the list file contains them.

    Attributes:
        labels: Image name -> label. None means that the image's folder is its label.
        notes: Readable notes on how the list was interpreted.
        encoding_problem: Description for messages if the file is not UTF-8 text, or else "".
    """

    labels: Mapping[str, str | None]
    notes: tuple[str, ...] = ()
    encoding_problem: str = ""


class _Row(NamedTuple):
    line: int
    name: str
    label: str | None


def read_list(path: Path) -> ImageList:
    """Read a list of images: one image and class per line, CSV with or without a header, or JSON.

    Raises:
        UnreadableFile: The file cannot be read or has none of these formats.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableFile(f"{path}: cannot read the list: {error.strerror}") from error
    encoding_problem = ""
    try:
        text = decode_text(content)
    except UnicodeDecodeError as error:
        if not error.encoding.startswith("utf-8"):
            raise UnreadableFile(
                f"{path}: damaged {error.encoding.upper()} text ({error.reason}); save it as UTF-8"
            ) from error
        # Bytes that are not UTF-8 become surrogates, as in file names.
        text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
        encoding_problem = "the list is not UTF-8 text"
    if "\n" not in text:  # line ends of classic Mac OS
        text = text.replace("\r", "\n")
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UnreadableFile(f"{path}: no images in the list; expected the path and class index of one image per line")
    for number, line in lines:
        if "\0" in line:
            raise _bad(path, number, line)
    rows, note = _json_rows(path, lines), "read as JSON"
    if rows is None:
        rows, note = _rows(path, lines)
    elif not rows:
        raise UnreadableFile(
            f"{path}: expected JSON with class -> images, with image -> class, or with objects that have the keys path "
            "and label"
        )
    labels: dict[str, str | None] = {}
    for number, name, label in rows:
        name = posixpath.normpath(name)
        if name.startswith(".."):
            raise UnreadableFile(
                f"{path}: line {number}: {name[:60]!r} is outside the data; expected a path below --data"
            )
        if name in labels:
            raise UnreadableFile(f"{path}: line {number}: {name[:60]} occurs twice; remove one of the lines")
        labels[name] = label
    return ImageList(labels, (f"{path.name}: {note}",) if note else (), encoding_problem)


def _bad(path: Path, number: int, line: str) -> UnreadableFile:
    return UnreadableFile(f"{path}: line {number} is {line[:60]!r}; expected the path of an image and its class index")


def _json_rows(path: Path, lines: Lines) -> list[_Row] | None:
    """Read class -> images (Food-101), image -> class, or objects with path and label, optionally one per line.

    Return None if the text is not JSON, and no rows if the JSON has another format.
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
        raise UnreadableFile(f"{path}: {some(repeated)[:80]} occurs twice; remove one of the entries")
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
    """Return the indices of the path and label columns, found by their names, or None."""
    header = ["".join(filter(str.isalnum, name.lower())) for name in names]
    path = next((header.index(name) for name in _PATHS if name in header), None)
    other = None if path is None or len(header) != 2 else 1 - path
    label = next((header.index(name) for name in _LABELS if name in header), other)
    return None if path is None or label is None else (path, label)


def _rows(path: Path, lines: Lines) -> tuple[list[_Row], str]:
    """Split the lines by the format that all of them have. Return the rows and a note that names the format."""
    first = lines[0][1].lower()
    titles = [word.replace("_", "") for word in first.split()]
    header = len(titles) == 2 and titles[0] in _PATHS and titles[1] in _LABELS
    if len(lines) > 1 and (header or first.startswith("sep=")):
        lines = lines[1:]
    for delimiter in ",;\t|" if len(lines) > 1 else "":
        names = _fields(lines[0][1], delimiter)
        if columns := _columns(names):
            name_column, label_column = columns
            rows = []
            for number, line in lines[1:]:
                fields = _fields(line, delimiter)
                if len(fields) <= max(columns) or not fields[name_column] or not fields[label_column]:
                    raise _bad(path, number, line)
                rows.append(_Row(number, fields[name_column], _label(path, number, fields[label_column])))
            return rows, f"images and labels are read from the columns {names[name_column]} and {names[label_column]}"
    if all("\t" in line for _, line in lines):
        return _without_header(_table(path, lines, "\t"))
    words = [line.split(None, 1) for _, line in lines]
    unlabeled = [_Row(number, _unquoted(line), None) for number, line in lines]
    if all(is_image(line.strip("\"'")) for _, line in lines):
        if all(len(parts) == 2 and parts[0].isdecimal() for parts in words):
            rows = [
                _Row(number, _unquoted(parts[1]), parts[0]) for (number, _), parts in zip(lines, words, strict=True)
            ]
            if len(rows) > 1 and [row.label for row in rows] == [str(count) for count in range(1, len(rows) + 1)]:
                raise UnreadableFile(
                    f"{path}: the numbers before the paths can be line numbers or classes; remove line numbers (the "
                    "folder of each image is then its class), or write classes after the paths"
                )
            return rows, "each line is read as a class index and a path"
        if all(_has_folder(line) for _, line in lines):
            return unlabeled, _UNLABELED
    spaced = [_spaced(number, line) for number, line in lines]
    images = sum(is_image(name) for _, name, _ in spaced)
    for delimiter in ",;|":
        # Paths and classes can contain commas and spaces.
        table = [_fields(line, delimiter) for _, line in lines]
        if (
            min(map(len, table)) > 1
            and len(set(map(len, table))) == 1
            and (
                sum(any(map(is_image, fields[:2])) for fields in table) > images
                or (not images and not all(" " in line for _, line in lines))
            )
        ):
            rows, note = _without_header(_table(path, lines, delimiter))
            return rows, f"the columns are separated by {delimiter}{note and ', '}{note}"
    if all(len(parts) == 1 and _has_folder(parts[0]) for parts in words):
        return unlabeled, _UNLABELED
    for (number, line), parts in zip(lines, words, strict=True):
        if len(parts) == 1:
            raise _bad(path, number, line)
    return _without_header(spaced)


def _without_header(rows: list[_Row]) -> tuple[list[_Row], str]:
    """Remove the first row if it cannot be an image and is therefore a header. Also return a note about it, or ""."""
    first, *others = rows
    labels = [label for _, _, label in others if label]
    numbers = all(_number(label) is not None for label in labels)
    images = all(is_image(name) for _, name, _ in others) and first.label not in labels
    if not others or is_image(first.name) or _number(first.label or "") is not None or not (numbers or images):
        return rows, ""
    return others, f"line {first.line} is skipped as a header"


def _spaced(number: int, line: str) -> _Row:
    """Split a line at white space, after the ending of the image file or else before the last word."""
    ending = re.match(r".*\.(\w+)[\"']?(?=\s)", line)
    split = ending.end() if ending and is_image("x." + ending[1]) else len(line) - len(line.split()[-1])
    return _Row(number, _unquoted(line[:split]), _unquoted(line[split:]))


def _has_folder(name: str) -> bool:
    return "/" in name or "\\" in name


def _table(path: Path, lines: Lines, delimiter: str) -> list[_Row]:
    """Split lines without column names into path, class and optional numbers such as boxes, which are ignored."""
    rows = []
    table = [_fields(line, delimiter) for _, line in lines]
    if all(len(f) > 2 and {*map(_number, f[1:])} == {0, 1} for f in table):
        raise UnreadableFile(f"{path}: each class is a column of 0 and 1; write the class of each image instead")
    swapped = all(len(f) == 2 and is_image(f[1]) and not is_image(f[0]) for f in table)
    for (number, line), fields in zip(lines, table, strict=True):
        while len(fields) > 2 and not fields[-1]:
            fields.pop()
        if len(fields) < 2 or not fields[0] or not fields[1] or None in map(_number, fields[2:]):
            raise _bad(path, number, line)
        rows.append(_Row(number, fields[swapped], fields[not swapped]))
    return rows


def _fields(line: str, delimiter: str) -> list[str]:
    try:
        return [field.strip() for field in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))]
    except csv.Error:  # a field over the size limit of the csv module
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
    """Return the label, or the class of the boxes if the label has the format of Kaggle's ImageNet lists."""
    classes = _BOXES.findall(text)
    if not classes or _BOXES.sub("", text).strip():
        return text
    if len(set(classes)) > 1:
        raise UnreadableFile(
            f"{path}: line {number} has boxes of several classes ({some(sorted(set(classes)))}); expected one class"
        )
    return classes[0]


def find_listed(listed: ImageList, list_file: Path, source: Source) -> tuple[dict[str, Location], dict[str, str], str]:
    """Find the images of a list, by the same rule for all of them.

    The paths are relative to the data, after the removal of the shortest common prefix with which all images exist. If
    there is no such prefix, the paths are relative to the only folder in the data that contains all of them. If images
    do not exist under the listed names, forward slashes, other Unicode forms and, for names without an image file
    ending, the possible endings are tried.

    Returns:
        The location and the label of each image, by its name relative to the data, and a remark for the notes if paths
        were changed, or else "".

    Raises:
        UnreadableFile: A path leads to a file outside the data.
        DoesNotFit: Images do not exist, or the folder in the list names another split than the data.
    """
    names = list(listed.labels)
    common, prefixes = _common_prefixes(names)
    no_endings = not any(map(is_image, names))
    files_by_key: dict[str, list[str]] = {}  # filled if the images do not exist under the listed names

    def find(match: Callable[[str], str | None], prefixes: Iterable[str]) -> tuple[str, list[str]] | None:
        for prefix in prefixes:
            results = (match(name[len(prefix) :]) for name in names)
            matched = [name for name in itertools.takewhile(lambda name: name is not None, results) if name]
            if len(matched) == len(names):
                return prefix, matched
        return None

    def exact(name: str) -> str | None:
        return name if name and not name.startswith("/") and source.locate(name) is not None else None

    def similar(name: str) -> str | None:
        candidates = files_by_key.get(_key(name, no_endings), [])
        if len(candidates) > 1:
            raise DoesNotFit(
                f"{list_file}: {name} matches several files in {source.path} ({some(candidates)}); write the full name"
            )
        return candidates[0] if candidates else None

    _reject_outside(names[0], list_file, source)
    remark, folder = "", ""
    match = find(exact, prefixes)
    if match is None and any("\\" in name for name in names):
        names = [re.sub("^//+", "/", posixpath.normpath(name.replace("\\", "/"))) for name in names]
        common, prefixes = _common_prefixes(names)
        match = find(exact, prefixes)
    if match is None:
        for name in source.tree().files:
            if not no_endings or is_image(name):
                files_by_key.setdefault(_key(name, no_endings), []).append(name)
        match = find(similar, prefixes)
    if match is None:
        end = "/" + _key(names[0], no_endings)
        candidates = sorted({key[: -len(end)] for key in files_by_key if key.endswith(end)})
        keys = [_key(name, no_endings) for name in names]
        folders = [parent for parent in candidates if all(f"{parent}/{key}" in files_by_key for key in keys)]
        if len(folders) > 1:
            raise DoesNotFit(
                f"{list_file}: several folders in {source.path} contain all the images ({some(folders)}); pass one of "
                "them with --data"
            )
        if folders:
            folder = folders[0]
            match = find(lambda name: similar(f"{folder}/{name}"), [""])
            remark = f"; its paths are relative to {source.path / folder}"
    if match is None:
        missing = min(([name for name in names if exact(name[len(prefix) :]) is None] for prefix in prefixes), key=len)
        remedy = (
            f"{listed.encoding_problem}, save it as UTF-8"
            if listed.encoding_problem
            else "pass the folder that the paths are relative to with --data"
        )
        raise DoesNotFit(
            f"{list_file}: {len(missing)} of {len(names)} images are not in {source.path} ({some(missing)}); {remedy}"
        )
    prefix, matched = match
    if prefix:
        listed_splits = [split[0] for part in prefix.split("/") if (split := role(part))]
        data_split = role(source.path.name)
        if data_split and listed_splits and listed_splits[-1] != data_split[0]:
            raise DoesNotFit(
                f"{list_file}: the listed images are in {prefix}, but --data {source.path} is another split; pass the "
                "folder of the listed split"
            )
        remark = f"; the folder {prefix} in the list is ignored because {source.path.name} does not contain it"
    locations: dict[str, Location] = {}
    labels: dict[str, str] = {}
    for written, name, label in zip(names, matched, listed.labels.values(), strict=True):
        location = source.locate(name)
        if name in locations or location is None:
            raise DoesNotFit(
                f"{list_file}: {written} and another line name the same file {name} in {source.path}; remove one line"
            )
        locations[name] = location
        if label is None:
            parent = posixpath.dirname(written)
            label = parent.removeprefix(common).strip("/").split("/")[0] or posixpath.basename(parent)
        labels[name] = legible(label)
    return locations, labels, remark


def _common_prefixes(names: Sequence[str]) -> tuple[str, list[str]]:
    """Return the common folder of all names, and "" and its leading parts from short to long."""
    common = ""
    if len({name.startswith("/") for name in names}) == 1:
        common = posixpath.commonpath([posixpath.dirname(name) for name in names])
    parts = [f"{part}/" for part in common.split("/")] if common else []
    return common, list(itertools.accumulate(parts, initial=""))


def _key(name: str, remove_ending: bool) -> str:
    name = unicodedata.normalize("NFC", name)
    return posixpath.splitext(name)[0] if remove_ending and is_image(name) else name


def _reject_outside(name: str, list_file: Path, source: Source) -> None:
    """Reject a name that is an absolute path, or relative to a parent of the data, of a file outside the data."""
    absolute = name.startswith("/")
    if source.archive is not None or (not absolute and source.locate(name) is not None):
        return
    roots = Path(source.path).absolute(), Path(source.path).resolve()
    for folder in (Path("/"),) if absolute else roots[0].parents:
        path = folder / name
        if not path.is_file():
            continue
        if roots[0] in path.parents or roots[1] in path.resolve().parents:
            return
        raise UnreadableFile(
            f"{list_file}: {str(path)[:120]} is outside the data; expected a path below --data {source.path}"
        )
