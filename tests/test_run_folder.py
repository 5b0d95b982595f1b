"""Test run folders: one folder for each run, with a record that is always complete."""

import fcntl
import json
import os
import signal
from pathlib import Path

import pytest

from fcvit.errors import UnreadableFile, UsageError
from fcvit.run_folder import _locked, run_folder, to_json, versions, write_text


def status(folder):
    return json.loads((folder / "run.json").read_text())


def test_a_finished_run_is_recorded(tmp_path):
    with run_folder(tmp_path / "runs" / "a", "eval") as folder:
        assert status(folder)["status"] == "running"
    record = status(folder)
    assert record["status"] == "finished" and record["command"] == "eval"
    assert {"python", "numpy", "pillow"} <= set(record["versions"])


def test_failed_and_interrupted_runs_are_recorded(tmp_path):
    with pytest.raises(ValueError, match="because"), run_folder(tmp_path / "a", "eval"):
        raise ValueError("because")
    assert status(tmp_path / "a")["status"] == "failed" and status(tmp_path / "a")["reason"] == "because"
    with pytest.raises(KeyboardInterrupt), run_folder(tmp_path / "b", "eval"):
        raise KeyboardInterrupt
    assert status(tmp_path / "b")["status"] == "interrupted"


def test_a_folder_that_is_not_empty_is_rejected(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").touch()
    with pytest.raises(UsageError, match="is not empty"), run_folder(tmp_path / "a", "eval"):
        pass
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]
    with pytest.raises(UnreadableFile), run_folder(tmp_path / "a" / "x" / "y", "eval"):
        pass


def test_default_folders(tmp_path, monkeypatch):
    """A run gets the first free folder. Two runs that start at the same time get different folders."""
    monkeypatch.chdir(tmp_path)
    with run_folder(None, "eval") as one, run_folder(None, "eval") as two:
        assert (str(one), str(two)) == ("runs/eval", "runs/eval-2")
    (tmp_path / "runs" / "eval-3").mkdir()
    with run_folder(None, "eval") as three:
        assert str(three) == "runs/eval-3"  # an empty folder is free


def test_only_one_of_two_runs_gets_the_same_folder(tmp_path, monkeypatch):
    """The second run checked that the folder is empty before the first run started."""
    with run_folder(tmp_path / "a", "first"):
        monkeypatch.setattr(Path, "iterdir", lambda _: iter(()))
        with pytest.raises(UsageError, match="is not empty"), run_folder(tmp_path / "a", "second"):
            pass
    assert status(tmp_path / "a")["command"] == "first"


def test_json_has_no_infinity():
    assert json.loads(to_json({"a": [float("inf"), 1.5], "b": (float("nan"),)})) == {"a": [None, 1.5], "b": [None]}


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_text(path, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UnreadableFile, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_versions():
    assert versions()["fcvit"]


def test_only_one_process_can_use_a_run(tmp_path):
    with _locked(tmp_path), pytest.raises(UsageError, match="another process"), _locked(tmp_path):
        pass
    with _locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_on_a_removed_file_does_not_count(tmp_path, monkeypatch):
    """A process opens the lock file, its owner removes the file and ends, and a third process locks a new file."""
    flock, third = fcntl.flock, []

    def late(file, how):
        if not third:
            (tmp_path / ".lock").unlink()
            third.append((tmp_path / ".lock").open("w"))
            flock(third[0], how)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UsageError, match="another process"), _locked(tmp_path):
        pass
    third[0].close()
    with _locked(tmp_path):
        pass


def test_a_second_signal_does_not_leave_the_status_running(tmp_path, monkeypatch):
    """The second signal arrives while the final status is written."""
    replace = os.replace

    def interrupted(*paths):
        if "interrupted" in Path(paths[0]).read_text():
            signal.raise_signal(signal.SIGINT)
        replace(*paths)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), run_folder(tmp_path / "a", "eval"):
        raise KeyboardInterrupt
    assert status(tmp_path / "a")["status"] == "interrupted"


def test_an_error_caused_by_a_signal_is_recorded_as_interrupted(tmp_path):
    with pytest.raises(KeyboardInterrupt), run_folder(tmp_path / "a", "eval"):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise OSError("(External)") from error
    assert status(tmp_path / "a")["status"] == "interrupted"
