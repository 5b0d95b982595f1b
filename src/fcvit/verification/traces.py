"""Run a Paddle or PyTorch network and record the outputs of its layers, by the names that both networks share."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fcvit.frameworks import import_framework, on_paddle_device
from fcvit.models.spec import ModelSpec
from fcvit.verification.objects import Objects
from fcvit.weights.reading import Weights

# Stem, stages and downsampling (`network.I`), blocks (`network.I.J`), norms of the outputs, neck and head.
_TRACED = re.compile(
    r"(backbone\.)?(patch_embed|network\.[0-9]+(\.[0-9]+)?|norm[0246]?)"
    r"|neck\.(lateral|fpn)_convs\.[0-9]|decode_head(\.scale_heads\.[0-9])?"
)


class Trace(dict[str, np.ndarray]):
    """The outputs of a network's layers by name, in forward order.

    Attributes:
        outputs: Names of the outputs of the network, or of its stages if it is a detector.
        objects: Proposals and detections of each image, if it is a detector.
        margins: Margins of a detector's decisions (see `fcvit.verification.objects`). Only the reference records them.
    """

    def __init__(self, layers: Mapping[str, np.ndarray]):
        super().__init__(layers)
        self.outputs: list[str] = []
        self.objects: dict[str, list[Objects]] = {}
        self.margins: dict[str, float] = {}


def trace_paddle(weights: Weights, images: np.ndarray, dtype: str) -> Trace:
    """Return the outputs of the Paddle network's layers by name, in forward order.

    The layers are the stem, blocks, stages, norms and outputs. A detector's stages get the same RoIs in every run.
    """
    paddle = import_framework("paddle")
    from fcvit.models.build import build_network

    values: dict[str, np.ndarray] = {}
    with on_paddle_device("cpu"):
        model = build_network(weights, dtype)
        with _hooks(dict(model.named_sublayers()), "register_forward_post_hook", values), paddle.no_grad():
            return _run(model, weights.spec, paddle.to_tensor(images.astype(dtype)), values)


def trace_torch(weights: Weights, images: np.ndarray, dtype: str) -> Trace:
    """Return the outputs of the PyTorch reference's layers, like `trace_paddle`."""
    torch = import_framework("torch")
    from fcvit.reference.build import build_reference

    model = build_reference(weights.spec, weights.tensors, getattr(torch, dtype))
    values: dict[str, np.ndarray] = {}
    margins = {"margins": {}} if weights.spec.task == "detection" else {}
    with _hooks(dict(model.named_modules()), "register_forward_hook", values), torch.inference_mode():
        trace = _run(model, weights.spec, torch.from_numpy(images.astype(dtype)), values, **margins)
    trace.margins = margins.get("margins", {})
    return trace


@contextlib.contextmanager
def _hooks(layers: Mapping[str, object], register: str, values: dict[str, np.ndarray]) -> Iterator[None]:
    def record(name: str):  # noqa: ANN202 -- a hook for either framework
        def hook(_layer, _inputs, output) -> None:  # noqa: ANN001
            values[name] = output.numpy()

        return hook

    handles = [getattr(layer, register)(record(name)) for name, layer in layers.items() if _TRACED.fullmatch(name)]
    yield
    for handle in handles:
        handle.remove()  # type: ignore[attr-defined]


def _run(model: Any, spec: ModelSpec, x: Any, layers: dict[str, np.ndarray], **margins: Any) -> Trace:
    """Run the network on a tensor. Its hooks record the outputs of the layers in `layers`."""
    if spec.task == "detection":
        return _run_detector(model, x, layers, **margins)
    output = model(x)
    outputs = output if isinstance(output, list | tuple) else [output]
    named = {f"output{index if len(outputs) > 1 else ''}": value.numpy() for index, value in enumerate(outputs)}
    trace = Trace(layers | named)
    trace.outputs = list(named)
    return trace


def _run_detector(model: Any, x: Any, layers: dict[str, np.ndarray], **margins: Any) -> Trace:
    """Run the stages of a detector, those after the proposals with given RoIs, and then the whole.

    `margins` is passed to the methods of the reference, which record the margins of their decisions in it.
    """
    shape = tuple(x.shape)
    maps = model.neck(model.backbone(x))
    scores, deltas = model.rpn_head(maps)
    head, rois = model.roi_head, given_rois(shape)
    features = head.box_features(maps, rois)
    stages = {f"neck.{level}": one for level, one in enumerate(maps)}
    stages |= {f"rpn_head.rpn_cls.{level}": one for level, one in enumerate(scores)}
    stages |= {f"rpn_head.rpn_reg.{level}": one for level, one in enumerate(deltas)}
    stages["roi_head.box_features"] = features
    stages["roi_head.bbox_head.fc_cls"], stages["roi_head.bbox_head.fc_reg"] = head.bbox_head(features)
    if model.options.masks:
        stages["roi_head.mask_features"] = head.mask_features(maps, rois)
        stages["roi_head.mask_head"] = head.mask_head(stages["roi_head.mask_features"])
    sizes, scales = given_sizes(shape)
    proposals = model.propose(scores, deltas, sizes, **margins)
    detections = model.detect(maps, proposals, sizes, scales, **margins)
    trace = Trace(layers | {name: value.numpy() for name, value in stages.items()})
    norms = [name for name in layers if name.startswith("backbone.norm")]
    trace.outputs = [*norms, *stages]
    trace.objects = {
        "proposals": [Objects(rows[:, :4], rows[:, 4]) for rows in map(np.asarray, proposals)],
        "detections": [Objects.of(one) for one in detections],
    }
    return trace


def given_rois(shape: tuple[int, ...], count: int = 24) -> np.ndarray:
    """Return RoIs (4 * count, 5) for images of the given shape: `count` for each level, in turn for each image.

    RoIs may be larger than the image, and the last one is empty.
    """
    generator = np.random.default_rng(0)
    area = 112.0 * 2 ** (np.arange(4 * count) // count - generator.uniform(0.05, 0.95, 4 * count))
    ratio = np.exp(generator.uniform(-1, 1, 4 * count))
    size = np.stack([area * ratio, area / ratio], 1)
    size[-1, 1] = 0
    center = generator.uniform(0, 1, (4 * count, 2)) * shape[:1:-1]
    image = np.arange(4 * count)[:, None] % shape[0]
    return np.concatenate([image, center - size / 2, center + size / 2], 1).astype(np.float32)


def given_sizes(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sizes (B, 2) and scale factors (B, 4) of the images in a batch of the given shape."""
    index = np.arange(shape[0])[:, None]
    sizes = np.array(shape[2:]) - index * (8, 24)
    return sizes, np.float32(1.25) - np.tile(0.25 * index + (0, 0.05), 2).astype(np.float32)
