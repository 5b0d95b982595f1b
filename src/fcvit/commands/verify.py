"""The command that verifies that two weights files are one network."""

import dataclasses
from typing import Annotated, Any

from cyclopts import Parameter

from fcvit.commands.options import Ema, File, Flag
from fcvit.errors import UsageError
from fcvit.verification.comparison import Verification, verify_weights
from fcvit.weights.checkpoint import read_checkpoint
from fcvit.weights.reading import read_weights


def verify(
    converted: File,
    against: Annotated[File, Parameter(name="--against")],
    *,
    ema: Ema = None,
    variant: Annotated[Any, Parameter()] = None,
    blocks: Flag = False,
) -> Verification:
    """Verify that two weights files are one network: tensors, float64 equivalence, float32 error ratio, by stage.

    Args:
        converted: The file to check.
        against: The file it was made from.
        variant: What both must be (default: what the converted file says).
        blocks: Show the drift after every block, not only by stage.

    Raises:
        UnreadableFile, UsageError, DoesNotFit: a file cannot be read or the two are not one network.
        MissingExtra: Paddle or PyTorch is not installed.
    """
    has_ema = [read_checkpoint(path).has_ema for path in (converted, against)]
    if ema and not any(has_ema):
        raise UsageError(f"neither {converted} nor {against} has averaged weights; leave out --ema")
    ours_ema, source_ema = (ema if one else None for one in has_ema)
    ours = read_weights(converted, ours_ema, variant)
    verification = verify_weights(ours, read_weights(against, source_ema, variant or ours.spec.variant))
    return dataclasses.replace(verification, blocks=blocks)
