"""The task of image classification, as the registry knows it."""

from collections.abc import Sequence
from pathlib import Path

from fcvit.tasks.classification.comparison import ResultComparison, compare
from fcvit.tasks.classification.evaluation import ClassificationEvaluator, Options
from fcvit.tasks.classification.recipe import ClassificationRecipe
from fcvit.tasks.classification.training import ClassificationTraining
from fcvit.weights.reading import Weights


class Classification:
    """See `fcvit.tasks.base.Task`."""

    name = "classification"
    recipe = ClassificationRecipe
    options = Options

    def training(self, recipe: ClassificationRecipe, weights: Weights | None) -> ClassificationTraining:
        return ClassificationTraining(recipe, weights)

    def evaluator(self, loaded: Sequence[Weights], data: Path, options: Options) -> ClassificationEvaluator:
        return ClassificationEvaluator(loaded, data, options)

    def compare(self, first: Path, second: Path, folder: Path | None) -> ResultComparison:
        return compare(first, second, folder)


TASK = Classification()
