"""Accuracy of weights on labeled images: several weights, protocols and engines in one pass over them.

The way of the data: images -> batches of crops -> each lane's logits -> a record of every image in the
journal -> figures from all records at once -> a folder for each lane. Since figures come from the records
alone, a run that is continued, or shared by several processes, ends as an uninterrupted one does.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from fcvit import interrupts
from fcvit import run_folder as runs
from fcvit.analysis.similarity import Viewer, overview, panel
from fcvit.data.class_folders import LabeledImages
from fcvit.data.classes import labels
from fcvit.data.loader import DIGEST, Batch, Workers, batches, read_file
from fcvit.data.transforms.preprocess import Center, decode, decoders
from fcvit.errors import BadImages, DoesNotFit, MissingExtra, NumbersDisagree, UnreadableFile, UsageError
from fcvit.evaluation import page as run_page
from fcvit.evaluation import results
from fcvit.evaluation.figures import Figures, figures
from fcvit.evaluation.journal import Frame, Journal
from fcvit.evaluation.protocols import AUTHORS
from fcvit.evaluation.results import Agreement, Effect, Records, Result
from fcvit.evaluation.settings import PRESENT, Lane, Plan, Settings, check
from fcvit.inference.batch_size import fitting_batch_size
from fcvit.inference.engines import AUTO, Engine
from fcvit.metrics import classification as metrics
from fcvit.models.variants import Preprocessing, PreprocessingChange
from fcvit.processes import Processes, join
from fcvit.report import page
from fcvit.report.progress import progress
from fcvit.weights.reading import Weights, read_weights

logger = logging.getLogger("fcvit")

JOURNALS = "journals"
_SAMPLE = 64  # images whose files are compared where they are elsewhere now
_MAPS = 2  # images of which maps are drawn, wrong and right ones each


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        results: one for each pair of weights and protocol, and each engine.
        agreements: of each further engine with the first.
        effects: of the protocols, where there are two.
        unreadable: images that were left out, with the reason.
        rule: how class folders or labels became indices.
        folder: where everything was written, or None.
        first: whether this process speaks for all (see `fcvit.processes`).
        seconds: since this process began.
    """

    results: tuple[Result, ...]
    agreements: tuple[Agreement, ...]
    effects: tuple[Effect, ...]
    unreadable: tuple[str, ...]
    rule: str
    folder: Path | None
    first: bool
    seconds: float


class NotWritten(UnreadableFile):
    """The figures are complete, but not all of them could be written; `evaluation` has them."""

    def __init__(self, message: str, evaluation: Evaluation):
        super().__init__(message)
        self.evaluation = evaluation


def evaluate(
    weights: "Weights | str | os.PathLike[str] | Sequence[Weights | str | os.PathLike[str]]",
    data: str | os.PathLike[str] | LabeledImages,
    *,
    list_file: str | os.PathLike[str] | None = None,
    engines: str | Sequence[str] = AUTO,
    protocol: str = AUTHORS,
    preprocessing: Preprocessing | PreprocessingChange | None = None,
    batch_size: int | Literal["auto"] = 32,
    workers: int | Workers = 0,
    device: str = "auto",
    precision: str = "float32",
    ema: bool | None = None,
    classes: str | os.PathLike[str] | None = None,
    subset: int | None = None,
    seed: int = 0,
    real: str | os.PathLike[str] | None = None,
    class_subset: str | os.PathLike[str] | None = None,
    strict: bool = False,
    save_logits: bool = False,
    threads: int | None = None,
    calibration: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    record: bool = False,
) -> Evaluation:
    """Evaluate weights on labeled images.

    Args:
        weights: a file of any format, weights in memory, or several of either that know the same classes.
        data, list_file: see `fcvit.data.class_folders.read_dataset`; or images that are found already, for
            figures without a folder.
        engines: names of `fcvit.inference.engines.ENGINES`, or "auto"; all see the same batches.
        protocol: "authors" (the preprocessing that belongs to the weights), "resize256-bilinear", "both".
        preprocessing: another one, or single fields of it, which makes the protocol "custom".
        batch_size: at least 1; "auto" tries what fits. Float32 sums depend on it, in the last digits.
        workers: processes that decode while the model computes; 0: this one decodes. A script that starts
            processes must begin its work under `if __name__ == "__main__":`.
        device: auto, cpu, gpu or gpu:N.
        precision: float32; or bfloat16, float16, int8 where the engine has it: then float32 is measured as
            well, on the same images, and the difference in top-1 reported with its interval.
        ema: choose the averaged or raw weights of a file that has both.
        classes: class list of the model, where the weights' own is missing or wrong.
        subset, seed: only so many images, drawn by the seed, every class in its share.
        real: `real.json` of ImageNet-ReaL, for a second accuracy by its labels.
        class_subset: tell only these classes apart: a class list, or "present" for those that the data
            has (as ImageNet-A and -R are scored).
        strict: stop at the first image that cannot be read.
        threads: that compute on a CPU; None: one for each core.
        calibration: folder of images for int8, such as training images.
        save_logits: keep `logits.npy`, float32 (images, classes), for each lane; NaN for what was left out.
        folder: a new folder for the results; None: nothing is written, or, with `record`, the folder is
            `runs/eval` or the first free one after it.

    Raises:
        UnreadableFile, UsageError, DoesNotFit, MissingExtra: before the first batch.
        BadImages: not a single image can be read, or with `strict` one cannot. Single bad ones are
            listed in the result.
        NumbersDisagree: logits that are no finite numbers.
        NotWritten: the disk is full; the figures are in the error.
    """
    several = (weights,) if isinstance(weights, Weights | str | os.PathLike) else tuple(weights)
    settings = Settings(
        tuple(_absolute(w.source.path if isinstance(w, Weights) else w) for w in several),
        _absolute(data.root if isinstance(data, LabeledImages) else data),
        _absolute(list_file) if list_file else None,
        (engines,) if isinstance(engines, str) else tuple(engines),
        protocol,
        dataclasses.asdict(preprocessing) if isinstance(preprocessing, Preprocessing) else preprocessing,
        batch_size,
        device,
        precision,
        ema,
        _absolute(classes) if classes else None,
        subset,
        seed,
        _absolute(real) if real else None,
        PRESENT if class_subset == PRESENT else _absolute(class_subset) if class_subset else None,
        save_logits,
        threads,
        _absolute(calibration) if calibration else None,
    )
    check(settings, workers)
    if save_logits and folder is None and not record:
        raise UsageError("save_logits needs a folder")
    if isinstance(data, LabeledImages) and (folder is not None or record):
        raise UsageError("a run in a folder needs the path of the data, to be continued")
    began = time.perf_counter()
    processes = join()
    loaded = [
        w if isinstance(w, Weights) else read_weights(path, ema)
        for w, path in zip(several, settings.weights, strict=True)
    ]
    for note in dict.fromkeys(note for w in loaded for note in w.notes):
        logger.info(note)
    place = processes.device(device)
    plan = Plan(settings, loaded, place, data if isinstance(data, LabeledImages) else None)
    settings = plan.settings
    for note in plan.images.notes:
        logger.info(note)
    logger.info(f"{plan.images.rule}: {_mapping(plan.images.mapping)}")
    plan.load_engines()  # what they miss is said before a folder is made
    if batch_size == "auto":
        found = fitting_batch_size(plan.jobs()) if processes.first else (0, "")
        size, reason = json.loads(processes.broadcast(json.dumps(found).encode()))
        settings = plan.settings = dataclasses.replace(settings, batch_size=size)
        if processes.first:
            logger.info(f"batch size: {reason}")
    identity = _agreed(plan, processes)
    with contextlib.ExitStack() as stack:
        target = None
        if folder is not None or record:
            if processes.first:
                if settings.list_file is None:
                    where = Path("runs") if folder is None else Path(folder)
                    runs.refuse_inside(where, Path(settings.data), f"--data {settings.data}")
                details = {
                    "settings": dataclasses.asdict(settings),
                    "settings_sha256": settings.sha256(),
                    "identity": identity,
                }
                opened = runs.run_folder(None if folder is None else Path(folder), "eval", details)
                target = stack.enter_context(opened)
            target = _shared_folder(target, processes)
        return _run(plan, identity, processes, target, workers, strict, began)


def resume(
    folder: str | os.PathLike[str],
    *,
    moved: Mapping[str, Any] | None = None,
    workers: int = 0,
    strict: bool = False,
) -> Evaluation:
    """Go on with a run that was interrupted; its numbers are those of an uninterrupted one.

    A finished run is only written again, from its records: with charts, if the extra `report` came later.

    Args:
        folder: of the run.
        moved: where what the run reads is now, by the names of the arguments of `evaluate` (weights: of all files, in
            their order), if it is no longer where it was. The content must be the same: images by their names and
            the content of a sample of those that were evaluated, files by what is read from them.
        workers, strict: as in `evaluate`.

    Raises:
        UnreadableFile, UsageError: no such run.
        DoesNotFit: weights, images or packages are no longer those that the run began with.
        And what `evaluate` raises.
    """
    began = time.perf_counter()
    folder = Path(folder)
    processes = join()
    text = processes.broadcast(json.dumps(runs.read_run(folder, "eval")).encode() if processes.first else b"")
    known = json.loads(text)
    path = folder / "run.json"
    try:
        kept: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in known["settings"].items()}
        settings, identity = Settings(**kept), dict(known["identity"])
        same = settings.sha256() == known["settings_sha256"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnreadableFile(f"{path}: without the settings of the run; start a new one") from error
    if not same:
        raise UnreadableFile(f"{path}: its settings are not those that the run began with; start a new one")
    if moved:
        settings = _moved(settings, moved)
        known |= {"settings": dataclasses.asdict(settings), "settings_sha256": settings.sha256()}
    check(settings, workers)
    loaded = [read_weights(path, settings.ema) for path in settings.weights]
    plan = Plan(settings, loaded, processes.device(settings.device))
    now = _agreed(plan, processes)
    for what in now:
        if identity.get(what) != now[what]:
            raise DoesNotFit(
                f"{folder}: {_change(what, identity.get(what), now[what])} since the run began: it cannot end with "
                "the numbers that it would have had; start a new one"
            )
    if moved:
        _check_files(plan, identity, folder)
    with contextlib.ExitStack() as stack:
        if processes.first:
            stack.enter_context(runs.continued_run(folder, known))
        return _run(plan, now, processes, _shared_folder(folder, processes), workers, strict, began)


def _moved(settings: Settings, moved: Mapping[str, Any]) -> Settings:
    """The settings of a run with other places of what it reads."""
    places: dict[str, Any] = {name: _absolute(place) for name, place in moved.items() if name != "weights"}
    if "weights" in moved:
        places["weights"] = tuple(map(_absolute, moved["weights"]))
        if len(places["weights"]) != len(settings.weights):
            raise UsageError(f"--weights: {len(places['weights'])} given, the run is of {len(settings.weights)}")
        for before, now in zip(settings.weights, places["weights"], strict=True):
            if Path(now).name != Path(before).name:
                raise UsageError(f"--weights {now}: expected the name {Path(before).name}, which the results have too")
    if absent := [name for name in places if getattr(settings, name) is None]:
        raise UsageError(f"{', '.join(absent)}: the run began without; it goes on as it began")
    return dataclasses.replace(settings, **places)


def _check_files(plan: Plan, identity: Mapping[str, object], folder: Path) -> None:
    """Compare images that the run has evaluated with the files of today, a sample of them.

    Raises:
        DoesNotFit: one is not what it was.
    """
    frames = Journal(plan.dtype, _key(identity), folder / JOURNALS).frames.values()
    records = [record for frame in frames for record in frame.records]
    for record in records[:: -(-len(records) // _SAMPLE) or 1]:
        name = plan.images.names[record["index"]]
        content = read_file(name, plan.images.locations[record["index"]])
        if hashlib.sha256(content).digest()[:DIGEST] != record["digest"].tobytes():
            raise DoesNotFit(f"{plan.images.root}: {name} is not the image that the run in {folder} evaluated")


def _key(identity: Mapping[str, object]) -> bytes:
    """The key of a run's journals."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()


def _change(what: str, before: object, now: object) -> str:
    """What is no longer as it was; of packages, which."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        listed = ", ".join(f"{name} {before.get(name, 'absent')} to {now.get(name, 'absent')}" for name in names)
        return f"{what} changed ({listed})"
    return f"{what.replace('_', ' ')} changed"


def _agreed(plan: Plan, processes: Processes) -> dict[str, object]:
    """What decides the records, after every process has found it the same.

    Raises:
        DoesNotFit: this process sees something else than the first one.
    """
    identity = plan.identity()
    first = json.loads(processes.broadcast(json.dumps(identity).encode()))
    for what in identity:
        if first.get(what) != identity[what]:
            change = _change(what, first.get(what), identity[what])
            raise DoesNotFit(f"process {processes.rank} does not see what process 0 sees: {change}")
    return identity


def _mapping(mapping: Mapping[str, int]) -> str:
    """Label -> index, the first and the last where there are many."""
    pairs = [f"{label} {index}" for label, index in sorted(mapping.items(), key=lambda pair: pair[1])]
    return ", ".join(pairs if len(pairs) <= 10 else [*pairs[:3], "...", *pairs[-3:]])


def _absolute(path: str | os.PathLike[str]) -> str:
    return str(Path(path).absolute())


def _shared_folder(folder: Path | None, processes: Processes) -> Path:
    """The run's folder in every process; made where another machine does not share it."""
    path = Path(os.fsdecode(processes.broadcast(os.fsencode(folder.absolute()) if folder else b"")))
    path.mkdir(parents=True, exist_ok=True)
    return folder if folder is not None else path


def _run(
    plan: Plan,
    identity: Mapping[str, object],
    processes: Processes,
    folder: Path | None,
    workers: int | Workers,
    strict: bool,
    began: float,
) -> Evaluation:
    again = f"fcvit eval --resume {shlex.quote(str(folder))}"
    try:
        journal = Journal(plan.dtype, _key(identity), folder and folder / JOURNALS, processes.rank)
        with interrupts.kept(), _logit_files(plan, folder) as logits, contextlib.closing(journal):
            # By number, not by what is left: what another process has already done must not shift the shares.
            mine = [number for number in plan.batches if number % processes.count == processes.rank]
            missing = [number for number in mine if number not in journal.frames]
            _compute(plan, processes, missing, journal, logits, workers, strict)
            for rank, content in enumerate(processes.gather(journal.encoded())):
                journal.merge(content, f"process {rank}")
            journal.merge(processes.broadcast(journal.encoded()), "process 0")
            lost = [number for number in plan.batches if number not in journal.frames]
            assert not lost, f"no process did batches {lost[:5]}"
            found = figures(plan, journal)
            for hint in dict.fromkeys(result.hint for result in found.results if result.hint):
                logger.info(hint)
            evaluation = Evaluation(
                found.results,
                found.agreements,
                found.effects,
                tuple(f"{name}: {reason}" for name, reason in found.left_out),
                plan.images.rule,
                folder,
                processes.first,
                time.perf_counter() - began,
            )
            if processes.first and folder is not None:
                try:
                    if logits is not None:
                        logits.finish(journal)
                    _write(plan, found, folder)
                except (UnreadableFile, OSError) as error:
                    reason = error if isinstance(error, UnreadableFile) else _failed(error, folder)
                    raise NotWritten(
                        f"{reason}; the figures are complete; to write them: {again}", evaluation
                    ) from error
            interrupts.check()
    except KeyboardInterrupt:
        if folder is not None and processes.first:
            logger.info(f"go on with: {again}")
        raise
    except OSError as error:
        if folder is None or isinstance(error, BrokenPipeError):  # the reader of our output is gone
            raise
        raise UnreadableFile(f"{_failed(error, folder)}; go on with: {again}") from error
    processes.gather(b"")  # the first one keeps the store for the others
    return dataclasses.replace(evaluation, seconds=time.perf_counter() - began)


def _failed(error: OSError, folder: Path) -> str:
    return f"{error.filename or folder}: {error.strerror or error}"


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in an error of the system, which knows only its number."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _compute(
    plan: Plan,
    processes: Processes,
    missing: Sequence[int],
    journal: Journal,
    logits: "_LogitFiles | None",
    workers: int | Workers,
    strict: bool,
) -> None:
    """Do the batches that are missing, into the journal."""
    if not missing:
        return
    if journal.frames and processes.first:
        done = sum(plan.batch_images(number) for number in journal.frames)
        logger.info(f"{done} of {len(plan.images)} images are done already")
    engines = plan.engines
    what = "evaluating" if processes.count == 1 else f"evaluating (process 1 of {processes.count})"
    total = sum(plan.batch_images(number) for number in missing)
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(progress(what, total)) if processes.first else lambda _: None
        loaded = batches(plan.images, missing, int(plan.settings.batch_size), [Center(c) for c in plan.crops], workers)
        stack.enter_context(contextlib.closing(loaded))
        for batch in loaded:
            if batch.bad and strict:
                raise BadImages(f"{batch.bad[0][1]} (--strict stops at the first image that cannot be read)")
            journal.append(_frame(plan, engines, batch, logits))
            interrupts.check()
            advance(len(batch.indices) + len(batch.bad))


def _frame(plan: Plan, engines: Sequence[Engine], batch: Batch, logits: "_LogitFiles | None") -> Frame:
    """A batch through all lanes."""
    records = np.zeros(len(batch.indices), plan.dtype)
    records["index"] = batch.indices
    seconds = [0.0] * len(plan.lanes)
    made: list[np.ndarray] = []
    if len(records):
        records["digest"] = np.frombuffer(b"".join(batch.digests), np.uint8).reshape(-1, DIGEST)
        labels = plan.labels[batch.indices]
        for place, (lane, engine) in enumerate(zip(plan.lanes, engines, strict=True)):
            began = time.perf_counter()
            out = engine(batch.pixels[lane.crop])
            seconds[place] = time.perf_counter() - began
            if (row := metrics.first_not_finite(out)) is not None:  # NaN compares as if the true class were first
                raise NumbersDisagree(
                    f"{lane.name}: logits of {plan.images.names[batch.indices[row]]} are not finite; the weights "
                    f"are damaged, or {engine.precision} is too narrow for them"
                )
            if logits is not None:
                with _naming(logits.paths[place]):
                    logits.write(place, batch.indices, out)
            out = out[:, plan.columns]
            made.append(out)
            part = records["lanes"][:, place]
            part["rank"] = metrics.rank_of_truth(out, labels)
            part["loss"] = metrics.cross_entropy(out, labels)
            part["top"] = best = metrics.top_classes(out, plan.k)
            part["probability"] = np.take_along_axis(metrics.softmax(out), best, axis=1)
            if lane.reference is not None:
                difference = np.abs(out.astype(np.float64) - made[lane.reference])
                part["largest"], part["total"] = difference.max(axis=1), difference.sum(axis=1)
    if logits is not None:
        with _naming(logits.marks):
            logits.mark(batch.number)
    devices = [engine.device for engine in engines]
    return Frame(batch.number, records, {"bad": batch.bad, "seconds": seconds, "devices": devices})


@contextlib.contextmanager
def _logit_files(plan: Plan, folder: Path | None) -> Iterator["_LogitFiles | None"]:
    """The files for the logits, where they are asked for."""
    if folder is None or not plan.settings.save_logits:
        yield None
        return
    files = _LogitFiles(plan, folder)
    try:
        yield files
    finally:
        files.close()


class _LogitFiles:
    """`logits.npy` of every lane: float32 (images of the data set, classes), filled as batches come."""

    def __init__(self, plan: Plan, folder: Path):
        self.shape = (len(plan.images), len(plan.classes))
        self.paths = [folder / lane.name / "logits.npy" for lane in plan.lanes]
        self.marks = folder / ".logits.done"  # a byte for each batch whose rows are in the files
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": self.shape})
        self.head = head.getvalue()
        self.row = 4 * self.shape[1]
        self.files: list[int] = []
        for path in (*self.paths, self.marks):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.files.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
        for path, file in zip(self.paths, self.files[:-1], strict=True):
            with _naming(path):
                os.pwrite(file, self.head, 0)
                os.ftruncate(file, len(self.head) + self.shape[0] * self.row)

    def write(self, lane: int, indices: np.ndarray, logits: np.ndarray) -> None:
        """Rows of one batch; on the disk before the journal says that they are there."""
        for index, row in zip(indices, np.ascontiguousarray(logits, "<f4"), strict=True):
            os.pwrite(self.files[lane], row.tobytes(), len(self.head) + int(index) * self.row)
        os.fsync(self.files[lane])

    def mark(self, batch: int) -> None:
        """Remember that the rows of a batch are in these files: a row of zeros may be a result."""
        os.pwrite(self.files[-1], b"\1", batch)
        os.fsync(self.files[-1])

    def finish(self, journal: Journal) -> None:
        """Mark what was left out; keep no file that lacks the rows of another machine."""
        nothing = bytes(self.row)
        marks = os.pread(self.files[-1], max(journal.frames, default=0) + 1, 0)
        for path, file in zip(self.paths, self.files[:-1], strict=True):
            lost = 0
            for frame in journal.frames.values():
                for index, _ in frame.extra["bad"]:
                    os.pwrite(file, np.full(self.shape[1], np.nan, "<f4").tobytes(), len(self.head) + index * self.row)
                if marks[frame.number : frame.number + 1] == b"\1":
                    continue
                for index in frame.records["index"]:
                    lost += os.pread(file, self.row, len(self.head) + int(index) * self.row) == nothing
            if lost:
                path.unlink()
                logger.info(f"no {path}: the logits of {lost} images went to a machine that does not share the folder")

    def close(self) -> None:
        for file in self.files:
            os.close(file)


def _write(plan: Plan, found: Figures, folder: Path) -> None:
    """The folders of the lanes, and the page over them."""
    places = dict(zip(plan.images.names, plan.images.locations, strict=True))

    def read(name: str) -> Image.Image:
        return decode(io.BytesIO(places[name].read()), name)

    settings = plan.settings
    about = {
        "data": settings.data,
        "list": _file(settings.list_file),
        "rule": plan.images.rule,
        "mapping": dict(plan.images.mapping),
        "subset": settings.subset and {"images": settings.subset, "seed": settings.seed},
        "model_classes": len(plan.classes),
        "class_list": _file(settings.classes),
        "class_subset": PRESENT if settings.class_subset == PRESENT else _file(settings.class_subset),
        "real_labels": _file(settings.real),
        "left_out": [{"path": name, "reason": reason} for name, reason in found.left_out],
        "versions": runs.versions() | decoders(),
    }
    for lane, result, kept in zip(plan.lanes, found.results, found.records, strict=True):
        _draw_maps(plan, lane, kept, folder / result.name, read)
        best = [kept.classes[index] for index in np.unique(kept.top[:, 0])]
        results.write_lane(folder / result.name, result, kept, about | {"predicted": dict(best)}, read)
    try:
        run_page.write_page(folder, found.results, found.records, found.agreements, found.effects, about)
    except MissingExtra as error:
        again = f"fcvit eval --resume {shlex.quote(str(folder))}"
        logger.info(f"no charts and no {results.PAGE}: {error}; then: {again}")


def _draw_maps(
    plan: Plan,
    lane: Lane,
    records: Records,
    folder: Path,
    read: Callable[[str], Image.Image],
) -> None:
    """What the network found similar to the whole, of a few wrong and right images, the surest first."""
    variant = lane.weights.spec.variant
    if lane.reference is not None or not (variant.global_context and variant.weighted_context):
        return
    try:
        page.require_report()
        viewer = Viewer(lane.weights, plan.classes, lane.protocol.preprocessing, plan.device)
    except MissingExtra as error:
        logger.info(f"no {results.MAPS}: {error}")
        return
    chosen, names = [], labels(records.classes)
    for right in (False, True):
        rows = np.flatnonzero(records.correct == right)
        for row in rows[np.argsort(-records.probability[rows, 0], kind="stable")][:_MAPS]:
            truth = names[records.truth[row]]
            # As the records have it: of a subset of the classes, the network's own best may be another.
            best = (names[records.top[row, 0]], f": {100 * records.probability[row, 0]:.1f} %")
            # It went away after it was evaluated, or Paddle computes no finite maps where the engine had finite logits.
            with contextlib.suppress(BadImages, OSError, NumbersDisagree):
                title = ("right: ", *best) if right else ("wrong: ", truth, ", taken for ", *best)
                chosen.append(panel(viewer, viewer.see(read(records.names[row])), title))
    if chosen:
        folder.mkdir(exist_ok=True)
        title = "The surest mistakes and the surest right answers"
        runs.write_bytes(folder / results.MAPS, overview(chosen, title, variant))


def _file(path: str | None) -> dict[str, str] | None:
    """Which file was used, and that it was this one."""
    return (path and {"path": path, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}) or None
