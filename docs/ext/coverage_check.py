"""Fail the build when a public name has no entry in the documentation.

Public are the names in `deep_optim.__all__`, and every function of `deep_optim.ops` whose name has no underscore in
front. An entry is what autodoc makes of a docstring, so a name without a docstring fails as well.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import deep_optim
import deep_optim.ops

logger = logging.getLogger(__name__)


def public_names() -> Iterator[str]:
    """Yield the full name of everything that must be documented."""
    yield from (f"deep_optim.{name}" for name in deep_optim.__all__)
    for info in pkgutil.iter_modules(deep_optim.ops.__path__, "deep_optim.ops."):
        for name, function in inspect.getmembers(importlib.import_module(info.name), inspect.isfunction):
            if not name.startswith("_") and function.__module__ == info.name:
                yield f"{info.name}.{name}"


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn about each public name without an entry; `sphinx -W` makes an error of it."""
    documented = env.get_domain("py").objects
    for name in public_names():
        if name not in documented:
            logger.warning("%s is public, but documented nowhere or without a docstring", name, type="coverage")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the check."""
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True}
