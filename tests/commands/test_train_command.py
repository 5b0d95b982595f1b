"""Test `fcvit train` and `fcvit finetune`: options set recipe fields, on the command line and in Python."""

from pathlib import Path

import cyclopts
import pytest

from fcvit.commands.finetune import finetune
from fcvit.commands.resume import MovedFiles, resume
from fcvit.commands.train import train
from fcvit.errors import UsageError
from fcvit.models.variants import VARIANTS
from fcvit.training.recipe import read_recipe


@pytest.fixture
def calls(monkeypatch):
    """Record the calls of the training functions instead of training."""
    calls = []
    for name in ("train", "resume", "extend"):
        monkeypatch.setattr(f"fcvit.training.run.{name}", lambda *a, n=name, **k: calls.append((n, a, k)) or calls[-1])
    return calls


def command(line):
    app = cyclopts.App(result_action="return_value", exit_on_error=False, print_error=False)
    app.command(train)
    app.command(finetune)
    return app(line)


def test_options_and_arguments_build_the_same_recipe(calls):
    """Hyphens and underscores are equal, and only given options replace fields."""
    line = "train digits --data images --lr 5e-4 --batch_size 32 --warmup-epochs 1 --option heads=4 --mean 0.5,0.4,0.3"
    command(f"{line} --device cpu -o runs/x")
    command(f"{line} --device cpu --output runs/x --workers 2")
    given = {"data": Path("images"), "lr": 5e-4, "batch_size": 32, "warmup_epochs": 1, "mean": (0.5, 0.4, 0.3)}
    train("digits", **given, options={"heads": 4}, device="cpu", folder="runs/x")
    train(read_recipe("digits"), **given, options={"heads": 4}, device="cpu", folder="runs/x")
    recipes = [arguments[0] for _, arguments, _ in calls]
    assert recipes == recipes[:1] * 4 and recipes[0].options == {"heads": 4} and recipes[0].crop == "padded"
    assert [options["workers"] for _, _, options in calls] == [0, 2, 0, 0], "the default on a CPU is 0"
    assert {str(options["folder"]) for _, _, options in calls} == {str(Path("runs/x"))}


def test_none_unsets_a_field(calls):
    recipe = read_recipe("finetune", {"variant": "fcvit_tiny", "data": "x", "weights": "w"})
    assert recipe.patience == 5
    assert train(recipe, patience=None, device="cpu")[1][0].patience is None
    assert command("train digits --data x --classes none --class-weights none --device cpu")[1][0].classes is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train", "expected a recipe, or --resume"),
        ("train digits --resume x", "expected a recipe, or --resume"),
        ("train --resume x --lr 1", "--resume .*--data, --val, --classes, --weights"),
        ("train --resume x -o y", "--resume .*--data, --val, --classes, --weights"),
        ("train --extend x", "--extend RUN .*--epochs N"),
        ("train --extend x --epochs many", "--extend RUN .*--epochs N"),
        ("train digits --option heads", "expected NAME=VALUE"),
        ("train digits --option haeds=4", "did you mean 'heads'"),
        ("train digits --learning-rate 1", "did you mean 'lr'"),
        ("train digits --epochs 2.5", "epochs = 2.5: expected a whole number of at least 1"),
        ("train digits --lr_batch none", "lr_batch = None: expected a whole number"),
        ("train digits --preview seen.png -o runs/x", "--preview .*--output"),
    ],
)
def test_invalid_combinations_of_options_are_rejected(calls, line, message):
    with pytest.raises(UsageError, match=message):
        command(f"{line} --workers 0")
    assert not calls


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train digits --epocs 3", "Did you mean --epochs"),
        ("train digits --schedule linear", "Choose from: .*cosine.*poly.*step"),
        ("train digits --freeze", "requires"),
        ("finetune --weights w", "--data requires"),
    ],
)
def test_unknown_options_and_values_are_rejected_with_a_suggestion(calls, line, message):
    with pytest.raises(cyclopts.CycloptsError, match=f"(?s){message}"):
        command(line)
    assert not calls


def test_resumed_and_extended_runs_accept_new_paths(calls):
    command("train --resume runs/x --data moved --workers 3")
    command("train --extend runs/x --epochs 40 --weights w -o runs/y --workers 0")
    train(extend="runs/x", epochs=40, weights="w", folder="runs/y", workers=0)
    moved = {"moved": {"data": "moved"}, "workers": 3}
    longer = {"folder": Path("runs/y"), "moved": {"weights": "w"}, "workers": 0}
    assert calls[0] == ("resume", (Path("runs/x"),), moved)
    assert calls[1] == ("extend", (Path("runs/x"), 40), longer)
    assert calls[2] == ("extend", ("runs/x", 40), longer | {"folder": "runs/y"})


def test_resume_continues_a_training_with_new_paths(calls, monkeypatch):
    monkeypatch.setattr("fcvit.run_folder.read_run", lambda _: {"command": "train"})
    resume("runs/x", files=MovedFiles(weights=["w"], data="moved", val=Path("other")), workers=3)
    moved = {"data": "moved", "val": "other", "weights": "w"}
    assert calls[0] == ("resume", ("runs/x",), {"moved": moved, "workers": 3})
    with pytest.raises(UsageError, match="only one weights file"):
        resume("runs/x", files=MovedFiles(weights=["a", "b"]))


@pytest.mark.parametrize("line", ["finetune --weights {0} --data {1}", "finetune {0} {1}"])
def test_finetuning_uses_the_variant_of_the_weights(calls, digits_pth, squares, line):
    recipe = command(f"{line.format(digits_pth, squares)} --epochs 3 --freeze true --device cpu")[1][0]
    assert recipe.network().depths == VARIANTS["fcvit_digits"].depths
    assert (recipe.weights, recipe.data) == (str(digits_pth), str(squares))
    assert (recipe.epochs, recipe.freeze, recipe.new_head) == (3, True, True)
    assert recipe == finetune(digits_pth, squares, epochs=3, freeze=True, device="cpu")[1][0]
