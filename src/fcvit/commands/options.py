"""Define options that several commands share."""

import dataclasses
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fcvit import run_folder as runs
from fcvit.data.folders import find_images
from fcvit.data.transforms.augment import Interpolation
from fcvit.errors import UsageError
from fcvit.machine import own_threads
from fcvit.models.variants import PreprocessingChange, three_channels
from fcvit.tasks.base import TASKS, Task, get_task

File = Path | str
Output = Parameter(name=["--output", "-o"])
Flag = Annotated[bool, Parameter(negative=())]
Ema = Annotated[
    bool | None, Parameter(help="Use the EMA (--ema) or the raw (--no-ema) weights of a file that contains both.")
]
Classes = Annotated[
    Any, Parameter(help="Class list: CSV with id and name, or one class per line (default: from the weights file).")
]
Device = Annotated[str, Parameter(help="auto (a GPU if one is available), cpu, gpu or gpu:N.")]
Threads = Annotated[int | None, Parameter(help="Number of CPU threads (default: one per core).")]
PeerTimeout = Annotated[
    float,
    Parameter(help="Seconds within which all processes of Paddle's launcher end after one of them was lost."),
]
MaxImages = Annotated[
    int, Parameter(name=["--max-images", "--most"], help="Use at most this many images, evenly sampled.")
]
Channels = Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())]


@dataclasses.dataclass(frozen=True)
class PreprocessingOptions:
    """Changes to the preprocessing.

    Args:
        input_size: Input size in pixels, instead of the size of the weights.
        crop_fraction: Crop fraction, instead of the value of the weights.
        interpolation: Interpolation, instead of the value of the weights.
        mean: Mean of pixel values from 0 to 1: one number, or three for red, green and blue.
        std: Standard deviation of pixel values from 0 to 1: one number, or three for red, green and blue.
    """

    input_size: int | None = None
    crop_fraction: float | None = None
    interpolation: Interpolation | None = None
    mean: Channels = None
    std: Channels = None

    def changes(self) -> PreprocessingChange | None:
        """Return the given fields, or None if no field was given.

        Raises:
            UsageError: The mean or standard deviation is not one number or three.
        """
        changes: Any = {}
        for name, value in vars(self).items():
            if value is not None and name in ("mean", "std"):
                try:
                    changes[name] = three_channels(" ".join(value))
                except ValueError as error:
                    raise UsageError(f"--{name} {' '.join(value)}: {error}") from None
            elif value is not None:
                changes[name] = value
        return changes or None


def all_tasks(kind: str) -> Any:
    """Return a dataclass with the options of all tasks, for the command line. It does not check the values.

    Args:
        kind: Attribute of a task, such as "options" (see `fcvit.tasks.base.Task`).
    """
    classes = tuple(getattr(get_task(name), kind) for name in reversed(TASKS))  # the fields of the last one are first
    fields = {"__module__": __name__, "__post_init__": lambda _: None}
    return dataclasses.dataclass(frozen=True)(type("TaskOptions", classes, fields))


def given_options(options: Any) -> dict[str, Any]:
    """Return the options that differ from their defaults."""
    if options is None:
        return {}
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    return {name: value for name, value in vars(options).items() if value != defaults[name]}


def task_options(command: str, task: Task, given: dict[str, Any]) -> Any:
    """Return the prediction options of a task.

    Args:
        command: Name of the command, for messages.
        task: The task of the weights.
        given: Options and their values.

    Raises:
        UsageError: An option is not one of this task, or its value is invalid.
    """
    known = [field.name for field in dataclasses.fields(task.prediction)]
    if unknown := [name for name in given if name not in known]:
        listed, others = (", ".join(f"--{name.replace('_', '-')}" for name in names) for names in (unknown, known))
        raise UsageError(f"{command}: {listed}: not an option for {task.name}; use {others}")
    return task.prediction(**given)


def require_free_port(host: str, port: int) -> None:
    """Check that a server can listen on a port.

    Raises:
        UsageError: The number is invalid, or the port is in use or not permitted.
    """
    if not 1 <= port <= 65535:
        raise UsageError(f"--port {port}: expected 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            remedy = "choose another port, or leave --port out"
            raise UsageError(f"--port {port}: {error.strerror or error}; {remedy}") from error


def named_images(command: str, images: Sequence[str | os.PathLike[str]], output: File | None) -> list[Path]:
    """Find the images that the arguments of a command refer to.

    Args:
        command: Name of the command, for messages.
        images: Files, folders or patterns.
        output: The output folder, which must not be inside one of the image folders.

    Raises:
        UsageError: No image is given, or the output folder is inside an image folder.
        UnreadableFile: An argument matches no file.
    """
    if not images:
        raise UsageError(f"{command}: expected at least one image, folder or pattern")
    if output is not None:
        for argument in images:
            runs.reject_inside(Path(output), Path(argument), str(argument))
    return find_images([str(image) for image in images])


def decoding_processes(workers: int | None) -> int:
    """Return the number of processes that decode images.

    The default is one per core that this process may use, at most 32 (see `fcvit.machine.own_threads`).
    """
    return min(32, own_threads()) if workers is None else workers


def parse_size(value: Any) -> tuple[int, int] | None:
    """Parse the option --size (224, "240x320", or a pair) and return height and width.

    Raises:
        UsageError: The value is not an image size.
    """
    if value is None or isinstance(value, tuple):
        return value
    sides = str(value).lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and 1 <= int(side) <= 4096 for side in sides):
        raise UsageError(f"--size {value}: expected 1 to 4096 pixels, for example 224 or 240x320 (height x width)")
    return int(sides[0]), int(sides[-1])
