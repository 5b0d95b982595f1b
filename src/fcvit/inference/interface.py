"""Describe the input and the outputs of a network."""

import dataclasses
from typing import Any

from fcvit.errors import UsageError
from fcvit.models.spec import ModelSpec
from fcvit.models.variants import Preprocessing


@dataclasses.dataclass(frozen=True)
class Interface:
    """The input and output of an exported network.

    Attributes:
        size: Height and width in pixels, or None for any size.
        uint8: True if the network takes uint8 RGB and normalizes it, False if it takes normalized float32.
        probabilities: True if the network returns the softmax of the logits.
        preprocessing: Mean and standard deviation of the normalization.

    Raises:
        UsageError: The size is below 1.
    """

    size: tuple[int, int] | None
    uint8: bool
    probabilities: bool
    preprocessing: Preprocessing

    def __post_init__(self) -> None:
        if self.size is not None and min(self.size) < 1:
            raise UsageError(f"image size {self.size}: expected at least 1 pixel")


def output_names(spec: ModelSpec, probabilities: bool = False) -> list[str]:
    """Return the names of the outputs. With `probabilities`, "probabilities" replaces "logits".

    Raises:
        UsageError: Probabilities are requested for a network without classes.
    """
    names = list(spec.outputs())
    if not probabilities:
        return names
    if names != ["logits"]:
        raise UsageError(f"probabilities need a classifier: {spec} has no classes")
    return ["probabilities"]


def as_list(outputs: Any) -> list[Any]:
    """Return the outputs of a network as a list, even if there is only one."""
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]
