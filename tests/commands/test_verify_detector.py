"""Test that the verification of a detector detects planted errors, and accepts only ties as differences."""

import dataclasses
import functools
import importlib

import numpy as np
import pytest

from conftest import needs_paddle, needs_torch
from fcvit.models.spec import MaskRCNNOptions, ModelSpec
from fcvit.models.variants import VARIANTS
from fcvit.verification import comparison
from fcvit.verification.objects import Objects, compare_objects
from fcvit.verification.traces import given_rois, trace_torch
from fcvit.weights.checkpoint import MEMORY, Checkpoint
from fcvit.weights.reading import Weights
from fcvit.weights.synthetic import synthetic_input, synthetic_tensors

pytestmark = [needs_paddle, needs_torch]
SPEC = ModelSpec(VARIANTS["fcvit_digits"], 3, "mask_rcnn", MaskRCNNOptions(8, 12, 16, 20, proposals_before_nms=200))
UPSAMPLE, SQUARE = "roi_head.mask_head.upsample.weight", "roi_head.bbox_head.shared_fcs.1.weight"


def weights_of(tensors):
    return Weights(SPEC, tensors, Checkpoint("x", MEMORY, {}, None, b""), "torch", None, None, (), ())


@functools.cache
def weights():
    return weights_of(synthetic_tensors(SPEC, "a"))  # with this salt, there are detections of all classes


@functools.cache
def reference(dtype):
    return trace_torch(weights(), synthetic_input((2, 3, 200, 264), "verify/"), dtype)


def compare(monkeypatch, ours=None):
    """Compare with the recorded run of the reference."""
    monkeypatch.setattr(comparison, "trace_torch", lambda _weights, _images, dtype: reference(dtype))
    return comparison.compare(ours or weights(), weights())


def no_fifth_map(forward, neck, stages):
    maps = forward(neck, stages)
    return [*maps[:-1], (maps[3][:, :, ::2, ::2] + maps[3][:, :, ::2, ::2].mean()) / 2]


# fault -> module, name in it, wrapper of the original function, and the stage or objects where it must be reported
FAULTS = {
    "mean in the fifth map": ("network.FiveLevelFPN", "forward", no_fifth_map, "neck.4"),
    "features in the order row, column, channel": (
        *("network.BoxHead", "forward"),
        lambda f, head, x: f(head, x.transpose([0, 2, 3, 1])),
        "roi_head.bbox_head.fc_cls",
    ),
    "levels of boxes from 224 pixels": (
        *("network", "roi_features"),
        lambda f, maps, rois, size, _: f(maps, rois, size, 224),
        "roi_head.box_features",
    ),
    "RoIAlign without aligned": (
        *("roi_align", "axis_weights"),
        lambda f, start, end, *rest: f(start + 0.5, end + 0.5, *rest),
        "roi_head.box_features",
    ),
    "anchors centered on the cell": (
        *("detections", "grid_anchors"),
        lambda f, *given: [one + side / 2 for one, side in zip(f(*given), (4, 8, 16, 32, 64), strict=True)],
        "proposals",
    ),
    "NMS over all levels together": (
        *("proposals", "batched_nms"),
        lambda f, boxes, scores, groups, limit: f(boxes, scores, np.zeros_like(groups), limit),
        "proposals",
    ),
    "clipping to the padded image": (
        *("detections", "select_proposals"),
        lambda f, logits, deltas, anchors, size, **rest: f(logits, deltas, anchors, (200, 264), **rest),
        "proposals",
    ),
    "background first": (
        *("detections", "_softmax"),
        lambda f, logits: np.roll(f(logits), -1, axis=1),
        "detections",
    ),
    "sigmoid instead of softmax": (
        *("detections", "_softmax"),
        lambda f, logits: 1 / (1 + np.exp(-logits)),
        "detections",
    ),
    "one box for all classes": (
        *("detections", "select_detections"),
        lambda f, o, proposals, logits, deltas, *rest: f(o, proposals, logits, np.tile(deltas[:, :4], 3), *rest),
        "detections",
    ),
    "masks of the boxes in the original image": (
        *("detections", "to_rois"),
        lambda f, boxes: f([one / (1.25, 1.2, 1.25, 1.2) for one in boxes] if len(boxes[0]) == 100 else boxes),
        "detections",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_in_the_detector_is_detected_and_located(monkeypatch, fault):
    path, name, wrapper, place = FAULTS[fault]
    module = importlib.import_module(f"fcvit.models.mask_rcnn.{path.partition('.')[0]}")
    owner = getattr(module, path.partition(".")[2]) if "." in path else module
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *given, **named: wrapper(original, *given, **named))
    found = compare(monkeypatch)
    assert not found.passed
    if found.first_over:
        assert found.first_over.name == place
    else:
        first = next(one for one in found.objects if not one.passed)
        assert (first.name, first.dtype) == (place, "float64")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "place"), [(SQUARE, "roi_head.bbox_head.fc_cls"), (UPSAMPLE, "roi_head.mask_head")])
def test_swapped_axes_of_a_square_weight_are_detected(monkeypatch, name, place):
    tensors = synthetic_tensors(SPEC, "a")
    tensors[name] = tensors[name].swapaxes(0, 1)
    assert compare(monkeypatch, weights_of(tensors)).first_over.name == place


@pytest.mark.slow
def test_a_detector_equals_the_reference_in_every_stage(monkeypatch):
    found = compare(monkeypatch)
    assert found.passed and len(found.objects) == 4
    assert min(one.count for one in found.objects) == 200
    assert not any(one.unmatched for one in found.objects if one.dtype == "float64")


@pytest.mark.slow
@pytest.mark.parametrize(("change", "count"), [({"masks": False}, 200), ({"score_threshold": 1.0}, 0)])
def test_detectors_without_masks_or_detections_are_compared(change, count):
    spec = dataclasses.replace(SPEC, options=dataclasses.replace(SPEC.options, **change))
    given = dataclasses.replace(weights(), spec=spec, tensors=synthetic_tensors(spec, "a"))
    found = comparison.compare(given, given)
    assert found.passed and found.objects[1].count == count
    assert ("roi_head.mask_head" in [layer.name for layer in found.drift]) == spec.options.masks


def test_the_given_rois_belong_to_all_levels_and_images():
    rois = given_rois((2, 3, 200, 264))
    side = np.sqrt((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2]))
    assert np.bincount(np.digitize(side, [112, 224, 448])).tolist() == [24 + 1, 24, 24, 23]
    assert np.bincount(rois[:, 0].astype(int)).tolist() == [48, 48]


def objects(count, labels=None, shift=0.0):
    box = np.arange(count)[:, None] * 10.0 + (0, 0, 5 + shift, 5)
    return Objects(box, 0.9 - 0.001 * np.arange(count), np.zeros(count, int) if labels is None else labels)


def compared(ours, margin=1.0, dtype="float64"):
    return compare_objects("detections", dtype, [ours], [objects(100)], {"detection NMS: IoU": margin})


def test_the_order_of_objects_does_not_matter():
    same = objects(100)
    assert compared(Objects(*(part[::-1] for part in same[:3]))).passed


@pytest.mark.parametrize(
    "ours", [objects(99), objects(100, labels=np.arange(100) // 99), objects(100, shift=1e-6), objects(0), objects(101)]
)
def test_objects_without_a_counterpart_are_reported(ours):
    result = compared(ours)
    assert result.unmatched and not result.passed
    assert "of 100 detections differ in float64" in str(result)


def test_a_few_differences_are_accepted_if_a_decision_is_a_tie():
    assert compared(objects(96), margin=1e-12).passed
    assert not compared(objects(94), margin=1e-12).passed
    assert not compared(objects(96), margin=1e-6).passed
    assert compared(objects(96), margin=1e-6, dtype="float32").passed
    assert compared(objects(100, shift=1e-3), dtype="float32").passed


def test_different_masks_are_not_accepted():
    ours, theirs = (objects(3)._replace(mask_logits=np.full((3, 28, 28), x)) for x in (0.0, 0.1))
    result = compare_objects("detections", "float64", [ours], [theirs], {})
    assert not result.unmatched and not result.passed and "masks by 2.5e-02" in str(result)


def test_nan_never_matches():
    ours = objects(100)
    ours.boxes[:] = np.nan
    assert compared(ours).unmatched == 100
