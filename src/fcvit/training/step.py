"""One optimizer step: forward and backward of each part, gradients over all processes, AdamW."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from fcvit.errors import TrainingStopped, UnreadableFile
from fcvit.frameworks import import_framework
from fcvit.interrupts import held_back
from fcvit.models.network import FCViT
from fcvit.training.data import Division
from fcvit.training.optimizer import (
    Average,
    create_optimizer,
    optimizer_tensors,
    restore_optimizer,
    trained_parameters,
)
from fcvit.training.recipe import Recipe
from fcvit.training.statistics import Statistics

import_framework("paddle")

import paddle  # noqa: E402
import paddle.nn.functional as F  # noqa: E402
from paddle import Tensor, nn  # noqa: E402

REMEDY = "lower lr, or bound the gradient with clip_norm: going on would come to the same"
_SCALER = ("scale", "incr_count", "decr_count")
PHASES = ("data", "forward", "backward", "optimizer")  # of a step, in seconds


def soft_cross_entropy(logits: Tensor, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Mean over the images of the cross-entropy with soft targets, in float32 or float64.

    Args:
        logits, targets: (B, classes); rows of targets sum to 1.
        class_weights: (classes,), of mean 1 over the training images; None: all 1.
    """
    logits = logits.astype(targets.dtype)
    if class_weights is not None:
        targets = targets * class_weights
    return -(targets * F.log_softmax(logits, axis=1)).sum(axis=1).mean()


def balanced(counts: np.ndarray) -> np.ndarray:
    """Weights in inverse proportion to the images of a class, of mean 1 over all images; float32 (classes,).

    A class without images gets 0.
    """
    present = counts > 0
    weights = np.zeros(len(counts), np.float32)
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights


class Trainer:
    """A network on its device with what trains it.

    Args:
        model: in training mode from now on.
        recipe, division: of the run.
        class_weights: see `soft_cross_entropy`.

    Attributes:
        step: optimizer steps done.
        seconds: in each of `PHASES`, since `reset_clock`; on a GPU of launching the work only.
    """

    def __init__(self, model: FCViT, recipe: Recipe, division: Division, class_weights: np.ndarray | None = None):
        self.model, self.recipe, self.division = model, recipe, division
        self.optimizer = create_optimizer(model, recipe)
        self.trained = list(trained_parameters(model).values())
        self.statistics = Statistics(model, division.parts, division.processes)
        self.average = Average(model, recipe.ema_decay) if recipe.ema_decay is not None else None
        self.class_weights = None if class_weights is None else paddle.to_tensor(class_weights)
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
                if not name.startswith("head"):
                    layer.training = False

    def run(self, parts: Iterator[tuple[np.ndarray, np.ndarray]], rate: float) -> float:
        """One step over this process's parts (images, targets), at that learning rate.

        Returns:
            the mean loss over the images of all processes.

        Raises:
            TrainingStopped: the loss is no finite number; the weights are as they were before the step.
            KeyboardInterrupt: after the part in which the signal came.
        """
        self.optimizer.set_lr(rate)
        total = 0.0
        for part in range(self.division.parts):
            images, targets = self._timed("data", lambda: next(parts))
            self.statistics.use(part)
            # Drop path and dropout draw from here: the same whoever does the part, and after a resume.
            paddle.seed(_draw(self.recipe.seed, self.step, self.division.rank * self.division.parts + part))
            with held_back():
                loss = self._timed("forward", lambda i=images, t=targets: self._loss(i, t))
                self._timed("backward", lambda loss=loss: self.scaler.scale(loss / self.division.slots).backward())
                total += float(loss.item()) / self.division.slots
        with held_back():
            return self._timed("optimizer", lambda: self._update(total))

    def _loss(self, images: np.ndarray, targets: np.ndarray) -> Tensor:
        half = self.recipe.precision != "float32"
        with paddle.amp.auto_cast(enable=half, dtype=self.recipe.precision if half else "float16"):
            logits = self.model(paddle.to_tensor(images))
        return soft_cross_entropy(logits, paddle.to_tensor(targets), self.class_weights)

    def _update(self, loss: float) -> float:
        loss = self._reduce(loss)
        if not np.isfinite(loss):
            self.optimizer.clear_grad(set_to_zero=False)
            raise TrainingStopped(f"the loss is {loss} at step {self.step + 1}; {REMEDY}", False)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.clear_grad(set_to_zero=False)
        if self.average is not None:
            self.average.update(self.model, self.step)
        self.step += 1
        return loss

    def _reduce(self, loss: float) -> float:
        """Sum gradients and loss over the processes, all in one exchange."""
        if self.division.processes == 1:
            return loss
        gradients: list[Any] = [p.grad for p in self.trained]
        flat = paddle.concat([*(g.reshape([-1]) for g in gradients), paddle.to_tensor([loss], gradients[0].dtype)])
        paddle.distributed.all_reduce(flat)
        *parts, total = paddle.split(flat, [*(g.size for g in gradients), 1])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.set_value(part.reshape(gradient.shape))
        return float(total.numpy()[0])

    def end_epoch(self) -> None:
        """Running statistics that all parts and processes agree on.

        Raises:
            TrainingStopped: a weight is no finite number.
        """
        self.statistics.agree()
        if self.average is not None:
            self.average.end_epoch(self.model)

        for name, tensor in self._networks().items():
            if not bool(paddle.isfinite(tensor).all().item()):
                raise TrainingStopped(f"{name.partition('/')[2]} is not finite after step {self.step}; {REMEDY}", False)

    def scaler_state(self) -> dict[str, float]:
        """What `restore` takes of float16's loss scaling; empty in other types."""
        state: Any = self.scaler.state_dict()
        return {key: float(np.asarray(state[key]).ravel()[0]) for key in _SCALER} if state else {}

    def tensors(self) -> dict[str, np.ndarray]:
        """What `restore` takes: network, optimizer, averages."""
        found = {name: tensor.numpy() for name, tensor in self._networks().items()}
        return found | optimizer_tensors(self.optimizer, self.model)

    def _networks(self) -> dict[str, Tensor]:
        """The weights, and the averaged ones, under the names of the state."""
        found = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.average is not None:
            found |= {f"ema/{name}": tensor for name, tensor in self.average.tensors.items()}
        return found

    def restore(self, tensors: Mapping[str, np.ndarray], step: int, scaler: Mapping[str, float]) -> None:
        """Go on where `tensors()` was taken, at the end of an epoch, after that many steps.

        Raises:
            UnreadableFile: a tensor is missing, too many, or of another shape.
        """
        wanted = self._networks()
        found = {name: tensor for name, tensor in tensors.items() if name.startswith(("model/", "ema/"))}
        for name in sorted({*wanted, *found}):
            if name not in wanted or name not in found or list(found[name].shape) != wanted[name].shape:
                raise UnreadableFile(f"the state does not fit the network at {name[:120]}")
        restore_optimizer(self.optimizer, self.model, tensors)
        for name, tensor in wanted.items():
            tensor.set_value(found[name])
        self.statistics = Statistics(self.model, self.division.parts, self.division.processes)
        self.step = step
        state: Any = self.scaler.state_dict()
        if state and scaler:
            counts = {key: int(scaler[key]) for key in _SCALER[1:]}
            kept: Any = {**state, **counts, "scale": np.array([scaler["scale"]], np.float32)}
            self.scaler.load_state_dict(kept)

    def _timed(self, phase: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        done = work()
        self.seconds[phase] += time.perf_counter() - began
        return done


def _draw(seed: int, step: int, slot: int) -> int:
    """A seed for Paddle, of 63 bits."""
    digest = hashlib.sha256(f"{seed}/{step}/{slot}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def synchronize(model: FCViT) -> None:
    """Let batches be normalized over all processes, by Paddle's layer, whose running variance is the biased one."""
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
