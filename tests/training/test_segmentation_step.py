"""Training steps of Semantic FPN compared with mmsegmentation: loss, gradients, running statistics and AdamW steps."""

import math
import zlib

import numpy as np
import pytest

from conftest import golden_json, needs_paddle
from fcvit.frameworks import import_framework
from fcvit.models.spec import ModelSpec, is_counter, paddle_name, tensor_specs
from fcvit.models.variants import VARIANTS
from fcvit.weights.reading import Weights
from fcvit.weights.synthetic import synthetic_input, synthetic_tensors

pytestmark = needs_paddle
GOLDEN = golden_json("segmentation/train_step.json")
IGNORED = 255


def generator(name):
    return np.random.Generator(np.random.PCG64(zlib.crc32((GOLDEN["salt"] + name).encode())))


def golden_labels():
    """Return the label maps of the golden: blocks of 8 x 8 pixels, with a tenth of the pixels ignored."""
    count, _, height, width = GOLDEN["input_shape"]
    blocks = (count, math.ceil(height / 8), math.ceil(width / 8))
    labels = generator("labels").integers(0, GOLDEN["classes"], blocks)
    labels = labels.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    ignored = generator("ignore").random((count, height, width)) < 0.1
    return np.where(ignored, IGNORED, labels)


def build(dropout=0.0):
    """Return the spec of the golden's network, and the network with synthetic weights in training mode, float64."""
    from fcvit.models.build import build_network

    spec = ModelSpec(VARIANTS[GOLDEN["variant"]], GOLDEN["classes"], "semantic_fpn")
    tensors = synthetic_tensors(spec, GOLDEN["salt"])
    model = build_network(Weights(spec, tensors, None, "torch", None, None, (), ()), "float64")
    model.decode_head.dropout.p = dropout
    model.train()
    return spec, model


def test_the_learning_rate_of_the_authors_recipe_matches_mmcv():
    from fcvit.training.recipe import read_recipe
    from fcvit.training.schedule import learning_rate

    recipe = read_recipe("segmentation_fcvit_b12")
    steps = recipe.steps_per_epoch
    assert GOLDEN["poly"]["max_iters"] == recipe.epochs * steps
    for step, expected in GOLDEN["poly"]["lr"].items():
        epoch, within = divmod(int(step), steps)
        assert_close(learning_rate(recipe, epoch + within / steps), expected, step)


def assert_close(actual, expected, label, absolute=0.0):
    difference = np.abs(np.asarray(actual) - np.asarray(expected))
    assert (difference <= np.maximum(1e-9 * np.abs(expected), absolute)).all(), (label, actual, expected)


def assert_sampled(actual, golden, label):
    """Compare with sampled values, relative to the standard deviation of all values."""
    assert list(actual.shape) == golden["shape"], label
    values = actual.ravel()[golden["index"]]
    assert np.abs(values - golden["value"]).max() <= 1e-9 * golden["std"], label
    assert_close([actual.mean(), actual.std()], [golden["mean"], golden["std"]], label)


@pytest.mark.slow
def test_three_steps_match_mmsegmentation():
    paddle = import_framework("paddle")
    from fcvit.tasks.segmentation.losses import pixel_cross_entropy
    from fcvit.tasks.segmentation.recipe import SegmentationRecipe
    from fcvit.training.optimizer import create_optimizer
    from fcvit.training.schedule import learning_rate

    spec, model = build()
    recipe = SegmentationRecipe(
        variant=GOLDEN["variant"], lr=GOLDEN["lr"], lr_batch=0, weight_decay=GOLDEN["weight_decay"], decay_all=True,
        schedule="poly", lr_update="step", epochs=1, warmup_epochs=0, cooldown_epochs=0, min_lr=0, warmup_lr=0,
    )  # fmt: skip
    optimizer = create_optimizer(model, recipe)
    images = paddle.to_tensor(synthetic_input(tuple(GOLDEN["input_shape"]), GOLDEN["salt"]).astype(np.float64))
    given = golden_labels()
    assert np.bincount(given.ravel())[[*range(spec.num_classes), IGNORED]].tolist() == GOLDEN["label_counts"]
    labels = paddle.to_tensor(given)
    named, table = dict(model.named_parameters()), tensor_specs(spec)
    heads = []
    model.decode_head.register_forward_post_hook(lambda layer, inputs, output: heads.append(output))
    total = GOLDEN["steps"][0]["total_gradient_norm"]
    for number, step in enumerate(GOLDEN["steps"]):
        rate = learning_rate(recipe, number / GOLDEN["number_of_steps"])
        assert_close(rate, step["lr"], f"learning rate of step {number}")
        optimizer.set_lr(rate)
        outputs = model(images)
        assert_sampled(heads[-1].numpy(), step["logits"], f"logits of step {number}")
        loss = pixel_cross_entropy(outputs, labels)
        assert_close(loss.item(), step["loss"], f"loss of step {number}")
        valid = step["mean over the pixels not ignored (not what mmseg 0.19 does)"]
        assert_close(pixel_cross_entropy(outputs, labels, "valid").item(), valid, f"mean over valid pixels, {number}")
        loss.backward()
        if number == 0:
            trained = [n for n in table if not is_counter(n) and not n.endswith(("running_mean", "running_var"))]
            assert sorted(step["gradients"]) == sorted(trained)
            for name, expected in step["gradients"].items():
                gradient = named[paddle_name(name)].grad.numpy()
                gradient = gradient.T if table[name].transposed_in_paddle else gradient
                entries = [np.linalg.norm(gradient), *gradient.ravel()[:4], gradient.ravel()[-1]]
                # Biases in front of a BatchNorm have no gradient except for rounding errors.
                rounding = 1e-15 * total if expected["norm"] < 1e-12 * total else 0.0
                scale = 1e-12 * expected["norm"]
                assert_close(entries[0], expected["norm"], name, rounding)
                assert_close(entries[1:], [*expected["first"], expected["last"]], name, max(scale, rounding))
            for name, expected in step["running"].items():
                if not is_counter(name):
                    statistics = named[paddle_name(name)].numpy()
                    actual = [statistics.mean(), statistics[0], statistics[-1]]
                    assert_close(actual, [expected[key] for key in ("mean", "first", "last")], name)
        optimizer.step()
        optimizer.clear_grad()
    for name, expected in GOLDEN["steps"][-1]["parameters after the last step"].items():
        parameter = named[paddle_name(name)].numpy()
        parameter = parameter.T if table[name].transposed_in_paddle else parameter
        assert_close([np.linalg.norm(parameter), parameter.ravel()[0]], [expected["norm"], expected["first"]], name)
    model.eval()
    with paddle.no_grad():
        model(images)
    assert_sampled(heads[-1].numpy(), GOLDEN["eval logits after the steps"], "logits in evaluation mode")
