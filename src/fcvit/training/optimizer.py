"""AdamW as the recipe asks for it, and the EMA weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fcvit.errors import UnreadableFile
from fcvit.frameworks import import_framework
from fcvit.tasks.recipe import Recipe

import_framework("paddle")

import paddle  # noqa: E402
from paddle import Tensor, nn  # noqa: E402


def _part(name: str) -> str:
    """Return the part of the network that a parameter belongs to; a head's network has the backbone in `backbone`."""
    return name.removeprefix("backbone.").partition(".")[0]


def is_head(name: str) -> bool:
    """Return whether a parameter or layer belongs to the head: to no stage, and to no norm of the backbone."""
    return not _part(name).startswith(("patch_embed", "network", "norm"))


def freeze_backbone(model: nn.Layer) -> None:
    """Train only the head from now on."""
    for name, parameter in model.named_parameters():
        if not is_head(name):
            parameter.stop_gradient = True


def trained_parameters(model: nn.Layer) -> dict[str, Tensor]:
    """Return the parameters by name, without running statistics and frozen ones."""
    return {name: p for name, p in model.named_parameters() if not p.stop_gradient}


def depth_of(name: str, depths: Sequence[int]) -> int:
    """Return how far up a parameter is: 0 for the stem, then by block, the downsampling with the block after it.

    The final norm and the head are one above the last block.
    """
    part = _part(name)
    if part == "patch_embed":
        return 0
    if part != "network":
        return sum(depths) + 1
    index, block = name.removeprefix("backbone.").split(".")[1:3]
    stage, downsampling = (int(index) + 1) // 2, int(index) % 2
    return sum(depths[:stage]) + 1 + (0 if downsampling else int(block))


def create_optimizer(model: Any, recipe: Recipe) -> paddle.optimizer.AdamW:
    """AdamW over what is trained; no decay on parameters of fewer than two dimensions (authors: timm's rule).

    With `layer_decay` d, a parameter at depth i (see `depth_of`) of L learns at d ** (L - i) times the rate.
    """
    parameters = trained_parameters(model)
    decayed = {p.name for p in parameters.values() if p.ndim >= 2}
    depths = model.variant.depths
    top = depth_of("head", depths)
    for name, parameter in parameters.items():
        parameter.optimize_attr["learning_rate"] = recipe.layer_decay ** (top - depth_of(name, depths))
    return paddle.optimizer.AdamW(
        learning_rate=recipe.peak_lr,
        beta1=recipe.beta1,
        beta2=recipe.beta2,
        epsilon=recipe.eps,
        weight_decay=recipe.weight_decay,
        parameters=list(parameters.values()),
        # Paddle passes its own name of a parameter.
        apply_decay_param_fun=lambda name: name in decayed,
        grad_clip=None if recipe.clip_norm is None else nn.ClipGradByGlobalNorm(recipe.clip_norm),
    )


# What AdamW keeps of each parameter, by the ends that Paddle gives to the names.
_KEPT = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")


def optimizer_tensors(optimizer: paddle.optimizer.Optimizer, model: nn.Layer) -> dict[str, np.ndarray]:
    """Return the state of an optimizer under the model's names: `moment1/NAME` and so on."""
    state = optimizer.state_dict()
    return {
        f"{kind}/{name}": state[f"{p.name}_{kind}_0"].numpy()
        for name, p in trained_parameters(model).items()
        for kind in _KEPT
        if f"{p.name}_{kind}_0" in state  # there is none before the first step
    }


def restore_optimizer(
    optimizer: paddle.optimizer.Optimizer, model: nn.Layer, tensors: Mapping[str, np.ndarray]
) -> None:
    """Invert `optimizer_tensors`.

    Raises:
        UnreadableFile: one is missing or of another shape.
    """
    if not any(name.startswith(_KEPT) for name in tensors):
        return
    state = {}
    for name, p in trained_parameters(model).items():
        for kind in _KEPT:
            shape = [1] if kind.endswith("pow_acc") else p.shape
            stored = tensors.get(f"{kind}/{name}")
            if stored is None or list(stored.shape) != shape:
                raise UnreadableFile(f"the state of the optimizer does not fit the network at {name} ({kind})")
            state[f"{p.name}_{kind}_0"] = paddle.to_tensor(np.array(stored))
    optimizer.set_state_dict(state)


class EMA:
    """EMA weights: after each step `ema = d * ema + (1 - d) * weights`.

    d is `decay`, in the first steps less, (1 + step) / (10 + step), so that the initialization is soon
    forgotten. BatchNorm's running statistics are averages already and follow after each epoch, at the
    same pace: within an epoch they differ between processes.
    """

    def __init__(self, model: nn.Layer, decay: float):
        self.decay = decay
        self.statistics_decay = 1.0  # product of the decays since the running statistics were last taken
        self.tensors = {name: tensor.clone().detach() for name, tensor in model.state_dict().items()}

    def update(self, model: nn.Layer, step: int) -> None:
        """Follow the weights after optimizer step number `step`, from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        self.statistics_decay *= decay
        with paddle.no_grad():
            for name, parameter in trained_parameters(model).items():
                self.tensors[name].lerp_(parameter, 1 - decay)

    def end_epoch(self, model: nn.Layer) -> None:
        """Take up the running statistics, after processes and parts have agreed on them."""
        with paddle.no_grad():
            for name, tensor in model.state_dict().items():
                if name.endswith(("._mean", "._variance")):
                    self.tensors[name].lerp_(tensor, 1 - self.statistics_decay)
        self.statistics_decay = 1.0
