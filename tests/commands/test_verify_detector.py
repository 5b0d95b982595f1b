"""Test that the verification of a detector detects planted errors, and accepts only ties as differences."""

import dataclasses
import functools

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

SPEC = ModelSpec(VARIANTS["fcvit_digits"], 3, "mask_rcnn", MaskRCNNOptions(8, 12, 16, 20, proposals_before_nms=200))
UPSAMPLE, SQUARE = "roi_head.mask_head.upsample.weight", "roi_head.bbox_head.shared_fcs.1.weight"


def weights_of(tensors):
    return Weights(SPEC, tensors, Checkpoint("x", MEMORY, {}, None, b""), "torch", None, None, (), ())


@functools.cache
def weights():
    return weights_of(synthetic_tensors(SPEC))


@functools.cache
def reference(dtype):
    return trace_torch(weights(), synthetic_input((2, 3, 200, 264), "verify/"), dtype)


def compare(monkeypatch, ours=None):
    """Compare with the recorded run of the reference."""
    monkeypatch.setattr(comparison, "trace_torch", lambda _weights, _images, dtype: reference(dtype))
    return comparison.compare(ours or weights(), weights())


def plant(monkeypatch, fault):
    """Plant one error in the Paddle network."""
    from fcvit.models.mask_rcnn import boxes, detections, network, proposals, roi_align

    def change(module, name, wrapper):
        monkeypatch.setattr(module, name, functools.partial(wrapper, getattr(module, name)))

    if fault == "anchors centered on the cell":
        change(
            detections,
            "grid_anchors",
            lambda f, *given: [one + s / 2 for one, s in zip(f(*given), (4, 8, 16, 32, 64), strict=True)],
        )
    elif fault == "NMS over all levels":
        change(proposals, "batched_nms", lambda f, b, s, groups, limit: f(b, s, np.zeros_like(groups), limit))
    elif fault == "no NMS":
        change(proposals, "batched_nms", lambda f, b, s, groups, _: f(b, s, groups, 1.0))
    elif fault == "other order of proposals":
        change(proposals, "batched_nms", lambda f, *given: f(*given)[::-1])
    elif fault == "levels from 224 pixels":
        change(network, "roi_features", lambda f, maps, rois, size, _: f(maps, rois, size, 224))
    elif fault == "RoIAlign without aligned":
        change(roi_align, "_axis_weights", lambda f, start, end, *rest: f(start + 0.5, end + 0.5, *rest))
    elif fault == "background first":
        change(detections, "_softmax", lambda f, logits: np.roll(f(logits), -1, axis=1))
    elif fault == "sigmoid instead of softmax":
        monkeypatch.setattr(detections, "_softmax", lambda logits: 1 / (1 + np.exp(-logits)))
    elif fault == "one box for all classes":
        change(
            detections,
            "select_detections",
            lambda f, o, p, logits, deltas, *rest: f(o, p, logits, np.tile(deltas[:, :4], (1, 3)), *rest),
        )
    elif fault == "other divisors of deltas":
        monkeypatch.setattr(detections, "BOX_STDS", boxes.RPN_STDS)
    elif fault == "NMS before rescaling":
        change(
            detections,
            "select_detections",
            lambda f, *given: dataclasses.replace(f(*given[:-1]), boxes=f(*given[:-1]).boxes / given[-1]),
        )
    elif fault == "masks on boxes of the original image":
        change(network, "detect", lambda f, o, p, box, mask, sizes, scales: without_scale(f, o, p, box, mask, sizes, scales))
    elif fault == "mean in the fifth map":
        change(
            network.FiveLevelFPN,
            "forward",
            lambda f, x: f(x),
        )
    else:
        raise AssertionError(fault)
