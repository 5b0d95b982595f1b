"""Create the AdamW optimizer of a recipe, save and restore its state, and keep EMA weights."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fcvit.errors import UnreadableFile
from fcvit.frameworks import import_framework
from fcvit.tasks.recipe import Recipe

import_framework("paddle")

import paddle  # noqa: E402
from paddle import Tensor, nn  # noqa: E402

if TYPE_CHECKING:
    from fcvit.native.optimizer import AdamW


def _component(name: str) -> str:
    """Return the first component of a parameter's name within the network, without a leading `backbone.`."""
    return name.removeprefix("backbone.").partition(".")[0]


def is_head(name: str) -> bool:
    """Return True if a parameter or layer belongs to the head and not to the backbone's stem, stages or norms."""
    return not _component(name).startswith(("patch_embed", "network", "norm"))


def freeze_backbone(model: nn.Layer) -> None:
    """Exclude all parameters of the backbone from training."""
    for name, parameter in model.named_parameters():
        if not is_head(name):
            parameter.stop_gradient = True


def trained_parameters(model: nn.Layer) -> dict[str, Tensor]:
    """Return the trained parameters by name, without frozen parameters and running statistics."""
    return {name: p for name, p in model.named_parameters() if not p.stop_gradient}


def depth_of(name: str, depths: Sequence[int]) -> int:
    """Return the depth of a parameter, as layer-wise learning rate decay counts it.

    The stem has depth 0. Each block adds 1, and a downsampling layer has the depth of the block after it. The depth of
    the final norm and the head is one more than that of the last block.
    """
    component = _component(name)
    if component == "patch_embed":
        return 0
    if component != "network":
        return sum(depths) + 1
    index, block = name.removeprefix("backbone.").split(".")[1:3]
    stage, downsampling = (int(index) + 1) // 2, int(index) % 2
    return sum(depths[:stage]) + 1 + (0 if downsampling else int(block))


def create_optimizer(model: Any, recipe: Recipe, native: bool = False) -> "paddle.optimizer.AdamW | AdamW":
    """Create AdamW for the trained parameters of a model. With `native`, one native operator updates all of them.

    Parameters with fewer than two dimensions have no weight decay, as in timm, which the authors use for
    classification. `decay_all` applies it to all parameters, as in mmsegmentation. `layer_decay` d multiplies the
    learning rate of a parameter at depth i (see `depth_of`) by d ** (L - i), where L is the depth of the head.
    """
    parameters = trained_parameters(model)
    decayed = {p.name for p in parameters.values() if recipe.decay_all or p.ndim >= 2}
    depths = model.variant.depths
    top = depth_of("head", depths)
    for name, parameter in parameters.items():
        parameter.optimize_attr["learning_rate"] = recipe.layer_decay ** (top - depth_of(name, depths))
    trained = list(parameters.values())
    if native:
        from fcvit.native.optimizer import AdamW

        betas = (recipe.beta1, recipe.beta2)
        return AdamW(trained, decayed, recipe.peak_lr, betas, recipe.eps, recipe.weight_decay, recipe.clip_norm)
    return paddle.optimizer.AdamW(
        learning_rate=recipe.peak_lr,
        beta1=recipe.beta1,
        beta2=recipe.beta2,
        epsilon=recipe.eps,
        weight_decay=recipe.weight_decay,
        parameters=trained,
        # Paddle passes `Parameter.name` here, which differs from the name in the model.
        apply_decay_param_fun=lambda name: name in decayed,
        grad_clip=None if recipe.clip_norm is None else nn.ClipGradByGlobalNorm(recipe.clip_norm),
    )


# AdamW's state tensors of a parameter, named as in Paddle's state dict.
_STATE_KINDS = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")


def optimizer_tensors(optimizer: "paddle.optimizer.AdamW | AdamW", model: nn.Layer) -> dict[str, np.ndarray]:
    """Return the optimizer's state by the model's parameter names, such as `moment1/NAME`."""
    state = optimizer.state_dict()
    return {
        f"{kind}/{name}": state[f"{p.name}_{kind}_0"].numpy()
        for name, p in trained_parameters(model).items()
        for kind in _STATE_KINDS
        if f"{p.name}_{kind}_0" in state  # Paddle creates the state in the first step
    }


def restore_optimizer(
    optimizer: "paddle.optimizer.AdamW | AdamW", model: nn.Layer, tensors: Mapping[str, np.ndarray]
) -> None:
    """Invert `optimizer_tensors`.

    Raises:
        UnreadableFile: A tensor is missing or has the wrong shape.
    """
    if not any(name.startswith(_STATE_KINDS) for name in tensors):
        return
    state = {}
    for name, p in trained_parameters(model).items():
        for kind in _STATE_KINDS:
            shape = [1] if kind.endswith("pow_acc") else p.shape
            stored = tensors.get(f"{kind}/{name}")
            if stored is None or list(stored.shape) != shape:
                raise UnreadableFile(f"the state of the optimizer does not match the network at {name} ({kind})")
            state[f"{p.name}_{kind}_0"] = paddle.to_tensor(np.array(stored))
    optimizer.set_state_dict(state)


class EMA:
    """EMA weights, updated by `ema = d * ema + (1 - d) * weights` after each step.

    The decay d is at most (1 + step) / (10 + step), so that the initialization has little influence after a few steps.
    BatchNorm's running statistics are updated at the end of an epoch with the product of its decays, because they
    differ between processes before that.

    Args:
        model: The network.
        decay: Highest decay.
        native: True to update all weights with one native operator.
    """

    def __init__(self, model: nn.Layer, decay: float, native: bool = False):
        self.decay, self.native = decay, native
        self.statistics_decay = 1.0  # product of the decays since the last update of the running statistics
        self.tensors = {name: tensor.clone().detach() for name, tensor in model.state_dict().items()}

    def update(self, model: nn.Layer, step: int) -> None:
        """Update the EMA weights after optimizer step number `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        self.statistics_decay *= decay
        trained = trained_parameters(model)
        if self.native:
            from fcvit.native.optimizer import lerp

            lerp([self.tensors[name] for name in trained], list(trained.values()), 1 - decay)
            return
        with paddle.no_grad():
            for name, parameter in trained.items():
                self.tensors[name].lerp_(parameter, 1 - decay)

    def end_epoch(self, model: nn.Layer) -> None:
        """Update the running statistics. They must be synchronized before (see `Statistics.synchronize`)."""
        with paddle.no_grad():
            for name, tensor in model.state_dict().items():
                if name.endswith(("._mean", "._variance")):
                    self.tensors[name].lerp_(tensor, 1 - self.statistics_decay)
        self.statistics_decay = 1.0
