"""The parts of Mask R-CNN in the PyTorch reference against the numbers of mmdetection and mmcv, in float64."""

import zlib

import numpy as np
import pytest

from conftest import golden_arrays, golden_json, needs_torch, sha256
from fcvit.models.spec import MaskRCNNOptions, ModelSpec
from fcvit.models.variants import VARIANTS
from fcvit.verification.equivalence import FLOAT64_LIMIT
from fcvit.weights.synthetic import synthetic_tensors

pytestmark = needs_torch
ABOUT, ARRAYS = golden_json("detection/units.json"), golden_arrays("detection/units.npz")
SALT = ABOUT["salt"]
HEIGHT, WIDTH = ABOUT["numbers"]["image"]
STRIDES = (4, 8, 16, 32, 64)
SIZES = [(-(-HEIGHT // stride), -(-WIDTH // stride)) for stride in STRIDES]
FACES = [(HEIGHT - 7, WIDTH - 3), (HEIGHT, WIDTH - 20)]


def generator(tag):
    return np.random.Generator(np.random.PCG64(zlib.crc32((SALT + tag).encode())))


def draw(tag, shape, scale=1.0):
    import torch

    return torch.from_numpy((scale * generator(tag).standard_normal(shape)).astype(np.float32)).double()


def draw_boxes(tag, count, height, width, small):
    import torch

    u = generator(tag).random((count, 4))
    w, h = small * (width / small) ** u[:, 2], small * (height / small) ** u[:, 3]
    x, y = u[:, 0] * width, u[:, 1] * height
    boxes = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
    boxes = np.minimum(np.maximum(boxes, 0), [width, height, width, height])
    return torch.from_numpy(boxes.astype(np.float32)).double()


def assert_summary(values, about, name=""):
    values = values.detach().numpy()
    assert list(values.shape) == about["shape"], name
    count = min(len(about["value"]), values.size)
    at = values.ravel()[np.arange(count) * (values.size - 1) // max(count - 1, 1)]
    assert np.abs(at - about["value"][:count]).max() <= FLOAT64_LIMIT * (about["std"] or 1), name
    assert abs(values.mean() - about["mean"]) <= FLOAT64_LIMIT * (about["std"] or 1), name


def assert_close(values, golden):
    assert tuple(values.shape) == golden.shape
    assert np.abs(values.detach().numpy() - golden).max() <= FLOAT64_LIMIT * golden.std()


@pytest.fixture(scope="module")
def network():
    """A reference network with three classes and synthetic weights, in float64."""
    import torch

    from fcvit.reference.build import build_reference

    spec = ModelSpec(VARIANTS["fcvit_tiny"], 3, "mask_rcnn", MaskRCNNOptions())
    return build_reference(spec, synthetic_tensors(spec, SALT), torch.float64)


@pytest.mark.parametrize("level", range(5))
def test_anchors(level):
    import torch

    from fcvit.reference.mask_rcnn import base_anchors, grid_anchors

    stride, like = STRIDES[level], torch.zeros((), dtype=torch.float64)
    np.testing.assert_allclose(base_anchors(stride, 8, like), ARRAYS["anchors.base"][level], rtol=1e-15)
    np.testing.assert_array_equal(base_anchors(stride, 8, like.float()), ARRAYS["anchors.base_float32"][level])
    about = ABOUT["anchors"][level]
    assert_summary(grid_anchors(stride, SIZES[level], 8, like), about)
    assert sha256(grid_anchors(stride, SIZES[level], 8, like.float()).numpy()) == about["float32_sha256"]


@pytest.mark.parametrize("part", ["rpn", "roi"])
def test_box_coder(part):
    from fcvit.reference.mask_rcnn import BOX_STDS, RPN_STDS, decode, encode

    boxes, targets = (draw_boxes(f"coder/{name}", 40, HEIGHT, WIDTH, 4) for name in ("src", "dst"))
    deltas = draw(f"coder/{part}/delta", (40, 12), 15 if part == "roi" else 3)
    stds = RPN_STDS if part == "rpn" else BOX_STDS
    assert_close(encode(boxes, targets, stds), ARRAYS[f"coder.{part}.encode"])
    assert_close(decode(boxes, deltas, stds, [HEIGHT, WIDTH]), ARRAYS[f"coder.{part}.decode"])
    assert_close(decode(boxes, deltas, stds, None), ARRAYS[f"coder.{part}.decode_unclipped"])


def test_levels_of_boxes():
    import torch

    from fcvit.reference.mask_rcnn import roi_levels

    levels = roi_levels(torch.from_numpy(ARRAYS["level.rois"]), 56)
    np.testing.assert_array_equal(levels, ARRAYS["level.level"])


@pytest.mark.parametrize(("part", "size"), [("box", 7), ("mask", 14)])
def test_roi_align_and_its_gradient(part, size):
    import torch

    from fcvit.reference.mask_rcnn import pyramid_align

    height, width = ABOUT["numbers"]["roi_image"]
    maps = [draw(f"roialign/p{i + 2}", (2, 3, height // s, width // s)) for i, s in enumerate(STRIDES[:4])]
    for one in maps:
        one.requires_grad_()
    rois = torch.from_numpy(ARRAYS["roialign.rois"]).requires_grad_()
    output = pyramid_align(maps, rois, size, 56)
    if part == "box":
        assert_close(output, ARRAYS["roialign.box"])
    else:
        assert_summary(output, ABOUT["roialign.mask"])
    (output * draw(f"roialign/{part}/grad", output.shape)).sum().backward()
    assert rois.grad is None
    for one, about in zip(maps, ABOUT[f"roialign.{part}.input_grad"], strict=True):
        assert_summary(one.grad, about)


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
    for values, about in zip(network.neck(stages), ABOUT["neck"], strict=True):
        assert_summary(values, about)
    maps = [draw(f"rpn/in{i}", (1, 256, *size)) for i, size in enumerate(SIZES)]
    for outputs, name in zip(network.rpn_head(maps), ("rpn_cls", "rpn_bbox"), strict=True):
        for values, about in zip(outputs, ABOUT[name], strict=True):
            assert_summary(values, about)


@pytest.mark.parametrize(("case", "before", "after"), [("test", 1000, 1000), ("small", 100, 60), ("train", 2000, 1000)])
def test_proposals(network, case, before, after):

    scores = [draw(f"proposals/cls{i}", (2, 3, *size), 2) for i, size in enumerate(SIZES)]
    deltas = [draw(f"proposals/reg{i}", (2, 12, *size), 0.3) for i, size in enumerate(SIZES)]
    margins = {}
    results = network.propose(scores, deltas, np.array(FACES), before, after, margins)
    for image, rows in enumerate(results):
        if case == "train":
            assert_summary(rows, ABOUT["proposals.train"]["rows"][image])
        else:
            assert_close(rows, ARRAYS[f"proposals.{case}{image}"])
    expected = ABOUT[f"proposals.{case}"]["margin"]
    assert margins["proposal NMS: IoU"] == pytest.approx(expected["nms iou"], rel=1e-6)
    assert margins["proposal NMS: order"] == pytest.approx(expected["score order"], rel=1e-6)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_nms_within_groups(monkeypatch, split, threshold):
    import torch

    from fcvit.reference import mask_rcnn

    monkeypatch.setattr(mask_rcnn, "SPLIT_NMS", 0 if split else 10_000)
    boxes = draw_boxes("nms/boxes", 250, HEIGHT, WIDTH, 16)
    scores = torch.from_numpy(generator("nms/scores").random(250).astype(np.float32)).double()
    kept = mask_rcnn.batched_nms(boxes, scores, torch.arange(250) % 3, threshold)
    np.testing.assert_array_equal(kept, ARRAYS[f"nms.{threshold}"])


def test_box_head_and_mask_head(network):
    head = network.roi_head
    logits, deltas = head.bbox_head(draw("boxhead/in", (6, 256, 7, 7)))
    assert_close(logits, ARRAYS["boxhead.cls_score"])
    assert_close(deltas, ARRAYS["boxhead.bbox_pred"])
    assert_summary(head.mask_head(draw("maskhead/in", (2, 256, 14, 14))), ABOUT["maskhead.logits"])


def test_detections_of_an_image():
    import torch

    from fcvit.reference.mask_rcnn import select

    proposals = draw_boxes("post/boxes", 60, *FACES[0], 6)
    logits, deltas = draw("post/cls", (60, 4), 2), draw("post/reg", (60, 12), 0.8)
    scale = torch.tensor(ABOUT["post.scale_factor"], dtype=torch.float32).double()
    margins = {}
    boxes, scores, labels = select(proposals, logits, deltas, list(FACES[0]), MaskRCNNOptions(), scale, margins)
    assert_close(torch.cat([boxes, scores[:, None]], 1), ARRAYS["post.boxes"])
    np.testing.assert_array_equal(labels, ARRAYS["post.labels"])
    assert margins["detection NMS: IoU"] == pytest.approx(ABOUT["post.margin"]["nms iou"], rel=1e-6)


def test_pasted_masks():
    import torch

    from fcvit.reference.mask_rcnn import paste_masks

    height, width = ABOUT["numbers"]["paste_image"]
    masks = draw("paste/logits", (12, 1, 28, 28), 2)[:, 0].sigmoid()
    pasted = paste_masks(masks, torch.from_numpy(ARRAYS["paste.boxes"]), height, width)
    assert pasted.sum((1, 2)).tolist() == ABOUT["paste"]["on"]
    np.testing.assert_array_equal(np.packbits(pasted.numpy()), ARRAYS["paste.bits"])
