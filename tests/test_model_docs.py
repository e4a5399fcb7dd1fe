"""The examples of the models' pages run as they stand."""

import re
from pathlib import Path

import pytest
import torch

PAGES = Path(__file__).parent.parent / "docs" / "models"


@pytest.mark.parametrize("page", ["continuum_memory", "hope", "language_models"])
def test_examples_run(page):
    torch.manual_seed(0)
    examples = re.findall(r"```python\n(.*?)```", (PAGES / f"{page}.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert examples
    for example in examples:
        exec(example, {})
