"""Taking turns: order, failures, processes that end, and that nothing is left of them."""

import logging
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from fcvit.errors import FcvitError, UsageError
from fcvit.inference.interleave import Timing, interleave, median_ratio, timed

QUICK = {"calls": 2, "seconds": 0, "pause": 0}


def load(job):
    """A job is a name, a file to write the name to, the call that fails, and how."""
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
            raise SystemError("a library\nand its story")
        with Path(log).open("a") as file:
            file.write(f"{name}{calls} ")
        return calls

    return function, f"about {name}"


def test_everybody_has_a_turn_in_each_round(tmp_path, notes):
    jobs = [(name, str(tmp_path / "log"), None, None) for name in "ab"]
    turns = []
    results = interleave(load, jobs, 2, **QUICK, advance=turns.append)
    assert (tmp_path / "log").read_text() == "a1 a2 a3 b1 b2 b3 a4 a5 a6 b4 b5 b6 "
    assert results == {
        job: Timing(f"about {job[0]}", [[2, 3], [5, 6]]) for job in jobs
    }  # a turn's first is not counted
    assert sum(turns) == 2 * (1 + 2) and notes == ["loading a", "loading b"]
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_one_that_fails_is_named_and_the_others_go_on(tmp_path):
    cases = [
        ("loading", 0, None, UsageError, "loading does not load"),
        ("raising", 5, "raised", FcvitError, "SystemError: a library"),
        ("killed", 5, "killed", FcvitError, "its process ended by SIGKILL; out of memory?"),
        ("leaving", 2, "left", FcvitError, "its process ended with exit code 3"),
    ]
    jobs = {name: (name, str(tmp_path / "log"), call, failure) for name, call, failure, *_ in cases}
    well = ("well", str(tmp_path / "log"), None, None)
    turns = []
    results = interleave(load, [*jobs.values(), well], 2, **QUICK, advance=turns.append)
    for name, _, _, error, message in cases:
        assert type(results[jobs[name]]) is error and str(results[jobs[name]]) == message
    assert len(results[well].rounds) == 2 and sum(turns) == 5 * (1 + 2)
    assert multiprocessing.active_children() == []


def test_seconds_and_ratios():
    assert 0 <= timed(lambda: None)() < 5
    assert median_ratio([4, 40, 8], [1, 10, 4]) == 4
