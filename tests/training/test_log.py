"""The log files of a run."""

import io
import json

import pytest
from PIL import Image

from fcvit.errors import MissingExtra
from fcvit.report.charts import training_curves
from fcvit.training import log as module
from fcvit.training.log import Log

ROWS = [
    {"epoch": n + 1, "step": 9 * n, "lr": 1e-3 / (n + 1), "loss": 2 / (n + 1), "val_loss": 2.1, "top1": 10.0 * n}
    for n in range(4)
]


def test_the_log_files_contain_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "training_curves", lambda rows, title: f"{title}: {len(rows)}".encode())
    log = Log(tmp_path, False)
    log.write(ROWS[:2])
    log.write([*ROWS, {**ROWS[0], "ema_top1": 3.0}])
    log.close()
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 1]
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0] == "epoch,step,lr,loss,val_loss,top1,ema_top1"
    assert lines[1] == "1,0,0.001,2.0,2.1,0.0," and lines[5].endswith(",3.0")
    assert (tmp_path / "curves.png").read_bytes() == f"{tmp_path.name}: 5".encode()


def test_missing_matplotlib_is_reported_once(tmp_path, monkeypatch, notes):
    def missing(*_):
        raise MissingExtra("matplotlib is not installed; install it with: pip install 'fcvit[report]'")

    monkeypatch.setattr(module, "training_curves", missing)
    log = Log(tmp_path, False)
    for count in (1, 2, 3):
        log.write(ROWS[:count])
    (note,) = notes
    assert "curves.png" in note and "pip install 'fcvit[report]'" in note


def test_each_epoch_is_written_to_tensorboard_once(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr(module, "training_curves", lambda *_: b"")
    log = Log(tmp_path, True)
    added = []
    monkeypatch.setattr(log.board, "add_scalar", lambda *scalar: added.append(scalar))
    log.write(ROWS[:1])
    log.write(ROWS[:3])
    log.close()
    assert [scalar for scalar in added if scalar[0] == "top1"] == [
        ("top1", 0.0, 1),
        ("top1", 10.0, 2),
        ("top1", 20.0, 3),
    ]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_missing_tensorboardx_is_an_error_with_its_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fcvit\[tensorboard\]'"):
        Log(tmp_path, True)


@pytest.mark.charts
@pytest.mark.slow
def test_curves_have_a_panel_for_each_kind_of_value():
    pytest.importorskip("matplotlib")

    def height(rows):
        with Image.open(io.BytesIO(training_curves(rows, "run"))) as picture:
            return picture.height

    minimal = [{"epoch": 1, "loss": 2.0, "lr": 1e-3}]
    assert height(ROWS) > height(minimal)
    assert height([{**row, "ema_top1": 1.0} for row in ROWS]) == height(ROWS)
    masks = [{**minimal[0], "miou": 40.0, "aacc": 80.0}]  # of segmentation
    assert height(masks) > height([{**minimal[0], "miou": 40.0}]) > height(minimal)
    boxes = [{**minimal[0], "box_ap": 40.0}]  # of detection
    assert height([{**boxes[0], "loss_cls": 1.0, "loss_mask": 1.0}]) > height(boxes) > height(minimal)
    assert training_curves(ROWS, "run") == training_curves(ROWS, "run")
