"""Test the export: every format gives correct outputs, wrong outputs leave no file, and metadata is stored."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from conftest import DIGITS, image_by_rule, needs_paddle, needs_torch
from fcvit.commands import export as task
from fcvit.commands.export import export
from fcvit.data.classes import ClassName
from fcvit.data.transforms.preprocess import normalize
from fcvit.errors import MissingExtra, NumbersDisagree, UnreadableFile, UsageError
from fcvit.inference.engines import create_engine
from fcvit.inference.export import ENDINGS, RUNTIME
from fcvit.inference.runtimes import RUNTIMES
from fcvit.metrics.classification import softmax
from fcvit.models.spec import ModelSpec
from fcvit.verification.equivalence import RATIO_LIMIT
from fcvit.weights.reading import read_weights
from fcvit.weights.synthetic import synthetic_tensors

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytestmark = needs_torch

PIXELS = DIGITS.variant.preprocessing


@pytest.fixture
def weights(digits_pth):
    return dataclasses.replace(
        read_weights(digits_pth), classes=tuple(ClassName(f"n{i}", f"dïgit {i}") for i in range(10))
    )


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)


def load(exported, precision="float32"):
    from pathlib import Path

    return RUNTIMES[exported.runtime](Path(exported.files[-1]), 1, precision)


def file_names(folder):
    return sorted(path.name for path in folder.iterdir())


@needs_paddle
@pytest.mark.slow
@pytest.mark.parametrize("target", ENDINGS)
def test_every_format_gives_correct_outputs(target, weights, tmp_path):
    if target == "openvino":
        pytest.importorskip("openvino")
    path = tmp_path / "out" / f"network{ENDINGS[target][-1]}"
    exported = export(weights, path)  # the extension selects the format
    assert exported.runtime == RUNTIME[target] and exported.format == target and exported.files[-1] == str(path)
    assert file_names(path.parent) == sorted(file.rpartition("/")[2] for file in exported.files)
    (check,) = exported.checks
    assert check.passed and 0 < check.ratio <= RATIO_LIMIT and check.images == (26, 32, 32) and not exported.synthetic
    if target == "onnx":
        about = json.loads({p.key: p.value for p in onnx.load(path).metadata_props}["fcvit"])
    else:
        about = json.loads((path.parent / f"{path.name}.fcvit.json").read_text("utf-8"))
    assert about["classes"][3] == ["n3", "dïgit 3"] and about["variant"]["name"] == "fcvit_digits"
    assert about["preprocessing"]["input_size"] == 32 and about["outputs"] == ["logits"]
    assert about["input"] == {
        "layout": "batch, RGB, height, width",
        "type": "float32",
        "values": "(pixel / 255 - mean) / std",
        "size": [32, 32],
    }


@needs_paddle
@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino", pytest.param("paddle", marks=pytest.mark.ci)])
def test_every_format_supports_uint8_inputs_and_probabilities(target, weights, images, tmp_path):
    if target == "openvino":
        pytest.importorskip("openvino")
    logits = create_engine("torch", weights, PIXELS)(images)
    exported = export(weights, tmp_path / f"served{ENDINGS[target][-1]}", target, uint8=True, probabilities=True)
    assert exported.input["type"] == "uint8" and exported.outputs == ("probabilities",)
    assert np.allclose(load(exported)(images)[0], softmax(logits), atol=1e-5)


@pytest.mark.slow
def test_a_dynamic_export_is_checked_at_two_sizes(weights, tmp_path):
    exported = export(weights, tmp_path / "any.onnx", dynamic=True)
    assert [check.images[1:] for check in exported.checks] == [(32, 32), (25, 17)]
    assert exported.input["shape"] == [None, 3, None, None]
    assert load(exported)(np.zeros((2, 3, 50, 41), np.float32))[0].shape == (2, 10)


@pytest.mark.slow
def test_the_image_size_can_be_chosen(weights, tmp_path):
    exported = export(weights, tmp_path / "wide.onnx", size=(40, 33))
    assert exported.checks[0].images[1:] == (40, 33) and exported.input["shape"] == [None, 3, 40, 33]


def test_the_export_can_be_checked_with_given_images(weights, tmp_path):
    path = tmp_path / "photo.png"
    image_by_rule(60, 48).save(path)
    exported = export(weights, tmp_path / "network.onnx", images=[path], size=(32, 24))
    assert exported.checks[0].images == (1, 32, 24)


def spoil_epsilon(model):
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if value.ndim == 0 and 0 < value < 1e-4:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(value * 10, value.dtype), tensor.name))
            return
    raise AssertionError("no epsilon")


def spoil_weight(model):
    tensor = next(t for t in model.graph.initializer if list(t.dims)[1:] == [16, 1, 1])
    value = onnx.numpy_helper.to_array(tensor).copy()
    value.flat[7] += 1e-3
    tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))


def spoil_gelu(model):
    node = next(node for node in model.graph.node if node.op_type == "Gelu")
    node.attribute.append(onnx.helper.make_attribute("approximate", "tanh"))


def spoil_batch(model):
    """Return the output of the first image for all images. Only a batch of several images reveals this."""
    for node in model.graph.node:
        node.input[:] = ["first" if name == "images" else name for name in node.input]
    ends = [onnx.numpy_helper.from_array(np.array([n], np.int64), f"end{n}") for n in (0, 1)]
    model.graph.initializer.extend(ends)
    first = onnx.helper.make_node("Slice", ["images", "end0", "end1", "end0"], ["first"])
    model.graph.node.insert(0, first)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [spoil_epsilon, spoil_weight, spoil_gelu, spoil_batch])
def test_a_planted_error_is_detected_and_no_file_is_left(spoil, weights, tmp_path, monkeypatch):
    write = task.write_export

    def faulty(weights, interface, target, path):
        write(weights, interface, target, path)
        model = onnx.load(path)
        spoil(model)
        onnx.save(model, path)

    monkeypatch.setattr(task, "write_export", faulty)
    (tmp_path / "network.onnx").write_bytes(b"the previous file")
    with pytest.raises(NumbersDisagree, match=r"network\.onnx"):
        export(weights, tmp_path / "network.onnx", overwrite=True)
    assert file_names(tmp_path) == ["digits.pth", "network.onnx"]
    assert (tmp_path / "network.onnx").read_bytes() == b"the previous file"


@pytest.mark.slow
def test_near_zero_layer_scale_is_checked_with_synthetic_weights(tmp_path, weights, monkeypatch, notes):
    """A layer scale of 1e-5 hides errors in the blocks from the check."""
    tensors = {n: t * np.float32(1e-5) if "layer_scale" in n else t for n, t in weights.tensors.items()}
    untrained = dataclasses.replace(weights, tensors=tensors)
    exported = export(untrained, tmp_path / "untrained.onnx")
    assert exported.synthetic and exported.synthetic[0].passed and any("synthetic weights" in text for text in notes)
    write = task.write_export

    def faulty(weights, interface, target, path):
        tensors = dict(weights.tensors)
        tensors["network.0.0.norm2.weight"] = tensors["network.0.0.norm2.weight"] * np.float32(1.01)
        write(dataclasses.replace(weights, tensors=tensors), interface, target, path)

    monkeypatch.setattr(task, "write_export", faulty)
    with pytest.raises(NumbersDisagree):
        export(untrained, tmp_path / "faulty.onnx")
    assert "faulty.onnx" not in file_names(tmp_path)


@pytest.mark.slow
def test_int8_is_calibrated_with_a_folder_of_images(weights, tmp_path, images):
    folder = tmp_path / "some"
    folder.mkdir()
    for index in range(4):
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)).save(
            folder / f"{index}.png"
        )
    exact = load(export(weights, tmp_path / "exact.onnx"))(normalize(images, PIXELS))[0]
    exported = export(weights, tmp_path / "small.onnx", precision="int8", calibration=folder)
    assert exported.precision == "int8" and exported.checks[0].passed
    kinds = {node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node}
    assert "QuantizeLinear" in kinds and {p.key for p in onnx.load(tmp_path / "small.onnx").metadata_props} >= {"fcvit"}
    quantized = load(exported, "int8")(normalize(images, PIXELS))[0]
    assert 1e-4 < np.abs(quantized - exact).max() < np.ptp(exact) / 4
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match=r"none: .*no images.*--calibrate"):
        export(weights, tmp_path / "x.onnx", precision="int8", calibration=tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"output": "a.xml", "format": "onnx"}, UsageError, "end in .onnx"),
        ({"output": "a.json", "format": "openvino"}, UsageError, "end in .xml"),
        ({"output": "a.pb"}, UsageError, r"a.pb: .*expected .onnx \(onnx\), .json \(paddle\)"),
        ({"output": "model"}, UsageError, r"model: .*expected .onnx \(onnx\)"),
        ({"output": "a.pdmodel", "format": "paddle"}, UsageError, "end in .json"),
        ({"format": "tensorrt"}, UsageError, "--format 'tensorrt'"),
        ({"size": (32, 32), "dynamic": True}, UsageError, "leave out --size"),
        ({"precision": "int8"}, UsageError, "--precision int8 and --calibrate FOLDER"),
        ({"calibration": "."}, UsageError, "--precision int8 and --calibrate FOLDER"),
        ({"precision": "float16"}, UsageError, "expected float32, or int8"),
        ({"size": (0, 3)}, UsageError, "image size"),
        ({"output": "digits.pth/a.onnx"}, UnreadableFile, "cannot be written"),
    ],
)
def test_invalid_options_are_rejected(options, error, message, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        export(weights, **{"output": "a.onnx", **options})
    assert file_names(tmp_path) == ["digits.pth"]


def test_paddle_exports_have_a_fixed_size(weights, tmp_path):
    with pytest.raises(UsageError, match="--format paddle"):
        export(weights, tmp_path / "a.json", "paddle", dynamic=True)


def test_a_network_without_classes_has_no_probabilities(weights, tmp_path):
    spec = ModelSpec(DIGITS.variant)
    body = dataclasses.replace(weights, spec=spec, tensors=synthetic_tensors(spec), classes=None)
    with pytest.raises(UsageError, match="no classes"):
        export(body, tmp_path / "a.onnx", probabilities=True)
    assert export(body, tmp_path / "a.onnx").outputs == ("embeddings",)


@pytest.mark.slow
def test_a_dense_backbone_has_four_outputs(weights, tmp_path):
    spec = ModelSpec(DIGITS.variant, head="backbone")
    dense = dataclasses.replace(weights, spec=spec, tensors=synthetic_tensors(spec), classes=None)
    exported = export(dense, tmp_path / "a.onnx", dynamic=True)
    maps = load(exported)(np.zeros((1, 3, 40, 56), np.float32))
    assert [m.shape for m in maps] == [(1, 16, 10, 14), (1, 24, 5, 7), (1, 32, 3, 4), (1, 48, 2, 2)]


def test_an_existing_file_is_replaced_only_with_overwrite(weights, tmp_path):
    (tmp_path / "a.onnx").touch()
    with pytest.raises(UsageError, match="--overwrite"):
        export(weights, tmp_path / "a.onnx")
    assert export(weights, tmp_path / "a.onnx", overwrite=True).bytes == (tmp_path / "a.onnx").stat().st_size


def test_without_a_framework_nothing_is_exported(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("fcvit.inference.check.installed", lambda framework: False)
    with pytest.raises(MissingExtra, match="PyTorch or Paddle"):
        export(weights, tmp_path / "a.onnx")
    assert file_names(tmp_path) == ["digits.pth"]


@needs_paddle
@pytest.mark.slow
def test_paddle_is_the_reference_if_pytorch_is_missing(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("fcvit.inference.check.installed", lambda framework: framework == "paddle")
    (check,) = export(weights, tmp_path / "a.onnx").checks
    assert check.yardstick == "paddle" and check.passed and check.ratio > 0.1
