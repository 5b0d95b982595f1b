"""The command `fcvit resume`, which is `fcvit.resume` too."""

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
    """Go on with an interrupted evaluation or training; its numbers are those of an uninterrupted one.

    Args:
        run: Folder of the run.
        moved: where what the run reads is now, by the names of its options, if it is elsewhere.
        workers: Processes that decode images (default: as the command of the run).
        strict: Stop an evaluation at the first image that cannot be read.

    Raises:
        UnreadableFile, UsageError: no such run.
        DoesNotFit: data, weights or packages are not what the run began with.
    """
    from fcvit.evaluation import runner
    from fcvit.training import run as training

    command = str(runs.read_run(Path(run)).get("command"))
    if command == "eval":
        return runner.resume(run, moved=moved, workers=decoding_processes(workers), strict=strict)
    if command == "train":
        return training.resume(run, moved=moved, workers=default_workers(workers, "auto"))
    raise UsageError(f"{run}: a run of fcvit {command:.40}, which is not resumed; expected one of eval or train")
