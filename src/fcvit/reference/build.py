"""Build the PyTorch reference with the weights of a file."""

from collections.abc import Mapping

import numpy as np

from fcvit.frameworks import import_framework
from fcvit.models.spec import ModelSpec, is_counter
from fcvit.reference.backbone import FCViTBackbone
from fcvit.reference.classifier import FCViT

import_framework("torch")  # or the remedy where it is missing

import torch  # noqa: E402
from torch import nn  # noqa: E402

NETWORKS = {
    "classifier": lambda spec: FCViT(spec.variant, spec.num_classes),
    "backbone": lambda spec: FCViTBackbone(spec.variant),
}
"""Head of a spec -> the network, with fresh weights."""


def build_reference(
    spec: ModelSpec, tensors: Mapping[str, np.ndarray], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Build the reference network with these weights (authors' names, PyTorch's layout), in evaluation mode.

    Floating-point tensors are cast to `dtype`; names and shapes must match strictly.
    """
    model = NETWORKS[spec.head](spec)
    state = {}
    for name, tensor in tensors.items():
        # Float64 holds every stored type exactly, bfloat16 (which PyTorch does not take from NumPy) included.
        exact = np.array(tensor, np.int64 if is_counter(name) else np.float64)
        state[name] = torch.from_numpy(exact) if is_counter(name) else torch.from_numpy(exact).to(dtype)
    model.to(dtype).load_state_dict(state, strict=True)
    return model.eval()
