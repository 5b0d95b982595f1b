"""Tests of evaluation in separate processes: killed and resumed runs, interruptions, and several processes."""

import importlib.resources
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

from conftest import hide_charts, needs_paddle, write_detector, write_pth, write_shapes
from fcvit.commands import quickstart
from fcvit.commands.evaluate import evaluate
from fcvit.evaluation.journal import HEAD, frames
from fcvit.tasks.detection.results import BEST, DETECTIONS, FALSE_POSITIVES, MISSES, PER_CLASS, PREDICTIONS

pytestmark = [pytest.mark.slow, needs_paddle]
CONFIGURATION = "digits-custom"
OPTIONS = ["--device", "cpu", "--engine", "paddle", "--input-size", "96", "--batch-size", "2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory, digits_tensors):
    """Create 33 images, weights and an uninterrupted run. Charts are disabled, since they are slow."""
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
        evaluate(weights, root / "data", engines="paddle", folder=root / "uninterrupted", **options)
    return root


def start(root, *words, launcher=()):
    # Paddle's launcher does not support -m. It starts a program or a .py file.
    program = [Path(sys.executable).with_name("fcvit")] if launcher else ["fcvit"]
    command = list(map(str, [sys.executable, "-m", *launcher, *program, "eval", *words]))
    environment = {**os.environ, "PYTHONPATH": str(root / "hidden")}
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def metrics_without_seconds(run):
    metrics = json.loads((run / CONFIGURATION / "metrics.json").read_text())
    return {key: value for key, value in metrics.items() if key != "seconds"}


def children(pid):
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in listed.read_text().split()] if listed.exists() else []


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_run_can_be_resumed_with_identical_results(work):
    """Kill the process twice during a batch and truncate the journal, as after a power failure.

    The workers of a killed process must also end.
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
        process.communicate(timeout=60)  # returns only after the workers have closed the pipes too
        assert process.returncode == -signal.SIGKILL
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(alive, workers)) and (len(workers) >= 2 or not sys.platform.startswith("linux"))
        assert (
            json.loads((run / "run.json").read_text())["status"] == "running"
        )  # a killed process cannot write its status
        assert not (run / CONFIGURATION / "metrics.json").exists()
        journal.write_bytes(journal.read_bytes()[:-3])
    done = start(work, "--resume", run)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 6  # because of the unreadable image
    assert "of 34 images" in err and "already" in err and f"written to {run}" in out
    for name in ("predictions.csv", "per_class.csv", "worst.png"):
        assert (run / CONFIGURATION / name).read_bytes() == (work / "uninterrupted" / CONFIGURATION / name).read_bytes()
    assert metrics_without_seconds(run) == metrics_without_seconds(work / "uninterrupted")


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_prints_the_resume_command(work, sign):
    run = work / f"interrupted{int(sign)}"
    process = start(work, "--weights", "digits.pth", "--data", "data", *OPTIONS, "-o", run, "--workers", "1")
    deadline = time.monotonic() + 60
    while not list(run.glob("journals/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(sign)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not out
    assert f"fcvit resume {run}" in err and "Traceback" not in err
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.ci)])
def test_several_processes_evaluate_every_image_once(work, count):
    """Distribute 17 batches over the processes of Paddle's launcher. The metrics equal those of one process."""
    run = work / f"shared{count}"
    launcher = ["paddle.distributed.launch", "--nproc_per_node", count, "--log_dir", work / f"log{count}"]
    words = ["--weights", "digits.pth", "--data", "data", *OPTIONS, "-o", run, "--workers", "1", "--save-logits"]
    process = start(work, *words, launcher=launcher)
    out, err = process.communicate(timeout=180)
    logs = "\n".join(path.read_text() for path in sorted((work / f"log{count}").glob("workerlog.*")))
    assert (run / CONFIGURATION / "metrics.json").exists(), out + err + logs
    journals = [list(frames(path.read_bytes()[HEAD:], np.dtype("V1"))) for path in sorted((run / "journals").iterdir())]
    assert len(journals) == count and all(journals)
    batches = sorted(frame.number for journal in journals for frame in journal)
    assert batches == list(range(17))
    assert (run / CONFIGURATION / "predictions.csv").read_bytes() == (
        work / "uninterrupted" / CONFIGURATION / "predictions.csv"
    ).read_bytes()
    ours, expected = (metrics_without_seconds(folder) for folder in (run, work / "uninterrupted"))
    assert ours.pop("loss") == pytest.approx(expected.pop("loss"), abs=1e-6)
    assert ours.pop("calibration")["error"] == pytest.approx(expected.pop("calibration")["error"], abs=1e-6)
    assert ours == expected
    logits = [np.load(folder / CONFIGURATION / "logits.npy") for folder in (run, work / "uninterrupted")]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)
    assert logs.count("written to") == 1  # only the first process reports


def nuclei(work):
    """Return weights, data and result files of a segmentation."""
    assets = importlib.resources.files("fcvit") / "assets"
    names = ("predictions.csv", "per_class.csv", "confusion.csv", "worst.png")
    return assets / quickstart.SEGMENTER, assets / quickstart.NUCLEI, names


def shapes(work):
    """Return weights, data and result files of a detection."""
    pytest.importorskip("pycocotools")
    data = write_shapes(work / "shapes", "val", [(96, 128), (128, 96)] * 20)
    detector = write_detector(work / "shapes.safetensors", scale=(256, 192), max_detections=50)
    return detector, data, (*DETECTIONS.values(), PREDICTIONS, PER_CLASS, FALSE_POSITIVES, MISSES, BEST)


@pytest.mark.ci
@pytest.mark.parametrize("task", [nuclei, shapes])
def test_a_dense_task_in_a_killed_run_and_in_two_processes_gives_the_same_bytes(work, task):
    pytest.importorskip("cv2")
    weights, data, names = task(work)
    words = ["--weights", weights, "--data", data, "--batch-size", 2]
    words += ["--engine", "paddle", "--device", "cpu", "--workers", 1, "-o"]
    whole, cut, shared = (work / f"{task.__name__}-{run}" for run in ("whole", "cut", "shared"))
    for run in (whole, cut):
        process = start(work, *words, run)
        while run == cut and not any(journal.stat().st_size > 700 for journal in cut.glob("journals/*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        if run == cut:
            process.kill()
        process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL and not list(cut.glob("*/metrics.json"))
    resumed = start(work, "--resume", cut)
    assert "already" in resumed.communicate(timeout=120)[1] and resumed.returncode == 0
    log = work / f"log-{task.__name__}"
    launcher = ["paddle.distributed.launch", "--nproc_per_node", 2, "--log_dir", log]
    start(work, *words, shared, launcher=launcher).communicate(timeout=180)
    assert len(list((shared / "journals").iterdir())) == 2
    (result,) = (path.name for path in whole.iterdir() if (path / "metrics.json").exists())
    for name in names:
        files = [(run / result / name).read_bytes() for run in (whole, cut, shared)]
        assert files[0] == files[1] == files[2], name
