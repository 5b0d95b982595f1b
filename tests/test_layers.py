"""Test the import rules between modules (the layering test), and that importing loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "fcvit"
# Layers from bottom to top. A module may import from its own layer and from the layers below.
LAYERS = (
    ("errors", "foreign", "frameworks", "heartbeats", "interrupts", "machine", "text", "models.variants"),
    ("run_folder", "models.maps", "models.spec", "metrics", "verification.equivalence", "processes"),
    ("weights", "data.classes"),
    ("data",),
    ("models", "reference"),
    ("report",),
    ("verification",),
    ("native",),
    ("inference",),
    ("tasks.base", "tasks.recipe"),
    ("evaluation",),
    ("training",),
    ("tasks",),
    ("analysis",),
    ("commands",),
    ("cli", "__main__"),
)
USERS_OF_NATIVE = {
    "inference.engines",
    "inference.native_network",
    "commands.doctor",
    "commands.bench",
    "training.optimizer",
}
PADDLE_NETWORKS = {"models.layers", "models.backbone", "models.classifier"}
# Order of modules in packages that allow only one import direction.
ORDER = {
    "evaluation": (
        "journal",
        "protocols",
        "published",
        "logits",
        "settings",
        "request",
        "results",
        "report",
        "comparison",
        "batch_run",
        "runner",
        "prediction_files",
        "predictions",
    ),
    "training": (
        "recipe",
        "schedule",
        "batches",
        "optimizer",
        "statistics",
        "step",
        "state",
        "log",
        "files",
        "loop",
        "run",
    ),
}


def layer_of(module):
    for layer, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return layer
    raise AssertionError(f"{module} has no layer; add it to LAYERS")


def _for_type_checkers(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(text):
    """Yield the modules of this package that a source file imports, at module level or in a function."""
    tree = ast.parse(text)
    tree.body = [node for node in tree.body if not _for_type_checkers(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fcvit":
            if node.module == "fcvit":
                yield from (alias.name for alias in node.names if alias.name != "__version__")
            elif node.module.count(".") == 1 and (SOURCE / node.module.split(".")[1]).is_dir():
                yield from (f"{node.module.removeprefix('fcvit.')}.{alias.name}" for alias in node.names)
            else:
                yield node.module.removeprefix("fcvit.")
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("fcvit.") for a in node.names if a.name.startswith("fcvit."))


def wrong_imports(module, text):
    layer = layer_of(module)
    for name in imported(text):
        if layer_of(name) > layer:
            yield f"{module} imports {name} from a higher layer"
        if {module, name} & PADDLE_NETWORKS and any(one.startswith("reference.") for one in (module, name)):
            yield f"{module} imports {name}, but the reference and the Paddle networks must be independent"
        if name.startswith("native.") and not module.startswith("native.") and module not in USERS_OF_NATIVE:
            yield f"{module} imports {name}; use inference.engines.accelerate instead"
        for package, order in ORDER.items():
            one, other = (m.removeprefix(f"{package}.") for m in (module, name))
            if module.startswith(package) and name.startswith(package) and order.index(other) > order.index(one):
                yield f"{module} imports {name}, which comes later in ORDER"


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if parts[-1] != "__init__":
            yield ".".join(parts), path.read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(("module", "text"), list(modules()), ids=lambda value: value if "\n" not in value else "")
def test_imports_follow_the_layers(module, text):
    assert not list(wrong_imports(module, text))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("models.variants", "from fcvit.models.spec import Form"),
        ("models.spec", "from fcvit.commands import convert"),
        ("models.backbone", "def f():\n    from fcvit.inference.engines import Engine"),
        ("evaluation.runner", "from fcvit.tasks.classification.task import TASK"),
        ("training.loop", "from fcvit.tasks.classification.training import ClassificationTraining"),
        ("run_folder", "import fcvit.cli"),
        ("models.classifier", "from fcvit.native.network import accelerate"),
        ("training.run", "def f():\n    from fcvit.native.network import accelerate"),
        ("evaluation.runner", "from fcvit.training.run import train"),
        ("training.recipe", "from fcvit.training.batches import MicroBatches"),
        ("reference.backbone", "from fcvit.models.layers import mean"),
        ("reference.build", "from fcvit.models import backbone"),
        ("models.backbone", "from fcvit.reference.backbone import layer_norm"),
    ],
)
def test_a_planted_import_is_detected(module, text):
    assert list(wrong_imports(module, text))


@pytest.mark.slow
def test_only_the_reference_imports_pytorch():
    importers = set()
    for module, text in modules():
        for node in ast.walk(ast.parse(text)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "torch" for name in names):
                importers.add(module)
    assert importers and all(name.startswith("reference.") for name in importers)


@pytest.mark.slow
def test_importing_and_converting_load_no_framework(tmp_path, digits_pth):
    code = f"""
import sys, fcvit
fcvit.VARIANTS
assert "numpy" not in sys.modules
fcvit.convert({str(digits_pth)!r}, {str(tmp_path / "x.safetensors")!r}, verify=False)
fcvit.inspect({str(tmp_path / "x.safetensors")!r})
from fcvit.cli import main
assert main(["convert", {str(digits_pth)!r}, "-o", {str(tmp_path / "y.safetensors")!r}, "--no-verify"]) == 0
print([m for m in ("paddle", "torch") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_public_names():
    import fcvit

    assert all(getattr(fcvit, name) for name in fcvit.__all__)
    assert set(fcvit.__all__) <= set(dir(fcvit))
    with pytest.raises(AttributeError, match="no attribute 'pretrained'"):
        fcvit.pretrained  # noqa: B018


def test_every_public_name_is_known_to_type_checkers():
    import fcvit

    body = ast.parse((SOURCE / "__init__.py").read_text("utf-8")).body
    (imports,) = (node.body for node in body if _for_type_checkers(node))
    assert {alias.asname or alias.name for node in imports for alias in node.names} == set(fcvit.__all__)


def test_every_head_has_a_row_in_every_table():
    """The tables are listed in docs/guides/extend.md."""
    pytest.importorskip("onnx")
    pytest.importorskip("torch")
    from fcvit.inference.onnx_graph import HEAD_WRITERS
    from fcvit.models import build
    from fcvit.models.spec import HEADS
    from fcvit.reference.build import NETWORKS

    assert set(HEADS) == set(build.NETWORKS) == set(NETWORKS) == set(HEAD_WRITERS)
