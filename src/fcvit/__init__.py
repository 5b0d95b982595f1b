"""FCViT for PaddlePaddle: use, verify, train and deploy FCViT models.

    import fcvit
    model = fcvit.create_model("fcvit_b12", weights="fcvit_b12.pth.tar")
    fcvit.load("fcvit_b12.safetensors").predict(["cat.jpg"])

Public names are imported on first use, so `import fcvit` loads neither Paddle nor PyTorch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fcvit.analysis.similarity import Viewer as Viewer
    from fcvit.commands.bench import bench as bench
    from fcvit.commands.check_data import check_data as check_data
    from fcvit.commands.compare import compare as compare
    from fcvit.commands.convert import convert as convert
    from fcvit.commands.evaluate import evaluate as evaluate
    from fcvit.commands.export import export as export
    from fcvit.commands.faithfulness import faithfulness as faithfulness
    from fcvit.commands.finetune import finetune as finetune
    from fcvit.commands.head_stats import head_stats as head_stats
    from fcvit.commands.inspect import inspect as inspect
    from fcvit.commands.resume import resume as resume
    from fcvit.commands.similarity import similarity as similarity
    from fcvit.commands.train import train as train
    from fcvit.commands.verify import verify as verify
    from fcvit.errors import FcvitError as FcvitError
    from fcvit.errors import FreshWeights as FreshWeights
    from fcvit.models.build import create_backbone as create_backbone
    from fcvit.models.build import create_model as create_model
    from fcvit.models.variants import VARIANTS as VARIANTS
    from fcvit.models.variants import Preprocessing as Preprocessing
    from fcvit.models.variants import Variant as Variant
    from fcvit.tasks.classification.prediction import Classifier as Classifier
    from fcvit.tasks.classification.recipe import ClassificationRecipe as Recipe  # noqa: F401
    from fcvit.tasks.detection.prediction import DetectedImage as DetectedImage
    from fcvit.tasks.detection.prediction import Detector as Detector
    from fcvit.tasks.detection.recipe import DetectionRecipe as DetectionRecipe
    from fcvit.tasks.predictor import Predictor as Predictor
    from fcvit.tasks.predictor import load as load
    from fcvit.tasks.segmentation.prediction import SegmentedImage as SegmentedImage
    from fcvit.tasks.segmentation.prediction import Segmenter as Segmenter
    from fcvit.tasks.segmentation.recipe import SegmentationRecipe as SegmentationRecipe
    from fcvit.training.recipe import read_recipe as read_recipe
    from fcvit.training.run import extend as extend
    from fcvit.weights.reading import read_weights as read_weights

__version__ = "0.2.0"

# Public name -> module, or module:name if the module uses a different name.
_MODULES = {
    "FcvitError": "errors",
    "FreshWeights": "errors",
    "VARIANTS": "models.variants",
    "Preprocessing": "models.variants",
    "Variant": "models.variants",
    "create_model": "models.build",
    "create_backbone": "models.build",
    "read_weights": "weights.reading",
    "load": "tasks.predictor",
    "Predictor": "tasks.predictor",
    "Classifier": "tasks.classification.prediction",
    "Segmenter": "tasks.segmentation.prediction",
    "SegmentedImage": "tasks.segmentation.prediction",
    "Detector": "tasks.detection.prediction",
    "DetectedImage": "tasks.detection.prediction",
    "convert": "commands.convert",
    "verify": "commands.verify",
    "inspect": "commands.inspect",
    "export": "commands.export",
    "evaluate": "commands.evaluate",
    "compare": "commands.compare",
    "bench": "commands.bench",
    "check_data": "commands.check_data",
    "Recipe": "tasks.classification.recipe:ClassificationRecipe",
    "SegmentationRecipe": "tasks.segmentation.recipe",
    "DetectionRecipe": "tasks.detection.recipe",
    "read_recipe": "training.recipe",
    "train": "commands.train",
    "finetune": "commands.finetune",
    "extend": "training.run",
    "resume": "commands.resume",
    "similarity": "commands.similarity",
    "Viewer": "analysis.similarity",
    "head_stats": "commands.head_stats",
    "faithfulness": "commands.faithfulness",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'fcvit' has no attribute {name!r}")
    module, _, attribute = _MODULES[name].partition(":")
    value = getattr(importlib.import_module(f"fcvit.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
