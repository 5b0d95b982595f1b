"""AdamW on a CPU, in all threads: Paddle's own takes a third of an accelerated training step of a small network."""

from typing import Any

from fcvit.frameworks import import_framework
from fcvit.native.operators import SUFFIXES, adamw

paddle = import_framework("paddle")


class AdamW(paddle.optimizer.AdamW):
    """`paddle.optimizer.AdamW`: its arguments, its state, to rounding its numbers.

    Parameters the operator does not know (other types, another device, AMSGrad, master weights) are left to Paddle.
    """

    def _append_optimize_op(self, block: Any, param_and_grad: Any) -> None:
        if isinstance(param_and_grad, dict):
            param_and_grad = self._update_param_group(param_and_grad)
        parameter, gradient = param_and_grad
        names = (self._moment1_acc_str, self._moment2_acc_str, self._beta1_pow_acc_str, self._beta2_pow_acc_str)
        moments = [self._get_accumulator_master(name, parameter) for name in names]
        tensors = (parameter, gradient if gradient.is_contiguous() else gradient.contiguous(), *moments)
        if (
            self._amsgrad
            or not paddle.in_dynamic_mode()
            or parameter.dtype not in SUFFIXES
            or any(tensor.dtype != parameter.dtype or not tensor.place.is_cpu_place() for tensor in tensors)
            or not parameter.is_contiguous()
        ):
            return super()._append_optimize_op(block, param_and_grad)
        rate = self._create_param_lr(param_and_grad).item()
        decays = self._apply_decay_param_fun is None or self._apply_decay_param_fun(parameter.name)
        ratio = 1.0 if self._lr_ratio is None else self._lr_ratio(parameter)
        adamw(tensors, rate * ratio, self._beta1, self._beta2, self._epsilon, self._weight_decay if decays else 0.0)
        return None
