"""Build the PyTorch reference with the weights of a file."""

from collections.abc import Mapping

import numpy as np

from fcvit.frameworks import import_framework
from fcvit.models.spec import ModelSpec, is_counter
from fcvit.reference.backbone import FCViTBackbone
from fcvit.reference.classifier import FCViT
from fcvit.reference.mask_rcnn import MaskRCNN
from fcvit.reference.semantic_fpn import SemanticFPN

import_framework("torch")  # reports how to install it if it is missing

import torch  # noqa: E402
from torch import nn  # noqa: E402

NETWORKS = {
    "classifier": lambda spec: FCViT(spec.variant, spec.num_classes),
    "backbone": lambda spec: FCViTBackbone(spec.variant),
    "semantic_fpn": SemanticFPN,
    "mask_rcnn": MaskRCNN,
}
"""Head of a spec -> function that builds the network with new weights."""


def build_reference(
    spec: ModelSpec, tensors: Mapping[str, np.ndarray], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Build the reference network in evaluation mode with the given weights (authors' names, PyTorch's layout).

    Floating-point tensors are cast to `dtype`. Names and shapes must match strictly.
    """
    model = NETWORKS[spec.head](spec)
    state = {}
    for name, tensor in tensors.items():
        # Float64 represents all stored types exactly, including bfloat16, which PyTorch cannot read from NumPy.
        exact = np.array(tensor, np.int64 if is_counter(name) else np.float64)
        state[name] = torch.from_numpy(exact) if is_counter(name) else torch.from_numpy(exact).to(dtype)
    model.to(dtype).load_state_dict(state, strict=True)
    return model.eval()
