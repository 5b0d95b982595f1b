"""Create run folders and write files atomically.

`run.json` in a run folder records the command, the start time, the versions, and the status: "running",
"finished", "interrupted", or "failed" with the reason.
"""

import contextlib
import datetime
import importlib.metadata
import itertools
import json
import logging
import math
import os
import platform
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fcvit.errors import UnreadableFile, UsageError
from fcvit.heartbeats import at_loss
from fcvit.interrupts import check, held_back, kept
from fcvit.text import escape_json

logger = logging.getLogger("fcvit")

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = ".fcvit-tmp-"
"""Prefix of temporary files, by which files left by a killed process can be recognized."""

FRAMEWORKS = ("paddlepaddle", "paddlepaddle-gpu", "torch", "onnx", "onnxruntime", "openvino")
PACKAGES = ("fcvit", *FRAMEWORKS, "numpy", "pillow", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages in `PACKAGES`."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def cache_root() -> Path:
    """Return the folder of all caches, or a path that cannot be written if there is no home folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 -- never raises
    return (Path(os.devnull) if home.startswith("~") else Path(home)) / "fcvit"


def write_text(path: Path, text: str, errors: str = "backslashreplace") -> None:
    """Write a text file atomically: a reader sees either the old or the new content.

    Args:
        path: The file to write or replace.
        text: The content, which is encoded as UTF-8.
        errors: Error handler for file names in the text that are not UTF-8. "surrogateescape" keeps their bytes.

    Raises:
        UnreadableFile: The file cannot be written.
    """
    write_bytes(path, text.encode("utf-8", errors))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a binary file atomically, as `write_text` does."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a disk that became read-only
            temporary.unlink(missing_ok=True)
        raise UnreadableFile(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def staged_files(paths: Sequence[Path], overwrite: bool = False, previous: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder. Files written to it move to their final paths if the block ends without an error.

    Args:
        paths: The final paths, all in one folder. Files move in this order. If the last move fails, all are undone.
        overwrite: Whether existing files may be replaced.
        previous: Path that keeps the file that the last of `paths` replaces.

    Raises:
        UsageError: A path exists and `overwrite` is False, or it is not a file.
        UnreadableFile: The folder cannot be written to, or the disk is full.
    """
    for path in paths:
        if os.path.lexists(path) and not path.is_file():
            raise UsageError(f"{path} already exists and is not a file; choose another name")
        if os.path.lexists(path) and not overwrite:
            raise UsageError(f"{path} already exists; choose another name or pass --overwrite to replace it")
    parent = paths[-1].parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=parent) as name:
            yield Path(name)
            written = [path for path in paths if (Path(name) / path.name).exists()]
            ordinary = Path(name) / f"{TEMPORARY}mode"
            ordinary.touch()  # some libraries create private files
            for path in written:
                temporary = Path(name) / path.name
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
                temporary.chmod(stat.S_IMODE(ordinary.stat().st_mode))
            if previous is not None and paths[-1].exists():
                _keep(paths[-1], previous, Path(name))
            _replace_all(Path(name), written)
    except OSError as error:
        raise UnreadableFile(f"{paths[-1]}: cannot be written: {error.strerror or error}") from error


def _keep(path: Path, previous: Path, temporary: Path) -> None:
    """Replace `previous` with a file that is about to be replaced. The file also stays at its own path, if possible."""
    try:
        os.link(path, temporary / f"previous-{path.name}")
    except OSError:  # a file system without hard links
        os.replace(path, previous)
    else:
        os.replace(temporary / f"previous-{path.name}", previous)


def _replace_all(folder: Path, paths: Sequence[Path]) -> None:
    *others, last = paths
    try:
        for path in others:
            if path.exists():
                os.replace(path, folder / f"replaced-{path.name}")
            os.replace(folder / path.name, path)
        os.replace(folder / last.name, last)
    except OSError:
        for path in others:
            if not (folder / path.name).exists():
                path.unlink()
            if (folder / f"replaced-{path.name}").exists():
                os.replace(folder / f"replaced-{path.name}", path)
        raise


def to_json(content: object) -> str:
    """Return indented JSON. Infinite numbers and NaN become null, because JSON has no notation for them."""
    return escape_json(json.dumps(_finite(content), indent=2, ensure_ascii=False, default=str, allow_nan=False)) + "\n"


def _finite(content: object) -> object:
    match content:
        case float():
            return content if math.isfinite(content) else None
        case dict():
            return {key: _finite(value) for key, value in content.items()}
        case list() | tuple():
            return [_finite(value) for value in content]
    return content


def write_json(path: Path, content: object) -> None:
    """Write content as JSON (see `to_json`) atomically."""
    write_text(path, to_json(content))


@contextlib.contextmanager
def run_folder(folder: Path | None, command: str, details: Mapping[str, object] | None = None) -> Iterator[Path]:
    """Start a new run, yield its folder, and record in `run.json` how the run ended.

    Args:
        folder: A new or empty folder. None means `runs/COMMAND`, or the first free one of `runs/COMMAND-2`, ...
        command: Name of the command.
        details: Additional fields of `run.json`, needed to resume the run.

    Raises:
        UsageError: The folder is not empty.
        UnreadableFile: The folder cannot be written to.
    """
    folder = _free_folder(command) if folder is None else _claim(folder)
    record: dict[str, object] = {"command": command, "arguments": sys.argv[1:], "began": _now(), "versions": versions()}
    logger.debug(f"writing to {folder}")
    with _recorded(folder, record | dict(details or {})):
        yield folder


def reject_inside(folder: Path, images: Path, what: str) -> None:
    """Reject a run folder inside the folder of input images, where its pictures would become input images.

    Args:
        folder: The run folder.
        images: The folder of input images.
        what: Description of the input folder, for the message.

    Raises:
        UsageError: The run folder is inside the input folder.
    """
    below = images.resolve()
    if below.is_dir() and below in (folder.resolve(), *folder.resolve().parents):
        raise UsageError(f"{folder} is inside {what}, so its pictures would become input images; choose another -o")


@contextlib.contextmanager
def continued_run(folder: Path, record: Mapping[str, object]) -> Iterator[Path]:
    """Resume a run, and record in `run.json` how it ended.

    Args:
        folder: The run folder.
        record: The record of the run, from `read_run`.

    Raises:
        UnreadableFile: The folder cannot be written to.
    """
    before = record.get("continued")
    times = [*(before if isinstance(before, list) else []), _now()]
    kept = {key: value for key, value in record.items() if key not in ("status", "reason")}
    with _recorded(folder, kept | {"continued": times}):
        yield folder


def read_run(folder: Path, command: str | None = None) -> dict[str, Any]:
    """Read the record of a run from `run.json`.

    Args:
        folder: The run folder.
        command: The expected command, or None to accept every command.

    Raises:
        UnreadableFile: `run.json` does not exist or is damaged.
        UsageError: The run belongs to a different command.
    """
    path = folder / "run.json"
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror}; expected a run folder, which contains run.json") from error
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(f"{path}: damaged ({str(error)[:80]})") from error
    if not isinstance(record, dict):
        raise UnreadableFile(f"{path}: damaged (not a JSON object)")
    if command and record.get("command") != command:
        raise UsageError(f"{folder}: not a run of fcvit {command}")
    return record


@contextlib.contextmanager
def _recorded(folder: Path, record: Mapping[str, object]) -> Iterator[None]:
    path = folder / "run.json"

    def write(**ended: object) -> None:
        with held_back():  # a second signal must not leave the status "running"
            write_json(path, {**record, **ended})

    def failed(reason: str) -> None:
        with contextlib.suppress(UnreadableFile):  # the disk itself may have failed
            write(status="failed", reason=reason)

    with _locked(folder):
        at_loss.append(failed)
        try:
            with kept():
                write(status="running")
                yield
                check()
        except KeyboardInterrupt:
            write(status="interrupted")
            raise
        except BaseException as error:
            failed(str(error))
            raise
        finally:
            at_loss.remove(failed)
        write(status="finished")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Prevent other processes from resuming the run at the same time. The lock ends with the process."""
    if fcntl is None:
        yield
        return
    path = folder / ".lock"
    with contextlib.ExitStack() as stack:
        while True:
            try:
                file = stack.enter_context(path.open("a"))
            except OSError as error:
                raise UnreadableFile(f"{path}: cannot be written: {error.strerror}") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(f"{folder}: another process is using this run; wait until it ends") from error
            except OSError:
                break  # a network file system without locks
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
            # The previous owner of the lock removed the file after it was opened here, so lock a new file.
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a disk that became read-only
                path.unlink(missing_ok=True)  # while the lock is held, so that no other process owns the file


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _claim(folder: Path) -> Path:
    """Claim a folder. If two processes claim it at the same time, the one that creates `run.json` gets it."""
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        if not taken:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError), (folder / "run.json").open("x"):
                return folder
    except OSError as error:
        raise UnreadableFile(f"{folder}: cannot be written: {error.strerror or error}") from error
    raise UsageError(f"{folder} is not empty; choose a new or empty folder with -o")


def _free_folder(name: str) -> Path:
    for number in itertools.count(1):
        with contextlib.suppress(UsageError):
            return _claim(Path("runs") / (name if number == 1 else f"{name}-{number}"))
    raise AssertionError
