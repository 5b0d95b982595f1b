"""Query the machine that this process runs on: processor, cores and memory."""

import contextlib
import functools
import os
import platform
import sys
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

_CONTAINER = Path("/sys/fs/cgroup")  # limits of the container on Linux


def processor_name() -> str:
    """Return a readable name of the processor."""
    return _cpuinfo().get("model name", "").strip() or platform.processor() or platform.machine()


def processor_identity() -> str:
    """Return the processor model and its instruction sets, as a key for results that depend on the processor."""
    info = _cpuinfo()
    known = [info[name] for name in ("model name", "flags", "Features") if name in info]
    return "".join(known) or f"{platform.machine()} {platform.processor()}"


@functools.cache
def processor_flags() -> frozenset[str]:
    """Return the names of the processor's instruction sets on Linux, as in /proc/cpuinfo. Empty on other systems."""
    info = _cpuinfo()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


def _cpuinfo() -> dict[str, str]:
    """Return the fields of the first core in /proc/cpuinfo, or an empty dictionary if the file is not available."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n", 1)[0].splitlines()
        return {name.strip(): value for name, _, value in (line.partition(":") for line in lines)}
    return {}


def available_threads() -> int:
    """Return the number of cores that this process may use, within the limit of the container if any."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # without a limit, the file is missing or begins with "max"
        microseconds, period = map(int, (_CONTAINER / "cpu.max").read_text().split())
        cores = min(cores, max(1, round(microseconds / period)))
    return cores


def own_threads() -> int:
    """Return the number of cores for this process. The processes of Paddle's launcher share those of their machine."""
    return max(1, available_threads() // int(os.environ.get("PADDLE_LOCAL_SIZE") or 1))


def peak_memory() -> int:
    """Return the peak memory of this process in bytes, or 0 if the system does not report it."""
    # On Linux, `getrusage` includes memory of the parent process, so a small child of a large process seems large.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory() -> int:
    """Return the memory in bytes that is available without swapping, within the limit of the container if any."""
    available = 1 << 62
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
        limit = (_CONTAINER / "memory.max").read_text().strip()
        if limit.isdecimal():
            available = min(available, int(limit) - int((_CONTAINER / "memory.current").read_text()))
    except OSError:
        pass
    return available
