"""Test results, files, report page and comparison of segmentation evaluations, without a network."""

import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fcvit.data.classes import ClassName
from fcvit.errors import BadImages, DoesNotFit, UnreadableFile, UsageError
from fcvit.evaluation.protocols import Protocol
from fcvit.metrics import segmentation as metrics
from fcvit.models.variants import VARIANTS, Preprocessing, published
from fcvit.report.image_grid import WRONG
from fcvit.report.label_grid import CORRECT, LabelRow, label_grid
from fcvit.tasks.segmentation.comparison import compare
from fcvit.tasks.segmentation.figures import SegmentationReport
from fcvit.tasks.segmentation.published import compare_with_published, validation_of
from fcvit.tasks.segmentation.results import RECORD, Sample, record

CLASSES = tuple(ClassName(f"c{i}", name) for i, name in enumerate(("sky", "road", "tree", "car", "cat", "<b>")))
PALETTE = np.array([(70, 130, 180), (128, 64, 128), (0, 90, 0), (0, 0, 142), (255, 200, 0), (9, 9, 9)], np.uint8)
AUTHORS = Protocol("authors", Preprocessing(), {})
B12 = VARIANTS["fcvit_b12"]


def scenes(images=5, seed=0, accuracy=0.8):
    """Return label maps of classes 0 to 3 with ignored pixels, and predictions of classes 0 to 4."""
    generator = np.random.default_rng(seed)
    labels, predictions = [], []
    for number in range(images):
        height, width = 24 + 3 * number, 40
        label = generator.integers(0, 4, (height // 6 + 1, width // 6 + 1)).repeat(6, 0).repeat(6, 1)[:height, :width]
        wrong = generator.random(label.shape) > accuracy + 0.03 * number
        prediction = np.where(wrong, generator.integers(0, 5, label.shape), label)
        label = np.where(generator.random(label.shape) < 0.1, 255, label)
        labels.append(label.astype(np.uint8))
        predictions.append(prediction.astype(np.uint8))
    return labels, predictions


class Data:
    """The data of a report. The first image of the data set is unreadable. `drawn` has the images that are drawn."""

    rule, classes, palette, validation, about = "label maps", CLASSES, PALETTE, "other", {"ignore": 255}

    def __init__(self, labels, by_configuration):
        names = (f"{number:03d}.jpg" for number in range(len(labels)))
        self.dataset = SimpleNamespace(names=("bad.jpg", *names))
        self.labels, self.by_configuration, self.drawn = labels, by_configuration, []

    def sample(self, configuration, index):
        index -= 1
        self.drawn.append(index)
        label = self.labels[index]
        image = Image.fromarray(PALETTE[np.minimum(label, 5)])
        return Sample(image, label, self.by_configuration[configuration.name][index])


def configuration(name, reference=None, **values):
    source = SimpleNamespace(path="seg.pth", sha256="0" * 64)
    weights = values.pop("weights", SimpleNamespace(source=source, spec=SimpleNamespace(variant=B12)))
    defaults = {"engine": "paddle", "precision": "float32", "protocol": AUTHORS}
    return SimpleNamespace(name=name, weights=weights, reference=reference, **(defaults | values))


def report_of(labels, *predictions, configurations=None, digests=None, data=None):
    configurations = configurations or [configuration(f"seg-{i}") for i in range(len(predictions))]
    count = len(labels)
    rows, content = np.zeros((count, len(predictions)), RECORD), {}
    for position, images in enumerate(predictions):
        for row, (prediction, label) in enumerate(zip(images, labels, strict=True)):
            before = configurations[position].reference
            reference = None if before is None else predictions[before][row]
            rows[row, position], content[row, position] = record(prediction, label, reference)
    if digests is None:
        digests = np.arange(8 * count, dtype=np.uint8).reshape(count, 8)
    evaluated = SimpleNamespace(
        configurations=configurations,
        batch_size=1,
        precisions=sorted({each.precision for each in configurations}),
        index=np.arange(1, count + 1),
        digests=digests,
        records=rows,
        bytes_of=content,
        left_out=[("bad.jpg", "truncated")],
        seconds=[1.0] * len(predictions),
        devices=["cpu"] * len(predictions),
        about={"data": "/data/scenes", "task": "segmentation", "versions": {"fcvit": "1"}},
    )
    named = {each.name: images for each, images in zip(configurations, predictions, strict=True)}
    return SegmentationReport((data or Data)(labels, named), evaluated)


def write_run(folder, labels, predictions, **options):
    folder.mkdir()
    report_of(labels, predictions, **options).write(folder)
    return folder


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def direct(labels, predictions):
    """Return aAcc, IoU and Acc from all pixels at once, by definition."""
    label, prediction = (np.concatenate([image.ravel() for image in images]) for images in (labels, predictions))
    label, prediction = label[label != 255], prediction[label != 255]
    iou, acc = [], []
    for index in range(len(CLASSES)):
        hit = ((label == index) & (prediction == index)).sum()
        union = ((label == index) | (prediction == index)).sum()
        iou.append(100 * hit / union if union else np.nan)
        acc.append(100 * hit / (label == index).sum() if (label == index).any() else np.nan)
    return 100 * (label == prediction).mean(), iou, acc


def test_the_result_equals_a_computation_from_all_pixels():
    labels, predictions = scenes()
    (result,) = report_of(labels, predictions).results
    aacc, iou, acc = direct(labels, predictions)
    assert result.aacc == pytest.approx(aacc, rel=1e-12)
    assert [c.iou for c in result.per_class] == pytest.approx(iou, rel=1e-12, nan_ok=True)
    assert [c.acc for c in result.per_class] == pytest.approx(acc, rel=1e-12, nan_ok=True)
    assert result.miou == pytest.approx(np.nanmean(iou)) and result.macc == pytest.approx(np.nanmean(acc))
    assert (result.images, result.unreadable, result.classes, result.absent) == (5, 1, 6, 1)
    assert result.pixels == sum((label != 255).sum() for label in labels)
    low, high = result.miou_interval
    assert low < result.miou < high
    cat = result.per_class[4]  # predicted, but never labeled
    assert (cat.iou, cat.images, cat.labeled, cat.mistaken_for) == (0, 0, 0, "") and cat.predicted > 0
    sky = result.per_class[0]
    assert sky.images == 5 and sky.iou_interval[0] < sky.iou < sky.iou_interval[1]
    wrong = [sum(((p == c) & (t == 0)).sum() for p, t in zip(predictions, labels, strict=True)) for c in range(1, 6)]
    assert sky.mistaken_for == f"c{1 + int(np.argmax(wrong))}"
    assert sky.mistaken == pytest.approx(100 * max(wrong) / sky.labeled)


def test_the_files_contain_the_figures_of_classes_and_images(tmp_path, no_charts):
    labels, predictions = scenes()
    labels[2][:] = 255  # an image without labeled pixels
    report = report_of(labels, predictions)
    report.write(tmp_path)
    folder, (result,) = tmp_path / "seg-0", report.results
    written = json.loads((folder / "metrics.json").read_text())
    assert written["miou"] == result.miou and written["task"] == "segmentation" and written["ignore"] == 255
    assert written["per_class"][5]["iou"] is None and written["left_out"] == [
        {"path": "bad.jpg", "reason": "truncated"}
    ]
    rows = read_csv(folder / "predictions.csv")
    assert [row["path"] for row in rows] == [f"{i:03d}.jpg" for i in range(5)]
    aacc, iou, _ = direct(labels[:1], predictions[:1])
    assert (rows[0]["miou"], rows[0]["aacc"]) == (f"{np.nanmean(iou):.4f}", f"{aacc:.4f}")
    assert (rows[2]["miou"], rows[2]["aacc"], rows[2]["labeled"]) == ("", "", "0")
    classes = read_csv(folder / "per_class.csv")
    assert [row["name"] for row in classes] == [c.name for c in CLASSES]
    assert classes[1]["iou"] == f"{result.per_class[1].iou:.4f}" and classes[5]["iou"] == ""
    matrix = np.zeros((6, 6), int)
    for row in read_csv(folder / "confusion.csv"):
        matrix[int(row["label"]), int(row["predicted"])] += int(row["pixels"])
    assert (matrix == report.sums[0].matrix).all() and matrix.sum() == result.pixels


def test_the_result_does_not_depend_on_the_order_of_the_images():
    labels, predictions = scenes()
    digests = np.arange(40, dtype=np.uint8).reshape(5, 8)
    one = report_of(labels, predictions, digests=digests).results[0]
    other = report_of(labels[::-1], predictions[::-1], digests=digests[::-1]).results[0]
    assert (one.miou, one.fingerprint) == (other.miou, other.fingerprint)
    labels[0][0, 0] ^= 1
    assert report_of(labels, predictions, digests=digests).results[0].fingerprint != one.fingerprint


def test_the_worst_and_best_images_are_read_one_at_a_time(tmp_path, no_charts):
    labels, predictions = scenes(20, accuracy=0.3)
    labels[3][:] = 255
    report = report_of(labels, predictions)
    report.write(tmp_path)
    order = np.argsort(np.nan_to_num(report.sums[0].miou, nan=200))[:19]
    assert report.evaluator.drawn == [*order[:6], *order[::-1][:6]]


class Vanishing(Data):
    def sample(self, configuration, index):
        raise BadImages("gone") if index % 2 else FileNotFoundError(2, "gone")


def test_images_that_vanished_are_left_out_of_the_pictures(tmp_path, no_charts):
    report_of(*scenes(), data=Vanishing).write(tmp_path)
    with Image.open(tmp_path / "seg-0" / "worst.png") as empty:
        assert empty.height < 150


@pytest.mark.slow
def test_the_page_shows_classes_and_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    labels, predictions = scenes()
    report = report_of(labels, predictions)
    report.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    (result,) = report.results
    assert f"{result.miou:.2f}% (95% confidence interval" in page and page.count("<img") == 3
    assert "no pixels" in page and "&lt;b&gt;" in page and "<b>" not in page and "bad.jpg" in page
    assert "1 of 6: neither labeled nor predicted, left out of the mIoU" in page
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    report_of(labels, predictions).write(tmp_path)
    assert {path: path.read_bytes() for path in before} == before


def test_without_the_report_extra_everything_else_is_written(tmp_path, no_charts, notes):
    report_of(*scenes()).write(tmp_path)
    assert "pip install 'fcvit[report]'" in notes[-1] and f"fcvit resume {tmp_path}" in notes[-1]
    expected = {"best.png", "confusion.csv", "metrics.json", "per_class.csv", "predictions.csv", "worst.png"}
    assert {path.name for path in (tmp_path / "seg-0").iterdir()} == expected


def test_the_terminal_shows_the_metrics_as_mmsegmentation_prints_them():
    report = report_of(*scenes())
    tables = list(report.tables())
    cells = [next(iter(column.cells)) for column in tables[0].columns]
    (result,) = report.results
    assert cells[2] == metrics.printed(result.miou) and cells[5] == metrics.printed(result.aacc)
    names, *_, last = (list(column.cells) for column in tables[2].columns)
    assert names[-2:] == ["cat", "<b>"] and last[-2:] == ["no pixels", "no pixels"]


def test_no_labeled_pixel_gives_undefined_metrics(tmp_path, no_charts):
    labels, predictions = scenes(2)
    report = report_of([np.full_like(label, 255) for label in labels], predictions)
    (result,) = report.results
    assert np.isnan([result.miou, result.macc, result.aacc, *result.miou_interval]).all() and result.absent == 6
    report.write(tmp_path)
    assert json.loads((tmp_path / "seg-0" / "metrics.json").read_text())["miou"] is None
    assert list(report.tables())


def test_likely_errors_in_the_labels_are_reported():
    labels, predictions = scenes(accuracy=0.9)
    assert report_of(labels, predictions).hints == []
    high = [np.where(label == 255, 255, label + 1).astype(np.uint8) for label in labels]
    assert "one too high; the label maps may count from 1 (reduce_zero_label)" in report_of(high, predictions).hints[0]
    low = [np.where(label == 255, 255, label).astype(np.uint8) for label in labels]
    assert "one too low" in report_of(low, [prediction + np.uint8(1) for prediction in predictions]).hints[0]
    labels[0][0, :7], labels[1][0, 0] = 200, 6
    report = report_of(labels, predictions)
    assert report.results[0].outside == {6: 1, 200: 7}
    assert "8 pixels have labels that are not one of the 6 classes (6, 200)" in report.hints[0]


def test_engines_and_precisions_are_compared():
    labels, first = scenes()
    second = [image.copy() for image in first]
    second[0][:2] = 0
    changed = int((second[0] != first[0]).sum())
    one = configuration("a")
    both = [one, configuration("b", reference=0, weights=one.weights, precision="bfloat16")]
    report = report_of(labels, first, second, configurations=both)
    (agreement,), (effect,) = report.agreements, report.effects
    pixels = sum(label.size for label in labels)
    assert agreement.pixel_agreement == pytest.approx(100 * (pixels - changed) / pixels)
    assert agreement.engines == ("paddle (float32)", "paddle (bfloat16)")
    means = [np.nanmean(direct(labels, images)[1]) for images in (first, second)]
    assert [result.miou for result in report.results] == pytest.approx(means)
    assert effect.difference == pytest.approx(means[1] - means[0])
    assert effect.interval[0] <= effect.difference <= effect.interval[1] <= 0
    same = report_of(labels, first, first, configurations=both)
    assert same.effects[0].interval == (0, 0) and same.agreements[0].pixel_agreement == 100
    assert len(list(report.tables())) == 6


def test_the_journal_record_has_the_pairs_and_a_digest_of_the_label():
    label, prediction = np.array([[0, 1, 255]], np.uint8), np.array([[0, 0, 2]], np.uint8)
    row, content = record(prediction, label, reference=np.array([[0, 1, 2]], np.uint8))
    assert (row["pixels"], row["differing"]) == (3, 1)
    assert metrics.decode(content).tolist() == [(0, 0, 1), (1, 0, 1)]
    assert record(prediction.T, label.T)[0]["label"].tolist() != row["label"].tolist()
    with pytest.raises(DoesNotFit, match="resize the logits"):
        record(prediction.T, label)


VALIDATION = [f"validation/ADE_val_{number:08d}.jpg" for number in range(1, 2001)]


def test_ade20ks_validation_images_are_recognized_by_their_names():
    assert validation_of(VALIDATION) == "all" and validation_of(VALIDATION[5:]) == "part"
    for names in (["a.jpg"], [*VALIDATION, "a.jpg"], ["ADE_val_00002001.jpg"], ["ADE_val_00000001.jpg"] * 2, []):
        assert validation_of(names) == "other"


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({}, "reproduced"),
        ({"miou": 43.4}, "reproduced"),
        ({"miou": 43.41}, "differs"),
        ({"miou": 43.19}, "differs"),
        ({"images": 1000, "validation": "part", "miou": 42.0, "interval": (40, 44)}, "consistent"),
        ({"images": 1000, "validation": "part", "miou": 41.0, "interval": (39, 43)}, "inconsistent"),
        ({"images": 1999, "miou": 42.0, "interval": (40, 44)}, "inconsistent"),  # one unreadable image
        ({"classes": 149}, "not comparable"),
        ({"validation": "other"}, "not comparable"),
        ({"miou": float("nan")}, "not comparable"),
    ],
)
def test_the_miou_is_compared_with_the_published_figure(given, verdict):
    usual = {"classes": 150, "validation": "all", "miou": 43.3, "interval": (42, 45), "images": 2000}
    comparison = compare_with_published(B12, protocol=AUTHORS, **(usual | given))
    assert (comparison.figure, comparison.verdict) == (43.3, verdict)


def test_only_published_variants_and_the_authors_protocol_are_compared():
    given = (150, AUTHORS, "all", 43.3, (42, 45), 2000)
    assert compare_with_published(VARIANTS["fcvit_tiny"], *given) is None
    assert compare_with_published(VARIANTS["fcvit_digits"], *given) is None
    assert compare_with_published(B12, 150, Protocol("custom", Preprocessing(), {}), *given[2:]) is None
    assert {name: row.ade20k_miou for name, v in VARIANTS.items() if (row := published(v))} == {
        "fcvit_tiny": None,
        "fcvit_b12": 43.3,
        "fcvit_b24": 45.5,
        "fcvit_b48": None,
    }


def grid_of(label, prediction, image=None):
    image = image or Image.new("RGB", label.shape[::-1], "#123456")
    return np.array(label_grid([LabelRow("caption", image, label, prediction)], "title", ["a", "b"], PALETTE[:2]))


def has_color(pixels, color):
    return bool((pixels == color).all(axis=-1).any())


def test_the_pictures_are_in_the_colors_of_the_data():
    """The label, the prediction and the difference are in columns of 224 pixels after the image."""
    label = np.zeros((52, 104), np.uint8)
    label[:, 52:] = 1
    prediction = np.zeros_like(label)
    label[:10] = 255
    pixels = grid_of(label, prediction)
    image, labels, predicted, difference = (
        pixels[108 : 108 + 104, 16 + 224 * k : 16 + 224 * k + 208] for k in range(4)
    )
    assert (image == (0x12, 0x34, 0x56)).all()
    assert (labels[40:, :100] == PALETTE[0]).all() and (labels[40:, 110:] == PALETTE[1]).all()
    assert (labels[:15] == 255).all() and (predicted == PALETTE[0]).all()
    right, wrong = (tuple(bytes.fromhex(color[1:])) for color in (CORRECT, WRONG))
    assert (difference[40:, :100] == right).all() and (difference[40:, 110:] == wrong).all()
    assert (difference[:15] == 255).all()


def test_the_legend_has_only_the_classes_of_the_image():
    label = np.zeros((8, 8), np.uint8)
    first = grid_of(label, label)
    assert has_color(first, PALETTE[0]) and not has_color(first, PALETTE[1])
    many = np.arange(64, dtype=np.uint8).reshape(8, 8) % 40
    names = [f"class {i}" for i in range(40)]
    colors = np.stack([np.arange(40), np.full(40, 100), np.arange(40)], axis=1).astype(np.uint8)
    row = LabelRow("x" * 500, Image.new("RGB", (8, 8)), many, many)
    assert label_grid([row], "t", names, colors).width == label_grid([], "t", names, colors).width


def test_two_results_are_compared_by_classes_and_images(tmp_path, no_charts):
    labels, first = scenes()
    second = [image.copy() for image in first]
    second[1] = np.where(labels[1] == 255, second[1], labels[1])
    one, other = write_run(tmp_path / "a", labels, first), write_run(tmp_path / "b", labels, second)
    comparison = compare(one, other / "seg-0", tmp_path / "c")
    figures = [metrics.figures(report_of(labels, images).sums[0].counts) for images in (first, second)]
    assert comparison.miou == pytest.approx([f.miou for f in figures])
    assert comparison.difference == pytest.approx(float(figures[1].miou - figures[0].miou))
    assert comparison.interval[0] <= comparison.difference <= comparison.interval[1]
    assert [row.path for row in comparison.changed] == ["001.jpg"] and comparison.changed[0].second > 99
    assert comparison.settings == {} and comparison.images == 5
    assert sorted(c.id for c in comparison.classes) == [c.id for c in CLASSES]
    assert list(comparison.tables()) and (tmp_path / "c" / "images.csv").is_file()
    back = compare(other, one)
    assert back.difference == -comparison.difference and back.interval[0] == pytest.approx(-comparison.interval[1])


def test_results_are_matched_by_content(tmp_path, no_charts):
    labels, predictions = scenes()
    digests = np.arange(40, dtype=np.uint8).reshape(5, 8)
    one = write_run(tmp_path / "a", labels, predictions, digests=digests)
    other = write_run(tmp_path / "b", labels[::-1], predictions[::-1], digests=digests[::-1])
    comparison = compare(one, other)
    assert comparison.changed == () and comparison.difference == 0 and comparison.interval == (0, 0)


@pytest.mark.slow
def test_results_on_other_images_labels_or_classes_are_rejected(tmp_path, no_charts):
    labels, predictions = scenes()
    one = write_run(tmp_path / "a", labels, predictions)
    fewer = write_run(tmp_path / "b", labels[:4], predictions[:4])
    with pytest.raises(DoesNotFit, match=r"1 are only in the first and 0 only in the second, for example 004.jpg"):
        compare(one, fewer)
    labels[3][0, 0] ^= 1
    with pytest.raises(DoesNotFit, match=r"003.jpg: the SHA-256 of the label map is .* in "):
        compare(one, write_run(tmp_path / "c", labels, predictions))
    path = fewer / "seg-0" / "metrics.json"
    saved = json.loads(path.read_text())
    saved["per_class"][1]["id"] = "other"
    path.write_text(json.dumps(saved))
    with pytest.raises(DoesNotFit, match="different classes, for example c1 and other"):
        compare(one, fewer)
    with pytest.raises(UsageError, match="both arguments are this result"):
        compare(one, one / "seg-0")
    with pytest.raises(UnreadableFile, match=r"metrics.json does not exist"):
        compare(one, tmp_path / "none")


def test_a_truncated_confusion_file_is_rejected(tmp_path, no_charts):
    one = write_run(tmp_path / "a", *scenes())
    shutil.copytree(one, tmp_path / "b")
    path = tmp_path / "b" / "seg-0" / "confusion.csv"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(UnreadableFile, match=r"confusion.csv: damaged .*labeled pixels"):
        compare(one, tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics.json", "predictions.csv", "confusion.csv"])
@pytest.mark.parametrize(
    "content", [b"{}", b"\xff\x00", b'"path"\n1,2,3\n', b"[" * 100_000, b"row,label,predicted,pixels\r\n0,1,6,5\r\n"]
)
def test_damaged_results_are_rejected(tmp_path, no_charts, name, content):
    one = write_run(tmp_path / "a", *scenes())
    shutil.copytree(one, tmp_path / "b")
    (tmp_path / "b" / "seg-0" / name).write_bytes(content)
    with pytest.raises(UnreadableFile, match=f"{name}: damaged"):
        compare(one, tmp_path / "b")
