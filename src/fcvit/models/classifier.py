"""The FCViT classifier in PaddlePaddle: stages, a norm, the mean over positions and a linear head."""

import operator
from typing import SupportsIndex

from fcvit.errors import UsageError
from fcvit.frameworks import import_framework
from fcvit.models.backbone import Stages, initialize
from fcvit.models.layers import LayerNorm2D, mean
from fcvit.models.maps import Recorder, Similarity, require_maps
from fcvit.models.variants import IMAGENET_CLASSES, Variant

import_framework("paddle")  # hides warnings, and reports how to install it if it is missing

from paddle import Tensor, nn  # noqa: E402


class FCViT(Stages):
    """The classifier. `model(x)` returns logits for images (B, 3, H, W) with H and W of at least 32.

    Args:
        variant: The architecture.
        num_classes: Number of logits per image. 0 removes the head, and `model(x)` returns pooled embeddings.
        drop_path_rate: Stochastic depth rate of the last block, 0 <= rate < 1. It grows linearly from 0.
        drop_rate: Dropout rate in the channel mixers, 0 <= rate < 1.

    Raises:
        UsageError: If a rate or the number of classes is out of range.
    """

    def __init__(
        self, variant: Variant, num_classes: int = IMAGENET_CLASSES, drop_path_rate: float = 0.0, drop_rate: float = 0.0
    ):
        super().__init__(variant, drop_path_rate, drop_rate)
        self.norm = LayerNorm2D(variant.widths[-1])
        self.reset_classifier(num_classes)
        self.apply(initialize)

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the raw outputs of the four stages: (B, widths[i], H / s, W / s), s = 4, 8, 16, 32, rounded up."""
        return self.run_stages(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classify normalized images: (B, 3, H, W) -> (B, num_classes) logits, or (B, widths[3]) without a head."""
        return self._classify(self.features(x)[-1])

    def similarity(self, x: Tensor, tokens: bool = False) -> Similarity[Tensor]:
        """Run a forward pass and return its output with the token-global similarity of every global context.

        The maps are the values that the pass computes and uses (see `fcvit.models.maps`). Gradients are the same as for
        `model(x)`.

        Args:
            x: Normalized images, (B, 3, H, W).
            tokens: Whether to keep the input of each global context, too.

        Raises:
            UsageError: If the variant has no weighted global context.
        """
        require_maps(self.variant)
        recorder: Recorder[Tensor] = Recorder(tokens)
        output = self._classify(self.run_stages(x, recorder)[-1])
        return Similarity(output, tuple(recorder.maps))

    def _classify(self, x: Tensor) -> Tensor:
        x = mean(self.norm(x), (2, 3)).flatten(1)  # (B, C, H, W) -> (B, C)
        return x if self.head is None else self.head(x)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head with a newly initialized head of `num_classes` outputs. 0 removes the head."""
        self.num_classes = _class_count(num_classes)
        self.head = nn.Linear(self.variant.widths[-1], self.num_classes) if self.num_classes else None
        if self.head is not None:
            initialize(self.head)
            self.head.to(dtype=self.norm.weight.dtype)


def _class_count(num_classes: SupportsIndex) -> int:
    try:
        count = -1 if isinstance(num_classes, bool) else operator.index(num_classes)
    except TypeError:
        count = -1
    if count < 0:
        raise UsageError(f"num_classes: expected a whole number of 0 or more, not {num_classes!r}")
    return count
