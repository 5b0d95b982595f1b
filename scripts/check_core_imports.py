"""Import every module with only the core dependencies installed.

Modules that need Paddle, PyTorch or onnx must raise MissingExtra, and all other modules must import. Run this script in
an environment without Paddle, PyTorch and onnx.
"""

import importlib
import pkgutil
import sys

import fcvit
from fcvit.errors import MissingExtra
from fcvit.frameworks import installed

NEED_AN_EXTRA = {
    "fcvit.inference.onnx_graph",
    "fcvit.models.backbone",
    "fcvit.models.classifier",
    "fcvit.models.layers",
    "fcvit.native.network",
    "fcvit.native.operators",
    "fcvit.reference.backbone",
    "fcvit.reference.build",
    "fcvit.reference.classifier",
    "fcvit.training.optimizer",
    "fcvit.training.statistics",
    "fcvit.training.step",
}


def main() -> int:
    present = [name for name in ("paddle", "torch", "onnx") if installed(name)]
    if present:
        print(f"{', '.join(present)} must not be installed; run this check in another environment", file=sys.stderr)
        return 2
    names = [module.name for module in pkgutil.walk_packages(fcvit.__path__, "fcvit.")]
    wrong = []
    for name in names:
        if name == "fcvit.__main__":
            continue  # runs the command line
        try:
            importlib.import_module(name)
            outcome = "imports"
        except MissingExtra:
            outcome = "missing extra"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        if outcome != ("missing extra" if name in NEED_AN_EXTRA else "imports"):
            wrong.append(f"{name}: {outcome}")
    print("\n".join(wrong) or "all modules behave as expected")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
