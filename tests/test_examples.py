"""Every example runs as its first lines say."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(*command: str) -> str:
    """Return what a command prints, run from the root by this Python."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_is_run_by_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"plain_loop.py", "fsdp2.py", "hf_trainer.py"}


def test_plain_loop() -> None:
    name, _, first, _, last = run("examples/plain_loop.py", "DMGD").split()
    assert name == "DMGD:" and float(last) < float(first) / 2


@pytest.mark.xdist_group("ranks")
def test_fsdp2_trains_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two ranks by torchrun, and from its checkpoint on one, whose variables are those that torchrun sets."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed = run(*torchrun, "examples/fsdp2.py", str(tmp_path / "checkpoint"))
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    printed += run("examples/fsdp2.py", str(tmp_path / "checkpoint"))
    steps = [int(line.split(":")[0].split()[1]) for line in printed.splitlines()]
    losses = [float(line.split()[-1]) for line in printed.splitlines()]
    assert steps == list(range(0, 40, 5))
    assert losses[-1] < losses[3] < losses[0]
