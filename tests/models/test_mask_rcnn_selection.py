"""The selection of boxes and masks in NumPy against mmdetection and mmcv, in float64."""

import time

import numpy as np
import pytest

from conftest import sha256
from detection_goldens import (
    SIZES,
    UNIT_ARRAYS,
    UNITS,
    assert_close,
    assert_summary,
    numbers,
    random_boxes,
    uniform,
)
from fcvit.models.mask_rcnn.anchors import STRIDES, base_anchors, grid_anchors
from fcvit.models.mask_rcnn.boxes import (
    BOX_STDS,
    RPN_STDS,
    batched_nms,
    decode,
    encode,
    iou,
    pyramid_levels,
    to_rois,
)
from fcvit.models.mask_rcnn.detections import Detections, detect, select_detections
from fcvit.models.mask_rcnn.masks import paste_mask
from fcvit.models.mask_rcnn.proposals import select_proposals
from fcvit.models.mask_rcnn.roi_align import roi_align, roi_align_gradient, roi_windows
from fcvit.models.spec import MaskRCNNOptions

OPTIONS = MaskRCNNOptions()
IMAGE = (96 - 7, 128)


def test_anchors_equal_those_of_mmdetection():
    for dtype, name in ((np.float64, "anchors.base"), (np.float32, "anchors.base_float32")):
        base = np.stack([base_anchors(stride, 8, dtype) for stride in STRIDES])
        assert base.dtype == dtype
        if dtype == np.float32:
            np.testing.assert_array_equal(base, UNIT_ARRAYS[name])
        else:
            assert_close(base, UNIT_ARRAYS[name])
    for values, single, summary in zip(
        grid_anchors(SIZES, 8, np.float64), grid_anchors(SIZES, 8, np.float32), UNITS["anchors"], strict=True
    ):
        assert_summary(values, summary)
        assert sha256(single) == summary["float32_sha256"]


def test_an_anchor_is_centered_on_the_upper_left_corner_of_its_cell():
    anchors = grid_anchors(SIZES, 8, np.float64)[1].reshape(*SIZES[1], 3, 4)
    np.testing.assert_allclose((anchors[2, 3, :, :2] + anchors[2, 3, :, 2:]) / 2, [[3 * 8, 2 * 8]] * 3)


@pytest.mark.parametrize(("name", "stds", "scale"), [("rpn", RPN_STDS, 3), ("roi", BOX_STDS, 15)])
def test_boxes_are_encoded_and_decoded_like_mmdetection(name, stds, scale):
    boxes, targets = random_boxes("coder/src", 40), random_boxes("coder/dst", 40)
    large = [(box[:, 2:] - box[:, :2] > 0.5).all(axis=1) for box in (boxes, targets)]
    boxes, targets = (box[large[0] & large[1]] for box in (boxes, targets))
    assert_close(encode(boxes, targets, stds), UNIT_ARRAYS[f"coder.{name}.encode"])
    deltas = numbers(f"coder/{name}/delta", (len(boxes), 12), scale).reshape(-1, 3, 4)
    for size, key in (((96, 128), "decode"), (None, "decode_unclipped")):
        decoded = decode(boxes[:, None], deltas, stds, size).reshape(-1, 12)
        assert_close(decoded, UNIT_ARRAYS[f"coder.{name}.{key}"])


def test_decoded_sides_change_by_a_limited_factor_in_both_directions():
    deltas = np.array([[0, 0, 20, -20]], np.float64)
    np.testing.assert_allclose(
        decode(np.array([[0.0, 0, 16, 16]]), deltas, RPN_STDS), [[8 - 500, 8 - 0.128, 8 + 500, 8 + 0.128]]
    )


def test_levels_equal_those_of_mmdetection():
    np.testing.assert_array_equal(pyramid_levels(UNIT_ARRAYS["level.rois"][:, 1:], 56.0), UNIT_ARRAYS["level.level"])


def test_boxes_of_112_224_and_448_pixels_begin_the_next_level():
    sides = np.array([1, 111.9, 112, 223.9, 224, 447.9, 448, 5000])
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=1)
    assert pyramid_levels(boxes, OPTIONS.finest_scale).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_nms_keeps_the_same_boxes_as_mmcv(threshold):
    boxes, scores = random_boxes("nms/boxes", 250, small=16), uniform("nms/scores", 250)
    kept = batched_nms(boxes, scores, np.arange(250) % 3, threshold)
    np.testing.assert_array_equal(kept, UNIT_ARRAYS[f"nms.{threshold}"])
    single = batched_nms(boxes.astype(np.float32), scores.astype(np.float32), np.arange(250) % 3, threshold)
    np.testing.assert_array_equal(kept, single)


def test_nms_equals_a_loop_over_all_pairs():
    generator = np.random.default_rng(0)
    corners = generator.integers(0, 60, (600, 2))
    boxes = np.concatenate([corners, corners + generator.integers(0, 40, (600, 2))], axis=1).astype(np.float64)
    scores, groups = generator.integers(0, 50, 600) / 50, generator.integers(0, 2, 600)
    kept = []
    for index in sorted(range(600), key=lambda i: -scores[i]):
        rivals = [i for i in kept if groups[i] == groups[index]]
        if not (iou(boxes[index : index + 1], boxes[rivals]) > 0.5).any():
            kept.append(index)
    assert batched_nms(boxes, scores, groups, 0.5).tolist() == kept


def test_nms_keeps_a_box_whose_iou_is_exactly_the_threshold():
    boxes = np.array([[0, 0, 2, 1], [0, 0, 1, 1], [5, 5, 5, 5], [5, 5, 5, 5]], np.float64)
    assert batched_nms(boxes, np.array([0.9, 0.8, 0.7, 0.6]), np.zeros(4), 0.5).tolist() == [0, 1, 2, 3]


def test_nms_of_5000_boxes_takes_a_fraction_of_a_second():
    generator = np.random.default_rng(0)
    center, side = generator.random((5000, 2)) * [1333, 800], np.exp(generator.random((5000, 2)) * 4 + 2)
    boxes = np.concatenate([center - side / 2, center + side / 2], axis=1).astype(np.float32)
    arguments = boxes, generator.random(5000, np.float32), np.arange(5000) % 5, 0.7
    durations = []
    for _ in range(5):
        start = time.process_time()
        batched_nms(*arguments)
        durations.append(time.process_time() - start)
    assert min(durations) < 0.2


def rpn_outputs():
    logits = [numbers(f"proposals/cls{level}", (2, 3, *size), 2) for level, size in enumerate(SIZES)]
    deltas = [numbers(f"proposals/reg{level}", (2, 12, *size), 0.3) for level, size in enumerate(SIZES)]
    return logits, deltas


@pytest.mark.parametrize(("name", "before", "limit"), [("test", 1000, 1000), ("train", 2000, 1000), ("small", 100, 60)])
def test_proposals_equal_those_of_mmdetection(name, before, limit):
    logits, deltas = rpn_outputs()
    anchors = grid_anchors(SIZES, 8, np.float64)
    for image, size in enumerate([(96 - 7, 128 - 3), (96, 128 - 20)]):
        given = [level[image] for level in logits], [level[image] for level in deltas]
        proposals = select_proposals(*given, anchors, size, before_nms=before, limit=limit, iou_threshold=0.7)
        if name == "train":
            assert_summary(proposals, UNITS["proposals.train"]["rows"][image])
        else:
            assert_close(proposals, UNIT_ARRAYS[f"proposals.{name}{image}"])


def test_nms_of_proposals_does_not_compare_the_levels():
    # One cell per level. The square anchors of the first two levels become the same box.
    anchors = [level[1:2] for level in (base_anchors(stride, 8, np.float64) for stride in STRIDES[:2])]
    anchors = [np.repeat(anchor, 3, axis=0) for anchor in anchors]
    logits, deltas = [np.zeros((3, 1, 1))] * 2, [np.zeros((12, 1, 1)), np.full((3, 4), [0, 0, -np.log(2), -np.log(2)])]
    deltas[1] = deltas[1].reshape(12, 1, 1)
    proposals = select_proposals(logits, deltas, anchors, (64, 64), before_nms=9, limit=9, iou_threshold=0.7)
    np.testing.assert_allclose(proposals, [[0, 0, 16, 16, 0.5]] * 2)


def test_proposals_without_a_width_are_dropped():
    anchors = [np.array([[-9.0, 0, -1, 8], [0, 0, 8, 8], [70, 0, 78, 8]])]
    proposals = select_proposals(
        [np.zeros((3, 1, 1))], [np.zeros((12, 1, 1))], anchors, (64, 64), before_nms=9, limit=9, iou_threshold=0.7
    )
    np.testing.assert_array_equal(proposals, [[0, 0, 8, 8, 0.5]])


ROIS = UNIT_ARRAYS["roialign.rois"]
ROI_SIZES = [(480 // stride, 640 // stride) for stride in STRIDES[:4]]


def roi_features(size):
    maps = [numbers(f"roialign/p{level + 2}", (2, 3, *shape)) for level, shape in enumerate(ROI_SIZES)]
    windows = roi_windows(ROIS, ROI_SIZES, size, 56.0, np.float64)
    return roi_align([x.transpose(0, 2, 3, 1) for x in maps], windows, size), windows


def test_roi_features_equal_those_of_mmcv():
    assert_close(roi_features(7)[0], UNIT_ARRAYS["roialign.box"])
    assert_summary(roi_features(14)[0], UNITS["roialign.mask"])


@pytest.mark.parametrize(("name", "size"), [("box", 7), ("mask", 14)])
def test_the_gradient_of_roi_features_equals_that_of_mmcv(name, size):
    features, windows = roi_features(size)
    gradient = numbers(f"roialign/{name}/grad", features.shape)
    maps = roi_align_gradient(gradient, windows, [(2, *shape, 3) for shape in ROI_SIZES])
    for values, summary in zip(maps, UNITS[f"roialign.{name}.input_grad"], strict=True):
        assert_summary(np.ascontiguousarray(values.transpose(0, 3, 1, 2)), summary)


def ramp(size):
    """Return RoIAlign of a map with the squares of the columns, in a RoI of `size` cells from column 2."""
    squares = np.broadcast_to(np.arange(32.0)[:, None] ** 2, (1, 32, 32, 1))
    roi = np.array([[0, 8, 8, 8 + 4 * size, 8 + 4 * size]], np.float64)
    return roi_align([squares], roi_windows(roi, [(32, 32)] * 4, 7, 56.0, np.float64), 7)[0, 0, 0]


def test_roi_align_reads_positions_half_a_cell_further_left():
    np.testing.assert_allclose(ramp(7), (np.arange(2, 9)) ** 2)


def test_roi_align_takes_as_many_samples_as_the_bin_has_cells():
    # Three samples in a bin of three cells are at the cells' middles.
    np.testing.assert_allclose(ramp(21), [np.mean(np.arange(2 + 3 * i, 5 + 3 * i) ** 2) for i in range(7)])


def test_an_empty_roi_has_features_of_zero_and_no_gradient():
    windows = roi_windows(np.array([[0, 9, 9, 9, 30.0]]), ROI_SIZES, 7, 56.0, np.float64)
    assert (roi_align([np.ones((1, 120, 160, 2))], windows, 7) == 0).all()
    (gradient,) = roi_align_gradient(np.ones((1, 2, 7, 7)), windows, [(1, 120, 160, 2)])
    assert (gradient == 0).all()


def post_inputs():
    boxes = random_boxes("post/boxes", 60, *IMAGE[:1], 128 - 3, small=6)
    return boxes, numbers("post/cls", (60, 4), 2), numbers("post/reg", (60, 12), 0.8)


@pytest.mark.parametrize("limit", [100, 100_000])
def test_detections_equal_those_of_mmdetection(limit):
    options, scale = MaskRCNNOptions(max_detections=min(limit, 1 << 16)), np.float32(UNITS["post.scale_factor"])
    found = select_detections(options, *post_inputs(), (96 - 7, 128 - 3), scale)
    assert len(found.labels) == UNITS["post.kept"][str(limit)]
    if limit == 100:
        assert_close(np.concatenate([found.boxes, found.scores[:, None]], axis=1), UNIT_ARRAYS["post.boxes"])
        np.testing.assert_array_equal(found.labels, UNIT_ARRAYS["post.labels"])


def one_proposal(logits, deltas=(0,) * 8, **options):
    logits, deltas = np.array([logits], np.float64), np.array([deltas], np.float64)
    return select_detections(MaskRCNNOptions(**options), np.array([[10.0, 10, 20, 20]]), logits, deltas, (64, 64))


def test_the_last_logit_is_the_background():
    assert one_proposal([0, 0, 9]).labels.tolist() == []
    assert one_proposal([9, 0, 0]).labels.tolist() == [0]


def test_each_class_has_its_own_deltas():
    found = one_proposal([5, 4, 0], (0, 0, 0, 0, 10, 0, 0, 0))  # the second class is one width further right
    np.testing.assert_allclose(found.boxes, [[10, 10, 20, 20], [20, 10, 30, 20]])
    assert found.labels.tolist() == [0, 1]


def test_the_score_threshold_applies_to_probabilities():
    # Both logits are above 0.05, but only one probability. Negative logits can have high probabilities.
    assert one_proposal([1, 9, 1]).labels.tolist() == [1]
    assert one_proposal([-5, -1, -1]).labels.tolist() == [1]


def test_a_score_must_be_above_the_threshold():
    assert one_proposal([0, 0, 0], score_threshold=1 / 3).labels.tolist() == []


def heads(rois):
    return np.tile([4.0, 0, 0], (len(rois), 1)), np.zeros((len(rois), 8))


def masks(rois, labels):
    return np.broadcast_to((rois[:, 3] + 100 * labels)[:, None, None], (len(rois), 28, 28))


def test_images_of_a_batch_keep_their_own_detections():
    boxes = [np.array([[0.0, 0, 10, 20]]), np.zeros((0, 4)), np.array([[30.0, 30, 40, 50]])]
    sizes, scales = np.full((3, 2), 64), np.float32([[1, 1, 1, 1], [1, 1, 1, 1], [2, 4, 2, 4]])
    for scale in (None, scales):
        found = detect(OPTIONS, boxes, heads, masks, sizes, scale)
        assert [len(one.boxes) for one in found] == [1, 0, 1]
        assert [one.mask_logits.shape for one in found] == [(1, 28, 28), (0, 28, 28), (1, 28, 28)]
        # The mask head gets RoIs in pixels of the input.
        assert [one.mask_logits[0, 0, 0] for one in (found[0], found[2])] == [10, 40]
    np.testing.assert_allclose(found[2].boxes, [[15, 7.5, 20, 12.5]])


def test_images_without_proposals_have_no_detections():
    found = detect(OPTIONS, [np.zeros((0, 5))] * 2, None, None, np.full((2, 2), 64))
    assert [one.boxes.shape for one in found] == [(0, 4)] * 2
    assert found[0].mask_logits.shape == (0, 28, 28)


def test_a_network_without_masks_returns_none():
    (found,) = detect(MaskRCNNOptions(masks=False), [np.array([[0.0, 0, 10, 20]])], heads, None, np.array([[64, 64]]))
    assert isinstance(found, Detections)
    assert found.mask_logits is None


def test_pasted_masks_equal_those_of_mmdetection():
    size, boxes = tuple(UNITS["numbers"]["paste_image"]), UNIT_ARRAYS["paste.boxes"]
    logits = numbers("paste/logits", (12, 1, 28, 28), 2)[:, 0]
    pasted = np.stack([paste_mask(one, box, size) for one, box in zip(logits, boxes, strict=True)])
    bits = np.unpackbits(UNIT_ARRAYS["paste.bits"], count=pasted.size).reshape(pasted.shape)
    np.testing.assert_array_equal(pasted, bits.astype(bool))
    assert pasted.sum(axis=(1, 2)).tolist() == UNITS["paste"]["on"]


def test_a_mask_is_pasted_without_rounding_its_box():
    logits = np.broadcast_to(np.where(np.arange(28) < 7, 20.0, -20.0), (28, 28))
    # The first quarter of the box ends at 2.4 + 1.25. In a box from 2 to 7 or from 3 to 8, it would have one pixel.
    for mask, axis in ((logits, 0), (logits.T, 1)):
        pasted = paste_mask(mask, np.array([2.4, 2.4, 7.4, 7.4]), (10, 10))
        assert np.flatnonzero(pasted.any(axis=axis)).tolist() == [2, 3]


def test_a_mask_outside_the_image_is_empty():
    assert not paste_mask(np.ones((28, 28)), np.array([-9.0, -9, -4, -4]), (8, 8)).any()


def test_rois_begin_with_the_index_of_their_image():
    boxes = [np.ones((1, 4)), np.zeros((0, 4)), np.full((2, 4), 3.0)]
    np.testing.assert_array_equal(to_rois(boxes), [[0, 1, 1, 1, 1], [2, 3, 3, 3, 3], [2, 3, 3, 3, 3]])


def test_selection_in_float32_stays_in_float32():
    boxes, logits, deltas = (x.astype(np.float32) for x in post_inputs())
    found = select_detections(OPTIONS, boxes, logits, deltas, IMAGE, np.ones(4, np.float32))
    rpn = [[level[0].astype(np.float32) for level in levels] for levels in rpn_outputs()]
    anchors = grid_anchors(SIZES, 8, np.float32)
    proposals = select_proposals(*rpn, anchors, np.array(IMAGE), before_nms=1000, limit=1000, iou_threshold=0.7)
    windows = roi_windows(to_rois([boxes]), SIZES[:4], 7, 56.0, np.float32)
    features = roi_align([np.ones((1, *SIZES[0], 2), np.float32)], windows, 7)
    assert {x.dtype for x in (found.boxes, found.scores, proposals, features)} == {np.dtype(np.float32)}
