"""Whole matrices out of sharded parameters, and back.

What works element by element runs on each rank's own shard. A memory needs whole matrices: here every rank gathers them
and computes the same result, of which it keeps its shard. Correct everywhere, and as slow as one process.
"""

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard, in the same storage; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor on every rank; a plain tensor is its own."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the shard of `tensor`, known whole to every rank, that belongs to this rank's shard of `like`."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements).to_local()
