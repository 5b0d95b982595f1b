"""Run an optimizer step: forward and backward passes of micro-batches, gradient reduction, and AdamW."""

import collections
import functools
import hashlib
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from fcvit.data.transforms.pixel_batch import CHANNELS, VALUES, PixelBatch
from fcvit.errors import DIVERGED, TrainingStopped, UnreadableFile
from fcvit.frameworks import import_framework
from fcvit.processes import join
from fcvit.tasks.recipe import Precision, Recipe
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
STATISTICS = "statistics"
"""Name of BatchNorm's statistics of all micro-batches in a state, (micro-batches, values)."""
_STATISTICS_DECAY = "statistics_decay"
_NETWORKS = ("model/", "ema/")  # prefixes of the raw and EMA weights in a state
_SCALER = ("scale", "incr_count", "decr_count")
PHASES = ("data", "forward", "backward", "optimizer")  # the timed phases of a step


class Trainer:
    """A network with its optimizer, EMA weights, running statistics and loss scaling.

    Args:
        model: The network, on its device.
        recipe: Recipe of the run.
        micro_batches: The micro-batches of a step.
        loss: Loss function of the task (see `fcvit.tasks.base.TrainingTask.loss`).
        native: True to update the weights with the native operators, on a CPU.

    Attributes:
        step: Number of finished optimizer steps.
        seconds: Seconds in each of `PHASES` since `reset_clock`. On a GPU this is only the time to launch the work.
    """

    def __init__(self, model: nn.Layer, recipe: Recipe, micro_batches: MicroBatches, loss: Loss, native: bool = False):
        self.model, self.recipe, self.micro_batches, self.task_loss = model, recipe, micro_batches, loss
        self.optimizer = create_optimizer(model, recipe, native)
        self.trained = list(trained_parameters(model).values())
        self.statistics = Statistics(model, micro_batches.accumulate, micro_batches.processes)
        self.ema = EMA(model, recipe.ema_decay, native) if recipe.ema_decay is not None else None
        half = recipe.precision == "float16"
        self.scaler = paddle.amp.GradScaler(enable=half, init_loss_scaling=2.0**16 if half else 1.0)
        self.step = 0
        self.copied: collections.deque[tuple[Any, Tensor]] = collections.deque()  # end of a copy, and its source
        self.reset_clock()

    def reset_clock(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def train_mode(self) -> None:
        """Set the model to training mode. With a frozen backbone this affects only the head."""
        self.model.train()
        if self.recipe.freeze:
            for name, layer in self.model.named_sublayers():
                if not is_head(name):
                    layer.training = False

    def run(
        self,
        batches: Iterator[tuple[Any, Any]],
        rate: float,
        requests: Callable[[], Mapping[str, float]] = dict,
    ) -> dict[str, Any]:
        """Run one optimizer step over this process's micro-batches.

        Args:
            batches: Iterator over (images, targets) of the micro-batches. The images are arrays or results of `stage`.
            rate: Learning rate.
            requests: Function that returns values by name, which are summed over the processes.

        Returns:
            Each loss by name, as the mean over the images of all processes, and the sums of `requests`. `loss` is the
            sum of the losses. They are numbers or scalars on the device, because reading one waits for the step to end.
        """
        self.optimizer.set_lr(rate)
        totals: dict[str, Tensor] = {}
        count = paddle.to_tensor(float(self.micro_batches.total), "float64")
        for number in range(self.micro_batches.accumulate):
            images, targets = self._timed("data", lambda: next(batches))
            self.statistics.use(number)
            # Seed drop path and dropout so that their draws do not depend on the process or on interruptions.
            position = self.micro_batches.rank * self.micro_batches.accumulate + number
            paddle.seed(_paddle_seed(self.recipe.seed, self.step, position))
            losses = self._timed("forward", lambda i=images, t=targets: self._losses(i, t))
            total = functools.reduce(operator.add, losses.values())
            scaled = total / self.micro_batches.total
            self._timed("backward", lambda loss=scaled: self.scaler.scale(loss).backward())
            for name, loss in {**losses, "loss": total}.items():
                share = loss.detach().astype("float64").reshape([]) / count
                totals[name] = totals[name] + share if name in totals else share
        return self._timed("optimizer", lambda: self._update(totals, requests))

    def stage(self, images: PixelBatch) -> Any:
        """Prepare images for `run`, in another thread: normalize them, or for a GPU copy them to pinned memory."""
        if self.trained[0].place.is_gpu_place():
            return paddle.to_tensor(images.pixels, place=paddle.CUDAPinnedPlace()), images
        return paddle.to_tensor(images.normalized(), place=paddle.CPUPlace())

    def _losses(self, images: Any, targets: Any) -> dict[str, Tensor]:
        if isinstance(images, tuple):
            images = normalized_on_device(self._copied_to_gpu(images[0]), images[1])
        with mixed_precision(self.recipe.precision):
            outputs = self.model(images if isinstance(images, Tensor) else paddle.to_tensor(images))
        return self.task_loss(outputs, targets)

    def _copied_to_gpu(self, pinned: Tensor) -> Tensor:
        """Start to copy a tensor from pinned memory, without waiting for the GPU."""
        copy = pinned.cuda(blocking=False)
        # The pinned memory must not be used again before the copy is finished.
        self.copied.append((paddle.device.current_stream().record_event(), pinned))
        while len(self.copied) > 1 and self.copied[0][0].query():
            self.copied.popleft()
        return copy

    def _update(self, losses: dict[str, Tensor], requests: Callable[[], Mapping[str, float]]) -> dict[str, Any]:
        several = self.micro_batches.processes > 1
        values = self._reduce(losses, requests()) if several else losses
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.clear_grad(set_to_zero=False)
        if self.ema is not None:
            self.ema.update(self.model, self.step)
        self.step += 1
        return values if several else {**values, **requests()}

    def _reduce(self, losses: dict[str, Tensor], requests: Mapping[str, float]) -> dict[str, Tensor]:
        """Sum gradients, losses and requests over the processes with a single all-reduce."""
        values = losses | {name: paddle.to_tensor(value, "float64") for name, value in requests.items()}
        gradients: list[Any] = [p.grad for p in self.trained]
        flat_values = paddle.stack(list(values.values())).astype(gradients[0].dtype)
        flat = paddle.concat([*(g.reshape([-1]) for g in gradients), flat_values])
        join().all_reduce(flat)
        *reduced, sums = paddle.split(flat, [*(g.size for g in gradients), len(values)])
        for gradient, total in zip(gradients, reduced, strict=True):
            gradient.set_value(total.reshape(gradient.shape))
        return dict(zip(values, paddle.unbind(sums), strict=True))

    def end_epoch(self) -> None:
        """Synchronize the running statistics, update the EMA weights with them, and check that all weights are finite.

        Raises:
            TrainingStopped: A weight is not finite.
        """
        self.statistics.synchronize()
        if self.ema is not None:
            self.ema.end_epoch(self.model)
        check_finite({name: tensor.numpy() for name, tensor in self._networks().items()}, self.step)

    def scaler_state(self) -> dict[str, float]:
        """Return the state of float16 loss scaling for `restore`. Empty for other precisions."""
        state: Any = self.scaler.state_dict()
        return {key: float(np.asarray(state[key]).ravel()[0]) for key in _SCALER} if state else {}

    def tensors(self) -> dict[str, np.ndarray]:
        """Return copies of the tensors of the network, the optimizer and the EMA weights for `restore`.

        BatchNorm's statistics of the micro-batches are not included (see `Statistics.values`).
        """
        tensors = {name: tensor.numpy() for name, tensor in self._networks().items()}
        if self.ema is not None:
            tensors[_STATISTICS_DECAY] = np.array(self.ema.statistics_decay)
        return tensors | optimizer_tensors(self.optimizer, self.model)

    def _networks(self) -> dict[str, Tensor]:
        """Return the raw and EMA weights by their names in the state file."""
        networks = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.ema is not None:
            networks |= {f"ema/{name}": tensor for name, tensor in self.ema.tensors.items()}
        return networks

    def restore(self, tensors: Mapping[str, np.ndarray], step: int, scaler: Mapping[str, float]) -> None:
        """Restore the state that the trainer had after a step.

        Args:
            tensors: Result of `tensors()`. Within an epoch, also `STATISTICS`, the statistics of the micro-batches of
                all processes.
            step: Number of finished optimizer steps.
            scaler: Result of `scaler_state()`.

        Raises:
            UnreadableFile: A tensor is missing, unexpected, or has the wrong shape.
        """
        wanted = self._networks()
        stored = {name: tensor for name, tensor in tensors.items() if name.startswith(_NETWORKS)}
        for name in sorted({*wanted, *stored}):
            if name not in wanted or name not in stored or list(stored[name].shape) != wanted[name].shape:
                raise UnreadableFile(f"the state does not match the network at {name[:120]}")
        restore_optimizer(self.optimizer, self.model, tensors)
        for name, tensor in wanted.items():
            tensor.set_value(stored[name])
        if self.ema is not None:
            self.ema.statistics_decay = float(tensors.get(_STATISTICS_DECAY, 1.0))
        parts = self.micro_batches
        self.statistics = Statistics(self.model, parts.accumulate, parts.processes)
        if STATISTICS in tensors:
            own = self.statistics.values()
            if tensors[STATISTICS].shape != (parts.total, own.shape[1]):
                raise UnreadableFile(f"the state does not match the network at {STATISTICS}")
            first = parts.rank * parts.accumulate
            self.statistics.restore(tensors[STATISTICS][first : first + parts.accumulate])
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


def normalized_on_device(pixels: Tensor, images: PixelBatch) -> Tensor:
    """Return the same values as `images.normalized()`, computed on the device of `pixels`.

    Args:
        pixels: `images.pixels` on the device.
        images: The images.
    """
    offsets = paddle.arange(CHANNELS, dtype="int32").reshape([1, CHANNELS, 1, 1]) * VALUES
    positions = (pixels.astype("int32") + offsets).flatten()
    normalized = paddle.gather(paddle.to_tensor(images.table.ravel()), positions).reshape(pixels.shape)
    for image, (height, width) in enumerate(images.valid or ()):
        normalized[image, :, height:] = 0
        normalized[image, :, :, width:] = 0
    for image, rectangle in enumerate(images.erased):
        if rectangle is not None:
            normalized[(image, *rectangle.window)] = paddle.to_tensor(rectangle.noise)
    return normalized


def check_finite(tensors: Mapping[str, np.ndarray], step: int) -> None:
    """Check the raw and EMA weights in the tensors of a state, after this number of steps.

    Raises:
        TrainingStopped: A weight is not finite.
    """
    for name, tensor in tensors.items():
        if name.startswith(_NETWORKS) and not np.isfinite(tensor).all():
            raise TrainingStopped(f"{name.partition('/')[2]} is not finite after step {step}: {DIVERGED}", False)


def mixed_precision(precision: Precision) -> Any:
    """Return the context in which a network computes with a precision: "float32", "float16" or "bfloat16"."""
    half = precision != "float32"
    return paddle.amp.auto_cast(enable=half, dtype=precision if half else "float16")


def _paddle_seed(seed: int, step: int, position: int) -> int:
    """Return a 63-bit seed for a micro-batch, given its position in the step."""
    digest = hashlib.sha256(f"{seed}/{step}/{position}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def use_synchronized_batchnorm(model: nn.Layer, head_only: bool = False) -> None:
    """Normalize batches over all processes with Paddle's SyncBatchNorm. Its running variance is the biased variance.

    With `head_only`, the layers of the backbone are not changed, as in the authors' segmentation.
    """
    for name, layer in model.named_children():
        if not head_only or (name != "backbone" and is_head(name)):
            setattr(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(layer))
