"""Measurements of deep_optim against tuned baselines; `python -m benchmarks` lists them."""
