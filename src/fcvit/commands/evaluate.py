"""The command `fcvit eval`, and `fcvit.evaluate` with the same options as keyword arguments."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fcvit.commands.options import PreprocessingOptions, decoding_processes
from fcvit.errors import UsageError
from fcvit.evaluation import runner
from fcvit.evaluation.results import Evaluation
from fcvit.evaluation.settings import Settings
from fcvit.models.variants import Preprocessing
from fcvit.tasks.base import TASKS, get_task
from fcvit.weights.reading import Weights

# The options of all tasks in one group; the task of the weights takes its own.
_options = tuple(get_task(name).options for name in TASKS)
TaskOptions: Any = dataclasses.dataclass(frozen=True)(type("TaskOptions", _options, {"__module__": __name__}))
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
) -> Evaluation:
    """Measure accuracy on labeled images.

    Args:
        weights: A checkpoint of any format; several, each with its own --weights, go through in one pass.
        data: Class folders, or with --list any folder; also a tar, or a folder in one (x.tar/val).
        settings: Of every task.
        options: Of the task of the weights.
        pixels: Another preprocessing.
        output: Folder of the run (default: runs/eval, or the first free one after it).
        resume: Go on with the run in this folder; takes no other option but --workers, --strict, and
            --weights, --data, --list, --classes, --real, --calibrate for what is elsewhere now.
        workers: Processes that decode images (default: one for each core, at most 8); 0: none.
        strict: Stop at the first image that cannot be read.
        record: Write the results into a folder.
    """
    workers = decoding_processes(workers)
    changes = pixels.changes() if pixels else None
    if resume is not None:
        given = {**_given(settings), **_given(options)}
        moved = {name: given.pop(name) for name in _MOVABLE if name in given}
        moved |= {"weights": weights} if weights else {}
        moved |= {"data": data} if data is not None else {}
        if given or output is not None or changes:
            raise UsageError("eval: --resume goes on as the run began; leave out what else decides its numbers")
        return runner.resume(resume, moved=moved, workers=workers, strict=strict)
    if not weights or data is None:
        raise UsageError("eval: expected --weights FILE and --data FOLDER, or --resume RUN")
    settings = settings or Settings()
    if changes:
        settings = dataclasses.replace(settings, preprocessing=dict(changes))
    return runner.evaluate(weights, data, settings, _given(options), output, record, workers, strict)


def evaluate(
    weights: "Weights | str | os.PathLike[str] | Sequence[Weights | str | os.PathLike[str]]",
    data: str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    record: bool = False,
    workers: int = 0,
    strict: bool = False,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    engines: str | Sequence[str] = "auto",
    **options: Any,
) -> Evaluation:
    """Evaluate weights on labeled images.

    Args:
        weights: a file of any format, weights in memory, or several of either that know the same classes.
        data: class folders, a folder or tar.
        folder: a new folder for the results; None: nothing is written, or, with `record`, the folder is
            `runs/eval` or the first free one after it.
        workers: processes that decode while the model computes; 0: this one decodes. A script that starts
            processes must begin its work under `if __name__ == "__main__":`.
        strict: stop at the first image that cannot be read.
        preprocessing: another one, or single fields of it, which makes the protocol "custom".
        engines: names of `fcvit.inference.engines.ENGINES`, or "auto"; all see the same batches.
        options: the other options of `fcvit eval`, by the names of the fields of `fcvit.evaluation.settings.Settings`
            and of the options of the task (`fcvit.tasks.classification.evaluation.Options`), such as `subset`.

    Raises:
        UnreadableFile, UsageError, DoesNotFit, MissingExtra: before the first batch.
        BadImages: not a single image can be read, or with `strict` one cannot. Single bad ones are
            listed in the result.
        NumbersDisagree: logits that are not finite.
        fcvit.evaluation.results.NotWritten: the disk is full; the figures are in the error.
    """
    files = [weights] if isinstance(weights, Weights | str | os.PathLike) else list(weights)
    fields = {field.name for field in dataclasses.fields(Settings)}
    chosen: dict[str, Any] = {name: options.pop(name) for name in list(options) if name in fields}
    chosen["engines"] = engines if isinstance(engines, str) else ",".join(engines)
    if isinstance(preprocessing, Preprocessing):
        preprocessing = dataclasses.asdict(preprocessing)
    settings = Settings(**chosen, preprocessing=preprocessing)
    target = Path(folder) if folder is not None else None
    return runner.evaluate(files, data, settings, options, target, record or target is not None, workers, strict)


def _given(options: Any) -> dict[str, Any]:
    """Return the options that differ from their defaults."""
    if options is None:
        return {}
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    return {name: value for name, value in vars(options).items() if value != defaults[name]}
