"""The examples that need a trainer or several ranks run as their first lines say."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(*command: str) -> str:
    """Return what a command prints, run from the root by this Python."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_hf_trainer(tmp_path: Path) -> None:
    printed = run("examples/hf_trainer.py", str(tmp_path), "20")
    assert float(printed.split("'train_loss': ")[1].split(",")[0].strip("'}\n")) < 3.4  # log(32) = 3.47


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
