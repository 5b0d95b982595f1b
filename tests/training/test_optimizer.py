"""AdamW, EMA weights, and running statistics of several micro-batches."""

import numpy as np
import pytest

from conftest import classifier_loss, needs_paddle
from fcvit.errors import UnreadableFile
from fcvit.frameworks import import_framework

pytestmark = needs_paddle


@pytest.fixture
def model(small):
    from fcvit.models.build import create_model

    return create_model(small().network(), None, 2)


def step(model, optimizer, gradient=1.0):
    """Take a step with all gradients equal to `gradient`, and return the change and the old value of each parameter."""
    paddle = import_framework("paddle")
    from fcvit.training.optimizer import trained_parameters

    before = {name: p.numpy().copy() for name, p in trained_parameters(model).items()}
    total = paddle.add_n([p.sum() for p in trained_parameters(model).values()])
    (gradient * total).backward()
    optimizer.step()
    optimizer.clear_grad()
    return {name: p.numpy() - before[name] for name, p in trained_parameters(model).items()}, before


def test_weight_decay_applies_only_to_matrices_and_kernels(model, small):
    """With a gradient of 1 AdamW changes a parameter by -lr, and weight decay by -lr * weight_decay * parameter."""
    from fcvit.training.optimizer import create_optimizer

    moved, before = step(model, create_optimizer(model, small(lr=0.01, weight_decay=0.5, eps=1e-12)))
    assert len(moved) == len([n for n in model.state_dict() if not n.endswith(("_mean", "_variance"))])
    for name, change in moved.items():
        decay = 0.5 if before[name].ndim >= 2 else 0.0
        assert change == pytest.approx(-0.01 - 0.01 * decay * before[name], abs=2e-7), name
    assert {name for name in moved if before[name].ndim >= 2} >= {"head.weight", "patch_embed.proj.weight"}
    assert all(moved[name] == pytest.approx(-0.01, abs=2e-7) for name in moved if name.endswith("layer_scale_1"))


def test_weight_decay_can_apply_to_all_parameters(model, small):
    from fcvit.training.optimizer import create_optimizer

    moved, before = step(model, create_optimizer(model, small(lr=0.01, weight_decay=0.5, decay_all=True, eps=1e-12)))
    for name, change in moved.items():
        assert change == pytest.approx(-0.01 - 0.01 * 0.5 * before[name], abs=2e-7), name


def test_layer_decay_reduces_the_learning_rate_of_lower_blocks(model, small):
    from fcvit.training.optimizer import create_optimizer, depth_of

    depths = {name: depth_of(name, model.variant.depths) for name in model.state_dict()}
    assert {depths["patch_embed.proj.weight"], depths["head.bias"], depths["norm.weight"]} == {0, 5}
    assert depths["network.0.0.norm1.weight"] == 1
    assert depths["network.1.proj.weight"] == depths["network.2.0.norm1.weight"] == 2
    assert depths["network.6.0.token_mixer.dw1.weight"] == 4 and set(depths.values()) == set(range(6))
    moved, _ = step(model, create_optimizer(model, small(lr=0.01, weight_decay=0.0, layer_decay=0.5, eps=1e-12)))
    for name, change in moved.items():
        assert change == pytest.approx(-0.01 * 0.5 ** (5 - depths[name]), rel=2e-3), name


def test_depth_counts_every_block_of_a_stage():
    from fcvit.models.classifier import FCViT
    from fcvit.models.variants import VARIANTS
    from fcvit.training.optimizer import depth_of

    model = FCViT(VARIANTS["fcvit_tiny"], 2)  # depths 3, 3, 5, 2
    names = ["patch_embed.norm.bias", "network.0.2.norm1.bias", "network.3.proj.bias", "network.4.0.norm1.bias"]
    names += ["network.4.4.norm1.bias", "network.6.1.norm2.bias", "head.weight"]
    assert [depth_of(name, model.variant.depths) for name in names] == [0, 3, 7, 7, 11, 13, 14]


def test_a_frozen_backbone_keeps_weights_and_statistics(small):
    paddle = import_framework("paddle")
    from fcvit.models.build import create_model
    from fcvit.training.batches import MicroBatches
    from fcvit.training.optimizer import freeze_backbone
    from fcvit.training.step import Trainer

    recipe = small(weights="some", freeze=True, drop_path_rate=0.5)
    model = create_model(recipe.network(), None, 2, recipe.drop_path_rate)
    freeze_backbone(model)
    before = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    trainer = Trainer(model, recipe, MicroBatches(8), classifier_loss)
    trainer.train_mode()
    images = np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32)
    losses = [
        float(trainer.run(iter([(images, np.eye(2, dtype=np.float32)[[0, 1] * 4])]), 0.01)["loss"]) for _ in range(3)
    ]
    assert losses[0] > losses[1] > losses[2], (
        "without drop path in the frozen backbone, the loss decreases in each step"
    )
    changed = {name for name, tensor in model.state_dict().items() if (tensor.numpy() != before[name]).any()}
    assert changed == {"head.weight", "head.bias"}
    assert paddle.is_grad_enabled()


def test_the_gradient_is_clipped(model, small):
    from fcvit.training.optimizer import create_optimizer

    clipped = create_optimizer(model, small(lr=1.0, weight_decay=0.0, clip_norm=1e-3, eps=1.0))
    moved, _ = step(model, clipped)
    # With eps = 1 and a small gradient g, the step is g / (|g| + 1), which is about g.
    norm = np.sqrt(sum((change**2).sum() for change in moved.values()))
    assert norm == pytest.approx(1e-3, rel=0.01)


def test_ema_weights_follow_the_weights(model):
    from fcvit.training.optimizer import EMA

    paddle = import_framework("paddle")
    ema = EMA(model, 0.9)
    head, start = model.head.bias, model.head.bias.numpy().copy()
    statistics = model.patch_embed.norm._mean
    expected, kept = start.astype(np.float64), 1.0
    for number in range(30):
        head.set_value(paddle.to_tensor(start + number))
        statistics.set_value(statistics + 1)
        ema.update(model, number)
        decay = min(0.9, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * (start + number)
        kept *= decay
    assert ema.tensors["head.bias"].numpy() == pytest.approx(expected, rel=1e-5)
    mean = ema.tensors["patch_embed.norm._mean"].numpy()
    assert (mean == 0).all(), "running statistics change only at the end of the epoch"
    ema.end_epoch(model)
    assert ema.tensors["patch_embed.norm._mean"].numpy() == pytest.approx(30 * (1 - kept), rel=1e-5)
    assert ema.statistics_decay == 1.0


@pytest.mark.slow
def test_a_restored_optimizer_continues_exactly(small):
    """Three steps give the same weights as two steps, a new optimizer with the restored state, and one more step."""
    from fcvit.models.build import create_model
    from fcvit.training.optimizer import create_optimizer, optimizer_tensors, restore_optimizer

    paddle = import_framework("paddle")

    def start():
        paddle.seed(0)
        model = create_model(small().network(), None, 2)
        return model, create_optimizer(model, small())

    uninterrupted, optimizer = start()
    for number in range(3):
        step(uninterrupted, optimizer, number + 1.0)
    model, optimizer = start()
    for number in range(2):
        step(model, optimizer, number + 1.0)
    kept = {name: array.copy() for name, array in optimizer_tensors(optimizer, model).items()}
    numbers = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    model, optimizer = start()
    for name, tensor in model.state_dict().items():
        tensor.set_value(numbers[name])
    restore_optimizer(optimizer, model, kept)
    step(model, optimizer, 3.0)
    for name, tensor in uninterrupted.state_dict().items():
        assert (tensor.numpy() == model.state_dict()[name].numpy()).all(), name
    with pytest.raises(UnreadableFile, match=r"head.bias \(moment2\)"):
        restore_optimizer(optimizer, model, {k: v for k, v in kept.items() if k != "moment2/head.bias"})


def test_ema_weights_change_more_slowly_after_many_steps(model, small):
    """The decay of the EMA weights depends on the trainer's step."""
    from fcvit.training.batches import MicroBatches
    from fcvit.training.step import Trainer

    trainer = Trainer(model, small(ema_decay=0.999), MicroBatches(4), classifier_loss)
    batch = (np.ones((4, 3, 32, 32), np.float32), np.eye(2, dtype=np.float32)[[0, 1, 1, 0]])
    moved = []
    for step in (0, 500):
        trainer.step = step
        before = trainer.ema.tensors["head.bias"].numpy().copy()
        trainer.run(iter([batch]), 0.1)
        gap = trainer.model.head.bias.numpy() - before
        moved.append(float(((trainer.ema.tensors["head.bias"].numpy() - before) / gap)[0]))
    assert moved == pytest.approx([1 - 1 / 10, 1 - 501 / 510], rel=1e-2)


def test_each_micro_batch_has_separate_running_statistics(model):
    """Two micro-batches update their statistics by different values. After an epoch both have the mean."""
    from fcvit.training.statistics import Statistics, running_statistics

    live = running_statistics(model)
    assert len(live) == 8, "four BatchNorm layers"
    start = [tensor.numpy().copy() for tensor in live]
    statistics = Statistics(model, 2, 1)
    for _ in range(3):
        for micro_batch, added in ((0, 1.0), (1, 5.0)):
            statistics.use(micro_batch)
            for tensor in live:
                tensor.set_value(tensor + added)
    statistics.synchronize()
    for tensor, begun in zip(live, start, strict=True):
        assert tensor.numpy() == pytest.approx(begun + 9)
    statistics.use(0)
    assert live[0].numpy() == pytest.approx(start[0] + 9)


def test_balanced_class_weights_give_each_class_the_same_total_weight():
    from fcvit.tasks.class_weights import balanced

    counts = np.array([30, 10, 0, 60])
    weights = balanced(counts)
    assert (weights * counts)[[0, 1, 3]] == pytest.approx(100 / 3) and weights[2] == 0


def test_soft_cross_entropy_matches_its_formula():
    paddle = import_framework("paddle")
    from fcvit.tasks.classification.training import soft_cross_entropy

    logits, targets = np.array([[1.0, 2, 3], [0, 0, 9]]), np.array([[0.2, 0.3, 0.5], [1, 0, 0]])
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    loss = soft_cross_entropy(paddle.to_tensor(logits), paddle.to_tensor(targets))
    assert loss.item() == pytest.approx(-(targets * logs).sum(1).mean(), rel=1e-12)
    weighted = soft_cross_entropy(
        paddle.to_tensor(logits), paddle.to_tensor(targets), paddle.to_tensor(np.array([2.0, 1, 0.5]))
    )
    assert weighted.item() == pytest.approx(-(targets * [2, 1, 0.5] * logs).sum(1).mean(), rel=1e-12)
