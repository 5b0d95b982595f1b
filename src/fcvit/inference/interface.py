"""Describe the input and the outputs of a network."""

import dataclasses
from typing import Any

from fcvit.errors import UsageError
from fcvit.inference.detector import BINS, part_outputs
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
        part: A part of a detector (see `fcvit.inference.parts`), or "" for a network that is exported as one graph.

    Raises:
        UsageError: The size is below 1.
    """

    size: tuple[int, int] | None
    uint8: bool
    probabilities: bool
    preprocessing: Preprocessing
    part: str = ""

    def __post_init__(self) -> None:
        if self.size is not None and min(self.size) < 1:
            raise UsageError(f"image size {self.size}: expected at least 1 pixel")


def input_shape(spec: ModelSpec, interface: Interface) -> tuple[str, tuple[int | None, ...]]:
    """Return the name of the input and its shape without the batch dimension. None means any length."""
    if interface.part in BINS:
        return "features", (spec.options.neck, BINS[interface.part], BINS[interface.part])
    return "images", (3, *(interface.size or (None, None)))


def output_shapes(spec: ModelSpec, interface: Interface) -> dict[str, tuple[int | None, ...]]:
    """Return the name of each output and its shape without the batch dimension. None means any length.

    Raises:
        UsageError: Probabilities are requested for a network without classes.
    """
    # Any length depends on the size of the images, and is therefore different in the second size.
    small, large = (part_outputs(spec, interface.part, *(interface.size or (side, side))) for side in (64, 128))
    shapes = {
        name: tuple(one if one == other else None for one, other in zip(shape, large[name], strict=True))
        for name, shape in small.items()
    }
    if not interface.probabilities:
        return shapes
    if list(shapes) != ["logits"] or interface.part:
        raise UsageError(f"probabilities need a classifier: {spec} has no classes")
    return {"probabilities": shapes["logits"]}


def as_list(outputs: Any) -> list[Any]:
    """Return the outputs of a network as a list, even if there is only one."""
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]
