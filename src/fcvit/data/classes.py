"""Read class lists: ordered pairs of id and name. Ids are unique. Names can repeat, as two of ImageNet's do."""

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

_LARGEST = 16 << 20  # largest class list, in bytes
_LARGEST_LITERAL = 1 << 20  # longest text that is passed to Python's parser, in characters
# Common names of columns in tables and of keys in objects.
_INDEX = ("index", "idx", "class_index", "class_idx")
_ID = ("id", "wnid", "synset", "class_id")
_NAME = ("name", "class_name", "label", "label_name", "class")
_KEYS = re.findall(
    r"\w+", "id2label label2id names classes labels class_names label_names class_to_idx idx_to_class categories"
)
# The start of JSON or of a Python literal, but not of a line such as "[0] cat".
_STRUCTURED = re.compile(r"\s*([{\[])\s*(['\"{\[}\]]|-?[0-9]+\s*[:,]|-?[0-9]+\s*\]\s*$|$)", re.MULTILINE)
_YAML = re.compile(
    "^(?:" + "|".join(_KEYS) + r"):[ \t]*(?:([\[{][^\]}]*[\]}])|\n((?:[ \t]*(?:-[ \t]|[0-9]+[ \t]*:).*(?:\n|$))+))",
    re.MULTILINE,
)
_NUMBERED = re.compile(r"#?[\[('\"]?([0-9]+)[\])'\"]?(\s*(?:[-=]+>|[:;,=|\t])\s*|\s+-\s+|\.?\s+|[._-](?![0-9]))(.+)")
_COUNTED = re.compile(r"(.+?)(?:\s*(?:[-=]+>|[:;,=|\t])\s*|\s+)([0-9]+)")
_ASSIGNED = re.compile(r"\A\s*\w+\s*=\s*(?=[\[{])")  # a Python assignment
_WORDNET = re.compile(r"(n[0-9]{8})[\s,:;]+(.+)")


class ClassName(NamedTuple):
    """The unique id of a class (the WordNet id for ImageNet) and its readable name."""

    id: str
    name: str


Classes = tuple[ClassName, ...]
Palette = tuple[tuple[int, int, int], ...]  # red, green and blue of each class, 0 to 255


@functools.cache
def imagenet() -> Classes:
    """Return the 1,000 classes of ImageNet-1K in their usual order."""
    text = (importlib.resources.files("fcvit") / "assets" / "imagenet1k_classes.csv").read_text("utf-8")
    return _from_rows(list(csv.DictReader(text.splitlines())), "the bundled list")


def digits() -> Classes:
    """Return the classes of the handwritten digits network that is part of the package."""
    return tuple(ClassName(str(digit), f"digit {digit}") for digit in range(10))


def resolve_classes(argument: Classes | None, file: Classes | None, num_classes: int) -> Classes:
    """Return the classes of a model's outputs.

    These are the classes in the argument, or else in the weights file, or else ImageNet's for 1,000 outputs. Without
    any of these, the classes are numbered.

    Raises:
        DoesNotFit: The number of classes in the argument is not the number of outputs.
    """
    if argument is not None and len(argument) != num_classes:
        raise DoesNotFit(f"the class list contains {len(argument)} classes, but the model has {num_classes} outputs")
    if argument is not None and (note := order_note(argument, file)):
        logger.info(note)
    if argument or file:
        return argument or file or ()
    if num_classes == IMAGENET_CLASSES:
        return imagenet()
    return tuple(ClassName(str(i), f"class {i}") for i in range(num_classes))


def labels(classes: Classes) -> list[str]:
    """Return a unique label for each class: its name, followed by its id if the name repeats."""
    times = collections.Counter(c.name for c in classes)
    return [f"{c.name} ({c.id})" if times[c.name] > 1 else c.name for c in classes]


def order_note(listed: Classes, own: Classes | None) -> str:
    """Return a note if a class list has the weights' classes in a different order, or else "".

    Args:
        listed: Classes in the list.
        own: Classes of the weights. If None, a list of 1,000 classes is compared with ImageNet's.
    """
    order = "the weights"
    if own is None and len(listed) == IMAGENET_CLASSES:
        own, order = imagenet(), "ImageNet"
    indices: dict[str, int] = {}
    for index, c in enumerate(own or ()):
        for key in {_key(c.id), _key(c.name)}:
            indices[key] = -1 if key in indices else index  # -1: ambiguous
    known = [indices.get(_key(c.id), indices.get(_key(c.name), -1)) for c in listed]
    moved = [position for position, index in enumerate(known) if index not in (-1, position)]
    if not own or not moved or 2 * sum(index != -1 for index in known) < len(listed):
        return ""
    first = moved[0]
    return (
        f"the class list is used, but {len(moved)} of its {len(listed)} classes are in another order than in {order}: "
        f"output {first} is {listed[first].name[:60]!r} in the list and {own[first].name[:60]!r} in {order}"
    )


def _key(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold().replace("_", " ")


def read_classes(path: Path) -> Classes:
    """Read a class list: a table, JSON, a Python dictionary or list, or one class per line.

    docs/guides/data.md describes the formats. Numbers next to the names give the order of the classes. Without numbers
    the order is that of the lines. In a numbered or JSON list, the ids of repeated names contain the class index.

    Raises:
        UnreadableFile: The file does not exist, is not text or contains no class.
        DoesNotFit: An id repeats, or the numbers next to the names are not the indices 0 to N - 1.
    """
    try:
        content = path.read_bytes()
        if len(content) > _LARGEST:
            raise UnreadableFile(f"{path}: larger than {_LARGEST >> 20} MiB, so not a class list")
        text = _ASSIGNED.sub("", decode_text(content).replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        raise _unreadable(path, "it is not UTF-8 or UTF-16 text; save it as UTF-8") from error
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
    delimiter = next((character for character in "\t;" if character in "".join(lines[:1])), ",")
    columns = [column.strip().lower() for column in next(csv.reader(lines[:1], delimiter=delimiter), [])]
    if sum(any(name in columns for name in names) for names in (_INDEX, _ID, _NAME)) > 1:
        return _from_rows(list(csv.DictReader(lines[1:], columns, delimiter=delimiter)), source)
    if len(lines) > 2 and len(columns) == 2:
        # The header can have unknown names such as ClassId,SignName. The numbers below it give the order.
        for pattern, group in ((_NUMBERED, 1), (_COUNTED, 2)):
            if _order(_numbers(_matches(pattern, lines[1:]), group)) and not pattern.fullmatch(lines[0]):
                return _from_lines(lines[1:], source)
    if numbered := _matches(_NUMBERED, lines):
        numbers = _numbers(numbered, 1)
        order = _order(numbers)
        spaced = all(not match[2].strip(" .-") for match in numbered)
        # Numbers can be part of the names, as in the folders 001.cat and 01 cat, or as years and sizes.
        folders = any(match[2] in "._-" or (spaced and re.match("0[0-9]", match[1])) for match in numbered)
        if order and not folders:
            return _from_values([_bare(numbered[row][3]) for row in order])
        if (order and numbers != sorted(numbers)) if folders else (not spaced or max(numbers) <= len(lines)):
            raise DoesNotFit(
                f"{source}: the numbers before the names must be 0 to {len(lines) - 1}, each exactly once"
                + ("; if they are not part of the names, write 7 instead of 007" if folders else "")
            )
    if wordnet := _matches(_WORDNET, lines):
        # The devkit's map_clsloc.txt has the columns id, number and name.
        after_id = _matches(_NUMBERED, [match[2] for match in wordnet])
        if order := _order(_numbers(after_id, 1)):
            return tuple(ClassName(wordnet[row][1], _bare(after_id[row][3])) for row in order)
        return tuple(ClassName(match[1], _bare(match[2])) for match in wordnet)
    pairs = _matches(_COUNTED, lines)
    if len({match[1] for match in pairs}) == len(lines) > 1 and (order := _order(_numbers(pairs, 2))):
        return _from_values([_bare(pairs[row][1]) for row in order])
    if len(lines) == IMAGENET_CLASSES:
        return _from_values(lines)  # ids with an index, because two of ImageNet's short names occur twice
    bare = [_bare(line) for line in lines]
    if all(line != other for line, other in zip(lines, bare, strict=True)):
        lines = bare
    return tuple(ClassName(line, line) for line in lines)


def _matches(pattern: re.Pattern[str], lines: Sequence[str]) -> list[re.Match[str]]:
    """Return the match of each line, or an empty list if a line does not match."""
    matches = [match for line in lines if (match := pattern.fullmatch(line))]
    return matches if len(matches) == len(lines) else []


def _numbers(matches: Sequence[re.Match[str]], group: int) -> list[int]:
    return [int(match[group][:9]) for match in matches]


def _from_rows(rows: Sequence[dict[str, Any]], source: Path | str) -> Classes:
    """Read a table, ordered by its index column or, without one, by its rows."""
    present = rows[0].keys() if rows else ()
    index, identity, name = (next((c for c in names if c in present), None) for names in (_INDEX, _ID, _NAME))
    if index:
        numbers = [_whole(row[index]) for row in rows]
        order = _order(numbers)
        if order is None or 0 not in numbers:
            raise DoesNotFit(
                f"{source}: the column {index} must contain the numbers 0 to {len(rows) - 1}, each exactly once"
            )
        rows = [rows[position] for position in order]
    elif identity and name:
        numbers = [_whole(row[identity]) for row in rows]
        if sorted(n for n in numbers if n is not None) == list(range(len(rows))) != numbers:
            raise DoesNotFit(
                f"{source}: the ids are the numbers 0 to {len(rows) - 1} but not in the order of the rows, so they can "
                "be indices; add a column named index that gives the order"
            )
    if not identity:
        return _from_values([str(row.get(name or "") or "").strip() for row in rows])
    name = name or identity
    return tuple(ClassName(str(row.get(identity) or "").strip(), str(row.get(name) or "").strip()) for row in rows)


def _literal(text: str, source: Path) -> object:
    """Parse JSON or a Python literal without executing it, and reject repeated keys."""
    value, repeated = None, []
    try:
        value, repeated = parse_json(text)
    except RecursionError as error:
        raise _unreadable(source, "it is nested too deeply") from error
    except json.JSONDecodeError as reason:
        if len(text) > _LARGEST_LITERAL:
            raise _unreadable(source, f"it is not valid JSON ({reason})") from reason
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python warns about invalid escapes in the text
                body = ast.parse(text.strip(), mode="eval").body
            for node in ast.walk(body):
                if isinstance(node, ast.Dict):
                    repeated += repeats(str(ast.literal_eval(key)) for key in node.keys if key is not None)
            value = ast.literal_eval(body)
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
            why = f"it starts like JSON but is neither valid JSON ({reason}) nor a Python dictionary or list"
            raise _unreadable(source, why) from error
    if repeated:
        raise DoesNotFit(f"{source}: the key {repeated[0][:60]!r} occurs twice; remove one of the entries")
    return value


def _from_value(value: object, source: Path) -> Classes:
    """Read the classes from a list of names, from index -> name or from name -> index."""
    if isinstance(value, dict):
        inside = {key: value[key] for key in _KEYS if isinstance(value.get(key), dict | list)}
        if inside:
            lists = {key: _from_value(part, source) for key, part in inside.items()}
            if len(set(lists.values())) > 1:
                raise DoesNotFit(
                    f"{source}: {' and '.join(lists)} do not contain the same classes in the same order; keep only one"
                )
            return next(iter(lists.values()))
        if len(value) == 1 and isinstance(inner := next(iter(value.values())), dict | list) and _whole(*value) is None:
            return _from_value(inner, source)
        forward, backward = (_order([_whole(x) for x in side]) for side in (value.keys(), value.values()))
        if forward is not None and backward is not None and forward != backward:
            raise DoesNotFit(
                f"{source}: both the keys and the values can be the indices; use a list of names in the order of the "
                "outputs"
            )
        if forward is None and backward is None:
            raise DoesNotFit(
                f"{source}: expected index -> name or name -> index with indices from 0 to {len(value) - 1}, or a list "
                "of names in the order of the outputs"
            )
        entries = list(value.values() if forward is not None else value.keys())
        return _from_value([entries[position] for position in forward or backward or ()], source)
    if isinstance(value, list | tuple):
        if value and all(isinstance(row, dict) for row in value):
            rows = [{str(key).lower(): cell for key, cell in row.items()} for row in value]
            if rows[0].keys() & {*_ID, *_NAME}:
                return _from_rows(rows, source)
        return _from_values(value, source)
    raise _unreadable(source, f"expected a list or dictionary of names, not {str(value)[:40]!r}")


def _from_values(entries: Iterable[object], source: Path | None = None) -> Classes:
    """Read a list of names, or of pairs of id and name, in the order of the outputs."""
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
                raise _unreadable(source, f"expected a name or a pair of id and name, not {str(entry)[:40]!r}")
    times = collections.Counter(name for _, name in pairs)
    return tuple(
        ClassName(identity or (name if times[name] == 1 else f"{name} ({index})"), name)
        for index, (identity, name) in enumerate(pairs)
    )


def _order(numbers: Sequence[int | None]) -> list[int] | None:
    """Return the positions that sort the numbers, or None unless these are 0 to N - 1 or 1 to N, each exactly once."""
    valid = any(set(numbers) == set(range(start, start + len(numbers))) for start in (0, 1))
    return sorted(range(len(numbers)), key=lambda position: numbers[position] or 0) if valid else None


def _whole(value: object) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}(\.0+)?", value.strip()):
        return int(float(value))
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def _bare(text: str) -> str:
    """Return the text without enclosing quotes and a comma after them."""
    quoted = re.fullmatch(r"""(['"])(.*)\1\s*,?""", text.strip())
    return (quoted[2] if quoted else text).strip()


def as_classes(given: "Sequence[ClassName | tuple[str, str] | str] | os.PathLike[str]") -> Classes:
    """Return the classes from the path of a class list, from (id, name) pairs or from names."""
    if isinstance(given, str | os.PathLike):
        return read_classes(Path(given))
    pairs = (ClassName(c, c) if isinstance(c, str) else ClassName(*c) for c in given)
    return check_classes(tuple(pairs), "the class list")


def check_palette(colors: object) -> Palette:
    """Return a palette after checking that it is a list of three integers from 0 to 255 per class.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(colors, list | tuple) or not all(_is_color(color) for color in colors):
        raise ValueError("expected three integers from 0 to 255 per color")
    return tuple(tuple(color) for color in colors)


def _is_color(color: object) -> bool:
    if not isinstance(color, list | tuple) or len(color) != 3:
        return False
    return all(type(value) is int and 0 <= value <= 255 for value in color)


def check_classes(classes: Classes, source: str) -> Classes:
    """Return the class list after checking that it is not empty and that its ids are unique.

    Raises:
        UnreadableFile: The list is empty, an id is empty, or an id or name contains an unpaired surrogate.
        DoesNotFit: An id repeats.
    """
    if not classes or not all(c.id for c in classes):
        raise UnreadableFile(
            f"{source}: no class or a class without an id; use one class per line, or CSV with the columns id and name"
        )
    for c in classes:
        # U+DC80 to U+DCFF are allowed: class folders whose names are not UTF-8 can contain them.
        if re.search("[\ud800-\udc7f\udd00-\udfff]", c.id + c.name):
            raise UnreadableFile(f"{source}: class {ascii(c.id)[:60]} is not valid text: it has an unpaired surrogate")
    if repeated := repeats(c.id for c in classes):
        raise DoesNotFit(f"{source}: class id {repeated[0]!r} occurs twice; use unique ids (names can repeat)")
    return classes
