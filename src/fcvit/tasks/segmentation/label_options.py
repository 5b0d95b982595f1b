"""The options that say how label maps are found and read, for every command that reads them."""

import dataclasses
from typing import Annotated

from cyclopts import Parameter

from fcvit.data.class_colors import ClassList
from fcvit.data.label_maps import LabelEncoding


@dataclasses.dataclass(frozen=True)
class LabelOptions:
    """How label maps for segmentation are found and read.

    Args:
        label_suffix: End of the names of label maps, such as _mask (default: found from the names).
        reduce_zero_label: 0 in a label map is ignored, and k is class k - 1 (default: only for ADE20K).
        ignore_index: Values in label maps that are ignored (default: 255).
        label_values: Value of each class in label maps, for example 0 255 (default: 0, 1, 2, ...).
    """

    label_suffix: str | None = None
    reduce_zero_label: bool | None = None
    ignore_index: Annotated[tuple[int, ...] | None, Parameter(consume_multiple=True, negative=())] = None
    label_values: Annotated[tuple[int, ...] | None, Parameter(consume_multiple=True, negative=())] = None

    def words(self) -> list[str]:
        """Return the options that were given, as the words of a command line."""
        words = [f"--label-suffix={self.label_suffix}"] if self.label_suffix is not None else []
        if self.reduce_zero_label is not None:
            words.append("--reduce-zero-label" if self.reduce_zero_label else "--no-reduce-zero-label")
        for option, values in (("--ignore-index", self.ignore_index), ("--label-values", self.label_values)):
            words += [option, *map(str, values)] if values is not None else []
        return words

    def encoding(self, num_classes: int | None, listed: ClassList | None, ade20k: bool) -> LabelEncoding:
        """Return the meaning of the values in label files, as far as options and class list define it.

        Args:
            num_classes: Number of classes, or None if it is not known.
            listed: Class list of the data, with colors for color-coded label maps.
            ade20k: Whether the data set is ADE20K, where 0 is ignored by default.

        Raises:
            UsageError: The options contradict each other.
        """
        return LabelEncoding(
            num_classes,
            ade20k if self.reduce_zero_label is None else self.reduce_zero_label,
            self.ignore_index,
            self.label_values,
            listed.palette if listed else None,
            listed.ignored_colors if listed else (),
        )
