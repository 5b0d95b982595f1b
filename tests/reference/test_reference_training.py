"""Targets and losses of Mask R-CNN in the PyTorch reference against the numbers of mmdetection, in float64."""

import hashlib

import numpy as np
import pytest

from conftest import needs_torch
from detection_goldens import SIZES, UNIT_ARRAYS, UNITS, assert_summary, numbers
from fcvit.frameworks import import_framework

pytestmark = needs_torch
CLASSES = UNITS["numbers"]["classes"]


def first_come(candidates, count):
    """Draw positions by the rule of the goldens."""
    return candidates[np.arange(count) * len(candidates) // count]


def array(name):
    return import_framework("torch").from_numpy(UNIT_ARRAYS[name])


def drawn(tag, shape, scale=1.0):
    return import_framework("torch").from_numpy(numbers(tag, shape, scale)).requires_grad_()


def anchors():
    torch = import_framework("torch")
    from fcvit.reference.mask_rcnn import STRIDES, grid_anchors

    like = torch.zeros((), dtype=torch.float64)
    return torch.cat([grid_anchors(stride, size, 8, like) for stride, size in zip(STRIDES, SIZES, strict=True)])


@pytest.mark.parametrize(("name", "kind"), [("rpn", "gt"), ("tie", "gt_inds"), ("sensitive", "gt_inds")])
def test_anchors_are_assigned_with_the_ties_of_mmdetection(name, kind):
    from fcvit.reference.mask_rcnn_training import assign

    assigned = assign(array("assign.gt" if name == "rpn" else f"assign.{name}.gt"), anchors(), 0.7, 0.3, 0.3)
    assert assigned.nonzero()[:, 0].tolist() == UNIT_ARRAYS[f"assign.{name}.index"].tolist()
    assert assigned[assigned != 0].tolist() == UNIT_ARRAYS[f"assign.{name}.{kind}"].tolist()


def test_proposals_are_assigned_and_sampled_after_the_objects():
    torch = import_framework("torch")
    from fcvit.reference import mask_rcnn_training as module

    objects, boxes = array("assign.gt"), array("assign.boxes")
    assert module.overlaps(objects, boxes).max(0).values.tolist() == UNIT_ARRAYS["assign.roi.max_overlaps"].tolist()
    assert module.assign(objects, boxes, 0.5, 0.5, 0.5).tolist() == UNIT_ARRAYS["assign.roi.gt_inds"].tolist()
    everything, samples = module.sample_rois(boxes, objects, UNITS["numbers"]["sample"], first_come)
    for part, name in zip(samples, ("pos_inds", "neg_inds", "pos_assigned_gt_inds"), strict=True):
        assert part.tolist() == UNIT_ARRAYS[f"sample.{name}"].tolist()

    height, width = UNITS["numbers"]["image"]
    x, y = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
    x1, y1, x2, y2 = objects.T[..., None, None]
    ellipses = ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1
    assert ellipses.sum((1, 2)).tolist() == UNITS["masktarget"]["mask_pixels"]
    masks = module.mask_targets(ellipses, samples.objects, everything[samples.positive])
    assert np.packbits(masks.numpy()).tolist() == UNIT_ARRAYS["masktarget.bits"].tolist()


def test_anchors_outside_the_padded_image_are_not_valid():
    from fcvit.reference.mask_rcnn_training import valid_anchors

    golden = UNITS["anchors.valid"]
    levels = valid_anchors(SIZES, golden["pad_shape"]).split([3 * rows * columns for rows, columns in SIZES])
    assert [int(level.sum()) for level in levels] == golden["count"]
    assert [hashlib.sha256(level.numpy().tobytes()).hexdigest() for level in levels] == golden["sha256"]


def test_losses_of_the_rpn():
    from fcvit.reference.mask_rcnn import RPN_STDS, encode
    from fcvit.reference.mask_rcnn_training import assign, rpn_losses, sample

    logits = [drawn(f"proposals/cls{level}", (2, 3, *size), 2) for level, size in enumerate(SIZES)]
    deltas = [drawn(f"proposals/reg{level}", (2, 12, *size), 0.3) for level, size in enumerate(SIZES)]
    samples, targets = [], []
    for objects in (array("loss.gt0"), array("loss.gt1")):
        samples.append(sample(assign(objects, anchors(), 0.7, 0.3, 0.3), 256, 0.5, first_come))
        targets.append(encode(anchors()[samples[-1].positive], objects[samples[-1].objects], RPN_STDS))
    counts = [sum(len(one.positive) for one in samples), sum(len(one.negative) for one in samples)]
    assert counts == UNITS["loss.rpn.samples"]
    losses = rpn_losses(logits, deltas, samples, targets)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(sum(UNITS["loss.rpn"][name]), rel=1e-12)
    sum(losses.values()).backward()
    for kind, maps in (("cls", logits), ("bbox", deltas)):
        for level, golden in zip(maps, UNITS["loss.rpn.grad"][kind], strict=True):
            assert_summary(level.grad.numpy(), golden)


def test_losses_of_boxes_and_masks():
    torch = import_framework("torch")
    from fcvit.reference.mask_rcnn_training import box_losses, mask_loss

    labels = array("loss.box.labels").long()
    positive = labels < CLASSES
    logits, deltas = drawn("loss/cls", (38, CLASSES + 1)), drawn("loss/reg", (38, 4 * CLASSES))
    losses = box_losses(logits, deltas, labels, array("loss.box.targets")[positive])
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(UNITS["loss.box"][name], rel=1e-12)
    masks = drawn("loss/mask", (15, CLASSES, 28, 28))
    bits = np.unpackbits(UNIT_ARRAYS["loss.mask.target_bits"]).reshape(15, 28, 28)
    loss = mask_loss(masks, labels[positive], torch.from_numpy(bits))
    assert loss.item() == pytest.approx(UNITS["loss.mask"], rel=1e-12)
    (sum(losses.values()) + loss).backward()
    assert np.abs(logits.grad.numpy() - UNIT_ARRAYS["loss.box.cls_grad"]).max() < 1e-15
    assert_summary(deltas.grad.numpy(), UNITS["loss.box.reg_grad"])
    assert_summary(masks.grad.numpy(), UNITS["loss.mask.grad"])
