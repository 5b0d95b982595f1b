"""Data classes for the token-global similarity that `model.similarity(x)` returns in both frameworks.

At every position and for each head, the network computes the similarity of the position with the mean of all
positions (section 3 and Figure 3 of the paper, `GlobalContext` in the authors' `models/fcvit.py`). The similarity is
standardized over heads and positions, then scaled and shifted per head. Each block does this twice.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from fcvit.errors import UsageError
from fcvit.models.variants import Variant

U = TypeVar("U")
T = TypeVar("T")  # a tensor of either framework, or an array


@dataclasses.dataclass(frozen=True)
class SimilarityMap(Generic[T]):
    """The similarity in one global context.

    Attributes:
        stage: Stage, from 1 to 4.
        block: Block within the stage, from 1.
        context: 1 for the first or 2 for the second global context of the block.
        standardized: Similarity, (B, heads, H, W), with mean 0 and standard deviation 1 over heads and positions.
        rescaled: Similarity after the scale and shift of each head. The context is multiplied by this map.
        tokens: Input of the global context, (B, C, H, W), or None if it was not requested.
    """

    stage: int
    block: int
    context: int
    standardized: T
    rescaled: T
    tokens: T | None = None

    @property
    def name(self) -> str:
        return f"stage{self.stage}.block{self.block}.context{self.context}"

    def map(self, change: Callable[[T], U]) -> "SimilarityMap[U]":
        """Return a copy with `change` applied to every tensor."""
        tokens = None if self.tokens is None else change(self.tokens)
        position = self.stage, self.block, self.context
        return SimilarityMap(*position, change(self.standardized), change(self.rescaled), tokens)


@dataclasses.dataclass(frozen=True)
class Similarity(Generic[T]):
    """The output of a forward pass and its similarity maps.

    Attributes:
        output: Output of `model(x)`.
        maps: Maps of all global contexts, in the order of the forward pass.
    """

    output: T
    maps: Sequence[SimilarityMap[T]]

    def __iter__(self) -> Iterator[SimilarityMap[T]]:
        return iter(self.maps)

    def at(self, stage: int = -1, block: int = -1, context: int = -1) -> SimilarityMap[T]:
        """Return one map. Numbers count from 1, or from the end with -1. The default is the last map.

        Raises:
            UsageError: If the map does not exist.
        """
        known = [(item.stage, item.block, item.context) for item in self.maps]
        return self.maps[known.index(choose(known, stage, block, context))]


Place = tuple[int, int, int]  # stage, block and context of a map, from 1


def places(variant: Variant) -> list[Place]:
    """Return the stage, block and context of every map of the variant, in the order of the forward pass.

    Raises:
        UsageError: If the variant has no maps.
    """
    require_maps(variant)
    contexts = range(1, 3 if variant.second_mix else 2)
    stages = enumerate(variant.depths, 1)
    return [(stage, block, index) for stage, depth in stages for block in range(1, depth + 1) for index in contexts]


def choose(known: Sequence[Place], stage: int = -1, block: int = -1, context: int = -1) -> Place:
    """Return the selected map of `known`. Numbers count from 1, or from the end with -1.

    Raises:
        UsageError: If the map does not exist.
    """
    for axis, (name, number) in enumerate((("stage", stage), ("block", block), ("context", context))):
        numbers = sorted({position[axis] for position in known})
        chosen = numbers[number] if -len(numbers) <= number < 0 else number
        if chosen not in numbers:
            choice = f"1 to {numbers[-1]}, or from the end -1 to {-len(numbers)}"
            raise UsageError(f"{name} {number}: expected {choice if len(numbers) > 1 else '1, the only value'}")
        known = [position for position in known if position[axis] == chosen]
    return known[0]


def short(name: str) -> str:
    """Shorten a map's name: "stage3.block2.context1" -> "3.2.1"."""
    return name.replace("stage", "").replace("block", "").replace("context", "")


def require_maps(variant: Variant) -> None:
    """Raise a UsageError if the network computes no similarity maps."""
    if not variant.global_context or not variant.weighted_context:
        off = "global_context" if not variant.global_context else "weighted_context"
        raise UsageError(f"{variant.name} has no similarity maps, because its option {off} is off")


class Recorder(Generic[T]):
    """Collect the similarity maps of one forward pass. The network reports each stage and block that it enters.

    Args:
        tokens: Whether to keep the inputs of the global contexts, too. They need as much memory as a training pass.
    """

    def __init__(self, tokens: bool = False) -> None:
        self.tokens = tokens
        self.maps: list[SimilarityMap[T]] = []
        self.stage = self.block = self.context = 0

    def enter_stage(self) -> None:
        self.stage, self.block = self.stage + 1, 0

    def enter_block(self) -> None:
        self.block, self.context = self.block + 1, 0

    def take(self, tokens: T, standardized: T, rescaled: T) -> None:
        self.context += 1
        position = self.stage, self.block, self.context
        self.maps.append(SimilarityMap(*position, standardized, rescaled, tokens if self.tokens else None))
