"""Groups of options that several commands share."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fcvit import run_folder as runs
from fcvit.data.folders import find_images
from fcvit.data.transforms.augment import Interpolation
from fcvit.errors import UsageError
from fcvit.models.variants import PreprocessingChange, three_channels

File = Path | str
Output = Parameter(name=["--output", "-o"])
Flag = Annotated[bool, Parameter(negative=())]
Ema = Annotated[
    bool | None, Parameter(help="Take the averaged (--ema) or the raw (--no-ema) weights of a file with both.")
]
Classes = Annotated[
    Any, Parameter(help="Class list: CSV with id and name, or one class per line (default: the file's own).")
]
Device = Annotated[str, Parameter(help="auto, cpu, gpu or gpu:N.")]
Threads = Annotated[int | None, Parameter(help="Threads that compute on a CPU (default: one for each core).")]
MaxImages = Annotated[
    int, Parameter(name=["--max-images", "--most"], help="Use at most this many images, evenly sampled.")
]
Channels = Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())]


@dataclasses.dataclass(frozen=True)
class PreprocessingOptions:
    """Fields of the preprocessing to be replaced.

    Args:
        input_size: Another input size in pixels.
        crop_fraction: Another crop fraction.
        interpolation: Another interpolation.
        mean: Another mean, of images from 0 to 1: one number, or three for red, green and blue.
        std: Another standard deviation, in the same way.
    """

    input_size: int | None = None
    crop_fraction: float | None = None
    interpolation: Interpolation | None = None
    mean: Channels = None
    std: Channels = None

    def changes(self) -> PreprocessingChange | None:
        """Return the fields that were given; None: none.

        Raises:
            UsageError: a mean or standard deviation is not one number or three.
        """
        changes: Any = {}
        for name, value in vars(self).items():
            if value is not None and name in ("mean", "std"):
                try:
                    changes[name] = three_channels(" ".join(value))
                except ValueError as error:
                    raise UsageError(f"--{name} {' '.join(value)}: {error}") from None
            elif value is not None:
                changes[name] = value
        return changes or None


def named_images(command: str, images: Sequence[str | os.PathLike[str]], output: File | None) -> list[Path]:
    """Return the images that the arguments of a command name.

    Raises:
        UsageError: none is named, or the folder that is written is among them.
        UnreadableFile: an argument matches nothing.
    """
    if not images:
        raise UsageError(f"{command}: name at least one image, folder or pattern")
    if output is not None:
        for argument in images:
            runs.refuse_inside(Path(output), Path(argument), str(argument))
    return find_images([str(image) for image in images])


def decoding_processes(workers: int | None) -> int:
    """Return how many processes decode images: as asked for, else one for each core that this process has, up to 8."""
    if workers is not None:
        return workers
    sharing = int(os.environ.get("PADDLE_LOCAL_SIZE") or 1)  # Paddle's launcher says how many share this machine
    return max(1, min(8, (os.cpu_count() or 1) // sharing))
