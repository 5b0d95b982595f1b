"""Report the installed versions, the devices, and missing packages with the commands that install them."""

import importlib.metadata
import platform
import re
from collections.abc import Iterator
from typing import Any

from fcvit import run_folder as runs
from fcvit.commands.cache import read_cache
from fcvit.commands.options import Flag
from fcvit.errors import FcvitError, MissingExtra
from fcvit.frameworks import INSTALL, import_framework
from fcvit.machine import available_threads
from fcvit.native import build as native


class Diagnosis(dict[str, Any]):
    """The report of `doctor`, as a dictionary that can be stored as JSON."""

    def tables(self) -> Iterator[Any]:
        """Yield a table of the versions, devices, missing packages, native engine, cores and cache."""
        from fcvit.report.tables import table

        rows = [
            ("machine", self["machine"]),
            *self["versions"].items(),
            *((f"{name} devices", ", ".join(devices)) for name, devices in self["devices"].items()),
            *((f"{name} not available", remedy) for name, remedy in self["missing"].items()),
            *((f"extra {name} missing", command) for name, command in self["extras"].items()),
            *((title, str(self[title])) for title in ("compiler", "native engine", "cores", "cache")),
        ]
        yield table(rows=rows)


def doctor(*, build: Flag = False) -> Diagnosis:
    """Collect versions and devices, and the commands that install missing packages.

    Args:
        build: Compile the native engine and the operators for training, if they are not in the cache.

    Raises:
        MissingExtra: `build` is given, and the native engine cannot be compiled.
    """
    if build:
        native.library()
    cache = read_cache()
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
    compiler, engine = _native()
    return Diagnosis(
        {
            "versions": runs.versions(),
            "machine": f"{platform.system()} {platform.machine()}",
            "devices": devices,
            "missing": missing,
            "extras": {name: command for name, command in _absent_extras() if name not in ("cpu", "torch")},
            "compiler": compiler,
            "native engine": engine,
            "cores": available_threads(),
            "cache": f"{cache.folder}, {cache.bytes / 2**20:.1f} MiB",
        }
    )


def _native() -> tuple[str, str]:
    """Return the path of the compiler and the state of the native engine, or the reasons why they are missing."""
    try:
        compiler = native.find_compiler()
    except MissingExtra as error:
        return "none", str(error)
    level = native.levels()[0]
    state = "compiled" if native.is_built() else f"not compiled; compile it with: {native.COMMAND}"
    return compiler, f"{level}: {state}"


def _absent_extras() -> Iterator[tuple[str, str]]:
    """Yield each extra with a missing package, and the command that installs the extra."""
    for line in importlib.metadata.requires("fcvit") or ():
        match = re.fullmatch(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"].*", line)
        if match and match[2] not in ("dev", "docs"):
            try:
                importlib.metadata.version(match[1])
            except importlib.metadata.PackageNotFoundError:
                yield match[2], f"pip install 'fcvit[{match[2]}]'"
