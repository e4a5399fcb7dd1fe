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
    "kernels": "each operation beside the plain way to write it, and what the machine can do",
    "scaling": "memory, communication and time of a step on 8 to 1,024 GPUs: predictions",
