"""The examples of the models' pages run as they stand."""

import re
from pathlib import Path

import pytest
import torch

PAGES = Path(__file__).parent.parent / "docs" / "models"
EXAMPLES = {
    f"{page.stem}, {number}": example
    for page in sorted(PAGES.glob("*.md"))
    for number, example in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL), 1)
}


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_examples_run(example):
    torch.manual_seed(0)
    exec(example, {})


def test_every_layer_and_model_has_an_example():
    assert {name.split(",")[0] for name in EXAMPLES} >= {
        "continuum_memory",
        "hope",
        "language_models",
        "self_modifying_titans",
    }
