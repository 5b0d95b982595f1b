"""Test records, results, files, pages and comparisons of detection evaluations, with detections made by hand."""

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from detection_goldens import Case
from fcvit.data.classes import ClassName
from fcvit.data.coco import find_coco, read_coco
from fcvit.errors import DoesNotFit, UnreadableFile, UsageError
from fcvit.evaluation.protocols import Protocol
from fcvit.metrics.detection import Detections, encode_masks, matches
from fcvit.models.mask_rcnn.detections import Detections as Found
from fcvit.models.spec import MaskRCNNOptions
from fcvit.models.variants import VARIANTS, Preprocessing
from fcvit.tasks.detection.comparison import compare
from fcvit.tasks.detection.evaluation import DetectionEvaluator, Options, Placement
from fcvit.tasks.detection.published import compare_with_published, validation_of
from fcvit.tasks.detection.results import RECORD, decode, encode, record

pytest.importorskip("pycocotools", reason="pycocotools is not installed")

CLASSES = tuple(ClassName(name, name) for name in ("cat", "dog", "<b>bird</b>"))
SIZES = ((60, 90), (80, 50), (64, 64), (70, 100))  # heights and widths
AUTHORS = Protocol("authors", Preprocessing(), {})


def objects(generator, size):
    """Return boxes x1, y1, x2, y2 and labels of objects, which are ellipses. There is no bird."""
    count = 5
    low = generator.uniform(0, np.array(size[::-1]) - 30, (count, 2)).round(1)
    return np.concatenate([low, low + generator.uniform(8, 28, (count, 2)).round(1)], 1), generator.integers(
        0, 2, count
    )


def ellipses(boxes, size):
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    centers, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    across = (2 * (x - centers[:, 0, None, None]) / sides[:, 0, None, None]) ** 2
    return across + (2 * (y - centers[:, 1, None, None]) / sides[:, 1, None, None]) ** 2 <= 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set with four images. The last object of each image is a crowd."""
    root, generator = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    (root / "annotations").mkdir()
    (root / "val2017").mkdir()
    images, annotations = [], []
    for number, size in enumerate(SIZES, 1):
        boxes, labels = objects(generator, size)
        masks = ellipses(boxes, size)
        pixels = generator.integers(0, 90, (*size, 3), np.uint8)
        pixels[masks.any(0)] += 120
        Image.fromarray(pixels).save(root / "val2017" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": size[0], "width": size[1]})
        for index, (box, label, mask) in enumerate(zip(boxes, labels, encode_masks(masks), strict=True)):
            sides = (box[2:] - box[:2]).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(label) * 10 + 3,
                    "bbox": [*box[:2].tolist(), *sides],
                    "area": float(masks[index].sum()),
                    "iscrowd": int(index == 4),
                    "segmentation": mask,
                }
            )
    categories = [{"id": 10 * label + 3, "name": c.name} for label, c in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


def weights_of(name="det.pth", classes=CLASSES, **options):
    spec = SimpleNamespace(
        num_classes=len(classes or CLASSES),
        options=MaskRCNNOptions(**options),
        task="detection",
        variant=VARIANTS["fcvit_b12"],
    )
    source = SimpleNamespace(path=Path(name), sha256="0" * 64)
    return SimpleNamespace(spec=spec, source=source, classes=classes, palette=None)


def evaluator_of(data, *loaded):
    return DetectionEvaluator(loaded or [weights_of()], data, Options())


def detected(dataset, seed=0, noise=2.0, wrong=0.2):
    """Return detections of each image: the moved objects with masks, some with another class, and others."""
    generator, found = np.random.default_rng(seed), []
    for target in dataset.targets:
        boxes = target.corners().astype(float)
        boxes = np.concatenate(
            [boxes + generator.normal(0, noise, boxes.shape), objects(generator, target.size)[0][:2]]
        )
        boxes = np.sort(boxes.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
        boxes[:, 2:] += 0.5
        labels = np.concatenate([target.labels, generator.integers(0, 3, 2)])
        labels = np.where(generator.random(len(labels)) < wrong, generator.integers(0, 3, len(labels)), labels)
        scores = np.sort(generator.random(len(labels)))[::-1].round(4)
        found.append(Detections(boxes, scores, labels, encode_masks(ellipses(boxes, target.size))))
    return found


def report_of(evaluator, *found, references=None, configurations=None):
    """Return the report for detections of each configuration, as the runner makes it from the journal."""
    count, references = len(evaluator.dataset), references or [None] * len(found)
    rows, content = np.zeros((count, len(found)), RECORD), {}
    for position, images in enumerate(found):
        for row, one in enumerate(images):
            before = None if references[position] is None else found[references[position]][row]
            rows[row, position], content[row, position] = record(one, before)
    configurations = configurations or [
        SimpleNamespace(
            name=f"det-{position}",
            weights=weights_of(),
            reference=references[position],
            engine=("paddle", "torch")[position % 2],
            precision="float32",
            protocol=AUTHORS,
        )
        for position in range(len(found))
    ]
    evaluated = SimpleNamespace(
        configurations=configurations,
        batch_size=4,
        precisions=["float32"],
        index=np.arange(count),
        digests=np.arange(8 * count, dtype=np.uint8).reshape(count, 8),
        records=rows,
        bytes_of=content,
        left_out=[],
        seconds=[1.0] * len(found),
        devices=["cpu"] * len(found),
        about={"data": "/data/coco", "task": "detection", "versions": {"fcvit": "1"}},
    )
    return evaluator.report(evaluated)


def by_hand(truth, files, kind, max_detections=100):
    """Evaluate result files with pycocotools alone."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        expected = COCO(str(truth))
        rows = json.loads((files / f"detections.{kind}.json").read_text())
        for row in rows:
            if kind == "segm":
                del row["bbox"]
        evaluation = COCOeval(expected, expected.loadRes(rows), kind)
        evaluation.params.maxDets = [1, 10, max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.fixture(scope="module")
def written(data, tmp_path_factory):
    """A written report of two engines."""
    folder = tmp_path_factory.mktemp("run")
    evaluator = evaluator_of(data)
    first, second = detected(evaluator.dataset), detected(evaluator.dataset, noise=2.001)
    report = report_of(evaluator, first, second, references=[None, 0])
    report.write(folder)
    return folder, report


def test_the_figures_equal_those_of_pycocotools_on_the_written_files(written, data):
    folder, report = written
    truth = data / "annotations" / "instances_val2017.json"
    for result in report.results:
        assert 5 < result.box_ap < 95 and 5 < result.mask_ap < 95
        for kind, figures in (("bbox", result.box), ("segm", result.mask)):
            stats = 100 * by_hand(truth, folder / result.name, kind)
            ours = (figures.ap, figures.ap50, figures.ap75, figures.ap_small)
            assert ours == tuple(stats[:4]) and figures.ar == stats[8]
            assert np.isnan(figures.ap_large) and stats[5] == -100  # no object is large
    metrics = json.loads((folder / "det-0" / "metrics.json").read_text())
    assert metrics["box"]["ap"] == report.results[0].box_ap and metrics["mask"]["ap_large"] is None
    assert metrics["task"] == "detection" and metrics["max_detections"] == 100 and metrics["with_masks"] is True


@pytest.fixture(scope="module")
def goldens(tmp_path_factory):
    """mmdetection's detections in three images, and a data set in which every second one, a little moved, is an object.

    The detections are also written as result files, without our code.
    """
    from pycocotools.mask import area, encode

    root, found, images, annotations = tmp_path_factory.mktemp("goldens"), [], [], []
    rows = {"bbox": [], "segm": []}
    for case, position in ((Case("e2e_mini_batch"), 0), (Case("e2e_mini_batch"), 1), (Case("e2e_odd"), 0)):
        boxes, labels = (case.arrays[f"{name}{position}"] for name in ("boxes", "labels"))
        masks, (height, width) = case.masks(position), case.original_sizes[position].tolist()
        encoded = encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
        moved = encode(np.asfortranarray(np.roll(masks, 1, 2).transpose(1, 2, 0).astype(np.uint8)))
        for rle in (*encoded, *moved):
            rle["counts"] = rle["counts"].decode()
        found.append(Detections(boxes[:, :4], boxes[:, 4], labels, encoded))
        number = len(images) + 1
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        for index, (x1, y1, x2, y2, score) in enumerate(boxes.tolist()):
            row = {"image_id": number, "category_id": int(labels[index]) + 1}
            rows["bbox"].append({**row, "score": score, "bbox": [x1, y1, x2 - x1, y2 - y1]})
            rows["segm"].append({**row, "score": score, "bbox": [], "segmentation": encoded[index]})
            box = [x1 + 1, y1, x2 - x1, y2 - y1]
            if index % 2 == 0 and x2 + 1 <= width and area(moved[index]):
                about = {"id": len(annotations) + 1, "iscrowd": 0, "area": int(area(moved[index]))}
                annotations.append({**row, **about, "bbox": box, "segmentation": moved[index]})
        (root / "val").mkdir(exist_ok=True)
        Image.new("RGB", (width, height)).save(root / "val" / f"{number}.png")
    categories = [{"id": label + 1, "name": c.name} for label, c in enumerate(CLASSES)]
    (root / "annotations").mkdir()
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "instances_val.json").write_text(json.dumps(content))
    for kind, listed in rows.items():
        (root / f"detections.{kind}.json").write_text(json.dumps(listed))
    return root, found


@pytest.mark.slow
def test_the_detections_of_mmdetection_get_the_figures_of_pycocotools(goldens, tmp_path, no_charts):
    data, found = goldens
    report = report_of(evaluator_of(data), found)
    report.write(tmp_path)
    (result,) = report.results
    for kind, figures in (("bbox", result.box), ("segm", result.mask)):
        stats = 100 * by_hand(data / "annotations" / "instances_val.json", data, kind)
        assert 20 < stats[0] < stats[1] < 95
        ours = (figures.ap, figures.ap50, figures.ap75, figures.ap_small, figures.ap_medium, figures.ar)
        assert ours == (*stats[:5], stats[8])
        assert (by_hand(data / "annotations" / "instances_val.json", tmp_path / "det-0", kind) * 100 == stats).all()


def test_a_class_without_objects_has_no_ap_and_is_left_out_of_the_mean(written):
    folder, report = written
    result = report.results[0]
    bird = result.per_class[2]
    assert (bird.objects, bird.images) == (0, 0) and bird.detections > 0 and np.isnan(bird.box_ap)
    assert result.absent == 1 and result.objects == 16  # without the crowds
    assert result.box_ap == pytest.approx(np.mean([c.box_ap for c in result.per_class[:2]]), rel=1e-12)
    with (folder / "det-0" / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[2]["box_ap"] == "" and float(rows[0]["mask_ap"]) == pytest.approx(result.per_class[0].mask_ap, abs=1e-4)


def test_the_agreement_of_engines_counts_common_detections(written):
    _, report = written
    (agreement,) = report.agreements
    assert agreement.engines == ("paddle", "torch") and 90 < agreement.common <= 100 and agreement.largest == 0
    same = detected(report.evaluator.dataset)
    moved = [one._replace(boxes=one.boxes + np.array([0, 0, 30, 0]), scores=one.scores * 0.9) for one in same]
    other = report_of(report.evaluator, same, moved, references=[None, 0]).agreements[0]
    assert other.common < 50
    lower = [one._replace(scores=one.scores - 0.001) for one in same]
    assert report_of(report.evaluator, same, lower, references=[None, 0]).agreements[0].largest == pytest.approx(0.001)


def test_the_page_shows_figures_classes_and_pictures(written):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    folder, report = written
    page = (folder / "report.html").read_text()
    for figure in (report.results[0].box_ap, report.results[1].mask_ap):
        assert f"{figure:.1f}" in page
    assert "precision and recall" in page.lower() and "&lt;b&gt;bird&lt;/b&gt;" in page and "<b>bird" not in page
    assert "agreement of engines" in page.lower() and "16 annotated objects" in page
    for name in ("false_positives.png", "misses.png", "best.png", "precision_recall.png"):
        with Image.open(folder / "det-0" / name) as image:
            assert min(image.size) > 100
    text = "\n".join(str(table.title) for table in report.tables())
    assert "most objects first" in text


def test_two_results_are_compared_by_class(written, tmp_path):
    folder, report = written
    first, second = folder / "det-0", folder / "det-1"
    comparison = compare(first, second, tmp_path / "out")
    assert comparison.difference == pytest.approx(report.results[1].mask_ap - report.results[0].mask_ap)
    assert comparison.metric == "mask AP" and {c.id for c in comparison.classes} == {c.id for c in CLASSES}
    assert list(comparison.tables()) and (tmp_path / "out" / "classes.csv").exists()
    with pytest.raises(UsageError, match="both arguments"):
        compare(first, first)
    other = shutil.copytree(first, tmp_path / "other")
    lines = (other / "predictions.csv").read_text().splitlines(keepends=True)
    row = lines[1].split(",")
    row[2] = "f" * 16
    (other / "predictions.csv").write_text("".join([lines[0], ",".join(row), *lines[2:]]))
    with pytest.raises(DoesNotFit, match="SHA-256 of the annotations"):
        compare(first, other)
    (other / "predictions.csv").write_text("".join(lines[:-1]))
    with pytest.raises(UnreadableFile, match="3 rows for 4 images"):
        compare(first, other)


def test_records_are_encoded_without_a_loss():
    (one,) = detected(
        SimpleNamespace(
            targets=[
                SimpleNamespace(corners=lambda: np.zeros((2, 4), np.float32), labels=np.zeros(2, int), size=(40, 50))
            ]
        )
    )
    single = one._replace(boxes=one.boxes.astype(np.float32), scores=one.scores.astype(np.float32))
    for given in (one, single, single._replace(masks=None)):
        read = decode(encode(given))
        assert (read.boxes == given.boxes).all() and (read.scores == given.scores).all()
        assert (read.labels == given.labels).all() and read.masks == given.masks
    empty = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), [])
    assert decode(encode(empty)).boxes.shape == (0, 4)


def test_the_engine_gets_padded_images_and_its_boxes_and_masks_are_those_of_the_original(data):
    evaluator = evaluator_of(data, weights_of(long_side=200, short_side=100))
    transform = evaluator.transform(Preprocessing())
    pixels, placement = transform(evaluator.picture(0), evaluator.dataset.targets[0], 0)
    assert pixels.shape == (3, 100, 150) and placement.size == (60, 90)
    seen = []

    def detect(images, sizes, factors):
        seen.append((images, sizes, factors))
        logits = np.full((1, 28, 28), 9.0, np.float32)
        return [Found(np.array([[10, 20, 30, 50.5]]), np.array([0.9]), np.array([1]), logits)]

    engine = SimpleNamespace(detect=detect)
    (found,) = evaluator.compute(engine, [pixels], [placement])
    images, sizes, factors = seen[0]
    assert images.shape == (1, 3, 128, 160) and images.dtype == np.uint8  # the engine normalizes
    assert (images[0, :, :100, :150] == pixels).all()
    assert sizes.tolist() == [[100, 150]] and factors[0] == pytest.approx([150 / 90, 100 / 60] * 2)
    assert found.masks[0]["size"] == [60, 90] and found.boxes.tolist() == [[10, 20, 30, 50.5]]
    assert Placement(*placement) == placement


def test_matches_follow_the_score_and_the_class_and_a_crowd_takes_any_number():
    boxes = np.array([[0, 0, 10, 10], [20, 0, 40, 20]], float)
    found = Detections(
        np.array([[0, 0, 10, 9], [0, 0, 10, 10], [0, 0, 10, 10], [21, 1, 25, 5], [30, 5, 35, 9]], float),
        np.array([0.5, 0.9, 0.8, 0.7, 0.6]),
        np.array([0, 0, 1, 0, 0]),
    )
    assert matches(found, boxes, np.array([0, 0])).tolist() == [-1, 0, -1, -1, -1]
    crowd = np.array([False, True])
    assert matches(found, boxes, np.array([0, 0]), crowd=crowd).tolist() == [-1, 0, -1, 1, 1]


def test_classes_follow_the_names_and_wrong_class_counts_are_rejected(data):
    swapped = tuple(CLASSES[i] for i in (1, 2, 0))
    evaluator = evaluator_of(data, weights_of(classes=swapped))
    plain = evaluator_of(data)
    own = [[CLASSES[label].id for label in target.labels] for target in plain.dataset.targets]
    assert [[swapped[label].id for label in target.labels] for target in evaluator.dataset.targets] == own
    unnamed = weights_of(classes=None)
    assert evaluator_of(data, unnamed).classes == CLASSES
    unnamed.spec.num_classes = 5
    with pytest.raises(DoesNotFit, match=r"3 categories.*5 classes without names.*--classes"):
        evaluator_of(data, unnamed)
    with pytest.raises(DoesNotFit, match="differ in their classes, masks"):
        evaluator_of(data, weights_of(), weights_of("other.pth", max_detections=7))
    with pytest.raises(DoesNotFit, match="no annotations in COCO's format"):
        evaluator_of(data / "val2017")


def test_without_masks_only_boxes_are_evaluated(data, tmp_path, no_charts):
    evaluator = evaluator_of(data, weights_of(masks=False))
    found = [one._replace(masks=None) for one in detected(evaluator.dataset)]
    report = report_of(evaluator, found)
    report.write(tmp_path)
    assert np.isnan(report.results[0].mask_ap) and report.results[0].mask is None
    assert not (tmp_path / "det-0" / "detections.segm.json").exists()
    assert "mask" not in " ".join(str(column.header) for table in report.tables() for column in table.columns)


@pytest.mark.parametrize(
    ("classes", "validation", "images", "box", "verdict"),
    [
        (80, "all", 5000, 42.4, "reproduced"),
        (80, "all", 5000, 42.5, "differs"),
        (80, "all", 4999, 42.3, "not comparable"),
        (80, "part", 100, 42.3, "not comparable"),
        (79, "all", 5000, 42.3, "not comparable"),
        (80, "other", 5000, 42.3, "not comparable"),
    ],
)
def test_the_published_figures_are_compared(classes, validation, images, box, verdict):
    both = compare_with_published(VARIANTS["fcvit_b12"], classes, validation, images, box, 38.6)
    assert (both[0].figure, both[0].verdict, both[1].figure) == (42.3, verdict, 38.6)
    assert compare_with_published(VARIANTS["fcvit_b12"], classes, validation, images, box, float("nan"))[1] is None
    assert compare_with_published(VARIANTS["fcvit_tiny"], classes, validation, images, box, 38.6) == (None, None)


def test_validation_images_are_known_by_the_name_of_the_file(data):
    images = read_coco(find_coco(data), "val2017")
    assert validation_of(images) == "part"
