"""Optimizers as associative memories: drop-in `torch.optim` replacements from Nested Learning (arXiv:2512.24695)."""

from .optimizers.delta_momentum import DeltaMomentum
from .optimizers.dmgd import DMGD
from .optimizers.m3 import M3
from .optimizers.momentum import Momentum
from .optimizers.preconditioned_momentum import PreconditionedMomentum
from .routing import param_groups

__all__ = ["DMGD", "M3", "DeltaMomentum", "Momentum", "PreconditionedMomentum", "param_groups"]
__version__ = "0.1.0"
