"""Mask R-CNN in Paddle against the numbers of mmdetection with the authors' backbone, in float64."""

import functools

import numpy as np
import pytest

from conftest import needs_paddle
from detection_goldens import Case, assert_close, assert_summary
from fcvit.frameworks import import_framework
from fcvit.models.mask_rcnn.boxes import to_rois
from fcvit.models.mask_rcnn.masks import paste_mask
from fcvit.weights.synthetic import synthetic_tensors

CASES = ["e2e_mini", "e2e_mini_batch", "e2e_odd", pytest.param("e2e_b12", marks=pytest.mark.slow)]

pytestmark = needs_paddle


@functools.cache
def case(name):
    return Case(name)


def network(spec, salt, dtype="float64"):
    from fcvit.models.build import build_network
    from fcvit.weights.checkpoint import MEMORY, Checkpoint
    from fcvit.weights.reading import Weights

    tensors = synthetic_tensors(spec, salt)
    weights = Weights(spec, tensors, Checkpoint("x", MEMORY, {}, None, b""), "torch", None, None, (), ())
    return build_network(weights, dtype)


@functools.cache
def stages(name, dtype="float64"):
    """Return every stage of the network, and its detections."""
    paddle, given = import_framework("paddle"), case(name)
    model = network(given.spec, given.salt, dtype)
    with paddle.no_grad():
        backbone = model.backbone(paddle.to_tensor(given.images.astype(dtype)))
        neck = model.neck(backbone)
        logits, deltas = model.rpn_head(neck)
        proposals = model.propose(logits, deltas, given.image_sizes)
        features = model.roi_head.box_features(neck, to_rois([one[:, :4] for one in proposals]))
        scores, boxes = model.roi_head.bbox_head(features)
        detections = model.detect(neck, proposals, given.image_sizes, given.scale_factors)
    arrays = {
        "backbone": backbone, "neck": neck, "rpn_cls": logits, "rpn_bbox": deltas,
        "roi_feats": features, "cls_score": scores, "bbox_pred": boxes,
    }  # fmt: skip
    values = {n: [x.numpy() for x in v] if isinstance(v, list) else v.numpy() for n, v in arrays.items()}
    return values, proposals, detections


@pytest.mark.parametrize("name", CASES)
def test_every_stage_and_all_detections_equal_the_authors_numbers_in_float64(name):
    values, proposals, detections = stages(name)
    golden, arrays = case(name).golden, case(name).arrays
    for stage, value in values.items():
        levels = (value, golden[stage]) if isinstance(value, list) else ([value], [golden[stage]])
        for one, summary in zip(*levels, strict=True):
            assert_summary(one, summary)
    for image, (found, proposed) in enumerate(zip(detections, proposals, strict=True)):
        assert_close(proposed, arrays[f"proposals{image}"])
        assert_close(np.concatenate([found.boxes, found.scores[:, None]], axis=1), arrays[f"boxes{image}"])
        np.testing.assert_array_equal(found.labels, arrays[f"labels{image}"])
        masks = [
            paste_mask(logits, box, case(name).original_sizes[image])
            for logits, box in zip(found.mask_logits, found.boxes, strict=True)
        ]
        np.testing.assert_array_equal(masks, case(name).masks(image))
    logits = np.concatenate([found.mask_logits for found in detections])
    assert_summary(logits, golden["mask_logits"])
    assert_close(logits[:6], arrays["mask_logits"])
