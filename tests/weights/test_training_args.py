"""Test how the preprocessing is read from training arguments in a checkpoint."""

import argparse
import pickle
import re
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import write_pth
from fcvit.errors import DoesNotFit
from fcvit.models.variants import IMAGENET_MEAN, VARIANTS, Preprocessing
from fcvit.weights.checkpoint import read_checkpoint
from fcvit.weights.header import Header, sidecar
from fcvit.weights.reading import read_weights
from fcvit.weights.training_args import stated_preprocessing

DIGITS = VARIANTS["fcvit_digits"].preprocessing


@pytest.fixture
def read(tmp_path, digits_tensors):
    """Return a function that writes a file with the given entries and a state dict, and reads its weights."""

    def save_and_read(**entries):
        path = tmp_path / "x.pdparams"
        path.write_bytes(pickle.dumps({"state_dict": digits_tensors, **entries}, 4))
        return read_weights(path)

    return save_and_read


def namespace(**values):
    return argparse.Namespace(lr=1e-3, **values)


class Settings(dict):
    """A subclass of dict, as used by yacs and mmengine."""


class Container:
    """A container or a value as stored by OmegaConf."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def container(content):
    if isinstance(content, dict):
        return Container(_metadata=None, _content={name: container(value) for name, value in content.items()})
    if isinstance(content, list):
        return Container(_metadata=None, _content=[container(value) for value in content])
    return Container(_metadata=None, _val=content)


STATED = {
    "a namespace": {"args": namespace(mean=[0.5, 0.5, 0.5], std=(0.25, 0.25, 0.25))},
    "a dictionary": {"args": {"mean": [0.5] * 3, "std": [0.25] * 3}},
    "another object": {"cfg": types.SimpleNamespace(mean=[0.5] * 3, std=[0.25] * 3)},
    "text": {"args": {"mean": "0.5 0.5 0.5", "std": "0.25, 0.25, 0.25"}},
    "text like a tuple": {"args": {"mean": "(0.5, 0.5, 0.5)", "std": "[0.25, 0.25, 0.25]"}},
    "one number": {"args": namespace(mean=0.5, std=[0.25])},
    "arrays": {"args": {"mean": np.full(3, 0.5), "std": np.full((3, 1, 1), 0.25, np.float32)}},
    "NumPy numbers": {"args": {"mean": [np.float64(0.5)] * 3, "std": [np.float32(0.25)] * 3}},
    "for images from 0 to 255": {"args": {"mean": [127.5] * 3, "std": [63.75] * 3}},
    "YAML with lists": {"args": "lr: 0.1\nmean:\n- 0.5\n- 0.5\n- 0.5\nstd:\n  - 0.25\n  - 0.25\n  - 0.25\n"},
    "YAML on a line": {"args": "mean: [0.5, 0.5, 0.5]\nstd: [0.25, 0.25, 0.25]\ninput_size: null\n"},
    "JSON": {"args": '{"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}'},
    "a part of the settings": {"config": {"data": {"mean": [0.5] * 3, "std": [0.25] * 3}, "lr": 0.1}},
    "hyperparameters": {"hyper_parameters": {"args": namespace(mean=[0.5] * 3, std=[0.25] * 3)}},
    "timm's settings": {"pretrained_cfg": {"mean": (0.5,) * 3, "std": (0.25,) * 3, "input_size": (3, 32, 32)}},
    "at the top level": {"mean": [0.5] * 3, "std": [0.25] * 3},
    "a subclass of dict": {"cfg": Settings(mean=[0.5] * 3, std=[0.25] * 3)},
    "an OmegaConf container": {"hyper_parameters": container({"mean": [0.5] * 3, "std": [0.25] * 3, "size": None})},
    "names in capitals": {"cfg": {"MODEL": {"PIXEL_MEAN": [0.5] * 3, "PIXEL_STD": [0.25] * 3}}},
    "a list of steps": {"config": {"eval": {"steps": [{"Resize": 32}, {"Normalize": {"mean": 0.5, "std": 0.25}}]}}},
    "arguments under another name": {"training_options": {"dataset_mean": [0.5] * 3, "dataset_std": [0.25] * 3}},
}


@pytest.mark.parametrize("form", STATED)
def test_mean_and_std_are_used_and_reported(read, form):
    weights = read(**STATED[form])
    preprocessing = weights.preprocessing
    np.testing.assert_allclose((preprocessing.mean, preprocessing.std), ((0.5,) * 3, (0.25,) * 3))
    assert (preprocessing.input_size, preprocessing.crop_fraction) == (32, 1.0)
    assert any("training arguments in the file: mean (0.5" in note for note in weights.notes)


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        ({"img_size": 64}, "input_size", 64),
        ({"img_size": "64"}, "input_size", 64),
        ({"img_size": None, "input_size": [3, 64, 64]}, "input_size", 64),
        ({"img_size": 32, "input_size": (64, 64)}, "input_size", 64),
        ({"crop_pct": 0.875}, "crop_fraction", 0.875),
        ({"crop_pct": "0.875"}, "crop_fraction", 0.875),
        ({"eval_crop_ratio": 0.875}, "crop_fraction", 0.875),
        ({"interpolation": "bilinear"}, "interpolation", "bilinear"),
        ({"interpolation": "InterpolationMode.BILINEAR"}, "interpolation", "bilinear"),
        ({"interpolation": 2}, "interpolation", "bilinear"),
    ],
)
def test_other_fields_are_used_too(read, arguments, field, value):
    weights = read(args=argparse.Namespace(**arguments))
    assert getattr(weights.preprocessing, field) == value
    assert any(f"{field} {value}" in note for note in weights.notes)


@pytest.mark.parametrize("arguments", [{}, {"mean": None, "std": None, "interpolation": "", "img_size": None}])
def test_unset_fields_use_the_variants_values(read, arguments):
    weights = read(args=namespace(**arguments))
    assert weights.preprocessing is None and weights.notes == ()


def test_float32_numbers_become_the_written_decimals(read):
    weights = read(args={"mean": np.array([0.485, 0.456, 0.406], np.float32), "std": np.full(3, 0.2, np.float32)})
    assert (weights.preprocessing.mean, weights.preprocessing.std) == (IMAGENET_MEAN, (0.2, 0.2, 0.2))


def test_values_equal_to_the_variants_give_no_note(read):
    weights = read(args=namespace(img_size=32, mean=list(IMAGENET_MEAN), crop_pct=1.0))
    assert weights.preprocessing == DIGITS and weights.notes == ()


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ({"args": {"interpolation": "lanczos"}}, "args in the file .*interpolation 'lanczos'.*--interpolation"),
        ({"args": {"mean": [0.5, 0.5]}}, r"mean \[0.5, 0.5\].*--mean"),
        ({"args": {"input_size": [3, 32, 64]}}, "input_size.*--input-size"),
        ({"args": {"crop_pct": 1.5}}, "crop fraction 1.5.*--crop-fraction"),
        ({"args": {"std": [0, 0, 0]}}, "std.*above 0.*--std"),
        ({"args": {"mean": [0.5] * 3, "std": [58.0] * 3}}, r"mean \(0.5.*std \(58.0.*--mean and --std"),
        ({"args": {"img_size": 64}, "cfg": {"img_size": 96}}, r"input_size twice \(64 and 96\)"),
    ],
)
def test_unusable_values_are_reported_with_the_option_to_use(read, entries, fault):
    weights = read(**entries)
    assert weights.preprocessing is None
    assert any(re.search(fault, note) for note in weights.notes), weights.notes


def test_many_unusable_arguments_give_few_notes(read):
    weights = read(args={f"part{index}": {"mean": [1000 + index] * 3, "std": [1] * 3} for index in range(500)})
    assert len(weights.notes) <= 3


def test_arguments_that_refer_to_each_other_are_read_once(read):
    inner: dict = {"lr": 0.1}
    for _ in range(20):
        inner = {f"part{index}": inner for index in range(20)}
    inner["again"] = inner
    assert read(config=inner, other_config=[inner] * 100).notes == ()


def test_other_means_are_ignored(read):
    weights = read(metrics={"mean": 0.5, "std": 0.1}, args={"scores": {"mean": 0.4}}, mean=0.3)
    assert weights.preprocessing is None and weights.notes == ()


@pytest.mark.parametrize(("size", "fits"), [(64, True), (96, False)])
def test_a_header_that_contradicts_the_arguments_is_rejected(tmp_path, digits_tensors, size, fits):
    path = tmp_path / "x.pdparams"
    path.write_bytes(pickle.dumps({"state_dict": digits_tensors, "args": {"img_size": 64}}, 4))
    spec = read_weights(path).spec
    sha256 = read_checkpoint(path).sha256
    header = Header(spec, "torch", Preprocessing(size, 1.0), weights_sha256=sha256)
    sidecar(path).write_text(header.to_json())
    if fits:
        assert read_weights(path).preprocessing.input_size == 64
        return
    with pytest.raises(DoesNotFit, match=r"input_size 64, .*header specifies 96; remove or correct x\.pdparams\.json"):
        read_weights(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["mean", "std", "input_size", "crop_pct", "interpolation"]), VALUES))
def test_arguments_of_any_kind_are_used_or_ignored(arguments):
    change, notes = stated_preprocessing({"args": arguments}, np.asarray)
    assert Preprocessing(**change) and all(len(note) < 1000 for note in notes)


def test_arguments_that_contain_themselves_are_reported_briefly(read):
    """A small file can describe a list that would be infinite or very long in print."""
    itself, large = [], [0.5] * 4
    itself += [itself, itself]
    for _ in range(40):
        large = [large] * 4
    weights = read(args={"mean": itself, "std": large, "img_size": 10**5000, "crop_pct": {"a": large}})
    assert weights.preprocessing is None
    assert [note.split(" specifies ")[1].split(",")[0] for note in weights.notes] == [
        "img_size a value of type int",
        "crop_pct a value of type dict",
        "mean a value of type list",
        "std a value of type list",
    ]


def test_arguments_are_written_to_the_header_and_options_override_them(tmp_path, digits_tensors):
    from fcvit.commands.convert import convert

    source = tmp_path / "x.pdparams"
    source.write_bytes(pickle.dumps({"state_dict": digits_tensors, "args": {"mean": [0.5] * 3, "img_size": 64}}, 4))
    convert(source, tmp_path / "y.safetensors", preprocessing={"input_size": 48}, verify=False)
    preprocessing = read_weights(tmp_path / "y.safetensors").preprocessing
    assert (preprocessing.mean, preprocessing.input_size) == ((0.5,) * 3, 48)


def test_a_plain_state_dict_specifies_no_preprocessing(tmp_path, digits_tensors):
    assert read_weights(write_pth(tmp_path / "x.pth", digits_tensors)).preprocessing is None
