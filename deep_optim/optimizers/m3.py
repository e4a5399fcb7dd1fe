"""M3, multi-scale momentum Muon: a fast memory written by every gradient, and a slow one written in chunks of C.

    O₂  ← σ(M₂) or, under "pre", M₂;   M₂ ← slow_beta · M₂     at the first step of a chunk
    M₂  ← M₂ + (1 − slow_beta) / C · G                         so that a chunk adds the mean of its gradients
    M   ← momentum · M + G
    D   = G + momentum · M   if nesterov, else M
    O   = (σ(D) + a O₂) / (1 + a)                              mix="post"
    O   = σ((1 − momentum) · D + a O₂)                         mix="pre"
    V   ← beta2 · V + (1 − beta2) · X²                         X: the RMS of O's rows, its entries, or those of G
    Ô   = O / (√V̂ + ε), brought back to ‖O‖_F
    W   ← (1 − lr · weight_decay) · W − lr · Ô

σ is 0.2 √max(m, n) times Newton-Schulz. a = 0 in the first chunk, when there is nothing slow to read, and rises to
alpha over `alpha_warmup` steps after it.

With alpha = 0 and without V it is `Momentum`, which is Muon: one memory, one time scale. With V of the rows alone it
is NorMuon (arXiv:2510.05491) but for its fixed size of the update; "elementwise" is AdaMuon's (arXiv:2507.11005).
Nested Learning, arXiv:2512.24695, Algorithm 1 and Eq. 75. As printed, the memories and V are sums that never decay,
so that both memories hold the same gradients; docs/readings.md has what is changed here, and why.
"""

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from deep_optim.ops.frobenius import frobenius_norm
from deep_optim.ops.mixed_descent import mixed_descent_triton, mixed_squares_triton
from deep_optim.ops.newton_schulz import Coefficients

from .base import MemoryOptimizer
from .counters import beside, weight_seen
from .matrices import has_memory, matrix_shape
from .momentum import write_momentum
from .output_map import orthogonalise
from .sharded_step import on_whole
from .sharding import local
from .stacks import as_matrices, stack, unstack
from .validation import check_at_least, check_choice, check_count

Mix = Literal["post", "pre"]
SecondMoment = Literal["row", "elementwise", "gradient", "none"]


class M3(MemoryOptimizer):
    """Muon with a second, slow memory: directions that gradients had a thousand steps ago still count.

    Keeps 12 bytes per parameter and 4 m per m × n matrix; 16 under `second_moment` "elementwise" or "gradient"; with
    `alpha=0` 8 less. A step costs Newton-Schulz of the fast memory, as Muon's, and that of the slow one once in
    `chunk_size` steps (never under `mix="pre"`).

    Args:
        params: parameters, named parameters, or groups of them; any shape.
        lr: step size; AdamW's usual values.
        momentum: how much of the fast memory survives a step, 0 to 1.
        weight_decay: decoupled, multiplied by `lr` as in AdamW.
        nesterov: read the fast memory with the same write added once more.
        alpha: weight of the slow memory beside the fast one's 1. 0 keeps no slow memory.
        alpha_warmup: steps over which that weight rises linearly, from the first gradient after the first chunk on.
        chunk_size: gradients between two updates of what is read from the slow memory. A parameter counts its own.
        slow_beta: how much of the slow memory survives a chunk; it remembers chunk_size / (1 − slow_beta) steps.
        spread: under "post", read the slow memories of a group one after the other over a chunk, rather than all at its
            first step, which then takes twice the products of any other. Most are read amid a chunk then.
        mix: "post" adds the two orthogonalised memories. "pre" orthogonalises their sum: no second Newton-Schulz, and
            a slow memory counts for less where its gradients disagreed.
        second_moment: what evens out the update. "row": the average size of its rows, over time; "elementwise": of its
            entries; "gradient": of the gradient's entries, the paper's, for which alone `eps` compares with the scale
            of the loss; "none". None of them changes the update's Frobenius norm.
        beta2: decay rate of the second moment.
        eps: term in its denominator.
        ns_steps: Newton-Schulz iterations.
        ns_coefficients: "muon" or "polar_express".
        adamw_betas: AdamW's decay rates, for what is no matrix.
        adamw_eps: AdamW's term in the denominator; likewise.
        foreach: use torch's foreach AdamW for what is no matrix.
        maximize: ascend instead.
        capturable: keep counters on the device, so that a CUDA graph can capture the step. Then, and under
            torch.compile, the host cannot know where a chunk ends: under `mix="post"` both memories are orthogonalised
            at every step, though the slow one is used as often. `mix="pre"` costs nothing more.
        differentiable: refused; the memories are written in place.
        fused: use torch's fused AdamW for what is no matrix; by default wherever torch has one.
        kahan_sum: keep what rounding takes from bfloat16 and float16 weights, so that small updates are not lost, at
            2 bytes per parameter.

    Raises:
        ValueError: for a value out of range, in the constructor or in any group.
        RuntimeError: for `differentiable`, for `fused` with `foreach`, for complex parameters or sparse gradients, and
            for a group whose `alpha` was 0 when its state was made and no longer is.

    Example:
        >>> optimizer = M3(model.parameters(), lr=1e-3)  # doctest: +SKIP
    """

    # both memories are orthogonalised: the output map is no argument
    group_defaults: ClassVar[dict[str, Any]] = {**MemoryOptimizer.group_defaults, "output": "newton_schulz"}
    per_parameter: ClassVar[tuple[str, ...]] = (*MemoryOptimizer.per_parameter, "slow.memory")
    read_only: ClassVar[tuple[str, ...]] = ("slow.answer",)
    in_place: ClassVar[tuple[str, ...]] = ("memory",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 1e-2,
        nesterov: bool = True,
        alpha: float = 0.1,
        alpha_warmup: int = 100,
        chunk_size: int = 100,
        slow_beta: float = 0.9,
        mix: Mix = "post",
        second_moment: SecondMoment = "row",
        beta2: float = 0.95,
        eps: float = 1e-8,
        ns_steps: int = 5,
        ns_coefficients: Coefficients = "muon",
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        kahan_sum: bool = False,
        spread: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "alpha": alpha,
            "alpha_warmup": alpha_warmup,
            "chunk_size": chunk_size,
            "slow_beta": slow_beta,
            "mix": mix,
            "second_moment": second_moment,
            "beta2": beta2,
            "eps": eps,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "kahan_sum": kahan_sum,
            "spread": spread,
        }
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_choice(group, "output", ("newton_schulz",))
        check_choice(group, "mix", get_args(Mix))
        check_choice(group, "second_moment", get_args(SecondMoment))
        check_at_least(group, 0.0, "alpha")
        check_count(group, "alpha_warmup", minimum=0)
        check_count(group, "chunk_size")
        for name in ("slow_beta", "beta2"):
            if not 0.0 <= group[name] < 1.0:
                raise ValueError(f"Invalid {name} value: {group[name]}")
        if not group["eps"] >= 0.0:
            raise ValueError(f"Invalid epsilon value: {group['eps']}")
        if group["mix"] == "pre" and group["momentum"] == 1.0:
            raise ValueError(f"Invalid momentum value: {group['momentum']}, mix='pre' needs less than 1")

    def check_gradients(self, group: dict[str, Any]) -> None:
        super().check_gradients(group)
        if group["alpha"] > 0:
            for param in group["params"]:
                state = self.state.get(param)
                if state and has_memory(param, group) and "slow.memory" not in state:
                    raise RuntimeError(
                        f"alpha was 0 and is {group['alpha']} now, but a parameter of size {tuple(param.size())} has "
                        "kept no slow memory: start with a positive alpha (alpha_warmup brings it in slowly)"
                    )

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = {"memory": torch.zeros_like(param)}
        if group["alpha"] > 0:
            state |= {"slow.memory": torch.zeros_like(param), "slow.answer": torch.zeros_like(param)}
        if group["second_moment"] == "row":
            split, m, _ = matrix_shape(param, group)
            state["exp_avg_sq"] = torch.zeros(split, m, 1, dtype=param.dtype, device=param.device)
        elif group["second_moment"] != "none":
            state["exp_avg_sq"] = torch.zeros_like(param)
        if len(state) > 1:
            state["step"] = torch.zeros((), dtype=torch.float32)
        return state

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        slow = [param for param in params if "slow.memory" in self.state[param]]
        self._begin_chunks(slow, group)
        if slow:  # out of the stacks, in place: entry by entry, each rank writes its own shard
            memories = [local(self.state[param]["slow.memory"]) for param in slow]
            grads = [local(param.grad) for param in slow]  # type: ignore[arg-type]
            share = (1 - group["slow_beta"]) / group["chunk_size"]
            torch._foreach_add_(memories, grads, alpha=-share if group["maximize"] else share)
        super()._step_group(group, params)

    def _begin_chunks(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Where a chunk begins, keep what the slow memory answers, and let the memory fade."""
        on_device = torch.compiler.is_compiling() or group["capturable"]
        late, chunk_size = dict.fromkeys(params, 0), group["chunk_size"]
        if group["spread"] and group["mix"] == "post":
            matrices = [param for param in group["params"] if has_memory(param, group)]
            late = {param: k * chunk_size // len(matrices) for k, param in enumerate(matrices)}
        steps = {param: self.state[param]["step"] for param in params}  # before this one
        counts = steps if on_device else {param: step.item() for param, step in steps.items()}

        def due(param: Tensor, after: int = 0) -> Any:  # a bool, or a tensor of one
            return (counts[param] - after) % chunk_size == 0

        read = [param for param in params if on_device or due(param, late[param])]
        fade = [param for param in params if on_device or due(param)]
        answers = [self.state[param]["slow.memory"] for param in read]
        if group["mix"] == "post":
            answers = on_whole(answers, lambda stacked: orthogonalise(stacked, group), group, self._loads)
        answers = list(map(local, answers))
        kept = [local(self.state[param]["slow.answer"]) for param in read]
        memories = [local(self.state[param]["slow.memory"]) for param in fade]
        if on_device:  # the host cannot know: all of them, and what is not due stays
            for param, old, answer in zip(read, kept, answers, strict=True):
                old.copy_(torch.where(beside(due(param, late[param]), old), answer, old))
            for param, memory in zip(fade, memories, strict=True):
                memory.copy_(torch.where(beside(due(param), memory), group["slow_beta"] * memory, memory))
            return
        if read:
            torch._foreach_copy_(kept, answers)
        if fade:
            torch._foreach_mul_(memories, group["slow_beta"])

    def update(self, written: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        state["memory"] = (group["momentum"] * state["memory"]).add_(written)
        return self.read(written, state["memory"], group)

    def writes_in_place(self, group: dict[str, Any]) -> bool:
        return group["second_moment"] != "gradient"

    def write_in_place(self, grads: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> Tensor:
        return write_momentum(grads, states, group)

    def output(self, direction: Tensor, written: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        mix = group["mix"] if "slow.answer" in state else None
        if mix == "pre":
            average = (1 - group["momentum"]) * direction  # of gradients, as the slow memory is
            direction = average.lerp_(state["slow.answer"], _slow_share(state["step"], average, group))
        output = orthogonalise(direction, group)
        if mix == "post":
            output = output.lerp_(state["slow.answer"], _slow_share(state["step"], output, group))
        return output if group["second_moment"] == "none" else self._even_out(output, written, state, group)

    def _even_out(self, output: Tensor, written: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        size = output.square().mean(-1, keepdim=True).sqrt() if group["second_moment"] == "row" else output
        seen = written if group["second_moment"] == "gradient" else size  # [B, m, 1] or [B, m, n]
        state["exp_avg_sq"], weight = _weights(size, seen, state["exp_avg_sq"], state["step"], group)
        return output.mul_(weight)

    def step_in_place(
        self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]
    ) -> None:
        """For the default `mix` and `second_moment`, kernels go on to the end: no update is in memory."""
        slow = [state["slow.answer"] for state in states if "slow.answer" in state]
        if not slow or group["mix"] != "post" or group["second_moment"] != "row":
            super().step_in_place(params, grads, states, group)
            return
        direction = self.write_in_place(grads, states, group)
        fast = orthogonalise(direction, group, cast=False)  # [B, m, n]
        steps = [as_matrices(state["step"], grads[0], matrix_shape(grads[0], group)) for state in states]
        step = stack(steps)
        share = _slow_share(step, direction, group)
        size = (mixed_squares_triton(fast, slow, share) / fast.shape[-1]).sqrt()  # [B, m, 1]
        moments = [state["exp_avg_sq"] for state in states]
        second, weight = _weights(size, size, stack(moments), step, group)
        unstack(moments, second)
        mixed_descent_triton(params, fast, slow, share, weight, lr=group["lr"], weight_decay=group["weight_decay"])


def _slow_share(step: Tensor, like: Tensor, group: dict[str, Any]) -> Tensor:  # [B, 1, 1] -> [B, 1, 1]
    """Return a / (1 + a), the slow memory's share of the mix, in the precision of a tensor; none in the first chunk."""
    a = group["alpha"] * ((step.to(like.dtype) - group["chunk_size"]) / max(group["alpha_warmup"], 1)).clamp(0, 1)
    return beside(a / (1 + a), like)


def _weights(
    size: Tensor, seen: Tensor, second: Tensor, step: Tensor, group: dict[str, Any]
) -> tuple[Tensor, Tensor]:  # [B, m, 1] or [B, m, n]
    """Return V and 1 / (√V̂ + ε), scaled so that the Frobenius norm stays.

    To bring the update to a fixed norm instead would blow up those that are small for a reason: gradients of low rank,
    or memories that disagree.
    """
    beta2 = group["beta2"]
    second = (beta2 * second).addcmul_(seen, seen, value=1 - beta2)
    root = (second / beside(weight_seen(beta2, step.to(size.dtype)), size)).sqrt()
    weight = 1 / (root + group["eps"]).clamp(min=torch.finfo(size.dtype).tiny)
    return second, weight * (frobenius_norm(size) / frobenius_norm(weight * size))
