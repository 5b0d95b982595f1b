"""Class lists: ordered pairs of id and name. Names are not unique (ImageNet has two pairs), ids are."""

import ast
import collections
import csv
import functools
import importlib.resources
import json
import logging
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fcvit.errors import DoesNotFit, UnreadableFile
from fcvit.models.variants import IMAGENET_CLASSES
from fcvit.text import decode_text, parse_json, repeats

logger = logging.getLogger("fcvit")

_LARGEST, _LARGEST_LITERAL = 16 << 20, 1 << 20  # bytes of a list; characters that Python's parser gets
# Columns of a table, and keys of an object, under the names that people give them.
_INDEX = ("index", "idx", "class_index", "class_idx")
_ID = ("id", "wnid", "synset", "class_id")
_NAME = ("name", "class_name", "label", "label_name", "class")
_KEYS = re.findall(
    r"\w+", "id2label label2id names classes labels class_names label_names class_to_idx idx_to_class categories"
)
# Not "[0] cat".
_STRUCTURED = re.compile(r"\s*([{\[])\s*(['\"{\[}\]]|-?[0-9]+\s*[:,]|-?[0-9]+\s*\]\s*$|$)", re.MULTILINE)
_YAML = re.compile(
    "^(?:" + "|".join(_KEYS) + r"):[ \t]*(?:([\[{][^\]}]*[\]}])|\n((?:[ \t]*(?:-[ \t]|[0-9]+[ \t]*:).*(?:\n|$))+))",
    re.MULTILINE,
)
_NUMBERED = re.compile(r"#?[\[('\"]?([0-9]+)[\])'\"]?(\s*(?:[-=]+>|[:;,=|\t])\s*|\s+-\s+|\.?\s+|[._-](?![0-9]))(.+)")
_COUNTED = re.compile(r"(.+?)(?:\s*(?:[-=]+>|[:;,=|\t])\s*|\s+)([0-9]+)")
_ASSIGNED = re.compile(r"\A\s*\w+\s*=\s*(?=[\[{])")  # of Python
_WORDNET = re.compile(r"(n[0-9]{8})[\s,:;]+(.+)")


class ClassName(NamedTuple):
    """One class: a unique id (ImageNet's is the WordNet id) and a name for people."""

    id: str
    name: str


Classes = tuple[ClassName, ...]


@functools.cache
def imagenet() -> Classes:
    """Return the 1,000 classes of ImageNet-1K in their usual order."""
    text = (importlib.resources.files("fcvit") / "assets" / "imagenet1k_classes.csv").read_text("utf-8")
    return _from_rows(list(csv.DictReader(text.splitlines())), "the bundled list")


def digits() -> Classes:
    """Return the classes of the package's own network."""
    return tuple(ClassName(str(digit), f"digit {digit}") for digit in range(10))


def resolve_classes(argument: Classes | None, file: Classes | None, num_classes: int) -> Classes:
    """Name the outputs by the argument, else by the file's classes, else ImageNet's for 1,000 outputs, else by number.

    Raises:
        DoesNotFit: the argument has another count than the model.
    """
    if argument is not None and len(argument) != num_classes:
        raise DoesNotFit(f"{len(argument)} classes are listed, but the model has {num_classes} outputs")
    if argument is not None and (note := order_note(argument, file)):
        logger.info(note)
    if argument or file:
        return argument or file or ()
    if num_classes == IMAGENET_CLASSES:
        return imagenet()
    return tuple(ClassName(str(i), f"class {i}") for i in range(num_classes))


def labels(classes: Classes) -> list[str]:
    """Return a name for each class, no two alike: with its id where names repeat."""
    times = collections.Counter(c.name for c in classes)
    return [f"{c.name} ({c.id})" if times[c.name] > 1 else c.name for c in classes]


def order_note(listed: Classes, own: Classes | None) -> str:
    """Say where a list names the weights' classes at other outputs than the weights do; else return "".

    Args:
        own: the weights' classes; None: they name none, and ImageNet's are meant by 1,000.
    """
    whose = "the weights' classes in another order than the weights do"
    if own is None and len(listed) == IMAGENET_CLASSES:
        own, whose = imagenet(), "ImageNet's classes in another order than the usual"
    places: dict[str, int] = {}
    for index, c in enumerate(own or ()):
        for key in {_key(c.id), _key(c.name)}:
            places[key] = -1 if key in places else index  # -1: it does not tell which
    known = [places.get(_key(c.id), places.get(_key(c.name), -1)) for c in listed]
    moved = [index for index, place in enumerate(known) if place not in (-1, index)]
    if not own or not moved or 2 * sum(place != -1 for place in known) < len(listed):
        return ""
    first = moved[0]
    return (
        f"the class list names {whose}: {len(moved)} of {len(listed)} stand elsewhere, first output {first}, "
        f"{listed[first].name[:60]!r} in the list and {own[first].name[:60]!r} before; the list is used"
    )


def _key(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold().replace("_", " ")


def read_classes(path: Path) -> Classes:
    """Read a class list: a table, JSON, the text of a Python dictionary or list, or a class a line.

    docs/your-data.md has the forms. Numbers beside the names give the order, wherever they are; without
    any, the lines do. Repeated names in a numbered or JSON list get their index into the id.

    Raises:
        UnreadableFile: no such file, not text, or no class in it.
        DoesNotFit: an id stands twice, or numbers beside the names do not count.
    """
    try:
        content = path.read_bytes()
        if len(content) > _LARGEST:
            raise UnreadableFile(f"{path}: over {_LARGEST >> 20} MiB: not a class list")
        text = _ASSIGNED.sub("", decode_text(content).replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        raise _unreadable(path, "it is neither UTF-8 nor UTF-16; save it as UTF-8") from error
    except OSError as error:
        raise _unreadable(path, error.strerror or error) from error
    if _STRUCTURED.match(text):
        classes = _from_value(_literal(text, path), path)
    elif yaml := _YAML.search(text):
        flow, block = yaml.groups()
        lines = [re.sub(r"\s+#.*", "", line).strip().removeprefix("- ").strip() for line in (block or "").splitlines()]
        classes = _from_value(_literal(flow, path), path) if flow else _from_lines([_bare(x) for x in lines], path)
    else:
        classes = _from_lines(text.splitlines(), path)
    return check_classes(classes, str(path))


def _unreadable(source: Path | None, reason: object) -> UnreadableFile:
    return UnreadableFile(f"{source}: cannot read the class list: {reason}")


def _from_lines(lines: Iterable[str], source: Path) -> Classes:
    """Read a table with a header, lines with numbers or WordNet ids, or plain lines."""
    lines = [line.strip() for line in lines if line.strip()]
    if all(line.startswith("- ") for line in lines):
        lines = [line.removeprefix("- ").strip() for line in lines]
    delimiter = next((mark for mark in "\t;" if mark in "".join(lines[:1])), ",")
    columns = [column.strip().lower() for column in next(csv.reader(lines[:1], delimiter=delimiter), [])]
    if sum(any(name in columns for name in names) for names in (_INDEX, _ID, _NAME)) > 1:
        return _from_rows(list(csv.DictReader(lines[1:], columns, delimiter=delimiter)), source)
    if len(lines) > 2 and len(columns) == 2:
        # Other headers, such as ClassId,SignName: the numbers below them count.
        for form, group in ((_NUMBERED, 1), (_COUNTED, 2)):
            if _order(_numbers(_matches(form, lines[1:]), group)) and not form.fullmatch(lines[0]):
                return _from_lines(lines[1:], source)
    if numbered := _matches(_NUMBERED, lines):
        numbers = _numbers(numbered, 1)
        order = _order(numbers)
        spaced = all(not match[2].strip(" .-") for match in numbered)
        # Folders are called 001.cat and 01 cat; years and measures begin names, too.
        folders = any(match[2] in "._-" or (spaced and re.match("0[0-9]", match[1])) for match in numbered)
        if order and not folders:
            return _from_values([_bare(numbered[place][3]) for place in order])
        if (order and numbers != sorted(numbers)) if folders else (not spaced or max(numbers) <= len(lines)):
            raise DoesNotFit(
                f"{source}: the numbers before the names must count from 0 to {len(lines) - 1}, each once"
                + ("; where they are no part of the names, write 7 in place of 007" if folders else "")
            )
    if wordnet := _matches(_WORDNET, lines):
        # As the devkit's map_clsloc.txt has it: id, number, name.
        between = _matches(_NUMBERED, [match[2] for match in wordnet])
        if order := _order(_numbers(between, 1)):
            return tuple(ClassName(wordnet[place][1], _bare(between[place][3])) for place in order)
        return tuple(ClassName(match[1], _bare(match[2])) for match in wordnet)
    pairs = _matches(_COUNTED, lines)
    if len({match[1] for match in pairs}) == len(lines) > 1 and (order := _order(_numbers(pairs, 2))):
        return _from_values([_bare(pairs[place][1]) for place in order])
    if len(lines) == IMAGENET_CLASSES:
        return _from_values(lines)  # two pairs of ImageNet's short names are equal
    bare = [_bare(line) for line in lines]
    if all(line != other for line, other in zip(lines, bare, strict=True)):
        lines = bare
    return tuple(ClassName(line, line) for line in lines)


def _matches(form: re.Pattern[str], lines: Sequence[str]) -> list[re.Match[str]]:
    """Return the match of each line, or nothing where a line has another form."""
    matches = [match for line in lines if (match := form.fullmatch(line))]
    return matches if len(matches) == len(lines) else []


def _numbers(matches: Sequence[re.Match[str]], group: int) -> list[int]:
    return [int(match[group][:9]) for match in matches]


def _from_rows(rows: Sequence[dict[str, Any]], source: Path | str) -> Classes:
    """Read a table; a column of indices gives the order, else the rows do."""
    present = rows[0].keys() if rows else ()
    index, identity, name = (next((c for c in names if c in present), None) for names in (_INDEX, _ID, _NAME))
    if index:
        numbers = [_whole(row[index]) for row in rows]
        order = _order(numbers)
        if order is None or 0 not in numbers:
            raise DoesNotFit(f"{source}: the column {index} must count from 0 to {len(rows) - 1}, each once")
        rows = [rows[place] for place in order]
    elif identity and name:
        numbers = [_whole(row[identity]) for row in rows]
        if sorted(n for n in numbers if n is not None) == list(range(len(rows))) != numbers:
            raise DoesNotFit(
                f"{source}: the ids are the numbers from 0 to {len(rows) - 1} in another order than the rows: are they "
                "indices? add a column index that gives the order"
            )
    if not identity:
        return _from_values([str(row.get(name or "") or "").strip() for row in rows])
    name = name or identity
    return tuple(ClassName(str(row.get(identity) or "").strip(), str(row.get(name) or "").strip()) for row in rows)


def _literal(text: str, source: Path) -> object:
    """Read JSON, or a Python literal; nothing is executed, and a key that stands twice is refused."""
    value, repeated = None, []
    try:
        value, repeated = parse_json(text)
    except RecursionError as error:
        raise _unreadable(source, "it is nested too deeply") from error
    except json.JSONDecodeError as reason:
        if len(text) > _LARGEST_LITERAL:
            raise _unreadable(source, f"not JSON ({reason})") from reason
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's about escapes in the text
                body = ast.parse(text.strip(), mode="eval").body
            for node in ast.walk(body):
                if isinstance(node, ast.Dict):
                    repeated += repeats(str(ast.literal_eval(key)) for key in node.keys if key is not None)
            value = ast.literal_eval(body)
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
            why = f"it begins like JSON, but is none ({reason}), nor a Python dictionary or list"
            raise _unreadable(source, why) from error
    if repeated:
        raise DoesNotFit(f"{source}: {repeated[0][:60]!r} stands twice in it")
    return value


def _from_value(value: object, source: Path) -> Classes:
    """Read what a JSON file or a literal holds: names in their order, index -> name, or name -> index."""
    if isinstance(value, dict):
        inside = {key: value[key] for key in _KEYS if isinstance(value.get(key), dict | list)}
        if inside:
            lists = {key: _from_value(part, source) for key, part in inside.items()}
            if len(set(lists.values())) > 1:
                raise DoesNotFit(f"{source}: {' and '.join(lists)} do not list the same classes; leave one of them")
            return next(iter(lists.values()))
        if len(value) == 1 and isinstance(inner := next(iter(value.values())), dict | list) and _whole(*value) is None:
            return _from_value(inner, source)
        forward, backward = (_order([_whole(x) for x in side]) for side in (value.keys(), value.values()))
        if forward is not None and backward is not None and forward != backward:
            raise DoesNotFit(
                f"{source}: are the keys or the values the indices? both count; give a list in their order"
            )
        if forward is None and backward is None:
            raise DoesNotFit(
                f"{source}: expected index -> name or name -> index, counting from 0 to {len(value) - 1}, or a list in "
                "the order of the outputs"
            )
        entries = list(value.values() if forward is not None else value.keys())
        return _from_value([entries[place] for place in forward or backward or ()], source)
    if isinstance(value, list | tuple):
        if value and all(isinstance(row, dict) for row in value):
            rows = [{str(key).lower(): cell for key, cell in row.items()} for row in value]
            if rows[0].keys() & {*_ID, *_NAME}:
                return _from_rows(rows, source)
        return _from_values(value, source)
    raise _unreadable(source, f"expected names, not {str(value)[:40]!r}")


def _from_values(entries: Iterable[object], source: Path | None = None) -> Classes:
    """Read names, or pairs of id and name, in the order of the outputs."""
    pairs: list[tuple[str | None, str]] = []
    for entry in entries:
        match entry:
            case str() if match := _WORDNET.fullmatch(entry.strip()):
                pairs.append((match[1], _bare(match[2])))
            case str() | int() | float() if not isinstance(entry, bool):
                pairs.append((None, str(entry).strip()))
            case [str() | int() as identity, str() as name]:
                pairs.append((str(identity).strip(), name.strip()))
            case _:
                raise _unreadable(source, f"expected a name, or id and name, not {str(entry)[:40]!r}")
    times = collections.Counter(name for _, name in pairs)
    return tuple(
        ClassName(identity or (name if times[name] == 1 else f"{name} ({index})"), name)
        for index, (identity, name) in enumerate(pairs)
    )


def _order(numbers: Sequence[int | None]) -> list[int] | None:
    """Return where each number is, from the lowest, if they count from 0 or from 1, each once; else None."""
    counts = any(set(numbers) == set(range(start, start + len(numbers))) for start in (0, 1))
    return sorted(range(len(numbers)), key=lambda place: numbers[place] or 0) if counts else None


def _whole(value: object) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}(\.0+)?", value.strip()):
        return int(float(value))
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def _bare(text: str) -> str:
    """Return a text without quotes around it, and a comma behind them."""
    quoted = re.fullmatch(r"""(['"])(.*)\1\s*,?""", text.strip())
    return (quoted[2] if quoted else text).strip()


def as_classes(given: "Sequence[ClassName | tuple[str, str] | str] | os.PathLike[str]") -> Classes:
    """Accept a class list as people give it: the path of a file, or (id, name) pairs, or plain names."""
    if isinstance(given, str | os.PathLike):
        return read_classes(Path(given))
    pairs = (ClassName(c, c) if isinstance(c, str) else ClassName(*c) for c in given)
    return check_classes(tuple(pairs), "the class list")


def check_classes(classes: Classes, source: str) -> Classes:
    """Return the list, if it has classes and every id is there once.

    Raises:
        UnreadableFile: no classes, an empty id, or halves of characters, which are no text.
        DoesNotFit: an id stands twice.
    """
    if not classes or not all(c.id for c in classes):
        raise UnreadableFile(f"{source}: expected one class per line, or CSV with the columns id and name")
    for c in classes:
        # Bytes of file names that are not UTF-8 stand as U+DC80 to U+DCFF, and class folders may have them.
        if re.search("[\ud800-\udc7f\udd00-\udfff]", c.id + c.name):
            raise UnreadableFile(f"{source}: class {ascii(c.id)[:60]} is not text: it has half a character")
    if repeated := repeats(c.id for c in classes):
        raise DoesNotFit(f"{source}: class id {repeated[0]!r} stands twice; ids must be unique, names need not")
    return classes
