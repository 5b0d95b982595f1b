"""Training of Mask R-CNN: data splits, augmentation of images with boxes and masks, sampling, and losses."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from fcvit.data.class_colors import bright_colors
from fcvit.data.coco import Instances
from fcvit.data.loader import Batch
from fcvit.data.transforms.augment import pixel_generator
from fcvit.data.transforms.detection import DetectionAugmentation, DetectionTarget, augment, pad_batch
from fcvit.data.transforms.pixel_batch import PixelBatch
from fcvit.data.transforms.segmentation import decode, normalization_table
from fcvit.frameworks import import_framework
from fcvit.models.build import build_detector, weights_of
from fcvit.models.variants import resolve_preprocessing
from fcvit.report.instances import draw_instances, instance_colors
from fcvit.tasks.detection.evaluation import DetectionEvaluator, Options
from fcvit.tasks.detection.losses import detection_losses
from fcvit.tasks.detection.recipe import DetectionRecipe
from fcvit.tasks.detection.splits import find_coco_splits
from fcvit.tasks.detection.targets import drawn_from
from fcvit.training.step import mixed_precision
from fcvit.weights.reading import Weights

if TYPE_CHECKING:
    from paddle import Tensor

    from fcvit.models.mask_rcnn.network import MaskRCNN

Targets = tuple[Sequence[DetectionTarget], Sequence[np.random.Generator]]
"""The objects of each image, and the generator that draws its samples."""


@dataclasses.dataclass(frozen=True)
class AugmentedInstances:
    """The augmentation of an image with its instances, determined by the seed, the epoch and its position in it."""

    augmentation: DetectionAugmentation
    seed: int
    epoch: int

    decode: ClassVar = staticmethod(decode)

    def __call__(self, image: Image.Image, target: Instances, index: int, /) -> tuple[np.ndarray, DetectionTarget]:
        generator = pixel_generator(self.seed, self.epoch, index, "augment")
        return augment(np.asarray(image), target, self.augmentation, generator)


class DetectionTraining:
    """The training task of a Mask R-CNN (see `fcvit.tasks.base.TrainingTask`).

    Args:
        recipe: Recipe of the run.
        weights: Initial weights of a Mask R-CNN, a classifier or a backbone, or None.

    Raises:
        UsageError, UnreadableFile, DoesNotFit: Images, annotations, classes and weights do not match.
        MissingExtra: OpenCV or pycocotools is not installed.
    """

    def __init__(self, recipe: DetectionRecipe, weights: Weights | None):
        self.recipe, self.start = recipe, weights
        opencv = import_framework("cv2")
        import_framework("pycocotools")
        self.train, self.val, self.notes = find_coco_splits(recipe, weights)
        self.classes = self.train.classes
        self.groups = self.train.landscape.tolist() if recipe.one_orientation else None
        self.identity = {"classes": [c.id for c in self.classes], "opencv": opencv.__version__}
        known = weights.preprocessing if weights is not None else None
        self.preprocessing = resolve_preprocessing(recipe.preprocessing(), known, recipe.network())
        self.score = "mask_ap" if recipe.masks else "box_ap"
        scores = {"box_ap": "box AP", "mask_ap": "mask AP"} if recipe.masks else {"box_ap": "box AP"}
        self.shown = {
            "loss": ("loss", "{:.4f}"),
            **{name: (label, "{:.1f}") for name, label in scores.items()},
            **{f"ema_{name}": (f"EMA {label}", "{:.1f}") for name, label in scores.items()},
            "images_per_second": ("images/s", "{:.1f}"),
        }

    def network(self) -> "MaskRCNN":
        """Build the network. Parts that the weights do not contain, or the last layers on request, are new."""
        recipe, weights = self.recipe, self.start
        self.model, new = build_detector(
            recipe.network(),
            weights,
            len(self.classes),
            recipe.drop_path_rate,
            recipe.drop_rate,
            options=recipe.head_options(),
            new_head=recipe.new_head,
        )
        if weights is not None and new:
            self.notes = (*self.notes, f"{weights.source.path}: newly initialized: {new}")
        return self.model

    def transform(self, epoch: int) -> AugmentedInstances:
        return AugmentedInstances(self.recipe.augmentation(), self.recipe.seed, epoch)

    def inputs(self, batch: Batch, epoch: int) -> tuple[PixelBatch, Targets]:
        """Pad the images. The samples of an image follow from its position."""
        pixels, sizes = pad_batch(batch.pixels[0])
        generators = [pixel_generator(self.recipe.seed, epoch, index, "sample") for index in batch.indices]
        return PixelBatch(pixels, normalization_table(self.preprocessing), sizes), (batch.targets[0], generators)

    def draw(self, images: np.ndarray, targets: Targets) -> np.ndarray:
        """Paint the masks over the images, and draw the boxes, in the colors of the classes."""
        palette = bright_colors(len(self.classes))
        drawn = []
        for image, target in zip(images, targets[0], strict=True):
            masks = None
            if target.masks is not None:
                rest = [(0, whole - own) for whole, own in zip(image.shape[:2], target.masks.shape[1:], strict=True)]
                masks = (np.pad(mask.astype(bool), rest) for mask in target.masks)
            colors = instance_colors(target.labels, palette)
            drawn.append(np.asarray(draw_instances(Image.fromarray(image), target.boxes, colors, masks=masks)))
        return np.stack(drawn)

    def loss(self, outputs: Any, targets: Targets) -> "dict[str, Tensor]":
        objects, generators = targets
        precision = functools.partial(mixed_precision, self.recipe.precision)
        draws = [drawn_from(generator) for generator in generators]
        return detection_losses(self.model, outputs, objects, draws, self.recipe.sampling(), precision)

    def weights(self, model: "MaskRCNN", **options: Any) -> Weights:
        return weights_of(model, head="mask_rcnn", preprocessing=self.preprocessing, classes=self.classes, **options)

    def evaluator(self, loaded: Sequence[Weights]) -> DetectionEvaluator:
        assert self.val is not None
        return DetectionEvaluator(loaded, self.val, Options())

    def row(self, result: Any) -> dict[str, float]:
        """Return box AP and mask AP in percent."""
        return {"box_ap": result.box_ap} | ({"mask_ap": result.mask_ap} if self.recipe.masks else {})
