"""What this installation can do: versions, devices, and what is missing with its remedy."""

import platform

from fcvit import run_folder as runs
from fcvit.errors import FcvitError
from fcvit.frameworks import INSTALL, import_framework


def doctor() -> dict[str, object]:
    """Versions, devices of each framework, and for each missing one the command that installs it."""
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
    return {
        "versions": runs.versions(),
        "machine": f"{platform.system()} {platform.machine()}",
        "devices": devices,
        "missing": missing,
    }
