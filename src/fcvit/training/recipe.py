"""Read recipes from TOML files and override their fields. The package contains recipes in `fcvit/recipes`."""

import dataclasses
import difflib
import importlib.resources
import os
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fcvit.errors import UnreadableFile, UsageError
from fcvit.tasks.base import DEFAULT_TASK, TASKS, get_task
from fcvit.tasks.recipe import GROUPS, Recipe, RecipeField, recipe_fields, suggestion


def read_recipe(source: str | os.PathLike[str], overrides: Mapping[str, object] | None = None) -> Recipe:
    """Read a recipe from a file and override fields.

    Args:
        source: Path of a TOML file, or the name of a recipe in the package (see `shipped`).
        overrides: Field names with their new values. A string is parsed as TOML, except for text fields,
            and "none" sets an optional field to None. `options.NAME` is an option of the architecture. Hyphens in names
            are equal to underscores.

    Raises:
        UnreadableFile: The file does not exist or is not a valid TOML file.
        UsageError: A field is unknown (the message suggests the nearest name), or a value has the wrong type or is out
            of range.
    """
    path, name = Path(source), os.fspath(source).removesuffix(".toml")
    try:
        text = shipped_text(name) if name in shipped() and not path.is_file() else path.read_text("utf-8")
        fields = tomllib.loads(text)
    except OSError as error:
        known = ", ".join(shipped())
        near = difflib.get_close_matches(name, shipped(), 1)
        hint = f"; did you mean {near[0]}?" if near else f"; expected a TOML file or one of the recipes {known}"
        raise UnreadableFile(f"{source}: {error.strerror}{hint}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UnreadableFile(f"{source}: not a valid TOML file: {error}") from error
    return build_recipe(fields, overrides or {}, os.fspath(source))


def build_recipe(fields: Mapping[str, object], overrides: Mapping[str, object], source: str) -> Recipe:
    """Build a recipe from its fields and overrides (see `read_recipe`). Messages about missing fields name `source`."""
    merged: dict[str, Any] = dict(fields)
    recipe_class = get_task(str(overrides.get("task", merged.get("task", DEFAULT_TASK)))).recipe
    known = recipe_fields(recipe_class)
    for key, value in overrides.items():
        name, _, option = key.replace("-", "_").partition(".")
        if option and name != "options":
            raise UsageError(f"--{key}: only options.NAME may contain a dot")
        value = _parse(value, None if option else known.get(name))
        if option:
            merged["options"] = {**merged.get("options", {}), option: value}
        else:
            merged[name] = value
    for name in merged:
        if name not in known:
            where = source if name in fields else f"--{name.replace('_', '-')}"
            raise UsageError(f"{where}: a recipe has no field {name!r}{suggestion(name, known)}")
    for name, field in known.items():
        if field.default is dataclasses.MISSING and name not in merged:
            raise UsageError(
                f"{source}: the recipe has no {name}; set it to a name listed by fcvit models "
                f"(fcvit finetune uses the {name} of the weights)"
            )
    return recipe_class(**merged)


def fields_of_all_tasks() -> dict[str, RecipeField]:
    """Return the recipe fields of all tasks by name, ordered by group. A field of several tasks is the first task's."""
    fields: dict[str, RecipeField] = {}
    for task in TASKS:
        fields = recipe_fields(get_task(task).recipe) | fields
    return dict(sorted(fields.items(), key=lambda item: GROUPS.index(item[1].group)))


def shipped() -> list[str]:
    """Return the names of the recipes in the package."""
    folder = importlib.resources.files("fcvit") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def shipped_text(name: str) -> str:
    """Return the TOML text of a recipe in the package."""
    return (importlib.resources.files("fcvit") / "recipes" / f"{name}.toml").read_text("utf-8")


def several_values(field: RecipeField | None) -> bool:
    """Return whether a field is a list of any length."""
    return field is not None and typing.get_args(field.kind)[-1:] == (...,)


def _parse(value: object, field: RecipeField | None) -> object:
    """Parse an override from the command line: TOML, numbers separated by commas, or unchanged text.

    The value of a field with any number of values is a list of words, as in `--label-values 0 255`.
    """
    several = several_values(field)
    if several and isinstance(value, list) and all(isinstance(word, str) for word in value):
        value = ",".join(value)
    if not isinstance(value, str):
        return os.fspath(value) if isinstance(value, os.PathLike) else value
    if field is not None and value == "none" and value not in typing.get_args(field.kind):
        return None
    if "\n" in value or (field is not None and field.kind is str):  # a path such as "2024" also looks like a number
        return value
    numbers = r"[\d.eE+-]+(\s*,\s*[\d.eE+-]+)" + ("*" if several else "+")
    text = f"[{value}]" if re.fullmatch(numbers, value) else value
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return value
