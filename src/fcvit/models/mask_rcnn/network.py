"""Mask R-CNN in PaddlePaddle: the FCViT backbone with mmdetection's feature pyramid, RPN and two heads.

Ported from the behavior of mmdetection 2.19.0 (`FPN`, `RPNHead`, `Shared2FCBBoxHead`, `FCNMaskHead`) as the authors
configure it in their `detection/` folder. The parameter names are those of their checkpoints. The selection of boxes is
done in NumPy, outside the gradient.

Shapes: B images, C channels, N regions of interest (RoIs). A RoI is the index of the image and x1, y1, x2, y2 in pixels
of the input.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fcvit.frameworks import import_framework
from fcvit.models.backbone import FCViTBackbone
from fcvit.models.mask_rcnn.anchors import RATIOS, STRIDES
from fcvit.models.mask_rcnn.boxes import pyramid_levels
from fcvit.models.mask_rcnn.detections import Detections, detect, propose
from fcvit.models.mask_rcnn.roi_align import BOX_BINS, MASK_BINS, roi_align, roi_align_gradient, roi_windows
from fcvit.models.semantic_fpn import FPN, PlainConv
from fcvit.models.spec import MaskRCNNOptions
from fcvit.models.variants import Variant

import_framework("paddle")  # hides warnings, and reports how to install it if it is missing

import paddle  # noqa: E402
import paddle.nn.functional as F  # noqa: E402
from paddle import Tensor, nn  # noqa: E402

PyLayer: Any = paddle.autograd.PyLayer  # its type stubs do not accept specific arguments


class MaskRCNN(nn.Layer):
    """FCViT with Mask R-CNN, or with Faster R-CNN if the options have no masks.

    Args:
        variant: Architecture of the backbone.
        num_classes: Number of classes without the background, at least 1.
        options: Widths and limits.
        drop_path_rate: Stochastic depth rate of the last block, 0 <= rate < 1.
        drop_rate: Dropout rate in the channel mixers, 0 <= rate < 1.

    Raises:
        UsageError: If a rate is out of range.
    """

    def __init__(
        self,
        variant: Variant,
        num_classes: int,
        options: MaskRCNNOptions | None = None,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.variant, self.num_classes, self.options = variant, num_classes, options or MaskRCNNOptions()
        self.backbone = FCViTBackbone(variant, drop_path_rate, drop_rate)
        self.neck = FiveLevelFPN(variant.widths, self.options.neck)
        self.rpn_head = RPNHead(self.options.neck, self.options.rpn)
        self.roi_head = RoIHead(num_classes, self.options)

    def forward(
        self, images: Tensor, image_sizes: np.ndarray | None = None, scale_factors: np.ndarray | None = None
    ) -> Any:
        """Return the detections in each image as arrays, a list of `Detections`.

        Args:
            images: Normalized images (B, 3, H, W) of any size, padded with zeros on the right and at the bottom.
            image_sizes: Height and width of each image without its padding, (B, 2). In training it is None, and the
                result is the five feature maps, and the logits and the deltas of the RPN for each of them.
            scale_factors: New over old width, height, width and height of each image, (B, 4). The boxes are then in
                pixels of the original images, otherwise in pixels of the input.
        """
        if image_sizes is None:
            maps = self.neck(self.backbone(images))
            return maps, *self.rpn_head(maps)
        with paddle.no_grad():
            maps = self.neck(self.backbone(images))
            logits, deltas = self.rpn_head(maps)
            proposals = self.propose(logits, deltas, image_sizes)
            return self.detect(maps, proposals, image_sizes, scale_factors)

    def propose(self, logits: list[Tensor], deltas: list[Tensor], image_sizes: np.ndarray) -> list[np.ndarray]:
        """Return the proposals of each image, (N, 5) with x1, y1, x2, y2 and the score, from the outputs of the RPN."""
        scores, shifts = ([level.numpy() for level in levels] for levels in (logits, deltas))
        return propose(self.options, scores, shifts, np.asarray(image_sizes))

    def detect(
        self,
        maps: list[Tensor],
        proposals: Sequence[np.ndarray],
        image_sizes: np.ndarray,
        scale_factors: np.ndarray | None = None,
    ) -> list[Detections]:
        """Return the detections in each image, from the five feature maps and the proposals. See `forward`."""

        def box_head(rois: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            logits, deltas = self.roi_head.bbox_head(self.roi_head.box_features(maps, rois))
            return logits.numpy(), deltas.numpy()

        def mask_head(rois: np.ndarray, labels: np.ndarray) -> np.ndarray:
            logits = self.roi_head.mask_head(self.roi_head.mask_features(maps, rois))
            return logits.numpy()[np.arange(len(labels)), labels]

        scales = None if scale_factors is None else np.asarray(scale_factors)
        return detect(self.options, proposals, box_head, mask_head, np.asarray(image_sizes), scales)


class FiveLevelFPN(FPN):
    """Feature pyramid: maps of the four stages to five maps with strides 4 to 64.

    Source: mmdetection 2.19.0, `models/necks/fpn.py`. The fifth map is every second position of the fourth.
    """

    def __init__(self, widths: tuple[int, ...], channels: int):
        super().__init__(widths, channels)
        for block in (*self.lateral_convs, *self.fpn_convs):
            nn.initializer.XavierUniform()(block.conv.weight)

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        maps = super().forward(stages)
        return [*maps, F.max_pool2d(maps[-1], 1, 2)]


class RPNHead(nn.Layer):
    """The same convolutions on every map: logits (B, 3, H, W) and deltas (B, 12, H, W).

    Source: mmdetection 2.19.0, `models/dense_heads/rpn_head.py`.
    """

    def __init__(self, neck: int, channels: int):
        super().__init__()
        self.rpn_conv = nn.Conv2D(neck, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2D(channels, len(RATIOS), 1)
        self.rpn_reg = nn.Conv2D(channels, 4 * len(RATIOS), 1)
        for conv in (self.rpn_conv, self.rpn_cls, self.rpn_reg):
            _normal(conv, 0.01)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        hidden = [F.relu(self.rpn_conv(x)) for x in maps]
        return [self.rpn_cls(x) for x in hidden], [self.rpn_reg(x) for x in hidden]


class RoIHead(nn.Layer):
    """The second stage: two heads, each on its own RoI features."""

    def __init__(self, num_classes: int, options: MaskRCNNOptions):
        super().__init__()
        self.finest_scale = options.finest_scale
        self.bbox_head = BoxHead(options.neck, options.box_channels, num_classes)
        if options.masks:
            self.mask_head = MaskHead(options.neck, options.mask_channels, num_classes)

    def box_features(self, maps: list[Tensor], rois: np.ndarray) -> Tensor:
        """Return the features (N, C, 7, 7) of RoIs (N, 5) for the box head."""
        return roi_features(maps, rois, BOX_BINS, self.finest_scale)

    def mask_features(self, maps: list[Tensor], rois: np.ndarray) -> Tensor:
        """Return the features (N, C, 14, 14) of RoIs (N, 5) for the mask head."""
        return roi_features(maps, rois, MASK_BINS, self.finest_scale)


class BoxHead(nn.Layer):
    """RoI features (N, C, 7, 7) to class logits (N, classes + 1), background last, and deltas (N, 4 * classes).

    Source: mmdetection 2.19.0, `Shared2FCBBoxHead`.
    """

    def __init__(self, neck: int, channels: int, num_classes: int):
        super().__init__()
        self.fc_cls = nn.Linear(channels, num_classes + 1)
        self.fc_reg = nn.Linear(channels, 4 * num_classes)
        self.shared_fcs = nn.LayerList([nn.Linear(BOX_BINS**2 * neck, channels), nn.Linear(channels, channels)])
        _normal(self.fc_cls, 0.01)
        _normal(self.fc_reg, 0.001)
        for layer in self.shared_fcs:
            _normal(layer, (2 / sum(layer.weight.shape)) ** 0.5)  # Xavier

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        for layer in self.shared_fcs:
            x = F.relu(layer(x))
        return self.fc_cls(x), self.fc_reg(x)


class MaskHead(nn.Layer):
    """RoI features (N, C, 14, 14) to mask logits (N, classes, 28, 28).

    Source: mmdetection 2.19.0, `FCNMaskHead`.
    """

    def __init__(self, neck: int, channels: int, num_classes: int):
        super().__init__()
        self.convs = nn.LayerList([PlainConv(channels if index else neck, channels, 3) for index in range(4)])
        self.upsample = nn.Conv2DTranspose(channels, channels, 2, stride=2)
        self.conv_logits = nn.Conv2D(channels, num_classes, 1)
        _normal(self.upsample, (2 / (4 * channels)) ** 0.5)  # Kaiming over the outputs, like the convolutions
        _normal(self.conv_logits, (2 / num_classes) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.conv_logits(F.relu(self.upsample(x)))


def _normal(layer: nn.Layer, std: float) -> None:
    """Initialize the weight with normal numbers, and the bias with 0."""
    nn.initializer.Normal(0.0, std)(layer.weight)
    nn.initializer.Constant(0.0)(layer.bias)


def roi_features(maps: list[Tensor], rois: np.ndarray, size: int, finest_scale: float) -> Tensor:
    """Return RoIAlign (N, C, size, size) of each RoI (N, 5) on the map of its level. No gradient flows to the RoIs.

    Maps in half precision are converted to float32, as in the authors' training.
    """
    levels = [x if x.dtype == paddle.float64 else x.astype("float32") for x in maps[:4]]
    if levels[0].place.is_cpu_place():
        return _RoIAlign.apply(*levels, rois=rois, size=size, finest_scale=finest_scale)
    return align_on_device(levels, rois, size, finest_scale)


class _RoIAlign(PyLayer):
    """RoIAlign on a CPU.

    Paddle's CPU operator has a wrong gradient for boxes with a side of less than one cell, divides by zero for empty
    boxes, and takes four times as long.
    """

    @staticmethod
    def forward(ctx: Any, *maps: Tensor, rois: np.ndarray, size: int, finest_scale: float) -> Tensor:
        arrays = [_channels_last(x) for x in maps]
        ctx.shapes = [array.shape for array in arrays]
        ctx.windows = roi_windows(rois, [shape[1:3] for shape in ctx.shapes], size, finest_scale, arrays[0].dtype)
        return paddle.to_tensor(roi_align(arrays, ctx.windows, size))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        maps = roi_align_gradient(gradient.numpy(), ctx.windows, ctx.shapes)
        return tuple(paddle.to_tensor(x).transpose([0, 3, 1, 2]) for x in maps)


def _channels_last(x: Tensor) -> np.ndarray:
    return x.transpose([0, 2, 3, 1]).contiguous().numpy()


def align_on_device(maps: list[Tensor], rois: np.ndarray, size: int, finest_scale: float) -> Tensor:
    """Return the same features as `roi_features` with Paddle's operator, whose gradient is right on a GPU."""
    rois = rois.astype(str(maps[0].dtype).rpartition(".")[2])
    levels = pyramid_levels(rois[:, 1:], finest_scale)
    order = np.lexsort((rois[:, 0], levels))  # the operator needs the RoIs of an image together
    parts = []
    for level, x in enumerate(maps):
        own = rois[order[levels[order] == level]]
        if len(own):
            counts = np.bincount(own[:, 0].astype(np.int64), minlength=x.shape[0]).astype(np.int32)
            given = paddle.to_tensor(own[:, 1:]), paddle.to_tensor(counts)
            parts.append(paddle.vision.ops.roi_align(x, *given, size, 1 / STRIDES[level], -1, aligned=True))
    features = paddle.concat(parts).index_select(paddle.to_tensor(np.argsort(order)))
    empty = np.any(rois[:, 3:] <= rois[:, 1:3], axis=1, keepdims=True)  # the operator divides by zero
    return paddle.where(paddle.to_tensor(empty[:, :, None, None]), paddle.zeros_like(features), features)
