"""Training of classifiers: data splits, augmentation, mixup and CutMix, and soft cross-entropy."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fcvit.data.loader import Batch
from fcvit.data.training_splits import find_splits
from fcvit.data.transforms.augment import Augmentation, augment, draw_erasing, pixel_generator
from fcvit.data.transforms.mixing import mix
from fcvit.data.transforms.pixel_batch import PixelBatch, Rectangle
from fcvit.data.transforms.preprocess import normalization_table
from fcvit.frameworks import import_framework
from fcvit.models.build import build_classifier, weights_of
from fcvit.models.variants import resolve_preprocessing
from fcvit.tasks.class_weights import balanced
from fcvit.tasks.classification.evaluation import ClassificationEvaluator, Options
from fcvit.tasks.classification.recipe import ClassificationRecipe
from fcvit.tasks.classification.results import Result
from fcvit.weights.reading import Weights

if TYPE_CHECKING:
    from paddle import Tensor

    from fcvit.models.classifier import FCViT


Target = tuple[int, Rectangle | None]
"""The class of an image, and the rectangle that random erasing draws over it."""


@dataclasses.dataclass(frozen=True)
class Augmented:
    """The augmentation of a training image, determined by the seed, the epoch and its position in the epoch."""

    augmentation: Augmentation
    seed: int
    epoch: int

    def __call__(self, image: Image.Image, target: int, index: int, /) -> tuple[np.ndarray, Target]:
        pixels = augment(image, self.augmentation, pixel_generator(self.seed, self.epoch, index, "augment"))
        if not self.augmentation.erasing:
            return pixels, (target, None)
        generator = pixel_generator(self.seed, self.epoch, index, "erase")
        return pixels, (target, draw_erasing(pixels.shape[1:], self.augmentation.erasing, generator))


class ClassificationTraining:
    """The training task of a classifier (see `fcvit.tasks.base.TrainingTask`).

    Args:
        recipe: Recipe of the run.
        weights: Initial weights, or None.

    Raises:
        UsageError, UnreadableFile, DoesNotFit: Images, classes and weights do not match.
    """

    score = "top1"
    shown = {  # noqa: RUF012
        "loss": ("loss", "{:.4f}"),
        "val_loss": ("validation loss", "{:.4f}"),
        "top1": ("top-1 accuracy", "{:.2f}%"),
        "ema_top1": ("EMA top-1 accuracy", "{:.2f}%"),
        "images_per_second": ("images/s", "{:.1f}"),
    }

    def __init__(self, recipe: ClassificationRecipe, weights: Weights | None):
        self.recipe, self.start = recipe, weights
        splits = find_splits(recipe, weights)
        self.train, self.val, self.classes, self.notes = splits.train, splits.val, splits.classes, splits.notes
        self.identity = {"classes": [c.id for c in self.classes]}
        known = weights.preprocessing if weights is not None else None
        self.preprocessing = resolve_preprocessing(recipe.preprocessing(), known, recipe.network())
        self.class_weights: Tensor | None = None
        if recipe.class_weights == "balanced":
            self.class_weights = import_framework("paddle").to_tensor(balanced(splits.counts()))

    def network(self) -> "FCViT":
        """Build the classifier. Initialize a new head if the recipe requests it or the weights have no head."""
        recipe, weights, count = self.recipe, self.start, len(self.classes)
        if weights is None:
            from fcvit.models.classifier import FCViT

            return FCViT(recipe.network(), count, recipe.drop_path_rate, recipe.drop_rate)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning about the new head, which the recipe requests
            model = build_classifier(weights, None, recipe.drop_path_rate, recipe.drop_rate)
        if recipe.new_head or not model.num_classes:
            model.reset_classifier(count)
            self.notes = (*self.notes, f"{weights.source.path}: initialized a new head for {count} classes")
        return model

    def transform(self, epoch: int) -> Augmented:
        return Augmented(self.recipe.augmentation(self.preprocessing.input_size), self.recipe.seed, epoch)

    def inputs(self, batch: Batch, epoch: int) -> tuple[PixelBatch, np.ndarray]:
        """Mix the images, which are then normalized and erased, in the authors' order. Return targets (B, classes)."""
        recipe = self.recipe
        labels, erased = zip(*batch.targets[0], strict=True)
        pixels, targets = mix(
            batch.pixels[0],
            np.array(labels, np.int64),
            len(self.classes),
            pixel_generator(recipe.seed, epoch, batch.number, "mix"),
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
            switch=recipe.mix_switch,
            smoothing=recipe.label_smoothing,
        )
        return PixelBatch(pixels, normalization_table(self.preprocessing), erased=erased), targets

    def draw(self, images: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return images

    def loss(self, outputs: "Tensor", targets: np.ndarray) -> "dict[str, Tensor]":
        paddle = import_framework("paddle")
        return {"loss": soft_cross_entropy(outputs, paddle.to_tensor(targets), self.class_weights)}

    def weights(self, model: "FCViT", **options: Any) -> Weights:
        return weights_of(model, preprocessing=self.preprocessing, classes=self.classes, **options)

    def evaluator(self, loaded: Sequence[Weights]) -> ClassificationEvaluator:
        assert self.val is not None
        return ClassificationEvaluator(loaded, self.val, Options())

    def row(self, result: Result) -> dict[str, float]:
        """Return loss, top-1 and top-k accuracy. Omit top-k for at most k classes, where it is always 100%."""
        top_k = {f"top{result.k}": result.top_k} if result.k < result.classes else {}
        return {"val_loss": result.loss, "top1": result.top1} | top_k


def soft_cross_entropy(logits: "Tensor", targets: "Tensor", class_weights: "Tensor | None" = None) -> "Tensor":
    """Return the mean cross-entropy with soft targets, in the data type of the targets.

    Args:
        logits, targets: Arrays (B, classes). Each row of targets sums to 1.
        class_weights: Weights (classes,) with mean 1 over the training images. If None, all weights are 1.
    """
    functional = import_framework("paddle").nn.functional
    logits = logits.astype(targets.dtype)
    if class_weights is not None:
        targets = targets * class_weights
    return -(targets * functional.log_softmax(logits, axis=1)).sum(axis=1).mean()
