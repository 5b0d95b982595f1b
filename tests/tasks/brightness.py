"""A small second task for the tests, unknown to the package: estimate the brightness of an image."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from fcvit import run_folder
from fcvit.data.sources import open_source
from fcvit.data.transforms.pixel_batch import PixelBatch
from fcvit.data.transforms.preprocess import crop, normalization_table
from fcvit.inference.images import predictions
from fcvit.models.variants import Preprocessing
from fcvit.tasks.recipe import Recipe

PIXELS = Preprocessing(32, 1.0)


@dataclasses.dataclass(frozen=True)
class Images:
    """Images with names that begin with their brightness in percent, as in 37-a.png."""

    root: Any
    names: tuple
    locations: tuple

    @property
    def targets(self):
        return [int(name.split("-")[0]) / 100 for name in self.names]

    def __len__(self):
        return len(self.names)

    def take(self, order):
        return Images(self.root, tuple(self.names[i] for i in order), tuple(self.locations[i] for i in order))

    def listing(self):
        return json.dumps(self.names)


def read(path):
    files = open_source(Path(path)).tree().files
    names = tuple(sorted(name for name in files if name.endswith(".png")))
    return Images(Path(path), names, tuple(files[name] for name in names))


def transform(image, target, index):
    return crop(image, PIXELS), target


class Training:
    score = "accuracy"  # 1 - error, since a higher score must be better
    shown = {"loss": ("loss", "{:.4f}"), "accuracy": ("accuracy", "{:.3f}")}  # noqa: RUF012
    notes, identity, preprocessing = ("brightness of images",), {}, PIXELS

    def __init__(self, recipe, weights):
        self.recipe, self.start = recipe, weights
        self.train, self.val = read(recipe.data), read(recipe.val)

    def network(self):
        from fcvit.models.build import build_network, create_model

        return build_network(self.start) if self.start else create_model(self.recipe.network(), None, 1)

    def transform(self, epoch):
        return transform

    def inputs(self, batch, epoch):
        return PixelBatch(batch.pixels[0], normalization_table(PIXELS)), np.array(batch.targets[0], np.float32)

    def draw(self, images, targets):
        return images

    def loss(self, outputs, targets):
        import paddle

        difference = outputs[:, 0] - paddle.to_tensor(targets)
        return {"loss_square": (difference**2).mean(), "loss_absolute": 0.1 * difference.abs().mean()}

    def weights(self, model, **options):
        from fcvit.models.build import weights_of

        return weights_of(model, head="brightness", preprocessing=PIXELS, **options)

    def evaluator(self, loaded):
        return Evaluator(self.val)

    def row(self, result):
        return {"accuracy": result["accuracy"]}


class Evaluator:
    notes, rule, outputs = (), "brightness from the file names", 1
    at_once, fixed_preprocessing = None, False
    dtype = np.dtype([("estimate", "<f8"), ("error", "<f8")])

    def __init__(self, dataset):
        self.dataset = dataset

    def identity(self):
        return {"targets": self.dataset.targets}

    def transform(self, preprocessing):
        return transform

    def compute(self, engine, images, targets):
        return engine(np.stack(images))

    def record(self, outputs, targets, reference):
        record = np.zeros(len(outputs), self.dtype)
        record["estimate"], record["error"] = outputs[:, 0], np.abs(outputs[:, 0] - targets)
        return record, [b"\0" * round(100 * target) for target in targets]  # bytes of any length

    def report(self, evaluated):
        return Report(evaluated)


class Report:
    hints = ()

    def __init__(self, evaluated):
        self.evaluated = evaluated
        self.results = [{"accuracy": 1 - float(records["error"].mean())} for records in evaluated.records.T]
        self.lengths = [len(evaluated.bytes_of[index, 0]) for index in range(len(evaluated.index))]

    def write(self, folder):
        run_folder.write_json(folder / "brightness.json", self.to_json())

    def to_json(self):
        return {"results": self.results, "lengths": self.lengths}

    def tables(self):
        yield f"accuracy {self.results[0]['accuracy']:.3f}"


class Estimator:
    at_once, row_columns, preprocessing, classes = None, {"brightness": float}, PIXELS, ()

    def __init__(self, weights, engine):
        self.weights, self.engine = weights, engine

    def transform(self, options):
        return transform

    def compute(self, images, pixels, targets, options):
        return [float(value) for value in self.engine(pixels)[:, 0]]

    def stream(self, images, top_k=1, *, batch_size=3):
        def decode(outputs):
            return [float(value) for value in outputs[:, 0]]

        return predictions(images, self.weights, self.engine, PIXELS, decode, batch_size)

    def predict(self, images):
        return list(self.stream(images))

    def rows(self, prediction):
        return [{"brightness": prediction}]

    def table(self, pairs):
        return "\n".join(f"{path.name}: {rows[0]['brightness']:.2f}" for path, rows in pairs)


class Brightness:
    name, recipe = "brightness", Recipe
    options = prediction = dataclasses.make_dataclass("Options", [])

    def training(self, recipe, weights):
        return Training(recipe, weights)

    def evaluator(self, loaded, data, options):
        return Evaluator(read(data))

    def predictor(self, weights, preprocessing, classes, create):
        return Estimator(weights, create())


TASK = Brightness()
