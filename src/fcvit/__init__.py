"""FCViT for PaddlePaddle: use, prove and evaluate FCViT image classifiers.

    import fcvit
    model = fcvit.create_model("fcvit_b12", weights="fcvit_b12.pth.tar")
    fcvit.load("fcvit_b12.safetensors").predict(["cat.jpg"])

Names are looked up when first used, so that `import fcvit` loads neither Paddle nor PyTorch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fcvit.errors import FcvitError as FcvitError
    from fcvit.errors import FreshWeights as FreshWeights
    from fcvit.loading import create_backbone as create_backbone
    from fcvit.loading import create_model as create_model
    from fcvit.tasks.bench import bench as bench
    from fcvit.tasks.check_data import check_data as check_data
    from fcvit.tasks.compare import compare as compare
    from fcvit.tasks.convert import convert as convert
    from fcvit.tasks.evaluate import evaluate as evaluate
    from fcvit.tasks.evaluate import resume as resume
    from fcvit.tasks.export import export as export
    from fcvit.tasks.finetune import finetune as finetune
    from fcvit.tasks.heads import heads as heads
    from fcvit.tasks.inspect import inspect as inspect
    from fcvit.tasks.predict import Classifier as Classifier
    from fcvit.tasks.predict import load as load
    from fcvit.tasks.similarity import Viewer as Viewer
    from fcvit.tasks.similarity import similarity as similarity
    from fcvit.tasks.train import train as train
    from fcvit.tasks.trust import trust as trust
    from fcvit.tasks.verify import verify_files as verify  # noqa: F401
    from fcvit.training.recipe import Recipe as Recipe
    from fcvit.training.recipe import read_recipe as read_recipe
    from fcvit.variants import VARIANTS as VARIANTS
    from fcvit.variants import Preprocessing as Preprocessing
    from fcvit.variants import Variant as Variant
    from fcvit.weights.reading import read_weights as read_weights

__version__ = "0.1.0"

_HOMES = {
    "FcvitError": "fcvit.errors",
    "FreshWeights": "fcvit.errors",
    "create_backbone": "fcvit.loading",
    "create_model": "fcvit.loading",
    "check_data": "fcvit.tasks.check_data",
    "compare": "fcvit.tasks.compare",
    "convert": "fcvit.tasks.convert",
    "evaluate": "fcvit.tasks.evaluate",
    "resume": "fcvit.tasks.evaluate",
    "inspect": "fcvit.tasks.inspect",
    "Classifier": "fcvit.tasks.predict",
    "load": "fcvit.tasks.predict",
    "finetune": "fcvit.tasks.finetune",
    "train": "fcvit.tasks.train",
    "export": "fcvit.tasks.export",
    "bench": "fcvit.tasks.bench",
    "similarity": "fcvit.tasks.similarity",
    "Viewer": "fcvit.tasks.similarity",
    "heads": "fcvit.tasks.heads",
    "trust": "fcvit.tasks.trust",
    "Recipe": "fcvit.training.recipe",
    "read_recipe": "fcvit.training.recipe",
    "verify": "fcvit.tasks.verify",
    "VARIANTS": "fcvit.variants",
    "Preprocessing": "fcvit.variants",
    "Variant": "fcvit.variants",
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
