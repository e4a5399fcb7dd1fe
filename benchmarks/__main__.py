"""`python -m benchmarks <name>`: run one benchmark; without a name, list them."""

import importlib
import os
import sys

# One thread per process, set before torch is imported: trials run in parallel processes, and a ratio of
# step times must not depend on how many threads happened to be free.
os.environ.setdefault("OMP_NUM_THREADS", "1")

BENCHMARKS = {
    "convergence": "loss at equal steps and at equal wall time, every optimizer tuned with the same budget",
    "toy": "paths of momentum and delta momentum on a two-dimensional valley (Eq. 53)",
    "dmgd": "what each part of DMGD is worth: one change at a time",
    "m3": "what each part of M3 is worth: one change at a time, against tuned Muon",
    "meta": "whether a learned initial memory helps DMGD on tasks it was not learned on",
    "memory": "what a DMGD memory knows about the gradients, over a training run",
    "forgetting": "what is left of earlier tasks, against how well each was learnt: a frontier over learning rates",
    "models": "what sequence models can learn of problems with a known answer",
    "language": "next-byte prediction on real text by sequence models of equal size",
    "two_languages": "what is left of a first language after a second, by model",
    "kernels": "each operation beside the plain way to write it, and what the machine can do",
    "scaling": "memory, communication and time of a step on 8 to 1,024 GPUs: predictions",
    "throughput": "tokens per second, activations and state of the sequence models",
    "activations": "bytes that a block of the paper's sizes keeps for the backward pass, counted without computing",
    "overhead": "what watching inputs and chunks of gradients add to a training step",
    "step_time": "milliseconds and state bytes of one optimizer step, in paired shuffled rounds",
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("python -m benchmarks <name> [--help]\n")
        print("\n".join(f"  {name:12} {line}" for name, line in BENCHMARKS.items()))
        return 0
    name, *rest = arguments
    if name not in BENCHMARKS:
        print(f"no benchmark named {name!r}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"benchmarks.{name}").main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
