"""Checkpoints of mmsegmentation are read, converted in both directions and verified."""

import json
import shutil

import numpy as np
import pytest

from conftest import GOLDEN, golden_json, needs_paddle, needs_torch, write_pth
from fcvit.commands.convert import convert
from fcvit.commands.inspect import inspect
from fcvit.errors import DoesNotFit, FreshWeights
from fcvit.models.spec import ModelSpec, SemanticFPNOptions
from fcvit.models.variants import VARIANTS
from fcvit.weights.header import Header
from fcvit.weights.reading import WeightsDoNotFit, read_weights
from fcvit.weights.synthetic import synthetic_tensors

FILE, ABOUT = GOLDEN / "segmentation" / "mmseg_small.pth", golden_json("segmentation/mmseg_small.json")
SMALL = ModelSpec(VARIANTS["fcvit_digits"], 5, "semantic_fpn", SemanticFPNOptions(16, 8))


def test_the_task_variant_options_classes_and_colors_are_recognized():
    weights = read_weights(FILE)
    assert weights.spec.task == "segmentation" and weights.spec.num_classes == 150
    assert weights.spec.variant.widths == (8, 16, 24, 32) and weights.spec.options == SemanticFPNOptions(16, 8)
    assert list(weights.tensors) == ABOUT["order"]
    assert weights.classes[7].name == "bed" and weights.palette[2] == (6, 230, 230)
    assert weights.skipped == ("meta", "optimizer") and not weights.notes
    described = inspect(FILE)
    assert described["skipped"] == ["meta", "optimizer"] and described["num_classes"] == 150


def test_every_tensor_has_the_stored_values():
    expected = synthetic_tensors(read_weights(FILE).spec, ABOUT["salt"])
    for name, tensor in read_weights(FILE).tensors.items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(tensor, expected[name])


@needs_paddle
@needs_torch
@pytest.mark.slow
def test_a_conversion_to_paddle_and_back_is_verified_and_exact(tmp_path):
    first = convert(FILE, tmp_path / "a.safetensors")
    assert first.verification.passed and first.verification.comparison.float64_difference < 1e-11
    layers = [layer.name for layer in first.verification.comparison.drift]
    assert {"backbone.network.6", "backbone.norm0", "neck.fpn_convs.0", "decode_head"} <= {*layers}
    convert(tmp_path / "a.safetensors", tmp_path / "back.pth")
    original, back = read_weights(FILE), read_weights(tmp_path / "back.pth")
    assert list(back.tensors) == list(original.tensors)
    assert all(back.tensors[n].tobytes() == original.tensors[n].tobytes() for n in original.tensors)
    assert (back.classes, back.palette, back.spec) == (original.classes, original.palette, original.spec)


def test_names_with_the_prefix_of_data_parallel_are_read(tmp_path):
    tensors = synthetic_tensors(SMALL)
    path = write_pth(tmp_path / "x.pth", {f"module.{name}": tensor for name, tensor in tensors.items()})
    weights = read_weights(path)
    assert weights.spec.options == SMALL.options and list(weights.tensors) == list(tensors)


@pytest.mark.parametrize("name", ["neck.fpn_convs.2.conv.weight", "decode_head.scale_heads.3.4.bn.running_var"])
def test_a_missing_or_misshapen_tensor_of_neck_and_head_is_reported(tmp_path, name):
    tensors = synthetic_tensors(SMALL)
    tensors[name] = tensors[name][:-1]
    with pytest.raises(WeightsDoNotFit, match=name):
        read_weights(write_pth(tmp_path / "x.pth", tensors))
    del tensors[name]
    with pytest.raises(WeightsDoNotFit, match=name):
        read_weights(write_pth(tmp_path / "x.pth", tensors))


def test_a_file_without_the_pyramid_is_rejected(tmp_path):
    tensors = {n: t for n, t in synthetic_tensors(SMALL).items() if not n.startswith("neck.")}
    with pytest.raises(DoesNotFit, match="neck"):
        read_weights(write_pth(tmp_path / "x.pth", tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_options": {"neck": 0}}, "neck"),
        ({"head_options": {"neck": "16"}}, "neck"),
        ({"head_options": {"depth": 3}}, "depth"),
        ({"palette": [[0, 0, 0]]}, "1 colors for 5 outputs"),
        ({"palette": [[0, 0, 256]] * 5}, "0 to 255"),
        ({"palette": 5}, "0 to 255"),
    ],
)
def test_damaged_headers_are_rejected(change, message):
    text = Header(SMALL, "paddle", palette=((1, 2, 3),) * 5).to_json()
    assert Header.from_json(text).palette == ((1, 2, 3),) * 5
    with pytest.raises(ValueError, match=message):
        Header.from_json(json.dumps(json.loads(text) | change))


@needs_paddle
@pytest.mark.slow
def test_a_segmentation_network_is_created_from_any_weights(tmp_path):
    import fcvit

    segmenter = write_pth(tmp_path / "segmenter.pth", synthetic_tensors(SMALL))
    classifier = write_pth(tmp_path / "classifier.pth", synthetic_tensors(ModelSpec(SMALL.variant, 10)))
    model = fcvit.create_model("fcvit_digits", segmenter, task="segmentation")
    assert not model.training and model.num_classes == 5 and model.options == SMALL.options
    with pytest.warns(FreshWeights, match=r"segmenter.pth: the last layer for 3 classes \(the file has 5\)"):
        model = fcvit.create_model("fcvit_digits", segmenter, 3, task="segmentation")
    with pytest.warns(FreshWeights, match=r"classifier.pth: neck, decode_head and the four norms"):
        model = fcvit.create_model("fcvit_digits", classifier, 4, task="segmentation")
    expected = read_weights(classifier).tensors["patch_embed.proj.weight"]
    np.testing.assert_array_equal(model.backbone.patch_embed.proj.weight.numpy(), expected)
    assert fcvit.create_model("fcvit_digits", task="segmentation").num_classes == 150
    with pytest.raises(ValueError, match="task 'depth'"):
        fcvit.create_model("fcvit_digits", task="depth")


@needs_paddle
def test_the_backbone_of_a_segmenter_is_read_alone(tmp_path):
    import fcvit

    path = shutil.copy(FILE, tmp_path / "x.pth")
    backbone = fcvit.create_backbone(read_weights(path).spec.variant, path)
    np.testing.assert_array_equal(backbone.norm6.weight.numpy(), read_weights(path).tensors["backbone.norm6.weight"])
