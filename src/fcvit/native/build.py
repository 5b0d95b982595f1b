"""Compile the operators once on the user's machine, keep the library in a cache folder, load it.

The library is plain C to Python's ctypes: neither Paddle's headers nor its build tools are needed, only a
compiler, and one library serves every release of Python and Paddle.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fcvit.errors import MissingExtra
from fcvit.machine import processor_identity

SOURCES = ("operators.cc", "matmul.h", "simd.h")
# No unsafe mathematics: what is not a number must stay so, the training looks for it.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
COMPILERS = ("g++", "clang++", "c++")
REMEDY = "install a C++ compiler with OpenMP (Debian, Ubuntu: apt install g++)"


@functools.cache
def operators() -> ctypes.CDLL:
    """The library of `operators.cc`, compiled at the first call on a machine (about 15 seconds).

    It is kept in `$XDG_CACHE_HOME/fcvit/native` (`~/.cache/...`), under a hash of all it depends on.

    Raises:
        MissingExtra: there is no compiler, it fails, or the folder cannot be written.
    """
    if os.name != "posix":
        raise _missing("they are for Linux and macOS", "do without them")
    compiler = _compiler()
    folder = _cache() / _key(compiler)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            library = _kept(folder) or _compile(compiler, folder)
            return ctypes.CDLL(str(library))
    except OSError as error:
        raise _missing(
            f"{error} ({folder})", "see that the folder can be written, or name another by XDG_CACHE_HOME"
        ) from error


def _missing(reason: str, remedy: str = REMEDY) -> MissingExtra:
    return MissingExtra(f"native operators cannot be had: {reason}; {remedy}")


def _compiler() -> str:
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else COMPILERS:
        if found := shutil.which(name):
            return found
    raise _missing(f"no C++ compiler ({chosen or ', '.join(COMPILERS)})")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fcvit" / "native"


def _key(compiler: str) -> str:
    """Hash of the sources, flags, compiler and processor: `-march=native` on another may not run here."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256()
    for part in (
        *(source.read_text("utf-8") for source in _sources()),
        *FLAGS,
        compiler,
        version,
        processor_identity(),
    ):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


def _sources() -> list[Path]:
    return [Path(__file__).with_name(name) for name in SOURCES]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time compiles; the others wait and find its library."""
    import fcntl  # which Windows has not

    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _kept(folder: Path) -> Path | None:
    """The library, named by its own hash; what was cut off or altered is removed, loading it could crash."""
    for path in folder.glob("*.so"):
        if hashlib.sha256(path.read_bytes()).hexdigest() == path.stem:
            return path
        path.unlink(missing_ok=True)
    return None


def _compile(compiler: str, folder: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "operators.so"
        command = [compiler, *FLAGS, str(_sources()[0]), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
            first = next((line for line in lines if "error" in line.lower()), lines[0])
            raise _missing(f"{compiler} fails: {first.strip()}")
        path = folder / f"{hashlib.sha256(made.read_bytes()).hexdigest()}.so"
        os.replace(made, path)
    return path
