"""Build networks in Paddle, fresh or with the weights of a file; strictly, with a warning where something is fresh."""

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fcvit.data.classes import Classes
from fcvit.errors import DoesNotFit, FreshWeights
from fcvit.frameworks import import_framework
from fcvit.models.spec import ModelSpec, is_counter, paddle_name, tensor_specs
from fcvit.models.variants import IMAGENET_CLASSES, Preprocessing, Variant, get_variant
from fcvit.weights.checkpoint import MEMORY, Checkpoint
from fcvit.weights.reading import Weights, paddle_tensors, read_weights

if TYPE_CHECKING:
    from paddle import Tensor, nn

    from fcvit.models.backbone import FCViTBackbone
    from fcvit.models.classifier import FCViT


def _classifier(spec: ModelSpec) -> "nn.Layer":
    from fcvit.models.classifier import FCViT

    return FCViT(spec.variant, spec.num_classes)


def _backbone(spec: ModelSpec) -> "nn.Layer":
    from fcvit.models.backbone import FCViTBackbone

    return FCViTBackbone(spec.variant)


NETWORKS = {"classifier": _classifier, "backbone": _backbone}
"""Head of a spec -> the network, with fresh weights."""
DENSE_LAYER_SCALE = 1e-6  # where the authors' dense-prediction backbones start it


def create_model(
    variant: str | Variant,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    *,
    ema: bool | None = None,
) -> "FCViT":
    """Build an FCViT classifier in evaluation mode.

    Args:
        variant: a name of `fcvit.VARIANTS`, or a `Variant` of one's own.
        weights: a checkpoint of any format and layout; None: the authors' initialization.
        num_classes: None: the file's, else 1,000; 0: no head, the model gives pooled embeddings;
            another number than the file's asks for a fresh head, which is said with a warning.
        drop_path_rate, drop_rate: 0 <= rate < 1, for training.
        ema: choose the averaged (True) or raw (False) weights of a file that has both.

    Raises:
        UsageError: unknown variant (the nearest is suggested) or option out of range.
        UnreadableFile, DoesNotFit: the file; see `fcvit.weights.reading.read_weights`.
    """
    from fcvit.models.classifier import FCViT

    variant = get_variant(variant)
    if weights is None:
        model = FCViT(variant, IMAGENET_CLASSES if num_classes is None else num_classes, drop_path_rate, drop_rate)
        model.eval()
        return model
    return build_classifier(read_weights(weights, ema, variant), num_classes, drop_path_rate, drop_rate)


def build_classifier(
    weights: Weights, num_classes: int | None = None, drop_path_rate: float = 0.0, drop_rate: float = 0.0
) -> "FCViT":
    """Build the classifier that weights in memory belong to; arguments as in `create_model`.

    Raises:
        DoesNotFit: they are not a classifier's.
    """
    from fcvit.models.classifier import FCViT

    spec = weights.spec
    if spec.head != "classifier":
        raise DoesNotFit(f"{weights.source.path} is {spec}, not a classifier; use fcvit.create_backbone")
    num_classes = spec.num_classes if num_classes is None else num_classes
    model = FCViT(spec.variant, num_classes, drop_path_rate, drop_rate)
    tensors = paddle_tensors(weights)
    if num_classes != spec.num_classes:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    fresh = _set_tensors(model, tensors)
    if fresh:
        _warn(weights, f"the head for {num_classes} classes (the file has {spec.num_classes}) starts", stacklevel=4)
    model.eval()
    return model


def weights_of(
    model: "FCViT",
    *,
    name: str = "model",
    head: str = "classifier",
    preprocessing: Preprocessing | None = None,
    classes: Classes | None = None,
    tensors: "Mapping[str, Tensor] | None" = None,
    updates: int = 0,
) -> Weights:
    """Return the weights of a classifier, for `fcvit.weights.writing.write_weights` or `fcvit.evaluate`.

    Args:
        name: what messages and results call them.
        head: a key of `fcvit.models.spec.HEADS`.
        preprocessing, classes: what a file of them shall say.
        tensors: other numbers under the names of its `state_dict`, such as averaged ones.
        updates: how often BatchNorm's statistics were updated, PyTorch's `num_batches_tracked`.
    """
    spec = ModelSpec(model.variant, model.num_classes, head)
    state = tensors or model.state_dict()
    stored: dict[str, np.ndarray] = {}
    for key, entry in tensor_specs(spec).items():
        if is_counter(key):
            stored[key] = np.array(updates, np.int64)
        else:
            array = state[paddle_name(key)].numpy()
            stored[key] = array.T if entry.transposed_in_paddle else array
    source = Checkpoint(Path(name), MEMORY, {}, None, b"")
    return Weights(spec, stored, source, "paddle", preprocessing, classes, (), ())


def build_network(weights: Weights, dtype: str = "float32") -> "nn.Layer":
    """Build the network that weights belong to, computing in `dtype`."""
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
    """Build the backbone for dense prediction in evaluation mode; its four maps are normalized by `norm0` to `norm6`.

    Args:
        variant: as in `create_model`. A named one starts its layer scale at 1e-6, as the authors'
            dense backbones do; one of one's own as it says.
        weights: the authors' dense checkpoint (a full detector's neck and heads are skipped), or a
            classification checkpoint: then the four norms start fresh, said with a warning.

    Raises:
        As `create_model`.
    """
    from fcvit.models.backbone import FCViTBackbone

    spec = get_variant(variant)
    loaded = read_weights(weights, ema, spec, backbone=True) if weights is not None else None
    if isinstance(variant, str) and spec.layer_scale is not None:
        spec = dataclasses.replace(spec, layer_scale=DENSE_LAYER_SCALE)
    model = FCViTBackbone(spec, drop_path_rate, drop_rate)
    if loaded is not None and _set_tensors(model, paddle_tensors(loaded)):
        _warn(loaded, "the norms of the four stages (norm0, norm2, norm4, norm6) start", stacklevel=3)
    model.eval()
    return model


def _warn(weights: Weights, what: str, stacklevel: int) -> None:
    """Point at the caller of `create_model` or `create_backbone`."""
    message = f"{weights.source.path}: {what} fresh and must be trained"
    warnings.warn(message, FreshWeights, stacklevel=stacklevel)


def _set_tensors(model: "nn.Layer", tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Copy tensors (Paddle's names and layout) into a model; return the names that the model has besides.

    `set_state_dict` only warns where a tensor is missing or ill-shaped, so all is checked first.
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
        warnings.simplefilter("ignore")  # about the fresh ones, which the caller reports
        model.set_state_dict(values)
    return [name for name in state if name not in tensors]
