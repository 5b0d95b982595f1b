"""Training steps of Mask R-CNN compared with mmdetection: losses, gradients, running statistics and AdamW steps."""

import numpy as np
import pytest
from test_detection_targets import ellipses, first_come

from conftest import golden_json, needs_paddle, needs_torch
from detection_goldens import MINI
from fcvit.data.transforms.detection import DetectionTarget
from fcvit.frameworks import import_framework
from fcvit.models.spec import MaskRCNNOptions, ModelSpec, is_counter, paddle_name, tensor_specs
from fcvit.weights.reading import Weights
from fcvit.weights.synthetic import synthetic_input, synthetic_tensors

pytestmark = pytest.mark.slow
GOLDEN = golden_json("detection/train_step.json")
LOSSES = ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask")


def assert_close(actual, expected, label, absolute=0.0):
    difference = np.abs(np.asarray(actual) - np.asarray(expected))
    assert (difference <= np.maximum(1e-9 * np.abs(expected), absolute)).all(), (label, actual, expected)


@pytest.fixture(scope="module")
def case():
    """The spec, the tensors, the images and their objects of the golden."""
    options = MaskRCNNOptions(neck=32, rpn=32, box_channels=64, mask_channels=32)
    spec = ModelSpec(MINI, GOLDEN["classes"], "mask_rcnn", options)
    images = synthetic_input(tuple(GOLDEN["input_shape"]), GOLDEN["salt"])
    targets = []
    for image, size, boxes, labels in zip(
        images, GOLDEN["img_shape"], GOLDEN["gt_boxes"], GOLDEN["gt_labels"], strict=True
    ):
        image[:, size[0] :] = 0
        image[:, :, size[1] :] = 0
        boxes = np.array(boxes)
        targets.append(DetectionTarget(tuple(size), boxes, np.array(labels), ellipses(boxes)))
    return spec, synthetic_tensors(spec, GOLDEN["salt"]), images.astype(np.float64), targets


@needs_paddle
def test_three_steps_match_mmdetection(case, monkeypatch):
    paddle = import_framework("paddle")
    from fcvit.models.build import build_network
    from fcvit.tasks.classification.recipe import ClassificationRecipe
    from fcvit.tasks.detection import losses as module
    from fcvit.training.optimizer import create_optimizer

    spec, tensors, images, targets = case
    model = build_network(Weights(spec, tensors, None, "torch", None, None, (), ()), "float64")
    model.train()
    recipe = ClassificationRecipe(
        variant="fcvit_tiny", lr=GOLDEN["lr"], lr_batch=0, weight_decay=GOLDEN["weight_decay"], decay_all=True
    )
    optimizer = create_optimizer(model, recipe)
    named, table = dict(model.named_parameters()), tensor_specs(spec)
    drawn = []

    def recorded(*arguments):
        rois = roi_samples(*arguments)
        drawn.append((len(arguments[0]), len(rois.deltas), len(rois.rois) - len(rois.deltas)))
        return rois

    def value(name):
        array = named[paddle_name(name)]
        array = (array if array.grad is None else array.grad).numpy()
        return array.T if table[name].transposed_in_paddle else array

    roi_samples = module.roi_samples
    monkeypatch.setattr(module, "roi_samples", recorded)
    for number in range(len(GOLDEN["steps"])):
        outputs = model(paddle.to_tensor(images))
        losses = module.detection_losses(model, outputs, targets, [first_come] * 2, module.Sampling())
        sum(losses.values()).backward()
        check_step(number, losses, drawn, value)
        optimizer.step()
        optimizer.clear_grad()


@needs_torch
def test_three_steps_of_the_reference_match_mmdetection(case, monkeypatch):
    torch = import_framework("torch")
    from fcvit.reference import mask_rcnn_training as module
    from fcvit.reference.build import build_reference

    spec, tensors, images, targets = case
    model = build_reference(spec, tensors, torch.float64).train()
    optimizer = torch.optim.AdamW(model.parameters(), GOLDEN["lr"], weight_decay=GOLDEN["weight_decay"])
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    drawn = []

    def recorded(proposals, *arguments):
        boxes, samples = sample_rois(proposals, *arguments)
        drawn.append((len(proposals), len(samples.positive), len(samples.negative)))
        return boxes, samples

    def value(name):
        return (named[name] if named[name].grad is None else named[name].grad).numpy()

    sample_rois = module.sample_rois
    monkeypatch.setattr(module, "sample_rois", recorded)
    for number in range(len(GOLDEN["steps"])):
        losses = module.training_losses(model, torch.from_numpy(images), targets, [first_come] * 2)
        sum(losses.values()).backward()
        check_step(number, losses, drawn, value)
        optimizer.step()
        optimizer.zero_grad()


def check_step(number, losses, drawn, value):
    """Compare a step with the golden.

    Args:
        number: Number of the step.
        losses: Losses of the step.
        drawn: Number of proposals, positive RoIs and negative RoIs of each image. Is cleared.
        value: Returns the gradient or the running statistic of a name in PyTorch's layout.
    """
    step = GOLDEN["steps"][number]
    assert [proposals for proposals, _, _ in drawn] == step["proposals"]
    assert [counts for _, *counts in drawn] == step["sampled positive, negative"]
    drawn.clear()
    assert tuple(losses) == LOSSES
    for name, loss in losses.items():
        assert_close(loss.item(), step[name], f"{name} of step {number}")
    if number > 0:
        return
    assert not GOLDEN["without gradient"]
    for name, (norm, first, last) in GOLDEN["gradients"].items():
        gradient = value(name)
        # Biases in front of a BatchNorm have no gradient except for rounding errors.
        total = GOLDEN["total gradient norm"]
        rounding = 1e-14 * total if norm < 1e-12 * total else 0.0
        entries = gradient.ravel()[[0, -1]]
        assert_close(np.linalg.norm(gradient), norm, name, rounding)
        assert_close(entries, [first, last], name, max(1e-11 * norm, rounding))
    for name, expected in GOLDEN["running statistics"].items():
        if not is_counter(name):
            statistics = value(name)
            assert_close([statistics.mean(), statistics[0], statistics[-1]], expected, name)
