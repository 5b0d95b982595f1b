"""Run a Paddle or PyTorch network and record the outputs of its layers, by the names that both networks share."""

import contextlib
import re
from collections.abc import Iterator, Mapping

import numpy as np

from fcvit.frameworks import import_framework, on_paddle_device
from fcvit.weights.reading import Weights

# Stem, stages and downsampling (`network.I`), blocks (`network.I.J`), norms of the outputs, neck and head.
_TRACED = re.compile(
    r"(backbone\.)?(patch_embed|network\.[0-9]+(\.[0-9]+)?|norm[0246]?)"
    r"|neck\.(lateral|fpn)_convs\.[0-9]|decode_head(\.scale_heads\.[0-9])?"
)


def trace_paddle(weights: Weights, images: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Return the outputs of the Paddle network's layers by name, in forward order.

    The layers are the stem, blocks, stages, norms and outputs.
    """
    paddle = import_framework("paddle")
    from fcvit.models.build import build_network

    values: dict[str, np.ndarray] = {}
    with on_paddle_device("cpu"):
        model = build_network(weights, dtype)
        with _hooks(dict(model.named_sublayers()), "register_forward_post_hook", values), paddle.no_grad():
            output = model(paddle.to_tensor(images.astype(dtype)))
        return _with_outputs(values, output)


def trace_torch(weights: Weights, images: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Return the outputs of the PyTorch reference's layers, like `trace_paddle`."""
    torch = import_framework("torch")
    from fcvit.reference.build import build_reference

    model = build_reference(weights.spec, weights.tensors, getattr(torch, dtype))
    values: dict[str, np.ndarray] = {}
    with _hooks(dict(model.named_modules()), "register_forward_hook", values), torch.inference_mode():
        output = model(torch.from_numpy(images.astype(dtype)))
    return _with_outputs(values, output)


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


def _with_outputs(values: dict[str, np.ndarray], output) -> dict[str, np.ndarray]:  # noqa: ANN001
    outputs = output if isinstance(output, list | tuple) else [output]
    return values | {f"output{index if len(outputs) > 1 else ''}": value.numpy() for index, value in enumerate(outputs)}
