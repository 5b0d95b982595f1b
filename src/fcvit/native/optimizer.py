"""Update all parameters with one call: AdamW, and the EMA weights."""

import ctypes
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from fcvit.frameworks import import_framework
from fcvit.native.kernels import call

import_framework("paddle")

import paddle  # noqa: E402
from paddle import Tensor  # noqa: E402


class AdamW:
    """AdamW for parameters on the CPU. Equal to `paddle.optimizer.AdamW` up to rounding, with the same state.

    The learning rate of a parameter is multiplied by its `optimize_attr["learning_rate"]`. A parameter without a
    gradient does not change.

    Args:
        parameters: The parameters, all float32 or all float64.
        decayed: Names of the parameters that have weight decay (`Parameter.name`).
        rate: Learning rate of the first step.
        betas: Decay rates of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Weight decay.
        clip_norm: Highest norm of all gradients together, or None.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        decayed: Collection[str],
        rate: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        clip_norm: float | None,
    ):
        self.parameters, self.rate = parameters, rate
        self.options = np.array([*betas, eps, clip_norm or 0.0])
        self.moments = [[paddle.zeros(p.shape, p.dtype) for p in parameters] for _ in betas]
        self.powers = np.tile(betas, (len(parameters), 1))  # beta ** t of the next step, t, of each parameter
        self.factors = np.array([p.optimize_attr["learning_rate"] for p in parameters], np.float64)
        self.decays = np.array([weight_decay * (p.name in decayed) for p in parameters])

    def set_lr(self, rate: float) -> None:
        self.rate = rate

    def step(self) -> None:
        """Update the parameters, moments and powers."""
        gradients = [p.grad for p in self.parameters]
        gradients = [g if g is None or g.is_contiguous() else g.contiguous() for g in gradients]
        numbers = np.column_stack((self.rate * self.factors, self.decays, 1 - self.powers))
        _update("adamw", (self.parameters, gradients, *self.moments), (self.options, numbers.ravel()))
        self.powers[[g is not None for g in gradients]] *= self.options[:2]

    def clear_grad(self, set_to_zero: bool = True) -> None:
        for p in self.parameters:
            p.clear_gradient(set_to_zero)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state with the names of Paddle's state dict."""
        state = {}
        for i, p in enumerate(self.parameters):
            for k in (0, 1):
                state[f"{p.name}_moment{k + 1}_0"] = self.moments[k][i]
                state[f"{p.name}_beta{k + 1}_pow_acc_0"] = paddle.to_tensor(self.powers[i, k : k + 1])
        return state

    def set_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state_dict`, or the state of Paddle's optimizer."""
        for i, p in enumerate(self.parameters):
            for k in (0, 1):
                self.moments[k][i].set_value(state[f"{p.name}_moment{k + 1}_0"])
                self.powers[i, k] = state[f"{p.name}_beta{k + 1}_pow_acc_0"].item()


def lerp(tensors: Sequence[Tensor], targets: Sequence[Tensor], share: float) -> None:
    """Move each tensor by `share` of the distance to its target, in place."""
    _update("lerp", (tensors, targets), ([share],))


def _update(name: str, tensors: Sequence[Sequence[Tensor | None]], options: Sequence[Any]) -> None:
    """Call an operator of `optimizer.cc`. The tensors of the first sequence must have the same data type."""
    first: Any = tensors[0]
    addresses = [[0 if t is None else t.data_ptr() for t in column] for column in tensors]
    pointers = np.array(addresses, np.int64).T.ravel()
    sizes = np.array([len(first), *(math.prod(tensor.shape) for tensor in first)])
    numbers = np.concatenate(options)
    call(name, first[0].dtype, *(ctypes.c_void_p(array.ctypes.data) for array in (pointers, sizes, numbers)))
