"""The FCViT classifier in PaddlePaddle: stages, a norm, the mean over positions and a linear head."""

import operator
from typing import SupportsIndex

from fcvit.errors import UsageError
from fcvit.frameworks import import_framework
from fcvit.models.backbone import Stages, initialize
from fcvit.models.layers import LayerNorm2D, mean
from fcvit.models.maps import Recorder, Similarity, require_maps
from fcvit.models.variants import IMAGENET_CLASSES, Variant

import_framework("paddle")  # quietly, or with the remedy where it is missing

from paddle import Tensor, nn  # noqa: E402


class FCViT(Stages):
    """The classifier: `model(x)` takes (B, 3, H, W), H and W from 32 up, and gives logits.

    Args:
        variant: the architecture.
        num_classes: logits per image; 0: no head, `model(x)` gives pooled embeddings.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0; 0 <= rate < 1.
        drop_rate: dropout in the channel mixers; 0 <= rate < 1.

    Raises:
        UsageError: a rate or class count out of range.
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
        """Run a forward pass that keeps the token-global similarity of every global context (see `fcvit.models.maps`).

        The maps are those that the pass itself computes and uses. Gradients as in `model(x)`.

        Args:
            x: (B, 3, H, W), normalized.
            tokens: keep what each context is taken of, too.

        Raises:
            UsageError: the variant has no weighted global context.
        """
        require_maps(self.variant)
        recorder: Recorder[Tensor] = Recorder(tokens)
        output = self._classify(self.run_stages(x, recorder)[-1])
        return Similarity(output, tuple(recorder.maps))

    def _classify(self, x: Tensor) -> Tensor:
        x = mean(self.norm(x), (2, 3)).flatten(1)  # (B, C, H, W) -> (B, C)
        return x if self.head is None else self.head(x)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one of `num_classes` outputs; 0 removes it."""
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
        raise UsageError(f"num_classes: expected a whole number from 0, not {num_classes!r}")
    return count
