"""One optimizer step: forward and backward of each micro-batch, gradients over all processes, AdamW."""

import functools
import hashlib
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from fcvit.errors import TrainingStopped, UnreadableFile
from fcvit.frameworks import import_framework
from fcvit.interrupts import held_back
from fcvit.tasks.recipe import Recipe
from fcvit.training.batches import MicroBatches
from fcvit.training.optimizer import (
    EMA,
    create_optimizer,
    is_head,
    optimizer_tensors,
    restore_optimizer,
    trained_parameters,
)
from fcvit.training.statistics import Statistics

import_framework("paddle")

import paddle  # noqa: E402
from paddle import Tensor, nn  # noqa: E402

Loss = Callable[[Any, Any], dict[str, Tensor]]
REMEDY = "lower lr, or bound the gradient with clip_norm: going on would come to the same"
_SCALER = ("scale", "incr_count", "decr_count")
PHASES = ("data", "forward", "backward", "optimizer")  # of a step, in seconds


class Trainer:
    """A network on its device with what trains it.

    Args:
        model: in training mode from now on.
        recipe, division: of the run.
        loss: the task's (see `fcvit.tasks.base.TrainingTask.loss`).

    Attributes:
        step: optimizer steps done.
        seconds: in each of `PHASES`, since `reset_clock`; on a GPU of launching the work only.
    """

    def __init__(self, model: nn.Layer, recipe: Recipe, division: MicroBatches, loss: Loss):
        self.model, self.recipe, self.division, self.task_loss = model, recipe, division, loss
        self.optimizer = create_optimizer(model, recipe)
        self.trained = list(trained_parameters(model).values())
        self.statistics = Statistics(model, division.accumulate, division.processes)
        self.ema = EMA(model, recipe.ema_decay) if recipe.ema_decay is not None else None
        half = recipe.precision == "float16"
        self.scaler = paddle.amp.GradScaler(enable=half, init_loss_scaling=2.0**16 if half else 1.0)
        self.step = 0
        self.reset_clock()

    def reset_clock(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def train_mode(self) -> None:
        """Training mode; of a frozen network for the head alone."""
        self.model.train()
        if self.recipe.freeze:
            for name, layer in self.model.named_sublayers():
                if not is_head(name):
                    layer.training = False

    def run(self, batches: Iterator[tuple[np.ndarray, Any]], rate: float) -> dict[str, float]:
        """Take one step over this process's micro-batches (images, targets), at that learning rate.

        Returns:
            the mean over the images of all processes of each loss; `loss` is their sum.

        Raises:
            TrainingStopped: the loss is not finite; the weights are as they were before the step.
            KeyboardInterrupt: after the micro-batch in which the signal came.
        """
        self.optimizer.set_lr(rate)
        totals: dict[str, float] = {}
        for number in range(self.division.accumulate):
            images, targets = self._timed("data", lambda: next(batches))
            self.statistics.use(number)
            # Drop path and dropout draw from here: the same whoever does the micro-batch, and after a resume.
            paddle.seed(_draw(self.recipe.seed, self.step, self.division.rank * self.division.accumulate + number))
            with held_back():
                losses = self._timed("forward", lambda i=images, t=targets: self._losses(i, t))
                total = functools.reduce(operator.add, losses.values())
                scaled = total / self.division.total
                self._timed("backward", lambda loss=scaled: self.scaler.scale(loss).backward())
                for name, loss in {**losses, "loss": total}.items():
                    totals[name] = totals.get(name, 0.0) + float(loss.item()) / self.division.total
        with held_back():
            return self._timed("optimizer", lambda: self._update(totals))

    def _losses(self, images: np.ndarray, targets: Any) -> dict[str, Tensor]:
        half = self.recipe.precision != "float32"
        with paddle.amp.auto_cast(enable=half, dtype=self.recipe.precision if half else "float16"):
            outputs = self.model(paddle.to_tensor(images))
        return self.task_loss(outputs, targets)

    def _update(self, losses: dict[str, float]) -> dict[str, float]:
        losses = self._reduce(losses)
        if not np.isfinite(losses["loss"]):
            self.optimizer.clear_grad(set_to_zero=False)
            raise TrainingStopped(f"the loss is {losses['loss']} at step {self.step + 1}; {REMEDY}", False)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.clear_grad(set_to_zero=False)
        if self.ema is not None:
            self.ema.update(self.model, self.step)
        self.step += 1
        return losses

    def _reduce(self, losses: dict[str, float]) -> dict[str, float]:
        """Sum gradients and losses over the processes, all in one exchange."""
        if self.division.processes == 1:
            return losses
        gradients: list[Any] = [p.grad for p in self.trained]
        values = paddle.to_tensor(list(losses.values()), gradients[0].dtype)
        flat = paddle.concat([*(g.reshape([-1]) for g in gradients), values])
        paddle.distributed.all_reduce(flat)
        *parts, sums = paddle.split(flat, [*(g.size for g in gradients), len(losses)])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.set_value(part.reshape(gradient.shape))
        return dict(zip(losses, map(float, sums.numpy()), strict=True))

    def end_epoch(self) -> None:
        """Give all micro-batches and processes the same running statistics.

        Raises:
            TrainingStopped: a weight is no finite number.
        """
        self.statistics.synchronize()
        if self.ema is not None:
            self.ema.end_epoch(self.model)

        for name, tensor in self._networks().items():
            if not bool(paddle.isfinite(tensor).all().item()):
                raise TrainingStopped(f"{name.partition('/')[2]} is not finite after step {self.step}; {REMEDY}", False)

    def scaler_state(self) -> dict[str, float]:
        """Return the state of float16's loss scaling for `restore`; empty in other types."""
        state: Any = self.scaler.state_dict()
        return {key: float(np.asarray(state[key]).ravel()[0]) for key in _SCALER} if state else {}

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the tensors of network, optimizer and EMA for `restore`."""
        networks = {name: tensor.numpy() for name, tensor in self._networks().items()}
        return networks | optimizer_tensors(self.optimizer, self.model)

    def _networks(self) -> dict[str, Tensor]:
        """Return the raw and EMA weights under the names of the state."""
        networks = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.ema is not None:
            networks |= {f"ema/{name}": tensor for name, tensor in self.ema.tensors.items()}
        return networks

    def restore(self, tensors: Mapping[str, np.ndarray], step: int, scaler: Mapping[str, float]) -> None:
        """Go on where `tensors()` was taken, at the end of an epoch, after that many steps.

        Raises:
            UnreadableFile: a tensor is missing, too many, or of another shape.
        """
        wanted = self._networks()
        stored = {name: tensor for name, tensor in tensors.items() if name.startswith(("model/", "ema/"))}
        for name in sorted({*wanted, *stored}):
            if name not in wanted or name not in stored or list(stored[name].shape) != wanted[name].shape:
                raise UnreadableFile(f"the state does not fit the network at {name[:120]}")
        restore_optimizer(self.optimizer, self.model, tensors)
        for name, tensor in wanted.items():
            tensor.set_value(stored[name])
        self.statistics = Statistics(self.model, self.division.accumulate, self.division.processes)
        self.step = step
        state: Any = self.scaler.state_dict()
        if state and scaler:
            counts = {key: int(scaler[key]) for key in _SCALER[1:]}
            restored: Any = {**state, **counts, "scale": np.array([scaler["scale"]], np.float32)}
            self.scaler.load_state_dict(restored)

    def _timed(self, phase: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        self.seconds[phase] += time.perf_counter() - began
        return result


def _draw(seed: int, step: int, slot: int) -> int:
    """Return a seed of 63 bits for Paddle."""
    digest = hashlib.sha256(f"{seed}/{step}/{slot}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def use_synchronized_batchnorm(model: nn.Layer) -> None:
    """Let batches be normalized over all processes, by Paddle's layer, whose running variance is the biased one."""
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
