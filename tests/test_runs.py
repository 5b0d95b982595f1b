"""Run folders: one a run, never half-told."""

import json

import pytest

from fcvit.errors import UnreadableFile, UsageError
from fcvit.runs import free_folder, run_folder, versions, write_text


def status(folder):
    return json.loads((folder / "run.json").read_text())


def test_a_run_that_ends_well(tmp_path):
    with run_folder(tmp_path / "runs" / "a", "eval") as folder:
        assert status(folder)["status"] == "running"
    found = status(folder)
    assert found["status"] == "finished" and found["command"] == "eval"
    assert {"python", "numpy", "pillow"} <= set(found["versions"])


def test_a_run_that_does_not(tmp_path):
    with pytest.raises(ValueError, match="because"), run_folder(tmp_path / "a", "eval"):
        raise ValueError("because")
    assert status(tmp_path / "a")["status"] == "failed" and status(tmp_path / "a")["reason"] == "because"
    with pytest.raises(KeyboardInterrupt), run_folder(tmp_path / "b", "eval"):
        raise KeyboardInterrupt
    assert status(tmp_path / "b")["status"] == "interrupted"


def test_a_folder_that_is_taken(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").touch()
    with pytest.raises(UsageError, match="is not empty"), run_folder(tmp_path / "a", "eval"):
        pass
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]
    with pytest.raises(UnreadableFile), run_folder(tmp_path / "a" / "x" / "y", "eval"):
        pass


def test_default_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(free_folder("eval")) == "runs/eval"
    for name in ("eval", "eval-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").touch()
    assert str(free_folder("eval")) == "runs/eval-3"


def test_text_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_text(path, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UnreadableFile, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_versions():
    assert versions()["fcvit"]
