"""Compile every kernel of a deep memory for GPUs that need not be there, and print what the compiler made of it.

Run as a program, without TRITON_INTERPRET: one process either interprets kernels or compiles them.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ARCHITECTURES = (80, 90, 100)  # mma, wgmma, tcgen05


def compile_kernel(kernel, constants, options, architecture, low=()):
    """Return registers, bytes of stack and of shared memory, and how often each instruction occurs.

    Sizes and addresses are multiples of 16; `low` names the pointers to bfloat16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*bf16" if name in low else "*fp32"
        else:
            signature[name] = "i32" if name in ("r", "p", "h", "m", "n", "d") else "fp32"
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


def variants():
    """Yield names and the arguments of `compile_kernel`: every tile size, tall and wide."""
    from deep_optim.ops import deep_momentum_triton as passes
    from deep_optim.ops.delta_rule import _delta_rule_kernel

    def split(tiles):
        options = {name: tiles[name] for name in ("num_warps", "num_stages")}
        return {name: size for name, size in tiles.items() if name not in options}, options

    tiles, options = split(passes._OPERANDS)
    for wide, hidden in ((False, 0), (False, 64), (True, 32)):
        constants = {"SATURATED": 1e9, "WIDE": wide, "HIDDEN": hidden > 0, "BLOCK_H": hidden or 16, **tiles}
        yield f"operands {wide=} {hidden=}", passes._write_operands_kernel, constants, options, ("operands_ptr",)
    for size, wide, hidden in (("_LARGE", False, 64), ("_LARGE", True, 32), ("_SMALL", False, 32)):
        tiles, options = split(getattr(passes, size))
        constants = {"READ": True, "WIDE": wide, "HIDDEN": True, "BLOCK_H": hidden, **tiles}
        low = ("operands_ptr", "factors_ptr")
        yield f"update {size} {wide=} {hidden=}", passes._update_memory_kernel, constants, options, low
    yield "delta_rule", _delta_rule_kernel, {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 64}, {"num_warps": 4}, ()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    result = {}
    for name, kernel, constants, options, low in variants():
        for architecture in ARCHITECTURES:
            result[f"{name} sm_{architecture}"] = compile_kernel(kernel, constants, options, architecture, low)
    json.dump(result, sys.stdout)
