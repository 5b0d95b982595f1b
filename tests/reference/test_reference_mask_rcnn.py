"""Mask R-CNN in the PyTorch reference against the numbers of mmdetection and mmcv, in float64."""

import dataclasses

import numpy as np
import pytest

from conftest import needs_torch, sha256
from detection_goldens import (
    SALT,
    SIZES,
    UNIT_ARRAYS,
    UNITS,
    Case,
    assert_close,
    assert_summary,
    numbers,
    random_boxes,
    uniform,
)
from fcvit.models.spec import MaskRCNNOptions, ModelSpec
from fcvit.models.variants import VARIANTS
from fcvit.weights.synthetic import synthetic_tensors

pytestmark = needs_torch
HEIGHT, WIDTH = UNITS["numbers"]["image"]
STRIDES = (4, 8, 16, 32, 64)
IMAGE_SIZES = np.array([(HEIGHT - 7, WIDTH - 3), (HEIGHT, WIDTH - 20)])


def draw(tag, shape, scale=1.0):
    import torch

    return torch.from_numpy(numbers(tag, shape, scale))


def draw_boxes(tag, count, **options):
    import torch

    return torch.from_numpy(random_boxes(tag, count, **options))


@pytest.fixture(scope="module")
def network():
    """A reference network with three classes and synthetic weights, in float64."""
    import torch

    from fcvit.reference.build import build_reference

    spec = ModelSpec(VARIANTS["fcvit_tiny"], 3, "mask_rcnn", MaskRCNNOptions())
    return build_reference(spec, synthetic_tensors(spec, SALT), torch.float64).requires_grad_(False)


@pytest.mark.parametrize("level", range(5))
def test_anchors(level):
    import torch

    from fcvit.reference.mask_rcnn import base_anchors, grid_anchors

    stride, like = STRIDES[level], torch.zeros((), dtype=torch.float64)
    np.testing.assert_allclose(base_anchors(stride, 8, like), UNIT_ARRAYS["anchors.base"][level], rtol=1e-15)
    np.testing.assert_array_equal(base_anchors(stride, 8, like.float()), UNIT_ARRAYS["anchors.base_float32"][level])
    about = UNITS["anchors"][level]
    assert_summary(grid_anchors(stride, SIZES[level], 8, like).numpy(), about)
    assert sha256(grid_anchors(stride, SIZES[level], 8, like.float()).numpy()) == about["float32_sha256"]


@pytest.mark.parametrize("part", ["rpn", "roi"])
def test_box_coder(part):
    from fcvit.reference.mask_rcnn import BOX_STDS, RPN_STDS, decode, encode

    boxes, targets = (draw_boxes(f"coder/{name}", 40) for name in ("src", "dst"))
    deltas = draw(f"coder/{part}/delta", (40, 12), 15 if part == "roi" else 3)
    stds = RPN_STDS if part == "rpn" else BOX_STDS
    assert_close(encode(boxes, targets, stds).numpy(), UNIT_ARRAYS[f"coder.{part}.encode"])
    assert_close(decode(boxes, deltas, stds, [HEIGHT, WIDTH]).numpy(), UNIT_ARRAYS[f"coder.{part}.decode"])
    assert_close(decode(boxes, deltas, stds, None).numpy(), UNIT_ARRAYS[f"coder.{part}.decode_unclipped"])


def test_levels_of_boxes():
    import torch

    from fcvit.reference.mask_rcnn import roi_levels

    levels = roi_levels(torch.from_numpy(UNIT_ARRAYS["level.rois"]), 56)
    np.testing.assert_array_equal(levels, UNIT_ARRAYS["level.level"])


@pytest.mark.parametrize(("part", "size"), [("box", 7), ("mask", 14)])
def test_roi_align_and_its_gradient(part, size):
    import torch

    from fcvit.reference.mask_rcnn import pyramid_align

    height, width = UNITS["numbers"]["roi_image"]
    maps = [draw(f"roialign/p{i + 2}", (2, 3, height // s, width // s)) for i, s in enumerate(STRIDES[:4])]
    for one in maps:
        one.requires_grad_()
    rois = torch.from_numpy(UNIT_ARRAYS["roialign.rois"]).requires_grad_()
    output = pyramid_align(maps, rois, size, 56)
    if part == "box":
        assert_close(output.detach().numpy(), UNIT_ARRAYS["roialign.box"])
    else:
        assert_summary(output.detach().numpy(), UNITS["roialign.mask"])
    (output * draw(f"roialign/{part}/grad", output.shape)).sum().backward()
    assert rois.grad is None
    for one, about in zip(maps, UNITS[f"roialign.{part}.input_grad"], strict=True):
        assert_summary(one.grad.numpy(), about)


def test_roi_align_of_no_boxes_is_empty():
    import torch

    from fcvit.reference.mask_rcnn import pyramid_align

    maps = [torch.zeros(1, 3, 8, 8)] * 4
    assert pyramid_align(maps, torch.zeros(0, 5), 7, 56).shape == (0, 3, 7, 7)


def test_neck_and_rpn_head(network):
    widths = VARIANTS["fcvit_tiny"].widths
    stages = [
        draw(f"neck/in{i}", (1, width, *size)) for i, (width, size) in enumerate(zip(widths, SIZES, strict=False))
    ]
    for values, about in zip(network.neck(stages), UNITS["neck"], strict=True):
        assert_summary(values.numpy(), about)
    maps = [draw(f"rpn/in{i}", (1, 256, *size)) for i, size in enumerate(SIZES)]
    for outputs, name in zip(network.rpn_head(maps), ("rpn_cls", "rpn_bbox"), strict=True):
        for values, about in zip(outputs, UNITS[name], strict=True):
            assert_summary(values.numpy(), about)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "before", "after"), [("test", 1000, 1000), ("small", 100, 60), ("train", 2000, 1000)])
def test_proposals(network, case, before, after):

    scores = [draw(f"proposals/cls{i}", (2, 3, *size), 2) for i, size in enumerate(SIZES)]
    deltas = [draw(f"proposals/reg{i}", (2, 12, *size), 0.3) for i, size in enumerate(SIZES)]
    margins = {}
    results = network.propose(scores, deltas, IMAGE_SIZES, before, after, margins)
    for image, rows in enumerate(results):
        if case == "train":
            assert_summary(rows.numpy(), UNITS["proposals.train"]["rows"][image])
        else:
            assert_close(rows.numpy(), UNIT_ARRAYS[f"proposals.{case}{image}"])
    expected = UNITS[f"proposals.{case}"]["margin"]
    assert margins["proposal NMS: IoU"] == pytest.approx(expected["nms iou"], rel=1e-6)
    assert margins["proposal NMS: order"] == pytest.approx(expected["score order"], rel=1e-6)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_nms_within_groups(monkeypatch, split, threshold):
    import torch

    from fcvit.reference import mask_rcnn

    monkeypatch.setattr(mask_rcnn, "SPLIT_NMS", 0 if split else 10_000)
    boxes = draw_boxes("nms/boxes", 250, small=16)
    scores = torch.from_numpy(uniform("nms/scores", 250))
    kept = mask_rcnn.batched_nms(boxes, scores, torch.arange(250) % 3, threshold)
    np.testing.assert_array_equal(kept, UNIT_ARRAYS[f"nms.{threshold}"])


def test_box_head_and_mask_head(network):
    head = network.roi_head
    logits, deltas = head.bbox_head(draw("boxhead/in", (6, 256, 7, 7)))
    assert_close(logits.numpy(), UNIT_ARRAYS["boxhead.cls_score"])
    assert_close(deltas.numpy(), UNIT_ARRAYS["boxhead.bbox_pred"])
    assert_summary(head.mask_head(draw("maskhead/in", (2, 256, 14, 14))).numpy(), UNITS["maskhead.logits"])


def test_detections_of_an_image():
    import torch

    from fcvit.reference.mask_rcnn import select

    proposals = draw_boxes("post/boxes", 60, height=HEIGHT - 7, width=WIDTH - 3, small=6)
    logits, deltas = draw("post/cls", (60, 4), 2), draw("post/reg", (60, 12), 0.8)
    scale = torch.tensor(UNITS["post.scale_factor"], dtype=torch.float32).double()
    margins = {}
    boxes, scores, labels = select(
        proposals, logits, deltas, IMAGE_SIZES[0].tolist(), MaskRCNNOptions(), scale, margins
    )
    assert_close(torch.cat([boxes, scores[:, None]], 1).numpy(), UNIT_ARRAYS["post.boxes"])
    np.testing.assert_array_equal(labels, UNIT_ARRAYS["post.labels"])
    assert margins["detection NMS: IoU"] == pytest.approx(UNITS["post.margin"]["nms iou"], rel=1e-6)


def test_pasted_masks():
    import torch

    from fcvit.reference.mask_rcnn import paste_masks

    height, width = UNITS["numbers"]["paste_image"]
    masks = draw("paste/logits", (12, 1, 28, 28), 2)[:, 0].sigmoid()
    pasted = paste_masks(masks, torch.from_numpy(UNIT_ARRAYS["paste.boxes"]), height, width)
    assert pasted.sum((1, 2)).tolist() == UNITS["paste"]["on"]
    np.testing.assert_array_equal(np.packbits(pasted.numpy()), UNIT_ARRAYS["paste.bits"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["e2e_mini", "e2e_mini_batch", "e2e_odd", pytest.param("e2e_b12", marks=pytest.mark.ci)]
)
def test_every_stage_and_all_detections_equal_the_authors_numbers(name):
    import torch

    from fcvit.reference.build import build_reference
    from fcvit.reference.mask_rcnn import paste_masks, to_rois

    case, margins = Case(name), {}
    golden, arrays, sizes = case.golden, case.arrays, case.image_sizes
    model = build_reference(case.spec, synthetic_tensors(case.spec, case.salt), torch.float64)
    with torch.inference_mode():
        backbone = model.backbone(torch.from_numpy(case.images).double())
        neck = model.neck(backbone)
        logits, deltas = model.rpn_head(neck)
        proposals = model.propose(logits, deltas, sizes, margins=margins)
        features = model.roi_head.box_features(neck, to_rois([one[:, :4] for one in proposals]))
        scores, moves = model.roi_head.bbox_head(features)
        detections = model.detect(neck, proposals, sizes, case.scale_factors, margins)
    masks = torch.cat([one.mask_logits for one in detections])
    levels = {"backbone": backbone, "neck": neck, "rpn_cls": logits, "rpn_bbox": deltas}
    wholes = {"roi_feats": features, "cls_score": scores, "bbox_pred": moves, "mask_logits": masks}
    for stage, values in levels.items():
        for value, summary in zip(values, golden[stage], strict=True):
            assert_summary(value.numpy(), summary)
    for stage, value in wholes.items():
        assert_summary(value.numpy(), golden[stage])
    assert_close(masks[:6].numpy(), arrays["mask_logits"])
    for image, (proposed, found) in enumerate(zip(proposals, detections, strict=True)):
        assert_close(proposed.numpy(), arrays[f"proposals{image}"])
        assert_close(torch.cat([found.boxes, found.scores[:, None]], 1).numpy(), arrays[f"boxes{image}"])
        np.testing.assert_array_equal(found.labels, arrays[f"labels{image}"])
        pasted = paste_masks(found.mask_logits.sigmoid(), found.boxes, *case.original_sizes[image].tolist())
        np.testing.assert_array_equal(pasted, case.masks(image))
    recorded = golden["margins"]
    assert margins["proposal NMS: order"] == pytest.approx(recorded["proposal order"], rel=1e-4)
    assert margins["detection NMS: IoU"] == pytest.approx(recorded["detection nms iou"], rel=1e-4)
    assert margins["score threshold"] == pytest.approx(recorded["score 0.05"], rel=1e-4)
    assert margins["samples per bin"] == pytest.approx(
        min(recorded["box samples per bin"], recorded["mask samples per bin"]), rel=1e-4
    )


@pytest.mark.slow
def test_an_image_without_proposals_has_no_detections(network):
    import torch

    maps = [torch.zeros(2, 256, *size, dtype=torch.float64) for size in SIZES]
    proposals = [torch.zeros(0, 5, dtype=torch.float64), draw_boxes("post/boxes", 3)]
    empty, other = network.detect(maps, proposals, IMAGE_SIZES, np.ones((2, 4), np.float32))
    assert empty.boxes.shape == (0, 4) and empty.mask_logits.shape == (0, 28, 28) and len(other.boxes) > 0
    assert len(network.detect(maps, [proposals[0]] * 2, IMAGE_SIZES)[1].labels) == 0


@pytest.mark.slow
def test_the_whole_network_without_masks_returns_detections_in_pixels_of_the_input():
    import torch

    from fcvit.reference.build import build_reference

    case = Case("e2e_mini")
    spec = dataclasses.replace(case.spec, options=dataclasses.replace(case.spec.options, masks=False))
    model = build_reference(spec, synthetic_tensors(spec, case.salt), torch.float64)
    with torch.inference_mode():
        (found,) = model(torch.from_numpy(case.images).double(), case.image_sizes)
    assert found.mask_logits is None and len(found.scores) == 100
    assert found.boxes[:, 2].max() == case.image_sizes[0, 1] and found.boxes.min() == 0
