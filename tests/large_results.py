"""What a call allocates: the tensors it makes, by size."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargeResults(TorchDispatchMode):
    """The torch operations that give at least so many numbers, but for views."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.seen = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.numel and not func.is_view:
            self.seen.append(func.__name__)
        return out

    def assert_only(self, made):
        """Hold `made` allocations of memory not yet written, and nothing else, against what was seen."""
        allocations = [name for name in self.seen if name.startswith(("empty", "new_empty"))]
        interpreter = {name for name in self.seen if name.startswith(("set_", "copy_"))}  # moves its arguments so
        assert len(allocations) == made, self.seen
        assert set(self.seen) <= {*allocations, *interpreter}, self.seen
