"""Run the native code with the sanitizers of the compiler."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import needs_paddle
from fcvit.errors import MissingExtra
from fcvit.native.build import find_compiler

ROOT = Path(__file__).parents[2]


@pytest.mark.ci
@needs_paddle
@pytest.mark.parametrize(("check", "runtime"), [("address", "libasan.so"), ("thread", "libtsan.so")])
def test_sanitizers_find_no_error(check, runtime):
    try:
        compiler = find_compiler()
    except MissingExtra as error:
        pytest.skip(str(error))
    path = subprocess.run([compiler, f"-print-file-name={runtime}"], capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"the compiler has no {runtime}")
    command = [sys.executable, "scripts/sanitize.py", check]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
