"""The evaluation of segmentation networks: options, data, and the records of single images.

The preprocessing is that of mmsegmentation 0.19 with the authors' configuration. Logits are resized twice: to the size
of the network's input (in the network), then to the size of the label map.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from fcvit.data.class_colors import ClassList, classes_of, read_class_list
from fcvit.data.label_maps import LabelEncoding, LabelFile, read_label, resolve_encoding, scan_labels
from fcvit.data.loader import Dataset
from fcvit.data.segmentation import LabeledMaps, find_maps, read_split
from fcvit.data.sources import open_source
from fcvit.data.transforms import segmentation as transforms
from fcvit.errors import DoesNotFit
from fcvit.evaluation.settings import Configuration
from fcvit.inference.engines import Engine, create_engine
from fcvit.models.spec import SemanticFPNOptions
from fcvit.models.variants import Preprocessing
from fcvit.tasks.base import Evaluated
from fcvit.tasks.dense import SplitOptions
from fcvit.tasks.segmentation.figures import SegmentationReport
from fcvit.tasks.segmentation.label_options import LabelOptions
from fcvit.tasks.segmentation.logits import label_map
from fcvit.tasks.segmentation.published import validation_of
from fcvit.tasks.segmentation.results import RECORD, Sample, record
from fcvit.weights.reading import Weights

_SAMPLE = 64  # label files that are examined before an evaluation


@dataclasses.dataclass(frozen=True)
class Options(SplitOptions, LabelOptions):
    """Options of `fcvit eval` for segmentation networks, in addition to `fcvit.evaluation.settings.Settings`."""


@dataclasses.dataclass(frozen=True)
class LabeledPixels:
    """The transform of an evaluation: the pixels of the network's input, and the label map at its original size.

    Args:
        encoding: Meaning of the values in label files.
        network: Options of the network, with the size of its input.
    """

    encoding: LabelEncoding
    network: SemanticFPNOptions

    decode: ClassVar = staticmethod(transforms.decode)

    def __call__(self, image: Image.Image, target: LabelFile, index: int) -> tuple[np.ndarray, np.ndarray]:
        label = read_label(target, self.encoding, image.size)
        scale = self.network.long_side, self.network.short_side
        return transforms.preprocess(np.asarray(image), scale, self.network.divisor), label


class SegmentationEvaluator:
    """The evaluator of segmentation networks (see `fcvit.tasks.base.Evaluator`).

    Args:
        loaded: Weights of networks with the same classes.
        data: Path of a data set (see `fcvit.data.segmentation.find_maps`), or images with label maps.
        options: Options of this evaluation.
        encoding: Meaning of the values in label files. None examines some of the files.

    Raises:
        UnreadableFile, DoesNotFit, UsageError: Data, options and weights do not match.
    """

    dtype, outputs, at_once, fixed_preprocessing = RECORD, 0, 1, True

    def __init__(
        self,
        loaded: Sequence[Weights],
        data: Path | LabeledMaps,
        options: Options,
        encoding: LabelEncoding | None = None,
        listed: ClassList | None = None,
    ):
        first = loaded[0]
        count = first.spec.num_classes
        for weights in loaded:
            if (weights.spec.num_classes, weights.spec.options) != (count, first.spec.options):
                raise DoesNotFit(
                    f"{weights.source.path} and {first.source.path} differ in their classes or in the size of their "
                    "input; evaluate them separately"
                )
        self.options, self.network = options, first.spec.options
        ade20k, notes = False, ()
        self.dataset: Dataset
        if isinstance(data, LabeledMaps):
            self.dataset = data
        else:
            layout = find_maps(open_source(data))
            if layout is None:
                raise DoesNotFit(
                    f"{data}: no segmentation data set; expected the folders images and annotations in it, or in a "
                    "folder for each split"
                )
            maps = read_split(layout, options.chosen(layout), options.label_suffix)
            self.dataset, notes, ade20k = maps, maps.notes, layout.is_ade20k
            listed = listed or layout.class_list()
        if options.classes:
            listed = read_class_list(Path(options.classes))
        known = classes_of(first, listed)
        self.classes, self.palette = known.classes, np.array(known.palette, np.uint8)
        if encoding is None:
            encoding = options.encoding(count, listed, ade20k)
            named = [("--data", data if isinstance(data, Path) else None), ("--classes", options.classes)]
            named = [*(("--weights", weights.source.path) for weights in loaded), *named, ("--split", options.split)]
            command = ["fcvit", "eval", *(word for option in named if option[1] for word in map(str, option))]
            some = np.linspace(0, len(self.dataset) - 1, min(_SAMPLE, len(self.dataset))).round().astype(int)
            sample = self.dataset.take(some.tolist())
            encoding = resolve_encoding(sample, list(scan_labels(sample, 0)), encoding, [*command, *options.words()])
        self.encoding = encoding
        self.notes = notes
        self.rule = "0 is ignored, k is class k - 1" if encoding.reduce_zero_label else "values are class indices"
        self.validation = validation_of(self.dataset.names)
        self.about: Mapping[str, Any] = {"encoding": dataclasses.asdict(encoding)}
        self._engines: dict[str, Engine] = {}

    def identity(self) -> dict[str, Any]:
        encoding = {name: value for name, value in dataclasses.asdict(self.encoding).items() if name != "palette"}
        return {"classes": [c.id for c in self.classes], "encoding": encoding, **dataclasses.asdict(self.network)}

    def transform(self, preprocessing: Preprocessing) -> LabeledPixels:
        return LabeledPixels(self.encoding, self.network)

    def compute(self, engine: Engine, images: Sequence[np.ndarray], targets: Sequence[Any]) -> np.ndarray:
        return engine(np.asarray(images))

    def record(
        self, outputs: np.ndarray, targets: Sequence[np.ndarray], reference: np.ndarray | None
    ) -> tuple[np.ndarray, Sequence[bytes]]:
        """Record the pixels of each pair of label and predicted class."""
        (logits,), (label,) = outputs, targets
        other = None if reference is None else label_map(reference[0], label.shape)
        row, content = record(label_map(logits, label.shape), label, other)
        return row[None], [content]

    def report(self, evaluated: Evaluated) -> SegmentationReport:
        return SegmentationReport(self, evaluated)

    def sample(self, configuration: Configuration, index: int, /) -> Sample:
        """Return an image of the data set with its label map and its prediction, which is computed again."""
        name, location = self.dataset.names[index], self.dataset.locations[index]
        image = transforms.decode(io.BytesIO(location.read()), name)
        pixels, label = self.transform(configuration.protocol.preprocessing)(image, self.dataset.targets[index], index)
        if configuration.name not in self._engines:
            arguments = (configuration.weights, configuration.protocol.preprocessing, "auto", configuration.precision)
            self._engines[configuration.name] = create_engine(configuration.engine, *arguments)
        (logits,) = self._engines[configuration.name](pixels[None])
        return Sample(image, label, label_map(logits, label.shape))
