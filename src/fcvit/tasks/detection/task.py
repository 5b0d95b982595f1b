"""The detection task for the registry in `fcvit.tasks.base`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fcvit.data.coco import find_coco
from fcvit.inference.engines import Engine
from fcvit.models.variants import Preprocessing
from fcvit.tasks.base import OwnData
from fcvit.tasks.detection.comparison import DetectionComparison, compare
from fcvit.tasks.detection.evaluation import DetectionEvaluator, Options
from fcvit.tasks.detection.prediction import Detector, PredictionOptions, detector
from fcvit.tasks.detection.recipe import DetectionRecipe, head_fields
from fcvit.tasks.detection.splits import find_coco_splits
from fcvit.tasks.detection.training import DetectionTraining
from fcvit.weights.reading import Weights


class Detection:
    """Object detection and instance segmentation (see `fcvit.tasks.base.Task`)."""

    name = own_images = "detection"
    recipe = DetectionRecipe
    options = Options
    prediction = PredictionOptions

    def training(self, recipe: DetectionRecipe, weights: Weights | None) -> DetectionTraining:
        return DetectionTraining(recipe, weights)

    def known_fields(self, weights: Weights) -> dict[str, Any]:
        return head_fields(weights.spec.options)

    def own_data(self, recipe: DetectionRecipe, weights: Weights) -> OwnData:
        train, _, _ = find_coco_splits(recipe, None)
        names = [{one.name for one in classes or ()} for classes in (train.classes, weights.classes)]
        same = weights.spec.task == self.name and names[0] == names[1]
        return OwnData(len(train), same, "categories match")

    def recognize(self, data: Path, weights: Weights, fields: Mapping[str, Any]) -> str | None:
        layout = find_coco(data)
        return f"annotations in COCO's format ({next(iter(layout.splits.values()))})" if layout else None

    def evaluator(self, loaded: Sequence[Weights], data: Path, options: Options) -> DetectionEvaluator:
        return DetectionEvaluator(loaded, data, options)

    def predictor(
        self, weights: Weights, preprocessing: Preprocessing, classes: Any, create: Callable[[], Engine]
    ) -> Detector:
        return detector(weights, preprocessing, classes, create)

    def compare(self, first: Path, second: Path, folder: Path | None) -> DetectionComparison:
        return compare(first, second, folder)


TASK = Detection()
