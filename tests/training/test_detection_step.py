"""Training steps of Mask R-CNN compared with mmdetection: losses, gradients, running statistics and AdamW steps."""

import numpy as np
import pytest
from test_detection_targets import ellipses, first_come

from conftest import golden_json, needs_paddle
from detection_goldens import MINI
from fcvit.data.transforms.detection import DetectionTarget
from fcvit.frameworks import import_framework
from fcvit.models.spec import MaskRCNNOptions, ModelSpec, is_counter, paddle_name, tensor_specs
from fcvit.weights.reading import Weights
from fcvit.weights.synthetic import synthetic_input, synthetic_tensors

pytestmark = [needs_paddle, pytest.mark.slow]
GOLDEN = golden_json("detection/train_step.json")
LOSSES = ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask")


def assert_close(actual, expected, label, absolute=0.0):
    difference = np.abs(np.asarray(actual) - np.asarray(expected))
    assert (difference <= np.maximum(1e-9 * np.abs(expected), absolute)).all(), (label, actual, expected)


@pytest.fixture(scope="module")
def case():
    """The network of the golden in training mode, its images and their objects."""
    from fcvit.models.build import build_network

    options = MaskRCNNOptions(neck=32, rpn=32, box_channels=64, mask_channels=32)
    spec = ModelSpec(MINI, GOLDEN["classes"], "mask_rcnn", options)
    tensors = synthetic_tensors(spec, GOLDEN["salt"])
    model = build_network(Weights(spec, tensors, None, "torch", None, None, (), ()), "float64")
    model.train()
    images = synthetic_input(tuple(GOLDEN["input_shape"]), GOLDEN["salt"])
    targets = []
    for image, size, boxes, labels in zip(
        images, GOLDEN["img_shape"], GOLDEN["gt_boxes"], GOLDEN["gt_labels"], strict=True
    ):
        image[:, size[0] :] = 0
        image[:, :, size[1] :] = 0
        boxes = np.array(boxes)
        targets.append(DetectionTarget(tuple(size), boxes, np.array(labels), ellipses(boxes)))
    return spec, model, images.astype(np.float64), targets


def test_three_steps_match_mmdetection(case, monkeypatch):
    paddle = import_framework("paddle")
    from fcvit.tasks.classification.recipe import ClassificationRecipe
    from fcvit.tasks.detection import losses as module
    from fcvit.training.optimizer import create_optimizer

    spec, model, images, targets = case
    recipe = ClassificationRecipe(
        variant="fcvit_tiny", lr=GOLDEN["lr"], lr_batch=0, weight_decay=GOLDEN["weight_decay"], decay_all=True
    )
    optimizer = create_optimizer(model, recipe)
    named, table = dict(model.named_parameters()), tensor_specs(spec)
    drawn = []

    def recorded(*arguments):
        drawn.append(arguments), rois.append(roi_samples(*arguments))
        return rois[-1]

    roi_samples, rois = module.roi_samples, []
    monkeypatch.setattr(module, "roi_samples", recorded)
    for number, step in enumerate(GOLDEN["steps"]):
        rois.clear(), drawn.clear()
        outputs = model(paddle.to_tensor(images))
        losses = module.detection_losses(model, outputs, targets, [first_come] * 2, module.Sampling())
        assert tuple(losses) == LOSSES
        assert [len(arguments[0]) for arguments in drawn] == step["proposals"]
        counts = [[len(one.deltas), len(one.rois) - len(one.deltas)] for one in rois]
        assert counts == step["sampled positive, negative"]
        for name, loss in losses.items():
            assert_close(loss.item(), step[name], f"{name} of step {number}")
        sum(losses.values()).backward()
        if number == 0:
            check_gradients(named, table)
        optimizer.step()
        optimizer.clear_grad()


def check_gradients(named, table):
    assert not GOLDEN["without gradient"]
    for name, (norm, first, last) in GOLDEN["gradients"].items():
        gradient = named[paddle_name(name)].grad.numpy()
        gradient = gradient.T if table[name].transposed_in_paddle else gradient
        # Biases in front of a BatchNorm have no gradient except for rounding errors.
        total = GOLDEN["total gradient norm"]
        rounding = 1e-14 * total if norm < 1e-12 * total else 0.0
        entries = gradient.ravel()[[0, -1]]
        assert_close(np.linalg.norm(gradient), norm, name, rounding)
        assert_close(entries, [first, last], name, max(1e-11 * norm, rounding))
    for name, expected in GOLDEN["running statistics"].items():
        if not is_counter(name):
            statistics = named[paddle_name(name)].numpy()
            assert_close([statistics.mean(), statistics[0], statistics[-1]], expected, name)
