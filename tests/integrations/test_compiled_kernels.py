"""What the compiler makes of every kernel, for three generations of GPUs, none of which has to be there."""

import sys
from pathlib import Path

import pytest

from compiled_kernels import assert_fast, compiled
from deep_optim.ops.backend import HAS_TRITON

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs the compiler that comes with Triton"),
]


def test_deep_momentum_compiles_to_tensor_core_instructions_without_spills(tmp_path: Path) -> None:
    """One process each way, hence a program."""
    kernels = compiled("deep_momentum", tmp_path)
    assert len(kernels) == 21
    for name, usage in kernels.items():
        dots = assert_fast(name, usage, exempt=["LDG.E"] if name.startswith("operands") else ())
        assert usage["instructions"].get("LDG.E", 0) == name.startswith("operands")  # ‖U‖
        assert bool(dots) == ("hidden=0" not in name and name.split()[0] != "delta_rule")  # which multiplies in float32
        if name.startswith("update"):
            assert all("BF16" in op for op in dots if not op.startswith("UTCHMMA")), (name, usage)


def test_symmetric_product_compiles_to_tensor_core_instructions_without_spills(tmp_path: Path) -> None:
    kernels = compiled("symmetric_product", tmp_path)
    assert len(kernels) == 12
    for name, usage in kernels.items():
        dots = assert_fast(name, usage)
        assert dots, (name, usage)
        kind = "TF32" if "fp32" in name else "BF16" if "bf16" in name else "F32"  # the sum's, which float16 has alone
        assert all(kind in op for op in dots if not op.startswith("UTCHMMA")), (name, usage)
        assert sum(usage["instructions"].values()) <= 2500, (name, usage)  # a tile is 4096 entries or more


def test_delta_momentum_compiles_to_tensor_core_instructions_without_spills(tmp_path: Path) -> None:
    kernels = compiled("delta_momentum", tmp_path)
    assert len(kernels) == 21
    for name, usage in kernels.items():
        if name.startswith("factors"):  # numbers of rows
            assert_unspilled(name, usage)
            continue
        count = usage["instructions"]
        # Addresses, sums of squares, ‖U‖, lr, and a factor per row where a thread has no four in a row.
        scalars = [op for op in ("LDG.E", "LDG.E.64", "STG.E.64") if op in count]
        dots = assert_fast(name, usage, exempt=scalars)
        assert sum(count[op] for op in scalars) <= 8, (name, usage)
        assert bool(dots) == name.startswith("step"), (name, usage)
        assert all("BF16" in op for op in dots if not op.startswith("UTCHMMA")), (name, usage)
        assert sum(count.values()) <= 2500, (name, usage)


@pytest.mark.parametrize("op", ["momentum", "descend"])
def test_passes_over_memory_are_nothing_else(op, tmp_path):
    """Few instructions for the 8 entries of a thread: memory is all that such a kernel should wait for."""
    kernels = compiled(op, tmp_path)
    assert len(kernels) == 6
    for name, usage in kernels.items():
        single = {name for name in usage["instructions"] if name.startswith("LDG.E") and not name.endswith(".128")}
        assert not assert_fast(name, usage, exempt=single), (name, usage)  # addresses, and a rate on the device
        assert sum(usage["instructions"].values()) <= 20 * 8, (name, usage)


# Accesses of 16 bytes that read a thread's entries and that write them, and how many may access single numbers: sums,
# shares, coefficients and rates, addresses, and in M3's descent the weight of the row for each of 8 entries.
SMALL_PASSES = {
    "squares": (8, 0, 1),
    "norm": (None, 0, 1),  # the compiler unrolls its loop as it likes
    "stage factor=True": (2, 1, 3),
    "stage factor=False": (1, 1, 2),
    "rows": (3, 0, 3),
    "descent on_device=False": (5, 2, 11),
    "descent on_device=True": (5, 2, 12),
}


@pytest.mark.parametrize("op, count", [("frobenius", 6), ("gram_polynomial", 6), ("mixed_descent", 9)])
def test_small_passes_access_16_bytes_at_a_time_and_spill_nothing(op, count, tmp_path):
    kernels = compiled(op, tmp_path)
    assert len(kernels) == count
    for name, usage in kernels.items():
        number = usage["instructions"]
        reads, writes, single = SMALL_PASSES[name.rpartition(" ")[0]]
        scalars = [op for op in ("LDG.E", "LDG.E.64", "STG.E", "STG.E.64") if op in number]
        assert not assert_fast(name, usage, exempt=scalars), (name, usage)
        assert number["LDG.E.128"] == reads or (reads is None and number["LDG.E.128"]), (name, usage)
        assert number.get("STG.E.128", 0) == writes, (name, usage)
        assert sum(number[op] for op in scalars) <= single, (name, usage)


def assert_unspilled(name, usage):
    assert usage["stack"] == 0 and not {"LDL", "STL"} & {op.split(".")[0] for op in usage["instructions"]}, (
        name,
        usage,
    )
