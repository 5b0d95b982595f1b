"""FCViT in PaddlePaddle: the whole network, top to bottom.

Ported from the description in the paper (arXiv 2212.12552) and the behavior of the
authors' PyTorch code (`models/fcvit.py`), whose parameter names are kept. What differs: options are
fields of the variant instead of module-level dictionaries, BatchNorm's statistics carry Paddle's
names (`_mean`, `_variance`), Linear weights Paddle's layout ([in, out]).

Shapes: B images, C channels, H x W positions, h heads of d = C // h channels.
"""

import operator
from typing import SupportsIndex

from fcvit.errors import UsageError
from fcvit.frameworks import import_framework
from fcvit.models.maps import Recorder, Similarity, require_maps
from fcvit.models.variants import IMAGENET_CLASSES, Variant

import_framework("paddle")  # quietly, or with the remedy where it is missing

import paddle  # noqa: E402
import paddle.nn.functional as F  # noqa: E402
from paddle import Tensor, nn  # noqa: E402

SIMILARITY_EPS = 1e-5  # added to the standard deviation, not to the variance
NORM_EPS = 1e-5


class FCViT(nn.Layer):
    """The classifier. `model(x)` takes (B, 3, H, W), H and W from 32 up, and gives logits.

    Args:
        variant: the architecture.
        num_classes: logits per image; 0: no head, `model(x)` gives pooled embeddings.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0; 0 <= rate < 1.
        drop_rate: dropout in the channel mixers; 0 <= rate < 1.

    Raises:
        UsageError: a rate or class count out of range.
    """

    def __init__(
        self,
        variant: Variant,
        num_classes: int = IMAGENET_CLASSES,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.variant = variant
        width = variant.widths[-1]
        _build_trunk(self, variant, drop_path_rate, drop_rate)
        self.norm = LayerNorm2D(width)
        self.reset_classifier(num_classes)
        self.apply(_initialize)

    def features(self, x: Tensor) -> list[Tensor]:
        """Raw outputs of the four stages: (B, widths[i], H / s, W / s), strides s = 4, 8, 16, 32, rounded up."""
        return _stage_outputs(self, x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), normalized -> (B, num_classes) logits, or (B, widths[3]) without a head."""
        return self._classify(self.features(x)[-1])

    def similarity(self, x: Tensor, tokens: bool = False) -> Similarity[Tensor]:
        """A forward pass that keeps the token-global similarity of every global context (see `fcvit.models.maps`).

        The maps are those that the pass itself computes and uses. Gradients as in `model(x)`.

        Args:
            x: (B, 3, H, W), normalized.
            tokens: keep what each context is taken of, too.

        Raises:
            UsageError: the variant has no weighted global context.
        """
        require_maps(self.variant)
        recorder: Recorder[Tensor] = Recorder(tokens)
        output = self._classify(_stage_outputs(self, x, recorder)[-1])
        return Similarity(output, tuple(recorder.maps))

    def _classify(self, x: Tensor) -> Tensor:
        x = mean(self.norm(x), (2, 3)).flatten(1)
        return x if self.head is None else self.head(x)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one of `num_classes` outputs; 0 removes it."""
        self.num_classes = _class_count(num_classes)
        self.head = nn.Linear(self.variant.widths[-1], self.num_classes) if self.num_classes else None
        if self.head is not None:
            _initialize(self.head)
            self.head.to(dtype=self.norm.weight.dtype)


class FCViTBackbone(nn.Layer):
    """The dense-prediction form: four feature maps, each with a norm of its own.

    `model(x)` gives a list of (B, widths[i], H / s, W / s), s = 4, 8, 16, 32, rounded up.
    Source: the authors' `models/fcvit.py`, as their `detection/` and `segmentation/` use it.

    Args:
        variant, drop_path_rate, drop_rate: as for `FCViT`.

    Raises:
        UsageError: a rate out of range.
    """

    def __init__(self, variant: Variant, drop_path_rate: float = 0.0, drop_rate: float = 0.0):
        super().__init__()
        self.variant = variant
        _build_trunk(self, variant, drop_path_rate, drop_rate)
        for stage, width in enumerate(variant.widths):
            self.add_sublayer(f"norm{2 * stage}", LayerNorm2D(width))
        self.apply(_initialize)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalized -> the four normalized stage outputs."""
        norms = (self.norm0, self.norm2, self.norm4, self.norm6)
        return [norm(stage) for norm, stage in zip(norms, _stage_outputs(self, x), strict=True)]


def _class_count(num_classes: SupportsIndex) -> int:
    try:
        count = -1 if isinstance(num_classes, bool) else operator.index(num_classes)
    except TypeError:
        count = -1
    if count < 0:
        raise UsageError(f"num_classes: expected a whole number from 0, not {num_classes!r}")
    return count


def _build_trunk(model: nn.Layer, variant: Variant, drop_path_rate: float, drop_rate: float) -> None:
    """Stem and stages, under the authors' names: `patch_embed` and `network.0` to `network.6`."""
    for name, rate in (("drop_path_rate", drop_path_rate), ("drop_rate", drop_rate)):
        if not 0 <= rate < 1:
            raise UsageError(f"{name}: expected 0 <= rate < 1, not {rate}")
    blocks = sum(variant.depths)
    drop_paths = iter([drop_path_rate * block / max(blocks - 1, 1) for block in range(blocks)])
    model.patch_embed = ConvNorm(3, variant.widths[0], kernel=7, stride=4)
    network: list[nn.Layer] = []
    for stage, (depth, width) in enumerate(zip(variant.depths, variant.widths, strict=True)):
        if stage:
            network.append(ConvNorm(variant.widths[stage - 1], width, kernel=3, stride=2))
        mlp_width = width * variant.mlp_ratios[stage]
        network.append(
            nn.Sequential(*(Block(variant, width, mlp_width, next(drop_paths), drop_rate) for _ in range(depth)))
        )
    model.network = nn.LayerList(network)


def _stage_outputs(model: nn.Layer, x: Tensor, recorder: Recorder[Tensor] | None = None) -> list[Tensor]:
    x = model.patch_embed(x)
    outputs = []
    for index, part in enumerate(model.network):
        if index % 2:  # odd entries of `network` are the downsampling between stages
            x = part(x)
            continue
        if recorder is None:
            x = part(x)
        else:
            recorder.enter_stage()
            for block in part:
                recorder.enter_block()
                x = block(x, recorder)
        outputs.append(x)
    return outputs


class ConvNorm(nn.Layer):
    """Stem and downsampling: a strided convolution and BatchNorm, no activation; H, W over the stride, rounded up."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2D(width_in, width_out, kernel, stride, padding=kernel // 2)
        self.norm = BatchNorm(width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class BatchNorm(nn.BatchNorm2D):
    """BatchNorm whose running variance is updated with the unbiased variance of the batch, as PyTorch's is.

    Paddle's own layer takes the biased one. Whoever continues a run that began in PyTorch, or evaluates
    there what was trained here, has one meaning of the numbers in the file; normalization within a
    batch is by the biased variance in both.
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
            # Ourselves: which variance a kernel keeps depends on the device, and its momentum is a float32.
            given = input.astype(self._mean.dtype)
            center = mean(given, (0, 2, 3))
            variance = mean((given - center) ** 2, (0, 2, 3)) * (count / (count - 1))
            kept = self._momentum
            self._mean.set_value(kept * self._mean + (1 - kept) * center.flatten())
            self._variance.set_value(kept * self._variance + (1 - kept) * variance.flatten())
        own = (paddle.zeros_like(self._mean), paddle.ones_like(self._variance))  # for the kernel to write to
        return F.batch_norm(input, *own, self.weight, self.bias, training=True, epsilon=self._epsilon)


def mean(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Mean over `axes`, kept as axes of length 1, taken one axis at a time, the last first.

    Paddle's CPU kernels add float32 numbers one after the other: over the 200,000 of a feature map
    the result is off by 1e-5, over one short axis at a time by 1e-7.
    """
    for axis in sorted(axes, reverse=True):
        x = x.mean(axis=axis, keepdim=True)
    return x


class LayerNorm2D(nn.GroupNorm):
    """Layer norm over channels and positions together: GroupNorm with one group.

    On a CPU the reductions are staged (see `mean`): the float32 logits come out up to twice as
    near to the exact ones as with Paddle's own kernel. Elsewhere that kernel is used.
    """

    def __init__(self, width: int):
        super().__init__(1, width, epsilon=NORM_EPS)

    def forward(self, input: Tensor) -> Tensor:
        if paddle.device.get_device() != "cpu":
            return super().forward(input)
        x = input - mean(input, (1, 2, 3))
        x = x * paddle.rsqrt(mean(x * x, (1, 2, 3)) + self._epsilon)
        return x * self.weight.reshape([1, -1, 1, 1]) + self.bias.reshape([1, -1, 1, 1])


class Block(nn.Layer):
    """Token mixer, then channel mixer, each a scaled residual branch behind a norm; the shape stays (B, C, H, W)."""

    def __init__(self, variant: Variant, width: int, mlp_width: int, drop_path: float, drop_rate: float):
        super().__init__()
        self.norm1 = LayerNorm2D(width)
        self.token_mixer = TokenMixer(variant, width)
        self.norm2 = LayerNorm2D(width)
        self.channel_mixer = ChannelMixer(variant, width, mlp_width, drop_rate)
        self.drop_path = DropPath(drop_path)
        self.has_scale = variant.layer_scale is not None
        if variant.layer_scale is not None:
            initial = nn.initializer.Constant(variant.layer_scale)
            self.layer_scale_1 = self.create_parameter([width], default_initializer=initial)
            self.layer_scale_2 = self.create_parameter([width], default_initializer=initial)

    def forward(self, x: Tensor, recorder: Recorder[Tensor] | None = None) -> Tensor:
        tokens = self.token_mixer(self.norm1(x), recorder)
        if self.has_scale:
            tokens = self.layer_scale_1.reshape([1, -1, 1, 1]) * tokens
        x = x + self.drop_path(tokens)
        channels = self.channel_mixer(self.norm2(x))
        if self.has_scale:
            channels = self.layer_scale_2.reshape([1, -1, 1, 1]) * channels
        return x + self.drop_path(channels)


class TokenMixer(nn.Layer):
    """Twice: add the global context, mix positions depthwise, mix channels in a bottleneck; (B, C, H, W) stays."""

    def __init__(self, variant: Variant, width: int):
        super().__init__()
        self.mixes = (1, 2) if variant.second_mix else (1,)
        self.has_context = variant.global_context
        self.has_attention = variant.spatial_attention
        inner = variant.token_width(width)
        for mix in self.mixes:
            kernel = variant.kernel_sizes[mix - 1]
            if variant.global_context:
                self.add_sublayer(f"gc{mix}", GlobalContext(variant, width))
            self.add_sublayer(f"dw{mix}", nn.Conv2D(width, width, kernel, padding=kernel // 2, groups=width))
            if inner is None:
                fc = nn.Conv2D(width, width, 1)
            else:
                fc = nn.Sequential(nn.Conv2D(width, inner, 1), nn.GELU(), nn.Conv2D(inner, width, 1))
            self.add_sublayer(f"fc{mix}", fc)
        if variant.spatial_attention:
            self.spatial_att = SpatialAttention(variant, width)

    def forward(self, x: Tensor, recorder: Recorder[Tensor] | None = None) -> Tensor:
        for mix in self.mixes:
            if self.has_context:
                x = x + getattr(self, f"gc{mix}")(x, recorder)
            x = getattr(self, f"dw{mix}")(x)
            x = F.gelu(getattr(self, f"fc{mix}")(x))
        return self.spatial_att(x) if self.has_attention else x


class GlobalContext(nn.Layer):
    """The mean over positions, sent through a bottleneck and given back to each position by
    how similar the position is to it (the paper's token-global similarity and competitive bottleneck).

    (B, C, H, W) -> the same, or (B, C, 1, 1) where the context is not weighted.
    """

    def __init__(self, variant: Variant, width: int):
        super().__init__()
        self.heads = variant.heads
        self.weighted = variant.weighted_context
        self.competition = variant.competition
        inner = width // variant.reduction
        if self.weighted:
            self.rescale_weight = self.create_parameter([self.heads], default_initializer=nn.initializer.Constant(1.0))
            self.rescale_bias = self.create_parameter([self.heads], is_bias=True)
        if self.competition:
            self.fc1 = nn.Linear(width, 2 * inner)
            self.fc2 = nn.Linear(inner, width)
        else:
            self.fc = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def similarity(self, x: Tensor, context: Tensor) -> Tensor:
        """Standardised similarity of each position with the context: (B, C, H, W), (B, C) -> (B, h, H, W)."""
        batch, width, height, across = x.shape
        x = x.reshape([batch, self.heads, width // self.heads, height * across])
        context = context.reshape([batch, self.heads, 1, width // self.heads])
        similarity = paddle.matmul(context, x).reshape([batch, self.heads, height, across])
        similarity = similarity * (width // self.heads) ** -0.5
        # Jointly over heads and positions, by the unbiased standard deviation.
        centered = similarity - mean(similarity, (1, 2, 3))
        count = self.heads * height * across
        # One head at one position is its own mean: no deviation, similarity 0.
        others = count - 1 if self.heads > 1 else max(count - 1, 1)
        variance = mean(centered * centered, (1, 2, 3)) * (count / others)
        return centered / (variance.sqrt() + SIMILARITY_EPS)

    def bottleneck(self, context: Tensor) -> Tensor:
        """(B, C) -> (B, C)."""
        if not self.competition:
            return self.fc(context)
        first, second = self.fc1(context).chunk(2, axis=1)  # channel k competes with k + C // reduction
        return self.fc2(paddle.maximum(first, second))

    def forward(self, x: Tensor, recorder: Recorder[Tensor] | None = None) -> Tensor:
        batch, width, height, across = x.shape
        context = mean(x, (2, 3)).flatten(1)
        value = self.bottleneck(context)
        if not self.weighted:
            return value.reshape([batch, width, 1, 1])
        similarity = self.similarity(x, context)
        weight = similarity * self.rescale_weight.reshape([1, -1, 1, 1]) + self.rescale_bias.reshape([1, -1, 1, 1])
        if recorder is not None:
            recorder.take(x, similarity, weight)
        value = value.reshape([batch, self.heads, width // self.heads, 1, 1])
        return (weight.unsqueeze(2) * value).reshape([batch, width, height, across])


class ChannelMixer(nn.Layer):
    """An MLP over channels, `mlp_width` wide, with a depthwise convolution inside; (B, C, H, W) stays."""

    def __init__(self, variant: Variant, width: int, mlp_width: int, drop_rate: float):
        super().__init__()
        self.fc1 = nn.Conv2D(width, mlp_width, 1)
        self.has_dwconv = variant.channel_dwconv
        if self.has_dwconv:
            kernel = variant.channel_kernel
            self.dwconv = nn.Conv2D(mlp_width, mlp_width, kernel, padding=kernel // 2, groups=mlp_width)
        self.fc2 = nn.Conv2D(mlp_width, width, 1)
        self.drop = nn.Dropout(drop_rate)
        self.has_attention = variant.channel_attention
        if self.has_attention:
            self.channel_att = ChannelAttention(variant)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.has_dwconv:
            x = self.dwconv(x)
        x = self.drop(F.gelu(x))
        x = self.drop(self.fc2(x))
        return self.channel_att(x) if self.has_attention else x


class SpatialAttention(nn.Layer):
    """Option, off in the published variants: gate each value by a mask computed from its surroundings."""

    def __init__(self, variant: Variant, width: int):
        super().__init__()
        kernel = variant.spatial_attention_kernel
        inner = width // variant.spatial_attention_reduction
        self.spatial_att = nn.Sequential(
            nn.Conv2D(width, width, kernel, padding=kernel // 2, groups=width),
            nn.Conv2D(width, inner, 1),
            nn.GELU(),
            nn.Conv2D(inner, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * F.sigmoid(self.spatial_att(x))


class ChannelAttention(nn.Layer):
    """Option, off in the published variants: convolve the pooled channels along the channel axis, add."""

    def __init__(self, variant: Variant):
        super().__init__()
        first, second = variant.channel_attention_kernels
        self.channelConv1 = nn.Conv1D(1, 1, first, padding=first // 2)
        self.channelConv2 = nn.Conv1D(1, 1, second, padding=second // 2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.gelu(x).mean(axis=[2, 3]).unsqueeze(1)  # (B, 1, C)
        gate = self.channelConv2(F.gelu(self.channelConv1(pooled)))
        return x + gate.squeeze(1).unsqueeze([2, 3])


class DropPath(nn.Layer):
    """Stochastic depth: in training, drop the whole branch for an image with probability `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        # Drawn in float32: in a half type the rounding would change the probability.
        mask = paddle.floor(keep + paddle.rand([x.shape[0], 1, 1, 1], dtype="float32"))
        return x / keep * mask.astype(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def _initialize(layer: nn.Layer) -> None:
    """The authors' initialization; norms start at 1 and 0 by themselves."""
    zero = nn.initializer.Constant(0.0)
    if isinstance(layer, nn.Conv2D | nn.Conv1D):
        out, _, *kernel = layer.weight.shape
        area = 1
        for side in kernel:
            area *= side
        fan_out = area * out // layer._groups
        nn.initializer.Normal(std=(2 / fan_out) ** 0.5)(layer.weight)
        zero(layer.bias)
    elif isinstance(layer, nn.Linear):
        # The bounds are absolute, 100 standard deviations away: as in the authors' code.
        nn.initializer.TruncatedNormal(std=0.02, a=-2.0, b=2.0)(layer.weight)
        zero(layer.bias)
