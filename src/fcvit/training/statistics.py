"""BatchNorm's running statistics when a step has several micro-batches.

Each micro-batch of a step is normalized by its own images and updates its own running statistics. The statistics are
averaged over the micro-batches after each epoch. The authors' training does the same over processes (timm's
`distribute_bn="reduce"`). Here it also applies to accumulated micro-batches, so that the result does not depend on
how many processes share a step.
"""

import numpy as np

from fcvit.frameworks import import_framework
from fcvit.processes import join

import_framework("paddle")

import paddle  # noqa: E402
from paddle import Tensor, nn  # noqa: E402


def running_statistics(model: nn.Layer) -> list[Tensor]:
    """Return the means and variances of all BatchNorm layers in the model's order. Paddle keeps them as parameters."""
    return [t for name, t in model.named_parameters() if name.endswith(("._mean", "._variance"))]


class Statistics:
    """Separate running statistics for each micro-batch that this process computes in a step.

    Call `use(number)` before the forward pass of a micro-batch in training mode, and `synchronize()` after an epoch.

    Args:
        model: The network.
        micro_batches: Number of micro-batches per step in this process.
        processes: Number of processes.
    """

    def __init__(self, model: nn.Layer, micro_batches: int, processes: int):
        self.processes = processes
        self.live = running_statistics(model)
        self.stored = [[t.clone() for t in self.live] for _ in range(micro_batches)]
        self.current = 0

    def use(self, number: int) -> None:
        """Load the statistics of a micro-batch into the model, which updates them from then on."""
        if number == self.current:
            return
        self._store()
        for stored, tensor in zip(self.stored[number], self.live, strict=True):
            tensor.set_value(stored)
        self.current = number

    def synchronize(self) -> None:
        """Set the statistics of every micro-batch in every process to their mean over all of them."""
        self._store()
        count = len(self.stored) * self.processes
        for position, tensor in enumerate(self.live):
            own = [statistics[position] for statistics in self.stored]
            total = paddle.add_n(own) if len(own) > 1 else tensor.clone()
            if self.processes > 1:
                join().all_reduce(total)
            tensor.set_value(total / count)
            for stored in own:
                stored.set_value(tensor)

    def values(self) -> np.ndarray:
        """Return the statistics of each micro-batch of this process, (micro-batches, values), for `restore`."""
        self._store()
        parts = [[tensor.numpy().ravel() for tensor in stored] for stored in self.stored]
        return np.stack([np.concatenate([*part, np.empty(0, np.float32)]) for part in parts])

    def restore(self, values: np.ndarray) -> None:
        """Invert `values`."""
        ends = np.cumsum([tensor.size for tensor in self.live])[:-1]
        for stored, row in zip(self.stored, values, strict=True):
            for tensor, part in zip(stored, np.split(row, ends), strict=True):
                tensor.set_value(part.reshape(tensor.shape))
        for tensor, stored in zip(self.live, self.stored[self.current], strict=True):
            tensor.set_value(stored)

    def _store(self) -> None:
        for stored, tensor in zip(self.stored[self.current], self.live, strict=True):
            stored.set_value(tensor)
