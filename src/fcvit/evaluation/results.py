"""The outcome of an evaluation of any task: all records, the report computed from them, and saved results."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fcvit.errors import BadImages, UnreadableFile, UsageError
from fcvit.evaluation.journal import Frame
from fcvit.evaluation.settings import Plan
from fcvit.tasks.base import Report

METRICS = "metrics.json"
"""File with the result of a configuration. It is written last, so it marks a complete result."""
_SETTINGS = ("weights_sha256", "network", "protocol", "engine", "device", "precision", "batch_size")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation.

    Attributes:
        report: Report of the task, with `results` for each configuration.
        unreadable: Samples that were skipped because they cannot be read, with the reason.
        rule: A readable description of how targets were read.
        folder: Folder of all results, or None if nothing was written.
        first: True in the process that prints and writes the results (see `fcvit.processes`).
        seconds: Duration of the evaluation in this process.
    """

    report: Report
    unreadable: tuple[str, ...]
    rule: str
    folder: Path | None
    first: bool
    seconds: float

    def __getattr__(self, name: str) -> Any:
        """Give access to the attributes of the report, such as `results`."""
        if name.startswith("__") or name == "report":
            raise AttributeError(name)
        return getattr(self.report, name)

    def __repr__(self) -> str:
        return f"<Evaluation of {len(self.report.results)} configuration(s), folder {self.folder}>"

    @property
    def exit_code(self) -> int:
        return BadImages.exit_code if self.unreadable and self.first else 0

    def to_json(self) -> dict[str, Any] | None:
        """Return all results, or None in processes other than the first."""
        about = {"unreadable": self.unreadable, "rule": self.rule, "folder": self.folder, "seconds": self.seconds}
        return self.report.to_json() | about | {"first": self.first} if self.first else None

    def tables(self) -> Iterator[Any]:
        """Yield the tables and lines for the terminal. Yield nothing in processes other than the first."""
        if self.first:
            yield from self.report.tables()
            if self.folder is not None:
                yield f"written to {self.folder}"


class NotWritten(UnreadableFile):
    """The results are complete and in `result`, but not all files could be written."""

    def __init__(self, message: str, evaluation: Evaluation):
        super().__init__(message)
        self.result = evaluation


class RunRecords:
    """All records of an evaluation, in the order of the data set (see `fcvit.tasks.base.Evaluated`)."""

    def __init__(self, plan: Plan, frames: Sequence[Frame], about: Mapping[str, Any]):
        self.configurations, self.about = plan.configurations, about
        self.batch_size, self.precisions = int(plan.settings.batch_size), plan.precisions
        rows = np.concatenate([frame.records for frame in frames])
        self.index, self.digests, self.records = rows["index"], rows["digest"], rows["configurations"]
        names = plan.dataset.names
        self.left_out = [
            (names[index], reason.removeprefix(f"{names[index]}: "))
            for frame in frames
            for index, reason in frame.extra["bad"]
        ]
        if not len(rows):
            first = ": ".join(self.left_out[0])
            raise BadImages(f"{plan.dataset.root}: none of the {len(names)} images can be used, for example {first}")
        count = range(len(plan.configurations))
        self.seconds = [sum(frame.extra["seconds"][i] for frame in frames) for i in count]
        devices = [{frame.extra["devices"][i] for frame in frames if len(frame.records)} for i in count]
        self.devices = [", ".join(sorted(used)) for used in devices]
        self.bytes_of: dict[tuple[int, int], bytes] = {}
        start = 0
        for frame in frames:  # chunk order: all samples of the first configuration, then of the second, and so on
            size = len(frame.records)
            for position, chunk in enumerate(frame.chunks):
                self.bytes_of[start + position % size, position // size] = chunk
            start += size


def result_folder(folder: Path) -> Path:
    """Return the folder of a finished result, which is this folder or the only result of this run.

    Raises:
        UnreadableFile: The folder does not contain a finished result.
        UsageError: The run contains several results.
    """
    if (folder / METRICS).is_file():
        return folder
    folders = sorted(path.parent for path in folder.glob(f"*/{METRICS}"))
    if len(folders) > 1:
        listed = ", ".join(str(path) for path in folders)
        raise UsageError(f"{folder} contains several results; pass one of them: {listed}")
    if not folders:
        raise UnreadableFile(f"{folder}: {METRICS} does not exist; pass the folder of a finished run of fcvit eval")
    return folders[0]


def differing_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the settings that differ between two results, as text, from the contents of their `metrics.json`."""
    sides = []
    for metrics in (first, second):
        side = {what: metrics.get(what) for what in _SETTINGS}
        if isinstance(protocol := side["protocol"], dict):
            pixels = protocol.get("preprocessing")
            side |= {"protocol": protocol.get("name")} | (pixels if isinstance(pixels, dict) else {})
        sides.append(side)
    one, other = sides
    differing = [what for what in one | other if one.get(what) != other.get(what)]
    return {what: (str(one.get(what)), str(other.get(what))) for what in differing}
