"""Tests of interleaved measurements: order, failures and the end of all processes."""

import logging
import multiprocessing
import os
import re
import signal
from pathlib import Path

import pytest

from fcvit.errors import FcvitError, UsageError
from fcvit.inference.interleave import Timing, interleave, median_ratio, timed

QUICK = {"calls": 2, "seconds": 0, "pause": 0}


def load(job):
    """Return a function that logs its calls. A job is a name, a log file, the failing call and the kind of failure."""
    name, log, failing_call, failure = job
    if failing_call == 0:
        raise UsageError(f"{name} does not load")
    logging.getLogger("fcvit").info(f"loading {name}")
    calls = 0

    def function():
        nonlocal calls
        calls += 1
        if calls == failing_call:
            if failure == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if failure == "left":
                os._exit(3)
            raise SystemError("a library\nand more lines")
        with Path(log).open("a") as file:
            file.write(f"{name}{calls} ")
        return calls

    return function, f"about {name}"


@pytest.mark.slow
def test_every_contender_has_a_turn_in_each_round(tmp_path, notes):
    jobs = [(name, str(tmp_path / "log"), None, None) for name in "ab"]
    turns = []
    results = interleave(load, jobs, 2, **QUICK, advance=turns.append)
    assert (tmp_path / "log").read_text() == "a1 a2 a3 b1 b2 b3 a4 a5 a6 b4 b5 b6 "
    assert results == {
        job: Timing(f"about {job[0]}", [[2, 3], [5, 6]]) for job in jobs
    }  # the first call of a turn is not counted
    assert sum(turns) == 2 * (1 + 2) and notes == ["loading a", "loading b"]
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_failure_is_reported_and_the_other_contenders_continue(tmp_path):
    cases = [
        ("loading", 0, None, UsageError, "^loading does not load$"),
        ("raising", 5, "raised", FcvitError, "^SystemError: a library$"),
        ("killed", 5, "killed", FcvitError, "SIGKILL.*out of memory"),
        ("leaving", 2, "left", FcvitError, "exit code 3"),
    ]
    jobs = {name: (name, str(tmp_path / "log"), call, failure) for name, call, failure, *_ in cases}
    working = ("working", str(tmp_path / "log"), None, None)
    turns = []
    results = interleave(load, [*jobs.values(), working], 2, **QUICK, advance=turns.append)
    for name, _, _, error, message in cases:
        result = results[jobs[name]]
        assert type(result) is error and re.search(message, str(result)) and "\n" not in str(result)
    assert len(results[working].rounds) == 2 and sum(turns) == 5 * (1 + 2)
    assert multiprocessing.active_children() == []


def test_timed_and_median_ratio():
    assert 0 <= timed(lambda: None)() < 5
    assert median_ratio([4, 40, 8], [1, 10, 4]) == 4
