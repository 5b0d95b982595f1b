"""Layers that PaddlePaddle does not have, implements differently, or computes too imprecisely on a CPU."""

from fcvit.errors import UsageError
from fcvit.frameworks import import_framework

import_framework("paddle")  # hides warnings, and reports how to install it if it is missing

import paddle  # noqa: E402
import paddle.nn.functional as F  # noqa: E402
from paddle import Tensor, nn  # noqa: E402

SIMILARITY_EPS = 1e-5  # added to the standard deviation, not to the variance
NORM_EPS = 1e-5


class ConvNorm(nn.Layer):
    """Stem and downsampling: a strided convolution and BatchNorm, without an activation.

    H and W are divided by the stride and rounded up.
    """

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2D(width_in, width_out, kernel, stride, padding=kernel // 2)
        self.norm = BatchNorm(width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class BatchNorm(nn.BatchNorm2D):
    """BatchNorm that updates its running variance with the unbiased variance of the batch, as PyTorch does.

    On a CPU, Paddle's layer stores the biased variance. With this layer, a stored variance means the same in both
    frameworks, so a run can be continued or evaluated in the other framework. Both frameworks normalize a batch with
    its biased variance.
    """

    def __init__(self, width: int):
        super().__init__(width, epsilon=NORM_EPS)  # momentum 0.9 is PyTorch's 0.1

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        count = input.shape[0] * input.shape[2] * input.shape[3]
        if count < 2:
            raise UsageError("BatchNorm cannot be trained on a single position; use a batch of at least two images")
        with paddle.no_grad():
            # The statistics are updated here and not by Paddle's kernel, because the kernel's variance differs between
            # devices and its momentum is a float32.
            given = input.astype(self._mean.dtype)
            center = mean(given, (0, 2, 3))
            variance = mean((given - center) ** 2, (0, 2, 3)) * (count / (count - 1))
            momentum = self._momentum
            self._mean.set_value(momentum * self._mean + (1 - momentum) * center.flatten())
            self._variance.set_value(momentum * self._variance + (1 - momentum) * variance.flatten())
        own = (paddle.zeros_like(self._mean), paddle.ones_like(self._variance))  # the kernel overwrites these
        return F.batch_norm(input, *own, self.weight, self.bias, training=True, epsilon=self._epsilon)


def mean(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return the mean over `axes`, kept with length 1. It is computed one axis at a time, starting with the last.

    Paddle's CPU kernels add float32 numbers sequentially. For the 200,000 numbers of a feature map, the error is 1e-5
    if all are added at once, and 1e-7 if one short axis is added at a time.
    """
    for axis in sorted(axes, reverse=True):
        x = x.mean(axis=axis, keepdim=True)
    return x


class LayerNorm2D(nn.GroupNorm):
    """Layer norm over channels and positions together: GroupNorm with one group.

    On a CPU, the reductions are computed one axis at a time (see `mean`), which can halve the error of the float32
    logits compared with Paddle's kernel. On other devices, Paddle's kernel is used.
    """

    def __init__(self, width: int):
        super().__init__(1, width, epsilon=NORM_EPS)

    def forward(self, input: Tensor) -> Tensor:
        if paddle.device.get_device() != "cpu":
            return super().forward(input)
        x = input - mean(input, (1, 2, 3))
        x = x * paddle.rsqrt(mean(x * x, (1, 2, 3)) + self._epsilon)
        return x * self.weight.reshape([1, -1, 1, 1]) + self.bias.reshape([1, -1, 1, 1])


class DropPath(nn.Layer):
    """Stochastic depth: in training, drop the branch for an image with probability `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        return x / (1 - self.rate) * self.mask(x.shape[0]).astype(x.dtype)

    def mask(self, images: int) -> Tensor:
        """Return 0 for each image whose branch is dropped, and 1 for the others: (B, 1, 1, 1)."""
        # Drawn in float32, because rounding in a half-precision type would change the probability.
        return paddle.floor(1 - self.rate + paddle.rand([images, 1, 1, 1], dtype="float32"))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
