"""Test folders of the Hugging Face Hub, sharded files, and other files that are often next to a checkpoint."""

import json
import pickle

import numpy as np
import pytest

from conftest import needs_torch, write_pth
from fcvit.errors import DoesNotFit, UnreadableFile
from fcvit.frameworks import import_framework
from fcvit.weights import safetensors_file
from fcvit.weights.checkpoint import SAFETENSORS
from fcvit.weights.reading import read_weights


def assert_same_tensors(weights, tensors):
    assert list(weights.tensors) == list(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(weights.tensors[name], tensor)


@pytest.fixture
def shards(tmp_path, digits_tensors):
    """Write two shards and their index. Some tests move the names of tensors between the shards."""
    names = list(digits_tensors)
    file_of = {name: f"part-{1 + (index >= 100)}.safetensors" for index, name in enumerate(names)}
    for file in set(file_of.values()):
        part = {name: digits_tensors[name] for name in names if file_of[name] == file}
        safetensors_file.write(tmp_path / file, part, {"format": "pt"})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": file_of}))
    return index


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_the_weights_in_a_folder_are_read(tmp_path, digits_tensors, name):
    if name.endswith(".bin"):
        write_pth(tmp_path / name, digits_tensors)
    else:
        safetensors_file.write(tmp_path / name, digits_tensors, {"format": "pt"})
    weights = read_weights(tmp_path)
    assert_same_tensors(weights, digits_tensors)
    assert weights.source.path == tmp_path / name
    (note,) = weights.notes
    assert str(tmp_path) in note and name in note


@pytest.mark.parametrize(
    ("file", "content", "used"),
    [
        ("config.json", {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}, True),
        ("preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}, True),
        ("config.json", {"hidden_sizes": [1, 2]}, False),
        ("config.json", [1], False),
    ],
)
def test_settings_in_the_folder_specify_the_preprocessing(tmp_path, digits_tensors, file, content, used):
    safetensors_file.write(tmp_path / "model.safetensors", digits_tensors, {})
    (tmp_path / file).write_text(json.dumps(content))
    preprocessing = read_weights(tmp_path).preprocessing
    assert (preprocessing is not None) is used
    if preprocessing is not None:
        assert (preprocessing.mean, preprocessing.std) == ((0.5,) * 3, (0.25,) * 3)


def test_safetensors_is_preferred_to_a_pickle(tmp_path, digits_tensors):
    write_pth(tmp_path / "pytorch_model.bin", {"x": np.ones(3, np.float32)})
    safetensors_file.write(tmp_path / "model.safetensors", digits_tensors, {})
    assert_same_tensors(read_weights(tmp_path), digits_tensors)


def test_shards_are_read_by_their_index(tmp_path, shards, digits_tensors):
    weights = read_weights(shards)
    assert_same_tensors(weights, digits_tensors)
    assert weights.source.format == f"{SAFETENSORS} in 2 shards"
    assert_same_tensors(read_weights(tmp_path), digits_tensors)
    sha256 = weights.source.sha256
    (tmp_path / "part-2.safetensors").unlink()
    changed = {**digits_tensors, "head.bias": digits_tensors["head.bias"] + 1}
    part = {name: changed[name] for name in list(changed)[100:]}
    safetensors_file.write(tmp_path / "part-2.safetensors", part, {"format": "pt"})
    assert read_weights(shards).source.sha256 != sha256


def test_a_missing_shard_is_named(tmp_path, shards):
    (tmp_path / "part-2.safetensors").unlink()
    with pytest.raises(UnreadableFile, match=r"part-2\.safetensors .*missing"):
        read_weights(shards)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b", "..\\b", "", "."])
def test_a_shard_outside_the_folder_is_rejected(shards, name):
    index = json.loads(shards.read_text())
    index["weight_map"]["head.bias"] = name
    shards.write_text(json.dumps(index))
    with pytest.raises(UnreadableFile, match=r"outside the folder|missing"):
        read_weights(shards)


def test_an_index_that_contradicts_its_shards_is_rejected(tmp_path, shards, digits_tensors):
    index = json.loads(shards.read_text())
    index["weight_map"]["head.bias"] = "part-1.safetensors"
    shards.write_text(json.dumps(index))
    with pytest.raises(UnreadableFile, match=r"head\.bias is missing from the shard part-1\.safetensors"):
        read_weights(shards)
    safetensors_file.write(tmp_path / "part-1.safetensors", digits_tensors, {})
    with pytest.raises(UnreadableFile, match=r"is in the shard part-1\.safetensors"):
        read_weights(shards)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', "found another index"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "two entries of one name"),
        ('{"weight_map": {}}', "found other JSON"),
        ('{"weight_map": {"a": 3}}', "found other JSON"),
        ('{"epoch": 3}', "found other JSON"),
        ("{broken", "found text"),
        ("{" + '"a":{' * 50_000, "found text"),
    ],
)
def test_an_invalid_index_is_rejected(tmp_path, text, fault):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(UnreadableFile, match=fault):
        read_weights(path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("x.onnx", "pass the checkpoint"),
        ("x.pdiparams", "pass the checkpoint"),
        ("x.xml", "pass the checkpoint"),
        ("x.pdmodel", r"pass .*\.pdparams"),
    ],
)
def test_exported_networks_are_rejected_with_a_remedy(tmp_path, name, remedy):
    (tmp_path / name).write_bytes(bytes(range(20)) * 9)
    with pytest.raises(UnreadableFile, match=remedy):
        read_weights(tmp_path / name)


def test_the_state_of_an_optimizer_is_rejected_with_a_remedy(tmp_path):
    state = {"conv2d_0.w_0_moment1_0": np.ones((2, 2), np.float32), "LR_Scheduler": {"last_epoch": 3}}
    (tmp_path / "x.pdopt").write_bytes(pickle.dumps(state, 4))
    with pytest.raises(UnreadableFile, match=r"Paddle's optimizer; .*\.pdparams"):
        read_weights(tmp_path / "x.pdopt")


@needs_torch
def test_uint16_arrays_in_a_pytorch_file_are_not_bfloat16(tmp_path, digits_tensors):
    """Only Paddle stores bfloat16 as uint16."""
    torch = import_framework("torch")
    changed = {**digits_tensors, "head.bias": np.zeros(10, np.uint16)}
    torch.save(changed, tmp_path / "x.pth")
    with pytest.raises(DoesNotFit, match=r"head\.bias: expected floating-point numbers, found uint16"):
        read_weights(tmp_path / "x.pth")
    torch.save(dict(digits_tensors), tmp_path / "y.pth")
    assert_same_tensors(read_weights(tmp_path / "y.pth"), digits_tensors)
