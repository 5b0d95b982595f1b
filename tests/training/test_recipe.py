"""Recipes: types and ranges of fields, unknown fields, and writing and reading recipes."""

import dataclasses
import math
import operator
import sys
import tomllib
import types
import typing
from pathlib import Path
from typing import Annotated

import cyclopts
import msgspec
import numpy as np
import pytest
import rich.console
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from fcvit.commands.finetune import DEFAULTS, finetune
from fcvit.commands.train import train
from fcvit.data.transforms.augment import Augmentation
from fcvit.errors import UnreadableFile, UsageError
from fcvit.models.variants import VARIANTS
from fcvit.tasks.base import TASKS
from fcvit.tasks.classification.recipe import ClassificationRecipe
from fcvit.tasks.recipe import LOSS, OTHER_NAMES, Recipe, recipe_fields
from fcvit.training.recipe import build_recipe, read_recipe, shipped, shipped_text

ROOT = Path(__file__).parents[2]
FIELDS = recipe_fields(ClassificationRecipe)
AUTOMATIC = {"new_head": "automatic", "task": "automatic"}
DROP_PATH = {"fcvit_tiny": 0.1, "fcvit_b12": 0.1, "fcvit_b24": 0.1, "fcvit_b48": 0.2}


def toml(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return str(path)


def test_every_shipped_recipe_is_valid_and_documents_its_cost():
    for name in shipped():
        given = {"variant": "fcvit_b12", "weights": "y"} if name == "finetune" else {}
        assert read_recipe(name, {"data": "x", **given}).variant in VARIANTS
        head = shipped_text(name).split("\n\n")[0]
        assert all(f"# {word}:" in head for word in ("Command", "Hardware", "Cost", "Accuracy")), name


@pytest.mark.parametrize("name", DROP_PATH)
def test_the_shipped_recipe_matches_the_authors_recipe(name):
    """The values are from the paper's repository."""
    recipe = read_recipe(name)
    stated = {
        "epochs": 300, "warmup_epochs": 5, "cooldown_epochs": 10, "lr": 1e-3, "lr_batch": 1024, "min_lr": 1e-6,
        "warmup_lr": 1e-6, "lr_update": "epoch", "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.05,
        "rand_augment": 2, "magnitude": 9.0, "magnitude_std": 0.5, "operation_probability": 0.5, "crop": "resized",
        "crop_scale": (0.08, 1.0), "crop_ratio": (3 / 4, 4 / 3), "crop_interpolation": "random", "flip": 0.5,
        "mixup": 0.8, "cutmix": 1.0, "mix_switch": 0.5, "label_smoothing": 0.1, "erasing": 0.25,
        "drop_path_rate": DROP_PATH[name], "clip_norm": None, "ema_decay": None, "precision": "float16",
        "batchnorm": "average", "batch_size": 1024, "total_epochs": 310,
    }  # fmt: skip
    assert {key: getattr(recipe, key) for key in stated} == stated


def test_overrides_are_parsed_as_on_the_command_line(tmp_path):
    path = toml(tmp_path, 'variant = "fcvit_tiny"\nclip_norm = 5\nweights = "a.pth"\n')
    words = {"lr": "5e-4", "batch-size": "64", "data": "my folder", "freeze": "true", "crop_scale": "[0.5, 1]"}
    recipe = read_recipe(path, {**words, "clip_norm": "none", "options.competition": "false", "class_weights": "none"})
    assert (recipe.lr, recipe.batch_size, recipe.data, recipe.freeze) == (5e-4, 64, "my folder", True)
    assert (recipe.crop_scale, recipe.clip_norm, recipe.class_weights) == ((0.5, 1.0), None, "none")
    assert recipe.network() == dataclasses.replace(VARIANTS["fcvit_tiny"], competition=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"leraning_rate": "1"}, "field 'leraning_rate'"),
        ({"wieght_decay": "1"}, "did you mean 'weight_decay'"),
        ({"lr": "fast"}, "lr = 'fast': expected a number"),
        ({"epochs": "2.5"}, "epochs = 2.5: expected a whole number"),
        ({"epochs": "true"}, "epochs = True: expected a whole number"),
        ({"warmup_epochs": "301"}, r"expected from 0 to epochs \(300\)"),
        ({"variant": "fcvit_b13"}, "did you mean 'fcvit_b12'"),
        ({"options.competitoin": "false"}, "did you mean 'competition'"),
        ({"options.heads": "7"}, "divisible by 7 heads"),
        ({"precision": "float8"}, "expected 'float32' or 'float16' or 'bfloat16'"),
        ({"crop_scale": "[0.5]"}, "expected two numbers"),
        ({"mixup": "-1"}, "mixup"),
        ({"flip": "2"}, "flip"),
        ({"lr": "nan"}, "lr = nan"),
        ({"freeze": "true"}, "freeze = True: .*weights"),
        ({"ema": "true"}, "ema = True: .*weights"),
        ({"learning-rate": "1"}, "did you mean 'lr'"),
        ({"min_lr": "1"}, r"min_lr = 1.0: expected from 0 to .*\(0.001\)"),
        ({"data.x": "1"}, "only options.NAME"),
        ({"input_size": "0"}, "input_size = 0: expected a whole number from 1 to 4096"),
        ({"batch_size": "1"}, "at least 2"),
    ],
)
def test_wrong_fields_and_values_are_rejected(tmp_path, words, message):
    with pytest.raises(UsageError, match=message):
        read_recipe(toml(tmp_path, 'variant = "fcvit_tiny"\n'), words)


def test_text_fields_are_not_parsed_as_toml(tmp_path):
    """The name of a folder can be 2024 or true."""
    for word in ("2024", "true", "1979-05-27", "a#b"):
        recipe = read_recipe(toml(tmp_path, 'variant = "fcvit_tiny"\n'), {"data": word, "val": word})
        assert (recipe.data, recipe.val) == (word, word)
    assert read_recipe(toml(tmp_path, 'variant = "fcvit_tiny"\nval = "x"\n'), {"val": "none"}).val is None


def test_unreadable_recipes_are_rejected(tmp_path):
    with pytest.raises(UnreadableFile, match=r"nothing\.toml: .*cifar10-7k, detection"):
        read_recipe(str(tmp_path / "nothing.toml"))
    with pytest.raises(UnreadableFile, match=r"recipe\.toml: .*TOML"):
        read_recipe(toml(tmp_path, "variant fcvit"))
    with pytest.raises(UsageError, match=r"recipe\.toml: .*variant.*fcvit models"):
        read_recipe(toml(tmp_path, "epochs = 3"))


def test_recipe_and_augmentation_have_the_same_defaults():
    """Both contain the authors' values."""
    assert ClassificationRecipe(variant="fcvit_tiny").augmentation(224) == Augmentation(size=224)


@pytest.mark.slow
def test_the_help_lists_every_field_with_its_values_and_default(capsys):
    console = rich.console.Console(width=1000, legacy_windows=False)
    for command, defaults in ((train, {}), (finetune, {**DEFAULTS, **AUTOMATIC})):
        app = cyclopts.App(help_format="plaintext", console=console)
        app.default(command)
        app.help_print([])
        text = capsys.readouterr().out
        for name, field in FIELDS.items():
            words = ["--option" if name == "options" else f"--{name.replace('_', '-')}"]
            if command is train or name not in ("data", "weights"):
                shown = dataclasses.replace(field, default=defaults.get(name, field.default))
                words += [field.description, field.expected, shown.default_text]
            assert any(all(word in line for word in words) for line in text.splitlines()), name
        assert "--learning-rate" not in text


def test_optional_fields_are_none_by_default():
    """TOML has no null: a field that is None is left out, and must be None when it is read back."""
    for name, field in FIELDS.items():
        assert field.optional == (field.default is None), name


def test_every_field_has_a_description_and_a_valid_default():
    for name, field in FIELDS.items():
        assert field.description.endswith(".") and field.description[0].isupper(), name
        assert field.default is dataclasses.MISSING or msgspec.convert(field.default, field.hint) == field.default
    assert set(OTHER_NAMES.values()) <= set(FIELDS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherRecipe(Recipe):
    """A recipe of another task with an additional field."""

    task: Annotated[str, LOSS("Task.")] = "mean"
    quantile: Annotated[float, LOSS("Quantile of the loss."), Meta(ge=0, le=1)] = 0.5


def test_the_task_selects_the_fields(monkeypatch):
    module = types.SimpleNamespace(TASK=types.SimpleNamespace(recipe=OtherRecipe))
    monkeypatch.setitem(sys.modules, "task_of_a_test", module)
    monkeypatch.setitem(TASKS, "mean", "task_of_a_test")
    recipe = build_recipe({"task": "mean", "variant": "fcvit_tiny"}, {"quantile": "0.25"}, "file")
    assert type(recipe) is OtherRecipe and recipe.quantile == 0.25
    assert build_recipe(tomllib.loads(recipe.to_toml()), {}, "stored") == recipe
    with pytest.raises(UsageError, match=r"--crop: .*field 'crop'"):
        build_recipe({"task": "mean", "variant": "fcvit_tiny"}, {"crop": "padded"}, "file")
    with pytest.raises(UsageError, match="task 'sorting': expected classification, segmentation, detection, mean"):
        read_recipe("digits", {"task": "sorting"})


def metadata(hint):
    """Yield the annotations of a type and of all types inside it."""
    yield from getattr(hint, "__metadata__", ())
    for argument in typing.get_args(hint):
        yield from metadata(argument)


BOUNDS = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}
NUMERIC = sorted(name for name, field in FIELDS.items() if field.kind in (int, float))


@given(st.data())
def test_bounds_are_enforced(data):
    """A number is accepted or rejected according to the declaration, both as a TOML value and as text."""
    name = data.draw(st.sampled_from(NUMERIC))
    field = FIELDS[name]
    near = st.sampled_from([0, 1, -1, 2, 4096, 4097, 0.5, 1e-300, 999.5, 1000.5, 2**63, 2**63 - 1])
    value = data.draw(near | st.integers(-10, 10_000) | st.floats(-2, 2) | st.sampled_from([math.nan, math.inf, True]))
    fits = isinstance(value, int) or field.kind is float
    fits = fits and type(value) is not bool
    for meta in metadata(field.hint):
        limits = {key: getattr(meta, key) for key in BOUNDS}
        fits = fits and all(BOUNDS[key](value, limit) for key, limit in limits.items() if limit is not None)
    for given_value in (value, str(value).lower()):
        try:
            recipe = build_recipe({"variant": "fcvit_tiny"}, {name: given_value}, "file")
        except UsageError as error:
            assert f"{name} = " in str(error) or "epochs" in str(error) or "peak learning rate" in str(error)
            cross = any(text in str(error) for text in ("from 0 to epochs", "from 0 to the peak learning rate"))
            assert cross or not fits
        else:
            assert fits and getattr(recipe, name) == field.kind(value) and type(getattr(recipe, name)) is field.kind


@pytest.mark.slow
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "lr": st.floats(1e-5, 1),
            "options": st.sampled_from([{}, {"heads": 4, "kernel_sizes": [3, 5]}, {"layer_scale": "none"}]),
            "classes": st.text(st.characters(exclude_categories=["C"]), min_size=1),
            "crop_scale": st.tuples(st.floats(0.1, 0.5), st.floats(0.5, 1)),
            "patience": st.none() | st.integers(1, 9),
            "tensorboard": st.booleans(),
            "weight_decay": st.floats(0),
            "step_epochs": st.lists(st.integers(1, 300), unique=True).map(lambda epochs: tuple(sorted(epochs))),
        },
    )
)
def test_a_written_recipe_can_be_read_back(fields):
    recipe = ClassificationRecipe(variant="fcvit_tiny", **fields)
    assert build_recipe(tomllib.loads(recipe.to_toml()), {}, "stored") == recipe


@pytest.mark.parametrize("text", ["[0.5, 0.4, 0.3]", "0.5,0.4,0.3", "0.5, 0.4, 0.3"])
def test_mean_and_std_of_a_recipe_reach_the_preprocessing(text):
    recipe = read_recipe("digits", {"data": "x", "mean": text, "std": "[1, 1, 1]"})
    assert recipe.preprocessing() == {"mean": (0.5, 0.4, 0.3), "std": (1.0, 1.0, 1.0)}
    with pytest.raises(UsageError, match=r"mean = .*from 0 to 1"):
        read_recipe("digits", {"data": "x", "mean": "123.7,116.3,103.5"})


def test_python_values_are_accepted():
    """Paths and NumPy numbers are valid values of fields."""
    recipe = read_recipe("digits", {"data": Path("images"), "lr": np.float64(0.5), "epochs": np.int64(3), "val": None})
    assert (recipe.data, recipe.lr, recipe.epochs, recipe.val) == ("images", 0.5, 3, None)
    assert read_recipe(Path("digits")) == read_recipe("digits")


def test_recipes_of_earlier_versions_can_be_read():
    """They have no task and none of the fields that were added later."""
    later = ("task", "schedule", "poly_power", "step_epochs", "step_factor")
    recipe = read_recipe("fcvit_b12", {"data": "images"})
    fields = {
        name: value for name, value in dataclasses.asdict(recipe).items() if name not in later and value is not None
    }
    assert build_recipe(fields, {"operators": "plain"}, "run.json") == dataclasses.replace(recipe, operators="plain")
