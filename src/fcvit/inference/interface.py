"""What goes into an exported network and what comes out."""

import dataclasses

from fcvit.errors import UsageError
from fcvit.models.spec import Form
from fcvit.models.variants import Preprocessing


@dataclasses.dataclass(frozen=True)
class Interface:
    """What goes in and comes out.

    Attributes:
        size: height and width in pixels; None: any.
        uint8: take uint8 RGB and normalise inside; else float32, normalised.
        probabilities: give the softmax of the logits.
        preprocessing: mean and standard deviation of the normalisation.

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


def output_names(form: Form, probabilities: bool = False) -> list[str]:
    """Names of the outputs: logits or probabilities, embeddings without a head, four maps of a dense backbone.

    Raises:
        UsageError: probabilities of a network without classes.
    """
    if probabilities and (form.dense or not form.num_classes):
        raise UsageError(f"probabilities: {form} has no classes")
    if form.dense:
        return [f"features.{stage}" for stage in range(4)]
    if not form.num_classes:
        return ["embeddings"]
    return ["probabilities" if probabilities else "logits"]
