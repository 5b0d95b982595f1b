"""Mask R-CNN in PyTorch, the reference for `fcvit.models.mask_rcnn`. It was written from the facts, not from it.

Names and behavior are those of mmdetection 2.19.0 with mmcv 1.4.0 and the authors' backbone. All computations use the
type of the network's parameters. No gradient flows through boxes.

Shapes: B images, C channels, N boxes. A box is x1, y1, x2, y2 in pixels of the network's input unless specified.
"""

import math
from typing import NamedTuple

import numpy as np

from fcvit.frameworks import import_framework
from fcvit.models.spec import MaskRCNNOptions, ModelSpec
from fcvit.reference.backbone import FCViTBackbone
from fcvit.reference.semantic_fpn import ConvOnly, FeaturePyramid

import_framework("torch")  # reports how to install it if it is missing

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

STRIDES = (4, 8, 16, 32, 64)
RATIOS = (0.5, 1.0, 2.0)  # height over width
LOG_LIMIT = abs(math.log(16 / 1000))
RPN_STDS = (1.0, 1.0, 1.0, 1.0)
BOX_STDS = (0.1, 0.1, 0.2, 0.2)
SPLIT_NMS = 10_000  # from this number of boxes, mmcv runs NMS on each group alone
CHUNK = 32  # RoIs that RoIAlign computes together
Margins = dict[str, float]
"""Smallest distance of each kind of decision from its flip."""


class Detections(NamedTuple):
    """Detections of an image, sorted by score: boxes (N, 4), scores (N), labels (N) and mask logits (N, 28, 28)."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    mask_logits: Tensor | None


class MaskRCNN(nn.Module):
    """FCViT with Mask R-CNN, or with Faster R-CNN if the options have no masks."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.num_classes, self.options = spec.num_classes, spec.options
        self.backbone = FCViTBackbone(spec.variant)
        self.neck = FPN(spec.variant.widths, spec.options.neck)
        self.rpn_head = RPNHead(spec.options.neck, spec.options.rpn)
        self.roi_head = RoIHead(spec)

    def forward(self, x: Tensor, image_sizes: np.ndarray, scale_factors: np.ndarray | None = None) -> list[Detections]:
        """Detect the objects in padded images (B, 3, H, W).

        Args:
            x: Normalized images.
            image_sizes: Height and width of each image without its padding, (B, 2).
            scale_factors: New over old width, height, width and height of each image, (B, 4). The boxes are then in
                pixels of the original images.
        """
        maps = self.neck(self.backbone(x))
        logits, deltas = self.rpn_head(maps)
        proposals = self.propose(logits, deltas, image_sizes)
        return self.detect(maps, proposals, image_sizes, scale_factors)

    def propose(
        self,
        logits: list[Tensor],
        deltas: list[Tensor],
        image_sizes: np.ndarray,
        before: int | None = None,
        after: int | None = None,
        margins: Margins | None = None,
    ) -> list[Tensor]:
        """Return the proposals (N, 5) of each image, sorted by score: x1, y1, x2, y2 and the score.

        Args:
            logits: RPN logits of each level, (B, 3, H, W).
            deltas: RPN deltas of each level, (B, 12, H, W).
            image_sizes: See `forward`.
            before: Largest number of boxes per level before NMS. None selects that of the options.
            after: Largest number of proposals per image. None selects that of the options.
            margins: Dictionary to update with the margins of the decisions.
        """
        options = self.options
        before = options.proposals_before_nms if before is None else before
        after = options.max_proposals if after is None else after
        anchors = [
            grid_anchors(stride, level.shape[-2:], options.anchor_scale, level)
            for stride, level in zip(STRIDES, logits, strict=True)
        ]
        results = []
        for image, size in enumerate(image_sizes.tolist()):
            parts = []
            for level, anchor in enumerate(anchors):
                score = logits[level][image].detach().permute(1, 2, 0).flatten().sigmoid()
                delta = deltas[level][image].detach().permute(1, 2, 0).reshape(-1, 4)
                if len(score) > before:
                    note_gap(margins, f"proposals before NMS, level {level}", score, before)
                    score, kept = score.sort(descending=True, stable=True)
                    score, kept = score[:before], kept[:before]
                    delta, anchor = delta[kept], anchor[kept]
                parts.append((score, delta, anchor, torch.full_like(score, level, dtype=torch.int64)))
            score, delta, anchor, group = (torch.cat(part) for part in zip(*parts, strict=True))
            boxes = decode(anchor, delta, RPN_STDS, size)
            filled = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
            boxes, score, group = boxes[filled], score[filled], group[filled]
            kept = batched_nms(boxes, score, group, options.proposal_iou, margins, "proposal NMS")
            note_gap(margins, "number of proposals", score[kept], after)
            results.append(torch.cat([boxes, score[:, None]], 1)[kept[:after]])
        return results

    def detect(
        self,
        maps: list[Tensor],
        proposals: list[Tensor],
        image_sizes: np.ndarray,
        scale_factors: np.ndarray | None = None,
        margins: Margins | None = None,
    ) -> list[Detections]:
        """Return the detections of each image for its proposals (N, 4) or (N, 5)."""
        head, options = self.roi_head, self.options
        proposals = [one[:, :4] for one in proposals]
        logits, deltas = head.bbox_head(head.box_features(maps, to_rois(proposals), margins))
        counts = [len(boxes) for boxes in proposals]
        selected = []
        for image, parts in enumerate(zip(proposals, logits.split(counts), deltas.split(counts), strict=True)):
            scale = None if scale_factors is None else torch.as_tensor(scale_factors[image]).to(logits)
            selected.append((*select(*parts, image_sizes[image].tolist(), options, scale, margins), scale))
        if not options.masks:
            return [Detections(boxes, scores, labels, None) for boxes, scores, labels, _ in selected]
        rois = to_rois([boxes if scale is None else boxes * scale for boxes, _, _, scale in selected])
        masks = head.mask_head(head.mask_features(maps, rois, margins))
        masks = masks[torch.arange(len(masks)), torch.cat([labels for _, _, labels, _ in selected])]
        masks = masks.split([len(boxes) for boxes, *_ in selected])
        return [Detections(*one[:3], logits) for one, logits in zip(selected, masks, strict=True)]


class FPN(FeaturePyramid):
    """The feature pyramid with a fifth level, which is every second position of the fourth."""

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        maps = super().forward(stages)
        return [*maps, maps[-1][:, :, ::2, ::2]]


class RPNHead(nn.Module):
    """The same convolutions on every level: one logit and four deltas per anchor."""

    def __init__(self, neck: int, channels: int):
        super().__init__()
        self.rpn_conv = nn.Conv2d(neck, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, len(RATIOS), 1)
        self.rpn_reg = nn.Conv2d(channels, 4 * len(RATIOS), 1)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        hidden = [self.rpn_conv(x).relu() for x in maps]
        return [self.rpn_cls(x) for x in hidden], [self.rpn_reg(x) for x in hidden]


class RoIHead(nn.Module):
    """The second stage. RoIs are (N, 5): index of the image, x1, y1, x2, y2."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.options = spec.options
        self.bbox_head = BoxHead(spec)
        if spec.options.masks:
            self.mask_head = MaskHead(spec)

    def box_features(self, maps: list[Tensor], rois: Tensor | np.ndarray, margins: Margins | None = None) -> Tensor:
        """Return features (N, C, 7, 7) of RoIs on the first four maps."""
        return pyramid_align(maps, rois, 7, self.options.finest_scale, margins)

    def mask_features(self, maps: list[Tensor], rois: Tensor | np.ndarray, margins: Margins | None = None) -> Tensor:
        """Return features (N, C, 14, 14) of RoIs on the first four maps."""
        return pyramid_align(maps, rois, 14, self.options.finest_scale, margins)


class BoxHead(nn.Module):
    """Features (N, C, 7, 7) to logits (N, classes + 1), background last, and deltas (N, 4 * classes)."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        neck, width = spec.options.neck, spec.options.box_channels
        self.fc_cls = nn.Linear(width, spec.num_classes + 1)
        self.fc_reg = nn.Linear(width, 4 * spec.num_classes)
        self.shared_fcs = nn.ModuleList([nn.Linear(49 * neck, width), nn.Linear(width, width)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        for layer in self.shared_fcs:
            x = layer(x).relu()
        return self.fc_cls(x), self.fc_reg(x)


class MaskHead(nn.Module):
    """Features (N, C, 14, 14) to mask logits (N, classes, 28, 28)."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        neck, width = spec.options.neck, spec.options.mask_channels
        self.convs = nn.ModuleList(ConvOnly(width if index else neck, width, 3) for index in range(4))
        self.upsample = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.conv_logits = nn.Conv2d(width, spec.num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x).relu()
        return self.conv_logits(self.upsample(x).relu())


def base_anchors(stride: int, scale: float, like: Tensor) -> Tensor:
    """Return the three anchors (3, 4) around the origin, computed in the type of `like`."""
    roots = like.new_tensor(RATIOS).sqrt()
    width, height = stride * (1 / roots) * scale, stride * roots * scale
    return torch.stack([-0.5 * width, -0.5 * height, 0.5 * width, 0.5 * height], 1)


def grid_anchors(stride: int, size: tuple[int, ...], scale: float, like: Tensor) -> Tensor:
    """Return the anchors (H * W * 3, 4) of a level. They are centered on the upper left corners of the cells."""
    y, x = (stride * torch.arange(length).to(like) for length in size)
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    shift = torch.stack([grid_x, grid_y, grid_x, grid_y], 2)[:, :, None]
    return (base_anchors(stride, scale, like) + shift).reshape(-1, 4)


def encode(boxes: Tensor, targets: Tensor, stds: tuple[float, ...]) -> Tensor:
    """Return the deltas (N, 4) from boxes to targets."""
    center, size = center_size(boxes)
    target_center, target_size = center_size(targets)
    deltas = torch.cat([(target_center - center) / size, (target_size / size).log()], 1)
    return deltas / deltas.new_tensor(stds)


def decode(boxes: Tensor, deltas: Tensor, stds: tuple[float, ...], image_size: list[int] | None) -> Tensor:
    """Move boxes (N, 4) by deltas (N, 4 * K), and clip them to the image (height, width). Return (N, 4 * K)."""
    center, size = center_size(boxes[:, None])
    deltas = deltas.unflatten(1, (-1, 4)) * deltas.new_tensor(stds)
    center = center + size * deltas[..., :2]
    half = size * deltas[..., 2:].clamp(-LOG_LIMIT, LOG_LIMIT).exp() * 0.5
    result = torch.cat([center - half, center + half], -1)
    if image_size is not None:
        height, width = image_size
        limit = result.new_tensor([width, height, width, height])
        result = torch.minimum(result.clamp(min=0), limit)
    return result.flatten(1)


def center_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return (boxes[..., :2] + boxes[..., 2:]) * 0.5, boxes[..., 2:] - boxes[..., :2]


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    threshold: float,
    margins: Margins | None = None,
    name: str = "NMS",
) -> Tensor:
    """Return the indices of the boxes that are kept by NMS within each group, sorted by score."""
    if not len(boxes):
        return groups
    if len(boxes) < SPLIT_NMS:
        apart = boxes + (groups.to(boxes) * (boxes.max() + 1))[:, None]
        return nms(apart, scores, threshold, margins, name)
    parts = [(groups == group).nonzero()[:, 0] for group in groups.unique()]
    kept = torch.cat([part[nms(boxes[part], scores[part], threshold, margins, name)] for part in parts])
    return kept[scores[kept].sort(descending=True, stable=True).indices]


def nms(boxes: Tensor, scores: Tensor, threshold: float, margins: Margins | None = None, name: str = "NMS") -> Tensor:
    """Return the indices of the kept boxes by descending score.

    A box is suppressed if its IoU with a kept box of a higher score is above the threshold.
    """
    order = scores.sort(descending=True, stable=True).indices
    boxes, scores = boxes[order], scores[order]
    low, high = boxes[:, :2], boxes[:, 2:]
    areas = (high - low).prod(1)
    alive = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    kept = []
    for index in range(len(boxes)):
        if not alive[index]:
            continue
        kept.append(index)
        rest = slice(index + 1, None)
        overlap = (torch.minimum(high[index], high[rest]) - torch.maximum(low[index], low[rest])).clamp(min=0).prod(1)
        iou = overlap / (areas[index] + areas[rest] - overlap)
        note(margins, f"{name}: IoU", (iou - threshold).abs()[alive[rest] & (overlap > 0)])
        alive[rest] &= ~(iou > threshold)  # the IoU of two empty boxes is NaN
    different = (boxes[1:] != boxes[:-1]).any(1)  # equal boxes may change places without an effect
    note(margins, f"{name}: order", (scores[:-1] - scores[1:])[different])
    return order[torch.tensor(kept, device=order.device)]


def select(
    proposals: Tensor,
    logits: Tensor,
    deltas: Tensor,
    image_size: list[int],
    options: MaskRCNNOptions,
    scale: Tensor | None = None,
    margins: Margins | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes (N, 4), scores (N) and labels (N) of an image, sorted by score, from the outputs of the box head."""
    scores = logits.softmax(1)[:, :-1]
    boxes = decode(proposals, deltas, BOX_STDS, image_size).reshape(*scores.shape, 4)
    if scale is not None:
        boxes = boxes / scale
    note(margins, "score threshold", (scores - options.score_threshold).abs())
    row, label = (scores > options.score_threshold).nonzero(as_tuple=True)
    boxes, scores = boxes[row, label], scores[row, label]
    kept = batched_nms(boxes, scores, label, options.detection_iou, margins, "detection NMS")
    note_gap(margins, "number of detections", scores[kept], options.max_detections)
    kept = kept[: options.max_detections]
    return boxes[kept], scores[kept], label[kept]


def to_rois(boxes: list[Tensor]) -> Tensor:
    """Join the boxes of all images to RoIs (N, 5) that begin with the index of the image."""
    return torch.cat([F.pad(one, (1, 0), value=image) for image, one in enumerate(boxes)])


def roi_levels(rois: Tensor, finest_scale: float, margins: Margins | None = None) -> Tensor:
    """Return the level of each RoI, from 0 to 3."""
    exact = ((rois[:, 3:] - rois[:, 1:3]).prod(1).sqrt() / finest_scale + 1e-6).log2()
    borders = exact.new_tensor([1.0, 2.0, 3.0])
    note(margins, "level of a box", (exact[:, None] - borders).abs())
    return exact.floor().clamp(0, 3).long()


def pyramid_align(
    maps: list[Tensor], rois: Tensor | np.ndarray, size: int, finest_scale: float, margins: Margins | None = None
) -> Tensor:
    """Return RoIAlign (N, C, size, size) of each RoI on the map of its level."""
    rois = torch.as_tensor(rois).detach().to(maps[0])
    levels = roi_levels(rois, finest_scale, margins)
    indices, parts = [], [maps[0].new_zeros(0, maps[0].shape[1], size, size)]
    for level in levels.unique().tolist():
        index = (levels == level).nonzero()[:, 0]
        indices.append(index)
        parts.append(roi_align(maps[level], rois[index], size, 1 / STRIDES[level], margins))
    return torch.cat(parts)[torch.cat(indices).argsort()] if indices else parts[0]


def roi_align(x: Tensor, rois: Tensor, size: int, scale: float, margins: Margins | None = None) -> Tensor:
    """Return the mean of bilinear samples in size x size bins of each RoI: maps (B, C, H, W) to (N, C, size, size).

    The samples of a RoI form a grid, so that their mean is a product of one matrix per axis with a window of the map.
    Windows of similar width are computed together.
    """
    rois = rois.detach()
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)  # (B * H * W, C)
    order = (rois[:, 3] - rois[:, 1]).argsort()
    parts = [x.new_zeros(0, x.shape[1], size, size)]
    for chunk in order.split(CHUNK):
        image = rois[chunk, 0].long()
        start, end = rois[chunk, 1:3] * scale - 0.5, rois[chunk, 3:] * scale - 0.5
        across, first_x = axis_weights(start[:, 0], end[:, 0], size, x.shape[3], margins)
        down, first_y = axis_weights(start[:, 1], end[:, 1], size, x.shape[2], margins)
        # Rows of the window beyond the map have weight 0.
        index_y = (first_y[:, None] + torch.arange(down.shape[2], device=x.device)).clamp(max=x.shape[2] - 1)
        index_x = (first_x[:, None] + torch.arange(across.shape[2], device=x.device)).clamp(max=x.shape[3] - 1)
        index = (image[:, None] * x.shape[2] + index_y)[:, :, None] * x.shape[3] + index_x[:, None]
        window = rows.index_select(0, index.flatten()).reshape(*index.shape, -1)  # (n, h, w, C)
        result = down @ window.flatten(2)  # (n, size, w * C)
        result = across[:, None] @ result.unflatten(2, (index.shape[2], -1))  # (n, size, size, C)
        parts.append(result.permute(0, 3, 1, 2))
    return torch.cat(parts)[order.argsort()]


def axis_weights(start: Tensor, end: Tensor, size: int, length: int, margins: Margins | None) -> tuple[Tensor, Tensor]:
    """Return the weights (n, size, window) of the positions along an axis, and the first position (n) of each window.

    Args:
        start, end: Extent of each RoI in positions of the map, (n).
        size: Number of bins.
        length: Length of the map along this axis.
        margins: See `MaskRCNN.propose`.
    """
    width = ((end - start) / size)[:, None, None]
    note(margins, "samples per bin", (width - width.round()).abs()[width != 0])
    count = width.float().ceil()  # mmcv rounds to float32 first
    sample = torch.arange(max(1, int(count.max())), device=start.device)
    position = start[:, None, None] + torch.arange(size, device=start.device)[:, None] * width
    position = position + (sample + 0.5) * width / count.clamp(min=1)  # (n, size, samples)
    inside = (sample < count) & (position >= -1) & (position <= length)
    position = position.where(inside, start[:, None, None]).clamp(0, length - 1)
    low = position.floor().long()
    high = (low + 1).clamp(max=length - 1)
    fraction = position - low
    first = low.flatten(1).amin(1)
    window = int((high - first[:, None, None]).max()) + 1
    weights = start.new_zeros(len(start), size, window)
    share = inside / count.clamp(min=1).to(start)
    weights = weights.scatter_add(2, low - first[:, None, None], share * (1 - fraction))
    return weights.scatter_add(2, high - first[:, None, None], share * fraction), first


def paste_masks(probabilities: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Paste masks (N, 28, 28) into boxes of an image of the given size. Return booleans (N, height, width)."""
    result = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, box, canvas in zip(probabilities, boxes, result, strict=True):
        x1, y1, x2, y2 = box.tolist()
        left, top = (max(math.floor(value) - 1, 0) for value in (x1, y1))
        right, bottom = min(math.ceil(x2) + 1, width), min(math.ceil(y2) + 1, height)
        if left >= right or top >= bottom:
            continue
        grid_x = centers(left, right, box[0], box[2])
        grid_y = centers(top, bottom, box[1], box[3])
        grid = torch.stack(torch.meshgrid(grid_x, grid_y, indexing="xy"), 2)
        values = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
        canvas[top:bottom, left:right] = values >= 0.5
    return result


def centers(first: int, last: int, low: Tensor, high: Tensor) -> Tensor:
    """Return the pixel centers from `first` to `last` in the coordinates of `grid_sample`, where the box is -1 to 1."""
    grid = (torch.arange(first, last).to(low) + 0.5 - low) / (high - low) * 2 - 1
    return grid.masked_fill(grid.isinf(), 0)


def note(margins: Margins | None, name: str, distances: Tensor) -> None:
    """Store the smallest distance of a decision from its flip."""
    if margins is not None and distances.numel():
        margins[name] = min(margins.get(name, math.inf), float(distances.min()))


def note_gap(margins: Margins | None, name: str, scores: Tensor, count: int) -> None:
    """Store the gap between the last selected score and the next one."""
    if margins is not None and len(scores) > count:
        last, following = scores.topk(count + 1).values[-2:].tolist()
        note(margins, name, scores.new_tensor([last - following]))
