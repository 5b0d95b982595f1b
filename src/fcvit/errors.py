"""Everything that can go wrong for a user, each kind with the exit code of the command line.

A message is one line: what was wrong, where, what was expected, what to do.
"""


class FcvitError(Exception):
    """Base of all errors that are meant for people; printed without a traceback."""

    exit_code = 1


class UsageError(FcvitError, ValueError):
    """The request itself is wrong: an unknown name, an option that does not apply."""

    exit_code = 2


class UnreadableFile(FcvitError, ValueError):
    """A file cannot be read or written, or is not safe to read."""

    exit_code = 3


class DoesNotFit(FcvitError, ValueError):
    """Names, shapes or classes do not fit the model."""

    exit_code = 4


class NumbersDisagree(FcvitError, ValueError):
    """Two computations that must agree do not."""

    exit_code = 5


class BadImages(FcvitError, ValueError):
    """Images could not be read; everything else was done."""

    exit_code = 6


class MissingExtra(FcvitError, ImportError):
    """An optional dependency is not installed; the message names the command that installs it."""

    exit_code = 7


class TrainingStopped(FcvitError, ArithmeticError):
    """A training cannot go on; its last good checkpoint is there.

    `again`: whether the same run, resumed, might come further.
    """

    exit_code = 8

    def __init__(self, message: str, again: bool = True):
        super().__init__(message)
        self.again = again


class FreshWeights(UserWarning):
    """Some weights were not in the file and start from their initialization."""


INTERRUPTED = 130


def counted(count: int, noun: str) -> str:
    """A count with its noun: "1 image", "1,000 images", "2 classes"."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"
