"""Run a detector as graphs with one input each, and select boxes between them in NumPy.

| part      | input                                | outputs                                                   |
| --------- | ------------------------------------ | --------------------------------------------------------- |
| trunk     | normalized images (B, 3, H, W)       | maps.0 to maps.3 (B, height, width, C), channels last;    |
|           |                                      | of the RPN: logits.0 to logits.4 (B, 3, height, width),   |
|           |                                      | deltas.0 to deltas.4 (B, 12, height, width)               |
| box_head  | features of N RoIs (N, C, 7, 7)      | logits (N, classes + 1), deltas (N, 4 * classes)          |
| mask_head | features of N RoIs (N, C, 14, 14)    | logits (N, classes, 28, 28)                               |

Proposals, RoIAlign, NMS and limits are those of `fcvit.models.mask_rcnn` for every runtime. ONNX's RoiAlign would be
slower: for 1,000 RoIs of mixed sizes at 800 x 1344 with two threads, it takes 640 ms of processor time in ONNX Runtime.
NumPy takes 95 ms, and 40 ms for the maps in channels-last order, which the trunk returns for this reason.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fcvit.errors import NumbersDisagree
from fcvit.inference.runtimes import Network
from fcvit.models.mask_rcnn.anchors import STRIDES
from fcvit.models.mask_rcnn.detections import MASK_SIDE, Detections, detect, propose
from fcvit.models.mask_rcnn.roi_align import BOX_BINS, MASK_BINS, roi_align, roi_windows
from fcvit.models.spec import MaskRCNNOptions, ModelSpec

TRUNK, BOX_HEAD, MASK_HEAD = "trunk", "box_head", "mask_head"
BINS = {BOX_HEAD: BOX_BINS, MASK_HEAD: MASK_BINS}
"""Part -> RoIAlign's bins per axis in its input."""


def parts(spec: ModelSpec) -> tuple[str, ...]:
    """Return the parts in which a network is exported. The part of a network that is one graph is ""."""
    if spec.task != "detection":
        return ("",)
    return (TRUNK, BOX_HEAD, MASK_HEAD) if spec.options.masks else (TRUNK, BOX_HEAD)


def part_outputs(spec: ModelSpec, part: str, height: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return the name and shape (without the batch dimension) of each output of a part, for images of this size."""
    if not part:
        return spec.outputs(height, width)
    classes = spec.num_classes
    if part == BOX_HEAD:
        return {"logits": (classes + 1,), "deltas": (4 * classes,)}
    if part == MASK_HEAD:
        return {"logits": (classes, MASK_SIDE, MASK_SIDE)}
    sizes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    shapes: dict[str, tuple[int, ...]] = {f"maps.{i}": (*size, spec.options.neck) for i, size in enumerate(sizes[:4])}
    for name, channels in (("logits", 3), ("deltas", 12)):
        shapes |= {f"{name}.{level}": (channels, *size) for level, size in enumerate(sizes)}
    return shapes


def run_part(model: Any, part: str, x: Any) -> list[Any]:
    """Return the outputs of a Paddle network or a PyTorch reference, or of a part, whose attributes are the same."""
    if not part:
        outputs = model(x)
        return list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    if part == BOX_HEAD:
        return list(model.roi_head.bbox_head(x))
    if part == MASK_HEAD:
        return [model.roi_head.mask_head(x)]
    maps = model.neck(model.backbone(x))
    logits, deltas = model.rpn_head(maps)
    return [*(one.moveaxis(1, 3) for one in maps[:4]), *logits, *deltas]


def detector_layers(model: Any, spec: ModelSpec) -> dict[str, Any]:
    """Return the layers of a Paddle network or a PyTorch reference between which boxes are selected, by name.

    There are none in a network that is not a detector.
    """
    if spec.task != "detection":
        return {}
    layers = {"neck": model.neck, "rpn_head": model.rpn_head, BOX_HEAD: model.roi_head.bbox_head}
    return layers | ({MASK_HEAD: model.roi_head.mask_head} if spec.options.masks else {})


def checked(name: str, single: Callable[[Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """Return a hook for the layer of this name that converts its outputs with `single`, and checks the heads'.

    Boxes are selected in float32 also if the layers compute in half precision.

    Raises:
        NumbersDisagree: The hook found an output that is not finite.
    """

    def hook(_layer: Any, _inputs: Any, outputs: Any) -> Any:
        if isinstance(outputs, list | tuple):
            return type(outputs)(hook(None, None, output) for output in outputs)
        if name != "neck":
            require_finite(bool(outputs.isfinite().all()), name)
        return single(outputs)

    return hook


def require_finite(finite: bool, name: str) -> None:
    """Raise `NumbersDisagree` if outputs are not finite. NaN would silently mean that there are no objects."""
    if not finite:
        raise NumbersDisagree(
            f"{name}: the outputs are not finite; the weights are damaged or too large, or the images are not finite"
        )


def detect_with_parts(
    networks: Mapping[str, Network],
    options: MaskRCNNOptions,
    images: np.ndarray,
    image_sizes: np.ndarray,
    scale_factors: np.ndarray | None = None,
) -> list[Detections]:
    """Return the detections in each image.

    Args:
        networks: Function of each part, from its input to the list of its outputs.
        options: Options of the detector.
        images: Normalized images (B, 3, H, W), padded with zeros on the right and at the bottom.
        image_sizes: Height and width of each image without its padding, (B, 2).
        scale_factors: New over old width, height, width and height of each image, (B, 4). The boxes are then in pixels
            of the original images, otherwise in pixels of the input.

    Raises:
        NumbersDisagree: An output is not finite.
    """
    outputs = networks[TRUNK](images)
    maps, logits, deltas = outputs[:4], outputs[4:9], outputs[9:]
    require_finite(all(np.isfinite(output).all() for output in (*logits, *deltas)), TRUNK)
    sizes = [(one.shape[1], one.shape[2]) for one in maps]

    def head(part: str, rois: np.ndarray) -> list[np.ndarray]:
        windows = roi_windows(rois, sizes, BINS[part], options.finest_scale, maps[0].dtype)
        outputs = networks[part](roi_align(maps, windows, BINS[part]))
        require_finite(all(np.isfinite(output).all() for output in outputs), part)
        return outputs

    def box_head(rois: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, deltas = head(BOX_HEAD, rois)
        return logits, deltas

    def mask_head(rois: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return head(MASK_HEAD, rois)[0][np.arange(len(labels)), labels]

    proposals = propose(options, logits, deltas, image_sizes)
    return detect(options, proposals, box_head, mask_head, image_sizes, scale_factors)
