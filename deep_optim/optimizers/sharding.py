"""Sharded parameters (FSDP2, DTensor): what needs whole matrices is spread over the ranks, each matrix to one of them.

    owner      the costliest matrix first, to the rank that has the least to do so far
    gather     every rank sends its shards of a matrix to the owner                    one all_to_all per batch
    compute    the owner, alone
    scatter    the owner sends every rank its shards of the results                    one all_to_all per batch

What works entry by entry needs none of this and runs on each rank's shards. Matrices travel in batches: while a rank
computes on one, the next is gathered and the one before is scattered. So at a time a rank holds whole of the matrices
of two or three batches, about `_BATCH_NUMEL` entries each or one matrix, and what is sent of them.

A shard is what `torch.chunk` makes of a tensor along `Shard(dim)`, mesh dimension by mesh dimension, and may be empty.
Where a mesh dimension replicates (HSDP), the matrices are spread over all replicas too: the owner gathers from its own
replica, and sends every replica the results. Other placements (FSDP2 over tensor parallelism) are gathered and computed
on every rank: correct, and as slow as one process.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

_BATCH_NUMEL = 2**24  # per rank and tensor of a job: enough to fill a network, 64 MB in float32


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


def can_spread(*tensors: Tensor | None) -> bool:
    """Return whether these are shards of the kind that `spread` puts together."""
    return all(
        isinstance(tensor, DTensor) and all(type(each) in (Shard, Replicate) for each in tensor.placements)
        for tensor in tensors
    )


class Job(NamedTuple):
    """Work on one matrix: what its owner needs whole, and where the results go.

    Args:
        cost: in any unit, as long as it is the same for all jobs.
        gather: sharded tensors.
        scatter: sharded tensors, of which every rank's shard is written, and plain ones, which are written on all.
    """

    cost: float
    gather: Sequence[Tensor]
    scatter: Sequence[Tensor]


Work = Callable[[list[int], list[list[Tensor]]], list[list[Tensor]]]
Loads = dict[DeviceMesh, list[float]]  # what each rank has to do already, over the calls of one step


def spread(jobs: Sequence[Job], work: Work, loads: Loads) -> None:
    """Do `jobs`, each on one rank of its mesh; every rank must call this with the same jobs in the same order.

    `work` is called on each rank with the numbers of the jobs that it owns in a batch, maybe none, and with the whole
    tensors of each. It returns the results of each, in the order of `scatter`.
    """
    on_mesh: dict[DeviceMesh, list[int]] = {}
    for number, job in enumerate(jobs):
        on_mesh.setdefault(job.gather[0].device_mesh, []).append(number)  # type: ignore[attr-defined]
    for mesh, numbers in on_mesh.items():
        _Spread(mesh, jobs, work, loads).run(numbers)


def matrix_cost(tensor: Tensor) -> float:
    """Return what a matrix product in Newton-Schulz costs, up to a factor: m n min(m, n)."""
    rows = tensor.shape[0] if tensor.ndim > 1 else 1
    return tensor.numel() * min(rows, tensor.numel() // max(rows, 1))


class _Spread:
    """The ranks of one mesh: who owns which job, who has which shard, and the exchange between them."""

    def __init__(self, mesh: DeviceMesh, jobs: Sequence[Job], work: Work, loads: Loads) -> None:
        self.jobs, self.work = jobs, work
        self.group = _group(mesh)
        self.shape = tuple(mesh.shape)
        ranks = dist.get_process_group_ranks(self.group)
        self.places = [tuple((mesh.mesh == rank).nonzero()[0].tolist()) for rank in ranks]  # coordinates in the mesh
        self.rank = dist.get_rank(self.group)
        self.loads = loads.setdefault(mesh, [0.0] * len(ranks))
        self.empty = local(jobs[0].gather[0]).new_empty(0)

    def run(self, numbers: list[int]) -> None:
        """Gather the next batch, compute this one, scatter it: three at a time."""
        batches = list(self._batches(numbers))
        gathered = self._gather(batches[0])
        scattered: Callable[[], Any] = list
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            given = gathered()
            if following is not None:
                gathered = self._gather(following)
            results = self.work(batch[self.rank], given)
            scattered()
            scattered = self._scatter(batch, results)
        scattered()

    def _batches(self, numbers: list[int]) -> Iterator[list[list[int]]]:
        """Yield the jobs of each rank, batch by batch."""
        batch: list[list[int]] = [[] for _ in self.places]
        size = 0
        for number in sorted(numbers, key=lambda each: -self.jobs[each].cost):  # stable: the same on all ranks
            numel = self.jobs[number].gather[0].numel()
            if size and size + numel > _BATCH_NUMEL * len(self.places):
                yield batch
                batch, size = [[] for _ in self.places], 0
            owner = self.loads.index(min(self.loads))
            self.loads[owner] += self.jobs[number].cost
            batch[owner].append(number)
            size += numel
        yield batch

    def _gather(self, batch: list[list[int]]) -> Callable[[], list[list[Tensor]]]:
        """Start sending every owner its shards; the returned function waits and returns this rank's whole tensors."""
        sent = [
            [local(tensor) for tensor in self._inputs(numbers) if self._feeds(tensor, self.rank, owner)]
            for owner, numbers in enumerate(batch)
        ]
        mine = batch[self.rank]
        wholes = [[local(t).new_empty(t.shape) for t in self.jobs[number].gather] for number in mine]
        flat = [tensor for tensors in wholes for tensor in tensors]
        received = [
            [
                self._shard(into, tensor.placements, rank)  # type: ignore[attr-defined]
                for into, tensor in zip(flat, self._inputs(mine), strict=True)
                if self._feeds(tensor, rank, self.rank)
            ]
            for rank in range(len(self.places))
        ]
        dtypes = {tensor.dtype for numbers in batch for tensor in self._inputs(numbers)}
        finish = _exchange(sent, received, self._buffers(dtypes), self.group)
        return lambda: (finish(), wholes)[1]

    def _scatter(self, batch: list[list[int]], results: list[list[Tensor]]) -> Callable[[], None]:
        """Start sending every rank its shards of the results; the returned function waits until they are written."""
        targets = [[tensor for number in numbers for tensor in self.jobs[number].scatter] for numbers in batch]
        flat = [result for each in results for result in each]
        sent = [
            [
                self._shard(result, target.placements, rank) if isinstance(target, DTensor) else result
                for result, target in zip(flat, targets[self.rank], strict=True)
            ]
            for rank in range(len(self.places))
        ]
        received = [[local(target) for target in each] for each in targets]
        dtypes = {tensor.dtype for each in targets for tensor in each}
        return _exchange(sent, received, self._buffers(dtypes), self.group)

    def _buffers(self, dtypes: set[torch.dtype]) -> list[Tensor]:
        """Return an empty tensor of each dtype, in the same order on all ranks."""
        return [self.empty.to(dtype) for dtype in sorted(dtypes, key=str)]

    def _inputs(self, numbers: list[int]) -> list[Tensor]:
        return [tensor for number in numbers for tensor in self.jobs[number].gather]

    def _feeds(self, tensor: Any, rank: int, owner: int) -> bool:
        """Return whether a rank's shard is one that the owner gathers: of replicas, its own."""
        places = zip(tensor.placements, self.places[rank], self.places[owner], strict=True)
        return all(theirs == its for placement, theirs, its in places if isinstance(placement, Replicate))

    def _shard(self, tensor: Tensor, placements: Sequence[Placement], rank: int) -> Tensor:
        """Return a view of what of a whole tensor a rank has."""
        for placement, size, place in zip(placements, self.shape, self.places[rank], strict=True):
            if isinstance(placement, Shard):
                chunks = tensor.chunk(size, placement.dim)
                tensor = chunks[place] if place < len(chunks) else tensor.narrow(placement.dim, 0, 0)
        return tensor


def _group(mesh: DeviceMesh) -> "dist.ProcessGroup":
    """Return the process group of all ranks of a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD  # type: ignore[return-value]
    return mesh._flatten().get_group()


def _exchange(
    sent: list[list[Tensor]], received: list[list[Tensor]], buffers: list[Tensor], group: "dist.ProcessGroup"
) -> Callable[[], None]:
    """Start sending `sent[r]` to each rank r; the returned function waits and writes to `received[r]` what r sent.

    There is one message for each dtype, also where a rank has nothing to say.
    """
    under_way = []
    for empty in buffers:
        outgoing, incoming = (
            [[t for t in some if t.dtype == empty.dtype] for some in each] for each in (sent, received)
        )
        sizes_out, sizes_in = ([sum(t.numel() for t in some) for some in each] for each in (outgoing, incoming))
        message = torch.cat([empty, *(tensor.reshape(-1) for some in outgoing for tensor in some)])
        answer = empty.new_empty(sum(sizes_in))
        handle = dist.all_to_all_single(answer, message, sizes_in, sizes_out, group=group, async_op=True)
        under_way.append((handle, message, answer, [tensor for some in incoming for tensor in some]))

    def finish() -> None:
        for handle, _, answer, targets in under_way:  # the message lives until it has arrived
            handle.wait()
            for target, flat in zip(targets, answer.split([each.numel() for each in targets]), strict=True):
                target.copy_(flat.view(target.shape))

    return finish
