"""Evaluate weights on labeled images: the command `fcvit eval` and the function `fcvit.evaluate`."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fcvit.commands.options import PeerTimeout, PreprocessingOptions, all_tasks, decoding_processes, given_options
from fcvit.errors import UsageError
from fcvit.evaluation import runner
from fcvit.evaluation.results import Evaluation
from fcvit.evaluation.settings import Settings
from fcvit.models.variants import Preprocessing
from fcvit.processes import PEER_TIMEOUT, join
from fcvit.weights.reading import Weights

# The command line accepts the options of all tasks. The task of the weights uses its own options.
TaskOptions: Any = all_tasks("options")
_fields = (*dataclasses.fields(Settings), *dataclasses.fields(TaskOptions))
_MOVABLE = [field.name for field in _fields if field.metadata.get("movable")]


def command(
    *,
    weights: Annotated[list[Path] | None, Parameter(negative=())] = None,
    data: Path | None = None,
    settings: Annotated[Settings | None, Parameter(name="*")] = None,
    options: Annotated[TaskOptions | None, Parameter(name="*")] = None,
    pixels: Annotated[PreprocessingOptions | None, Parameter(name="*")] = None,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    resume: Path | None = None,
    workers: int | None = None,
    strict: Annotated[bool, Parameter(negative=())] = False,
    record: Annotated[bool, Parameter(parse=False)] = True,
    peer_timeout: PeerTimeout = PEER_TIMEOUT,
) -> Evaluation:
    """Measure accuracy on labeled images.

    Args:
        weights: A checkpoint of any format. Repeat the option to evaluate several checkpoints in one pass.
        data: Class folders, or any folder with --list; for segmentation, the folders images and annotations; for
            detection, images with a JSON file in COCO's format, or that file. Also a tar archive, or a folder in a tar
            archive (x.tar/val).
        settings: Options of all tasks.
        options: Options of the task of the weights.
        pixels: Changes to the preprocessing.
        output: Folder of the run (default: runs/eval, or the first free one of runs/eval-2, ...).
        resume: Resume the run in this folder. Accepts --workers, --strict, and for moved files new paths: --weights,
            --data, --list, --classes, --real, --calibrate.
        workers: Processes that decode images (default: one per core, at most 32). 0 uses the main process.
        strict: Stop at the first image that cannot be read.
        record: Write the results to a folder.
    """
    join(peer_timeout)
    workers = decoding_processes(workers)
    changes = pixels.changes() if pixels else None
    if resume is not None:
        given = {**given_options(settings), **given_options(options)}
        moved = {name: given.pop(name) for name in _MOVABLE if name in given}
        moved |= {"weights": weights} if weights else {}
        moved |= {"data": data} if data is not None else {}
        if given or output is not None or changes:
            raise UsageError("eval: --resume keeps the options of the run; leave out all options that change results")
        return runner.resume(resume, moved=moved, workers=workers, strict=strict)
    if not weights or data is None:
        raise UsageError("eval: expected --weights FILE and --data FOLDER, or --resume RUN")
    settings = settings or Settings()
    if changes:
        settings = dataclasses.replace(settings, preprocessing=dict(changes))
    return runner.evaluate(weights, data, settings, given_options(options), output, record, workers, strict)


def evaluate(
    weights: "Weights | str | os.PathLike[str] | Sequence[Weights | str | os.PathLike[str]]",
    data: str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    record: bool = False,
    workers: int = 0,
    strict: bool = False,
    peer_timeout: float = PEER_TIMEOUT,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    engines: str | Sequence[str] = "auto",
    **options: Any,
) -> Evaluation:
    """Evaluate weights on labeled images.

    Args:
        weights: A weights file of any format, weights in memory, or a list of these with the same classes.
        data: Class folders, in a folder or tar archive.
        folder: A new folder for the results. If None, nothing is written, unless `record` is set.
        record: Whether to write the results to `runs/eval`, or the first free one of `runs/eval-2`, ..., if `folder`
            is None.
        workers: Number of processes that decode images while the model computes. 0 decodes in this process. A script
            that uses worker processes must call this function under `if __name__ == "__main__":`.
        strict: Whether to stop at the first image that cannot be read.
        peer_timeout: Seconds within which all processes of Paddle's launcher end after one of them was lost.
        preprocessing: A preprocessing, or changes to single fields. The protocol is then called "custom".
        engines: Names from `fcvit.inference.engines.ENGINES`, or "auto". All engines get the same batches.
        options: Other options of `fcvit eval`, by the field names of `fcvit.evaluation.settings.Settings` and of the
            options of the task (`fcvit.tasks.classification.evaluation.Options`), for example `subset`.

    Raises:
        UnreadableFile, UsageError, DoesNotFit, MissingExtra: The evaluation cannot start.
        BadImages: No image can be read, or one cannot be read and `strict` is set. Otherwise, unreadable images are
            listed in the result.
        NumbersDisagree: The logits are not finite.
        fcvit.evaluation.results.NotWritten: The results cannot be written. The error contains them.
    """
    join(peer_timeout)
    files = [weights] if isinstance(weights, Weights | str | os.PathLike) else list(weights)
    fields = {field.name for field in dataclasses.fields(Settings)}
    chosen: dict[str, Any] = {name: options.pop(name) for name in list(options) if name in fields}
    chosen["engines"] = engines if isinstance(engines, str) else ",".join(engines)
    if isinstance(preprocessing, Preprocessing):
        preprocessing = dataclasses.asdict(preprocessing)
    settings = Settings(**chosen, preprocessing=preprocessing)
    target = Path(folder) if folder is not None else None
    return runner.evaluate(files, data, settings, options, target, record or target is not None, workers, strict)
