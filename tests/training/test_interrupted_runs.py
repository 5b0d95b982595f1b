"""Runs that are killed or interrupted at seeded moments, and continued by the same or another number of processes."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import SMALL, needs_paddle, write_squares
from fcvit.interrupts import SIGNALS
from fcvit.tasks.classification.recipe import ClassificationRecipe
from fcvit.training.state import PREVIOUS, STATE, read_state
from fcvit.weights.reading import read_weights

pytestmark = [pytest.mark.slow, needs_paddle]
TIMES = ("images_per_second", "seconds", "data", "forward", "backward", "optimizer")
WEIGHTS = ("last.safetensors", "last-ema.safetensors", "best.safetensors")
EPOCHS, STEPS = 3, 5  # steps per epoch


class Trainings:
    """Trainings in forked processes (see `interrupted_runs.py`), all with the same recipe."""

    def __init__(self, root):
        self.root = root
        write_squares(root / "images" / "train", {"left": 25, "right": 17})
        write_squares(root / "images" / "val", {"left": 3, "right": 3})
        self.fields = {**SMALL, "data": str(root / "images"), "epochs": EPOCHS, "operators": "plain", "ema_decay": 0.9}
        self.fields |= {"drop_path_rate": 0.3, "drop_rate": 0.1}
        command = [sys.executable, Path(__file__).with_name("interrupted_runs.py")]
        # pytest turns warnings into errors only in its own process.
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONWARNINGS": ""}
        )

    def command(self, folder, **fields):
        """Return the command line that continues the run in a folder, or starts it."""
        if (folder / "run.json").exists():
            return ["resume", str(folder)]
        recipe = self.root / f"{folder.name}.toml"
        recipe.write_text(ClassificationRecipe(**self.fields | fields).to_toml())
        return ["train", str(recipe), "--device", "cpu", "-o", str(folder)]

    def run(self, words, processes=1, moment=0, number=signal.SIGTERM, rank=0, step=0, limit=0):
        """Run a command line, and return its exit codes."""
        job = {"words": words, "processes": processes, "moment": moment, "signal": int(number), "rank": rank}
        job |= {"step": step, "limit": limit}
        job |= {"log": str(self.root / "log"), "steps": str(self.root / "steps"), "every": processes}
        print(json.dumps(job), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def output(self, rank=0):
        return (self.root / f"log.{rank}").read_text()

    def uninterrupted(self, name, processes=1, **fields):
        folder = self.root / name
        assert self.run(self.command(folder, **fields), processes) == [0] * processes, self.output()
        return content(folder)

    def interrupted(self, name, attempts, numbers, processes=1, **fields):
        """Interrupt runs at seeded moments and continue them, and return the folders of the finished runs.

        Each state must be complete. At most two intervals may be lost: a state that is being written, and the steps
        after it.
        """
        generator, finished, number_of_run, done = np.random.default_rng(0), [], 0, 0
        while done < attempts or (self.root / f"{name}{number_of_run}").exists():
            folder = self.root / f"{name}{number_of_run}"
            moment = int(generator.integers(1, 60)) if done < attempts else 0
            number, rank = numbers[done % len(numbers)], int(generator.integers(processes))
            (self.root / "steps").unlink(missing_ok=True)
            codes = self.run(self.command(folder, **fields), processes, moment, number, rank)
            steps = int((self.root / "steps").read_text() or 0) if (self.root / "steps").exists() else 0
            if codes == [0] * processes:
                finished.append(folder)
                number_of_run += 1
                continue
            done += 1
            if number == signal.SIGKILL:
                assert codes[rank] == -signal.SIGKILL, self.output(rank)
                assert steps - saved_step(folder) <= 2 * processes, (done, moment)
            else:
                assert codes[rank] == 130, (done, moment, self.output(rank))
                assert saved_step(folder) >= steps
                if steps and processes == 1:
                    assert f"fcvit resume {folder}" in self.output()
                    status = json.loads((folder / "run.json").read_text())["status"]
                    assert status in ("interrupted", "finished"), "the last signal may arrive after the last file"
        return finished


def saved_step(folder):
    """Check all files of an interrupted run, and return the number of steps in its state."""
    for path in folder.iterdir():
        if path.name in (STATE, PREVIOUS):
            read_state(folder, path.name)
        elif path.suffix == ".safetensors":
            read_weights(path)
        elif path.suffix in (".json", ".jsonl") and path.stat().st_size:
            assert all(map(json.loads, [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()))
        else:
            assert path.name.startswith((".fcvit-tmp-", ".lock")) or path.stat().st_size or path.name == "curves.png"
    assert (folder / STATE).exists() or not (folder / PREVIOUS).exists()
    return read_state(folder)[0].step if (folder / STATE).exists() else 0


def content(folder):
    """Return the bytes of a finished run: its weights, tensors of the state, and the log without times."""
    progress, tensors = read_state(folder)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rows = [json.dumps({key: value for key, value in row.items() if key not in TIMES}) for row in log]
    assert len(rows) == progress.epoch == EPOCHS and not [*folder.glob(".*")]
    return rows, {name: t.tobytes() for name, t in tensors.items()}, [(folder / n).read_bytes() for n in WEIGHTS]


def assert_close(one, other):
    """Compare runs that sum gradients in a different order. BatchNorm in small micro-batches amplifies the rounding."""
    for row, expected in zip(one[0], other[0], strict=True):
        assert json.loads(row) == pytest.approx(json.loads(expected), rel=1e-5)
    for name, values in one[1].items():
        if not name.startswith("unreadable"):
            a, b = (
                np.frombuffer(v, np.float64 if name == "statistics_decay" else np.float32)
                for v in (values, other[1][name])
            )
            assert np.abs(a - b).max() <= 2e-5 * max(1, np.abs(b).max()), name


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    trainings = Trainings(tmp_path_factory.mktemp("runs"))
    yield trainings
    trainings.server.communicate(timeout=30)
    assert trainings.server.returncode == 0


@pytest.fixture(scope="module")
def alone(trainings):
    return trainings.uninterrupted("alone")


@pytest.mark.ci
def test_a_run_that_is_killed_at_20_moments_gives_the_same_bytes(trainings, alone):
    folders = trainings.interrupted("killed", 20, [signal.SIGKILL])
    assert folders and all(content(folder) == alone for folder in folders)


@pytest.mark.ci
def test_a_run_that_is_interrupted_at_20_moments_gives_the_same_bytes(trainings, alone):
    folders = trainings.interrupted("stopped", 20, [signal.SIGTERM, signal.SIGTERM, *SIGNALS])
    assert folders and all(content(folder) == alone for folder in folders)


@pytest.mark.ci
def test_a_full_disk_keeps_the_last_state(trainings, alone):
    """The file system accepts only the beginning of the state."""
    folder = trainings.root / "full"
    assert trainings.run(trainings.command(folder), step=7, limit=20_000) == [3]
    last = trainings.output().splitlines()[-1]
    assert re.search(r"state.safetensors: cannot be written: .*File too large.*", last), last
    assert last.endswith(f"resume after step 1 of 5 of epoch 2 with: fcvit resume {folder}"), last
    assert saved_step(folder) == 6 and not [*folder.glob(".fcvit-tmp-*")]
    assert trainings.run(trainings.command(folder)) == [0]
    assert content(folder) == alone


@pytest.fixture(scope="module")
def together(trainings):
    return trainings.uninterrupted("together", 2)


@pytest.mark.ci
def test_two_processes_that_are_killed_give_the_same_bytes(trainings, together):
    folders = trainings.interrupted("killed-together", 4, [signal.SIGKILL], 2)
    assert folders and all(content(folder) == together for folder in folders)


@pytest.mark.ci
def test_two_processes_stop_together_when_one_gets_a_signal(trainings, together):
    folders = trainings.interrupted("stopped-together", 4, [signal.SIGTERM], 2)
    assert folders and all(content(folder) == together for folder in folders)


@pytest.mark.ci
def test_a_run_of_two_processes_is_continued_by_one_and_by_two_again(trainings, together):
    """Each process continues within an epoch with the statistics of the micro-batches that it takes over."""
    folder = trainings.root / "shared"
    assert trainings.run(trainings.command(folder), 2, step=3) == [130, 130]
    assert trainings.run(trainings.command(folder), 1, step=6) == [130]
    assert "2 processes x accumulate 1 -> 1 process x accumulate 2" in trainings.output()
    assert 0 < read_state(folder)[0].epoch_step < STEPS
    assert trainings.run(trainings.command(folder), 2) == [0, 0]
    assert_close(content(folder), together)


@pytest.mark.ci
def test_a_run_of_one_process_is_continued_by_four(trainings):
    # With a larger eps, AdamW does not amplify the rounding of gradients that are almost zero.
    fields = {"accumulate": 4, "batch_size": 16, "eps": 1e-3}
    alone = trainings.uninterrupted("four-micro-batches", **fields)
    folder = trainings.root / "by-four"
    assert trainings.run(trainings.command(folder, **fields), step=1) == [130]
    codes = trainings.run(trainings.command(folder), 3)
    refused = trainings.output(codes.index(4))
    assert "3 processes cannot share 4 micro-batches per step equally" in refused and 0 not in codes
    assert "one of these numbers of processes: 1, 2, 4" in refused
    assert trainings.run(trainings.command(folder), 4) == [0] * 4, trainings.output()
    assert "1 process x accumulate 4 -> 4 processes x accumulate 1" in trainings.output()
    assert_close(content(folder), alone)
