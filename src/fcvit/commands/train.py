"""Train a network by a recipe whose fields are options."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict, Unpack

from cyclopts import Group, Parameter

from fcvit.commands.options import Device, decoding_processes
from fcvit.commands.preview import Preview, draw_preview
from fcvit.errors import UsageError
from fcvit.frameworks import paddle_place
from fcvit.tasks.recipe import GROUPS, OTHER_NAMES, Recipe
from fcvit.training import run
from fcvit.training.recipe import build_recipe, fields_of_all_tasks, read_recipe

RunPath = Annotated[Path | str | None, Parameter(metavar="PATH")]
RunFolder = Annotated[RunPath, Parameter(["--output", "-o"], help="Folder of the run (default: a new one in runs/).")]
PreviewFile = Annotated[RunPath, Parameter(help="Draw training images as the network sees them (.png); do not train.")]
Workers = Annotated[
    int | None,
    Parameter(help="Processes that decode and augment (default: on a GPU one per core, at most 8; else none)."),
]


def recipe_options(*left_out: str) -> Any:
    """Return the type of `**fields`: an option for every field of a recipe except some, none of them required."""
    groups = {title: Group(title, sort_key=place) for place, title in enumerate(GROUPS)}
    options: dict[str, Any] = {name: Annotated[str, Parameter(show=False)] for name in OTHER_NAMES}
    for name, field in fields_of_all_tasks().items():
        default = f"; default: {field.default_text}" if field.default_text else ""
        about = Parameter(
            help=f"{field.description} [{field.expected}{default}]",
            group=groups[field.group],
            choices=field.choices or None,
            show_choices=False,
            metavar="VALUE",
        )
        if name == "options":
            about = Parameter.combine(about, Parameter("--option", metavar="NAME=VALUE", negative=()))
        options[name] = Annotated[list[str] if name == "options" else str, about]
    shown = {name: hint for name, hint in options.items() if name not in left_out}
    return Unpack[TypedDict("RecipeOptions", shown, total=False)]  # pyrefly: ignore


def train(
    recipe: Annotated[Recipe | str | os.PathLike[str] | None, Parameter(accepts_keys=False)] = None,
    /,
    *,
    folder: RunFolder = None,
    resume: RunPath = None,
    extend: RunPath = None,
    preview: PreviewFile = None,
    device: Device = "auto",
    workers: Workers = None,
    **fields: recipe_options(),  # pyrefly: ignore
) -> run.Training | Preview:
    """Train a network by a recipe; every field of the recipe is an option too, as in --lr 5e-4.

    Args:
        recipe: A TOML file, or the name of a recipe that comes with the package: digits, fcvit_tiny, ...
        resume: Continue the run in this folder after its last epoch, without a recipe. --data, --val, --classes and
            --weights name new places of what it reads.
        extend: Train longer than the run in this folder was meant to, with --epochs N, in a new folder.
        workers: A script that lets processes start must call this under `if __name__ == "__main__":`.
        fields: Fields of the recipe; docs/training.md lists them.

    Raises:
        UsageError: the options contradict each other, or a field of the recipe is wrong.
        FcvitError: see `fcvit.training.run`.
    """
    if sum(given is not None for given in (recipe, resume, extend)) != 1:
        raise UsageError("train: expected a recipe, or --resume RUN, or --extend RUN --epochs N")
    overrides = recipe_overrides(fields)
    workers = default_workers(workers, device)
    if recipe is not None:
        if isinstance(recipe, Recipe):
            recipe = build_recipe(dataclasses.asdict(recipe), overrides, "recipe")
        else:
            recipe = read_recipe(recipe, overrides)
        if preview is None:
            return run.train(recipe, folder=folder, device=device, workers=workers)
        if folder is not None:
            raise UsageError("--preview draws a picture and trains nothing; leave --output out")
        return draw_preview(recipe, preview)
    moved = {name: overrides.pop(name) for name in run.PLACES if name in overrides}
    places = f"where they are elsewhere now, --{', --'.join(run.PLACES)}"
    if resume is not None:
        if folder or overrides or preview or device != "auto":
            raise UsageError(f"train: --resume goes on as the run began; it takes {places}, and no other field")
        return run.resume(resume, moved=moved, workers=workers)
    epochs = str(overrides.pop("epochs", ""))
    if extend is None or overrides or not epochs.isdecimal() or preview or device != "auto":
        raise UsageError(f"train: --extend RUN takes --epochs N, of the longer schedule, and {places}")
    return run.extend(extend, int(epochs), folder=folder, moved=moved, workers=workers)


def default_workers(workers: int | None, device: str) -> int:
    """Return how many processes decode: on a CPU none, where the network needs the cores and decoding takes little."""
    if workers is None and paddle_place(device.partition(":")[0]) == "cpu":
        return 0
    return decoding_processes(workers)


def recipe_overrides(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a command as `read_recipe` takes them, with options given as a table or as NAME=VALUE."""
    overrides, options = dict(fields), fields.get("options", {})
    if not isinstance(options, Mapping):
        for word in options:
            if "=" not in word:
                raise UsageError(f"--option {word}: expected NAME=VALUE, as in --option competition=false")
        options = dict(word.split("=", 1) for word in options)
    overrides.pop("options", None)
    return overrides | {f"options.{name}": value for name, value in options.items()}
