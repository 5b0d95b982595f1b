"""Compile the operators once on the user's machine, cache the library and load it.

The library has a plain C interface for Python's ctypes. Building it needs only a compiler, not Paddle's headers or
build tools, and one library works with every release of Python and Paddle.
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

SOURCES = ("operators.cc", "depthwise.cc", "block.cc", "optimizer.cc", "operators.h", "matmul.h", "simd.h")
# No unsafe math optimizations: NaN must stay NaN, because training checks for it.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
COMPILERS = ("g++", "clang++", "c++")
REMEDY = "install a C++ compiler with OpenMP (Debian, Ubuntu: apt install g++)"


@functools.cache
def operators() -> ctypes.CDLL:
    """Load the library of `operators.cc`. The first call on a machine compiles it, in 10 to 20 seconds.

    The library is cached in `$XDG_CACHE_HOME/fcvit/native` (by default `~/.cache/fcvit/native`), under a hash of
    everything that it depends on.

    Raises:
        MissingExtra: The system is not supported, no compiler is installed, the compiler fails, or the folder cannot
            be written.
    """
    if os.name != "posix":
        raise _missing("they support only Linux and macOS", 'use another engine, or operators = "plain" in training')
    import fcntl  # does not exist on Windows

    compiler = find_compiler()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "fcvit" / "native" / _key(compiler)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # only one process compiles, and the others load its library
            return ctypes.CDLL(str(_intact_library(folder) or _compile(compiler, folder)))
    except OSError as error:
        raise _missing(
            f"{error} ({folder})", "make the folder writable, or set XDG_CACHE_HOME to use another"
        ) from error


def _missing(reason: str, remedy: str = REMEDY) -> MissingExtra:
    return MissingExtra(f"native operators are not available: {reason}; {remedy}")


def find_compiler() -> str:
    """Return the path of the C++ compiler: `$CXX` if it is set, otherwise the first of `COMPILERS` that is installed.

    Raises:
        MissingExtra: There is no compiler.
    """
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else COMPILERS:
        if path := shutil.which(name):
            return path
    raise _missing(f"no C++ compiler found ({chosen or ', '.join(COMPILERS)})")


def _key(compiler: str) -> str:
    """Return a hash of sources, flags, compiler and processor. Code for `-march=native` runs only on this processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [*(source.read_text("utf-8") for source in _sources()), *FLAGS, compiler, version, processor_identity()]
    return hashlib.sha256("".join(f"{part}\0" for part in parts).encode()).hexdigest()[:32]


def _sources() -> list[Path]:
    return [Path(__file__).with_name(name) for name in SOURCES]


def _intact_library(folder: Path) -> Path | None:
    """Return the path of the library that matches the hash in its name. Delete a damaged library, which could crash."""
    for path in folder.glob("*.so"):
        if hashlib.sha256(path.read_bytes()).hexdigest() == path.stem:
            return path
        path.unlink(missing_ok=True)
    return None


def _compile(compiler: str, folder: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        library = Path(scratch) / "operators.so"
        command = [compiler, *FLAGS, *(str(path) for path in _sources() if path.suffix == ".cc"), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            first = next((line for line in lines if "error" in line.lower()), lines[0])
            raise _missing(f"{compiler} failed: {first.strip()}")
        return library.replace(folder / f"{hashlib.sha256(library.read_bytes()).hexdigest()}.so")
