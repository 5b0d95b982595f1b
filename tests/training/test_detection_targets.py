"""Targets and losses of Mask R-CNN compared with mmdetection's assigner, sampler, coder, mask targets and losses."""

import hashlib
import zlib

import numpy as np
import pytest

from conftest import golden_arrays, golden_json, needs_paddle
from fcvit.data.transforms.detection import DetectionTarget
from fcvit.frameworks import import_framework
from fcvit.tasks.detection import targets
from fcvit.tasks.detection.targets import (
    anchor_samples,
    assign,
    drawn_from,
    mask_targets,
    roi_samples,
    sample,
    valid_anchors,
)

GOLDEN, ARRAYS = golden_json("detection/units.json"), golden_arrays("detection/units.npz")
HEIGHT, WIDTH = GOLDEN["numbers"]["image"]
CLASSES = GOLDEN["numbers"]["classes"]


def drawn(tag, shape, scale=1.0):
    generator = np.random.Generator(np.random.PCG64(zlib.crc32((GOLDEN["salt"] + tag).encode())))
    return (generator.standard_normal(shape) * scale).astype(np.float32).astype(np.float64)


def first_come(candidates, count):
    """Draw positions by the rule of the goldens."""
    return candidates[np.arange(count) * len(candidates) // count]


def all_anchors():
    levels = []
    for level, (height, width) in enumerate(GOLDEN["anchors.sizes"]):
        y, x = np.mgrid[:height, :width] * 2.0 ** (level + 2)
        levels.append((np.stack([x, y, x, y], -1)[:, :, None] + ARRAYS["anchors.base"][level]).reshape(-1, 4))
    return np.concatenate(levels)


def target(boxes, labels, masks):
    return DetectionTarget((HEIGHT, WIDTH), boxes, labels, masks)


def ellipses(boxes, height=HEIGHT, width=WIDTH):
    """Return the masks of the goldens: the ellipse in each box."""
    y, x = np.mgrid[:height, :width] + 0.5
    parts = []
    for x1, y1, x2, y2 in boxes:
        parts.append(((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1)
    return np.array(parts)


@pytest.mark.parametrize(("name", "kind"), [("rpn", "gt"), ("tie", "gt_inds"), ("sensitive", "gt_inds")])
def test_anchors_are_assigned_with_the_ties_of_mmdetection(name, kind):
    objects = ARRAYS["assign.gt" if name == "rpn" else f"assign.{name}.gt"]
    assigned, _ = assign(objects, all_anchors(), 0.7, 0.3, 0.3)
    assert np.flatnonzero(assigned).tolist() == ARRAYS[f"assign.{name}.index"].tolist()
    assert assigned[assigned != 0].tolist() == ARRAYS[f"assign.{name}.{kind}"].tolist()


def test_a_comparison_with_a_tolerance_would_change_the_ties(monkeypatch):
    """The golden depends on the bits: overlaps that are equal in mathematics are not all equal here."""
    exact = targets.overlaps
    monkeypatch.setattr(targets, "overlaps", lambda box, boxes: exact(box, boxes).round(12))
    assigned, _ = assign(ARRAYS["assign.sensitive.gt"], all_anchors(), 0.7, 0.3, 0.3)
    assert (assigned > 0).sum() > (ARRAYS["assign.sensitive.gt_inds"] > 0).sum()


def test_proposals_are_assigned_and_sampled_after_the_objects():
    objects, boxes = ARRAYS["assign.gt"], ARRAYS["assign.boxes"]
    assigned, highest = assign(objects, boxes, 0.5, 0.5, 0.5)
    assert assigned.tolist() == ARRAYS["assign.roi.gt_inds"].tolist()
    assert highest.tolist() == ARRAYS["assign.roi.max_overlaps"].tolist()
    labels = np.arange(len(objects)) % CLASSES
    masks = ellipses(objects)
    assert masks.sum((1, 2)).tolist() == GOLDEN["masktarget"]["mask_pixels"]
    rois = roi_samples(boxes, target(objects, labels, masks), CLASSES, first_come, GOLDEN["numbers"]["sample"])
    positive, negative = ARRAYS["sample.pos_inds"], ARRAYS["sample.neg_inds"]
    everything = np.concatenate([objects, boxes])
    assert (rois.rois == everything[np.concatenate([positive, negative])]).all()
    assert rois.labels.tolist() == [*ARRAYS["sample.pos_gt_labels"], *[CLASSES] * len(negative)]
    assert np.packbits(rois.masks).tolist() == ARRAYS["masktarget.bits"].tolist()
    matched = ARRAYS["sample.pos_assigned_gt_inds"]
    soft = targets.masks_in_rois(masks, matched, everything[positive], 28)
    assert np.abs(soft[:3] - ARRAYS["masktarget.soft"]).max() < 1e-14


def test_an_object_takes_its_best_boxes_in_order_and_boxes_between_the_limits_are_ignored():
    objects = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [40, 40, 50, 50]], np.float64)
    boxes = np.array([[0, 0, 10, 5], [0, 0, 10, 2], [40, 40, 44, 44], [0, 0, 10, 4], [90, 90, 99, 99]], np.float64)
    assert assign(objects, boxes, 0.7, 0.3, 0.3)[0].tolist() == [2, 0, 0, -1, 0]
    assert assign(objects[:0], boxes, 0.7, 0.3, 0.3)[0].tolist() == [0] * 5


def test_the_type_of_the_targets_is_that_of_the_boxes():
    objects, boxes = (ARRAYS[f"assign.{name}"].astype(np.float32) for name in ("gt", "boxes"))
    assert targets.overlaps(objects[0], boxes).dtype == np.float32
    rois = roi_samples(boxes, target(objects, np.zeros(6, np.int64), ellipses(objects)), 1, first_come)
    assert rois.deltas.dtype == rois.rois.dtype == np.float32
    assert targets.masks_in_rois(ellipses(objects), np.arange(6), objects, 28).dtype == np.float32


def test_samples_are_sorted_distinct_and_repeatable():
    assigned = np.repeat([0, 1, -1, 2], 100)
    positive, negative = sample(assigned, 60, 0.25, drawn_from(np.random.default_rng(3)))
    assert (len(positive), len(negative)) == (15, 45)
    for positions, allowed in ((positive, assigned > 0), (negative, assigned == 0)):
        assert positions.tolist() == sorted(set(positions.tolist())) and allowed[positions].all()
    again = sample(assigned, 60, 0.25, drawn_from(np.random.default_rng(3)))
    assert (again[0] == positive).all() and (again[1] == negative).all()
    counts = np.zeros(400)
    for seed in range(300):
        counts[sample(assigned, 60, 0.25, drawn_from(np.random.default_rng(seed)))[0]] += 1
    assert counts[100:200].min() > 5 and counts[300:].min() > 5, "all positive boxes are drawn equally often"
    few = sample(np.array([1, 0, 0, -1, 0]), 60, 0.5, first_come)
    assert [part.tolist() for part in few] == [[0], [1, 2, 4]]


def test_anchors_outside_the_padded_image_are_not_valid():
    golden = GOLDEN["anchors.valid"]
    valid = valid_anchors(GOLDEN["anchors.sizes"], golden["pad_shape"])
    levels = np.split(valid, np.cumsum([3 * height * width for height, width in GOLDEN["anchors.sizes"]])[:-1])
    assert [int(level.sum()) for level in levels] == golden["count"]
    assert [hashlib.sha256(level.tobytes()).hexdigest() for level in levels] == golden["sha256"]


def test_half_covered_cells_belong_to_the_mask_target():
    mask = np.zeros((1, 56, 56), np.uint8)
    mask[0, ::2] = 1
    assert mask_targets(mask, np.zeros(1, int), np.array([[0.0, 0, 56, 56]])).all()


def test_mask_targets_of_rois_at_the_border_are_clipped():
    mask = np.ones((1, 20, 30), bool)
    rois = np.array([[-5.0, 2, 40, 18], [3, 3, 3.4, 3.4]])
    assert mask_targets(mask, np.zeros(2, int), rois).all()


@pytest.fixture(scope="module")
def rpn_case():
    """Outputs of the RPN for two images, flattened, and the samples of their anchors."""
    paddle = import_framework("paddle")
    sizes = GOLDEN["anchors.sizes"]
    logits = [drawn(f"proposals/cls{level}", (2, 3, *size), 2) for level, size in enumerate(sizes)]
    deltas = [drawn(f"proposals/reg{level}", (2, 12, *size), 0.3) for level, size in enumerate(sizes)]
    tensors = [[paddle.to_tensor(x, stop_gradient=False) for x in maps] for maps in (logits, deltas)]
    valid = np.ones(len(all_anchors()), bool)
    samples = [anchor_samples(all_anchors(), valid, ARRAYS[f"loss.gt{i}"], first_come) for i in range(2)]
    return tensors, samples


def assert_summary(actual, golden):
    assert list(actual.shape) == golden["shape"]
    count = min(len(golden["value"]), actual.size)
    index = [i * (actual.size - 1) // max(count - 1, 1) for i in range(count)]
    assert np.abs(actual.ravel()[index] - golden["value"]).max() <= 1e-10 * golden["std"] or golden["std"] == 0


@needs_paddle
def test_losses_of_the_rpn_match_mmdetection(rpn_case):
    from fcvit.tasks.detection.losses import anchor_losses

    paddle = import_framework("paddle")
    (logits, deltas), samples = rpn_case
    counts = [sum(len(s.positive) for s in samples), sum(len(s.negative) for s in samples)]
    assert counts == GOLDEN["loss.rpn.samples"]
    flat = [
        paddle.concat([x.transpose([0, 2, 3, 1]).reshape([2, -1, *last]) for x in maps], 1)
        for maps, last in ((logits, []), (deltas, [4]))
    ]
    classification, boxes = anchor_losses(*flat, samples)
    assert classification.item() == pytest.approx(sum(GOLDEN["loss.rpn"]["loss_rpn_cls"]), rel=1e-12)
    assert boxes.item() == pytest.approx(sum(GOLDEN["loss.rpn"]["loss_rpn_bbox"]), rel=1e-12)
    (classification + boxes).backward()
    for kind, maps in (("cls", logits), ("bbox", deltas)):
        for tensor, golden in zip(maps, GOLDEN["loss.rpn.grad"][kind], strict=True):
            assert_summary(tensor.grad.numpy(), golden)


@needs_paddle
def test_losses_of_boxes_and_masks_match_mmdetection():
    from fcvit.tasks.detection.losses import box_losses, mask_loss

    paddle = import_framework("paddle")
    labels = ARRAYS["loss.box.labels"]
    logits, deltas, masks = (
        paddle.to_tensor(drawn(f"loss/{tag}", shape), stop_gradient=False)
        for tag, shape in (
            ("cls", (38, CLASSES + 1)), ("reg", (38, 4 * CLASSES)), ("mask", (15, CLASSES, 28, 28)),
        )
    )  # fmt: skip
    positive = labels < CLASSES
    classification, boxes = box_losses(logits, deltas, labels, ARRAYS["loss.box.targets"][positive])
    assert classification.item() == pytest.approx(GOLDEN["loss.box"]["loss_cls"], rel=1e-12)
    assert boxes.item() == pytest.approx(GOLDEN["loss.box"]["loss_bbox"], rel=1e-12)
    bits = np.unpackbits(ARRAYS["loss.mask.target_bits"]).reshape(15, 28, 28).astype(bool)
    loss = mask_loss(masks, labels[positive], bits)
    assert loss.item() == pytest.approx(GOLDEN["loss.mask"], rel=1e-12)
    (classification + boxes + loss).backward()
    assert np.abs(logits.grad.numpy() - ARRAYS["loss.box.cls_grad"]).max() < 1e-15
    assert_summary(deltas.grad.numpy(), GOLDEN["loss.box.reg_grad"])
    assert_summary(masks.grad.numpy(), GOLDEN["loss.mask.grad"])
