"""BatchNorm's running statistics where a step has several parts.

The parts of a step, one after the other in a process or side by side in several, each normalize by their
own images and each keep running statistics of their own, which are averaged after each epoch. This is
what the authors' training does over processes (timm's `distribute_bn`, "reduce"). Since accumulated
parts do the same, how a step is divided among processes does not change what is computed.
"""

from fcvit.frameworks import import_framework

import_framework("paddle")

import paddle  # noqa: E402
from paddle import Tensor, nn  # noqa: E402


def running_statistics(model: nn.Layer) -> list[Tensor]:
    """Means and variances of all BatchNorm layers, in the model's order; Paddle keeps them as parameters."""
    return [t for name, t in model.named_parameters() if name.endswith(("._mean", "._variance"))]


class Statistics:
    """Running statistics of the `parts` of this process's share of a step.

    `use(part)` before a part goes through the model in training mode, `agree()` at the end of an epoch.
    """

    def __init__(self, model: nn.Layer, parts: int, processes: int):
        self.processes = processes
        self.live = running_statistics(model)
        self.parts = [[t.clone() for t in self.live] for _ in range(parts)]
        self.current = 0

    def use(self, part: int) -> None:
        """From now on the model updates the statistics of this part."""
        if part == self.current:
            return
        for kept, tensor in zip(self.parts[self.current], self.live, strict=True):
            kept.set_value(tensor)
        for kept, tensor in zip(self.parts[part], self.live, strict=True):
            tensor.set_value(kept)
        self.current = part

    def agree(self) -> None:
        """All parts, in all processes, get the mean of all."""
        for kept, tensor in zip(self.parts[self.current], self.live, strict=True):
            kept.set_value(tensor)
        count = len(self.parts) * self.processes
        for place, tensor in enumerate(self.live):
            total = paddle.add_n([part[place] for part in self.parts]) if len(self.parts) > 1 else tensor.clone()
            if self.processes > 1:
                paddle.distributed.all_reduce(total)
            tensor.set_value(total / count)
            for part in self.parts:
                part[place].set_value(tensor)
