"""Checkpoints of mmdetection are read, converted in both directions and verified."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from conftest import GOLDEN, needs_paddle, needs_torch, write_pth
from fcvit.commands.convert import convert
from fcvit.commands.inspect import inspect
from fcvit.errors import DoesNotFit, UnreadableFile
from fcvit.models.spec import MaskRCNNOptions, ModelSpec
from fcvit.models.variants import VARIANTS
from fcvit.weights.header import Header
from fcvit.weights.reading import WeightsDoNotFit, read_weights
from fcvit.weights.synthetic import synthetic_tensors

FILE = GOLDEN / "detection" / "mmcv_checkpoint.pth"
LEGACY = GOLDEN / "detection" / "mmcv_checkpoint_legacy.pth"
OPTIONS = MaskRCNNOptions(8, 12, 16, 20)
SMALL = ModelSpec(VARIANTS["fcvit_digits"], 5, "mask_rcnn", OPTIONS)
CONV_LOGITS, FC_REG = "roi_head.mask_head.conv_logits.weight", "roi_head.bbox_head.fc_reg.weight"


def test_the_task_variant_widths_and_classes_are_recognized():
    weights = read_weights(FILE)
    assert weights.spec.task == "detection" and weights.spec.num_classes == 2 and len(weights.tensors) == 258
    assert weights.spec.variant.widths == (16, 32, 64, 128) and weights.spec.variant.depths == (1, 1, 2, 1)
    assert weights.spec.options == MaskRCNNOptions(8, 8, 16, 8)
    assert [one.name for one in weights.classes] == ["cat", "dog"]
    assert weights.skipped == ("meta",)
    described = inspect(FILE)
    assert described["skipped"] == ["meta"] and described["num_classes"] == 2 and not described["problems"]
    assert described["form"] == "custom (Mask R-CNN, 2 classes)"


def test_every_tensor_has_the_stored_values():
    weights = read_weights(FILE)
    expected = synthetic_tensors(weights.spec, "det/checkpoint/")
    for name, tensor in weights.tensors.items():
        np.testing.assert_array_equal(tensor, expected[name], name)


def test_an_older_file_without_the_stages_is_refused():
    with pytest.raises(DoesNotFit, match=r"backbone\.network\.0\.0\.norm1\.weight is missing"):
        read_weights(LEGACY)
    with pytest.raises(WeightsDoNotFit) as error:
        read_weights(LEGACY, variant=read_weights(FILE).spec.variant)
    missing = {problem.name for problem in error.value.problems}
    assert missing == {name for name in read_weights(FILE).tensors if name.startswith("backbone.network.")}
    described = inspect(LEGACY)
    assert described["skipped"] == ["meta", "optimizer"] and "is missing" in described["problems"][0]


@pytest.mark.parametrize("masks", [True, False])
def test_widths_and_the_mask_head_are_read_from_the_shapes(tmp_path, masks):
    spec = dataclasses.replace(SMALL, options=dataclasses.replace(OPTIONS, masks=masks))
    tensors = synthetic_tensors(spec)
    weights = read_weights(write_pth(tmp_path / "x.pth", {f"module.{name}": t for name, t in tensors.items()}))
    read = weights.spec.options
    assert (read.neck, read.rpn, read.box_channels, read.masks) == (8, 12, 16, masks)
    assert not masks or read.mask_channels == 20
    assert list(weights.tensors) == list(tensors) and weights.spec.num_classes == 5


@needs_paddle
@needs_torch
@pytest.mark.slow
def test_a_conversion_to_paddle_and_back_is_verified_and_exact(tmp_path):
    first = convert(FILE, tmp_path / "a.safetensors")
    comparison = first.verification.comparison
    assert first.verification.passed and comparison.float64_difference < 1e-11
    ratios = {layer.name: layer.error_ratio for layer in comparison.drift}
    stages = {"backbone.norm6", "neck.4", "rpn_head.rpn_cls.0", "rpn_head.rpn_reg.4", "roi_head.mask_head"}
    stages |= {"roi_head.box_features", "roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg"}
    assert all(0 < ratios[stage] < 3 for stage in stages)
    assert [(one.name, one.dtype) for one in comparison.objects] == [
        (name, dtype) for dtype in ("float64", "float32") for name in ("proposals", "detections")
    ]
    assert all(one.count >= 100 and not one.unmatched for one in comparison.objects[:2])
    assert 0 < comparison.objects[3].score_difference < 1e-4 and 0 < comparison.objects[3].box_difference < 1e-2
    assert comparison.objects[0].decision
    convert(tmp_path / "a.safetensors", tmp_path / "back.pth", verify=False)
    convert(tmp_path / "a.safetensors", tmp_path / "b.pdparams", verify=False)
    original, back = read_weights(FILE), read_weights(tmp_path / "back.pth")
    for other in (back, read_weights(tmp_path / "b.pdparams")):
        assert list(other.tensors) == list(original.tensors)
        assert all(other.tensors[n].tobytes() == original.tensors[n].tobytes() for n in original.tensors)
        assert (other.classes, other.spec) == (original.classes, original.spec)


@needs_paddle
def test_paddle_has_the_names_and_layouts_of_the_table(tmp_path):
    """Square Linear weights are transposed, the weight of the transposed convolution is not."""
    from fcvit.models.build import build_network

    tensors = synthetic_tensors(SMALL)
    state = build_network(read_weights(write_pth(tmp_path / "x.pth", tensors))).state_dict()
    square, upsample = "roi_head.bbox_head.shared_fcs.1.weight", "roi_head.mask_head.upsample.weight"
    np.testing.assert_array_equal(state[square].numpy(), tensors[square].T)
    np.testing.assert_array_equal(state[upsample].numpy(), tensors[upsample])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "neck.fpn_convs.2.conv.weight",
        "rpn_head.rpn_reg.bias",
        FC_REG,
        "roi_head.mask_head.upsample.weight",
        CONV_LOGITS,
    ],
)
def test_a_missing_or_misshapen_tensor_of_neck_and_heads_is_reported(tmp_path, name):
    tensors = synthetic_tensors(SMALL)
    tensors[name] = tensors[name][:-1]
    with pytest.raises(DoesNotFit, match=name):
        read_weights(write_pth(tmp_path / "x.pth", tensors))
    del tensors[name]
    with pytest.raises(DoesNotFit, match=name):
        read_weights(write_pth(tmp_path / "x.pth", tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"roi_head.bbox_head.fc_cls.weight": (1, 16)}, "fc_cls.bias"),  # only the background
        ({"roi_head.bbox_head.fc_cls.weight": (0, 16)}, "fc_cls"),
        ({"roi_head.bbox_head.fc_cls.weight": ()}, "fc_cls"),
        ({FC_REG: (4, 16), "roi_head.bbox_head.fc_reg.bias": (4,)}, "fc_reg"),  # one box for all classes
        ({CONV_LOGITS: (5,)}, "conv_logits"),
        ({CONV_LOGITS: (5, 0, 1, 1)}, "conv_logits"),
        ({"rpn_head.rpn_conv.weight": ()}, "rpn_conv"),
        ({"rpn_head.rpn_cls.weight": (9, 12, 1, 1), "rpn_head.rpn_cls.bias": (9,)}, "rpn_cls"),  # nine anchors
        ({"roi_head.mask_iou_head.fcs.0.weight": (4, 4)}, "mask_iou_head"),
    ],
)
def test_files_of_other_detectors_are_refused(tmp_path, changes, message):
    tensors = synthetic_tensors(SMALL) | {name: np.zeros(shape, np.float32) for name, shape in changes.items()}
    with pytest.raises(DoesNotFit, match=message) as error:
        read_weights(write_pth(tmp_path / "x.pth", tensors))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neck": 0}, "neck"),
        ({"rpn": "16"}, "rpn"),
        ({"masks": 1}, "masks"),
        ({"anchor_scale": float("nan")}, "NaN|anchor_scale"),
        ({"proposal_iou": 1.5}, "proposal_iou"),
        ({"score_threshold": "0"}, "score_threshold"),
        ({"max_detections": 1 << 40}, "max_detections"),
        ({"depth": 3}, "depth"),
    ],
)
def test_damaged_headers_are_rejected(change, message):
    stored = Header(SMALL, "paddle").to_json()
    assert Header.from_json(stored).spec == SMALL
    fields = json.loads(stored)
    fields["head_options"] |= change
    with pytest.raises(UnreadableFile, match=message):
        Header.from_json(json.dumps(fields))


@needs_paddle
def test_the_backbone_of_a_detector_is_read_alone(tmp_path):
    import fcvit

    path = shutil.copy(FILE, tmp_path / "x.pth")
    backbone = fcvit.create_backbone(read_weights(path).spec.variant, path)
    np.testing.assert_array_equal(backbone.norm6.weight.numpy(), read_weights(path).tensors["backbone.norm6.weight"])
