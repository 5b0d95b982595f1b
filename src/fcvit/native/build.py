"""Compile the operators once on the user's machine, keep the library in a cache folder, load it.

The library is plain C to Python's ctypes: neither Paddle's headers nor its build tools are needed, only a
compiler, and one library serves every release of Python and Paddle.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
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
    """Load the library of `operators.cc`, compiled at the first call on a machine (about 15 seconds).

    It is kept in `$XDG_CACHE_HOME/fcvit/native` (`~/.cache/...`), under a hash of all it depends on.

    Raises:
        MissingExtra: there is no compiler, it fails, or the folder cannot be written.
    """
    if os.name != "posix":
        raise _missing("they are for Linux and macOS", "do without them")
    import fcntl  # which Windows has not

    compiler = _compiler()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "fcvit" / "native" / _key(compiler)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process at a time compiles; the others find its library
            return ctypes.CDLL(str(_intact_library(folder) or _compile(compiler, folder)))
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


def _key(compiler: str) -> str:
    """Return a hash of sources, flags, compiler and processor: `-march=native` of another may not run here."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [*(source.read_text("utf-8") for source in _sources()), *FLAGS, compiler, version, processor_identity()]
    return hashlib.sha256("".join(f"{part}\0" for part in parts).encode()).hexdigest()[:32]


def _sources() -> list[Path]:
    return [Path(__file__).with_name(name) for name in SOURCES]


def _intact_library(folder: Path) -> Path | None:
    """Return the library, named by its own hash; one that was cut off or altered is removed: it could crash."""
    for path in folder.glob("*.so"):
        if hashlib.sha256(path.read_bytes()).hexdigest() == path.stem:
            return path
        path.unlink(missing_ok=True)
    return None


def _compile(compiler: str, folder: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        library = Path(scratch) / "operators.so"
        command = [compiler, *FLAGS, str(_sources()[0]), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
            first = next((line for line in lines if "error" in line.lower()), lines[0])
            raise _missing(f"{compiler} fails: {first.strip()}")
        return library.replace(folder / f"{hashlib.sha256(library.read_bytes()).hexdigest()}.so")
