"""Training steps compared with the authors' code: loss, gradients, running statistics and three AdamW steps."""

import dataclasses

import numpy as np
import pytest

from conftest import golden_json, needs_paddle
from fcvit.data.transforms.pixel_batch import PixelBatch, Rectangle
from fcvit.data.transforms.preprocess import normalization_table, normalize
from fcvit.frameworks import import_framework
from fcvit.models.spec import ModelSpec, is_counter, paddle_name, tensor_specs
from fcvit.models.variants import VARIANTS, Preprocessing
from fcvit.tasks.classification.recipe import ClassificationRecipe
from fcvit.weights.reading import Weights
from fcvit.weights.synthetic import synthetic_input, synthetic_tensors

pytestmark = needs_paddle
GOLDEN = golden_json("train_step.json")


def assert_close(actual, expected, label):
    """Compare with a tolerance of 1e-9 relative or 1e-12 absolute.

    The absolute tolerance is for four biases before a BatchNorm, whose gradients are only rounding errors.
    """
    difference = np.abs(np.asarray(actual) - np.asarray(expected))
    assert (difference <= np.maximum(1e-9 * np.abs(expected), 1e-12)).all(), (label, actual, expected)


def first_and_last(array):
    return {"first": array.ravel()[0], "last": array.ravel()[-1]}


@pytest.mark.slow
def test_three_steps_match_the_authors_code():
    paddle = import_framework("paddle")
    from fcvit.models.build import build_network
    from fcvit.tasks.classification.recipe import ClassificationRecipe
    from fcvit.tasks.classification.training import soft_cross_entropy
    from fcvit.training.optimizer import create_optimizer

    spec = ModelSpec(VARIANTS[GOLDEN["variant"]], GOLDEN["num_classes"])
    salt = GOLDEN["weight_salt"]
    model = build_network(Weights(spec, synthetic_tensors(spec, salt), None, "torch", None, None, (), ()), "float64")
    model.train()
    recipe = ClassificationRecipe(variant=GOLDEN["variant"], lr=1e-3, lr_batch=0, weight_decay=0.05)
    optimizer = create_optimizer(model, recipe)
    images = paddle.to_tensor(synthetic_input(tuple(GOLDEN["input_shape"]), salt).astype(np.float64))
    targets = paddle.to_tensor(np.eye(spec.num_classes)[GOLDEN["labels"]])
    named = dict(model.named_parameters())
    table = tensor_specs(spec)
    for number, step in enumerate(GOLDEN["steps"]):
        logits = model(images)
        loss = soft_cross_entropy(logits, targets)
        assert_close(logits.numpy(), np.array(step["logits"]), f"logits of step {number}")
        assert_close(loss.item(), step["loss"], f"loss of step {number}")
        loss.backward()
        if number == 0:
            trained = [n for n in table if not is_counter(n) and not n.endswith(("running_mean", "running_var"))]
            assert sorted(step["gradients"]) == sorted(trained)
            for name, expected in step["gradients"].items():
                gradient = named[paddle_name(name)].grad.numpy()
                gradient = gradient.T if table[name].transposed_in_paddle else gradient
                actual = {"norm": np.linalg.norm(gradient), **first_and_last(gradient)}
                assert_close([actual[key] for key in expected], list(expected.values()), name)
            for name, expected in step["running"].items():
                statistics = named[paddle_name(name)].numpy()
                actual = {"sum": statistics.sum(), **first_and_last(statistics)}
                assert_close([actual[key] for key in expected], list(expected.values()), name)
        optimizer.step()
        optimizer.clear_grad()


def test_the_running_variance_is_unbiased():
    """BatchNorm keeps the unbiased variance, as PyTorch does, and normalizes a batch by the biased variance."""
    paddle = import_framework("paddle")
    from fcvit.models.layers import BatchNorm

    x = np.random.default_rng(0).standard_normal((3, 2, 2, 1))
    norm = BatchNorm(2)
    norm.to(dtype=paddle.float64)
    norm.train()
    out = norm(paddle.to_tensor(x)).numpy()
    biased = x.var(axis=(0, 2, 3))
    assert norm._variance.numpy() == pytest.approx(0.9 + 0.1 * biased * 6 / 5, rel=1e-12)
    expected = (x - x.mean(axis=(0, 2, 3), keepdims=True)) / np.sqrt(biased + 1e-5)[:, None, None]
    assert np.abs(out - expected).max() < 1e-12


def test_batchnorm_rejects_a_batch_with_a_single_position():
    paddle = import_framework("paddle")
    from fcvit.errors import UsageError
    from fcvit.models.layers import BatchNorm

    with pytest.raises(UsageError, match=r"at least (two|2)"):
        BatchNorm(2)(paddle.ones([1, 2, 1, 1]))


def test_the_device_normalizes_images_to_the_same_values():
    """A GPU gets the pixels. This computes the same operations on the CPU."""
    paddle = import_framework("paddle")
    from fcvit.training.step import normalized_on_device

    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (3, 3, 20, 24), np.uint8)
    rectangle = Rectangle(3, 5, generator.standard_normal((3, 6, 9), np.float32))
    padded = PixelBatch(pixels, normalization_table(Preprocessing()), [(20, 24), (7, 24), (20, 9)])
    erased = dataclasses.replace(padded, valid=None, erased=(None, rectangle, None))
    for images in (padded, erased):
        on_device = normalized_on_device(paddle.to_tensor(pixels), images).numpy()
        assert on_device.dtype == np.float32 and np.array_equal(on_device, images.normalized())
    assert np.array_equal(erased.normalized()[1, :, 3:9, 5:14], rectangle.noise)
    plain = normalize(pixels, Preprocessing())
    assert np.array_equal(padded.normalized()[1, :, :7], plain[1, :, :7]) and not padded.normalized()[1, :, 7:].any()


def test_images_in_the_memory_of_a_gpu_give_the_same_loss(monkeypatch):
    paddle = import_framework("paddle")
    from fcvit.training.batches import MicroBatches
    from fcvit.training.step import Trainer

    class Brightness(paddle.nn.Layer):
        variant = VARIANTS["fcvit_digits"]

        def __init__(self):
            super().__init__()
            self.scale = self.create_parameter([1])

        def forward(self, images):
            return (images * self.scale).mean()

    recipe = ClassificationRecipe(variant="fcvit_digits", batch_size=2)
    trainer = Trainer(Brightness(), recipe, MicroBatches(2), lambda outputs, _: {"loss": outputs})
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 8, 8), np.uint8)
    images = PixelBatch(pixels, normalization_table(Preprocessing()))
    monkeypatch.setattr(trainer, "_copied_to_gpu", lambda tensor: tensor)
    kinds = (trainer.stage(images), images.normalized(), (paddle.to_tensor(pixels), images))
    assert len({trainer._losses(kind, None)["loss"].item() for kind in kinds}) == 1
