"""The plain example runs as its first lines say; integrations/test_example_programs.py runs the others."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def test_each_is_run_by_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"plain_loop.py", "fsdp2.py", "hf_trainer.py"}


def test_plain_loop() -> None:
    command = [sys.executable, "examples/plain_loop.py", "DMGD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    name, _, first, _, last = done.stdout.split()
    assert name == "DMGD:" and float(last) < float(first) / 2
