"""The outcome of an evaluation of any task: all records, and the figures with how they are shown."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fcvit.errors import BadImages, UnreadableFile
from fcvit.evaluation.journal import Frame
from fcvit.evaluation.settings import Plan
from fcvit.tasks.base import Report


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The figures of an evaluation.

    Attributes:
        report: of the task, with `results` for each configuration.
        unreadable: samples that were left out, with the reason.
        rule: how targets were read, for people.
        folder: where everything was written, or None.
        first: whether this process speaks for all (see `fcvit.processes`).
        seconds: since this process began.
    """

    report: Report
    unreadable: tuple[str, ...]
    rule: str
    folder: Path | None
    first: bool
    seconds: float

    def __getattr__(self, name: str) -> Any:
        """Give the task's figures, such as `results`, as attributes too."""
        if name.startswith("__") or name == "report":
            raise AttributeError(name)
        return getattr(self.report, name)

    def __repr__(self) -> str:
        return f"<Evaluation of {len(self.report.results)} configuration(s), folder {self.folder}>"

    @property
    def exit_code(self) -> int:
        return BadImages.exit_code if self.unreadable and self.first else 0

    def to_json(self) -> dict[str, Any] | None:
        """Return all figures; None where another process speaks."""
        about = {"unreadable": self.unreadable, "rule": self.rule, "folder": self.folder, "seconds": self.seconds}
        return self.report.to_json() | about | {"first": self.first} if self.first else None

    def tables(self) -> Iterator[Any]:
        """Yield what the terminal shows; nothing where another process speaks."""
        if self.first:
            yield from self.report.tables()
            if self.folder is not None:
                yield f"written to {self.folder}"


class NotWritten(UnreadableFile):
    """The figures are complete, but not all of them could be written; `result` has them."""

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
            raise BadImages(f"{plan.dataset.root}: none of {len(names)} images can be read, first: {first}")
        count = range(len(plan.configurations))
        self.seconds = [sum(frame.extra["seconds"][i] for frame in frames) for i in count]
        devices = [{frame.extra["devices"][i] for frame in frames if len(frame.records)} for i in count]
        self.devices = [", ".join(sorted(one)) for one in devices]
        self.bytes_of: dict[tuple[int, int], bytes] = {}
        start = 0
        for frame in frames:  # in a frame: all samples of the first configuration, then of the second ...
            size = len(frame.records)
            for position, chunk in enumerate(frame.chunks):
                self.bytes_of[start + position % size, position // size] = chunk
            start += size
