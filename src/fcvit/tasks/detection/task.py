"""The detection task for the registry in `fcvit.tasks.base`."""

import dataclasses
from collections.abc import Callable
from typing import Any

from fcvit.inference.engines import Engine
from fcvit.models.variants import Preprocessing
from fcvit.tasks.detection.prediction import Detector, PredictionOptions, detector
from fcvit.tasks.detection.recipe import DetectionRecipe
from fcvit.tasks.detection.training import DetectionTraining
from fcvit.weights.reading import Weights


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `fcvit eval` for detection: none yet."""


class Detection:
    """Object detection and instance segmentation (see `fcvit.tasks.base.Task`)."""

    name = "detection"
    recipe = DetectionRecipe
    options = Options
    prediction = PredictionOptions

    def training(self, recipe: DetectionRecipe, weights: Weights | None) -> DetectionTraining:
        return DetectionTraining(recipe, weights)

    def predictor(
        self, weights: Weights, preprocessing: Preprocessing, classes: Any, create: Callable[[], Engine]
    ) -> Detector:
        return detector(weights, preprocessing, classes, create)


TASK = Detection()
