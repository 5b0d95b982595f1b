"""Train, resume, evaluate and predict with a task that the package does not know."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

import fcvit
from conftest import SMALL, interrupt_in_step, needs_paddle
from fcvit.cli import main
from fcvit.errors import UsageError
from fcvit.evaluation import runner
from fcvit.evaluation.settings import Settings
from fcvit.models import build, spec
from fcvit.tasks import base
from fcvit.training.recipe import build_recipe
from fcvit.training.run import resume, train
from fcvit.weights.reading import read_weights

pytestmark = needs_paddle


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Register the task in the three tables of tasks, heads and networks, and write images of different sizes."""
    monkeypatch.setattr("fcvit.training.log.training_curves", lambda *_: b"")
    monkeypatch.syspath_prepend(str(__file__).rpartition("/")[0])
    monkeypatch.setitem(base.TASKS, "brightness", "brightness")
    head = dataclasses.replace(spec.HEADS["classifier"], task="brightness")
    monkeypatch.setitem(spec.HEADS, "brightness", head)
    monkeypatch.setitem(build.NETWORKS, "brightness", build.NETWORKS["classifier"])
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 7)):
        (tmp_path / split).mkdir()
        for number in range(count):
            percent = 10 + 80 * number // count
            size = (33 + number, 40, 3)
            pixels = np.clip(generator.normal(2.55 * percent, 20, size), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"{percent}-{number}.png")
    return tmp_path


@pytest.fixture
def recipe(images):
    fields = {**SMALL, "task": "brightness", "data": str(images / "train"), "val": str(images / "val"), "epochs": 4}
    return build_recipe(fields, {}, "test")


@pytest.mark.slow
def test_a_second_task_trains_resumes_evaluates_and_predicts(images, recipe, monkeypatch, capsys):
    from fcvit.training.step import Trainer

    run, steps = Trainer.run, []
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", lambda *given: steps.append(run(*given)) or steps[-1])
        done = train(recipe, folder=images / "run", device="cpu")
    means = np.mean([[float(step["loss"]) for step in steps]], axis=0).reshape(len(done.rows), -1).mean(1)
    assert [row["loss"] for row in done.rows] == pytest.approx(means)
    assert done.rows[-1]["loss"] < done.rows[0]["loss"] and done.best["best_accuracy"] > 0.5
    row = done.rows[0]
    assert row["loss"] == pytest.approx(row["loss_square"] + row["loss_absolute"], rel=1e-5)
    assert any("brightness" in (images / "run" / name).read_text() for name in ("run.json", "recipe.toml"))

    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, folder=images / "cut", device="cpu")
    resume(images / "cut")
    last = [read_weights(images / name / "last.safetensors") for name in ("run", "cut")]
    assert all((last[0].tensors[name] == last[1].tensors[name]).all() for name in last[0].tensors)
    assert last[0].spec.task == "brightness"

    settings = Settings(engines="paddle", batch_size=3, device="cpu")
    with pytest.raises(UsageError, match=r"brightness: subset"):
        runner.evaluate([done.weights], images / "val", settings, {"subset": 3}, None, False)
    result = runner.evaluate([done.weights], images / "val", settings, {}, images / "eval", True)
    names = sorted(path.name for path in (images / "val").iterdir())
    assert result.report.lengths == [int(name.split("-")[0]) for name in names]
    assert result.results[0]["accuracy"] == pytest.approx(done.best["accuracy"], abs=1e-6)
    written = json.loads((images / "eval" / "brightness.json").read_text())
    (images / "eval" / "brightness.json").unlink()
    assert runner.resume(images / "eval").results == result.results
    assert json.loads((images / "eval" / "brightness.json").read_text()) == written

    predicted = fcvit.load(done.weights, device="cpu", engine="paddle").predict(sorted((images / "val").iterdir()))
    errors = [abs(value - int(name.split("-")[0]) / 100) for value, name in zip(predicted, names, strict=True)]
    assert 1 - np.mean(errors) == pytest.approx(done.best["accuracy"], abs=1e-5)
    assert (
        main(["predict", str(images / "val"), "--weights", str(done.weights), "--engine", "paddle", "-q", "--csv"]) == 0
    )
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == "path,place,brightness"
    assert [float(line.split(",")[2]) for line in lines] == pytest.approx(predicted, abs=1e-6)


def test_loops_do_not_mention_tasks_by_name():
    """Training, evaluation, the loader and the engines must not contain the name of a task."""
    import re
    from pathlib import Path

    source = Path(base.__file__).parents[1]
    files = [*(source / "training").glob("*.py"), *(source / "evaluation").glob("*.py"), source / "data" / "loader.py"]
    files += [source / "inference" / name for name in ("engines.py", "runtimes.py", "cache.py")]
    named = re.compile(
        r"tasks\.(classification|segmentation|detection)|[\"'](classification|segmentation|detection)[\"']"
    )
    assert not [path.name for path in files if named.search(path.read_text("utf-8"))]
