"""Resume an interrupted run (`fcvit resume` and `fcvit.resume`)."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fcvit import run_folder as runs
from fcvit.commands.options import File, Flag, decoding_processes
from fcvit.commands.train import default_workers
from fcvit.errors import UsageError


def resume(
    run: File,
    /,
    *,
    moved: Annotated[dict[str, Any] | None, Parameter(parse=False)] = None,
    workers: int | None = None,
    strict: Flag = False,
) -> Any:
    """Resume an interrupted evaluation or training run. The results equal those of an uninterrupted run.

    Args:
        run: Folder of the run.
        moved: New paths of moved input files, by the names of their options.
        workers: Processes that decode images (default: as in fcvit eval or fcvit train).
        strict: Stop an evaluation at the first image that cannot be read.

    Raises:
        UnreadableFile, UsageError: The folder does not contain a run that can be resumed.
        DoesNotFit: The data, weights or packages have changed since the run started.
    """
    from fcvit.evaluation import runner
    from fcvit.training import run as training

    command = str(runs.read_run(Path(run)).get("command"))
    if command == "eval":
        return runner.resume(run, moved=moved, workers=decoding_processes(workers), strict=strict)
    if command == "train":
        return training.resume(run, moved=moved, workers=default_workers(workers, "auto"))
    raise UsageError(f"{run}: runs of fcvit {command:.40} cannot be resumed; expected a run of fcvit eval or train")
