"""Training in separate processes: killed in an epoch or while a file is written, and distributed over two."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import SMALL, SMALL_DETECTION, SMALL_SEGMENTATION, needs_paddle, write_scenes, write_shapes, write_squares
from fcvit.tasks.classification.recipe import ClassificationRecipe
from fcvit.tasks.detection.recipe import DetectionRecipe
from fcvit.tasks.detection.training import DetectionTraining
from fcvit.tasks.segmentation.recipe import SegmentationRecipe
from fcvit.tasks.segmentation.training import SegmentationTraining
from fcvit.training.run import train
from fcvit.training.state import read_state
from fcvit.weights.reading import read_weights

pytestmark = [pytest.mark.slow, needs_paddle]
FIELDS = {**SMALL, "ema_decay": 0.9, "drop_path_rate": 0.3, "drop_rate": 0.1, "operators": "plain"}
OF_DENSE = {"epochs": 3, "ema_decay": 0.9, "drop_path_rate": 0.3, "operators": "plain"}
TIMES = ("images_per_second", "seconds", "data", "forward", "backward", "optimizer")
SCORES = ("miou", "macc", "aacc", "box_ap", "mask_ap")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with images, a recipe and an uninterrupted run. Matplotlib is hidden, because drawing is slow."""
    root = tmp_path_factory.mktemp("work")
    (root / "hidden").mkdir()
    (root / "hidden" / "matplotlib.py").write_text("raise ModuleNotFoundError('hidden by the test', name=__name__)")
    write_squares(root / "images" / "train", {"left": 25, "right": 15})
    write_squares(root / "images" / "val", {"left": 3, "right": 3})
    (root / "recipe.toml").write_text(ClassificationRecipe(**{**FIELDS, "data": "images"}).to_toml())
    finish(start(root, "recipe.toml", "-o", "uninterrupted"))
    return root


def start(root, *words, launcher=(), script=None):
    # Paddle's launcher has no -m. It starts a program or a .py file.
    program = [script] if script else [Path(sys.executable).with_name("fcvit") if launcher else "fcvit", "train"]
    command = list(map(str, [sys.executable, "-m", *launcher, *program, *words]))
    environment = {**os.environ, "PYTHONPATH": str(root / "hidden")}
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    """Wait for a process that must succeed, and return its standard output."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    return out


def numbers(folder):
    """Return everything that training computes: losses, accuracies and the state."""
    progress, tensors = read_state(folder)
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in progress.rows]
    return rows, {n: t.tobytes() for n, t in tensors.items()}


def assert_same_weights(one, other):
    for name in ("last", "last-ema", "best"):
        a, b = (read_weights(folder / f"{name}.safetensors").tensors for folder in (one, other))
        assert all((a[key] == b[key]).all() for key in a), name


def kill_when(process, condition):
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)


def epochs_done(folder):
    try:
        return read_state(folder)[0].epoch
    except Exception:
        return 0


@pytest.mark.ci
def test_a_killed_and_resumed_run_gives_bit_identical_results(work):
    """Kill the run in the second epoch, and again while the checkpoint of the third epoch is written."""
    run = work / "killed"
    first = start(work, "recipe.toml", "-o", run)
    kill_when(first, lambda: epochs_done(run) == 1)
    assert first.returncode == -signal.SIGKILL and epochs_done(run) == 1
    again = start(work, "--resume", run)
    kill_when(again, lambda: epochs_done(run) == 2 and any(run.glob(".fcvit-tmp-*/last.safetensors")))
    finish(start(work, "--resume", run))
    assert numbers(run) == numbers(work / "uninterrupted")
    assert_same_weights(run, work / "uninterrupted")
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert [json.loads(line)["epoch"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2, 3]


@pytest.mark.ci
def test_sigterm_interrupts_cleanly(work):
    run = work / "ended"
    process = start(work, "recipe.toml", "-o", run, "--epochs", "50")
    deadline = time.monotonic() + 60
    while not epochs_done(run) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and f"fcvit resume {run}" in err.replace("\n", " ")
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.ci
def test_the_launcher_passes_sigterm_on_to_processes_and_their_workers(work, tmp_path):
    """The launcher sends SIGTERM three times to each process group. The workers ignore it, or images would be lost."""
    run = work / "launched"
    launcher = ["paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", tmp_path / "log"]
    words = ["recipe.toml", "--device", "cpu", "--workers", "1", "--epochs", "500", "-o", run]
    process = start(work, *words, launcher=launcher)
    deadline = time.monotonic() + 60
    while not epochs_done(run) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    process.communicate(timeout=60)
    logs = "".join(path.read_text() for path in (tmp_path / "log").glob("workerlog.*"))
    assert process.returncode == signal.SIGTERM and len(re.findall(r"^fcvit: .*interrupted", logs, re.M)) == 2, logs
    assert f"fcvit resume {run}" in logs and "left out" not in logs and "error" not in logs.lower()
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.ci
def test_two_processes_match_one_process_that_accumulates(work, tmp_path):
    """The losses, running statistics and weights are equal except for rounding."""
    fields = {**FIELDS, "data": str(work / "images"), "clip_norm": 0.5, "accumulate": 2}
    train(ClassificationRecipe(**fields), folder=tmp_path / "alone", device="cpu")
    words = ["recipe.toml", "--device", "cpu", "--clip_norm", "0.5"]
    launcher = ["paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", tmp_path / "log"]
    out = finish(start(work, *words, "-o", tmp_path / "shared", launcher=launcher))
    assert out.count("weights: ") == 1, "only the first process reports the result"
    for one, other in zip(*(read_state(tmp_path / name)[0].rows for name in ("alone", "shared")), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert (one["top1"], one["ema_top1"]) == (other["top1"], other["ema_top1"])
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-5)
    assert_close_states(tmp_path / "alone", tmp_path / "shared")


def assert_close_states(*folders):
    (_, one), (_, other) = map(read_state, folders)
    assert one.keys() == other.keys()
    for name in one:
        assert np.abs(one[name].astype(np.float64) - other[name]).max() <= 1e-6 * max(1, np.abs(one[name]).max()), name


# Records the images that a process trains in each epoch and its weights afterwards. Without --resume it kills itself.
RECORDING = """
import hashlib, json, os, signal, sys
from fcvit.cli import main
from {module} import {training}
from fcvit.training.loop import Loop

inputs, run_epoch, positions = {training}.inputs, Loop.epoch, []

def recorded(task, batch, epoch):
    positions.extend(map(int, batch.indices))
    if epoch == 1 and len(positions) > 2 and "--resume" not in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    return inputs(task, batch, epoch)

def epoch(loop, number, log):
    positions.clear()
    run_epoch(loop, number, log)
    state = b"".join(tensor.numpy().tobytes() for tensor in loop.trainer.model.state_dict().values())
    with open(f"{{number}}-{{os.environ['PADDLE_TRAINER_ID']}}.json", "w") as file:
        json.dump([positions, hashlib.sha256(state).hexdigest()], file)

{training}.inputs, Loop.epoch = recorded, epoch
sys.exit(main(["train", *sys.argv[1:]]))
"""


def scenes(folder):
    """Write images for a segmentation, and return its training and a recipe."""
    write_scenes(write_scenes(folder, "train", 10), "val", 3)
    return SegmentationTraining, SegmentationRecipe(**SMALL_SEGMENTATION | OF_DENSE, data=str(folder))


def shapes(folder):
    """Write images for a detection, and return its training and a recipe."""
    pytest.importorskip("pycocotools")
    write_shapes(write_shapes(folder, "train", [(48, 64)] * 10), "val", [(48, 64), (64, 48), (40, 40)])
    return DetectionTraining, DetectionRecipe(**SMALL_DETECTION | OF_DENSE, data=str(folder))


@pytest.mark.ci
@pytest.mark.parametrize("task", [scenes, shapes])
def test_a_dense_task_is_resumed_with_the_same_bytes_and_in_two_processes(work, task):
    """Two processes that are killed in the second epoch and resumed match one process with two micro-batches."""
    pytest.importorskip("cv2")
    name = task.__name__
    training, recipe = task(work / name)
    (work / f"{name}.toml").write_text(recipe.to_toml())
    words = [f"{name}.toml", "--device", "cpu", "-o"]
    whole, cut, shared = (work / f"{name}-{run}" for run in ("whole", "cut", "shared"))
    finish(start(work, *words, whole, "--accumulate", 2))
    kill_when(process := start(work, *words, cut, "--accumulate", 2), lambda: epochs_done(cut) == 1)
    assert process.returncode == -signal.SIGKILL and epochs_done(cut) == 1
    finish(start(work, "--resume", cut))
    assert numbers(cut) == numbers(whole)
    assert_same_weights(cut, whole)

    (work / "recording.py").write_text(RECORDING.format(module=training.__module__, training=training.__name__))
    launcher = ["paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", work / f"{name}-log"]
    killed = start(work, *words, shared, launcher=launcher, script="recording.py")
    killed.communicate(timeout=120)
    assert killed.returncode != 0 and epochs_done(shared) == 1
    finish(start(work, "--resume", shared, launcher=launcher, script="recording.py"))
    for epoch in range(3):
        (first, one), (second, other) = (json.loads((work / f"{epoch}-{rank}.json").read_text()) for rank in (0, 1))
        assert sorted(first + second) == list(range(8)) and len(first) == 4, "the last two of 10 images are dropped"
        assert one == other, "both processes have the same weights and statistics"
    for one, other in zip(*(read_state(folder)[0].rows for folder in (whole, shared)), strict=True):
        assert one.keys() == other.keys() and {"miou", "mask_ap"} & {*one}
        for key, value in one.items():
            if key.startswith("loss"):
                assert np.isfinite(value) and value == pytest.approx(other[key], rel=1e-5)
            elif key.removeprefix("ema_") in SCORES:
                assert value == pytest.approx(other[key], abs=0.1)
    assert_close_states(whole, shared)


@pytest.mark.ci
def test_processes_with_different_images_are_rejected(work, tmp_path):
    """Each process reads a separate folder, and one folder has one image fewer."""
    script = tmp_path / "own.py"
    script.write_text(
        "import os, sys\n"
        "from fcvit.cli import main\n"
        "data = 'images' + os.environ['PADDLE_TRAINER_ID']\n"
        "sys.exit(main(['train', 'recipe.toml', '--device', 'cpu', '--data', data, '-o', sys.argv[1]]))\n"
    )
    for rank, left in enumerate((25, 24)):
        folder = work / f"images{rank}"
        write_squares(folder / "train", {"left": left, "right": 15})
        write_squares(folder / "val", {"left": 3, "right": 3})
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2"]
    command += ["--log_dir", str(tmp_path / "log"), str(script), str(tmp_path / "run")]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=120, env=os.environ)
    logs = "".join(path.read_text() for path in (tmp_path / "log").glob("workerlog.*"))
    assert done.returncode != 0 and re.search("process 1\\b.*images.*process 0", logs)
