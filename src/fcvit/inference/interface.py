"""What goes into an exported network and what comes out."""

import dataclasses

from fcvit.errors import UsageError
from fcvit.models.spec import ModelSpec
from fcvit.models.variants import Preprocessing


@dataclasses.dataclass(frozen=True)
class Interface:
    """What goes in and comes out.

    Attributes:
        size: height and width in pixels; None: any.
        uint8: take uint8 RGB and normalize inside; else float32, normalized.
        probabilities: give the softmax of the logits.
        preprocessing: mean and standard deviation of the normalization.

    Raises:
        UsageError: a size below 1.
    """

    size: tuple[int, int] | None
    uint8: bool
    probabilities: bool
    preprocessing: Preprocessing

    def __post_init__(self) -> None:
        if self.size is not None and min(self.size) < 1:
            raise UsageError(f"image size {self.size}: expected at least 1 pixel")


def output_names(spec: ModelSpec, probabilities: bool = False) -> list[str]:
    """Names of the outputs: logits or probabilities, embeddings without a head, four maps of a dense backbone.

    Raises:
        UsageError: probabilities of a network without classes.
    """
    if probabilities and (spec.dense or not spec.num_classes):
        raise UsageError(f"probabilities: {spec} has no classes")
    if spec.dense:
        return [f"features.{stage}" for stage in range(4)]
    if not spec.num_classes:
        return ["embeddings"]
    return ["probabilities" if probabilities else "logits"]
