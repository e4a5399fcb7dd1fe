"""What every test file stands on: one thread, the Triton interpreter where there is no GPU, repeatable draws."""

import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before deep_optim is imported

torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def triton_device() -> str:
    """Where a Triton kernel runs: the GPU, or the interpreter on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
