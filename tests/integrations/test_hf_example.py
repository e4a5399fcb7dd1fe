"""The example of Hugging Face's Trainer runs as its first lines say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_hf_trainer(tmp_path: Path) -> None:
    command = [sys.executable, "examples/hf_trainer.py", str(tmp_path), "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("'train_loss': ")[1].split(",")[0].strip("'}\n")) < 3.4  # log(32) = 3.47
