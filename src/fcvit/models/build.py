"""Build Paddle networks, newly initialized or with the weights of a file. Loading is strict."""

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fcvit.data.classes import Classes, Palette
from fcvit.errors import DoesNotFit, FreshWeights, UsageError
from fcvit.frameworks import import_framework
from fcvit.models.spec import (
    HEADS,
    MaskRCNNOptions,
    ModelSpec,
    SemanticFPNOptions,
    is_counter,
    paddle_name,
    tensor_specs,
)
from fcvit.models.variants import IMAGENET_CLASSES, Preprocessing, Variant, get_variant
from fcvit.weights.checkpoint import MEMORY, Checkpoint
from fcvit.weights.reading import CLASSIFIER_ENDS, Weights, paddle_tensors, read_weights

if TYPE_CHECKING:
    from paddle import Tensor, nn

    from fcvit.models.backbone import FCViTBackbone
    from fcvit.models.classifier import FCViT
    from fcvit.models.mask_rcnn.network import MaskRCNN
    from fcvit.models.semantic_fpn import SemanticFPN


def _classifier(spec: ModelSpec) -> "nn.Layer":
    from fcvit.models.classifier import FCViT

    return FCViT(spec.variant, spec.num_classes)


def _backbone(spec: ModelSpec) -> "nn.Layer":
    from fcvit.models.backbone import FCViTBackbone

    return FCViTBackbone(spec.variant)


def _semantic_fpn(spec: ModelSpec) -> "nn.Layer":
    from fcvit.models.semantic_fpn import SemanticFPN

    return SemanticFPN(spec.variant, spec.num_classes, spec.options)


def _mask_rcnn(spec: ModelSpec) -> "nn.Layer":
    from fcvit.models.mask_rcnn.network import MaskRCNN

    return MaskRCNN(spec.variant, spec.num_classes, spec.options)


NETWORKS = {
    "classifier": _classifier,
    "backbone": _backbone,
    "semantic_fpn": _semantic_fpn,
    "mask_rcnn": _mask_rcnn,
}
"""Head of a spec -> function that builds the network with new weights."""
DENSE_LAYER_SCALE = 1e-6  # initial value in the authors' dense-prediction backbones
ADE20K_CLASSES = 150
COCO_CLASSES = 80


def create_model(
    variant: str | Variant,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    *,
    task: str = "classification",
    ema: bool | None = None,
) -> "FCViT | SemanticFPN | MaskRCNN":
    """Build an FCViT classifier, segmentation network or detector in evaluation mode.

    Args:
        variant: A name in `fcvit.VARIANTS`, or your own `Variant`.
        weights: A checkpoint of any format and layout. None initializes the weights like the authors' code.
        num_classes: Number of classes. None uses the file's number, or the number of the authors' data set without a
            file. 0 removes a classifier's head, and the model returns pooled embeddings. If the number differs from the
            file's, the last layers are newly initialized and a warning is issued.
        drop_path_rate: Stochastic depth rate for training, 0 <= rate < 1.
        drop_rate: Dropout rate for training, 0 <= rate < 1.
        task: "classification", "segmentation" for Semantic FPN, or "detection" for Mask R-CNN. With the weights of a
            network for another task, only the backbone is used, and a warning is issued.
        ema: True selects the EMA weights and False the raw weights of a file that contains both.

    Raises:
        UsageError: If the variant or task is unknown (the nearest name is suggested) or an option is out of range.
        UnreadableFile: If the file cannot be read. See `fcvit.weights.reading.read_weights`.
        DoesNotFit: If the weights do not fit the variant.
    """
    from fcvit.models.classifier import FCViT

    if task == "segmentation":
        return create_segmenter(variant, weights, num_classes, drop_path_rate, drop_rate, ema=ema)
    if task == "detection":
        return create_detector(variant, weights, num_classes, drop_path_rate, drop_rate, ema=ema)
    if task != "classification":
        raise UsageError(f"task {task!r}: expected classification, segmentation or detection")
    variant = get_variant(variant)
    if weights is None:
        model = FCViT(variant, IMAGENET_CLASSES if num_classes is None else num_classes, drop_path_rate, drop_rate)
        model.eval()
        return model
    return build_classifier(read_weights(weights, ema, variant), num_classes, drop_path_rate, drop_rate)


def build_classifier(
    weights: Weights, num_classes: int | None = None, drop_path_rate: float = 0.0, drop_rate: float = 0.0
) -> "FCViT":
    """Build a classifier from weights in memory. The arguments are those of `create_model`.

    Raises:
        DoesNotFit: If the weights are not a classifier's.
    """
    from fcvit.models.classifier import FCViT

    spec = weights.spec
    if spec.head != "classifier":
        raise DoesNotFit(f"{weights.source.path}: {spec} is not a classifier; use fcvit.create_backbone")
    num_classes = spec.num_classes if num_classes is None else num_classes
    model = FCViT(spec.variant, num_classes, drop_path_rate, drop_rate)
    tensors = paddle_tensors(weights)
    if num_classes != spec.num_classes:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    fresh = _set_tensors(model, tensors)
    if fresh:
        _warn(weights, f"the head for {num_classes} classes (the file has {spec.num_classes}) is", stacklevel=4)
    model.eval()
    return model


def weights_of(
    model: "FCViT | SemanticFPN | MaskRCNN",
    *,
    name: str = "model",
    head: str = "classifier",
    preprocessing: Preprocessing | None = None,
    classes: Classes | None = None,
    palette: Palette | None = None,
    tensors: "Mapping[str, Tensor] | None" = None,
    updates: int = 0,
) -> Weights:
    """Return the weights of a network, for `fcvit.weights.writing.write_weights` or `fcvit.evaluate`.

    Args:
        model: The network.
        name: Name of the weights in messages and results.
        head: The network's head, a key of `fcvit.models.spec.HEADS`.
        preprocessing: Preprocessing to store in a file.
        classes: Class list to store in a file.
        palette: Color of each class to store in a file.
        tensors: Tensors to use instead of the model's `state_dict`, under the same names, such as EMA weights.
        updates: Number of updates of the BatchNorm statistics, which is PyTorch's `num_batches_tracked`.
    """
    spec = ModelSpec(model.variant, model.num_classes, head, getattr(model, "options", None))
    state = tensors or model.state_dict()
    stored: dict[str, np.ndarray] = {}
    for key, entry in tensor_specs(spec).items():
        if is_counter(key):
            stored[key] = np.array(updates, np.int64)
        else:
            array = state[paddle_name(key)].numpy()
            stored[key] = array.T if entry.transposed_in_paddle else array
    source = Checkpoint(Path(name), MEMORY, {}, None, b"")
    return Weights(spec, stored, source, "paddle", preprocessing, classes, (), (), palette)


def build_network(weights: Weights, dtype: str = "float32") -> "nn.Layer":
    """Build the network of the given weights, with parameters of type `dtype`."""
    spec = weights.spec
    model = NETWORKS[spec.head](spec)
    model.to(dtype=getattr(import_framework("paddle"), dtype))
    fresh = _set_tensors(model, paddle_tensors(weights))
    assert not fresh, fresh
    model.eval()
    return model


def create_backbone(
    variant: str | Variant,
    weights: str | os.PathLike[str] | None = None,
    *,
    ema: bool | None = None,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
) -> "FCViTBackbone":
    """Build the backbone for dense prediction in evaluation mode. `norm0` to `norm6` normalize its four feature maps.

    Args:
        variant: A name in `fcvit.VARIANTS`, or your own `Variant`. The layer scale of a named variant starts at
            1e-6, as in the authors' dense-prediction backbones. The layer scale of a `Variant` is not changed.
        weights: The authors' dense-prediction checkpoint, or a classification checkpoint. The neck and heads of a
            detector are skipped. With a classification checkpoint, the four norms are newly initialized and a warning
            is issued.
        ema: True selects the EMA weights and False the raw weights of a file that contains both.
        drop_path_rate: Stochastic depth rate for training, 0 <= rate < 1.
        drop_rate: Dropout rate for training, 0 <= rate < 1.

    Raises:
        UsageError, UnreadableFile, DoesNotFit: See `create_model`.
    """
    from fcvit.models.backbone import FCViTBackbone

    loaded = read_weights(weights, ema, get_variant(variant), backbone=True) if weights is not None else None
    model = FCViTBackbone(_dense_variant(variant), drop_path_rate, drop_rate)
    if loaded is not None and _set_tensors(model, paddle_tensors(loaded)):
        _warn(loaded, "the norms of the four stages (norm0, norm2, norm4, norm6) are", stacklevel=3)
    model.eval()
    return model


def create_segmenter(
    variant: str | Variant,
    weights: str | os.PathLike[str] | None,
    num_classes: int | None,
    drop_path_rate: float,
    drop_rate: float,
    options: SemanticFPNOptions | None = None,
    *,
    ema: bool | None = None,
) -> "SemanticFPN":
    """Build a Semantic FPN in evaluation mode. See `create_model`."""
    loaded = read_weights(weights, ema, get_variant(variant)) if weights is not None else None
    dense, rates = _dense_variant(variant), (drop_path_rate, drop_rate)
    model, new = build_segmenter(dense, loaded, num_classes, *rates, options=options)
    if loaded is not None and new:
        _warn(loaded, f"{new} are", stacklevel=4)
    return model


def build_segmenter(
    variant: Variant,
    weights: Weights | None,
    num_classes: int | None = None,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    head_dropout: float = 0.1,
    *,
    options: SemanticFPNOptions | None = None,
    new_head: bool = False,
) -> "tuple[SemanticFPN, str]":
    """Build a Semantic FPN in evaluation mode, from weights in memory or newly initialized.

    Args:
        variant: Architecture of the backbone.
        weights: Weights of a Semantic FPN, a classifier or a backbone, or None.
        num_classes: Number of classes. None uses that of the weights, or 150.
        drop_path_rate, drop_rate: See `create_model`.
        head_dropout: See `SemanticFPN`.
        options: Widths of the network and size of its input. The weights of a Semantic FPN determine the widths.
        new_head: Whether to initialize the last layer, also for the same number of classes.

    Returns:
        The network, and a readable list of the parts that the weights do not contain, or an empty string.
    """
    from fcvit.models.semantic_fpn import SemanticFPN

    classes = ADE20K_CLASSES
    if weights is not None and weights.spec.head == "semantic_fpn":
        known, classes = weights.spec.options, weights.spec.num_classes
        options = dataclasses.replace(options or known, neck=known.neck, channels=known.channels)
    classes = classes if num_classes is None else num_classes
    model = SemanticFPN(variant, classes, options, drop_path_rate, drop_rate, head_dropout)
    return model, _load_dense(model, weights, "semantic_fpn", "decode_head", ("decode_head.conv_seg.",), new_head)


def create_detector(
    variant: str | Variant,
    weights: str | os.PathLike[str] | None,
    num_classes: int | None,
    drop_path_rate: float,
    drop_rate: float,
    options: MaskRCNNOptions | None = None,
    *,
    ema: bool | None = None,
) -> "MaskRCNN":
    """Build a Mask R-CNN in evaluation mode. See `create_model`."""
    loaded = read_weights(weights, ema, get_variant(variant)) if weights is not None else None
    dense, rates = _dense_variant(variant), (drop_path_rate, drop_rate)
    model, new = build_detector(dense, loaded, num_classes, *rates, options=options)
    if loaded is not None and new:
        _warn(loaded, f"{new} are", stacklevel=4)
    return model


def build_detector(
    variant: Variant,
    weights: Weights | None,
    num_classes: int | None = None,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    *,
    options: MaskRCNNOptions | None = None,
    new_head: bool = False,
) -> "tuple[MaskRCNN, str]":
    """Build a Mask R-CNN in evaluation mode, from weights in memory or newly initialized.

    Args:
        variant: Architecture of the backbone.
        weights: Weights of any FCViT, or None. Of a network for another task, only the backbone is used.
        num_classes: Number of classes. None uses that of the weights of a Mask R-CNN, or 80.
        drop_path_rate, drop_rate: See `create_model`.
        options: Widths and limits. The weights of a Mask R-CNN determine the widths.
        new_head: Whether to initialize the last layers, also for the same number of classes.

    Returns:
        The network, and a readable list of the parts that the weights do not contain, or an empty string.
    """
    from fcvit.models.mask_rcnn.network import MaskRCNN

    classes = COCO_CLASSES
    if weights is not None and weights.spec.head == "mask_rcnn":
        known, classes = weights.spec.options, weights.spec.num_classes
        widths = {"neck": known.neck, "rpn": known.rpn, "box_channels": known.box_channels}
        if known.masks:
            widths["mask_channels"] = known.mask_channels
        options = dataclasses.replace(options or known, **widths)
    classes = classes if num_classes is None else num_classes
    if classes < 1:
        raise UsageError(f"num_classes = {classes}: expected at least 1 for detection")
    model = MaskRCNN(variant, classes, options, drop_path_rate, drop_rate)
    last = ("roi_head.bbox_head.fc_cls.", "roi_head.bbox_head.fc_reg.", "roi_head.mask_head.conv_logits.")
    return model, _load_dense(model, weights, "mask_rcnn", "heads", last, new_head)


def _load_dense(
    model: "SemanticFPN | MaskRCNN",
    weights: Weights | None,
    head: str,
    parts: str,
    last: tuple[str, ...],
    new_head: bool,
) -> str:
    """Copy the tensors that fit into a dense-prediction network in evaluation mode.

    Args:
        model: The network.
        weights: Weights of any FCViT, or None. Of a network with another head, only the backbone is used.
        head: Head of the network, a key of `HEADS`.
        parts: Readable name of the parts behind the neck.
        last: Beginnings of the names of the last layers, whose shapes depend on the number of classes.
        new_head: Whether to leave out the last layers, also for the same number of classes.

    Returns:
        A readable list of the parts that the weights do not contain, or an empty string.
    """
    model.eval()
    if weights is None:
        return f"neck, {parts} and the four norms"
    tensors, wanted = paddle_tensors(weights), model.state_dict()
    if weights.spec.head != head:
        prefix = HEADS[weights.spec.head].prefix
        tensors = {
            f"backbone.{name.removeprefix(prefix)}": tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix) and not name.startswith(CLASSIFIER_ENDS)
        }
        _set_tensors(model, tensors)
        has_norms = "backbone.norm0.weight" in tensors
        return f"neck and {parts}" if has_norms else f"neck, {parts} and the four norms"
    new, known = [], weights.spec.num_classes
    if new_head or model.num_classes != known:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(last)}
        new.append(
            f"the last {'layer' if len(last) == 1 else 'layers'} for {model.num_classes} classes (the file has {known})"
        )
    missing = _set_tensors(model, {name: tensor for name, tensor in tensors.items() if name in wanted})
    if any(not name.startswith(last) for name in missing):
        new.append("the mask head")
    return " and ".join(new)


def _dense_variant(variant: str | Variant) -> Variant:
    """Return the variant, and for a named one the layer scale of the authors' dense-prediction backbones."""
    spec = get_variant(variant)
    if isinstance(variant, str) and spec.layer_scale is not None:
        return dataclasses.replace(spec, layer_scale=DENSE_LAYER_SCALE)
    return spec


def _warn(weights: Weights, subject: str, stacklevel: int) -> None:
    """Warn about new weights, at the line that called `create_model` or `create_backbone`."""
    message = f"{weights.source.path}: {subject} newly initialized and must be trained"
    warnings.warn(message, FreshWeights, stacklevel=stacklevel)


def _set_tensors(model: "nn.Layer", tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Copy tensors with Paddle's names and layout into a model. Return the names in the model that were not set.

    All names and shapes are checked first, because `set_state_dict` only warns if a tensor is missing or misshapen.
    """
    paddle = import_framework("paddle")
    state = model.state_dict()
    assert not set(tensors) - set(state), sorted(set(tensors) - set(state))
    for name, tensor in tensors.items():
        assert tuple(state[name].shape) == tensor.shape, name
    values = {}
    for name, tensor in tensors.items():
        dtype = str(state[name].dtype).rpartition(".")[2]
        values[name] = paddle.to_tensor(np.ascontiguousarray(tensor, dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about new weights, which the caller reports
        model.set_state_dict(values)
    return [name for name in state if name not in tensors]
