"""Test the peak memory of processes."""

import subprocess
import sys

import pytest

from fcvit import machine
from fcvit.commands.options import decoding_processes
from fcvit.machine import available_threads, peak_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems count differently")
def test_the_memory_of_the_parent_process_does_not_count():
    child = "from fcvit.machine import peak_memory; print(peak_memory())"
    parent = f"""
import subprocess, sys
held = b"x" * (200 << 20)
print(subprocess.run([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, text=True, check=True).stdout)
"""
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, timeout=60, check=True)
    assert 1 << 20 < int(done.stdout) < 150 << 20


def test_freed_memory_does_not_lower_the_peak():
    """The peak may change by a few pages, because the kernel counts them late."""
    block = b"x" * (64 << 20)
    peak = peak_memory()
    del block
    assert peak_memory() > peak - (8 << 20)


@pytest.mark.parametrize(("limit", "cores"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 8), (None, 8)])
def test_the_number_of_cores_is_that_of_the_container(monkeypatch, tmp_path, limit, cores):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "_CONTAINER", tmp_path)
    if limit:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    assert available_threads() == cores


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(8, None, 8), (96, "8", 12), (96, None, 32), (2, "4", 1), (16, "", 16)]
)
def test_the_default_number_of_decoding_processes_is_this_processs_share_of_the_cores(
    monkeypatch, cores, processes, workers
):
    monkeypatch.setattr(machine, "available_threads", lambda: cores)
    monkeypatch.delenv("PADDLE_LOCAL_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("PADDLE_LOCAL_SIZE", processes)
    assert decoding_processes(None) == workers and decoding_processes(3) == 3
