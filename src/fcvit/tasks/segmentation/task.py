"""The segmentation task for the registry in `fcvit.tasks.base`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fcvit.inference.engines import Engine
from fcvit.models.variants import Preprocessing
from fcvit.tasks.base import OwnData
from fcvit.tasks.segmentation.comparison import SegmentationComparison, compare
from fcvit.tasks.segmentation.evaluation import Options, SegmentationEvaluator
from fcvit.tasks.segmentation.prediction import PredictionOptions, Segmenter, segmenter
from fcvit.tasks.segmentation.recipe import SegmentationRecipe
from fcvit.tasks.segmentation.splits import own_maps, recognize_maps
from fcvit.tasks.segmentation.training import SegmentationTraining
from fcvit.weights.reading import Weights


class Segmentation:
    """Semantic segmentation (see `fcvit.tasks.base.Task`)."""

    name = own_images = "segmentation"
    recipe = SegmentationRecipe
    options = Options
    prediction = PredictionOptions

    def training(self, recipe: SegmentationRecipe, weights: Weights | None) -> SegmentationTraining:
        return SegmentationTraining(recipe, weights)

    def known_fields(self, weights: Weights) -> dict[str, Any]:
        known = weights.spec.options
        scale = (known.long_side, known.short_side)
        return {"neck_channels": known.neck, "head_channels": known.channels, "scale": scale}

    def own_data(self, recipe: SegmentationRecipe, weights: Weights) -> OwnData:
        return own_maps(recipe, weights)

    def recognize(self, data: Path, weights: Weights, fields: Mapping[str, Any]) -> str | None:
        return recognize_maps(data, weights, fields.get("label_suffix"))

    def evaluator(self, loaded: Sequence[Weights], data: Path, options: Options) -> SegmentationEvaluator:
        return SegmentationEvaluator(loaded, data, options)

    def predictor(
        self, weights: Weights, preprocessing: Preprocessing, classes: Any, create: Callable[[], Engine]
    ) -> Segmenter:
        return segmenter(weights, preprocessing, classes, create)

    def compare(self, first: Path, second: Path, folder: Path | None) -> SegmentationComparison:
        return compare(first, second, folder)


TASK = Segmentation()
