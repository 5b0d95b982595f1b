"""Named preprocessing protocols of an evaluation.

Preprocessing explains the lower accuracy of the earlier Paddle port, which used Resize(256, bilinear) for all variants.
Its accuracy is 0.4 points lower than the authors' for a crop fraction of 0.90, and 1.0 points lower for 0.95.
"""

import dataclasses
from collections.abc import Mapping

from fcvit.errors import UsageError
from fcvit.models.variants import (
    RESIZE256_BILINEAR,
    Preprocessing,
    Variant,
)

AUTHORS, RESIZE256, BOTH, CUSTOM = "authors", "resize256-bilinear", "both", "custom"
PROTOCOLS = (AUTHORS, RESIZE256, BOTH)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A named preprocessing.

    Attributes:
        name: "authors" (the preprocessing of the variant), "resize256-bilinear", or "custom".
        preprocessing: Preprocessing of the images.
        changed: For "custom", the fields that differ from the variant: (value of the variant, value used).
    """

    name: str
    preprocessing: Preprocessing
    changed: Mapping[str, tuple[object, object]]


def protocols(name: str, resolved: Preprocessing, variant: Variant) -> list[Protocol]:
    """Return the protocols for a name. "authors" returns `resolved`, named "custom" if it differs from the variant's.

    Args:
        name: An element of `PROTOCOLS`.
        resolved: Preprocessing of the weights (see `resolve_preprocessing`). All protocols use its mean and standard
            deviation.
        variant: Variant with the authors' preprocessing.

    Raises:
        UsageError: The name is unknown.
    """
    if name not in PROTOCOLS:
        raise UsageError(f"--protocol {name!r}: expected {', '.join(PROTOCOLS)}")
    own, theirs = dataclasses.asdict(resolved), dataclasses.asdict(variant.preprocessing)
    changed = {field: (theirs[field], own[field]) for field in own if own[field] != theirs[field]}
    first = Protocol(CUSTOM if changed else AUTHORS, resolved, changed)
    fixed = dataclasses.replace(RESIZE256_BILINEAR, mean=resolved.mean, std=resolved.std)
    second = Protocol(RESIZE256, fixed, {})
    return {AUTHORS: [first], RESIZE256: [second], BOTH: [first, second]}[name]
