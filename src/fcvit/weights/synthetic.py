"""Synthetic weights and inputs that are the same everywhere and make every parameter affect the outputs.

Newly initialized weights are a weak test, because a layer scale of 1e-5 hides every block. Synthetic weights are
generated from the tensors' names, so that any framework can rebuild them. The goldens are computed with them.
"""

import math
import zlib
from collections.abc import Mapping

import numpy as np

from fcvit.models.spec import COUNTER, ModelSpec, tensor_specs

NEAR_ZERO_SCALE = 1e-3  # a smaller layer scale hides its block from the logits
_GAINS = {
    "rpn_head.rpn_cls.weight": 2.0,
    "rpn_head.rpn_reg.weight": 0.25,
    "roi_head.bbox_head.fc_cls.weight": 4.0,
    "roi_head.bbox_head.fc_reg.weight": 2.0,
    "roi_head.mask_head.conv_logits.weight": 3.0,
}
"""Factors of a detector's last layers. Without them, almost all scores, boxes and masks would be the same."""


def synthetic_tensors(spec: ModelSpec, salt: str = "") -> dict[str, np.ndarray]:
    """Return every tensor of the network by the authors' name, float32, from a generator seeded with the name."""
    return {name: _tensor(name, entry.shape, salt) for name, entry in tensor_specs(spec).items()}


def has_near_zero_scale(tensors: Mapping[str, np.ndarray]) -> bool:
    """Return whether the layer scales are so small that the blocks hardly affect the outputs."""
    scales = [np.abs(t.astype(np.float64)) for name, t in tensors.items() if "layer_scale" in name]
    return bool(scales) and float(np.median(np.concatenate(scales))) < NEAR_ZERO_SCALE


def synthetic_input(shape: tuple[int, ...], salt: str = "") -> np.ndarray:
    """Return standard normal numbers of the given shape, float32."""
    return _normal(salt + "input", shape).astype(np.float32)


def _normal(seed: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(zlib.crc32(seed.encode()))).standard_normal(shape)


def _tensor(name: str, shape: tuple[int, ...], salt: str) -> np.ndarray:
    last = name.rpartition(".")[2]
    if last == COUNTER:
        return np.array(1, np.int64)
    z = _normal(salt + name, shape)
    if last == "running_mean":
        value = 0.1 * z
    elif last == "running_var":
        value = np.exp(0.2 * z)
    elif last.startswith("layer_scale"):
        value = 0.3 + 0.1 * z
    elif last == "rescale_weight":
        value = 1 + 0.2 * z
    elif last == "rescale_bias":
        value = 0.2 * z
    elif last == "bias":
        value = 0.1 * z
    elif len(shape) == 1:
        value = 1 + 0.1 * z
    else:
        value = z / math.sqrt(math.prod(shape[1:])) * _GAINS.get(name, 1.0)
    return value.astype(np.float32)
