"""The input and the outputs of a network."""

import dataclasses
from typing import Any

from fcvit.errors import UsageError
from fcvit.models.spec import ModelSpec
from fcvit.models.variants import Preprocessing


@dataclasses.dataclass(frozen=True)
class Interface:
    """The input and output of an exported network.

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
    """Return the names of the outputs, with `probabilities` in the place of the logits.

    Raises:
        UsageError: probabilities of a network without classes.
    """
    names = list(spec.outputs())
    if not probabilities:
        return names
    if names != ["logits"]:
        raise UsageError(f"probabilities: {spec} has no classes")
    return ["probabilities"]


def as_list(outputs: Any) -> list[Any]:
    """Return the outputs of a network as a list, also where it has only one."""
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]
