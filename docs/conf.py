"""How the documentation is built."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "ext"))

project = "deep_optim"
author = copyright = "The deep_optim contributors"
release = version = installed_version("deep_optim")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "coverage_check",
    "equations",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"deep_optim {release}"

highlight_language = "text"
default_role = "literal"  # docstrings mark code with single backticks
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the argument lists say what is taken; the signatures stay short

# References within the package must resolve. Other projects' are not looked up, so that a build needs no network.
nitpick_ignore_regex = [("py:.*", r"(?!deep_optim\b).*")]
