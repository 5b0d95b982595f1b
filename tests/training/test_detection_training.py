"""Training of detectors on small made-up images: data, files, resuming, starting weights and recipes."""

import contextlib
import dataclasses
import io
import shutil

import numpy as np
import pytest
from PIL import Image

from conftest import SMALL_DETECTION, interrupt_in_step, needs_paddle, write_detector, write_shapes, write_synthetic
from fcvit.commands.finetune import finetune_recipe
from fcvit.commands.preview import draw_preview
from fcvit.data.class_colors import bright_colors
from fcvit.data.loader import Batch
from fcvit.errors import DoesNotFit, UnreadableFile, UsageError
from fcvit.models.spec import MaskRCNNOptions, ModelSpec
from fcvit.tasks.detection.recipe import DetectionRecipe
from fcvit.tasks.detection.training import DetectionTraining
from fcvit.training.recipe import read_recipe
from fcvit.training.run import resume, train
from fcvit.training.state import read_state
from fcvit.weights.reading import read_weights

pytest.importorskip("cv2")
pytest.importorskip("pycocotools")
pytestmark = needs_paddle
LOSSES = ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A data set with 7 wide and 5 high training images of two classes. No test changes it."""
    sizes = [(48, 64), (64, 48)] * 5 + [(40, 64)] * 2
    return write_shapes(tmp_path_factory.mktemp("shapes") / "data", "train", sizes)


@pytest.fixture(scope="module")
def small(shapes):
    def build(**fields):
        return DetectionRecipe(**{**SMALL_DETECTION, "data": str(shapes), **fields})

    return build


@contextlib.contextmanager
def without_pictures():
    """Leave out charts, which take longer than the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fcvit.training.log.training_curves", lambda *_: b"")
        yield


REGULARIZED = {"ema_decay": 0.9, "accumulate": 2, "drop_rate": 0.1, "held_out": 0.25}


@pytest.fixture(scope="module")
def uninterrupted(small, tmp_path_factory):
    """A run of two epochs of two steps with EMA weights, two micro-batches and a validation on three images."""
    with without_pictures():
        return train(small(**REGULARIZED), folder=tmp_path_factory.mktemp("run") / "run", device="cpu")


def test_a_run_logs_five_losses_and_writes_the_weights_of_a_detector(uninterrupted):
    rows = uninterrupted.rows
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 2), (2, 4)]
    assert [name for name in rows[0] if name.startswith("loss_")] == [*LOSSES]
    assert rows[0]["loss"] == pytest.approx(sum(rows[0][name] for name in LOSSES))
    for name in ("last", "last-ema"):
        weights = read_weights(uninterrupted.folder / f"{name}.safetensors")
        assert (weights.spec.task, weights.spec.num_classes) == ("detection", 2)
        assert weights.spec.options == DetectionRecipe(**SMALL_DETECTION).head_options()
        assert [c.name for c in weights.classes] == ["disc", "square"]


def test_each_epoch_is_validated_and_logged(uninterrupted):
    for row in uninterrupted.rows:
        assert all(0 <= row[name] <= 100 for name in ("box_ap", "mask_ap", "ema_box_ap", "ema_mask_ap"))
    columns = (uninterrupted.folder / "log.csv").read_text().splitlines()[0].split(",")
    assert columns[:10] == ["epoch", "step", "lr", *LOSSES, "loss", "box_ap"]
    assert {"mask_ap", "ema_box_ap", "ema_mask_ap", "images_per_second"} < {*columns}
    assert uninterrupted.weights.name == "best.safetensors" and "best_mask_ap" in uninterrupted.best


@pytest.mark.slow
@pytest.mark.parametrize(("masks", "best"), [(True, 1), (False, 2)])
def test_the_best_weights_have_the_highest_mask_ap_or_box_ap_without_masks(small, tmp_path, monkeypatch, masks, best):
    scores = iter([{"box_ap": 10.0, "mask_ap": 30.0}, {"box_ap": 20.0, "mask_ap": 25.0}])
    monkeypatch.setattr(DetectionTraining, "row", lambda *_: next(scores))
    with without_pictures():
        done = train(small(held_out=0.25, steps_per_epoch=1, masks=masks), folder=tmp_path / "run", device="cpu")
    assert done.best["epoch"] == best
    tensors = [read_weights(tmp_path / "run" / f"{name}.safetensors").tensors for name in ("best", "last")]
    assert (tensors[0]["neck.fpn_convs.0.conv.bias"] == tensors[1]["neck.fpn_convs.0.conv.bias"]).all() == (best == 2)


def state_of(folder):
    progress, tensors = read_state(folder)
    rows = [
        {key: row[key] for key in ("step", "lr", "loss", *LOSSES, "box_ap", "ema_mask_ap")} for row in progress.rows
    ]
    return rows, {name: array.tobytes() for name, array in tensors.items()}


@pytest.mark.slow
def test_an_interrupted_and_resumed_run_gives_bit_identical_results(small, uninterrupted, tmp_path, monkeypatch):
    with without_pictures():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_in_step(patch, 3)
            train(small(**REGULARIZED), folder=tmp_path / "run", device="cpu")
        assert read_state(tmp_path / "run")[0].epoch == 1
        resume(tmp_path / "run")
    assert state_of(tmp_path / "run") == state_of(uninterrupted.folder)


@pytest.mark.slow
def test_training_learns_the_task(small, tmp_path):
    """The losses of the second stage are not compared, because they rise while the proposals become better."""
    with without_pictures():
        done = train(small(epochs=8, lr=1e-2, warmup_steps=3), folder=tmp_path / "run", device="cpu")
    first, last = done.rows[0], done.rows[-1]
    assert last["loss_rpn_cls"] < 0.5 * first["loss_rpn_cls"] and last["loss_mask"] < 0.8 * first["loss_mask"]


def inputs_of(task, positions, epoch=0):
    """Return a batch of training images as the loop builds it, and the network's inputs."""
    images, transform = task.train.take(positions), task.transform(epoch)
    samples = []
    for index, (location, target) in enumerate(zip(images.locations, images.targets, strict=True)):
        samples.append(transform(transform.decode(io.BytesIO(location.read()), "x"), target, index))
    pixels, targets = zip(*samples, strict=True)
    batch = Batch(0, np.arange(len(samples)), (), ([*pixels],), ([*targets],), ())
    images, targets = task.inputs(batch, epoch)
    return batch, (images.normalized(), targets)


def test_images_are_padded_to_the_largest_and_their_objects_travel_with_them(small):
    task = DetectionTraining(small(flip=0.0), None)
    batch, (images, (targets, _)) = inputs_of(task, [0, 10])
    assert images.shape == (2, 3, 64, 64) and [target.size for target in targets] == [(48, 64), (40, 64)]
    assert (images[0, :, 48:] == 0).all() and (images[1, :, 40:] == 0).all()
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (task.preprocessing.mean, task.preprocessing.std))
    pixels = images[1, :, :40] * std + mean
    assert np.abs(pixels * 255 - batch.pixels[0][1]).max() < 1e-3
    for target, original in zip(targets, [task.train.targets[0], task.train.targets[10]], strict=True):
        assert target.boxes.tolist() == original.corners().tolist() and target.labels.tolist() == [0, 1]
        areas = target.masks.sum((1, 2))
        assert np.abs(areas - original.areas).max() <= 0.1 * original.areas.max()


def test_the_samples_of_an_image_follow_from_seed_epoch_and_position(small):
    def draws(seed, epoch):
        _, (_, (_, generators)) = inputs_of(DetectionTraining(small(seed=seed), None), [0, 1], epoch)
        return [generator.random() for generator in generators]

    assert draws(0, 0) == draws(0, 0)
    assert len({*draws(0, 0), *draws(1, 0), *draws(0, 1)}) == 6


def test_wide_and_high_images_are_not_mixed(small):
    from fcvit.training.batches import MicroBatches, epoch_batches

    task = DetectionTraining(small(), None)
    assert DetectionTraining(small(one_orientation=False), None).groups is None
    for epoch in range(3):
        batches = epoch_batches(task.train, 0, epoch, task.transform(epoch), MicroBatches(2), 0, None, task.groups)
        wide = [{width > height for height, width in (t.size for t in batch.targets[0])} for batch in batches]
        assert len(wide) == 6 and sum(len(kinds) == 2 for kinds in wide) == 1, "7 and 5 images: one pair is mixed"


def test_a_preview_shows_images_with_boxes_and_masks(small, tmp_path):
    preview = draw_preview(small(flip=0.5), tmp_path / "preview.png", images=3, versions=2)
    with Image.open(preview.path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    task = DetectionTraining(small(flip=0.0), None)
    image = np.full((1, 64, 64, 3), 100, np.uint8)
    _, (_, targets) = inputs_of(task, [0])
    drawn = task.draw(image, targets)[0]
    factor = len(drawn) // 64
    x1, y1, x2, y2 = (factor * targets[0][0].boxes[1]).astype(int)
    color = list(bright_colors(2)[1])
    assert drawn[y1, x1].tolist() == drawn[y2 - 1, x2 - 1].tolist() == color, "the color of the second class"
    inside = drawn[y1 + 3 * factor, x1 + 3 * factor].tolist()
    assert inside not in ([100, 100, 100], color) and (drawn[60 * factor :, 60 * factor :] == 100).all()
    assert pixels.std() > 0


def test_training_starts_from_a_classifier_or_a_detector(small, tmp_path):
    weights = read_weights(write_synthetic(tmp_path / "classifier.safetensors", ModelSpec(small().network(), 10)))
    task = DetectionTraining(small(weights=str(weights.source.path)), weights)
    model = task.network()
    assert "newly initialized" in task.notes[-1]
    name = "network.0.0.layer_scale_1"
    assert (dict(model.named_parameters())[f"backbone.{name}"].numpy() == weights.tensors[name]).all()

    spec = ModelSpec(small().network(), 2, "mask_rcnn", small().head_options())
    weights = read_weights(write_synthetic(tmp_path / "detector.safetensors", spec))
    for new_head in (False, True):
        model = DetectionTraining(small(weights="x", new_head=new_head), weights).network()
        same = model.roi_head.bbox_head.fc_cls.bias.numpy() == weights.tensors["roi_head.bbox_head.fc_cls.bias"]
        assert same.all() != new_head
    weights = read_weights(write_synthetic(tmp_path / "three.safetensors", dataclasses.replace(spec, num_classes=3)))
    with pytest.raises(DoesNotFit, match=r"2 classes, but the weights have 3; set new_head = true"):
        DetectionTraining(small(weights="x"), weights)


def test_a_frozen_backbone_does_not_change(small):
    from fcvit.training.batches import MicroBatches
    from fcvit.training.optimizer import freeze_backbone
    from fcvit.training.step import Trainer

    recipe = small(weights="some", freeze=True)
    task = DetectionTraining(recipe, None)
    model = task.network()
    freeze_backbone(model)
    trainer = Trainer(model, recipe, MicroBatches(4), task.loss)
    trainer.train_mode()
    before = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    trainer.run(iter([inputs_of(task, [0, 2, 4, 6])[1]]), 0.01)
    changed = {name for name, tensor in model.state_dict().items() if (tensor.numpy() != before[name]).any()}
    assert changed == {name for name in before if not name.startswith("backbone.")}


def test_without_masks_the_network_is_a_faster_rcnn(small, tmp_path):
    recipe = small(masks=False)
    task = DetectionTraining(recipe, None)
    model = task.network()
    assert (task.score, "mask_ap" in task.shown) == ("box_ap", False)
    assert not any("mask_head" in name for name in model.state_dict())
    _, (images, targets) = inputs_of(task, [0, 2])
    assert targets[0][0].masks is None
    import paddle

    losses = task.loss(model(paddle.to_tensor(images)), targets)
    assert [*losses] == [*LOSSES[:4]]
    assert DetectionTraining(small(), None).score == "mask_ap"


def test_splits_and_classes_are_compared_before_the_first_step(shapes, small, tmp_path):
    assert DetectionTraining(small(), None).val is None
    held_out = DetectionTraining(small(held_out=0.25), None)
    assert (len(held_out.train), len(held_out.val)) == (9, 3)
    assert not set(held_out.train.names) & set(held_out.val.names)
    write_shapes(tmp_path / "both", "train", [(48, 64)] * 2)
    folder = write_shapes(tmp_path / "both", "val", [(48, 64)] * 3, ("square", "disc"))
    task = DetectionTraining(small(data=str(folder)), None)
    assert (len(task.train), len(task.val)) == (2, 3)
    assert [c.name for c in task.val.classes] == ["disc", "square"], "the order of the training images"
    assert task.val.targets[0].labels.tolist() == [1, 0]
    names = tmp_path / "classes.txt"
    names.write_text("square\n")
    task = DetectionTraining(small(classes=str(names)), None)
    assert [len(target.labels) for target in task.train.targets] == [1] * 12
    with pytest.raises(UsageError, match="no data"):
        DetectionTraining(small(data=""), None)
    with pytest.raises(UnreadableFile, match=r"no annotations in COCO's format; expected"):
        DetectionTraining(small(data=str(shapes / "train")), None)


@pytest.mark.parametrize("variant", ["fcvit_b12", "fcvit_b24"])
def test_the_recipe_matches_the_authors_configuration(variant):
    recipe = read_recipe(f"detection_{variant}")
    stated = {
        "variant": variant, "lr": 2e-4, "peak_lr": 2e-4, "weight_decay": 1e-4, "decay_all": True, "beta1": 0.9,
        "beta2": 0.999, "eps": 1e-8, "clip_norm": None, "schedule": "step", "step_epochs": (8, 11), "step_factor": 0.1,
        "warmup_steps": 500, "warmup_lr": 2e-7, "lr_update": "step", "min_lr": 0, "total_epochs": 12,
        "steps_per_epoch": None, "batch_size": 32, "drop_path_rate": 0, "drop_rate": 0, "layer_decay": 1,
        "ema_decay": None, "masks": True, "scale": (1333, 800), "flip": 0.5, "vertical_flip": 0,
        "one_orientation": True, "report": "last",
        "training_before_nms": 2000, "rpn_samples": 256, "roi_samples": 512,
    }  # fmt: skip
    assert {key: getattr(recipe, key) for key in stated} == stated
    assert recipe.head_options() == MaskRCNNOptions()
    assert recipe.network().layer_scale == 1e-6


def test_fields_of_other_tasks_are_rejected():
    with pytest.raises(UsageError, match="input_size is for classification"):
        read_recipe("detection", {"input_size": "64"})
    with pytest.raises(UsageError, match="no field 'crop_size'"):
        read_recipe("detection", {"crop_size": "64,64"})
    with pytest.raises(UsageError, match="anchor_scale"):
        read_recipe("detection", {"anchor_scale": "0"})


def test_finetuning_a_detector_keeps_its_head_for_the_same_categories(shapes, tmp_path):
    """The order of the categories does not matter, because they are compared by name. Widths and limits are kept."""
    weights = write_detector(tmp_path / "det.safetensors", max_detections=7)
    recipe, notes = finetune_recipe(weights, shapes)
    assert recipe.task == "detection" and not recipe.new_head
    assert any("categories match" in note for note in notes)
    assert recipe.head_options() == read_weights(weights).spec.options
    assert (recipe.max_detections, recipe.scale, recipe.schedule) == (7, (64, 48), "cosine"), "the recipe detection"
    other = write_shapes(tmp_path / "other", "train", [(48, 64)] * 6, ("square", "ring"))
    recipe, notes = finetune_recipe(weights, other)
    assert recipe.new_head and not any("categories match" in note for note in notes)


def test_finetuning_a_classifier_on_annotations_trains_a_detector(shapes, small, tmp_path):
    classifier = write_synthetic(tmp_path / "classifier.safetensors", ModelSpec(small().network(), 2), None)
    recipe, notes = finetune_recipe(classifier, shapes)
    assert recipe.task == "detection" and recipe.new_head
    assert any("COCO's format (annotations/instances_train" in note for note in notes)
    both = tmp_path / "both"
    shutil.copytree(shapes, both)
    (both / "images").mkdir()
    for image in sorted((both / "train").iterdir()):
        shutil.copy(image, both / "images" / image.name)
        Image.new("L", (64, 48)).save(both / "annotations" / f"{image.stem}.png")
    with pytest.raises(UsageError) as error:
        finetune_recipe(classifier, both)
    for task in ("segmentation", "detection", "classification"):
        assert f"--task {task}" in str(error.value)
