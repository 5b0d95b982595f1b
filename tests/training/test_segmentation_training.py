"""Training of segmentation networks on small made-up images: data, losses, files, resuming and starting weights."""

import contextlib
import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from conftest import SMALL_SEGMENTATION, interrupt_in_step, needs_paddle, write_scenes, write_synthetic
from fcvit.commands.finetune import finetune, finetune_recipe
from fcvit.commands.preview import draw_preview
from fcvit.data.classes import ClassName
from fcvit.data.loader import Batch
from fcvit.data.transforms.segmentation import IGNORED
from fcvit.errors import DoesNotFit, UnreadableFile, UsageError
from fcvit.models.spec import ModelSpec, SemanticFPNOptions
from fcvit.tasks.segmentation.recipe import SegmentationRecipe
from fcvit.tasks.segmentation.training import SegmentationTraining
from fcvit.training.recipe import build_recipe, read_recipe
from fcvit.training.run import resume, train
from fcvit.training.state import read_state
from fcvit.weights.reading import read_weights

pytestmark = needs_paddle


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A data set with 10 training and 3 validation images of two classes. No test changes it."""
    folder = write_scenes(tmp_path_factory.mktemp("scenes") / "data", "train", 10)
    (folder / "classes.csv").write_text("name,red,green,blue\nground,0,0,0\nbox,200,30,30\n")
    return write_scenes(folder, "val", 3)


@pytest.fixture
def small(scenes):
    def build(**fields):
        return SegmentationRecipe(**{**SMALL_SEGMENTATION, "data": str(scenes), **fields})

    return build


@contextlib.contextmanager
def without_pictures():
    """Leave out charts and pages, which take longer than the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fcvit.training.log.training_curves", lambda *_: b"")
        yield


@pytest.fixture(scope="module")
def uninterrupted(scenes, tmp_path_factory):
    """A run of two epochs of three steps with EMA weights and two micro-batches."""
    recipe = SegmentationRecipe(**SMALL_SEGMENTATION, data=str(scenes), **REGULARIZED)
    with without_pictures():
        return train(recipe, folder=tmp_path_factory.mktemp("run") / "run", device="cpu")


REGULARIZED = {"steps_per_epoch": 3, "ema_decay": 0.9, "accumulate": 2, "drop_rate": 0.1, "dice_weight": 0.5}


def test_a_run_writes_the_weights_of_a_segmentation_network(uninterrupted):
    rows = uninterrupted.rows
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 6)]
    assert {"miou", "macc", "aacc", "ema_miou", "loss_ce", "loss_dice"} <= set(rows[0])
    assert rows[0]["loss"] == pytest.approx(rows[0]["loss_ce"] + rows[0]["loss_dice"])
    assert rows[1]["lr"] == pytest.approx(1e-2 * (1 - 5 / 6) ** 0.9, rel=1e-12)
    names = ("last", "last-ema", "best")
    for weights in (read_weights(uninterrupted.folder / f"{name}.safetensors") for name in names):
        assert weights.spec.task == "segmentation" and weights.spec.num_classes == 2
        assert weights.spec.options == SemanticFPNOptions(8, 8, 48, 40)
        assert [c.name for c in weights.classes] == ["ground", "box"] and weights.palette == ((0, 0, 0), (200, 30, 30))
    assert uninterrupted.weights.name == "best.safetensors"
    assert dataclasses.replace(uninterrupted, report="last").weights.name == "last.safetensors"


def state_of(folder):
    progress, tensors = read_state(folder)
    rows = [
        {key: value for key, value in row.items() if key in ("step", "lr", "loss", "miou")} for row in progress.rows
    ]
    return rows, {name: array.tobytes() for name, array in tensors.items()}


@pytest.mark.slow
def test_an_interrupted_and_resumed_run_gives_bit_identical_results(small, uninterrupted, tmp_path, monkeypatch):
    with without_pictures():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_in_step(patch, 4)
            train(small(**REGULARIZED), folder=tmp_path / "run", device="cpu")
        assert read_state(tmp_path / "run")[0].epoch == 1
        resume(tmp_path / "run")
    assert state_of(tmp_path / "run") == state_of(uninterrupted.folder)


@pytest.mark.slow
def test_training_learns_the_task(small, tmp_path):
    with without_pictures():
        done = train(small(epochs=4, steps_per_epoch=15, scale_ratio=(0.8, 1.2)), folder=tmp_path / "run", device="cpu")
    assert done.rows[-1]["loss"] < 0.6 * done.rows[0]["loss"]
    assert done.best["best_miou"] > 65, "the background alone gives 40"


def test_the_networks_input_is_normalized_and_padded_with_the_mean_color(small):
    task = SegmentationTraining(small(scale_ratio=(0.5, 0.5)), None)  # 24 x 20 pixels in a crop of 32 x 32
    transform = task.transform(0)
    image = transform.decode(io.BytesIO(task.train.locations[0].read()), "x")
    pixels, target = transform(image, task.train.targets[0], 0)
    assert target[1] == (20, 24)
    again, _ = transform(image, task.train.targets[0], 0)
    other, _ = transform(image, task.train.targets[0], 1)
    assert (again == pixels).all() and (other != pixels).any()
    batch = Batch(0, np.arange(2), (), (np.stack([pixels, other]),), ([target, target],), ())
    images, labels = task.inputs(batch, 0)
    inputs = images.normalized()
    assert (inputs.dtype, inputs.shape, labels.dtype, labels.shape) == (
        np.float32,
        (2, 3, 32, 32),
        np.uint8,
        (2, 32, 32),
    )
    assert not inputs[0, :, 20:].any() and not inputs[0, :, :, 24:].any() and inputs[0, :, :20, :24].any()
    assert (labels[0, 20:] == IGNORED).all() and set(np.unique(labels[0, :20, :24])) >= {0, 1}
    mean, std = (np.array(values)[:, None, None] for values in (task.preprocessing.mean, task.preprocessing.std))
    expected = (pixels[:, :20, :24] / 255 - mean) / std
    assert np.abs(inputs[0, :, :20, :24] - expected).max() < 1e-5


def softmax(logits):
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


@pytest.fixture
def example():
    """Logits of three classes and labels with ignored pixels, without class 2, as arrays and tensors."""
    import paddle

    generator = np.random.default_rng(0)
    logits, labels = generator.standard_normal((2, 3, 4, 5)), generator.integers(0, 2, (2, 4, 5))
    labels[0, :2], labels[1, 0, 0] = IGNORED, IGNORED
    return logits, labels, paddle.to_tensor(logits), paddle.to_tensor(labels)


def test_the_cross_entropy_is_averaged_over_all_or_valid_pixels(example):
    import paddle

    from fcvit.tasks.segmentation.losses import pixel_cross_entropy

    logits, labels, x, y = example
    valid = labels != IGNORED
    chosen = np.take_along_axis(softmax(logits), np.where(valid, labels, 0)[:, None], 1)[:, 0]
    losses = np.where(valid, -np.log(chosen), 0)
    assert pixel_cross_entropy(x, y).item() == pytest.approx(losses.sum() / 40, rel=1e-12)
    assert pixel_cross_entropy(x, y, "valid").item() == pytest.approx(losses.sum() / valid.sum(), rel=1e-12)
    factors = np.array([0.5, 3.0, 7.0])
    weighted = (losses * factors[np.where(valid, labels, 0)]).sum()
    given = paddle.to_tensor(factors.astype(np.float32))
    assert pixel_cross_entropy(x, y, "all", given).item() == pytest.approx(weighted / 40, rel=1e-12)
    nothing = paddle.full([2, 4, 5], IGNORED, "int64")
    assert [pixel_cross_entropy(x, nothing, mean, given).item() for mean in ("all", "valid")] == [0, 0]


@pytest.mark.parametrize("mean", ["all", "valid"])
def test_a_training_averages_its_loss_over_the_pixels_that_the_recipe_names(small, example, mean):
    from fcvit.tasks.segmentation.losses import pixel_cross_entropy

    _, labels, x, y = example
    loss = SegmentationTraining(small(loss_mean=mean), None).loss(x, labels)["loss_ce"].item()
    assert loss == pytest.approx(pixel_cross_entropy(x, y, mean).item(), rel=1e-6)


def test_the_dice_loss_counts_the_classes_that_occur(example):
    import paddle

    from fcvit.tasks.segmentation.losses import dice_loss

    logits, labels, x, y = example
    valid, probabilities = labels != IGNORED, softmax(logits)
    losses = []
    for index in (0, 1):
        p, t = probabilities[:, index][valid], (labels == index)[valid]
        losses.append(1 - 2 * (p * t).sum() / ((p**2).sum() + t.sum()))
    assert dice_loss(x, y).item() == pytest.approx(np.mean(losses), rel=1e-12)
    right = paddle.to_tensor(np.where(np.arange(3)[:, None, None] == labels[:, None], 50.0, -50.0))
    assert dice_loss(right, y).item() == pytest.approx(0, abs=1e-12)
    assert dice_loss(x, paddle.full([2, 4, 5], IGNORED, "int64")).item() == 0


def test_balanced_class_weights_give_each_class_the_same_total_weight(small):
    task = SegmentationTraining(small(class_weights="balanced"), None)
    pixels = np.zeros(2)
    for index in range(10):
        labels = np.asarray(Image.open(f"{task.train.root}/annotations/train/{index:02d}.png"))
        pixels += [(labels == value).sum() for value in (0, 1)]
    weights = task.class_weights.numpy()
    assert weights * pixels == pytest.approx([pixels.sum() / 2] * 2, rel=1e-6)


def test_training_starts_from_a_classifier(small, tmp_path):
    variant = small().network()
    assert variant.layer_scale == 1e-6
    path = write_synthetic(
        tmp_path / "start.safetensors", ModelSpec(dataclasses.replace(variant, layer_scale=1e-5), 10)
    )
    recipe = small(weights=str(path))
    task = SegmentationTraining(recipe, read_weights(path, None, recipe.network()))
    tensors = dict(task.network().named_parameters())
    assert "neck, decode_head and the four norms" in task.notes[-1]
    stored = read_weights(path).tensors
    name = "network.0.0.layer_scale_1"
    assert (tensors[f"backbone.{name}"].numpy() == stored[name]).all()
    assert (tensors["backbone.norm0.weight"].numpy() == 1).all()
    fresh = dict(SegmentationTraining(small(), None).network().named_parameters())
    assert (fresh[f"backbone.{name}"].numpy() == np.float32(1e-6)).all()


def test_the_head_of_a_segmentation_network_is_kept_or_new(small, tmp_path):
    spec = ModelSpec(small().network(), 2, "semantic_fpn", SemanticFPNOptions(16, 24))
    path = write_synthetic(tmp_path / "start.safetensors", spec)
    stored = read_weights(path)
    for new_head in (False, True):
        task = SegmentationTraining(small(weights=str(path), new_head=new_head), stored)
        model = task.network()
        assert (model.options.neck, model.options.channels, model.options.long_side) == (16, 24, 48)
        same = model.decode_head.conv_seg.weight.numpy() == stored.tensors["decode_head.conv_seg.weight"]
        assert same.all() != new_head
        lateral = model.neck.lateral_convs[0].conv.bias.numpy()
        assert (lateral == stored.tensors["neck.lateral_convs.0.conv.bias"]).all()
    three = write_synthetic(tmp_path / "three.safetensors", dataclasses.replace(spec, num_classes=3))
    with pytest.raises(DoesNotFit, match=r"2 classes, but the weights have 3; set new_head = true"):
        SegmentationTraining(small(weights=str(three)), read_weights(three))


@pytest.mark.slow
def test_finetuning_keeps_the_head_for_the_same_class_list(uninterrupted, scenes, tmp_path, notes):
    words = {"epochs": "1", "freeze": "true", "device": "cpu", "workers": 0}
    with without_pictures():
        done = finetune(uninterrupted.weights, scenes, **words, lr="1e-9", warmup_lr="0", folder=tmp_path / "run")
    assert any("class list matches" in note and "--new-head true" in note for note in notes)
    assert {"batch_size 2: a quarter of the training images", "crop_size 40: the shorter side of scale"} <= {*notes}
    before, after = read_weights(uninterrupted.weights), read_weights(done.folder / "last.safetensors")
    assert (after.spec, after.classes, after.palette) == (before.spec, before.classes, before.palette)
    last = "decode_head.conv_seg.weight"
    assert np.abs(before.tensors[last] - after.tensors[last]).max() < 1e-6
    assert "miou" in done.rows[0]


def test_finetuning_for_other_classes_has_a_new_last_layer(uninterrupted, tmp_path):
    """The order of the classes matters, because it gives the values in the label maps."""
    data = write_scenes(tmp_path / "data", ".", 10)
    for names in (("box", "ground"), ("ground", "car"), None):
        if names:
            (data / "classes.csv").write_text("\n".join(names))
        else:
            (data / "classes.csv").unlink()
        recipe, notes = finetune_recipe(uninterrupted.weights, data)
        assert recipe.new_head and any("--new-head false" in note for note in notes) == (names is None)
        assert (recipe.neck_channels, recipe.head_channels, recipe.scale) == (8, 8, (48, 40))
        assert (recipe.schedule, recipe.layer_decay, recipe.held_out) == ("poly", 0.9, 0.2), "the recipe segmentation"
    words = {"new-head": "false", "crop-size": "64,64", "ignore-index": ["7", "255"], "label_suffix": ""}
    recipe, notes = finetune_recipe(uninterrupted.weights, data, words)
    assert (recipe.new_head, recipe.crop_size, recipe.ignore_index) == (False, (64, 64), (7, 255))
    assert not any("class list" in note or "crop" in note for note in notes)


@pytest.fixture
def classifier(small, tmp_path):
    return write_synthetic(tmp_path / "start.safetensors", ModelSpec(small().network(), 2))


@pytest.mark.slow
def test_finetuning_a_classifier_on_label_maps_creates_neck_and_head(classifier, scenes, tmp_path, notes):
    fields = {"epochs": 1, "scale": (48, 40), "neck_channels": 8, "device": "cpu", "workers": 0}
    with without_pictures():
        done = finetune(classifier, scenes, **fields, folder=tmp_path / "run")
    assert any("images/train and annotations/train" in note and "--task classification" in note for note in notes)
    assert any("newly initialized: neck, decode_head and the four norms" in note for note in notes)
    kept = read_weights(done.weights)
    assert kept.spec.task == "segmentation" and [c.name for c in kept.classes] == ["ground", "box"]


@pytest.mark.parametrize("change", ["other names", "two folders", "classes of the weights"])
def test_finetuning_a_classifier_never_guesses_the_task(classifier, tmp_path, change):
    """Folders with these names can be classes, too."""
    data = write_scenes(tmp_path / "data", ".", 8)
    if change == "other names":
        for path in sorted((data / "annotations").iterdir())[1:]:
            path.rename(path.with_name(f"1{path.name}"))
    elif change == "two folders":
        write_scenes(data / "masks", ".", 1)
        (data / "masks" / "images" / "00.png").rename(data / "masks" / "00.png")
    else:
        names = tuple(ClassName(name, name) for name in ("annotations", "images"))
        write_synthetic(tmp_path / "start.safetensors", read_weights(classifier).spec, names)
    with pytest.raises(UsageError) as error:
        finetune_recipe(classifier, data)
    command = f"fcvit finetune --weights {classifier} --data {data} --task"
    for task in ("segmentation", "classification"):
        assert f"for {task}, run: {command} {task}" in str(error.value)
    assert error.value.exit_code == 2
    recipe, _ = finetune_recipe(classifier, data, {"task": "classification"})
    assert recipe.task == "classification" and recipe.layer_decay == 0.75
    if change == "classes of the weights":
        assert not recipe.new_head
        assert finetune_recipe(classifier, data, {"task": "segmentation"})[0].task == "segmentation"


def test_a_frozen_backbone_and_layer_decay_find_the_prefixed_names(small, tmp_path):
    from fcvit.training.batches import MicroBatches
    from fcvit.training.optimizer import depth_of, freeze_backbone
    from fcvit.training.step import Trainer

    recipe = small(weights="some", freeze=True, layer_decay=0.5)
    task = SegmentationTraining(recipe, None)
    model = task.network()
    freeze_backbone(model)
    trainer = Trainer(model, recipe, MicroBatches(4), task.loss)
    trainer.train_mode()
    before = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 2, (4, 32, 32)).astype(np.uint8)
    trainer.run(iter([(images, labels)]), 0.01)
    changed = {name for name, tensor in model.state_dict().items() if (tensor.numpy() != before[name]).any()}
    assert changed == {name for name in before if not name.startswith("backbone.")}
    depths = {name: depth_of(name, model.variant.depths) for name in before}
    assert depths["backbone.patch_embed.proj.weight"] == 0 and depths["backbone.network.6.0.norm1.weight"] == 4
    assert {depths[n] for n in before if n.startswith(("neck", "decode_head", "backbone.norm"))} == {5}


def test_only_the_head_synchronizes_its_statistics(small):
    from paddle import nn

    from fcvit.training.step import use_synchronized_batchnorm

    model = SegmentationTraining(small(), None).network()
    before = list(model.state_dict())
    use_synchronized_batchnorm(model, head_only=True)
    kinds = {n: type(x) for n, x in model.named_sublayers() if isinstance(x, nn.SyncBatchNorm | nn.BatchNorm2D)}
    assert {n.partition(".")[0] for n, kind in kinds.items() if kind is nn.SyncBatchNorm} == {"decode_head"}
    assert {n.partition(".")[0] for n, kind in kinds.items() if kind is not nn.SyncBatchNorm} == {"backbone"}
    assert list(model.state_dict()) == before


def task_of(folder, **fields):
    return SegmentationTraining(SegmentationRecipe(**{**SMALL_SEGMENTATION, "data": str(folder), **fields}), None)


def test_masks_of_0_and_255_are_not_guessed(tmp_path):
    """The object would be ignored and never learned."""
    folder = write_scenes(tmp_path / "data", "train", 4)
    for path in (folder / "annotations" / "train").iterdir():
        labels = np.array(Image.open(path))
        Image.fromarray(np.where(labels == 0, 0, 255).astype(np.uint8)).save(path)
    with pytest.raises(UsageError, match=r"fcvit \.\.\. --label-values 0 255;.* --ignore-index 255"):
        task_of(folder)
    task = task_of(folder, label_values=(0, 255))
    assert len(task.classes) == 2 and task.encoding.mapping() == {0: 0, 255: 1}
    with pytest.raises(DoesNotFit, match="only one class"):
        task_of(folder, ignore_index=(255,))


def test_label_maps_and_classes_are_compared_before_the_first_step(tmp_path):
    folder = write_scenes(tmp_path / "data", "train", 4)
    classes = tmp_path / "classes.txt"
    classes.write_text("box\n")
    with pytest.raises(DoesNotFit, match=r"values 0 to 1 .*but 1 class need.*--reduce-zero-label"):
        task_of(folder, classes=str(classes))
    classes.write_text("ground\nbox\nsky\n")
    task = task_of(folder, classes=str(classes))
    assert task.notes[-2:] == ("1 of 3 classes have no training pixels: sky", "4 training images, 3 classes")
    Image.fromarray(np.full((40, 48), 7, np.uint8)).save(folder / "annotations" / "train" / "01.png")
    Image.fromarray(np.zeros((20, 48), np.uint8)).save(folder / "annotations" / "train" / "02.png")
    (folder / "annotations" / "train" / "03.png").unlink()
    notes = "\n".join(task_of(folder, classes=str(classes)).notes)
    assert "left out 1 image without a label" in notes and "2 label maps cannot be used" in notes
    assert "annotations/train/01.png: values outside the classes (0 to 2): 7" in notes
    assert "annotations/train/02.png: 48 x 20 pixels, but its image has 48 x 40" in notes


def test_validation_images_are_found_or_held_out(scenes, tmp_path):
    assert (len(task_of(scenes).train), len(task_of(scenes).val)) == (10, 3)
    plain = write_scenes(tmp_path / "data", ".", 10)
    task = task_of(plain, held_out=0.3)
    assert (len(task.train), len(task.val)) == (7, 3) and not set(task.train.names) & set(task.val.names)
    assert task_of(plain, held_out=0.3).val.names == task.val.names != task_of(plain, held_out=0.3, seed=1).val.names
    assert task_of(plain).val is None
    other = write_scenes(tmp_path / "other", ".", 2)
    assert len(task_of(plain, val=str(other)).val) == 2
    with pytest.raises(UsageError, match="also training images"):
        task_of(plain, val=str(plain))
    with pytest.raises(UsageError, match="too few images"):
        task_of(plain, held_out=0.01)
    with pytest.raises(UnreadableFile, match="no segmentation data set"):
        task_of(scenes / "images")
    with pytest.raises(UsageError, match="no data"):
        task_of("")


@pytest.mark.parametrize(("name", "variant"), [(f"segmentation_{v}", v) for v in ("fcvit_b12", "fcvit_b24")])
def test_the_recipe_matches_the_authors_configuration(name, variant):
    recipe = read_recipe(name)
    stated = {
        "variant": variant, "lr": 2e-4, "peak_lr": 2e-4, "weight_decay": 1e-4, "decay_all": True, "beta1": 0.9,
        "beta2": 0.999, "eps": 1e-8, "clip_norm": None, "schedule": "poly", "poly_power": 0.9, "lr_update": "step",
        "min_lr": 0, "warmup_epochs": 0, "total_epochs": 10, "steps_per_epoch": 4000, "batch_size": 32,
        "drop_path_rate": 0, "drop_rate": 0, "layer_decay": 1, "ema_decay": None, "precision": "float32",
        "neck_channels": 256, "head_channels": 128, "head_dropout": 0.1, "scale": (2048, 512), "crop_size": (512, 512),
        "scale_ratio": (0.5, 2.0), "max_class_share": 0.75, "flip": 0.5, "distortion": True, "loss_mean": "all",
        "dice_weight": 0, "class_weights": "none", "report": "last", "batchnorm": "sync_head",
    }  # fmt: skip
    assert {key: getattr(recipe, key) for key in stated} == stated
    assert recipe.network().layer_scale == 1e-6


def test_fields_of_classification_are_rejected():
    with pytest.raises(UsageError, match="input_size is for classification"):
        read_recipe("segmentation", {"input_size": "64"})
    with pytest.raises(UsageError, match="no field 'mixup'"):
        read_recipe("segmentation", {"mixup": "0.1"})
    with pytest.raises(UsageError, match="scale_ratio"):
        read_recipe("segmentation", {"scale_ratio": "2,0.5"})
    with pytest.raises(UsageError, match="neck_channels = 0"):
        read_recipe("segmentation", {"neck_channels": "0"})


def test_lists_are_read_as_words_of_the_command_line():
    for words in (["0", "255"], "0,255", "[0, 255]", [0, 255]):
        assert read_recipe("segmentation", {"label_values": words}).label_values == (0, 255)
    assert read_recipe("segmentation", {"ignore_index": ["7"]}).ignore_index == (7,)
    recipe = read_recipe("segmentation", {"label-values": ["none"], "ignore_index": "0"})
    assert (recipe.label_values, recipe.ignore_index) == (None, (0,))
    stored = {k: v for k, v in dataclasses.asdict(recipe).items() if v is not None}
    assert build_recipe(stored, {}, "x") == recipe


def test_a_preview_shows_images_with_their_labels(small, tmp_path):
    preview = draw_preview(small(), tmp_path / "preview.png", images=2, versions=3)
    with Image.open(preview.path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    reddish = (pixels[..., 0] - pixels[..., 1] > 60) & (pixels[..., 0] - pixels[..., 2] > 60)
    assert reddish.mean() > 0.005, "the color of the box is painted"
