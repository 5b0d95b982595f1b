"""Training of segmentation networks: data splits, augmentation of images with label maps, and losses of pixels."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from fcvit.data.class_colors import default_palette
from fcvit.data.label_maps import LabelEncoding, LabelFile, read_label
from fcvit.data.loader import Batch
from fcvit.data.painting import overlay
from fcvit.data.transforms import segmentation as transforms
from fcvit.data.transforms.augment import pixel_generator
from fcvit.data.transforms.pixel_batch import PixelBatch
from fcvit.frameworks import import_framework
from fcvit.models.build import build_segmenter, weights_of
from fcvit.models.variants import resolve_preprocessing
from fcvit.tasks.class_weights import balanced
from fcvit.tasks.segmentation.evaluation import Options, SegmentationEvaluator
from fcvit.tasks.segmentation.losses import dice_loss, pixel_cross_entropy
from fcvit.tasks.segmentation.recipe import SegmentationRecipe
from fcvit.tasks.segmentation.results import Result
from fcvit.tasks.segmentation.splits import find_map_splits
from fcvit.weights.reading import Weights

if TYPE_CHECKING:
    from paddle import Tensor

    from fcvit.models.semantic_fpn import SemanticFPN

Target = tuple[np.ndarray, tuple[int, int]]
"""The label map of a crop, and the height and width of the crop without its padding."""


@dataclasses.dataclass(frozen=True)
class AugmentedMaps:
    """The augmentation of an image with its label map, determined by the seed, the epoch and its position in it."""

    augmentation: transforms.SegmentationAugmentation
    encoding: LabelEncoding
    seed: int
    epoch: int

    decode: ClassVar = staticmethod(transforms.decode)

    def __call__(self, image: Image.Image, target: LabelFile, index: int, /) -> tuple[np.ndarray, Target]:
        labels = read_label(target, self.encoding, image.size)
        generator = np.random.RandomState(pixel_generator(self.seed, self.epoch, index, "augment").bit_generator)
        pixels, labels, size = transforms.augment(np.asarray(image), labels, self.augmentation, generator)
        return pixels, (labels, size)


class SegmentationTraining:
    """The training task of a Semantic FPN (see `fcvit.tasks.base.TrainingTask`).

    Args:
        recipe: Recipe of the run.
        weights: Initial weights of a Semantic FPN, a classifier or a backbone, or None.

    Raises:
        UsageError, UnreadableFile, DoesNotFit: Images, label maps, classes and weights do not match.
        MissingExtra: OpenCV is not installed.
    """

    score = "miou"
    shown = {  # noqa: RUF012
        "loss": ("loss", "{:.4f}"),
        "miou": ("mIoU", "{:.2f}%"),
        "ema_miou": ("EMA mIoU", "{:.2f}%"),
        "aacc": ("pixel accuracy", "{:.2f}%"),
        "images_per_second": ("images/s", "{:.1f}"),
    }

    def __init__(self, recipe: SegmentationRecipe, weights: Weights | None):
        self.recipe, self.start = recipe, weights
        opencv = import_framework("cv2")
        splits = find_map_splits(recipe, weights)
        self.train, self.val, self.notes = splits.train, splits.val, splits.notes
        self.classes, self.palette, self.encoding = splits.classes, splits.palette, splits.encoding
        self.identity = {
            "classes": [c.id for c in self.classes],
            "encoding": dataclasses.asdict(self.encoding),
            "opencv": opencv.__version__,
        }
        known = weights.preprocessing if weights is not None else None
        self.preprocessing = resolve_preprocessing(recipe.preprocessing(), known, recipe.network())
        self.class_weights: Tensor | None = None
        if recipe.class_weights == "balanced":
            self.class_weights = import_framework("paddle").to_tensor(balanced(splits.pixels))

    def network(self) -> "SemanticFPN":
        """Build the network. Parts that the weights do not contain, or the last layer on request, are new."""
        recipe, weights = self.recipe, self.start
        model, new = build_segmenter(
            recipe.network(),
            weights,
            len(self.classes),
            recipe.drop_path_rate,
            recipe.drop_rate,
            recipe.head_dropout,
            options=recipe.head_options(),
            new_head=recipe.new_head,
        )
        if weights is not None and new:
            self.notes = (*self.notes, f"{weights.source.path}: newly initialized: {new}")
        return model

    def transform(self, epoch: int) -> AugmentedMaps:
        return AugmentedMaps(self.recipe.augmentation(), self.encoding, self.recipe.seed, epoch)

    def inputs(self, batch: Batch, epoch: int) -> tuple[PixelBatch, np.ndarray]:
        """Return the crops, whose padding is normalized to 0, and label maps, uint8 (B, H, W)."""
        labels, sizes = zip(*batch.targets[0], strict=True)
        table = transforms.normalization_table(self.preprocessing)
        return PixelBatch(batch.pixels[0], table, sizes), np.stack(labels)

    def draw(self, images: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Add each image with its label map painted over it. Ignored pixels and the padding are darker."""
        palette = self.palette or default_palette(len(self.classes))
        painted = np.stack([overlay(image, labels, palette) for image, labels in zip(images, targets, strict=True)])
        height, width = targets.shape[1:]
        return np.concatenate([images, painted], axis=1 if width > height else 2)

    def loss(self, outputs: "Tensor", targets: np.ndarray) -> "dict[str, Tensor]":
        paddle, recipe = import_framework("paddle"), self.recipe
        labels = paddle.to_tensor(targets.astype(np.int64))
        logits = outputs.astype(paddle.float32)  # mixed precision gives 16-bit logits
        losses = {"loss_ce": pixel_cross_entropy(logits, labels, recipe.loss_mean, self.class_weights)}
        if recipe.dice_weight:
            losses["loss_dice"] = recipe.dice_weight * dice_loss(logits, labels)
        return losses

    def weights(self, model: "SemanticFPN", **options: Any) -> Weights:
        return weights_of(
            model,
            head="semantic_fpn",
            preprocessing=self.preprocessing,
            classes=self.classes,
            palette=self.palette,
            **options,
        )

    def evaluator(self, loaded: Sequence[Weights]) -> SegmentationEvaluator:
        assert self.val is not None
        return SegmentationEvaluator(loaded, self.val, Options(), self.encoding)

    def row(self, result: Result) -> dict[str, float]:
        """Return mIoU, mean class accuracy and pixel accuracy in percent."""
        return {"miou": result.miou, "macc": result.macc, "aacc": result.aacc}
