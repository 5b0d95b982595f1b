"""Training runs: their files, resuming and extending them, and errors."""

import csv
import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from conftest import SMALL, classifier_loss, interrupt_in_step, needs_paddle, write_squares
from fcvit.commands.evaluate import evaluate
from fcvit.commands.finetune import finetune, finetune_recipe
from fcvit.commands.preview import draw_preview
from fcvit.data.classes import ClassName
from fcvit.errors import DoesNotFit, MissingExtra, TrainingStopped, UnreadableFile, UsageError
from fcvit.inference import engines
from fcvit.interrupts import SIGNALS
from fcvit.tasks.classification.recipe import ClassificationRecipe
from fcvit.training.run import extend, resume, train
from fcvit.training.schedule import learning_rate
from fcvit.training.state import read_state
from fcvit.weights.reading import read_weights

pytestmark = needs_paddle


def state_of(folder):
    """Return the log rows and tensors in the state of a run."""
    progress, tensors = read_state(folder)
    rows = [{key: row[key] for key in ("epoch", "step", "lr", "loss", "top1") if key in row} for row in progress.rows]
    return rows, {name: array.tobytes() for name, array in tensors.items()}


def trained_in(root, **fields):
    """Train the small network on images of squares below `root`, and return the folder of the run."""
    write_squares(root / "images" / "train", {"left": 11, "right": 9})
    write_squares(root / "images" / "val", {"left": 3, "right": 3})
    recipe = ClassificationRecipe(**{**SMALL, "data": str(root / "images"), **fields})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fcvit.training.log.training_curves", lambda *_: b"")
        return train(recipe, folder=root / "run", device="cpu").folder


# Runs that several tests read and no test changes.


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A complete run of `small()`."""
    return trained_in(tmp_path_factory.mktemp("uninterrupted"))


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    return trained_in(tmp_path_factory.mktemp("one"), epochs=1)


REGULARIZED = {"ema_decay": 0.9, "drop_rate": 0.1, "drop_path_rate": 0.3, "accumulate": 2}


@pytest.fixture(scope="module")
def regularized(tmp_path_factory):
    """A run with drop path, dropout, accumulation and EMA weights."""
    return trained_in(tmp_path_factory.mktemp("regularized"), **REGULARIZED)


@pytest.fixture(scope="module")
def extended(uninterrupted, tmp_path_factory):
    """The result of extending `uninterrupted` by two epochs."""
    return extend(uninterrupted, 5, folder=tmp_path_factory.mktemp("extended") / "run")


@pytest.fixture
def finished(one_epoch, squares, tmp_path):
    """A copy of the run of one epoch that a test may change."""
    run = shutil.copytree(one_epoch, tmp_path / "run")
    for name in ("run.json", "recipe.toml"):
        text = (run / name).read_text()
        (run / name).write_text(text.replace(str(one_epoch.parent / "images"), str(squares)))
    return run


@pytest.fixture
def trained(uninterrupted, tmp_path):
    """Trained weights for the two classes `left` and `right`."""
    (tmp_path / "first").mkdir()
    return shutil.copy(uninterrupted / "last.safetensors", tmp_path / "first" / "last.safetensors")


@pytest.mark.slow
def test_a_run_writes_all_its_files_to_its_folder(small, curves, tmp_path, squares, notes):
    recipe = small(ema_decay=0.5, save_every=2)
    done = train(recipe, folder=tmp_path / "run", device="cpu")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    weights = {"last.safetensors", "last-ema.safetensors", "best.safetensors", "epoch-0002.safetensors"}
    assert names == weights | {
        *("state.safetensors", "state-previous.safetensors", "log.jsonl", "log.csv", "curves.png", "recipe.toml"),
        "run.json",
    }
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines == list(done.rows) and [row["epoch"] for row in lines] == [1, 2, 3]
    with (tmp_path / "run" / "log.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [row["loss"] for row in lines]
    with Image.open(tmp_path / "run" / "curves.png") as picture:
        assert picture.width > 500
    phases = ("data", "forward", "backward", "optimizer")
    assert all(0 < sum(row[phase] for phase in phases) <= row["seconds"] for row in lines)
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["status"] == "finished" and stored["recipe"]["epochs"] == 3
    # The files contain the validated weights with their classes and preprocessing.
    for name, key in (("last", "top1"), ("last-ema", "ema_top1")):
        result = evaluate(tmp_path / "run" / f"{name}.safetensors", squares / "val", device="cpu").results[0]
        assert result.top1 == lines[-1][key]
    kept = read_weights(tmp_path / "run" / "last.safetensors")
    assert [c.id for c in kept.classes] == ["left", "right"] and kept.spec.variant == recipe.network()
    assert int(kept.tensors["patch_embed.norm.num_batches_tracked"]) == 6 == lines[-1]["step"]
    assert any("epoch 3 of 3: loss" in note for note in notes)
    assert done.weights.name == "best.safetensors" and done.best["best_top1"] == max(
        max(row["top1"], row["ema_top1"]) for row in lines
    )


@pytest.mark.slow
def test_training_learns_the_task(small, tmp_path):
    """The classes differ in which corner is bright. An untrained network would have 50% accuracy."""
    done = train(
        small(epochs=12, flip=0.0, rand_augment=0, crop="centre", mixup=0.0, cutmix=0.0), folder=tmp_path / "r"
    )
    assert done.best["top1"] == 100 and done.rows[-1]["loss"] < done.rows[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_an_interrupted_and_resumed_run_gives_bit_identical_results(
    small, regularized, tmp_path, monkeypatch, step, notes
):
    """Interrupt the run in the first epoch, in the last step of an epoch, in the second epoch, and in the last step.

    Each epoch has two steps of two micro-batches.
    """
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train(small(**REGULARIZED), folder=tmp_path / "cut", device="cpu")
    position = f"step {step % 2 + 1} of 2 of epoch {step // 2 + 1}"
    assert notes[-1] == f"resume after {position} with: fcvit resume {tmp_path / 'cut'}"
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["status"] == "interrupted"
    resume(tmp_path / "cut")
    assert state_of(tmp_path / "cut") == state_of(regularized)
    for name in ("last", "last-ema", "best"):
        expected, cut = (read_weights(run / f"{name}.safetensors").tensors for run in (regularized, tmp_path / "cut"))
        assert all((expected[key] == cut[key]).all() for key in expected), name


@pytest.mark.slow
def test_the_number_of_workers_does_not_change_the_results(small, uninterrupted, tmp_path):
    assert state_of(train(small(), folder=tmp_path / "run", device="cpu", workers=2).folder) == state_of(uninterrupted)


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(finished):
    before = (finished / "state.safetensors").read_bytes()
    again = resume(finished)
    assert (finished / "state.safetensors").read_bytes() == before and len(again.rows) == 1


@pytest.mark.slow
def test_a_resumed_run_keeps_its_operators(small, tmp_path, monkeypatch, notes):
    """A run that started without a compiler keeps Paddle's operators when a compiler is available later."""
    from fcvit.errors import MissingExtra
    from fcvit.native import build

    def unavailable():
        raise MissingExtra("the native library is not available: no C++ compiler")

    with monkeypatch.context() as patch:
        patch.setattr(build, "library", unavailable)
        train(small(epochs=1), folder=tmp_path / "run", device="cpu")
        with pytest.raises(MissingExtra, match=r"no C\+\+ compiler"):
            train(small(epochs=1, operators="native"), folder=tmp_path / "other", device="cpu")
    assert any("slower" in note and "no C++ compiler" in note for note in notes)
    resume(tmp_path / "run")
    longer = extend(tmp_path / "run", 2, folder=tmp_path / "longer")
    assert json.loads((longer.folder / "run.json").read_text())["identity"]["operators"] == "plain"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operators", "reason", "engine"),
    [("native", None, "native"), ("native", "2 heads", "paddle"), ("plain", None, "paddle")],
)
def test_the_engine_of_the_validation(operators, reason, engine, small, tmp_path, monkeypatch):
    """The engine is not checked, because the weights of an epoch are used once."""
    from fcvit.evaluation import settings

    created = []

    def create_engine(name, *arguments):
        created.append((name, arguments[-1]))
        return engines.create_engine(name, *arguments)

    monkeypatch.setattr(settings, "create_engine", create_engine)
    monkeypatch.setattr("fcvit.training.loop.unsupported", lambda spec: reason)
    try:
        run = train(small(epochs=1, operators=operators), folder=tmp_path / "run", device="cpu")
    except MissingExtra as error:
        pytest.skip(str(error))
    assert set(created) == {(engine, False)} and 0 <= run.rows[0]["top1"] <= 100


@pytest.mark.slow
def test_extending_a_run_creates_a_new_run(small, uninterrupted, extended):
    assert [row["epoch"] for row in extended.rows] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in extended.rows[:3]] == [row["loss"] for row in read_state(uninterrupted)[0].rows]
    assert extended.rows[3]["lr"] == learning_rate(small(epochs=5), 3.5)
    assert json.loads((extended.folder / "run.json").read_text())["extends"] == str(uninterrupted)
    with pytest.raises(UsageError, match=r"--epochs 3: .*not more than the 3 epochs"):
        extend(uninterrupted, 3)


@pytest.mark.slow
def test_an_extended_run_keeps_the_best_weights_of_the_first_run(small, tmp_path, squares):
    """This also holds if the score does not improve, and if `patience` ended the first run."""
    recipe = small(patience=1, epochs=9, lr=1e-9, min_lr=0.0, warmup_lr=0.0, ema_decay=0.5)
    first = train(recipe, folder=tmp_path / "run", device="cpu")
    assert first.stopped_early and first.best["epoch"] == len(first.rows) - 1
    longer = extend(tmp_path / "run", 12, folder=tmp_path / "longer")
    assert len(longer.rows) > len(first.rows), "patience counts from the start of the extension"
    if longer.best == first.best:
        one, other = (read_weights(done.weights).tensors["head.bias"].tolist() for done in (first, longer))
        assert one == other
    assert read_weights(longer.folder / "last-ema.safetensors")
    (squares / "train" / "left" / "00.png").unlink()
    with pytest.raises(DoesNotFit, match="training images changed"):
        extend(tmp_path / "run", 12, folder=tmp_path / "other")


@pytest.mark.slow
def test_an_extended_run_without_a_copied_state_cannot_be_resumed(one_epoch, tmp_path, monkeypatch):
    from fcvit.training import files

    with monkeypatch.context() as patch:
        patch.setattr(files, "replace_weights", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            extend(one_epoch, 2, folder=tmp_path / "cut")
    with pytest.raises(UnreadableFile, match="extend that run again"):
        resume(tmp_path / "cut")


@pytest.mark.slow
def test_an_extended_run_can_be_interrupted_and_resumed(uninterrupted, extended, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            extend(uninterrupted, 5, folder=tmp_path / "cut")
    resume(tmp_path / "cut")
    assert state_of(tmp_path / "cut") == state_of(extended.folder)


def evaluation_with(results):
    """Return a fake evaluation with the given results."""
    return type("Evaluation", (), {"report": type("Report", (), {"results": results}), "unreadable": ()})


@pytest.mark.slow
def test_patience_stops_training_early(small, tmp_path, monkeypatch):
    """No epoch is better than the first. Training stops after two more epochs and keeps the best weights."""
    from fcvit.training import loop as module

    results = [
        dataclasses.make_dataclass("R", ["loss", "top1", "k", "classes"])(1.0, top1, 2, 2) for top1 in (90, 50, 90)
    ]
    remaining = iter([[result] for result in results])
    monkeypatch.setattr(module, "evaluate_split", lambda *_: evaluation_with(next(remaining)))
    done = train(small(epochs=9, patience=2), folder=tmp_path / "run", device="cpu")
    assert done.stopped_early and len(done.rows) == 3 and done.best["epoch"] == 1
    best, last = (read_weights(tmp_path / "run" / f"{name}.safetensors").tensors for name in ("best", "last"))
    assert (best["head.bias"] != last["head.bias"]).any()


@pytest.mark.parametrize(
    ("raw", "ema", "kept"), [(50, 90, "last-ema"), pytest.param(90, 50, "last", marks=pytest.mark.slow)]
)
def test_the_best_weights_are_the_better_of_raw_and_ema_weights(small, tmp_path, monkeypatch, raw, ema, kept):
    from fcvit.training import loop as module

    result = dataclasses.make_dataclass("R", ["loss", "top1", "k", "classes"])
    results = [result(1.0, raw, 2, 2), result(1.0, ema, 2, 2)]
    given = []
    monkeypatch.setattr(module, "evaluate_split", lambda weights, *_: given.extend(weights) or evaluation_with(results))
    done = train(small(epochs=1, ema_decay=0.99), folder=tmp_path / "run", device="cpu")
    assert (done.best["best_top1"], done.best["best_weights"]) == (90, "ema" if kept == "last-ema" else "raw")
    names = ("best", "last", "last-ema")
    best, last, last_ema = (
        read_weights(tmp_path / "run" / f"{name}.safetensors").tensors["head.bias"] for name in names
    )
    assert (last != last_ema).any() and (best == (last_ema if kept == "last-ema" else last)).all()
    evaluated = [weights.tensors["head.bias"] for weights in given]
    assert len(evaluated) == 2 and (evaluated[0] == last).all() and (evaluated[1] == last_ema).all()


@pytest.mark.slow
def test_a_nan_loss_stops_training(small, uninterrupted, tmp_path, monkeypatch):
    from fcvit.tasks.classification import training as module

    loss = module.soft_cross_entropy
    monkeypatch.setattr(
        module, "soft_cross_entropy", lambda *given: loss(*given) * (float("nan") if next(calls) == 3 else 1)
    )
    calls = iter(range(100))
    with pytest.raises(TrainingStopped, match=r"loss is nan at step 4.* lr .*clip_norm.*epoch 1 .*/run$"):
        train(small(), folder=tmp_path / "run", device="cpu")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert TrainingStopped.exit_code == 8
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert state_of(tmp_path / "run") == state_of(uninterrupted)


@pytest.mark.slow
def test_diverging_weights_stop_training(small, tmp_path):
    """The weights really diverge, because the learning rate is much too high."""
    with pytest.raises(TrainingStopped, match=r"loss is (nan|inf) at step|finite"):
        train(small(lr=900.0, epochs=60, warmup_epochs=0), folder=tmp_path / "run", device="cpu")


@pytest.mark.parametrize("target", [pytest.param("last.safetensors", marks=pytest.mark.slow), "state.safetensors"])
@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(small, uninterrupted, tmp_path, monkeypatch, target):
    """If the disk is full when the second epoch is saved, the first epoch is kept and the run can be resumed."""
    from fcvit.weights import safetensors_file

    write = safetensors_file.write
    written = []

    def full(path, tensors, metadata):
        if path.name == target:
            written.append(path)
            if len(written) == 2:
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
        write(path, tensors, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_file, "write", full)
        with pytest.raises(UnreadableFile, match=rf"{target}: .*No space left .*epoch 1 "):
            train(small(), folder=tmp_path / "run", device="cpu")
    assert read_state(tmp_path / "run")[0].epoch == 1 and read_weights(tmp_path / "run" / "last.safetensors")
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    resume(tmp_path / "run")
    assert state_of(tmp_path / "run") == state_of(uninterrupted)


@pytest.mark.slow
def test_deleted_images_stop_training(small, tmp_path, squares, monkeypatch):
    from fcvit.training.step import Trainer

    run = Trainer.run

    def delete_images(self, *given):
        if self.step == 2:
            shutil.rmtree(squares / "train")
        return run(self, *given)

    monkeypatch.setattr(Trainer, "run", delete_images)
    with pytest.raises(TrainingStopped, match=r"8 of 8 images .*No such file.*/train.*epoch 1 .*fcvit resume"):
        train(small(), folder=tmp_path / "run", device="cpu")
    with pytest.raises(UnreadableFile, match=r"\bval\b.*training split"):
        resume(tmp_path / "run")


@pytest.mark.slow
def test_unreadable_training_images_are_skipped_and_reported_once(small, tmp_path, squares, notes):
    (squares / "train" / "left" / "00.png").write_bytes(b"\x89PNG")
    done = train(small(epochs=6), folder=tmp_path / "run", device="cpu")
    (reason,) = done.unreadable
    assert reason.startswith("left/00.png: ") and sum(reason in note for note in notes) == 1


def test_changed_images_are_reported_when_a_run_is_resumed(finished, squares):
    for split in ("val", "train"):
        (squares / split / "left" / "00.png").unlink()
        with pytest.raises(DoesNotFit, match="validation images" if split == "val" else "training images, val"):
            resume(finished)


def test_a_run_with_a_missing_state_cannot_be_resumed(finished):
    (finished / "state.safetensors").unlink()
    with pytest.raises(UnreadableFile, match=r"state\.safetensors .*start a new run from .*last\.safetensors"):
        resume(finished)


@pytest.mark.slow
def test_a_resumed_run_does_not_need_its_initial_weights(trained, tmp_path, squares):
    words = {"epochs": "2", "new_head": "true"}
    done = finetune(trained, squares, **words, folder=tmp_path / "run", device="cpu")
    counted = int(read_weights(done.folder / "last.safetensors").tensors["patch_embed.norm.num_batches_tracked"])
    assert counted == 6 + done.rows[-1]["step"], "the count continues the count of the initial weights"
    kept = state_of(done.folder)
    trained.unlink()
    assert len(resume(done.folder).rows) == 2 and state_of(done.folder) == kept
    longer = extend(done.folder, 3, folder=tmp_path / "longer")
    tensors = read_weights(longer.folder / "last.safetensors").tensors
    assert int(tensors["patch_embed.norm.num_batches_tracked"]) == 6 + longer.rows[-1]["step"]


@pytest.mark.slow
def test_resuming_removes_only_the_temporary_files_of_a_killed_process(finished):
    run = finished
    (run / ".fcvit-tmp-x1").mkdir()
    (run / ".fcvit-tmp-x1" / "last.safetensors").touch()
    (run / ".fcvit-tmp-run.json").touch()
    for name in (".git", ".dvc", ".last.safetensors.old"):
        (run / name).mkdir()
    (run / ".notes.tmp").touch()
    resume(run)
    hidden = {path.name for path in run.iterdir() if path.name.startswith(".")}
    assert hidden == {".git", ".dvc", ".last.safetensors.old", ".notes.tmp"}


@pytest.mark.slow
def test_a_run_is_resumed_with_moved_images(small, uninterrupted, squares, tmp_path, monkeypatch, capsys):
    """Names, classes and content of the images must be the same. The new path is recorded."""
    from fcvit.cli import main

    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train(small(), folder=tmp_path / "run", device="cpu")
    moved = squares.rename(tmp_path / "moved")
    words = ["train", "--resume", str(tmp_path / "run")]
    assert main(words) == 3 and "with --data" in capsys.readouterr().err
    resized, missing = shutil.copytree(moved, tmp_path / "resized"), shutil.copytree(moved, tmp_path / "missing")
    for path in resized.rglob("*.png"):
        with Image.open(path) as image:
            image.resize((32, 32)).save(path)
    (missing / "train" / "left" / "00.png").unlink()
    assert main([*words, "--data", str(resized)]) == 4 and f"--data {resized}: the content" in capsys.readouterr().err
    assert main([*words, "--data", str(missing)]) == 4 and "training images" in capsys.readouterr().err
    assert main([*words, "--weights", str(moved)]) != 0
    assert main([*words, "--data", str(moved), "--lr", "1"]) == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert main([*words, "--data", str(moved)]) == 0
    assert state_of(tmp_path / "run") == state_of(uninterrupted)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["data"] == str(moved)
    assert str(moved) in (tmp_path / "run" / "recipe.toml").read_text()
    assert main(words) == 0, "the new path was recorded"


@pytest.mark.slow
def test_a_run_is_resumed_with_moved_weights(trained, small, tmp_path, monkeypatch):
    """A run that was interrupted in its first epoch needs its initial weights again."""
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 0)
        with pytest.raises(KeyboardInterrupt):
            train(small(weights=str(trained), epochs=1), folder=tmp_path / "run", device="cpu")
    moved = trained.rename(tmp_path / "moved.safetensors")
    with pytest.raises(UnreadableFile, match="with --weights"):
        resume(tmp_path / "run")
    with pytest.raises(UsageError, match="only data, val, classes, weights"):
        resume(tmp_path / "run", moved={"lr": "1"})
    assert len(resume(tmp_path / "run", moved={"weights": moved}).rows) == 1
    other = shutil.copy(tmp_path / "run" / "last.safetensors", tmp_path / "other.safetensors")
    with pytest.raises(DoesNotFit, match=r"--weights .*other\.safetensors: the content"):
        resume(tmp_path / "run", moved={"weights": other})


@pytest.mark.slow
def test_unreadable_validation_images_are_reported_once(small, tmp_path, squares, notes):
    (squares / "val" / "left" / "00.png").write_bytes(b"\x89PNG")
    done = train(small(epochs=2), folder=tmp_path / "run", device="cpu")
    (reason,) = done.unreadable
    assert reason.startswith("left/00.png: ") and sum(reason in note for note in notes) == 1


@pytest.mark.slow
def test_nan_weights_are_not_saved(small, tmp_path, monkeypatch):
    """The last step of an epoch can have a finite loss and still give weights that are not finite."""
    from fcvit.training.step import Trainer

    run = Trainer.run

    def set_nan(self, *given):
        losses = run(self, *given)
        if self.step == 4:
            self.model.head.bias.set_value(np.array([np.nan, 0], np.float32))
        return losses

    monkeypatch.setattr(Trainer, "run", set_nan)
    with pytest.raises(TrainingStopped, match=r"head.bias is not finite after step 4.* lr .*epoch 1 "):
        train(small(), folder=tmp_path / "run", device="cpu")
    assert np.isfinite(read_weights(tmp_path / "run" / "last.safetensors").tensors["head.bias"]).all()


@pytest.mark.parametrize("damage", [b"", b"half", None])
def test_a_damaged_state_is_rejected(finished, damage):
    path = finished / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(UnreadableFile, match=r"state\.safetensors"):
        resume(finished)
    (finished / "run.json").write_text('{"command": "train", "recipe": {}}')
    with pytest.raises(UnreadableFile, match=r"run\.json: .*recipe"):
        resume(finished)


@pytest.mark.slow
def test_the_state_of_another_network_is_rejected(finished, regularized):
    shutil.copy(regularized / "state.safetensors", finished / "state.safetensors")
    with pytest.raises(UnreadableFile, match="does not match the network at ema/"):
        resume(finished)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"precision": "bfloat16"}, "bfloat16.* cpu; use --precision float32"),
        ({"batchnorm": "sync"}, "sync.* CPU; use --batchnorm average"),
        ({"batch_size": 21}, "batch_size 21.* 20 training images"),
        ({"patience": 2, "data": "images/train"}, "patience = 2.*validation images; set --val or --held-out"),
        ({"accumulate": 3}, "not divisible by 3"),
    ],
)
def test_unsupported_settings_are_rejected(small, tmp_path, monkeypatch, fields, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        train(small(**fields), folder=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_the_run_folder_may_not_be_inside_the_image_folder(small, squares):
    with pytest.raises(UsageError, match=r"train.run .*inside.*-o"):
        train(small(), folder=squares / "train" / "run", device="cpu")


@pytest.mark.slow
def test_an_odd_batch_size_works(small, tmp_path):
    assert train(small(epochs=1, batch_size=7), folder=tmp_path / "run", device="cpu").rows[0]["step"] == 2


def test_micro_batches_give_the_gradient_of_the_batch(small, tmp_path):
    """Without BatchNorm in training mode, four micro-batches give the same gradient as the complete batch."""
    from fcvit.models.build import create_model
    from fcvit.training.batches import MicroBatches
    from fcvit.training.optimizer import freeze_backbone
    from fcvit.training.step import Trainer

    images = np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32)
    targets = np.eye(2, dtype=np.float32)[[0, 1, 1, 1] * 2]
    recipe = small(
        weights="some", freeze=True, eps=1.0
    )  # with a small eps, the first step of AdamW would not depend on the size of the gradient
    from fcvit.frameworks import import_framework

    heads = []
    for count in (1, 4):
        import_framework("paddle").seed(0)
        model = create_model(recipe.network(), None, 2)
        freeze_backbone(model)
        trainer = Trainer(model, recipe, MicroBatches(8, accumulate=count), classifier_loss)
        trainer.train_mode()
        loss = trainer.run(iter(zip(np.split(images, count), np.split(targets, count), strict=True)), 0.1)
        heads.append((float(loss["loss"]), model.head.weight.numpy()))
    assert heads[0][0] == pytest.approx(heads[1][0], rel=1e-6)
    assert heads[0][1] == pytest.approx(heads[1][1], abs=1e-5)


@pytest.mark.slow
def test_dropout_differs_between_steps_and_micro_batches(small):
    """The same images give a different loss in each step and micro-batch. A second run repeats the losses."""
    from fcvit.models.build import create_model
    from fcvit.training.batches import MicroBatches
    from fcvit.training.step import Trainer

    recipe = small(drop_rate=0.5, options={**small().options, "layer_scale": 1.0})
    batch = (np.ones((4, 3, 32, 32), np.float32), np.eye(2, dtype=np.float32)[[0, 1, 1, 0]])

    def all_losses():
        from fcvit.frameworks import import_framework

        import_framework("paddle").seed(0)
        trainer = Trainer(
            create_model(recipe.network(), None, 2, 0.0, 0.5), recipe, MicroBatches(8, accumulate=2), classifier_loss
        )
        trainer.train_mode()
        recorded = []
        trainer.task_loss = lambda *given: recorded.append(classifier_loss(*given)) or recorded[-1]
        for _ in range(2):
            trainer.run(iter([batch, batch]), 0.0)
        return [losses["loss"].item() for losses in recorded]

    first = all_losses()
    assert len(set(first)) == 4 and all_losses() == first


@pytest.mark.slow
def test_finetuning_creates_a_new_head_for_new_classes(trained, tmp_path, notes):
    data = write_squares(tmp_path / "three", {"a": 10, "b": 6, "c": 4}, size=40)
    words = {"epochs": "2", "operators": "plain", "layer_decay": "0.5"}
    done = finetune(trained, data, **words, folder=tmp_path / "run", device="cpu")
    assert any("new head" in note and "3 classes" in note for note in notes)
    assert any("4 of 20 images" in note for note in notes)
    assert any("batch_size 4" in note for note in notes)
    kept = read_weights(done.weights)
    assert [c.id for c in kept.classes] == ["a", "b", "c"] and kept.spec.variant == read_weights(trained).spec.variant
    recipe, _ = finetune_recipe(trained, data, words)
    assert (recipe.layer_decay, recipe.class_weights, recipe.patience) == (0.5, "balanced", 5)
    before, after = read_weights(trained).tensors, read_weights(done.folder / "last.safetensors").tensors
    moved = {name: np.abs(after[name] - before[name]).mean() for name in before if name.endswith("norm1.weight")}
    assert 0 < moved["network.0.0.norm1.weight"] < moved["network.6.0.norm1.weight"]


@pytest.mark.slow
def test_finetuning_keeps_the_head_for_the_same_classes(trained, tmp_path, squares, notes):
    words = {"epochs": "1", "operators": "plain", "lr": "1e-9", "warmup_lr": "0", "min_lr": "0"}
    done = finetune(trained, squares, **words, folder=tmp_path / "run", device="cpu")
    assert any("--new-head true" in note for note in notes)
    before, after = (read_weights(path).tensors["head.weight"] for path in (trained, done.folder / "last.safetensors"))
    assert np.abs(before - after).max() < 1e-6
    new = finetune(trained, squares, **words, new_head="true", folder=tmp_path / "new", device="cpu")
    assert np.abs(before - read_weights(new.folder / "last.safetensors").tensors["head.weight"]).max() > 1e-3


def test_finetuning_chooses_the_head_and_the_batch_size(trained, tmp_path, squares):
    """The head is kept for the same classes in any order. The batch is at most a quarter of the images."""
    from fcvit.models.build import create_model, weights_of
    from fcvit.weights.writing import write_weights

    spec = read_weights(trained).spec
    model = create_model(spec.variant, None, 2)
    other = tmp_path / "other.safetensors"
    write_weights(other, weights_of(model, classes=(ClassName("right", "R"), ClassName("left", "L"))))
    recipe, notes = finetune_recipe(other, squares, {"accumulate": "2"})
    assert not recipe.new_head and "--new-head true" in notes[0]
    assert recipe.batch_size == 4 and recipe.batch_size % 2 == 0
    nameless = tmp_path / "nameless.safetensors"
    write_weights(nameless, weights_of(model))
    assert finetune_recipe(nameless, squares)[0].new_head, "two outputs without class names may belong to other classes"
    assert finetune_recipe(trained, squares, {"drop_rate": "0.2"})[0].drop_rate == 0.2


@pytest.mark.slow
def test_the_warm_up_of_a_short_finetuning_is_shortened(trained, squares, small, tmp_path, notes):
    """Otherwise the learning rate would not reach its peak. An explicit value is kept, and a note is logged."""
    recipe, remarks = finetune_recipe(trained, squares, {"epochs": "1"})
    assert recipe.warmup_epochs == 0.2 and any("warmup_epochs 0.2" in note and "1 epoch" in note for note in remarks)
    assert learning_rate(recipe, 0) < learning_rate(recipe, 0.1) < learning_rate(recipe, 0.2)
    assert learning_rate(recipe, 0.2) > 0.9 * recipe.peak_lr
    assert finetune_recipe(trained, squares, {"epochs": "1", "lr-update": "epoch"})[0].warmup_epochs == 0
    for words in ({"epochs": "5"}, {"epochs": "2", "warmup-epochs": "1"}):
        recipe, remarks = finetune_recipe(trained, squares, words)
        assert recipe.warmup_epochs == 1 and not any("warmup" in note for note in remarks)
    train(small(epochs=1), folder=tmp_path / "run", device="cpu")
    assert any("warm-up" in note and "1 epoch" in note and "--warmup-epochs" in note for note in notes)


@pytest.mark.slow
def test_the_remaining_time_of_the_run_is_shown_from_the_first_step(small, tmp_path, monkeypatch, capsys):
    from fcvit.report import progress as module

    monkeypatch.setattr("fcvit.training.loop.show_progress", functools.partial(module.progress, every=0))
    train(small(epochs=2), folder=tmp_path / "run", device="cpu")
    lines = capsys.readouterr().err.splitlines()
    expected = r"epoch 1 of 2: 8 of 16 images, [0-9.]+ images/s, \d:\d\d:\d\d left, \d:\d\d:\d\d left in total"
    assert re.fullmatch(expected, lines[0]), lines


def test_the_remaining_time_includes_validation_and_later_epochs(small):
    from fcvit.training.loop import Loop
    from fcvit.training.run import Run

    with Run.prepared(small(epochs=3), "cpu", 0) as run:
        loop = Loop(run)
        # 6 images are validated at three times the rate. Two epochs of 16 images follow.
        assert loop.seconds_after(1.0) == 2 + 2 * (16 + 2)
        loop.seconds.append(5.0)
        assert loop.seconds_after(1.0) == 2 + 2 * 5


@pytest.mark.slow
def test_drop_rates_also_apply_to_loaded_weights(trained, small):
    from fcvit.tasks.classification.training import ClassificationTraining

    recipe = small(weights=str(trained), drop_path_rate=0.3, drop_rate=0.2)
    model = ClassificationTraining(recipe, read_weights(trained)).network()
    assert model.network[6][0].drop_path.rate == 0.3 and model.network[6][0].channel_mixer.drop.p == 0.2


@pytest.mark.slow
def test_a_frozen_backbone_is_not_trained(trained, tmp_path, squares):
    words = {"epochs": "1", "operators": "plain", "freeze": "true", "new_head": "true"}
    done = finetune(trained, squares, **words, folder=tmp_path / "run", device="cpu")
    before, after = read_weights(trained).tensors, read_weights(done.folder / "last.safetensors").tensors
    changed = {name for name in before if (before[name] != after[name]).any() and not name.endswith("tracked")}
    assert changed == {"head.weight", "head.bias"}
    counters = [int(t[name]) for t in (before, after) for name in before if name.endswith("tracked")]
    assert len(set(counters)) == 1, "frozen statistics are not counted as updated"


def test_weights_with_another_number_of_classes_need_a_new_head(trained, small, tmp_path):
    data = write_squares(tmp_path / "three", {"a": 10, "b": 6, "c": 4})
    with pytest.raises(DoesNotFit, match="fcvit finetune"):
        train(small(data=str(data), weights=str(trained)), folder=tmp_path / "run", device="cpu")


def test_weights_of_another_network_are_rejected(trained, small, tmp_path):
    recipe = dataclasses.replace(small(weights=str(trained)), options={})
    with pytest.raises(DoesNotFit):
        train(recipe, folder=tmp_path / "run", device="cpu")


@pytest.fixture
def recipe_file(small, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(small().to_toml())
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--velocity", "1"], 2, "velocity"),
        (["--wieght_decay", "1"], 2, "(?i)did you mean .*weight.decay"),
        (["--epochs", "many"], 2, "epochs = 'many': expected a whole number"),
        (["--data", "nowhere"], 3, "nowhere: "),
        (["--resume", "somewhere"], 2, "recipe.*--resume"),
        (["--weights", "nowhere.pth"], 3, "nowhere.pth"),
        (["--lr", "900", "--warmup_epochs", "0", "--epochs", "40", "--mixup", "0"], 8, r"\blr\b.*clip_norm"),
    ],
)
def test_command_line_errors_are_one_line(recipe_file, tmp_path, capsys, words, code, message):
    from fcvit.cli import main

    assert main(["train", str(recipe_file), "--device", "cpu", "-o", str(tmp_path / "run"), *words]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("fcvit: note:")]
    assert len(lines) == 1 and re.search(message, lines[0]), lines


@pytest.mark.slow
def test_the_command_line_trains_resumes_and_extends(recipe_file, tmp_path, capsys):
    from fcvit.cli import main

    run, longer = str(tmp_path / "run"), str(tmp_path / "longer")
    assert main(["train", str(recipe_file), "--device", "cpu", "--epochs", "1", "-o", run, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["rows"]) == 1 and result["weights"] == f"{run}/best.safetensors"
    assert main(["train", "--resume", run]) == 0
    out = capsys.readouterr().out
    assert "weights: " in out and out.startswith("1 epoch in")
    assert main(["train", "--extend", run, "--epochs", "2", "-o", longer]) == 0
    assert main(["train", "--extend", run, "--lr", "1"]) == 2
    assert main(["train", "--resume", run, "--epochs", "2"]) == 2 and main(["train"]) == 2
    assert main(["train", "--resume", run, "--device", "cpu"]) == 2
    options = ["--option", "competition=false", "--option", "heads=4", "--crop-scale", "[0.5, 1.0]"]
    assert main(["train", str(recipe_file), "--device", "cpu", "--epochs", "1", "-o", f"{run}-4", *options]) == 0
    variant = read_weights(f"{run}-4/last.safetensors").spec.variant
    assert (variant.competition, variant.heads) == (False, 4)
    assert main(["train", str(recipe_file), "--option", "heads"]) == 2


@pytest.mark.slow
def test_the_command_line_finetunes_and_previews(trained, squares, tmp_path, capsys):
    from fcvit.cli import main

    words = ["finetune", "--weights", str(trained), "--data", str(squares)]
    assert main([*words, "--preview", str(tmp_path / "seen.png")]) == 0
    with Image.open(tmp_path / "seen.png") as picture:
        assert min(picture.size) > 500
    assert main([*words, "--preview", str(tmp_path / "seen.png")]) == 2, "the file already exists"
    assert main([*words, "--epochs", "1", "--freeze", "true", "-o", str(tmp_path / "run")]) == 0
    assert "best.safetensors" in capsys.readouterr().out
    assert main([*words, "--epocs", "1"]) == 2


def test_a_preview_shows_the_augmented_images(small, tmp_path):
    """The preview with erasing differs from the preview without augmentation."""
    plain = small(rand_augment=0, erasing=0.0, mixup=0.0, cutmix=0.0, flip=0.0, crop="centre")
    pictures = {}
    for name, recipe in (("plain", plain), ("erased", dataclasses.replace(plain, erasing=1.0))):
        with Image.open(draw_preview(recipe, tmp_path / f"{name}.png", images=3, versions=2).path) as picture:
            pictures[name] = np.asarray(picture.convert("RGB"), np.int16)
    assert pictures["plain"].shape == pictures["erased"].shape
    assert (pictures["plain"] != pictures["erased"]).any()


@pytest.mark.slow
@pytest.mark.parametrize("moments", [6, pytest.param(40, marks=pytest.mark.ci)])
def test_a_signal_at_any_moment_interrupts_cleanly_and_loses_nothing(small, tmp_path, monkeypatch, capsys, moments):
    """Signals arrive at seeded moments: in native operators of a step or validation, or while a file is replaced."""
    from fcvit.cli import main
    from fcvit.native import operators

    epochs = 2 + moments
    (tmp_path / "recipe.toml").write_text(small(operators="native", epochs=epochs).to_toml())
    command = ["train", str(tmp_path / "recipe.toml"), "--device", "cpu", "-o"]
    calls, moment, number = 0, 0, signal.SIGINT

    def interrupting(function):
        def wrapped(*given):
            nonlocal calls
            calls += 1
            if calls == moment:
                signal.raise_signal(number)
            return function(*given)

        return wrapped

    monkeypatch.setattr(operators, "run_kernel", interrupting(operators.run_kernel))
    monkeypatch.setattr(os, "replace", interrupting(os.replace))
    assert main([*command, str(tmp_path / "uninterrupted")]) == 0
    each_epoch = calls // epochs
    words = [*command, str(run := tmp_path / "cut")]
    generator = np.random.default_rng(0)
    for attempt in range(moments):
        number = SIGNALS[attempt % len(SIGNALS)]
        calls, moment = 0, 2 + int(generator.integers(each_epoch))
        capsys.readouterr()
        assert main(words) == 130, (attempt, moment)
        assert f"fcvit resume {run}" in capsys.readouterr().err, (attempt, moment)
        assert json.loads((run / "run.json").read_text())["status"] == "interrupted", (attempt, moment)
        words = ["train", "--resume", str(run)]
    moment = 0
    assert 1 <= read_state(run)[0].epoch < epochs
    assert main(words) == 0
    assert state_of(run) == state_of(tmp_path / "uninterrupted")


@pytest.mark.slow
def test_resume_continues_training_and_evaluation_runs(small, squares, tmp_path, monkeypatch):
    import fcvit

    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(small(), folder=tmp_path / "run", device="cpu")
    done = fcvit.resume(tmp_path / "run")
    assert len(done.rows) == 3
    fcvit.evaluate(done.weights, squares / "val", engines="paddle", device="cpu", folder=tmp_path / "eval")
    assert fcvit.resume(tmp_path / "eval").results[0].images == 6
    with pytest.raises(UnreadableFile, match=r"run\.json"):
        fcvit.resume(tmp_path)


@pytest.fixture
def cut(small, tmp_path, monkeypatch):
    """A run that was interrupted after the first of two steps of its second epoch."""
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(small(), folder=tmp_path / "cut", device="cpu")
    return tmp_path / "cut"


@pytest.mark.slow
@pytest.mark.parametrize(("minutes", "saved"), [(1e-9, {1, 2, 3, 4}), (0, {2, 4}), (1, {2, 3, 4})])
def test_the_state_is_saved_by_time_and_after_epochs(small, tmp_path, monkeypatch, minutes, saved):
    """The clock jumps by a minute in the third step, which is the first one of the second epoch."""
    from fcvit.training import loop, run
    from fcvit.training.state import BackgroundWrite
    from fcvit.training.step import Trainer

    steps, clock, write, step = set(), [0.0], run.write_state, Trainer.run
    monkeypatch.setattr(BackgroundWrite, "running", False)  # a write does not delay the next one
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])

    def jumping(self, *given):
        clock[0] += 61 if self.step == 2 else 1e-3
        return step(self, *given)

    monkeypatch.setattr(Trainer, "run", jumping)
    monkeypatch.setattr(run, "write_state", lambda *given: steps.add(json.loads(given[2])["step"]) or write(*given))
    train(small(epochs=2, checkpoint_minutes=minutes), folder=tmp_path / "run", device="cpu")
    assert steps == saved


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_the_previous_state_is_used_if_the_last_one_is_damaged(cut, uninterrupted, notes, damage):
    path = cut / "state.safetensors"
    assert read_state(cut)[0].epoch_step == 1
    path.unlink() if damage == "missing" else os.truncate(path, 1000)
    resume(cut)
    note = f"{path}: .*; using the previous state, after epoch 1"
    assert sum(bool(re.fullmatch(note, text)) for text in notes) == 1
    assert state_of(cut) == state_of(uninterrupted)
    assert read_state(cut, "state-previous.safetensors")[0].epoch == 2, "the damaged state was not kept"


@pytest.mark.slow
def test_a_run_that_was_interrupted_within_an_epoch_can_be_extended(cut, tmp_path, notes):
    longer = extend(cut, 5, folder=tmp_path / "longer")
    assert "already done: 1 of 5 epochs and step 1 of 2" not in notes
    assert [row["step"] for row in longer.rows] == [2, 4, 6, 8, 10]
    assert longer.rows[1]["lr"] != read_state(cut)[0].rows[0]["lr"]


@pytest.mark.slow
def test_a_state_of_an_earlier_version_is_resumed(small, tmp_path, monkeypatch, uninterrupted):
    """Its metadata has no position within an epoch, and it has no tensors of losses and unreadable images."""
    from fcvit.weights import safetensors_file

    train(small(epochs=1), folder=tmp_path / "run", device="cpu")
    path = tmp_path / "run" / "state.safetensors"
    tensors, metadata = safetensors_file.read(path.read_bytes())
    fields = json.loads(metadata["fcvit_training"])
    old = {name: fields[name] for name in ("epoch", "step", "best", "rows", "first_updates", "scaler")}
    del tensors["unreadable"]
    safetensors_file.write(path, tensors, {"fcvit_training": json.dumps(old)})
    longer = extend(tmp_path / "run", 2, folder=tmp_path / "longer")
    assert [row["epoch"] for row in longer.rows] == [1, 2] and longer.rows[0] == fields["rows"][0]


@pytest.mark.slow
def test_weights_that_are_not_finite_are_not_saved_within_an_epoch(small, tmp_path, monkeypatch):
    from fcvit.training.step import Trainer

    run = Trainer.run

    def set_nan(self, *given):
        losses = run(self, *given)
        if self.step == 3:
            self.model.head.bias.set_value(np.array([np.nan, 0], np.float32))
        return losses

    monkeypatch.setattr(Trainer, "run", set_nan)
    with pytest.raises(TrainingStopped, match=r"head.bias is not finite after step 3.* lr .*epoch 1 is saved"):
        train(small(checkpoint_minutes=1e-9), folder=tmp_path / "run", device="cpu")
    assert read_state(tmp_path / "run")[0].step == 2


@pytest.mark.slow
def test_a_run_folder_that_vanishes_stops_training(small, uninterrupted, tmp_path, monkeypatch):
    """The folder is not created again, because it may be the mount point of a disk."""
    from fcvit.training.step import Trainer

    run, folder = Trainer.run, tmp_path / "run"

    def unmount(self, *given):
        if self.step == 2:
            folder.rename(tmp_path / "unmounted")
        return run(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", unmount)
        with pytest.raises(UnreadableFile, match=rf"{folder}: .*no longer exists.*after epoch 1 with: fcvit resume"):
            train(small(), folder=folder, device="cpu")
    assert not folder.exists()
    (tmp_path / "unmounted").rename(folder)
    resume(folder)
    assert state_of(folder) == state_of(uninterrupted)


@pytest.mark.slow
def test_validation_images_that_vanish_stop_training(small, tmp_path, squares, monkeypatch):
    from fcvit.training.step import Trainer

    run = Trainer.run

    def unmount(self, *given):
        if self.step == 2:
            (squares / "val").rename(squares / "unmounted")
        return run(self, *given)

    monkeypatch.setattr(Trainer, "run", unmount)
    with pytest.raises(TrainingStopped, match=rf"{squares / 'val'}.*resume after .* with: fcvit resume"):
        train(small(), folder=tmp_path / "run", device="cpu")


@pytest.mark.slow
def test_one_command_starts_a_run_and_continues_it(recipe_file, tmp_path, monkeypatch, capsys):
    from fcvit.cli import main

    run = tmp_path / "run"
    words = ["train", str(recipe_file), "--device", "cpu", "--epochs", "2", "--resume-if-exists"]
    assert main(words) == 2 and "--output" in capsys.readouterr().err
    words += ["-o", str(run)]
    run.mkdir()
    (run / "run.json").touch()  # a process was killed before it could begin
    (run / ".lock").touch()
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 2, signal.SIGTERM)
        assert main(words) == 130
    err = capsys.readouterr().err
    assert f"{run} contains no run, so a new run starts" in err and "after step 1 of 2 of epoch 2 with: fcvit" in err
    assert main([*words, "--lr", "1e-4"]) == 2
    err = capsys.readouterr().err
    assert f"{run}: the run in this folder has another recipe (lr is 0.005, not 0.0001)" in err
    assert main(words) == 0
    err = capsys.readouterr().err
    assert f"{run} contains this run, so it is resumed" in err and "already done: 1 of 2 epochs and step 1 of 2" in err
    assert main(words) == 0, "a finished run is finished"
