"""FCViT in PaddlePaddle: the four stages, and the backbone that returns their outputs.

Ported from the paper (arXiv 2212.12552) and the behavior of the authors' PyTorch code (`models/fcvit.py`). The
parameter names are those of the authors. There are three differences: options are fields of the variant instead of
module-level dictionaries, BatchNorm statistics have Paddle's names (`_mean`, `_variance`), and Linear weights have
Paddle's layout ([in, out]).

Shapes: B images, C channels, H x W positions, h heads with d = C // h channels each.
"""

from fcvit.errors import UsageError
from fcvit.frameworks import import_framework
from fcvit.models.layers import SIMILARITY_EPS, ConvNorm, DropPath, LayerNorm2D, mean
from fcvit.models.maps import Recorder
from fcvit.models.variants import Variant

import_framework("paddle")  # hides warnings, and reports how to install it if it is missing

import paddle  # noqa: E402
import paddle.nn.functional as F  # noqa: E402
from paddle import Tensor, nn  # noqa: E402


class Stages(nn.Layer):
    """Stem and stages, shared by all networks, with the authors' names `patch_embed` and `network.0` to `network.6`.

    Raises:
        UsageError: If a rate is out of range.
    """

    def __init__(self, variant: Variant, drop_path_rate: float, drop_rate: float):
        super().__init__()
        for name, rate in (("drop_path_rate", drop_path_rate), ("drop_rate", drop_rate)):
            if not 0 <= rate < 1:
                raise UsageError(f"{name}: expected 0 <= rate < 1, not {rate}")
        self.variant = variant
        blocks = sum(variant.depths)
        drop_paths = iter([drop_path_rate * block / max(blocks - 1, 1) for block in range(blocks)])
        self.patch_embed = ConvNorm(3, variant.widths[0], kernel=7, stride=4)
        network: list[nn.Layer] = []
        for stage, (depth, width) in enumerate(zip(variant.depths, variant.widths, strict=True)):
            if stage:
                network.append(ConvNorm(variant.widths[stage - 1], width, kernel=3, stride=2))
            mlp_width = width * variant.mlp_ratios[stage]
            network.append(
                nn.Sequential(*(Block(variant, width, mlp_width, next(drop_paths), drop_rate) for _ in range(depth)))
            )
        self.network = nn.LayerList(network)

    def run_stages(self, x: Tensor, recorder: Recorder[Tensor] | None = None) -> list[Tensor]:
        """Return the raw outputs of the four stages: (B, widths[i], H / s, W / s), s = 4, 8, 16, 32, rounded up."""
        x = self.patch_embed(x)
        outputs = []
        for index, part in enumerate(self.network):
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


class FCViTBackbone(Stages):
    """The backbone for dense prediction. It returns four feature maps, each with its own norm.

    `model(x)` returns a list of (B, widths[i], H / s, W / s), s = 4, 8, 16, 32, rounded up.
    Source: the authors' `models/fcvit.py`, as used in their `detection/` and `segmentation/`.

    Args:
        variant: The architecture.
        drop_path_rate: Stochastic depth rate of the last block, 0 <= rate < 1. It grows linearly from 0.
        drop_rate: Dropout rate in the channel mixers, 0 <= rate < 1.

    Raises:
        UsageError: If a rate is out of range.
    """

    def __init__(self, variant: Variant, drop_path_rate: float = 0.0, drop_rate: float = 0.0):
        super().__init__(variant, drop_path_rate, drop_rate)
        for stage, width in enumerate(variant.widths):
            self.add_sublayer(f"norm{2 * stage}", LayerNorm2D(width))
        self.apply(initialize)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the four normalized stage outputs for normalized images (B, 3, H, W)."""
        norms = (self.norm0, self.norm2, self.norm4, self.norm6)
        # `to_static` does not support `zip` with `strict`.
        return [norms[level](stage) for level, stage in enumerate(self.run_stages(x))]


class Block(nn.Layer):
    """Token mixer and channel mixer, each a scaled residual branch after a norm. The shape stays (B, C, H, W)."""

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
    """Global context, depthwise convolution over positions and bottleneck over channels, twice.

    The shape stays (B, C, H, W).
    """

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
    """The mean over positions, passed through a bottleneck and weighted by its similarity with each position.

    These are the paper's token-global similarity and competitive bottleneck. The shape stays (B, C, H, W), or becomes
    (B, C, 1, 1) if the context is not weighted.
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
        """Return the standardized similarity of positions and context: (B, C, H, W), (B, C) -> (B, h, H, W)."""
        batch, width, height, across = x.shape
        x = x.reshape([batch, self.heads, width // self.heads, height * across])  # (B, h, d, H W)
        context = context.reshape([batch, self.heads, 1, width // self.heads])  # (B, h, 1, d)
        similarity = paddle.matmul(context, x).reshape([batch, self.heads, height, across])  # (B, h, H, W)
        similarity = similarity * (width // self.heads) ** -0.5
        # Standardize over heads and positions together, with the unbiased standard deviation.
        centered = similarity - mean(similarity, (1, 2, 3))
        count = self.heads * height * across
        # A single head at a single position equals its mean: the deviation and the similarity are 0.
        others = count - 1 if self.heads > 1 else max(count - 1, 1)
        variance = mean(centered * centered, (1, 2, 3)) * (count / others)
        return centered / (variance.sqrt() + SIMILARITY_EPS)

    def bottleneck(self, context: Tensor) -> Tensor:
        """Apply the bottleneck to the context: (B, C) -> (B, C)."""
        if not self.competition:
            return self.fc(context)
        first, second = self.fc1(context).chunk(2, axis=1)  # channel k competes with k + C // reduction
        return self.fc2(paddle.maximum(first, second))

    def forward(self, x: Tensor, recorder: Recorder[Tensor] | None = None) -> Tensor:
        batch, width, height, across = x.shape
        context = mean(x, (2, 3)).flatten(1)  # (B, C)
        value = self.bottleneck(context)
        if not self.weighted:
            return value.reshape([batch, width, 1, 1])
        similarity = self.similarity(x, context)
        weight = similarity * self.rescale_weight.reshape([1, -1, 1, 1]) + self.rescale_bias.reshape([1, -1, 1, 1])
        if recorder is not None:
            recorder.take(x, similarity, weight)
        value = value.reshape([batch, self.heads, width // self.heads, 1, 1])  # (B, h, d, 1, 1), times (B, h, 1, H, W)
        return (weight.unsqueeze(2) * value).reshape([batch, width, height, across])


class ChannelMixer(nn.Layer):
    """An MLP over channels with `mlp_width` hidden units and a depthwise convolution. The shape stays (B, C, H, W)."""

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
    """Optional, off in the published variants: multiply each value by a mask computed from its neighborhood."""

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
    """Optional, off in the published variants: add the pooled channels, convolved along the channel axis."""

    def __init__(self, variant: Variant):
        super().__init__()
        first, second = variant.channel_attention_kernels
        self.channelConv1 = nn.Conv1D(1, 1, first, padding=first // 2)
        self.channelConv2 = nn.Conv1D(1, 1, second, padding=second // 2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.gelu(x).mean(axis=[2, 3]).unsqueeze(1)  # (B, 1, C)
        gate = self.channelConv2(F.gelu(self.channelConv1(pooled)))
        return x + gate.squeeze(1).unsqueeze([2, 3])  # (B, C, 1, 1)


def initialize(layer: nn.Layer) -> None:
    """Initialize a layer as the authors' code does. The weights and biases of norms are already 1 and 0."""
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
        # The bounds are absolute values, 100 standard deviations from 0, as in the authors' code.
        nn.initializer.TruncatedNormal(std=0.02, a=-2.0, b=2.0)(layer.weight)
        zero(layer.bias)
