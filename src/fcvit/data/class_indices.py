"""Map class folders, or the labels in a list, to the class indices of a model."""

import collections
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fcvit.data.classes import Classes, imagenet
from fcvit.errors import DoesNotFit
from fcvit.models.variants import IMAGENET_CLASSES
from fcvit.text import some

_LENGTH = 60  # longest part of a label in a message, in characters
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_REMEDY = "pass the model's classes in their order with --classes FILE"


class Assignment(NamedTuple):
    """The class index of each label, and how it was found.

    Attributes:
        mapping: Label -> class index.
        rule: Readable description of the rule that was applied.
        counted: True if no classes were known, so that the index is the position in the sorted labels.
    """

    mapping: dict[str, int]
    rule: str
    counted: bool = False


def assign_labels(labels: Sequence[str], classes: Classes | None, num_classes: int, source: Path) -> Assignment:
    """Map the labels in a list to class indices.

    Numbers, including forms such as 3.0 and 003, are class indices from 0. They can also be the ids or unique names of
    known classes if they cannot be indices, or if both interpretations give the same classes. Labels that are not
    numbers are mapped by `assign_classes`.

    Args:
        labels: Sorted labels.
        source: Path of the list, for messages.

    Raises:
        DoesNotFit: The labels have no valid interpretation, or two that contradict each other.
    """
    numbers = {label: number for label in labels if (number := _number(label)) is not None}
    if len(numbers) < len(labels):
        return assign_classes(labels, classes, num_classes, "labels of the list")
    indices = {label: int(n) for label, n in numbers.items() if n.is_integer() and 0 <= n < num_classes}
    outside = sorted((label for label in labels if label not in indices), key=numbers.__getitem__)
    for kind, mapping in ((kind, _look_up(labels, table, _value)) for kind, table in _tables(classes)):
        if not outside and (contested := [label for label, index in mapping.items() if index != indices[label]]):
            label = min(contested, key=numbers.__getitem__)
            raise DoesNotFit(
                f"{source}: {label[:_LENGTH]} can be a class index or the {kind} of class {mapping[label]}; if indices "
                "are meant, give the classes ids that are not numbers with --classes FILE, and if not, use labels that "
                "are not numbers in the list"
            )
        if outside and len(mapping) == len(labels):
            return Assignment(mapping, f"the numbers in {source.name} are the model's class {kind}s")
    if not outside:
        return Assignment(indices, f"the numbers in {source.name} are class indices")
    hint = ""
    if not all(n.is_integer() for n in numbers.values()):
        hint = "; use integers as class indices"
    elif min(numbers.values()) < 0:
        hint = "; remove images without a class from the list"
    elif min(numbers.values()) == 1 and max(numbers.values()) == num_classes:
        hint = "; the indices start at 1, so subtract 1 from each"
        if num_classes == IMAGENET_CLASSES:
            hint += " (or, for the numbers of ImageNet's devkit, whose order differs, write WordNet ids instead)"
    elif classes:
        hint = f" or a class id of the model ({_some([c.id for c in classes])})"
    raise DoesNotFit(
        f"{source}: class {_some(outside)} for a model with {num_classes} outputs, expected 0 to {num_classes - 1}"
        + hint
    )


def assign_declared(
    labels: Sequence[str], declared: Sequence[str], classes: Classes | None, num_classes: int, source: Path
) -> Assignment:
    """Map the labels of data that contains the names of its classes in the order of their indices.

    If all labels are ids or unique names of the known classes, these give the index. Otherwise the indices of the data
    are used if it has as many classes as the model, unless a name is that of another class of the model.

    Args:
        labels: Sorted labels of the images.
        declared: All labels in the order of their indices.
        source: Path of the data, for messages.

    Raises:
        DoesNotFit: The classes of the data are not those of the model.
    """
    for _, table in _tables(classes):
        if len(mapping := _look_up(labels, table, composed)) == len(labels):
            return Assignment(mapping, f"the class names in {source.name} are those of the model")
    if len(declared) != num_classes:
        return assign_classes(labels, classes, num_classes, f"classes of {source.name}")
    for kind, table in _tables(classes):
        for index, label in enumerate(declared):
            # ImageNet's names in other copies are lists of synonyms: "tench, Tinca tinca".
            for name in {label, label.partition(",")[0]}:
                if table.get(name, index) != index and declared[table[name]].partition(",")[0] != name:
                    raise DoesNotFit(
                        f"{source}: class {index} is {label[:_LENGTH]}, which is the {kind} of class {table[name]} of "
                        f"the model; {_REMEDY}"
                    )
    indices = {label: index for index, label in enumerate(declared)}
    return Assignment({label: indices[label] for label in labels}, f"the class indices in {source.name}", False)


def assign_classes(labels: Sequence[str], classes: Classes | None, num_classes: int, what: str) -> Assignment:
    """Map class names to indices by the first of these rules that applies.

    1. If classes are known (from the weights or `--classes`), the labels are their ids or their unique names. A subset
       is allowed.
    2. For a model with 1,000 outputs, the labels are ImageNet's WordNet ids. A subset is allowed.
    3. If no classes are known, the index is the position in the sorted labels, as in torchvision. The number of labels
       must equal the number of outputs, and numbers among them must have the same order when they are sorted as text.

    Composed and decomposed letters (Unicode's NFC and NFD) are equal.

    Args:
        labels: Sorted labels.
        what: Name of the labels in messages, such as "class folders".

    Raises:
        DoesNotFit: No rule applies, or only some of the labels are known classes.
    """
    tables = [(f"the model's class {name}s", table) for name, table in _tables(classes)]
    if num_classes == IMAGENET_CLASSES:
        tables.append(("ImageNet's WordNet ids", {c.id: index for index, c in enumerate(imagenet())}))
    for table_name, table in tables:
        mapping = _look_up(labels, table, composed)
        unknown = [label for label in labels if label not in mapping]
        if not unknown:
            return Assignment(mapping, f"{what} are {table_name}")
        if len(unknown) < len(labels):
            raise DoesNotFit(
                f"{len(unknown)} of {len(labels)} {what} ({_some(unknown)}) are not among {table_name} "
                f"({_some([*table])}); rename or remove them, or {_REMEDY}"
            )
    if classes:
        raise DoesNotFit(
            f"none of the {what} ({_some(labels)}) is a class of the model ({_some([c.id for c in classes])}); "
            f"rename them, or {_REMEDY}"
        )
    if len(labels) != num_classes:
        raise DoesNotFit(
            f"{len(labels)} {what} ({_some(labels)}) for a model with {num_classes} outputs; "
            f"if they are classes of the model, {_REMEDY}"
        )
    numbers = [number for label in labels if (number := _number(label)) is not None]
    if numbers != sorted(numbers):
        raise DoesNotFit(
            f"the {what} are numbers, and their order as text (0, 1, 10, 2) differs from their numeric order; {_REMEDY}"
        )
    rule = f"the weights contain no class list, so the {num_classes} {what} are the classes in sorted order"
    by_value = sorted(labels, key=lambda label: re.sub(r"\d+", lambda number: number[0].zfill(20), label))
    if moved := [label for label, other in zip(labels, by_value, strict=True) if label != other]:
        rule += f" (as text: {moved[0][:_LENGTH]} before {by_value[labels.index(moved[0])][:_LENGTH]})"
    return Assignment({label: index for index, label in enumerate(labels)}, rule, counted=True)


def composed(text: str) -> str:
    """Return the text in Unicode's form NFC, in which equal letters are equal. macOS decomposes file names."""
    return unicodedata.normalize("NFC", text)


def composed_ids(classes: Classes | None) -> list[str]:
    """Return the ids of classes in composed form, or an empty list without classes."""
    return [composed(name.id) for name in classes or ()]


def _tables(classes: Classes | None) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield the tables "id" and "name", which map the ids and the unique names of the classes to indices."""
    if classes:
        yield "id", {c.id: index for index, c in enumerate(classes)}
        names = collections.Counter(c.name for c in classes)
        yield "name", {c.name: index for index, c in enumerate(classes) if names[c.name] == 1}


def _look_up(labels: Sequence[str], table: Mapping[str, int], form: Callable[[str], str]) -> dict[str, int]:
    """Return the indices of the labels that the table contains, exactly or as the only entry of the same form."""
    times = collections.Counter(map(form, table))
    forms = {form(key): index for key, index in table.items() if times[form(key)] == 1}
    indices = {label: table.get(label, forms.get(form(label))) for label in labels}
    return {label: index for label, index in indices.items() if index is not None}


def _number(text: str) -> float | None:
    return float(text) if _NUMBER.fullmatch(text := text.strip()) else None


def _value(text: str) -> str:
    """Return the text in a form in which equal numbers are equal."""
    number = _number(text)
    return composed(text) if number is None else repr(number + 0.0)


def _some(values: Sequence[str]) -> str:
    return some(values, length=_LENGTH)
