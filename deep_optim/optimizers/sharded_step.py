"""The step of sharded parameters: the directions of their descent, of which every rank gets its shards.

    entry by entry      features and update on each rank's shards; the output map too, but for Newton-Schulz, which
                        takes the direction whole: 1 tensor gathered, 1 scattered
    matrix by matrix    all of it on whole matrices: the gradient, the memories of its shape and, where something draws
                        at the weights, these are gathered; the direction and the memories are scattered

State that is not of its parameter's shape is the same on every rank: the owner of a matrix sends what it makes of it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .matrices import matrix_shape
from .rounding import exact_dtype
from .sharding import Job, Loads, can_spread, local, local_of, matrix_cost, spread, whole
from .stacks import matrices, stacks

if TYPE_CHECKING:
    from .base import MemoryOptimizer


def entry_by_entry(optimizer: "MemoryOptimizer", group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
    """Return this rank's shards of the directions, the memories written, where `optimizer.entrywise(group)`."""
    directions = [torch.empty_like(param, dtype=exact_dtype(param)) for param in params]
    whole_output = group["output"] == "newton_schulz"
    for param, direction in zip(params, directions, strict=True):
        state = optimizer.state[param]
        before = {name: local(value).reshape(1, 1, -1) for name, value in state.items()}
        after = dict(before)
        grad = local(param.grad).to(direction.dtype).reshape(1, 1, -1)  # type: ignore[arg-type]
        written = optimizer.features(-grad if group["maximize"] else grad, after, group)
        answer = optimizer.update(written, after, group)
        if not whole_output:
            answer = optimizer.output(answer, written, after, group)
        local(direction).copy_(answer.reshape(local(direction).shape))
        for name, value in after.items():
            if value is not before[name]:
                local(state[name]).copy_(value.reshape(local(direction).shape))
    if not whole_output:
        return [local(direction) for direction in directions]

    return on_whole(directions, lambda stacked: optimizer.output(stacked, stacked, {}, group), group, optimizer._loads)


def on_whole(
    tensors: Sequence[Tensor], function: Callable[[Tensor], Tensor], group: Mapping[str, Any], loads: Loads
) -> list[Tensor]:
    """Return this rank's shards of `function` of each tensor; sharded ones are spread.

    It is handed stacks [B, m, n] of the matrices that tensors of one shape are in this group, and keeps their shape.
    """

    def answers(wholes: list[Tensor]) -> list[Tensor]:
        found = {}
        for members in stacks(wholes):
            stacked = function(matrices(members, matrix_shape(members[0], group), members[0].dtype))
            for member, block in zip(members, stacked.chunk(len(members)), strict=True):
                found[id(member)] = block.reshape(member.shape).to(member.dtype)
        return [found[id(each)] for each in wholes]

    sharded = [tensor for tensor in tensors if can_spread(tensor)]
    rest = [tensor for tensor in tensors if not can_spread(tensor)]
    results = [torch.empty_like(tensor) for tensor in sharded]
    jobs = [Job(matrix_cost(tensor), [tensor], [result]) for tensor, result in zip(sharded, results, strict=True)]
    spread(jobs, lambda _, given: [[answer] for answer in answers([tensor for (tensor,) in given])], loads)
    done = {id(tensor): local(result) for tensor, result in zip(sharded, results, strict=True)}
    for members in stacks(rest):  # of which no more are whole at a time
        for tensor, answer in zip(members, answers([whole(tensor) for tensor in members]), strict=True):
            done[id(tensor)] = local_of(answer, tensor)
    return [done[id(tensor)] for tensor in tensors]


def matrix_by_matrix(optimizer: "MemoryOptimizer", group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
    """Return this rank's shards of the directions, the memories written, each matrix computed on one rank."""
    directions = [torch.empty_like(param, dtype=exact_dtype(param)) for param in params]
    sharded, written = [], []  # for each parameter, the names of state that are gathered, and that are scattered
    for param in params:
        state = {name: v for name, v in optimizer.state[param].items() if name not in optimizer.per_parameter}
        sharded.append([name for name, value in state.items() if can_spread(value)])
        writable = [name for name in state if name not in optimizer.read_only]
        written.append([name for name in writable if name in sharded[-1] or state[name].ndim])  # no counters

    def job(number: int, param: Tensor) -> Job:
        state = optimizer.state[param]
        gather = [param.grad, *(state[name] for name in sharded[number])]
        scatter = [directions[number], *(state[name] for name in written[number])]
        return Job(optimizer.cost(param, group), [*gather, param] if optimizer.reads_weights else gather, scatter)  # type: ignore[list-item]

    def work(numbers: list[int], given: list[list[Tensor]]) -> list[list[Tensor]]:
        number_of = {id(tensors[0]): number for number, tensors in zip(numbers, given, strict=True)}
        tensors_of = dict(zip(numbers, given, strict=True))
        results = {}
        for grads in stacks([tensors[0] for tensors in given]):
            members = [number_of[id(grad)] for grad in grads]
            gathered = [dict(zip(sharded[each], tensors_of[each][1:], strict=False)) for each in members]
            owners = [params[each] for each in members]
            states = [{**optimizer.state[param], **state} for param, state in zip(owners, gathered, strict=True)]
            weights = [tensors_of[each][-1] for each in members]
            in_place = optimizer.addressable([], grads, states, group)
            read = optimizer.write_in_place(grads, states, group) if in_place else None
            direction = optimizer.direction(group, owners, weights, grads, states, read)
            blocks = direction.chunk(len(members))
            for number, state, grad, block in zip(members, states, grads, blocks, strict=True):
                results[number] = [
                    block.reshape(grad.shape).to(exact_dtype(grad)),
                    *(state[name] for name in written[number]),
                ]
        return [results[number] for number in numbers]

    spread([job(number, param) for number, param in enumerate(params)], work, optimizer._loads)
    return [local(direction) for direction in directions]
