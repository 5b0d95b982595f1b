"""Learning rate schedules."""

import math

from fcvit.tasks.recipe import Recipe


def learning_rate(recipe: Recipe, epoch: float, steps: int = 1) -> float:
    """Return the learning rate at a point of the run.

    The rate rises linearly from `warmup_lr` during the warm-up, then follows the schedule, and is `min_lr` in the
    cool-down. The schedule spans all `epochs`, and the warm-up replaces its beginning. Cosine is timm's schedule, which
    the authors' `train.py` uses. Poly and step are mmcv's schedules, which their segmentation and detection use.

    Args:
        recipe: Recipe of the run.
        epoch: Epoch, counted from 0. With `lr_update = "step"` the fraction is the finished part of the epoch.
        steps: Steps per epoch, for `warmup_steps`.
    """
    if recipe.lr_update == "epoch":
        epoch = math.floor(epoch)
    peak, low = recipe.peak_lr, recipe.min_lr
    if epoch < (warmup := recipe.warmup(steps)):
        return recipe.warmup_lr + (peak - recipe.warmup_lr) * epoch / warmup
    if recipe.schedule == "step":
        return max(low, peak * recipe.step_factor ** sum(epoch >= at for at in recipe.step_epochs))
    if epoch >= recipe.epochs:
        return low
    if recipe.schedule == "poly":
        return low + (peak - low) * (1 - epoch / recipe.epochs) ** recipe.poly_power
    return low + (peak - low) * (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2
