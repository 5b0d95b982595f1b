"""The FCViT classifier in PyTorch, built on the stages of the reference."""

from fcvit.errors import UsageError
from fcvit.frameworks import import_framework
from fcvit.models.maps import Recorder, Similarity, require_maps
from fcvit.models.variants import IMAGENET_CLASSES, Variant
from fcvit.reference.backbone import initialize, layer_norm, run_stages, trunk

import_framework("torch")  # reports how to install it if it is missing

from torch import Tensor, nn  # noqa: E402


class FCViT(nn.Module):
    """The classifier: (B, 3, H, W) -> (B, num_classes) logits, or pooled embeddings with 0 classes.

    Args:
        variant: The architecture.
        num_classes: Number of logits per image. 0 removes the head.
        drop_path_rate: Stochastic depth rate of the last block. It grows linearly from 0.
        drop_rate: Dropout rate in the channel mixers.
    """

    def __init__(
        self, variant: Variant, num_classes: int = IMAGENET_CLASSES, drop_path_rate: float = 0.0, drop_rate: float = 0.0
    ):
        super().__init__()
        self.variant = variant
        self.patch_embed, self.network = trunk(variant, drop_path_rate, drop_rate)
        self.norm = layer_norm(variant.widths[-1])
        if num_classes < 0:
            raise UsageError(f"num_classes: expected a whole number of 0 or more, not {num_classes!r}")
        self.head = nn.Linear(variant.widths[-1], num_classes) if num_classes else nn.Identity()
        self.apply(initialize)

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the raw outputs of the four stages."""
        return run_stages(self.patch_embed(x), self.network)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))

    def similarity(self, x: Tensor, tokens: bool = False) -> Similarity[Tensor]:
        """Run a forward pass and return its output and similarity maps, like the Paddle classifier's method."""
        require_maps(self.variant)
        recorder: Recorder[Tensor] = Recorder(tokens)
        output = self.classify(run_stages(self.patch_embed(x), self.network, recorder))
        return Similarity(output, tuple(recorder.maps))

    def classify(self, stages: list[Tensor]) -> Tensor:
        return self.head(self.norm(stages[-1]).mean((-2, -1)))
