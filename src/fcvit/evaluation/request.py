"""The request of an evaluation or prediction, as stored in `run.json`."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fcvit.errors import UnreadableFile, UsageError
from fcvit.evaluation.settings import Settings, absolute
from fcvit.tasks.base import get_task


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of an evaluation or prediction, with absolute paths. `run.json` stores them to resume the run.

    Attributes:
        weights, data: Paths of the weights files and the data.
        task: Name of the task.
        settings: Settings common to all tasks, a dataclass.
        options: Options of this task, a dataclass.
    """

    weights: tuple[str, ...]
    data: str
    task: str
    settings: Any
    options: Any

    def to_json(self) -> dict[str, Any]:
        """Return the request and its hash, which detects changes to `run.json`."""
        fields = json.loads(json.dumps(dataclasses.asdict(self)))
        return {"request": fields, "requestsha256": sha256(fields).hex()}

    @classmethod
    def from_json(
        cls, record: Mapping[str, Any], path: Path, settings: type = Settings, options: str = "options"
    ) -> "Request":
        """Invert `to_json`.

        Args:
            record: Content of `run.json`.
            path: Its path, for messages.
            settings: Class of the settings.
            options: Attribute of the task with the class of its options.

        Raises:
            UnreadableFile: The record is damaged or was changed.
        """
        try:
            fields = dict(record["request"])
            same = sha256(fields).hex() == record["requestsha256"]
            chosen = getattr(get_task(fields["task"]), options)(**fields["options"])
            values = fields["data"], fields["task"], settings(**fields["settings"]), chosen
            request = cls(tuple(fields["weights"]), *values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UnreadableFile(f"{path}: the settings of the run are missing or damaged; start a new run") from error
        if not same:
            raise UnreadableFile(f"{path}: the settings were changed after the run started; start a new run")
        return request

    def moved(self, places: Mapping[str, Any]) -> "Request":
        """Return the request with new paths for its input files.

        Args:
            places: New paths by argument name.

        Raises:
            UsageError: The run does not use this argument, or the file names or number of weights do not match.
        """
        given = dict(places)
        weights = tuple(map(absolute, given.pop("weights", self.weights)))
        data = absolute(given.pop("data", self.data))
        if len(weights) != len(self.weights):
            raise UsageError(
                f"--weights: {len(weights)} files; expected {len(self.weights)}, as at the start of the run"
            )
        for before, now in zip(self.weights, weights, strict=True):
            if Path(now).name != Path(before).name:
                raise UsageError(f"--weights {now}: expected the original file name, {Path(before).name}")
        parts = {}
        for part in ("settings", "options"):
            known = getattr(self, part)
            names = [name for name in given if getattr(known, name, None) is not None]
            parts[part] = dataclasses.replace(known, **{name: given.pop(name) for name in names})
        if given:
            raise UsageError(f"{', '.join(given)}: the run was started without this; resume it without it")
        return dataclasses.replace(self, weights=weights, data=data, **parts)


def sha256(content: object) -> bytes:
    """Return the SHA-256 of a JSON value. The hash of a run's identity is the key of its journals."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
