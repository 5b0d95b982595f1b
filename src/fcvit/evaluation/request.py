"""The request of an evaluation as `run.json` keeps it."""

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
    """The request of an evaluation, with absolute paths; `run.json` stores it, so that a run can be continued.

    Attributes:
        weights, data: paths.
        task: its name.
        settings: of every task.
        options: of this task.
    """

    weights: tuple[str, ...]
    data: str
    task: str
    settings: Settings
    options: Any

    def to_json(self) -> dict[str, Any]:
        """Return the request and its hash, which tells whether `run.json` was changed."""
        fields = json.loads(json.dumps(dataclasses.asdict(self)))
        return {"request": fields, "requestsha256": sha256(fields).hex()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any], path: Path) -> "Request":
        """Invert `to_json`.

        Raises:
            UnreadableFile: it is damaged or was changed.
        """
        try:
            fields = dict(record["request"])
            same = sha256(fields).hex() == record["requestsha256"]
            settings, options = Settings(**fields["settings"]), get_task(fields["task"]).options(**fields["options"])
            request = cls(tuple(fields["weights"]), fields["data"], fields["task"], settings, options)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UnreadableFile(f"{path}: without the settings of the run; start a new one") from error
        if not same:
            raise UnreadableFile(f"{path}: its settings are not those that the run began with; start a new one")
        return request

    def moved(self, places: Mapping[str, Any]) -> "Request":
        """Return the request with other places of what it reads, by name.

        Raises:
            UsageError: the run began without it, or weights have other names.
        """
        given = dict(places)
        weights = tuple(map(absolute, given.pop("weights", self.weights)))
        data = absolute(given.pop("data", self.data))
        if len(weights) != len(self.weights):
            raise UsageError(f"--weights: {len(weights)} given, the run is of {len(self.weights)}")
        for before, now in zip(self.weights, weights, strict=True):
            if Path(now).name != Path(before).name:
                raise UsageError(f"--weights {now}: expected the name {Path(before).name}, which the results have too")
        parts = {}
        for part in ("settings", "options"):
            known = getattr(self, part)
            names = [name for name in given if getattr(known, name, None) is not None]
            parts[part] = dataclasses.replace(known, **{name: given.pop(name) for name in names})
        if given:
            raise UsageError(f"{', '.join(given)}: the run began without; it goes on as it began")
        return dataclasses.replace(self, weights=weights, data=data, **parts)


def sha256(content: object) -> bytes:
    """Return the hash of a JSON value; that of its identity is the key of a run's journals."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
