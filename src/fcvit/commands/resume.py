"""Resume an interrupted run (`fcvit resume` and `fcvit.resume`)."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fcvit import run_folder as runs
from fcvit.commands.options import File, Flag, PeerTimeout, decoding_processes
from fcvit.commands.train import default_workers
from fcvit.errors import UsageError
from fcvit.processes import PEER_TIMEOUT, join


@dataclasses.dataclass(frozen=True)
class MovedFiles:
    """New paths of input files that were moved. The content must be the same.

    Args:
        weights: Weights file. Repeat the option for an evaluation of several files.
        data: Images, or the folder to which the relative paths of a prediction refer.
        val: Validation images of a training.
        list_file: List of image paths and classes of an evaluation.
        classes: Class list.
        real: The file real.json of an evaluation.
        calibration: Folder of calibration images of an evaluation.
    """

    weights: Annotated[list[File] | None, Parameter(negative=())] = None
    data: File | None = None
    val: File | None = None
    list_file: Annotated[File | None, Parameter(name="--list")] = None
    classes: File | None = None
    real: File | None = None
    calibration: Annotated[File | None, Parameter(name="--calibrate")] = None


def resume(
    run: File,
    /,
    *,
    files: Annotated[MovedFiles | None, Parameter(name="*")] = None,
    moved: Annotated[dict[str, Any] | None, Parameter(parse=False)] = None,
    workers: int | None = None,
    strict: Flag = False,
    peer_timeout: PeerTimeout = PEER_TIMEOUT,
) -> Any:
    """Resume an interrupted evaluation, prediction or training. The results equal those of an uninterrupted run.

    Args:
        run: Folder of the run.
        files: New paths of moved input files.
        moved: The same as a dictionary, by the names of the options.
        workers: Processes that decode images (default: as in fcvit eval, predict or train).
        strict: Stop an evaluation at the first image that cannot be read.

    Raises:
        UnreadableFile, UsageError: The folder does not contain a run that can be resumed.
        DoesNotFit: The data, weights or packages have changed since the run started.
    """
    from fcvit.commands import predict
    from fcvit.evaluation import runner
    from fcvit.training import run as training

    join(peer_timeout)
    given = {name: path for name, path in vars(files or MovedFiles()).items() if path is not None}
    weights = given.pop("weights", None)
    moved = {**(moved or {}), **{name: str(path) for name, path in given.items()}}
    command = str(runs.read_run(Path(run)).get("command"))
    if command == "eval":
        moved |= {"weights": weights} if weights else {}
        return runner.resume(run, moved=moved, workers=decoding_processes(workers), strict=strict)
    if command == "train":
        if weights and len(weights) > 1:
            raise UsageError("resume: a training has only one weights file")
        moved |= {"weights": str(weights[0])} if weights else {}
        return training.resume(run, moved=moved, workers=default_workers(workers, "auto"))
    if command == "predict":
        moved |= {"weights": weights} if weights else {}
        return predict.resume(Path(run), moved, workers)
    raise UsageError(
        f"{run}: runs of fcvit {command:.40} cannot be resumed; expected a run of fcvit eval, predict or train"
    )
