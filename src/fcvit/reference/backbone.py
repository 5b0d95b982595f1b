"""FCViT in PyTorch, the reference for all checks: the four stages and the backbone, with the authors' names.

It loads the authors' checkpoints with `strict=True` and does not need their dependencies from 2021. It was written
from the paper and the behavior of the authors' code, not from the Paddle networks in `fcvit.models`. It must
reproduce the authors' outputs independently, because a copy would verify nothing. Only the modules in this folder
import PyTorch when they are imported.

Shapes: B images, C channels, H x W positions, h heads with d = C // h channels each.
"""

from fcvit.frameworks import import_framework
from fcvit.models.maps import Recorder
from fcvit.models.variants import Variant

import_framework("torch")  # reports how to install it if it is missing

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402


class FCViTBackbone(nn.Module):
    """The backbone for dense prediction: four feature maps, normalized by `norm0`, `norm2`, `norm4` and `norm6`."""

    def __init__(self, variant: Variant, drop_path_rate: float = 0.0, drop_rate: float = 0.0):
        super().__init__()
        self.variant = variant
        self.patch_embed, self.network = trunk(variant, drop_path_rate, drop_rate)
        self.norm0, self.norm2, self.norm4, self.norm6 = map(layer_norm, variant.widths)
        self.apply(initialize)

    def forward(self, x: Tensor) -> list[Tensor]:
        stage0, stage2, stage4, stage6 = run_stages(self.patch_embed(x), self.network)
        return [self.norm0(stage0), self.norm2(stage2), self.norm4(stage4), self.norm6(stage6)]


def trunk(variant: Variant, drop_path_rate: float, drop_rate: float) -> tuple[nn.Module, nn.ModuleList]:
    """Build the stem and the seven modules of `network`: stages at even and downsampling at odd indices."""
    rates = torch.linspace(0, drop_path_rate, sum(variant.depths), dtype=torch.float64).tolist()
    parts: list[nn.Module] = []
    for stage, depth in enumerate(variant.depths):
        if stage:
            parts.append(Downsample(variant.widths[stage - 1], variant.widths[stage], size=3, stride=2))
        parts.append(nn.Sequential(*[Block(variant, stage, rates.pop(0), drop_rate) for _ in range(depth)]))
    return Downsample(3, variant.widths[0], size=7, stride=4), nn.ModuleList(parts)


def run_stages(x: Tensor, network: nn.ModuleList, recorder: Recorder[Tensor] | None = None) -> list[Tensor]:
    outputs = []
    for part in network:
        if not isinstance(part, nn.Sequential):
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


def layer_norm(width: int) -> nn.GroupNorm:
    """Build the authors' "layer norm", which normalizes over channels and positions together."""
    return nn.GroupNorm(1, width)


def depthwise(width: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, size, padding=size // 2, groups=width)


class Downsample(nn.Module):
    """Stem or downsampling with BatchNorm: (B, C, H, W) -> (B, C', H / stride, W / stride), rounded up."""

    def __init__(self, width_in: int, width_out: int, size: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(width_in, width_out, size, stride, size // 2)
        self.norm = nn.BatchNorm2d(width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class Block(nn.Module):
    """Two residual branches, token mixer and channel mixer. The shape stays (B, C, H, W)."""

    def __init__(self, variant: Variant, stage: int, drop_path: float, drop_rate: float):
        super().__init__()
        width = variant.widths[stage]
        self.norm1 = layer_norm(width)
        self.token_mixer = TokenMixer(variant, width)
        self.norm2 = layer_norm(width)
        self.channel_mixer = ChannelMixer(variant, width, width * variant.mlp_ratios[stage], drop_rate)
        self.drop_path = drop_path
        if variant.layer_scale is None:
            self.layer_scale_1 = self.layer_scale_2 = None
        else:
            self.layer_scale_1 = nn.Parameter(torch.full((width,), variant.layer_scale))
            self.layer_scale_2 = nn.Parameter(torch.full((width,), variant.layer_scale))

    def branch(self, x: Tensor, scale: nn.Parameter | None) -> Tensor:
        """Apply layer scale, then stochastic depth."""
        if scale is not None:
            x = x * scale[:, None, None]
        if self.training and self.drop_path > 0:
            keep = 1 - self.drop_path
            x = x * x.new_empty(len(x), 1, 1, 1).bernoulli_(keep) / keep
        return x

    def forward(self, x: Tensor, recorder: Recorder[Tensor] | None = None) -> Tensor:
        x = x + self.branch(self.token_mixer(self.norm1(x), recorder), self.layer_scale_1)
        return x + self.branch(self.channel_mixer(self.norm2(x)), self.layer_scale_2)


class TokenMixer(nn.Module):
    """Global context, depthwise convolution and bottleneck, once or twice. The shape stays (B, C, H, W)."""

    def __init__(self, variant: Variant, width: int):
        super().__init__()

        def context() -> nn.Module:
            return GlobalContext(variant, width) if variant.global_context else NoContext()

        def pointwise() -> nn.Module:
            inner = variant.token_width(width)
            if inner is None:
                return nn.Conv2d(width, width, 1)
            return nn.Sequential(nn.Conv2d(width, inner, 1), nn.GELU(), nn.Conv2d(inner, width, 1))

        self.gc1, self.dw1, self.fc1 = context(), depthwise(width, variant.kernel_sizes[0]), pointwise()
        self.second_mix = variant.second_mix
        if self.second_mix:
            self.gc2, self.dw2, self.fc2 = context(), depthwise(width, variant.kernel_sizes[1]), pointwise()
        self.spatial_att = SpatialAttention(variant, width) if variant.spatial_attention else nn.Identity()

    def forward(self, x: Tensor, recorder: Recorder[Tensor] | None = None) -> Tensor:
        x = F.gelu(self.fc1(self.dw1(x + self.gc1(x, recorder))))
        if self.second_mix:
            x = F.gelu(self.fc2(self.dw2(x + self.gc2(x, recorder))))
        return self.spatial_att(x)


class NoContext(nn.Module):
    """A disabled global context, which adds nothing and has no parameters."""

    def forward(self, x: Tensor, recorder: Recorder[Tensor] | None = None) -> float:
        return 0.0


class GlobalContext(nn.Module):
    """Global context: the bottleneck of the mean over positions, weighted by its similarity with each position.

    The shape stays (B, C, H, W), or becomes (B, C, 1, 1) if the context is not weighted.
    """

    def __init__(self, variant: Variant, width: int):
        super().__init__()
        self.variant = variant
        inner = width // variant.reduction
        if variant.weighted_context:
            self.rescale_weight = nn.Parameter(torch.ones(variant.heads))
            self.rescale_bias = nn.Parameter(torch.zeros(variant.heads))
        if variant.competition:
            self.fc1 = nn.Linear(width, 2 * inner)
            self.fc2 = nn.Linear(inner, width)
        else:
            self.fc = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, x: Tensor, recorder: Recorder[Tensor] | None = None) -> Tensor:
        context = x.mean((-2, -1))  # (B, C)
        if self.variant.competition:
            value = self.fc2(
                self.fc1(context).unflatten(1, (2, -1)).amax(1)
            )  # maximum over axis 1 of (B, 2, C // reduction)
        else:
            value = self.fc(context)
        value = value[:, :, None, None]  # (B, C, 1, 1)
        if not self.variant.weighted_context:
            return value
        heads = (self.variant.heads, -1)
        per_head = (x * context[:, :, None, None]).unflatten(1, heads).sum(2)  # (B, h, H, W)
        similarity = per_head / (x.shape[1] // self.variant.heads) ** 0.5
        correction = 1 if similarity[0].numel() > 1 else 0  # a single value would give 0 / 0
        deviation, mean = torch.std_mean(similarity, (1, 2, 3), correction=correction, keepdim=True)
        standardized = (similarity - mean) / (deviation + 1e-5)
        rescaled = standardized * self.rescale_weight[:, None, None] + self.rescale_bias[:, None, None]
        if recorder is not None:
            recorder.take(x, standardized, rescaled)
        return (rescaled[:, :, None] * value.unflatten(1, heads)).flatten(1, 2)  # (B, h, d, H, W) -> (B, C, H, W)


class ChannelMixer(nn.Module):
    """The MLP over channels with a depthwise convolution. The shape stays (B, C, H, W)."""

    def __init__(self, variant: Variant, width: int, mlp_width: int, drop_rate: float):
        super().__init__()
        self.fc1 = nn.Conv2d(width, mlp_width, 1)
        self.dwconv = depthwise(mlp_width, variant.channel_kernel) if variant.channel_dwconv else nn.Identity()
        self.fc2 = nn.Conv2d(mlp_width, width, 1)
        self.drop = nn.Dropout(drop_rate)
        self.channel_att = ChannelAttention(variant) if variant.channel_attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.gelu(self.dwconv(self.fc1(x))))
        return self.channel_att(self.drop(self.fc2(x)))


class SpatialAttention(nn.Module):
    """Optional: multiply by a sigmoid mask over positions and channels. The shape stays (B, C, H, W)."""

    def __init__(self, variant: Variant, width: int):
        super().__init__()
        inner = width // variant.spatial_attention_reduction
        self.spatial_att = nn.Sequential(
            depthwise(width, variant.spatial_attention_kernel),
            nn.Conv2d(width, inner, 1),
            nn.GELU(),
            nn.Conv2d(inner, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.spatial_att(x).sigmoid()


class ChannelAttention(nn.Module):
    """Optional: add the pooled channels, convolved along the channel axis. The shape stays (B, C, H, W)."""

    def __init__(self, variant: Variant):
        super().__init__()
        first, second = variant.channel_attention_kernels
        self.channelConv1 = nn.Conv1d(1, 1, first, padding=first // 2)
        self.channelConv2 = nn.Conv1d(1, 1, second, padding=second // 2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.gelu(x).mean((-2, -1)).unsqueeze(1)  # (B, 1, C)
        offset = self.channelConv2(F.gelu(self.channelConv1(pooled)))
        return x + offset.squeeze(1)[:, :, None, None]  # (B, C, 1, 1)


def initialize(module: nn.Module) -> None:
    """Initialize a layer as the authors' code does. The weights and biases of norms are already 1 and 0."""
    if isinstance(module, nn.Conv2d | nn.Conv1d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
