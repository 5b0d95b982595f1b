"""Train a network with a recipe. Every field of the recipe is also an option."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict, Unpack

from cyclopts import Group, Parameter

from fcvit.commands.options import Device, Flag, PeerTimeout, decoding_processes
from fcvit.commands.preview import Preview, draw_preview
from fcvit.errors import UsageError
from fcvit.frameworks import paddle_place
from fcvit.processes import PEER_TIMEOUT, join
from fcvit.tasks.recipe import GROUPS, OTHER_NAMES, Recipe
from fcvit.training import run
from fcvit.training.recipe import build_recipe, fields_of_all_tasks, read_recipe, several_values

RunPath = Annotated[Path | str | None, Parameter(metavar="PATH")]
RunFolder = Annotated[RunPath, Parameter(["--output", "-o"], help="Folder of the run (default: new folder in runs/).")]
PreviewFile = Annotated[RunPath, Parameter(help="Write a picture of augmented training images (.png); do not train.")]
ResumeIfExists = Annotated[Flag, Parameter(help="Continue the run in --output if it exists, and start it otherwise.")]
Workers = Annotated[
    int | None,
    Parameter(help="Processes that decode and augment (default: with a GPU one per core, at most 32; on a CPU 0)."),
]


def recipe_options(*left_out: str, **defaults: object) -> Any:
    """Return the type of `**fields`, with an optional command-line option for every recipe field not in `left_out`.

    The help shows `defaults` instead of the declared defaults.
    """
    groups = {title: Group(title, sort_key=position) for position, title in enumerate(GROUPS)}
    options: dict[str, Any] = {name: Annotated[str, Parameter(show=False)] for name in OTHER_NAMES}
    for name, field in fields_of_all_tasks().items():
        field = dataclasses.replace(field, default=defaults.get(name, field.default))
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
        if several_values(field):
            about = Parameter.combine(about, Parameter(consume_multiple=True, negative=()))
        options[name] = Annotated[list[str] if name == "options" or several_values(field) else str, about]
    shown = {name: hint for name, hint in options.items() if name not in left_out}
    return Unpack[TypedDict("RecipeOptions", shown, total=False)]  # pyrefly: ignore


def train(
    recipe: Annotated[Recipe | str | os.PathLike[str] | None, Parameter(accepts_keys=False)] = None,
    /,
    *,
    folder: RunFolder = None,
    resume: RunPath = None,
    resume_if_exists: ResumeIfExists = False,
    extend: RunPath = None,
    preview: PreviewFile = None,
    device: Device = "auto",
    workers: Workers = None,
    peer_timeout: PeerTimeout = PEER_TIMEOUT,
    **fields: recipe_options(),  # pyrefly: ignore
) -> run.Training | Preview:
    """Train a network with a recipe. Every field of the recipe is also an option, for example --lr 5e-4.

    Args:
        recipe: A TOML file, or the name of an included recipe: digits, fcvit_tiny, ... (see fcvit recipes).
        resume: Resume the run in this folder. For moved files, pass new paths: --data, --val, --classes, --weights.
        extend: Continue the run in this folder to a total of --epochs N, in a new folder.
        workers: Number of worker processes. A script that uses them must call this function under
            `if __name__ == "__main__":`.
        fields: Fields of the recipe. docs/reference/recipes.md lists them.

    Raises:
        UsageError: The options contradict each other, or a field of the recipe is invalid.
        FcvitError: See `fcvit.training.run`.
    """
    join(peer_timeout)
    if sum(given is not None for given in (recipe, resume, extend)) != 1:
        raise UsageError("train: expected a recipe, or --resume RUN, or --extend RUN --epochs N")
    overrides = recipe_overrides(fields)
    workers = default_workers(workers, device)
    if recipe is not None:
        if isinstance(recipe, Recipe):
            recipe = build_recipe(dataclasses.asdict(recipe), overrides, "recipe")
        else:
            recipe = read_recipe(recipe, overrides)
        if resume_if_exists:
            if folder is None or preview is not None:
                raise UsageError("--resume-if-exists: expected the folder of the run with --output, and no --preview")
            return run.resume_or_train(recipe, folder=folder, device=device, workers=workers)
        if preview is None:
            return run.train(recipe, folder=folder, device=device, workers=workers)
        if folder is not None:
            raise UsageError("--preview writes a picture and does not train; leave out --output")
        return draw_preview(recipe, preview)
    moved = {name: overrides.pop(name) for name in run.PLACES if name in overrides}
    paths = f"--{', --'.join(run.PLACES)} (for moved files)"
    if resume is not None:
        if folder or overrides or preview or resume_if_exists or device != "auto":
            raise UsageError(f"train: --resume keeps the options of the run; only --workers and {paths} can be added")
        return run.resume(resume, moved=moved, workers=workers)
    epochs = str(overrides.pop("epochs", ""))
    other = overrides or preview or resume_if_exists or device != "auto"
    if extend is None or other or not epochs.isdecimal():
        raise UsageError(f"train: --extend RUN requires --epochs N; only -o, --workers and {paths} can be added")
    return run.extend(extend, int(epochs), folder=folder, moved=moved, workers=workers)


def default_workers(workers: int | None, device: str) -> int:
    """Return the number of decoding processes. On a CPU, the default is 0, because the network needs all cores."""
    if workers is None and paddle_place(device.partition(":")[0]) == "cpu":
        return 0
    return decoding_processes(workers)


def recipe_overrides(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Convert fields of a command to overrides for `read_recipe`. `options` is a mapping or a list of NAME=VALUE."""
    overrides, options = dict(fields), fields.get("options", {})
    if not isinstance(options, Mapping):
        for word in options:
            if "=" not in word:
                raise UsageError(f"--option {word}: expected NAME=VALUE, for example --option competition=false")
        options = dict(word.split("=", 1) for word in options)
    overrides.pop("options", None)
    return overrides | {f"options.{name}": value for name, value in options.items()}
