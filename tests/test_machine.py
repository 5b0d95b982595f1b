"""Test the peak memory of processes."""

import subprocess
import sys

import pytest

from fcvit.machine import peak_memory


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
