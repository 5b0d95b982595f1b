"""The segmentation task for the registry in `fcvit.tasks.base`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fcvit.inference.engines import Engine
from fcvit.models.variants import Preprocessing
from fcvit.tasks.segmentation.comparison import SegmentationComparison, compare
from fcvit.tasks.segmentation.evaluation import Options, SegmentationEvaluator
from fcvit.tasks.segmentation.prediction import PredictionOptions, Segmenter, segmenter
from fcvit.tasks.segmentation.recipe import SegmentationRecipe
from fcvit.tasks.segmentation.training import SegmentationTraining
from fcvit.weights.reading import Weights


class Segmentation:
    """Semantic segmentation (see `fcvit.tasks.base.Task`)."""

    name = "segmentation"
    recipe = SegmentationRecipe
    options = Options
    prediction = PredictionOptions

    def training(self, recipe: SegmentationRecipe, weights: Weights | None) -> SegmentationTraining:
        return SegmentationTraining(recipe, weights)

    def evaluator(self, loaded: Sequence[Weights], data: Path, options: Options) -> SegmentationEvaluator:
        return SegmentationEvaluator(loaded, data, options)

    def predictor(
        self, weights: Weights, preprocessing: Preprocessing, classes: Any, create: Callable[[], Engine]
    ) -> Segmenter:
        return segmenter(weights, preprocessing, classes, create)

    def compare(self, first: Path, second: Path, folder: Path | None) -> SegmentationComparison:
        return compare(first, second, folder)


TASK = Segmentation()
