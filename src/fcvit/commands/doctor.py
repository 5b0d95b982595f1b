"""What this installation can do: versions, devices, and what is missing with its remedy."""

import platform
from collections.abc import Iterator
from typing import Any

from fcvit import run_folder as runs
from fcvit.errors import FcvitError
from fcvit.frameworks import INSTALL, import_framework


class Diagnosis(dict[str, Any]):
    """The findings of `doctor`, as a dictionary that JSON can hold."""

    def to_json(self) -> dict[str, Any]:
        return dict(self)

    def tables(self) -> Iterator[Any]:
        """Show versions, devices, and what is missing."""
        from fcvit.report.tables import table

        listing = table()
        listing.add_row("machine", self["machine"])
        for title in ("versions", "devices", "missing"):
            for name, value in self[title].items():
                shown = ", ".join(value) if isinstance(value, list) else value
                listing.add_row(name if title == "versions" else f"{name} {title}", shown)
        yield listing


def doctor() -> Diagnosis:
    """Print versions, devices, and what is missing with the command that installs it."""
    devices: dict[str, list[str]] = {}
    missing: dict[str, str] = {}
    for framework in ("paddle", "torch"):
        try:
            module = import_framework(framework)
        except FcvitError as error:
            missing[framework] = f"{error}" if "not installed" not in str(error) else INSTALL[framework]
            continue
        if framework == "paddle":
            gpus = module.device.cuda.device_count() if module.is_compiled_with_cuda() else 0
        else:
            gpus = module.cuda.device_count() if module.cuda.is_available() else 0
        devices[framework] = ["cpu", *(f"gpu:{index}" for index in range(gpus))]
    return Diagnosis(
        {
            "versions": runs.versions(),
            "machine": f"{platform.system()} {platform.machine()}",
            "devices": devices,
            "missing": missing,
        }
    )
