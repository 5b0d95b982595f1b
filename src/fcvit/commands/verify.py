"""Verify a converted weights file against its source (`fcvit verify` and `fcvit.verify`)."""

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
    """Verify a converted weights file against its source: tensors, float64 equivalence and float32 error ratio.

    Args:
        converted: Weights file to check.
        against: Weights file that it was converted from.
        variant: Expected variant of both files (default: the variant of the converted file).
        blocks: Show the differences after every block, not only after every stage.

    Raises:
        UnreadableFile, UsageError, DoesNotFit: A file cannot be read, or the networks do not match.
        MissingExtra: Paddle or PyTorch is not installed.
    """
    has_ema = [read_checkpoint(path).has_ema for path in (converted, against)]
    if ema and not any(has_ema):
        raise UsageError(f"neither {converted} nor {against} contains EMA weights; leave out --ema")
    ours_ema, source_ema = (ema if one else None for one in has_ema)
    ours = read_weights(converted, ours_ema, variant)
    verification = verify_weights(ours, read_weights(against, source_ema, variant or ours.spec.variant))
    return dataclasses.replace(verification, blocks=blocks)
