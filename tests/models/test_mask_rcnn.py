"""Mask R-CNN in Paddle against the numbers of mmdetection with the authors' backbone, in float64."""

import dataclasses
import functools

import numpy as np
import pytest

from conftest import needs_paddle, write_pth
from detection_goldens import MINI, SALT, SIZES, UNIT_ARRAYS, UNITS, Case, assert_close, assert_summary, numbers
from fcvit.errors import DoesNotFit, FreshWeights, UsageError
from fcvit.frameworks import import_framework
from fcvit.models.mask_rcnn.boxes import to_rois
from fcvit.models.mask_rcnn.masks import paste_mask
from fcvit.models.spec import (
    MaskRCNNOptions,
    ModelSpec,
    multiply_accumulates,
    paddle_name,
    parameter_count,
    recognize,
    tensor_specs,
)
from fcvit.models.variants import VARIANTS
from fcvit.weights.reading import read_weights
from fcvit.weights.synthetic import synthetic_tensors
from fcvit.weights.writing import write_weights

CASES = [
    *("e2e_mini", "e2e_mini_batch"),
    pytest.param("e2e_odd", marks=pytest.mark.slow),
    pytest.param("e2e_b12", marks=pytest.mark.ci),
]
SMALL = MaskRCNNOptions(neck=8, rpn=8, box_channels=16, mask_channels=8)

pytestmark = needs_paddle


@functools.cache
def case(name):
    return Case(name)


def network(spec, salt, dtype="float64"):
    from fcvit.models.build import build_network
    from fcvit.weights.checkpoint import MEMORY, Checkpoint
    from fcvit.weights.reading import Weights

    tensors = synthetic_tensors(spec, salt)
    weights = Weights(spec, tensors, Checkpoint("x", MEMORY, {}, None, b""), "torch", None, None, (), ())
    return build_network(weights, dtype)


@functools.cache
def stages(name, dtype="float64"):
    """Return every stage of the network, and its detections."""
    paddle, given = import_framework("paddle"), case(name)
    model = network(given.spec, given.salt, dtype)
    with paddle.no_grad():
        backbone = model.backbone(paddle.to_tensor(given.images.astype(dtype)))
        neck = model.neck(backbone)
        logits, deltas = model.rpn_head(neck)
        proposals = model.propose(logits, deltas, given.image_sizes)
        features = model.roi_head.box_features(neck, to_rois([one[:, :4] for one in proposals]))
        scores, boxes = model.roi_head.bbox_head(features)
        detections = model.detect(neck, proposals, given.image_sizes, given.scale_factors)
    arrays = {
        "backbone": backbone, "neck": neck, "rpn_cls": logits, "rpn_bbox": deltas,
        "roi_feats": features, "cls_score": scores, "bbox_pred": boxes,
    }  # fmt: skip
    values = {n: [x.numpy() for x in v] if isinstance(v, list) else v.numpy() for n, v in arrays.items()}
    return values, proposals, detections


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_stage_and_all_detections_equal_the_authors_numbers_in_float64(name):
    values, proposals, detections = stages(name)
    golden, arrays = case(name).golden, case(name).arrays
    for stage, value in values.items():
        levels = (value, golden[stage]) if isinstance(value, list) else ([value], [golden[stage]])
        for one, summary in zip(*levels, strict=True):
            assert_summary(one, summary)
    for image, (found, proposed) in enumerate(zip(detections, proposals, strict=True)):
        assert_close(proposed, arrays[f"proposals{image}"])
        assert_close(np.concatenate([found.boxes, found.scores[:, None]], axis=1), arrays[f"boxes{image}"])
        np.testing.assert_array_equal(found.labels, arrays[f"labels{image}"])
        masks = [
            paste_mask(logits, box, case(name).original_sizes[image])
            for logits, box in zip(found.mask_logits, found.boxes, strict=True)
        ]
        np.testing.assert_array_equal(masks, case(name).masks(image))
    logits = np.concatenate([found.mask_logits for found in detections])
    assert_summary(logits, golden["mask_logits"])
    assert_close(logits[:6], arrays["mask_logits"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["e2e_mini", "e2e_mini_batch", pytest.param("e2e_odd", marks=pytest.mark.slow)])
def test_float32_detections_are_those_of_float64(name):
    _, _, exact = stages(name)
    _, _, single = stages(name, "float32")
    for image, (one, other) in enumerate(zip(exact, single, strict=True)):
        assert other.boxes.dtype == other.mask_logits.dtype == np.float32
        np.testing.assert_array_equal(one.labels, other.labels)
        assert np.abs(one.scores - other.scores).max() <= 1e-4
        assert np.abs(one.boxes - other.boxes).max() <= 1e-2
        size, different = case(name).original_sizes[image], 0
        for index in range(len(one.labels)):
            pasted = [paste_mask(found.mask_logits[index], found.boxes[index], size) for found in (one, other)]
            different += np.count_nonzero(pasted[0] != pasted[1])
        assert different <= 10


@pytest.mark.slow
def test_the_network_returns_the_detections_of_its_stages():
    paddle, given = import_framework("paddle"), case("e2e_mini_batch")
    model = network(given.spec, given.salt)
    _, _, expected = stages("e2e_mini_batch")
    images = paddle.to_tensor(given.images.astype("float64"))
    for one, other in zip(expected, model(images, given.image_sizes, given.scale_factors), strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.mask_logits, other.mask_logits)
    for found, (height, width) in zip(model(images, given.image_sizes), given.image_sizes, strict=True):
        # Without scale factors, the boxes are in pixels of the input.
        np.testing.assert_array_equal(found.boxes.max(axis=0)[2:], [width, height])


@functools.cache
def unit_network():
    """Return the parts of a network of three classes with the weights of the units. The backbone is not used."""
    return network(ModelSpec(VARIANTS["fcvit_tiny"], 3, "mask_rcnn"), SALT)


def tensor(tag, shape, scale=1.0):
    return import_framework("paddle").to_tensor(numbers(tag, shape, scale))


@pytest.mark.slow
def test_neck_and_rpn_equal_those_of_mmdetection():
    model = unit_network()
    widths = VARIANTS["fcvit_tiny"].widths
    maps = model.neck([tensor(f"neck/in{i}", (1, c, *SIZES[i])) for i, c in enumerate(widths)])
    logits, deltas = model.rpn_head([tensor(f"rpn/in{i}", (1, 256, *size)) for i, size in enumerate(SIZES)])
    for name, values in (("neck", maps), ("rpn_cls", logits), ("rpn_bbox", deltas)):
        for one, summary in zip(values, UNITS[name], strict=True):
            assert_summary(one.numpy(), summary)


@pytest.mark.slow
def test_both_heads_equal_those_of_mmdetection():
    head = unit_network().roi_head
    logits, deltas = head.bbox_head(tensor("boxhead/in", (6, 256, 7, 7)))
    assert_close(logits.numpy(), UNIT_ARRAYS["boxhead.cls_score"])
    assert_close(deltas.numpy(), UNIT_ARRAYS["boxhead.bbox_pred"])
    assert_summary(head.mask_head(tensor("maskhead/in", (2, 256, 14, 14))).numpy(), UNITS["maskhead.logits"])


ROIS = UNIT_ARRAYS["roialign.rois"]


def roi_maps():
    maps = [tensor(f"roialign/p{level + 2}", (2, 3, 480 >> level + 2, 640 >> level + 2)) for level in range(4)]
    for x in maps:
        x.stop_gradient = False
    return maps


@pytest.mark.parametrize(("name", "size"), [("box", 7), ("mask", 14)])
def test_roi_features_and_their_gradient_equal_those_of_mmcv(name, size):
    from fcvit.models.mask_rcnn.network import roi_features

    maps = roi_maps()
    features = roi_features(maps, ROIS, size, 56.0)
    if name == "box":
        assert_close(features.numpy(), UNIT_ARRAYS["roialign.box"])
    else:
        assert_summary(features.numpy(), UNITS["roialign.mask"])
    (features * tensor(f"roialign/{name}/grad", tuple(features.shape))).sum().backward()
    for x, summary in zip(maps, UNITS[f"roialign.{name}.input_grad"], strict=True):
        assert_summary(x.grad.numpy(), summary)


def test_features_and_gradient_are_exact_for_rois_of_less_than_a_cell():
    """Paddle's operator has a wrong gradient for these boxes on a CPU."""
    from fcvit.models.mask_rcnn.network import align_on_device, roi_features

    corners = numbers("corners", (9, 2), 100) % 90
    rois = to_rois([np.concatenate([corners, corners + np.array([3.5, 0.5])], axis=1)])
    maps = roi_maps()
    features = roi_features(maps, rois, 7, 56.0)
    np.testing.assert_allclose(features.numpy(), align_on_device(maps, rois, 7, 56.0).numpy(), atol=1e-12)
    weights = numbers("small/grad", tuple(features.shape))
    (features * tensor("small/grad", tuple(features.shape))).sum().backward()
    # The features are linear in the map.
    assert (maps[0].grad * maps[0]).sum().item() == pytest.approx((features.numpy() * weights).sum(), rel=1e-12)


def test_roi_features_on_a_device_equal_those_on_a_cpu():
    """The operator for devices also runs on a CPU, where only its gradient is wrong."""
    from fcvit.models.mask_rcnn.network import align_on_device

    assert (ROIS[:, 3:] == ROIS[:, 1:3]).any()  # an empty RoI
    assert_close(align_on_device(roi_maps(), ROIS, 7, 56.0).numpy(), UNIT_ARRAYS["roialign.box"])


def test_the_transposed_convolution_has_the_same_layout_in_both_frameworks():
    paddle, torch = import_framework("paddle"), pytest.importorskip("torch")
    x, weight = np.arange(6.0).reshape(1, 3, 1, 2), np.arange(24.0).reshape(3, 2, 2, 2)
    ours = paddle.nn.functional.conv2d_transpose(paddle.to_tensor(x), paddle.to_tensor(weight), stride=2)
    theirs = torch.nn.functional.conv_transpose2d(torch.from_numpy(x), torch.from_numpy(weight), stride=2)
    np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


@pytest.mark.parametrize("masks", [True, False])
def test_names_and_shapes_of_the_network_are_those_of_the_spec(masks):
    from fcvit.models.build import build_detector

    options = dataclasses.replace(SMALL, masks=masks, mask_channels=12 if masks else 256)
    spec = ModelSpec(MINI, 5, "mask_rcnn", options)
    model, _ = build_detector(MINI, None, 5, options=options)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    specs = tensor_specs(spec)
    assert state == {paddle_name(n): s.paddle_shape for n, s in specs.items() if not n.endswith("num_batches_tracked")}
    assert recognize({name: entry.shape for name, entry in specs.items()}).options == options
    assert recognize({name: entry.shape for name, entry in specs.items()}, MINI) == spec


def test_names_and_order_are_those_of_the_authors_files():
    names = [name for name in tensor_specs(ModelSpec(VARIANTS["fcvit_b12"], 80, "mask_rcnn")) if "backbone" not in name]
    weights = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    assert weights == [
        *(f"neck.lateral_convs.{level}.conv" for level in range(4)),
        *(f"neck.fpn_convs.{level}.conv" for level in range(4)),
        *("rpn_head.rpn_conv", "rpn_head.rpn_cls", "rpn_head.rpn_reg"),
        *("roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg"),
        *("roi_head.bbox_head.shared_fcs.0", "roi_head.bbox_head.shared_fcs.1"),
        *(f"roi_head.mask_head.convs.{index}.conv" for index in range(4)),
        *("roi_head.mask_head.upsample", "roi_head.mask_head.conv_logits"),
    ]


@pytest.mark.parametrize(
    ("variant", "parameters", "gmacs"),
    [("fcvit_b12", 34_357_264, 224.0), ("fcvit_b24", 46_615_664, 273.2), ("fcvit_tiny", 24_516_984, 187.4)],
)
def test_parameters_and_multiply_accumulates(variant, parameters, gmacs):
    spec = ModelSpec(VARIANTS[variant], 80, "mask_rcnn")
    assert parameter_count(spec) == parameters
    assert multiply_accumulates(spec, 800, 1280) / 1e9 == pytest.approx(gmacs, abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neck": 0}, "neck = 0: expected a whole number from 1 to 65,536"),
        ({"max_detections": True}, "max_detections = True: expected a whole number from 1 to 65,536"),
        ({"masks": 1}, "masks = 1: expected true or false"),
        ({"proposal_iou": 1.5}, "proposal_iou = 1.5: expected a number from 0 to 1"),
        ({"score_threshold": float("nan")}, "score_threshold = nan: expected a number from 0 to 1"),
        ({"anchor_scale": 0}, "anchor_scale = 0: expected a number from 0.001 to 65,536"),
    ],
)
def test_invalid_options_are_reported(options, message):
    with pytest.raises(UsageError, match=message):
        MaskRCNNOptions(**options)


def test_a_missing_part_is_reported():
    shapes = {name: entry.shape for name, entry in tensor_specs(ModelSpec(MINI, 5, "mask_rcnn", SMALL)).items()}
    del shapes["rpn_head.rpn_conv.weight"]
    with pytest.raises(
        DoesNotFit, match=r"not a Mask R-CNN: rpn_head.rpn_conv.weight is missing, expected 1 to 65,536"
    ):
        recognize(shapes)


@pytest.mark.slow
def test_a_new_network_has_the_initial_values_of_mmdetection():
    from fcvit.models.build import create_model

    import_framework("paddle").seed(0)
    model = create_model("fcvit_tiny", task="detection")
    assert model.num_classes == 80
    expected = {
        "neck.fpn_convs.0.conv": (2 / (2 * 256 * 9)) ** 0.5,
        "rpn_head.rpn_conv": 0.01,
        "rpn_head.rpn_cls": 0.01,
        "roi_head.bbox_head.fc_cls": 0.01,
        "roi_head.bbox_head.fc_reg": 0.001,
        "roi_head.bbox_head.shared_fcs.0": 0.01214,
        "roi_head.bbox_head.shared_fcs.1": 0.03127,
        "roi_head.mask_head.convs.3.conv": (2 / (256 * 9)) ** 0.5,
        "roi_head.mask_head.upsample": (2 / (256 * 4)) ** 0.5,
        "roi_head.mask_head.conv_logits": (2 / 80) ** 0.5,
    }
    state = model.state_dict()
    for name, std in expected.items():
        weight = state[f"{name}.weight"].numpy()
        assert weight.std() == pytest.approx(std, rel=5 / weight.size**0.5)
        assert (state[f"{name}.bias"].numpy() == 0).all()
    bound = (6 / (2 * 256 * 9)) ** 0.5  # Xavier uniform
    assert np.abs(state["neck.fpn_convs.0.conv.weight"].numpy()).max() == pytest.approx(bound, rel=1e-3)


def detector_file(tmp_path, options=SMALL, classes=5):
    spec = ModelSpec(MINI, classes, "mask_rcnn", options)
    return write_pth(tmp_path / "detector.pth", synthetic_tensors(spec)), spec


def test_a_detector_is_built_from_its_file(tmp_path, recwarn):
    from fcvit.models.build import create_model, weights_of

    path, spec = detector_file(tmp_path)
    model = create_model(MINI, path, task="detection")
    assert (model.num_classes, model.options, model.training) == (5, SMALL, False)
    assert not recwarn
    options = dataclasses.replace(SMALL, score_threshold=0.3, anchor_scale=4)
    model.options = options
    stored = weights_of(model, head="mask_rcnn")
    write_weights(tmp_path / "detector.safetensors", stored)
    header_spec = read_weights(tmp_path / "detector.safetensors").spec
    assert stored.spec == header_spec == dataclasses.replace(spec, options=options)
    for name, values in synthetic_tensors(spec).items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(stored.tensors[name], values)


@pytest.mark.slow
def test_new_parts_of_a_detector_are_reported(tmp_path):
    from fcvit.models.build import build_detector, create_model

    path, spec = detector_file(tmp_path)
    with pytest.warns(FreshWeights, match=r"the last layers for 3 classes \(the file has 5\) are newly initialized"):
        model = create_model(MINI, path, 3, task="detection")
    np.testing.assert_array_equal(
        model.rpn_head.rpn_cls.weight.numpy(), synthetic_tensors(spec)["rpn_head.rpn_cls.weight"]
    )
    boxes = detector_file(tmp_path, dataclasses.replace(SMALL, masks=False))[0]
    _, new = build_detector(MINI, read_weights(boxes), options=MaskRCNNOptions())
    assert new == "the mask head"
    model, new = build_detector(MINI, read_weights(boxes))
    assert not model.options.masks and not new
    classifier = write_pth(tmp_path / "classifier.pth", synthetic_tensors(ModelSpec(MINI, 10)))
    with pytest.warns(FreshWeights, match="neck, heads and the four norms are newly initialized"):
        model = create_model(MINI, classifier, task="detection")
    assert model.num_classes == 80
    segmenter = ModelSpec(MINI, 4, "semantic_fpn")
    segmenter_file = write_pth(tmp_path / "segmenter.pth", synthetic_tensors(segmenter))
    with pytest.warns(FreshWeights, match="neck and heads are newly initialized"):
        model = create_model(MINI, segmenter_file, task="detection")
    np.testing.assert_array_equal(
        model.backbone.norm6.weight.numpy(), synthetic_tensors(segmenter)["backbone.norm6.weight"]
    )
    with pytest.raises(UsageError, match="num_classes = 0: expected at least 1"):
        create_model(MINI, task="detection", num_classes=0)


def test_the_backbone_of_a_detector_is_read_from_its_file(tmp_path, recwarn):
    from fcvit.models.build import create_backbone

    path, spec = detector_file(tmp_path)
    backbone = create_backbone(MINI, path)
    assert not recwarn
    np.testing.assert_array_equal(backbone.norm0.weight.numpy(), synthetic_tensors(spec)["backbone.norm0.weight"])


def test_a_detector_can_be_accelerated():
    pytest.importorskip("fcvit.native.network")
    from fcvit.models.build import build_detector
    from fcvit.native.network import NativeFCViTBackbone, accelerate

    model, _ = build_detector(MINI, None, 5, options=SMALL)
    accelerate(model)
    assert type(model.backbone) is NativeFCViTBackbone
