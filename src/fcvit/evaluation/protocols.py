"""Named preprocessings of evaluations.

Preprocessing explains what the earlier Paddle port lost. Its figures lie 0.4 points under the authors'
where their crop fraction is 0.90 and 1.0 where it is 0.95, with Resize(256, bilinear) for all.
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
        name: "authors" (what belongs to the variant), "resize256-bilinear", or "custom".
        preprocessing: what it is.
        changed: for "custom", each field that is not the variant's: (variant's, this one's).
    """

    name: str
    preprocessing: Preprocessing
    changed: Mapping[str, tuple[object, object]]


def protocols(name: str, resolved: Preprocessing, variant: Variant) -> list[Protocol]:
    """Return the protocols of that name; "authors" is what was resolved for the weights, by its true name.

    Args:
        name: one of `PROTOCOLS`.
        resolved: see `resolve_preprocessing`; its mean and standard deviation stay.

    Raises:
        UsageError: no such protocol.
    """
    if name not in PROTOCOLS:
        raise UsageError(f"--protocol {name!r}: expected {', '.join(PROTOCOLS)}")
    own, theirs = dataclasses.asdict(resolved), dataclasses.asdict(variant.preprocessing)
    changed = {field: (theirs[field], own[field]) for field in own if own[field] != theirs[field]}
    first = Protocol(CUSTOM if changed else AUTHORS, resolved, changed)
    fixed = dataclasses.replace(RESIZE256_BILINEAR, mean=resolved.mean, std=resolved.std)
    second = Protocol(RESIZE256, fixed, {})
    return {AUTHORS: [first], RESIZE256: [second], BOTH: [first, second]}[name]
