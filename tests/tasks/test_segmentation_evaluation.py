"""The evaluation of segmentation networks on a small data set: `fcvit eval` and `fcvit.evaluate`."""

import dataclasses
import json
import re
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from conftest import needs_paddle, write_pth
from fcvit.cli import app
from fcvit.commands.evaluate import evaluate
from fcvit.errors import DoesNotFit, UsageError
from fcvit.evaluation.runner import resume
from fcvit.inference.engines import create_engine
from fcvit.metrics import segmentation as metrics
from fcvit.models.spec import ModelSpec, SemanticFPNOptions
from fcvit.models.variants import VARIANTS
from fcvit.tasks.segmentation.evaluation import LabeledPixels, Options, SegmentationEvaluator
from fcvit.tasks.segmentation.logits import label_map
from fcvit.weights.reading import read_weights
from fcvit.weights.synthetic import synthetic_tensors

SPEC = ModelSpec(VARIANTS["fcvit_digits"], 5, "semantic_fpn", SemanticFPNOptions(16, 8, 96, 64))
COUNT = 5


@pytest.fixture(scope="session")
def maps(tmp_path_factory):
    """A data set with images of different sizes and label maps of five classes, some pixels without a class."""
    root, generator = tmp_path_factory.mktemp("maps"), np.random.default_rng(0)
    for split, count in (("train", 2), ("val", COUNT)):
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True)
        for index in range(count):
            height, width = 40 + 7 * index, 64 - 5 * index
            blocks = generator.integers(0, 6, (height // 8 + 1, width // 8 + 1), np.uint8)
            label = blocks.repeat(8, 0).repeat(8, 1)[:height, :width]
            image = (label[..., None] * 40 + generator.integers(0, 40, (height, width, 3))).astype(np.uint8)
            Image.fromarray(image).save(root / "images" / split / f"{index}.png")
            Image.fromarray(np.where(label == 5, 255, label).astype(np.uint8)).save(
                root / "annotations" / split / f"{index}.png"
            )
    return root


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory):
    return write_pth(tmp_path_factory.mktemp("weights") / "segmenter.pth", synthetic_tensors(SPEC))


def sized(path, options=SPEC.options):
    """Return the weights with the input size of the tests, which a file of mmsegmentation does not contain."""
    weights = read_weights(path)
    return dataclasses.replace(weights, spec=dataclasses.replace(weights.spec, options=options))


def test_the_label_map_equals_pytorchs_resize_for_any_size():
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(1).normal(size=(7, 31, 45))
    for size in ((31, 45), (62, 90), (200, 100), (13, 17), (1, 1)):
        resized = torch.nn.functional.interpolate(
            torch.from_numpy(logits[None]), size, mode="bilinear", align_corners=False
        )
        np.testing.assert_array_equal(label_map(logits, size), resized[0].argmax(0).numpy())


@needs_paddle
@pytest.mark.slow
def test_the_result_is_that_of_the_network_and_the_metric_image_by_image(maps, segmenter, tmp_path, no_charts):
    weights = sized(segmenter)
    evaluation = evaluate(weights, maps, engines="paddle", device="cpu", folder=tmp_path / "run", batch_size=2)
    (result,) = evaluation.results
    evaluator = SegmentationEvaluator([weights], maps, Options())
    transform = evaluator.transform(VARIANTS["fcvit_digits"].preprocessing)
    engine = create_engine("paddle", weights, VARIANTS["fcvit_digits"].preprocessing, "cpu")
    counts = np.zeros((3, 5), np.int64)
    for index, name in enumerate(evaluator.dataset.names):
        image = transform.decode(maps / name, name)
        pixels, label = transform(image, evaluator.dataset.targets[index], index)
        assert pixels.shape[1] % 32 == pixels.shape[2] % 32 == 0 and label.shape == image.size[::-1]
        (logits,) = engine(pixels[None])
        counts += metrics.class_counts(metrics.confusion(label_map(logits, label.shape), label), 5)
    expected = metrics.figures(counts)
    assert (result.miou, result.macc, result.aacc) == (expected.miou, expected.macc, expected.aacc)
    assert result.images == COUNT and 0 < result.aacc < 100


@needs_paddle
@pytest.mark.slow
def test_batch_sizes_workers_and_an_interruption_do_not_change_the_results(maps, segmenter, tmp_path, no_charts):
    weights = sized(segmenter)
    options = {"engines": "paddle", "device": "cpu"}
    evaluate(weights, maps, **options, folder=tmp_path / "a")
    evaluate(weights, maps, **options, folder=tmp_path / "b", batch_size=2, workers=1)
    names = ("predictions.csv", "per_class.csv", "confusion.csv")
    first, second = ([(tmp_path / run / "segmenter-authors" / name).read_bytes() for name in names] for run in "ab")
    assert first == second
    file = tmp_path / "segmenter.pth"
    shutil.copy(segmenter, file)
    evaluate(file, maps, **options, folder=tmp_path / "c", batch_size=2)
    (journal,) = (tmp_path / "c" / "journals").iterdir()
    complete = {name: (tmp_path / "c" / "segmenter-authors" / name).read_bytes() for name in names}
    with journal.open("r+b") as stream:
        stream.truncate(journal.stat().st_size - 40)  # the last batch is incomplete
    resume(tmp_path / "c")
    assert complete == {name: (tmp_path / "c" / "segmenter-authors" / name).read_bytes() for name in names}


@needs_paddle
@pytest.mark.slow
def test_unusable_labels_are_listed_and_the_others_evaluated(maps, segmenter, tmp_path, no_charts):
    data = shutil.copytree(maps, tmp_path / "data")
    Image.new("L", (3, 3)).save(data / "annotations" / "val" / "1.png")
    (data / "annotations" / "val" / "2.png").write_bytes(b"?")
    evaluation = evaluate(sized(segmenter), data, engines="paddle", device="cpu")
    assert evaluation.results[0].images == COUNT - 2
    first, second = evaluation.unreadable
    assert "annotations/val/1.png" in first and "3" in first and "annotations/val/2.png" in second


def test_requests_that_do_not_fit_are_rejected(maps, segmenter, tmp_path):
    weights = sized(segmenter)
    for options, message in (
        ({"protocol": "both"}, "--protocol"),
        ({"preprocessing": {"crop_fraction": 0.5}}, "options of the preprocessing"),
        ({"split": "test"}, "--split test.*train, val"),
        ({"subset": 3}, "subset"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(weights, maps, **options)
    with pytest.raises(UsageError, match="--save-logits"):
        evaluate(weights, maps, save_logits=True, folder=tmp_path / "run")
    with pytest.raises(DoesNotFit, match=r"no segmentation data set.*images and annotations"):
        evaluate(weights, maps / "images" / "val")
    listed = tmp_path / "classes.txt"
    listed.write_text("one\ntwo\n")
    with pytest.raises(DoesNotFit, match=r"2 classes, but .* has 5"):
        evaluate(weights, maps, classes=str(listed))


def test_the_commands_for_masks_of_0_and_255_are_valid_and_keep_the_options(maps, segmenter, tmp_path):
    data, listed = shutil.copytree(maps, tmp_path / "my data"), tmp_path / "classes.txt"
    for path in data.glob("annotations/val/*.png"):
        Image.new("L", (3, 3), 255).save(path)
    listed.write_text("a\nb\nc\nd\ne\n")
    with pytest.raises(UsageError, match="only the values 0 and 255") as error:
        evaluate(segmenter, data, split="val", classes=str(listed))
    commands = [shlex.split(words) for words in re.findall(r"run: (fcvit [^;]*)", str(error.value))]
    common = ["fcvit", "eval", "--weights", segmenter, "--data", data, "--classes", listed, "--split", "val"]
    for command, option in zip(commands, (["--label-values", "0", "255"], ["--ignore-index", "255"]), strict=True):
        assert command == [*map(str, common), *option]
        app.parse_args(command[1:], exit_on_error=False, print_error=False)


def test_the_training_split_can_be_selected(maps, segmenter):
    evaluator = SegmentationEvaluator([sized(segmenter)], maps, Options(split="train"))
    assert len(evaluator.dataset) == 2 and evaluator.validation == "other"
    assert isinstance(evaluator.transform(None), LabeledPixels) and json.dumps(evaluator.identity())
