"""Compile the kernels of an op for GPUs that need not be there, and print what the compiler made of them.

Run as a program, without TRITON_INTERPRET: one process either interprets kernels or compiles them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ARCHITECTURES = (80, 90, 100)  # mma, wgmma, tcgen05
INTEGERS = (
    "r",
    "p",
    "h",
    "m",
    "n",
    "d",
    "x_batch",
    "x_row",
    "x_col",
    "stack",
    "size",
    "tiles",
)  # what a kernel is given; all else is float32


def compile_kernel(kernel, constants, options, architecture, dtypes):
    """Return registers, bytes of stack and of shared memory, and how often each instruction occurs.

    Sizes, strides and addresses are multiples of 16; `dtypes` names those of the pointers to anything but float32.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr") or name in dtypes:
            signature[name] = f"*{dtypes.get(name, 'fp32')}"
        else:
            signature[name] = "i32" if name in INTEGERS else "fp32"
        if signature[name] not in ("constexpr", "fp32"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    instructions = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE))
    return {
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "instructions": dict(instructions),
    }


def split(tiles):
    """Return the sizes of the tiles, and what is an option of the compiler."""
    options = {name: tiles[name] for name in ("num_warps", "num_stages") if name in tiles}
    return {name: size for name, size in tiles.items() if name not in options}, options


def deep_momentum():
    """Yield names and the arguments of `compile_kernel`: every tile size, tall and wide."""
    from deep_optim.ops import deep_momentum_triton as passes
    from deep_optim.ops.delta_rule import _delta_rule_kernel

    tiles, options = split(passes._OPERANDS)
    for wide, hidden in ((False, 0), (False, 64), (True, 32)):
        constants = {"SATURATED": 1e9, "WIDE": wide, "HIDDEN": hidden > 0, "BLOCK_H": hidden or 16, **tiles}
        yield f"operands {wide=} {hidden=}", passes._write_operands_kernel, constants, options, {"operands_ptr": "bf16"}
    for size, wide, hidden in (("_LARGE", False, 64), ("_LARGE", True, 32), ("_SMALL", False, 32)):
        tiles, options = split(getattr(passes, size))
        constants = {"READ": True, "WIDE": wide, "HIDDEN": True, "BLOCK_H": hidden, **tiles}
        low = {"operands_ptr": "bf16", "factors_ptr": "bf16"}
        yield f"update {size} {wide=} {hidden=}", passes._update_memory_kernel, constants, options, low
    yield "delta_rule", _delta_rule_kernel, {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 64}, {"num_warps": 4}, {}


def symmetric_product():
    """Likewise: every tile size, a matrix and its transpose, with and without a matrix to add."""
    from deep_optim.ops import symmetric_product as op

    for size, dtype, contiguous, add in (
        ("_LARGE", "bf16", "x_col", True),
        ("_LARGE", "bf16", "x_row", False),
        ("_SMALL", "fp16", "x_col", True),
        ("_SINGLE", "fp32", "x_col", True),
    ):
        tiles, options = split(getattr(op, size))
        dtypes = dict.fromkeys(("x_ptr", "add_ptr", "out_ptr"), dtype)
        constants = {contiguous: 1, "ADD": add, **tiles}
        yield f"{size} {dtype} {contiguous=} {add=}", op._symmetric_product_kernel, constants, options, dtypes


def delta_momentum():
    """Likewise: every pass, the last by both sizes of tiles, with one product and with two."""
    from deep_optim.ops import delta_momentum_triton as passes

    dtypes = {"table_ptr": "i64", "squares_ptr": "fp64"} | dict.fromkeys(("operands_ptr", "s_ptr", "q_ptr"), "bf16")
    tiles, options = split({**passes._SQUARES, "num_stages": 3})
    yield "squares", passes._squares_kernel, {"WIDE": True, "ALIGNED": True, **tiles}, options, dtypes
    tiles, options = split({**passes._OPERANDS, "num_stages": 3})
    yield "operands", passes._operands_kernel, {"WIDE": False, "ALIGNED": True, **tiles}, options, dtypes
    tiles, options = split(passes._FACTORS)
    for soft in (True, False):
        constants = {"SOFT": soft, "SIGN": -1.0, "TINY": 1e-38, **tiles}
        yield f"factors {soft=}", passes._factors_kernel, constants, options, {"squares_ptr": "fp64"}
    for size, wide, short, on_device in (
        ("_LARGE", True, True, False),
        ("_LARGE", False, True, False),
        ("_SMALL", False, False, True),
    ):
        tiles, options = split(getattr(passes, size))
        switches = {"READ": True, "SHORT": short, "LONG": wide or not short, "LR_ON_DEVICE": on_device}
        switches |= {"DESCEND": on_device or not wide}
        constants = {"WIDE": wide, "ALIGNED": True, **switches, **tiles}
        rate = {"lr": "fp32"} if on_device else {}
        yield f"step {size} {wide=}", passes._step_kernel, constants, options, dtypes | rate


def momentum():
    """Likewise: the memory alone is read, or the write again with it."""
    from deep_optim.ops import momentum as op

    tiles, options = split(op._BLOCK)
    options |= {"enable_fp_fusion": False}
    for nesterov in (True, False):
        constants = {"NESTEROV": nesterov, "MAXIMIZE": not nesterov, "ALIGNED": True, **tiles}
        yield f"momentum {nesterov=}", op._momentum_kernel, constants, options, {"table_ptr": "i64"}


def descend():
    """Likewise: a rate on the host with a direction in half precision, and one on the device."""
    from deep_optim.ops import descend as op

    tiles, options = split(op._BLOCK)
    options |= {"enable_fp_fusion": False}
    for on_device, dtypes in ((False, {"direction_ptr": "fp16"}), (True, {"lr": "fp32"})):
        constants = {"LR_ON_DEVICE": on_device, "ALIGNED": True, **tiles}
        yield f"descend {on_device=}", op._descend_kernel, constants, options, {"table_ptr": "i64"} | dtypes


def frobenius():
    """Likewise: sums over tiles, and the sums of those."""
    from deep_optim.ops import frobenius as op

    tiles, options = split(op._TILE)
    yield "squares", op._squares_kernel, tiles, options, {"sums_ptr": "fp64"}
    yield "norm", op._norm_kernel, {"TINY": 1e-38, "BLOCK": 256}, {"num_warps": 4}, {"sums_ptr": "fp64"}


def gram_polynomial():
    """Likewise: with a product and without."""
    from deep_optim.ops import gram_polynomial as op

    tiles, options = split(op._BLOCK)
    low = dict.fromkeys(("product_ptr", "gram_ptr", "out_ptr"), "bf16")
    for factor in (True, False):
        yield f"stage {factor=}", op._stage_kernel, {"FACTOR": factor, **tiles}, options, low


def mixed_descent():
    """Likewise: the rows' squares, and the descent by a rate on the host and one on the device."""
    from deep_optim.ops import mixed_descent as op

    low = {"table_ptr": "i64", "fast_ptr": "fp16"}
    tiles, options = split(op._ROWS)
    yield "rows", op._mixed_squares_kernel, {"ALIGNED": True, **tiles}, options, low
    tiles, options = split(op._TILE)
    for on_device, dtypes in ((False, low), (True, low | {"lr": "fp32"})):
        constants = {"LR_ON_DEVICE": on_device, "ALIGNED": True, **tiles}
        yield f"descent {on_device=}", op._mixed_descent_kernel, constants, options, dtypes


MAKERS = (
    deep_momentum,
    symmetric_product,
    delta_momentum,
    momentum,
    descend,
    frobenius,
    gram_polynomial,
    mixed_descent,
)
OPS = {make.__name__: make for make in MAKERS}


def compiled(op, cache):
    """Return what the compiler made of every kernel of one op: from a process of its own, which interprets nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run([sys.executable, __file__, op], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def assert_fast(name, usage, exempt=()):
    """Nothing spilled, the tensor cores of the generation (wherever there are any), whole 16-byte accesses.

    `exempt` are the instructions that may access less: those of single numbers.
    """
    count = usage["instructions"]
    loads, stores, spills, dots = (
        {op for op in count if op.split(".")[0] in kinds}
        for kinds in (("LDG", "LDGSTS"), ("STG",), ("LDL", "STL"), ("HMMA", "HGMMA", "UTCHMMA"))
    )
    assert usage["stack"] == 0 and not spills, (name, usage)
    assert usage["shared"] <= 99 * 1024, (name, usage)  # what the smallest GPUs with bfloat16 have, sm_86 and sm_89
    assert all(op.endswith(".128") for op in (loads | stores) - set(exempt)), (name, usage)
    generation = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}[name.split()[-1]]
    assert all(op.split(".")[0] == generation for op in dots), (name, usage)
    return dots


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    result = {}
    for name, kernel, constants, options, dtypes in OPS[sys.argv[1]]():
        for architecture in ARCHITECTURES:
            result[f"{name} sm_{architecture}"] = compile_kernel(kernel, constants, options, architecture, dtypes)
    json.dump(result, sys.stdout)
