"""Optimizers as associative memories: drop-in `torch.optim` replacements from Nested Learning (arXiv:2512.24695)."""

from .capture import capture_inputs
from .create import create_optimizer, list_optimizers
from .optimizers.delta_momentum import DeltaMomentum
from .optimizers.dgd import DGD
from .optimizers.dmgd import DMGD
from .optimizers.input_delta_momentum import InputDeltaMomentum
from .optimizers.m3 import M3
from .optimizers.momentum import Momentum
from .optimizers.multi_frequency import MultiFrequency
from .optimizers.preconditioned_momentum import PreconditionedMomentum
from .routing import param_groups

__all__ = [
    "DGD",
    "DMGD",
    "M3",
    "DeltaMomentum",
    "InputDeltaMomentum",
    "Momentum",
    "MultiFrequency",
    "PreconditionedMomentum",
    "capture_inputs",
    "create_optimizer",
    "list_optimizers",
    "param_groups",
]
__version__ = "0.1.0"
