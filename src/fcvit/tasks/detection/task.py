"""The detection task for the registry in `fcvit.tasks.base`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fcvit.inference.engines import Engine
from fcvit.models.variants import Preprocessing
from fcvit.tasks.dense import SplitOptions
from fcvit.tasks.detection.comparison import DetectionComparison, compare
from fcvit.tasks.detection.evaluation import DetectionEvaluator
from fcvit.tasks.detection.prediction import Detector, PredictionOptions, detector
from fcvit.tasks.detection.recipe import DetectionRecipe
from fcvit.tasks.detection.training import DetectionTraining
from fcvit.weights.reading import Weights


class Detection:
    """Object detection and instance segmentation (see `fcvit.tasks.base.Task`)."""

    name = "detection"
    recipe = DetectionRecipe
    options = SplitOptions
    prediction = PredictionOptions

    def training(self, recipe: DetectionRecipe, weights: Weights | None) -> DetectionTraining:
        return DetectionTraining(recipe, weights)

    def evaluator(self, loaded: Sequence[Weights], data: Path, options: SplitOptions) -> DetectionEvaluator:
        return DetectionEvaluator(loaded, data, options)

    def predictor(
        self, weights: Weights, preprocessing: Preprocessing, classes: Any, create: Callable[[], Engine]
    ) -> Detector:
        return detector(weights, preprocessing, classes, create)

    def compare(self, first: Path, second: Path, folder: Path | None) -> DetectionComparison:
        return compare(first, second, folder)


TASK = Detection()
