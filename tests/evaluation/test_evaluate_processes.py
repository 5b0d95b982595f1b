"""Evaluation in processes of its own: killed in the middle and continued, and shared by several."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import hide_charts, needs_paddle, write_pth
from fcvit.commands.evaluate import evaluate
from fcvit.evaluation.journal import HEAD, frames

pytestmark = [pytest.mark.slow, needs_paddle]
LANE = "digits-custom"
OPTIONS = ["--device", "cpu", "--engine", "paddle", "--input-size", "96", "--batch-size", "2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory, digits_tensors):
    """33 images, weights, and an uninterrupted run in this process. Nobody draws charts, which take longer than all."""
    root = tmp_path_factory.mktemp("work")
    generator = np.random.default_rng(0)
    for index in range(33):
        path = root / "data" / str(index % 10) / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 30, 3), np.uint8)).save(path)
    (root / "data" / "7" / "bad.png").write_bytes(b"\x89PNG")
    weights = write_pth(root / "digits.pth", digits_tensors)
    options = {"preprocessing": {"input_size": 96}, "batch_size": 2, "device": "cpu", "save_logits": True}
    (root / "hidden").mkdir()
    (root / "hidden" / "matplotlib.py").write_text("raise ModuleNotFoundError('hidden by the test', name=__name__)")
    with pytest.MonkeyPatch.context() as patch:
        hide_charts(patch)
        evaluate(weights, root / "data", engines="paddle", folder=root / "whole", **options)
    return root


def start(root, *words, launcher=()):
    # Paddle's launcher knows no -m: it starts a program, or a file that ends in .py.
    program = [Path(sys.executable).with_name("fcvit")] if launcher else ["fcvit"]
    command = list(map(str, [sys.executable, "-m", *launcher, *program, "eval", *words]))
    environment = {**os.environ, "PYTHONPATH": str(root / "hidden")}
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def figures(run):
    found = json.loads((run / LANE / "metrics.json").read_text())
    return {key: value for key, value in found.items() if key != "seconds"}


def children(pid):
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in listed.read_text().split()] if listed.exists() else []


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_run_that_is_killed_goes_on_to_the_same_bytes(work):
    """kill -9 in the middle of a batch, twice; the journal's last frame is cut off as a power cut would.

    With the killed process its workers end.
    """
    run = work / "killed"
    words = ["--weights", "digits.pth", "--data", "data", *OPTIONS, "-o", run, "--workers", "2"]
    for attempt in (words, ["--resume", run, "--workers", "2"]):
        process = start(work, *attempt)
        journal = run / "journals" / f"0-{0 if attempt is words else 1}.journal"
        deadline = time.monotonic() + 60
        while not (journal.exists() and journal.stat().st_size > 700) and time.monotonic() < deadline:
            time.sleep(0.01)
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)  # their ends of the pipes are closed too
        assert process.returncode == -signal.SIGKILL
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(alive, workers)) and (len(workers) >= 2 or not sys.platform.startswith("linux"))
        assert json.loads((run / "run.json").read_text())["status"] == "running"  # nothing could be written
        assert not (run / LANE / "metrics.json").exists()
        journal.write_bytes(journal.read_bytes()[:-3])
    done = start(work, "--resume", run)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 6 and "are done already" in err and f"written to {run}" in out  # 6: the bad image
    for name in ("predictions.csv", "per_class.csv", "worst.png"):
        assert (run / LANE / name).read_bytes() == (work / "whole" / LANE / name).read_bytes()
    assert figures(run) == figures(work / "whole")


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_says_how_to_go_on(work, sign):
    run = work / f"interrupted{int(sign)}"
    process = start(work, "--weights", "digits.pth", "--data", "data", *OPTIONS, "-o", run, "--workers", "1")
    deadline = time.monotonic() + 60
    while not list(run.glob("journals/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(sign)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not out
    assert f"go on with: fcvit eval --resume {run}" in err and "Traceback" not in err
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.ci)])
def test_several_processes_count_every_image_once(work, count):
    """17 batches over two or three processes of Paddle's launcher; one figure is the same for all."""
    run = work / f"shared{count}"
    launcher = ["paddle.distributed.launch", "--nproc_per_node", count, "--log_dir", work / f"log{count}"]
    words = ["--weights", "digits.pth", "--data", "data", *OPTIONS, "-o", run, "--workers", "1", "--save-logits"]
    process = start(work, *words, launcher=launcher)
    out, err = process.communicate(timeout=180)
    logs = "\n".join(path.read_text() for path in sorted((work / f"log{count}").glob("workerlog.*")))
    assert (run / LANE / "metrics.json").exists(), out + err + logs
    kept = [list(frames(path.read_bytes()[HEAD:], np.dtype("V1"))) for path in sorted((run / "journals").iterdir())]
    assert len(kept) == count and all(kept)
    batches = sorted(frame.number for journal in kept for frame in journal)
    assert batches == list(range(17))
    assert (run / LANE / "predictions.csv").read_bytes() == (work / "whole" / LANE / "predictions.csv").read_bytes()
    ours, whole = figures(run), figures(work / "whole")
    assert ours.pop("loss") == pytest.approx(whole.pop("loss"), abs=1e-6)
    assert ours.pop("calibration")["error"] == pytest.approx(whole.pop("calibration")["error"], abs=1e-6)
    assert ours == whole
    logits = [np.load(folder / LANE / "logits.npy") for folder in (run, work / "whole")]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)
    assert logs.count("written to") == 1  # one process speaks for all
