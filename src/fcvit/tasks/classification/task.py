"""The classification task for the registry in `fcvit.tasks.base`."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fcvit.data.class_indices import composed_ids
from fcvit.data.classes import as_classes, resolve_classes
from fcvit.data.training_splits import find_splits
from fcvit.inference.engines import Engine
from fcvit.models.variants import IMAGENET_CLASSES, Preprocessing
from fcvit.tasks.base import OwnData
from fcvit.tasks.classification.comparison import ClassifierComparison, compare
from fcvit.tasks.classification.evaluation import ClassificationEvaluator, Options
from fcvit.tasks.classification.prediction import Classifier, PredictionOptions
from fcvit.tasks.classification.recipe import ClassificationRecipe
from fcvit.tasks.classification.training import ClassificationTraining
from fcvit.weights.reading import Weights

logger = logging.getLogger("fcvit")


class Classification:
    """Image classification (see `fcvit.tasks.base.Task`)."""

    name = "classification"
    own_images = "finetune"
    recipe = ClassificationRecipe
    options = Options
    prediction = PredictionOptions

    def training(self, recipe: ClassificationRecipe, weights: Weights | None) -> ClassificationTraining:
        return ClassificationTraining(recipe, weights)

    def known_fields(self, weights: Weights) -> dict[str, Any]:
        return {}

    def own_data(self, recipe: ClassificationRecipe, weights: Weights) -> OwnData:
        splits = find_splits(recipe, weights)
        # The order does not matter, because the head keeps the order of the weights.
        same = {*composed_ids(splits.classes)} == {*composed_ids(weights.classes)}
        return OwnData(len(splits.train), same, "class folders match")

    def recognize(self, data: Path, weights: Weights, fields: Mapping[str, Any]) -> None:
        return None

    def evaluator(self, loaded: Sequence[Weights], data: Path, options: Options) -> ClassificationEvaluator:
        return ClassificationEvaluator(loaded, data, options)

    def predictor(
        self, weights: Weights, preprocessing: Preprocessing, classes: Any, create: Callable[[], Engine]
    ) -> Classifier:
        given = None if classes is None else as_classes(classes)
        names = resolve_classes(given, weights.classes, weights.spec.num_classes)
        engine = create()
        if given is None and weights.classes is None and weights.spec.num_classes == IMAGENET_CLASSES:
            logger.info("the weights have no class names: ImageNet classes are used; pass others with --classes FILE")
        return Classifier(weights, engine, preprocessing, names)

    def compare(self, first: Path, second: Path, folder: Path | None) -> ClassifierComparison:
        return compare(first, second, folder)


TASK = Classification()
