"""Who may import whom, read off the source: a layer that reaches upwards fails here before it is used."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each part of the package, and what it may import besides the standard library and itself.
ALLOWED = {
    "deep_optim": ("deep_optim",),
    "deep_optim.ops": ("torch", "triton"),
    "deep_optim.optimizers": ("torch", "deep_optim.ops", "deep_optim.capture"),
    "deep_optim.models": ("torch", "deep_optim.ops"),
    "deep_optim.routing": ("torch",),
    "deep_optim.capture": ("torch", "deep_optim.layer_inputs", "deep_optim.input_sums", "deep_optim.sums_over_ranks"),
    "deep_optim.layer_inputs": ("torch",),
    "deep_optim.input_sums": ("torch",),
    "deep_optim.sums_over_ranks": ("torch", "deep_optim.input_sums"),
    "deep_optim.create": (
        "torch",
        "deep_optim.optimizers",
        "deep_optim.routing",
        "deep_optim.capture",
    ),
    "deep_optim.integrations": (
        "torch",
        "deep_optim.create",
        "deep_optim.ops",
        "deep_optim.optimizers",
        "deep_optim.routing",
        "deep_optim.capture",
    ),
}
PUBLIC = ("deep_optim.ops", "deep_optim.models", "deep_optim.integrations")  # beside the names at the top


def within(module: str, parent: str) -> bool:
    return module == parent or module.startswith(f"{parent}.")


def imports(module: str, source: str, *, is_package: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield the full name of everything that `module` imports, and whether it does so inside a function."""
    package = module if is_package else module.rpartition(".")[0]
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lazy = {inner for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in lazy
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                yield f"{origin}.{alias.name}", node in lazy


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Return the imports that `module` should not make."""
    found = set(imports(module, source, is_package=is_package))
    if not within(module, "deep_optim"):
        return sorted(name for name, _ in found if not is_public(name, module))
    part = ".".join(module.split(".")[:2])
    if part not in ALLOWED:
        return [f"{part} has no line in ALLOWED"]
    return sorted(name for name, lazy in found if not is_allowed(name, part, lazy))


def is_allowed(name: str, part: str, lazy: bool) -> bool:
    """Whether a part of the package may import `name`."""
    if name.split(".")[0] in sys.stdlib_module_names or any(within(name, allowed) for allowed in ALLOWED[part]):
        return True
    if part != "deep_optim" and within(name, part):
        return True
    # each integration imports its library where it is used, so that the package needs torch alone
    third_party = name.split(".")[0] not in ("triton", "deep_optim", "tests", "benchmarks", "examples")
    return part == "deep_optim.integrations" and lazy and third_party


def is_public(name: str, module: str) -> bool:
    """Whether a benchmark or an example may import `name`."""
    if within(name, "tests") or (within(name, "benchmarks") and not within(module, "benchmarks")):
        return False
    if not within(name, "deep_optim"):
        return name.split(".")[0] != "triton"
    private = any(part.startswith("_") and not part.endswith("__") for part in name.split("."))
    at_the_top = name.count(".") <= 1 and (name == "deep_optim" or name not in ALLOWED)
    return not private and (at_the_top or any(within(name, parent) for parent in PUBLIC))


FILES = sorted(path for folder in ("deep_optim", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stay_within_their_layer(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    assert violations(module, path.read_text(encoding="utf-8"), is_package=is_package) == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("deep_optim.ops.delta_rule", "from ..optimizers import base"),
        ("deep_optim.ops.delta_rule", "from deep_optim import optimizers"),
        ("deep_optim.ops.delta_rule", "from .. import routing"),
        ("deep_optim.ops.delta_rule", "import numpy"),
        ("deep_optim.optimizers.base", "import triton"),
        ("deep_optim.optimizers.base", "from ..models.cms import CMS"),
        ("deep_optim.optimizers.base", "from deep_optim.routing import param_groups"),
        ("deep_optim.optimizers.base", "def f():\n    import deep_optim.integrations.transformers"),
        ("deep_optim.models.hope", "if True:\n    import deep_optim.optimizers.m3"),
        ("deep_optim.routing", "from .ops import delta_rule"),
        ("deep_optim.capture", "from . import optimizers"),
        ("deep_optim.integrations.transformers", "import transformers"),
        ("deep_optim.integrations.transformers", "def f():\n    import triton"),
        ("deep_optim.integrations.transformers", "def f():\n    from benchmarks import tasks"),
        ("deep_optim", "import tests"),
        ("deep_optim", "import numpy"),
        ("deep_optim.helpers", "import torch"),
        ("benchmarks.kernels", "from deep_optim.optimizers.momentum import Momentum"),
        ("benchmarks.kernels", "from deep_optim import optimizers"),
        ("benchmarks.kernels", "from deep_optim.routing import param_groups"),
        ("benchmarks.kernels", "from deep_optim import _private"),
        ("benchmarks.kernels", "from deep_optim.ops.delta_rule import _delta_rule_triton"),
        ("benchmarks.kernels", "import triton"),
        ("benchmarks.kernels", "from tests.cases import CASES"),
        ("examples.plain_loop", "from benchmarks.tasks import make_task"),
        ("examples.plain_loop", "import deep_optim.optimizers.base"),
    ],
)
def test_each_line_that_is_crossed_is_seen(module: str, source: str) -> None:
    assert violations(module, source, is_package="." not in module) != []


@pytest.mark.parametrize(
    "module, source",
    [
        ("deep_optim.ops.delta_rule", "import os, triton\nfrom .backend import tl\nfrom torch import Tensor"),
        ("deep_optim.optimizers.base", "from ..ops.delta_rule import delta_rule\nfrom .adamw import step\nimport math"),
        ("deep_optim.optimizers.dgd", "from deep_optim.capture import capture_inputs"),
        ("deep_optim.models.hope", "from ..ops import mlp_memory\nfrom . import cms"),
        (
            "deep_optim.integrations.transformers",
            "from ..routing import param_groups\ndef f():\n    import transformers",
        ),
        ("deep_optim", "from .routing import param_groups"),
        ("benchmarks.kernels", "import deep_optim, numpy\nfrom deep_optim.ops.delta_rule import delta_rule"),
        ("benchmarks.kernels", "from .tasks import make_task\nfrom deep_optim import Momentum, __version__"),
        ("examples.trainer", "import transformers\nfrom deep_optim.integrations.transformers import Factory"),
    ],
)
def test_what_is_allowed_is_let_through(module: str, source: str) -> None:
    assert violations(module, source, is_package="." not in module) == []
