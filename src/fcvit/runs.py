"""What a run leaves: one folder, `run.json` in it, nothing half-written.

`run.json` holds the command, the time it began, the versions, and the status: "running",
"finished", "interrupted", or "failed" with the reason.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from fcvit.errors import UnreadableFile, UsageError

PACKAGES = ("fcvit", "paddlepaddle", "paddlepaddle-gpu", "torch", "numpy", "pillow", "safetensors")


def versions() -> dict[str, str]:
    """Of Python and of whichever packages that matter are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader sees the old text or the new.

    Raises:
        UnreadableFile: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UnreadableFile(f"{path}: cannot be written: {error.strerror or error}") from error


def write_json(path: Path, content: object) -> None:
    """`write_text` of readable JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def free_folder(name: str) -> Path:
    """The default place of a run: `runs/NAME`, or the first of `runs/NAME-2`, ... that is not taken."""
    folder, number = Path("runs") / name, 1
    while folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder


@contextlib.contextmanager
def run_folder(folder: Path, command: str) -> Iterator[Path]:
    """A new run in `folder`; how it ended is written when the block is left.

    Raises:
        UsageError: the folder is not empty.
        UnreadableFile: it cannot be written to.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} is not empty; a run gets a folder of its own, choose another with -o")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnreadableFile(f"{folder}: cannot be written: {error.strerror or error}") from error
    record: dict[str, object] = {
        "command": command,
        "arguments": sys.argv[1:],
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    write_json(folder / "run.json", record | {"status": "running"})
    try:
        yield folder
    except KeyboardInterrupt:
        write_json(folder / "run.json", record | {"status": "interrupted"})
        raise
    except BaseException as error:
        with contextlib.suppress(UnreadableFile):  # the disk may be what failed
            write_json(folder / "run.json", record | {"status": "failed", "reason": str(error)})
        raise
    write_json(folder / "run.json", record | {"status": "finished"})
