"""Token-global similarity as data: what `model.similarity(x)` hands out, the same for both frameworks.

At every position, for each head, the network computes how similar the position is to the mean of all
positions (the paper's section 3, Figure 3; the authors' `GlobalContext` in `models/fcvit.py`), standardised over
heads and positions, then scaled and shifted per head. It does so twice in a block.
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
    """The similarity of one global context.

    Attributes:
        stage: 1 to 4.
        block: from 1, within its stage.
        context: 1 or 2, the first or second global context of the block.
        standardised: (B, heads, H, W), mean 0 and standard deviation 1 over heads and positions of an image.
        rescaled: the same after each head's scale and shift: what multiplies the context.
        tokens: (B, C, H, W), what is compared with its mean; None where they were not asked for.
    """

    stage: int
    block: int
    context: int
    standardised: T
    rescaled: T
    tokens: T | None = None

    @property
    def name(self) -> str:
        return f"stage{self.stage}.block{self.block}.context{self.context}"

    def map(self, change: Callable[[T], U]) -> "SimilarityMap[U]":
        """Return the same map with other tensors."""
        tokens = None if self.tokens is None else change(self.tokens)
        place = self.stage, self.block, self.context
        return SimilarityMap(*place, change(self.standardised), change(self.rescaled), tokens)


@dataclasses.dataclass(frozen=True)
class Similarity(Generic[T]):
    """The output of a forward pass with its maps.

    Attributes:
        output: what `model(x)` gives.
        maps: of every global context, in the order of the pass.
    """

    output: T
    maps: Sequence[SimilarityMap[T]]

    def __iter__(self) -> Iterator[SimilarityMap[T]]:
        return iter(self.maps)

    def at(self, stage: int = -1, block: int = -1, context: int = -1) -> SimilarityMap[T]:
        """Return one map; numbers from 1, or from the end with -1 (the default is the last of all).

        Raises:
            UsageError: there is no such one.
        """
        known = [(one.stage, one.block, one.context) for one in self.maps]
        return self.maps[known.index(choose(known, stage, block, context))]


Place = tuple[int, int, int]  # stage, block and context of a map, from 1


def places(variant: Variant) -> list[Place]:
    """Return the place of every map of the variant, in the order of the pass.

    Raises:
        UsageError: it has none.
    """
    require_maps(variant)
    contexts = range(1, 3 if variant.second_mix else 2)
    stages = enumerate(variant.depths, 1)
    return [(stage, block, one) for stage, depth in stages for block in range(1, depth + 1) for one in contexts]


def choose(known: Sequence[Place], stage: int = -1, block: int = -1, context: int = -1) -> Place:
    """Return one of the places; numbers from 1, or from the end with -1.

    Raises:
        UsageError: there is no such one.
    """
    for axis, (what, number) in enumerate((("stage", stage), ("block", block), ("context", context))):
        numbers = sorted({place[axis] for place in known})
        chosen = numbers[number] if -len(numbers) <= number < 0 else number
        if chosen not in numbers:
            choice = f"1 to {numbers[-1]}, or from the end -1 to {-len(numbers)}"
            raise UsageError(f"{what} {number}: expected {choice if len(numbers) > 1 else '1, the only one'}")
        known = [place for place in known if place[axis] == chosen]
    return known[0]


def short(name: str) -> str:
    """Shorten a map's name: "stage3.block2.context1" -> "3.2.1"."""
    return name.replace("stage", "").replace("block", "").replace("context", "")


def require_maps(variant: Variant) -> None:
    """Raise a UsageError where the network computes no similarities."""
    if not variant.global_context or not variant.weighted_context:
        off = "global_context" if not variant.global_context else "weighted_context"
        raise UsageError(f"{variant.name} has no similarity maps: {off} is off")


class Recorder(Generic[T]):
    """Take the maps of one forward pass as they are computed; what it is told says where the pass is.

    Args:
        tokens: keep them too, which takes as much memory as the pass of a network in training.
    """

    def __init__(self, tokens: bool = False) -> None:
        self.tokens = tokens
        self.maps: list[SimilarityMap[T]] = []
        self.stage = self.block = self.context = 0

    def enter_stage(self) -> None:
        self.stage, self.block = self.stage + 1, 0

    def enter_block(self) -> None:
        self.block, self.context = self.block + 1, 0

    def take(self, tokens: T, standardised: T, rescaled: T) -> None:
        self.context += 1
        place = self.stage, self.block, self.context
        self.maps.append(SimilarityMap(*place, standardised, rescaled, tokens if self.tokens else None))
