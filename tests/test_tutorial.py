"""The tutorial runs from top to bottom, and holds what it says."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "tutorial.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]


def source(cell):
    return "".join(cell["source"])


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_every_cell_runs_and_its_assertions_hold():
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot as plt

    settings, names = plt.rcParams.copy(), {}
    try:
        for number, cell in enumerate(CELLS):
            if cell["cell_type"] == "code":
                exec(compile(source(cell), f"{NOTEBOOK.name}, cell {number}", "exec"), names)
        assert len(plt.get_fignums()) == 3
    finally:
        plt.close("all")
        plt.rcParams.update(settings)


def test_what_was_printed_and_drawn_is_kept_for_those_who_only_read():
    outputs = [output for cell in CELLS if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert not any(output["output_type"] == "error" for output in outputs)
    assert sum("assert" in source(cell) for cell in CELLS) >= 3
