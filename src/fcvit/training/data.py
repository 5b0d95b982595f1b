"""What a run trains on: two splits with the same classes, and the order and view of every image."""

import dataclasses
from collections.abc import Generator
from pathlib import Path

import numpy as np
from PIL import Image

from fcvit.data.folders import legible
from fcvit.data.labeled import LabeledImages, known_classes, read_dataset
from fcvit.data.loader import Batch, Workers, batches
from fcvit.data.sources import Source, open_source
from fcvit.data.splits import find_layout
from fcvit.data.transforms.augment import Augmentation, augment, erase, pixel_generator
from fcvit.data.transforms.mixing import mix
from fcvit.data.transforms.preprocess import normalize
from fcvit.errors import DoesNotFit, UnreadableFile, UsageError, counted
from fcvit.models.classes import Classes, ClassName, imagenet, order_note, read_classes
from fcvit.models.variants import IMAGENET_CLASSES, Preprocessing, resolve_preprocessing
from fcvit.tasks.classification_recipe import ClassificationRecipe
from fcvit.tasks.recipe import Recipe
from fcvit.weights.reading import Weights


@dataclasses.dataclass(frozen=True)
class Splits:
    """The images of a run.

    Attributes:
        train, val: with the same class indices; val None: no validation.
        classes: in the order of the indices, one for each output.
        notes: how they were found, for people.
    """

    train: LabeledImages
    val: LabeledImages | None
    classes: Classes
    notes: tuple[str, ...]

    def counts(self) -> np.ndarray:
        """Training images of each class."""
        return np.bincount(self.train.labels, minlength=len(self.classes))


def find_splits(recipe: Recipe, weights: Weights | None) -> Splits:
    """Find the images of a recipe, and their classes: those of the recipe's list, else of the weights whose
    head is kept, else the sorted folders.

    Raises:
        UsageError: the recipe names no data.
        UnreadableFile: nothing there.
        DoesNotFit: the classes of the splits, the list and the weights do not go together.
    """
    if not recipe.data:
        raise UsageError("no data: expected the folder or tar of the training images in the recipe, or --data FOLDER")
    given = read_classes(Path(recipe.classes)) if recipe.classes else None
    train_root, val_root, notes = _roots(recipe, given or (weights.classes if weights is not None else None))
    folders = sorted(map(legible, train_root.folders()))
    known, count = given, len(given or ())
    if weights is not None and not recipe.new_head:
        known, count = given or weights.classes, weights.spec.num_classes
        if known is None and count == IMAGENET_CLASSES and set(folders) <= {c.id for c in imagenet()}:
            known = imagenet()
        if given is not None and len(given) != count:
            raise DoesNotFit(
                f"{recipe.classes} lists {len(given)} classes, the weights have {count}; or new_head = true"
            )
        if given is not None and (note := order_note(given, weights.classes)):
            notes.append(note)
    elif given is None:
        known = _named(folders)
        count = len(known)
    try:
        train = read_dataset(train_root, None, known, count)
    except DoesNotFit as error:
        if weights is None or recipe.new_head:
            raise
        raise DoesNotFit(f"{error}; fcvit finetune (or new_head = true) gives the weights a new head") from error
    if count < 2:
        raise DoesNotFit(f"{train_root.path}: one class, {known[0].id if known else '?'}; nothing is told apart by one")
    classes = known or tuple(ClassName(label, label) for label in train.mapping)
    val = None
    if val_root is not None:
        try:
            val = read_dataset(val_root, None, classes, count)
        except (DoesNotFit, UnreadableFile) as error:
            way = "name another with --val FOLDER" if recipe.val else f"train without it: --data {train_root.path}"
            raise type(error)(f"validation images: {error}; or {way}") from error
    elif recipe.held_out:
        train, val = _hold_out(train, recipe)
        notes.append(f"held out for validation: {len(val)} of {len(train) + len(val)} images (seed {recipe.seed})")
    else:
        notes.append("no validation images: neither val nor held_out is given")
    notes += dict.fromkeys((*train.notes, *(val.notes if val is not None else ())))
    missing = [classes[index].id for index in sorted(set(range(count)) - set(train.labels))]
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        notes.append(f"{len(missing)} of {count} classes have no training images: {some}")
    held = f", {counted(len(val), 'validation image')}" if val is not None else ""
    return Splits(
        train, val, classes, (*notes, f"{counted(len(train), 'training image')}{held}, {counted(count, 'class')}")
    )


def _roots(recipe: Recipe, classes: Classes | None) -> tuple[Source, Source | Path | None, list[str]]:
    """Find where training and validation images are, and what to say of it.

    Raises:
        UsageError: two folders may be the training or the validation split.
        UnreadableFile: there is no training split among the folders, or they may be splits or classes.
    """
    val = Path(recipe.val) if recipe.val else None
    layout = find_layout(open_source(Path(recipe.data)), known_classes(classes, 0))
    root, notes = layout.source, list(layout.notes)
    if layout.doubt:
        raise UnreadableFile(
            f"{root.path} has folders of images beside {layout.doubt}: if that is a split, name its folder "
            f"{root.path / layout.doubt}; if it is a class, rename it"
        )
    if not layout.splits:
        return root, val, notes
    train, valid = layout.named("train"), layout.named("val")
    if not train:
        raise UnreadableFile(
            f"{root.path} has a folder {', '.join(layout.splits)} of class folders, but none train; "
            "where are the others?"
        )
    if len(train) > 1:
        raise UsageError(f"{root.path} has the folders {', '.join(train)}: name the one that trains with --data FOLDER")
    if val is None and len(valid) > 1:
        raise UsageError(f"{root.path} has the folders {', '.join(valid)}: say which one validates with --val FOLDER")
    used = train + (valid if val is None else [])
    kind = "these are the splits" if len(used) > 1 else "a split"
    notes.append(f"{root.path} has the folders {', '.join(train + valid)}: {kind}")
    others = sorted({*layout.splits, *layout.others} - set(used))
    if others:
        notes.append(f"not used: {', '.join(others[:5])}{', ...' if len(others) > 5 else ''} in {root.path}")
    return layout.splits[train[0]], layout.splits[valid[0]] if val is None and valid else val, notes


def _hold_out(images: LabeledImages, recipe: Recipe) -> tuple[LabeledImages, LabeledImages]:
    """Training and validation images; a class keeps at least one to train on.

    Raises:
        UsageError: there are too few images for both.
    """
    kept = round(recipe.held_out * len(images))
    if not 1 <= kept < len(images):
        raise UsageError(f"held_out = {recipe.held_out} of {len(images)} images: too few for both splits")
    drawn = set(images.subset(kept, recipe.seed).names)
    trained = {label for name, label in zip(images.names, images.labels, strict=True) if name not in drawn}
    apart = [p for p, name in enumerate(images.names) if name in drawn and images.labels[p] in trained]
    if not apart:
        raise UsageError(
            f"held_out = {recipe.held_out} of {len(images)} images: every class has too few for both splits"
        )
    taken = set(apart)
    return images.take([p for p in range(len(images)) if p not in taken]), images.take(apart)


def input_preprocessing(recipe: Recipe, weights: Weights | None) -> Preprocessing:
    """What the network is trained for: the recipe's wish, else the weights' own, else the variant's."""
    known = weights.preprocessing if weights is not None else None
    return resolve_preprocessing(recipe.preprocessing(), known, recipe.network())


def _named(folders: list[str]) -> Classes:
    """Return class folders as classes, numbers in the order of their values. WordNet ids get ImageNet's names."""
    if all(folder.isascii() and folder.isdecimal() for folder in folders):
        folders = sorted(folders, key=lambda folder: (int(folder), folder))
    names = {c.id: c.name for c in imagenet()}
    if len(folders) == IMAGENET_CLASSES and set(folders) == set(names):
        return imagenet()
    return tuple(ClassName(folder, names.get(folder, folder)) for folder in folders)


@dataclasses.dataclass(frozen=True)
class Augmented:
    """The view of a training image (see `fcvit.data.loader.View`): decided by seed, epoch and place in it."""

    augmentation: Augmentation
    seed: int
    epoch: int

    @property
    def size(self) -> int:
        return self.augmentation.size

    def __call__(self, image: Image.Image, index: int, /) -> np.ndarray:
        return augment(image, self.augmentation, pixel_generator(self.seed, self.epoch, index, "augment"))


@dataclasses.dataclass(frozen=True)
class Division:
    """How a step is divided: each of `processes` takes `parts` of its images, one after the other.

    What is computed depends on the number of parts of a step alone, not on who does them.
    """

    batch_size: int
    processes: int = 1
    rank: int = 0
    parts: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.slots:
            raise UsageError(
                f"batch_size {self.batch_size} is not divisible by {self.slots}, the parts of a step "
                f"({self.processes} processes times accumulate {self.parts})"
            )
        if self.images < 2:
            raise UsageError(
                f"batch_size {self.batch_size} in {self.slots} parts leaves {self.images} image a part; "
                "BatchNorm needs at least two"
            )

    @property
    def slots(self) -> int:
        """Parts of a step, over all processes."""
        return self.processes * self.parts

    @property
    def images(self) -> int:
        """Images of a part."""
        return self.batch_size // self.slots

    def numbers(self, steps: int) -> list[int]:
        """The parts of this process, in order; part `step * slots + slot` of the epoch."""
        mine = range(self.rank * self.parts, (self.rank + 1) * self.parts)
        return [step * self.slots + slot for step in range(steps) for slot in mine]


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Steps of an epoch; images that fill no batch are left out of it (others in each, as the authors do).

    Raises:
        UsageError: there are fewer images than a batch.
    """
    if images < batch_size:
        raise UsageError(f"batch_size {batch_size}: there are only {images} training images; choose a smaller one")
    return images // batch_size


def epoch_parts(
    images: LabeledImages,
    recipe: ClassificationRecipe,
    size: int,
    epoch: int,
    division: Division,
    workers: int | Workers,
) -> Generator[tuple[Batch, np.ndarray]]:
    """The parts of this process in an epoch, with their labels.

    The order is a permutation drawn from seed and epoch; the view of an image is drawn from its place in it.
    """
    order = np.random.default_rng([recipe.seed, epoch]).permutation(len(images))
    steps = steps_per_epoch(len(images), division.batch_size)
    shuffled = images.take(order[: steps * division.batch_size].tolist())
    labels = np.array(shuffled.labels, np.int64)
    view = Augmented(recipe.augmentation(size), recipe.seed, epoch)
    for batch in batches(shuffled, division.numbers(steps), division.images, [view], workers):
        yield batch, labels[batch.indices]


def network_input(
    batch: Batch,
    labels: np.ndarray,
    recipe: ClassificationRecipe,
    preprocessing: Preprocessing,
    epoch: int,
    num_classes: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Mix, normalize, erase: float32 (B, 3, S, S) and targets (B, classes), as in the authors' pipeline."""
    generator = pixel_generator(recipe.seed, epoch, batch.number, "mix")
    pixels, targets = mix(
        batch.pixels[0],
        labels,
        num_classes,
        generator,
        mixup=recipe.mixup,
        cutmix=recipe.cutmix,
        switch=recipe.mix_switch,
        smoothing=recipe.label_smoothing,
    )
    images = normalize(pixels, preprocessing)
    if recipe.erasing:
        generators = [pixel_generator(recipe.seed, epoch, int(index), "erase") for index in batch.indices]
        erase(images, recipe.erasing, generators)
    return images, targets
