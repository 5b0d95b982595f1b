"""What a run leaves: one folder, `run.json` in it, nothing half-written.

`run.json` holds the command, the time it began, the versions, and the status: "running",
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
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fcvit.errors import UnreadableFile, UsageError
from fcvit.interrupts import check, held_back, kept
from fcvit.text import escape_json

logger = logging.getLogger("fcvit")

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = ".fcvit-tmp-"
"""Names of what is being written begin so: what a process that was killed has left is known by it."""

FRAMEWORKS = ("paddlepaddle", "paddlepaddle-gpu", "torch", "onnx", "onnxruntime", "openvino")
PACKAGES = ("fcvit", *FRAMEWORKS, "numpy", "pillow", "safetensors")


def versions() -> dict[str, str]:
    """Of Python and of whichever packages that matter are installed."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def write_text(path: Path, text: str, errors: str = "backslashreplace") -> None:
    """Replace a file as a whole: a reader sees the old text or the new.

    Args:
        text: written as UTF-8.
        errors: what happens to file names in it that are not UTF-8; "surrogateescape" keeps their bytes.

    Raises:
        UnreadableFile: it cannot be written.
    """
    write_bytes(path, text.encode("utf-8", errors))


def write_bytes(path: Path, content: bytes) -> None:
    """The same with bytes."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UnreadableFile(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def staged_files(paths: Sequence[Path], overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder beside files of one folder; those written in it replace them if the block ends well.

    Args:
        paths: replaced in this order; should the last one fail, those before it are put back.
        overwrite: whether they may exist.

    Raises:
        UsageError: one exists and `overwrite` is off, or it is no file.
        UnreadableFile: the folder cannot be written to, or the disk is full.
    """
    for path in paths:
        if os.path.lexists(path) and not path.is_file():
            raise UsageError(f"{path} is there already and is not a file; choose another name")
        if os.path.lexists(path) and not overwrite:
            raise UsageError(f"{path} is there already; choose another name or allow it with --overwrite")
    parent = paths[-1].parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=parent) as name:
            yield Path(name)
            written = [path for path in paths if (Path(name) / path.name).exists()]
            os.umask(umask := os.umask(0))
            for path in written:
                temporary = Path(name) / path.name
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
                temporary.chmod(0o666 & ~umask)  # a library may make its files private, the result need not be
            _replace_all(Path(name), written)
    except OSError as error:
        raise UnreadableFile(f"{paths[-1]}: cannot be written: {error.strerror or error}") from error


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
    """Readable JSON; infinite numbers and NaN, which JSON does not have, become null."""
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
    """`write_text` of `to_json`."""
    write_text(path, to_json(content))


@contextlib.contextmanager
def run_folder(folder: Path | None, command: str, details: Mapping[str, object] | None = None) -> Iterator[Path]:
    """A new run in `folder`; how it ended is written when the block is left.

    Args:
        folder: empty or new; None: `runs/COMMAND`, or the first of `runs/COMMAND-2`, ... that is free.
        command: its name.
        details: what else `run.json` keeps, for one who continues the run.

    Raises:
        UsageError: the folder is not empty.
        UnreadableFile: it cannot be written to.
    """
    folder = _free_folder(command) if folder is None else _claim(folder)
    record: dict[str, object] = {"command": command, "arguments": sys.argv[1:], "began": _now(), "versions": versions()}
    logger.debug(f"writing to {folder}")
    with _recorded(folder, record | dict(details or {})):
        yield folder


def refuse_inside(folder: Path, images: Path, what: str) -> None:
    """The pictures of a run must not become images of the folder that they were made from.

    Args:
        folder: of the run.
        images: a folder with images.
        what: how the user named it.

    Raises:
        UsageError: they would.
    """
    below = images.resolve()
    if below.is_dir() and below in (folder.resolve(), *folder.resolve().parents):
        raise UsageError(f"{folder} is inside {what}: its pictures would be images; choose another -o")


@contextlib.contextmanager
def continued_run(folder: Path, record: Mapping[str, object]) -> Iterator[Path]:
    """Go on with a run whose record `read_run` gave; how it ended is written when the block is left.

    Raises:
        UnreadableFile: the folder cannot be written to.
    """
    before = record.get("continued")
    times = [*(before if isinstance(before, list) else []), _now()]
    kept = {key: value for key, value in record.items() if key not in ("status", "reason")}
    with _recorded(folder, kept | {"continued": times}):
        yield folder


def read_run(folder: Path, command: str | None = None) -> dict[str, Any]:
    """Return the record of a run, of this command if one is given.

    Raises:
        UnreadableFile: there is none, or it is damaged.
        UsageError: it is of another command.
    """
    path = folder / "run.json"
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror}; expected the folder of a run") from error
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(f"{path}: damaged ({str(error)[:80]})") from error
    if not isinstance(record, dict):
        raise UnreadableFile(f"{path}: damaged (not a record)")
    if command and record.get("command") != command:
        raise UsageError(f"{folder}: not a run of fcvit {command}")
    return record


@contextlib.contextmanager
def _recorded(folder: Path, record: Mapping[str, object]) -> Iterator[None]:
    path = folder / "run.json"

    def write(**ended: object) -> None:
        with held_back():  # a second signal must not leave "running" behind
            write_json(path, {**record, **ended})

    with _locked(folder):
        try:
            with kept():
                write(status="running")
                yield
                check()
        except KeyboardInterrupt:
            write(status="interrupted")
            raise
        except BaseException as error:
            with contextlib.suppress(UnreadableFile):  # the disk may be what failed
                write(status="failed", reason=str(error))
            raise
        write(status="finished")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from continuing the run at the same time; the lock ends with the process."""
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
                raise UsageError(f"{folder}: another process is at work on this run") from error
            except OSError:
                break  # a network disk without locks
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
            # Who had the lock has removed the file since it was opened: others lock a new one.
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while the lock is held, so that it is no other's


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _claim(folder: Path) -> Path:
    """Make the folder ours: of two processes that want it, the one that makes `run.json` has it."""
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        if not taken:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError), (folder / "run.json").open("x"):
                return folder
    except OSError as error:
        raise UnreadableFile(f"{folder}: cannot be written: {error.strerror or error}") from error
    raise UsageError(f"{folder} is not empty; a run gets a folder of its own, choose another with -o")


def _free_folder(name: str) -> Path:
    for number in itertools.count(1):
        with contextlib.suppress(UsageError):
            return _claim(Path("runs") / (name if number == 1 else f"{name}-{number}"))
    raise AssertionError
