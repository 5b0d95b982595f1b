"""Define the errors that users can meet, each with its exit code on the command line.

A message is one line: where the problem is, what it is, and what to do.
"""


class FcvitError(Exception):
    """Base class of all errors with a message for users. The command line prints them without a traceback."""

    exit_code = 1


class UsageError(FcvitError, ValueError):
    """The request is invalid, for example an unknown name or an option that does not apply."""

    exit_code = 2


class UnreadableFile(FcvitError, ValueError):
    """A file cannot be read or written, or is unsafe to read."""

    exit_code = 3


class DoesNotFit(FcvitError, ValueError):
    """Names, shapes or classes do not match the model."""

    exit_code = 4


class NumbersDisagree(FcvitError, ValueError):
    """Two computations that must give equal results differ."""

    exit_code = 5


class BadImages(FcvitError, ValueError):
    """Some images could not be read. The work on all other images was completed."""

    exit_code = 6


class MissingExtra(FcvitError, ImportError):
    """An optional dependency is not installed. The message gives the command that installs it."""

    exit_code = 7


class TrainingStopped(FcvitError, ArithmeticError):
    """Training cannot continue. The last good checkpoint is kept.

    Attributes:
        again: Whether resuming the run may get past the problem.
    """

    exit_code = 8

    def __init__(self, message: str, again: bool = True):
        super().__init__(message)
        self.again = again


class PeerLost(FcvitError, RuntimeError):
    """Another process of the job failed, has stopped or cannot be reached."""

    exit_code = 9


DIVERGED = "resuming would fail in the same way, so lower lr or limit the gradient with clip_norm"
"""The remedy in the message of a run whose losses or weights are no longer finite."""


class FreshWeights(UserWarning):
    """Some weights were missing from the file and keep their initial values."""


INTERRUPTED = 130


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: "1 image", "1,000 images", "2 classes"."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"
