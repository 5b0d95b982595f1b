"""The machine: what a process is said to have held."""

import subprocess
import sys

import pytest

from fcvit.machine import peak_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the system counts otherwise")
def test_a_child_of_a_large_process_is_not_large():
    child = "from fcvit.machine import peak_memory; print(peak_memory())"
    parent = f"""
import subprocess, sys
held = b"x" * (200 << 20)
print(subprocess.run([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, text=True, check=True).stdout)
"""
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, timeout=60, check=True)
    assert 1 << 20 < int(done.stdout) < 150 << 20


def test_a_peak_stays():
    """But for a few pages, which the kernel counts late."""
    held = b"x" * (64 << 20)
    at_most = peak_memory()
    del held
    assert peak_memory() > at_most - (8 << 20)
