"""Learning rate schedules, compared with the authors' schedule in each epoch."""

import pytest

from conftest import golden_json
from fcvit.tasks.classification.recipe import ClassificationRecipe
from fcvit.training.schedule import learning_rate

AUTHORS = ClassificationRecipe(variant="fcvit_tiny")


def test_the_default_schedule_matches_the_authors_schedule():
    expected = golden_json("schedule.json")["lr_by_epoch"]
    assert AUTHORS.total_epochs == len(expected) == 310
    assert [learning_rate(AUTHORS, epoch + 0.5) for epoch in range(310)] == pytest.approx(expected, rel=1e-12)


def test_the_learning_rate_is_proportional_to_the_batch_size():
    half = ClassificationRecipe(variant="fcvit_tiny", batch_size=512)
    assert half.peak_lr == 5e-4 and learning_rate(half, 150) == pytest.approx((5e-4 + 1e-6) / 2)
    assert ClassificationRecipe(variant="fcvit_tiny", batch_size=512, lr_batch=0).peak_lr == 1e-3


def test_lr_update_step_changes_the_rate_within_an_epoch():
    steps = ClassificationRecipe(variant="fcvit_tiny", lr_update="step", epochs=10, warmup_epochs=2, cooldown_epochs=1)
    rates = [learning_rate(steps, tenth / 10) for tenth in range(110)]
    assert rates[0] == 1e-6 and rates[10] == pytest.approx((1e-3 + 1e-6) / 2)
    assert rates[:20] == sorted(rates[:20]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert len(set(rates[20:100])) == 80 and set(rates[100:]) == {1e-6}


def test_poly_and_step_schedules_match_mmcv():
    common = {
        "variant": "fcvit_tiny",
        "lr": 1e-2,
        "lr_batch": 0,
        "warmup_epochs": 0,
        "cooldown_epochs": 2,
        "min_lr": 1e-4,
    }
    poly = ClassificationRecipe(**common, epochs=10, schedule="poly")
    assert learning_rate(poly, 4) == pytest.approx(1e-4 + 9.9e-3 * 0.6**0.9) and learning_rate(poly, 11) == 1e-4
    steps = ClassificationRecipe(**common, epochs=12, schedule="step", step_epochs=(8, 11))
    assert [learning_rate(steps, epoch) for epoch in (0, 7, 8, 10, 11, 13)] == pytest.approx(
        [1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4]
    )
    with_warmup = ClassificationRecipe(**{**common, "warmup_epochs": 2, "warmup_lr": 0}, epochs=10, schedule="poly")
    assert learning_rate(with_warmup, 1) == pytest.approx(5e-3)


def test_a_warmup_in_steps_matches_mmcv():
    """The learning rates of mmdetection's 1x schedule with 3,665 steps per epoch."""
    steps, base = 3665, 2e-4
    recipe = ClassificationRecipe(
        variant="fcvit_tiny", lr=base, lr_batch=0, epochs=12, cooldown_epochs=0, min_lr=0, warmup_lr=base * 0.001,
        warmup_steps=500, lr_update="step", schedule="step", step_epochs=(8, 11),
    )  # fmt: skip
    for step in (0, 1, 250, 499):
        expected = base * (1 - (1 - step / 500) * (1 - 0.001))
        assert learning_rate(recipe, step / steps, steps) == pytest.approx(expected, rel=1e-12)
    rates = [learning_rate(recipe, step / steps, steps) for step in (500, 8 * steps - 1, 8 * steps, 11 * steps)]
    assert rates == pytest.approx([base, base, base / 10, base / 100], rel=1e-12)
