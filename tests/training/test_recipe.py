"""Recipes: every field has a kind and a range, an unknown one is an error, what is stored is read back."""

import dataclasses
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcvit.data.transforms.augment import Augmentation
from fcvit.errors import UnreadableFile, UsageError
from fcvit.models.variants import VARIANTS
from fcvit.training.recipe import Recipe, build_recipe, read_recipe, shipped

DROP_PATH = {"fcvit_tiny": 0.1, "fcvit_b12": 0.1, "fcvit_b24": 0.1, "fcvit_b48": 0.2}


def toml(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return str(path)


def test_every_shipped_recipe_says_what_it_costs_and_is_read():
    from importlib.resources import files

    for name in shipped():
        given = {"variant": "fcvit_b12", "weights": "y"} if name == "finetune" else {}
        assert read_recipe(name, {"data": "x", **given}).variant in VARIANTS
        head = (files("fcvit") / "recipes" / f"{name}.toml").read_text().split("\n\n")[0]
        assert all(f"# {word}:" in head for word in ("Command", "Hardware", "Cost", "Accuracy")), name


@pytest.mark.parametrize("name", DROP_PATH)
def test_the_authors_recipe(name):
    """Their training recipe, number by number (facts of the paper's repository)."""
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


def test_fields_are_replaced_as_on_the_command_line(tmp_path):
    path = toml(tmp_path, 'variant = "fcvit_tiny"\nclip_norm = 5\nweights = "a.pth"\n')
    words = {"lr": "5e-4", "batch-size": "64", "data": "my folder", "freeze": "true", "crop_scale": "[0.5, 1]"}
    recipe = read_recipe(path, {**words, "clip_norm": "none", "options.competition": "false", "class_weights": "none"})
    assert (recipe.lr, recipe.batch_size, recipe.data, recipe.freeze) == (5e-4, 64, "my folder", True)
    assert (recipe.crop_scale, recipe.clip_norm, recipe.class_weights) == ((0.5, 1.0), None, "none")
    assert recipe.network() == dataclasses.replace(VARIANTS["fcvit_tiny"], competition=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"leraning_rate": "1"}, "no field 'leraning_rate'"),
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
        ({"freeze": "true"}, "expected weights to freeze"),
        ({"ema": "true"}, "expected weights to choose from"),
        ({"learning-rate": "1"}, "did you mean 'lr'"),
        ({"min_lr": "1"}, "highest rate"),
        ({"data.x": "1"}, "only options.NAME"),
        ({"input_size": "0"}, "input size 0"),
        ({"batch_size": "1"}, "at least 2"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, words, message):
    with pytest.raises(UsageError, match=message):
        read_recipe(toml(tmp_path, 'variant = "fcvit_tiny"\n'), words)


def test_words_stay_words_where_text_is_meant(tmp_path):
    """A folder may be called 2024 or true."""
    for word in ("2024", "true", "1979-05-27", "a#b"):
        recipe = read_recipe(toml(tmp_path, 'variant = "fcvit_tiny"\n'), {"data": word, "val": word})
        assert (recipe.data, recipe.val) == (word, word)
    assert read_recipe(toml(tmp_path, 'variant = "fcvit_tiny"\nval = "x"\n'), {"val": "none"}).val is None


def test_files_that_are_none(tmp_path):
    with pytest.raises(UnreadableFile, match="or one of cifar10-7k, digits"):
        read_recipe(str(tmp_path / "nothing.toml"))
    with pytest.raises(UnreadableFile, match="not TOML"):
        read_recipe(toml(tmp_path, "variant fcvit"))
    with pytest.raises(UsageError, match="no variant"):
        read_recipe(toml(tmp_path, "epochs = 3"))


def test_a_recipe_augments_by_default_as_the_augmentation_does():
    """Both state the authors' numbers; they must be the same."""
    assert Recipe(variant="fcvit_tiny").augmentation(224) == Augmentation(size=224)


def test_every_field_stands_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")
    assert [field.name for field in dataclasses.fields(Recipe) if f"| `{field.name}` |" not in text] == []


def test_only_fields_that_are_nothing_by_default_may_be_nothing():
    """TOML has no word for nothing: such a field is left out, and must then be nothing."""
    for field in dataclasses.fields(Recipe):
        assert (type(None) in typing.get_args(field.type)) == (field.default is None), field.name


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
        },
    )
)
def test_what_is_stored_is_read_back(fields):
    import tomllib

    recipe = Recipe(variant="fcvit_tiny", **fields)
    assert build_recipe(tomllib.loads(recipe.to_toml()), {}, "stored") == recipe


@pytest.mark.parametrize("text", ["[0.5, 0.4, 0.3]", "0.5,0.4,0.3", "0.5, 0.4, 0.3"])
def test_mean_and_std_of_a_recipe_reach_the_preprocessing(text):
    recipe = read_recipe("digits", {"data": "x", "mean": text, "std": "[1, 1, 1]"})
    assert recipe.preprocessing() == {"mean": (0.5, 0.4, 0.3), "std": (1.0, 1.0, 1.0)}
    with pytest.raises(UsageError, match=r"mean = .*from 0 to 1"):
        read_recipe("digits", {"data": "x", "mean": "123.7,116.3,103.5"})
