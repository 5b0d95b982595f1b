"""The learning rate of the recipe."""

import math

from fcvit.tasks.recipe import Recipe


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """Return the rate in force at a point of the run.

    A linear warm-up from `warmup_lr`, then the schedule over all of `epochs` (the warm-up covers its beginning),
    then `min_lr`. Sources: the authors' `train.py`, whose schedule is timm's cosine; poly and step are those of
    mmcv, which their segmentation and detection use.

    Args:
        recipe: the run's.
        epoch: from 0; with `lr_update = "step"` the fraction is how much of the epoch is done.
    """
    if recipe.lr_update == "epoch":
        epoch = math.floor(epoch)
    peak, low = recipe.peak_lr, recipe.min_lr
    if epoch < recipe.warmup_epochs:
        return recipe.warmup_lr + (peak - recipe.warmup_lr) * epoch / recipe.warmup_epochs
    if recipe.schedule == "step":
        return max(low, peak * recipe.step_factor ** sum(epoch >= at for at in recipe.step_epochs))
    if epoch >= recipe.epochs:
        return low
    if recipe.schedule == "poly":
        return low + (peak - low) * (1 - epoch / recipe.epochs) ** recipe.poly_power
    return low + (peak - low) * (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2
