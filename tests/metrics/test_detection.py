"""Test that the metrics of detection equal those of pycocotools used by hand, to the last digit."""

import contextlib
import copy
import io

import numpy as np
import pytest

from conftest import golden_json
from fcvit.metrics.detection import Detections, decode_masks, encode_masks, entries, evaluate

pytest.importorskip("pycocotools", reason="pycocotools is not installed")

SAMPLE = golden_json("detection/coco_annotations.json")
SUMMARY = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
RECALL = ("ar", "ar_small", "ar_medium", "ar_large")


def ellipse(box, size):
    """Return the mask of the ellipse in a box x1, y1, x2, y2."""
    x1, y1, x2, y2 = box
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    width, height = max(x2 - x1, 0.1), max(y2 - y1, 0.1)
    return ((2 * x - x1 - x2) / width) ** 2 + ((2 * y - y1 - y2) / height) ** 2 <= 1


def synthetic():
    """Return ground truth with gaps in the category ids, crowds, a class without boxes and an image without any."""
    generator = np.random.default_rng(3)
    images = [{"id": number, "height": 90, "width": 120} for number in (11, 5, 7, 400)]
    annotations = []
    for number in (11, 5, 7):
        for _ in range(8):
            low = generator.uniform(0, 70, 2)
            side = generator.uniform(3, 45, 2)
            (mask,) = encode_masks(ellipse((*low, *low + side), (90, 120))[None])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(generator.choice([2, 40, 9])),
                    "bbox": [*low.tolist(), *side.tolist()],
                    "area": float(np.prod(side)),
                    "iscrowd": int(generator.random() < 0.15),
                    "segmentation": mask,
                }
            )
    categories = [{"id": number, "name": f"class {number}"} for number in (2, 9, 33, 40)]
    return {"images": images, "annotations": annotations, "categories": categories}


def sample():
    """Return the annotations of COCO with masks as run lengths."""
    from pycocotools.coco import COCO

    api = COCO()
    api.dataset = copy.deepcopy(SAMPLE)
    api.createIndex()
    for annotation in api.dataset["annotations"]:
        annotation["segmentation"] = api.annToRLE(annotation)
    return api.dataset


def detections_for(truth, seed=0):
    """Return detections near the ground truth, some wrong, doubled, of another class or with equal scores."""
    generator = np.random.default_rng(seed)
    labels = {one["id"]: label for label, one in enumerate(sorted(truth["categories"], key=lambda one: one["id"]))}
    found = []
    for image in truth["images"]:
        size = (image["height"], image["width"])
        boxes, scores, classes = [], [], []
        for annotation in truth["annotations"]:
            if annotation["image_id"] != image["id"] or generator.random() < 0.2:
                continue
            x, y, w, h = annotation["bbox"]
            for _ in range(generator.integers(1, 4)):
                moved = np.array([x, y, x + w, y + h]) + generator.normal(0, 0.07, 4) * [w, h, w, h]
                boxes.append(np.concatenate([moved[:2], np.maximum(moved[2:], moved[:2] + 0.5)]))
                scores.append(round(generator.random(), 1))
                other = generator.random() < 0.15
                classes.append(generator.integers(len(labels)) if other else labels[annotation["category_id"]])
        boxes = np.array(boxes, np.float32).reshape(-1, 4)
        bitmaps = np.array([ellipse(box, size) for box in boxes], bool).reshape(-1, *size)
        masks = encode_masks(bitmaps)
        found.append(Detections(boxes, np.array(scores, np.float32), np.array(classes, np.int64), masks))
    return found


DATA = {"synthetic": synthetic, "coco": sample}


def by_hand(truth, results, kind, max_detections, keep_boxes=False):
    """Use pycocotools as its demo does, with the last entry of maxDets in place of 100."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    api = COCO()
    api.dataset = {"info": {}, **copy.deepcopy(truth)}
    results = copy.deepcopy(results)
    if kind == "segm" and not keep_boxes:
        for row in results:
            del row["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
        evaluation = COCOeval(api, api.loadRes(results), kind)
        evaluation.params.maxDets = [1, 10, max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def ids_of(truth):
    categories = sorted(category["id"] for category in truth["categories"])
    return [image["id"] for image in truth["images"]], categories


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("name", DATA)
def test_figures_equal_pycocotools(name, kind):
    truth = DATA[name]()
    images, categories = ids_of(truth)
    results = entries(detections_for(truth), images, categories, kind)
    figures = evaluate(truth, results, categories, kind)
    hand = by_hand(truth, results, kind, 100)
    for position, field in enumerate((*SUMMARY, "", "", *RECALL)):
        expected = hand.stats[position]
        if field:
            assert getattr(figures, field) == (100 * expected if expected >= 0 else pytest.approx(np.nan, nan_ok=True))
    assert 5 < figures.ap < 95 and figures.ap_small != figures.ap_large
    precision = hand.eval["precision"][:, :, :, 0, 2]
    assert np.array_equal(figures.precision, np.where(precision < 0, np.nan, precision), equal_nan=True)
    for label in range(len(categories)):
        known = precision[:, :, label][precision[:, :, label] > -1]
        assert figures.class_ap[label] == 100 * np.mean(known) if len(known) else np.isnan(figures.class_ap[label])
        known = precision[0, :, label][precision[0, :, label] > -1]
        assert figures.class_ap50[label] == 100 * np.mean(known) if len(known) else np.isnan(figures.class_ap50[label])
    scores = hand.eval["scores"][:, :, :, 0, 2]
    assert np.array_equal(figures.scores[precision >= 0], scores[precision >= 0])


@pytest.mark.parametrize("limit", [1, 2, 5, 300])
def test_the_limit_of_detections_is_that_of_the_last_entry(limit):
    truth = synthetic()
    images, categories = ids_of(truth)
    results = entries(detections_for(truth), images, categories, "bbox")
    figures = evaluate(truth, results, categories, "bbox", limit)
    precision = by_hand(truth, results, "bbox", 300).eval["precision"] if limit == 300 else None
    if precision is None:
        hand = by_hand(truth, results, "bbox", max(limit, 11))
        hand.params.maxDets = [limit]
        with contextlib.redirect_stdout(io.StringIO()):
            hand.evaluate()
            hand.accumulate()
        precision = hand.eval["precision"]
    precision = precision[:, :, :, 0, -1]
    assert figures.ap == 100 * np.mean(precision[precision > -1]) and figures.max_detections == limit
    assert (figures.ap == evaluate(truth, results, categories, "bbox").ap) == (limit == 300)


def test_classes_without_ground_truth_have_no_value():
    truth = synthetic()
    images, categories = ids_of(truth)
    figures = evaluate(truth, entries(detections_for(truth), images, categories, "bbox"), categories, "bbox")
    assert categories[2] == 33 and np.isnan(figures.class_ap).tolist() == [False, False, True, False]
    assert np.isnan(figures.precision[:, :, 2]).all() and not np.isnan(figures.precision[:, :, [0, 1, 3]]).any()
    assert figures.ap == pytest.approx(np.nanmean(figures.class_ap), rel=1e-12)


def test_figures_follow_the_order_of_the_labels():
    """A network can have its classes in another order than the category ids."""
    truth = synthetic()
    images, categories = ids_of(truth)
    found = detections_for(truth)
    order = np.array([2, 0, 3, 1])  # new label of each old label
    moved = [one._replace(labels=order[one.labels]) for one in found]
    ids = [categories[old] for old in np.argsort(order)]
    one = evaluate(truth, entries(found, images, categories, "bbox"), categories, "bbox")
    other = evaluate(truth, entries(moved, images, ids, "bbox"), ids, "bbox")
    assert one.ap == other.ap and one.ap50 == other.ap50
    assert np.array_equal(one.class_ap, other.class_ap[order], equal_nan=True)
    assert np.array_equal(one.precision, other.precision[:, :, order], equal_nan=True)


def test_masks_have_the_sizes_of_masks():
    """If `bbox` is kept, pycocotools takes the areas of the boxes, and objects change between the sizes."""
    truth = synthetic()
    images, categories = ids_of(truth)
    results = entries(detections_for(truth), images, categories, "segm")
    assert all("bbox" in row and "segmentation" in row for row in results)
    figures = evaluate(truth, results, categories, "segm")
    faulty = by_hand(truth, results, "segm", 100, keep_boxes=True).stats
    assert figures.ap == 100 * faulty[0] and figures.ap_medium != 100 * faulty[4]


def test_no_detections_and_no_ground_truth(capsys):
    truth = synthetic()
    images, categories = ids_of(truth)
    none = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), [])
    for kind in ("bbox", "segm"):
        results = entries([none] * 4, images, categories, kind)
        figures = evaluate(truth, results, categories, kind)
        assert results == [] and figures.ap == figures.ar == 0 and np.isnan(figures.class_ap[2])
    empty = {**truth, "annotations": []}
    figures = evaluate(empty, entries(detections_for(truth), images, categories, "bbox"), categories, "bbox")
    assert np.isnan([getattr(figures, field) for field in (*SUMMARY, *RECALL)]).all()
    assert capsys.readouterr() == ("", "")


def test_perfect_detections_have_ap_100():
    truth = synthetic()
    _, categories = ids_of(truth)
    truth["annotations"] = [{**one, "iscrowd": 0} for one in truth["annotations"]]
    results = [
        {**{key: one[key] for key in ("image_id", "bbox", "category_id", "segmentation")}, "score": 0.9}
        for one in truth["annotations"]
    ]
    for kind in ("bbox", "segm"):
        assert evaluate(truth, results, categories, kind).ap == pytest.approx(100)


def test_the_arguments_are_not_changed():
    truth = synthetic()
    images, categories = ids_of(truth)
    results = entries(detections_for(truth), images, categories, "segm")
    before = copy.deepcopy((truth, results))
    evaluate(truth, results, categories, "segm")
    evaluate(truth, results, categories, "bbox")
    assert (truth, results) == before


def test_entries_have_cocos_format():
    masks = encode_masks(np.ones((1, 2, 3), np.uint8))
    one = Detections(np.float32([[1.5, 2, 4, 8.25]]), np.float32([0.75]), np.array([1]), masks)
    expected = {"image_id": 9, "bbox": [1.5, 2, 2.5, 6.25], "score": 0.75, "category_id": 40}
    assert entries([one], [9], [2, 40], "bbox") == [expected]
    segmentation = {"size": [2, 3], "counts": "06"}
    assert entries([one], [9], [2, 40], "segm") == [{**expected, "segmentation": segmentation}]


@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 1, 1), (0, 4, 4)])
def test_masks_are_encoded_without_loss(shape):
    masks = np.random.default_rng(0).random(shape) < 0.4
    encoded = encode_masks(masks)
    assert len(encoded) == shape[0] and all(isinstance(one["counts"], str) for one in encoded)
    assert np.array_equal(decode_masks(encoded), masks) or not shape[0]
