"""BatchNorm's running statistics where a step has several micro-batches.

The micro-batches of a step, one after the other in a process or side by side in several, each normalize by
their own images and each keep running statistics of their own, which are averaged after each epoch. This is
what the authors' training does over processes (timm's `distribute_bn`, "reduce"). Since accumulated
micro-batches do the same, how a step is divided among processes does not change what is computed.
"""

from fcvit.frameworks import import_framework

import_framework("paddle")

import paddle  # noqa: E402
from paddle import Tensor, nn  # noqa: E402


def running_statistics(model: nn.Layer) -> list[Tensor]:
    """Means and variances of all BatchNorm layers, in the model's order; Paddle keeps them as parameters."""
    return [t for name, t in model.named_parameters() if name.endswith(("._mean", "._variance"))]


class Statistics:
    """Keep the running statistics of this process's micro-batches of a step.

    Call `use(number)` before a micro-batch goes through the model in training mode, `synchronize()` after an epoch.
    """

    def __init__(self, model: nn.Layer, micro_batches: int, processes: int):
        self.processes = processes
        self.live = running_statistics(model)
        self.stored = [[t.clone() for t in self.live] for _ in range(micro_batches)]
        self.current = 0

    def use(self, number: int) -> None:
        """Let the model update the statistics of this micro-batch from now on."""
        if number == self.current:
            return
        self._store()
        for stored, tensor in zip(self.stored[number], self.live, strict=True):
            tensor.set_value(stored)
        self.current = number

    def synchronize(self) -> None:
        """Give all micro-batches, in all processes, the mean of all."""
        self._store()
        count = len(self.stored) * self.processes
        for position, tensor in enumerate(self.live):
            own = [one[position] for one in self.stored]
            total = paddle.add_n(own) if len(own) > 1 else tensor.clone()
            if self.processes > 1:
                paddle.distributed.all_reduce(total)
            tensor.set_value(total / count)
            for stored in own:
                stored.set_value(tensor)

    def _store(self) -> None:
        for stored, tensor in zip(self.stored[self.current], self.live, strict=True):
            stored.set_value(tensor)
