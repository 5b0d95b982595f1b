"""The command `fcvit compare`, which is `fcvit.compare` too."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fcvit.tasks.base import DEFAULT_TASK, get_task


def compare(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    /,
    *,
    folder: Annotated[str | os.PathLike[str] | None, Parameter(name=["--output", "-o"])] = None,
) -> Any:
    """Compare two results of eval over the same images: is the difference real, and where does it lie?

    Images are matched by their content, so that a tar and a folder of the same images can be compared.

    Args:
        first: Folder of a result, or of a run that has only one.
        second: The other.
        folder: New folder for comparison.json and differing.csv, the images on which they differ.

    Raises:
        UnreadableFile: no finished results there.
        UsageError: a run with several results, or twice the same.
        DoesNotFit: they are over different images, or the images have other classes.
    """
    task = get_task(_task_name(Path(first)))
    return task.compare(Path(first), Path(second), None if folder is None else Path(folder))


def _task_name(folder: Path) -> str:
    """Return the task that a result names; older results name none."""
    for path in (folder / "metrics.json", *sorted(folder.glob("*/metrics.json"))):
        try:
            return json.loads(path.read_bytes()).get("task", DEFAULT_TASK)
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
    return DEFAULT_TASK
