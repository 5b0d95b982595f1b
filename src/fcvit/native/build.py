"""Compile the C++ sources of this folder on the user's machine, cache the library and load it.

The library has a plain C interface for Python's ctypes. Building it needs only a compiler, not Paddle's headers or
build tools, and one library works with every release of Python and Paddle. There is one library for each level of
instruction sets. The level is chosen when the program runs, so machines with different processors can share a cache.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fcvit.errors import MissingExtra
from fcvit.machine import available_threads, processor_flags, processor_identity
from fcvit.run_folder import cache_root

logger = logging.getLogger("fcvit")

# No unsafe math optimizations: NaN must stay NaN, because training checks for it. Loops with sqrt need -fno-math-errno.
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fopenmp", "-pthread", "-fPIC")
EXTRA_FLAGS = "FCVIT_CXXFLAGS"
COMPILERS = ("g++", "clang++", "c++")
REMEDY = "install a C++ compiler with OpenMP (Debian, Ubuntu: apt install g++)"
COMMAND = "fcvit doctor --build"
NATIVE = "native"
_AVX2 = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"])
_AVX512 = frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
LEVELS = {"x86-64-v4": _AVX2 | _AVX512, "x86-64-v3": _AVX2}
"""Level of the x86-64 psABI, the best first -> instruction sets that it needs, by their names in /proc/cpuinfo."""


def levels() -> tuple[str, ...]:
    """Return the levels that this processor supports, the best first. "native" stands for a processor without any."""
    return tuple(level for level, needed in LEVELS.items() if needed <= processor_flags()) or (NATIVE,)


@functools.cache
def library(level: str | None = None) -> ctypes.CDLL:
    """Load the library for a level. The first call on a machine compiles it, in less than 30 seconds.

    The library is cached in `$XDG_CACHE_HOME/fcvit/native` (by default `~/.cache/fcvit/native`), under a hash of
    everything that it depends on.

    Args:
        level: A level of `LEVELS`, or "native" for the running processor. None means the best level that it supports.

    Raises:
        MissingExtra: The system is not supported, no compiler is installed, the compiler fails, or the folder cannot
            be written.
    """
    level = level or levels()[0]
    folder = cache_root() / "native" / key(level)
    try:
        return ctypes.CDLL(str(_intact_library(folder) or _compile_once(level, folder)))
    except OSError as error:
        raise _missing(
            f"{error} ({folder})", "make the folder writable, or set XDG_CACHE_HOME to use another"
        ) from error


def is_built(level: str | None = None) -> bool:
    """Return whether an intact library for the level is in the cache. This never starts the compiler."""
    try:
        return _intact_library(cache_root() / "native" / key(level)) is not None
    except (MissingExtra, OSError):
        return False


def _missing(reason: str, remedy: str = REMEDY) -> MissingExtra:
    return MissingExtra(f"the native library is not available: {reason}; {remedy}")


def find_compiler() -> str:
    """Return the path of the C++ compiler: `$CXX` if it is set, otherwise the first of `COMPILERS` that is installed.

    Raises:
        MissingExtra: The system is not supported, or there is no compiler.
    """
    if os.name != "posix":
        raise _missing("only Linux and macOS are supported", 'use another engine, or operators = "plain" in training')
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else COMPILERS:
        if path := shutil.which(name):
            return path
    raise _missing(f"no C++ compiler found ({chosen or ', '.join(COMPILERS)})")


def key(level: str | None = None) -> str:
    """Return a hash of everything that a library depends on: sources, flags, compiler and level.

    Raises:
        MissingExtra: There is no compiler.
    """
    level = level or levels()[0]
    # A compiler is identified by its file, because asking it for its version takes longer than loading the library.
    compiler = Path(find_compiler()).resolve()
    parts = [f"{path.name}\0{path.read_text('utf-8')}" for path in _sources("*.h") + _sources("*.cc")]
    parts += [*flags(level), str(compiler), str(compiler.stat().st_size), str(compiler.stat().st_mtime_ns)]
    if level == NATIVE:
        parts.append(processor_identity())
    return hashlib.sha256("".join(f"{part}\0" for part in parts).encode()).hexdigest()[:32]


def _sources(pattern: str) -> list[Path]:
    return sorted(Path(__file__).parent.glob(pattern))


def flags(level: str) -> list[str]:
    """Return the compiler's flags for a level."""
    return [*FLAGS, f"-march={level}", *os.environ.get(EXTRA_FLAGS, "").split()]


def _intact_library(folder: Path) -> Path | None:
    """Return the path of the library that matches the hash in its name. A damaged one could crash the process."""
    for path in folder.glob("*.so"):
        if hashlib.sha256(path.read_bytes()).hexdigest() == path.stem:
            return path
    return None


def _compile_once(level: str, folder: Path) -> Path:
    """Compile the library, unless another process does it at the same time."""
    import fcntl  # does not exist on Windows

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path := _intact_library(folder):
            return path
        for damaged in folder.glob("*.so"):
            damaged.unlink()
        logger.info(f"compiling the native library for {level}, once; it is cached in {folder.parent}")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            path = _compile(find_compiler(), flags(level), Path(scratch))
            return path.replace(folder / f"{hashlib.sha256(path.read_bytes()).hexdigest()}.so")


def _compile(compiler: str, flags: Sequence[str], scratch: Path) -> Path:
    """Compile all sources, one per process and as many at once as there are cores, and link them."""
    from fcvit.report.progress import progress  # is not needed to load a library

    sources = _sources("*.cc")
    objects = [str(scratch / f"{source.stem}.o") for source in sources]
    commands = [[*flags, "-c", str(source), "-o", to] for source, to in zip(sources, objects, strict=True)]
    with progress("compiling", len(sources) + 1, "files") as advance:
        _run(compiler, commands, advance)
        _run(compiler, [[*flags, "-shared", *objects, "-o", str(scratch / "native.so")]], advance)
    return scratch / "native.so"


def _run(compiler: str, commands: Sequence[Sequence[str]], advance: Callable[[int], None]) -> None:
    """Run the compiler with each list of arguments. If one run fails or is interrupted, the others are ended."""
    waiting = list(commands)
    running: list[subprocess.Popen[str]] = []
    try:
        while waiting or running:
            while waiting and len(running) < available_threads():
                running.append(_start([compiler, *waiting.pop(0)]))
            errors = running[0].communicate()[1]
            if code := running.pop(0).returncode:
                lines = errors.strip().splitlines() or [f"exit code {code}"]
                first = next((line for line in lines if "error" in line.lower()), lines[0])
                raise _missing(f"{compiler} failed: {first.strip()}")
            advance(1)
    finally:
        for process in running:
            process.kill()
            process.communicate()


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # such as a sanitizer
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    try:
        return subprocess.Popen(command, env=environment, text=True, errors="replace", **pipes)
    except OSError as error:
        raise _missing(f"{command[0]} cannot be started: {error.strerror}") from error
