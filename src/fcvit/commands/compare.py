"""Compare two evaluation results (`fcvit compare` and `fcvit.compare`)."""

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
    """Compare two results of eval on the same images: test whether the difference is significant, and locate it.

    Images are matched by their content, so results from a tar archive and from a folder can be compared.

    Args:
        first: Folder of the first result, or of a run with only one result.
        second: Folder of the second result, or of a run with only one result.
        folder: New folder for comparison.json and differing.csv (the images with different predictions).

    Raises:
        UnreadableFile: A folder contains no finished result.
        UsageError: A run has several results, or both folders are the same.
        DoesNotFit: The results are for different images, or the true classes of the images differ.
    """
    task = get_task(_task_name(Path(first)))
    return task.compare(Path(first), Path(second), None if folder is None else Path(folder))


def _task_name(folder: Path) -> str:
    """Return the task recorded in a result, or the default task for older results, which do not record it."""
    for path in (folder / "metrics.json", *sorted(folder.glob("*/metrics.json"))):
        try:
            return json.loads(path.read_bytes()).get("task", DEFAULT_TASK)
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
    return DEFAULT_TASK
