"""Keep the equations of module docstrings as they stand: indented blocks become literal ones."""

from typing import Any

from sphinx.application import Sphinx


def literal_equations(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Put the mark of a literal block before every indented block of a module's docstring."""
    if what != "module":
        return
    for index in reversed(range(1, len(lines))):
        if lines[index].startswith("    ") and not lines[index - 1].strip():
            lines[index:index] = ["::", ""]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the change."""
    app.connect("autodoc-process-docstring", literal_equations)
    return {"parallel_read_safe": True}
