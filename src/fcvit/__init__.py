"""FCViT for PaddlePaddle: use, prove and evaluate FCViT image classifiers.

    import fcvit
    model = fcvit.create_model("fcvit_b12", weights="fcvit_b12.pth.tar")
    fcvit.load("fcvit_b12.safetensors").predict(["cat.jpg"])

Names are looked up when first used, so that `import fcvit` loads neither Paddle nor PyTorch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fcvit.analysis.heads import heads as heads
    from fcvit.analysis.similarity import Viewer as Viewer
    from fcvit.analysis.similarity import similarity as similarity
    from fcvit.analysis.trust import trust as trust
    from fcvit.commands.bench import bench as bench
    from fcvit.commands.check_data import check_data as check_data
    from fcvit.commands.compare import compare as compare
    from fcvit.commands.convert import convert as convert
    from fcvit.commands.evaluate import evaluate as evaluate
    from fcvit.commands.export import export as export
    from fcvit.commands.finetune import finetune as finetune
    from fcvit.commands.inspect import inspect as inspect
    from fcvit.commands.verify import verify_files as verify  # noqa: F401
    from fcvit.errors import FcvitError as FcvitError
    from fcvit.errors import FreshWeights as FreshWeights
    from fcvit.evaluation.runner import resume as resume
    from fcvit.inference.predict import Classifier as Classifier
    from fcvit.inference.predict import load as load
    from fcvit.models.build import create_backbone as create_backbone
    from fcvit.models.build import create_model as create_model
    from fcvit.models.variants import VARIANTS as VARIANTS
    from fcvit.models.variants import Preprocessing as Preprocessing
    from fcvit.models.variants import Variant as Variant
    from fcvit.training.recipe import Recipe as Recipe
    from fcvit.training.recipe import read_recipe as read_recipe
    from fcvit.training.run import train as train
    from fcvit.weights.reading import read_weights as read_weights

__version__ = "0.1.0"

_HOMES = {
    "FcvitError": "fcvit.errors",
    "FreshWeights": "fcvit.errors",
    "create_backbone": "fcvit.models.build",
    "create_model": "fcvit.models.build",
    "check_data": "fcvit.commands.check_data",
    "compare": "fcvit.commands.compare",
    "convert": "fcvit.commands.convert",
    "evaluate": "fcvit.commands.evaluate",
    "resume": "fcvit.evaluation.runner",
    "inspect": "fcvit.commands.inspect",
    "Classifier": "fcvit.inference.predict",
    "load": "fcvit.inference.predict",
    "finetune": "fcvit.commands.finetune",
    "train": "fcvit.training.run",
    "export": "fcvit.commands.export",
    "bench": "fcvit.commands.bench",
    "similarity": "fcvit.analysis.similarity",
    "Viewer": "fcvit.analysis.similarity",
    "heads": "fcvit.analysis.heads",
    "trust": "fcvit.analysis.trust",
    "Recipe": "fcvit.training.recipe",
    "read_recipe": "fcvit.training.recipe",
    "verify": "fcvit.commands.verify",
    "VARIANTS": "fcvit.models.variants",
    "Preprocessing": "fcvit.models.variants",
    "Variant": "fcvit.models.variants",
    "read_weights": "fcvit.weights.reading",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fcvit' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    value = getattr(module, {"verify": "verify_files"}.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
