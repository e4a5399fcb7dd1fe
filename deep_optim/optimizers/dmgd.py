"""Deep Momentum Gradient Descent: an MLP memory of gradients, trained by L2 regression.

    memory      m(k) = M k + W₁ h(k),   h(k) = s(√(r p) W₂ k) / √(r h)      a key k is a row of φ(G) / ‖φ(G)‖_F
    objective   ½ ‖m(K) − c I‖² and its mirror image, with retention
    train       [M | W₁] ← momentum · [M | W₁] − inner_lr · (what `inner_steps` steps on both erase) + [φ(G) | H]
                W₂ by a step of its own, if hidden_lr > 0
    D   = lookahead · φ(G) + momentum · M   if nesterov, else M
    W   ← (1 − lr · weight_decay) · W − lr · σ(D)

`deep_optim.ops.deep_momentum` has the step in full. With `hidden_dim=0` this is `DeltaMomentum` bit for bit, and with
inner rates of 0 it is `Momentum`, both with soft rows and the same `ns_steps`. As there, several inner steps erase
several times and write once.
Nested Learning, arXiv:2512.24695, Eq. 50 (DMGD) under the objective of Eq. 49 and with the output map of Eq. 52. The
paper names an MLP and leaves open its architecture, its target and what becomes of its answer. Printed, the memory is
evaluated at the gradient it was just trained on, W + m(u), where the target 1 makes every key answer alike. Here each
key answers its own unit vector (the target I of the NeurIPS text), and what moves the weights is the memory's linear
part, which has their shape; the hidden part takes over what it can explain of the keys, and so decides what M forgets.
"""

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from deep_optim.ops.backend import Backend
from deep_optim.ops.deep_momentum import deep_momentum
from deep_optim.ops.feature_map import feature_map
from deep_optim.ops.frobenius import frobenius_norm
from deep_optim.ops.mlp_memory import MLPMemory
from deep_optim.ops.newton_schulz import Coefficients

from .base import MemoryOptimizer, capturing
from .delta_momentum import check_kernels, check_read_and_steps, check_stable, read_out, write_delta
from .matrices import has_memory, matrix_shape
from .memory_report import MemoryReport, report
from .output_map import OutputMap
from .rounding import exact_dtype
from .sharding import local, whole
from .stacks import as_matrices
from .validation import check_at_least, check_choice, check_count

NonFinite = Literal["raise", "skip", "ignore"]

_SEED = 0
_NAMES = tuple(f"memory.{name}" for name in MLPMemory._fields)


class DMGD(MemoryOptimizer):
    """Momentum whose memory is a small network, trained at every step.

    Keeps 4 bytes per parameter for the linear part (4 more with `output="adam"`) and, on every rank, 4 h (m + n) bytes
    per m × n matrix for the hidden one, h = `hidden_dim`; twice that in float64. With m ≤ n it costs about
    8 m (1 + h/m)² FLOPs per parameter and, at three inner steps, three products of matrices of size m + h before the
    output map; four steps of Newton-Schulz cost 13 to 24 m per parameter.

    Args:
        params: parameters, named parameters, or groups of them; any shape.
        lr: step size of the weights. AdamW's usual values suit "newton_schulz" and "adam", SGD's suit "identity".
        momentum: how much of the memory survives a step that brings no key like it, 0 to 1.
        inner_lr: how far the memory moves towards what the inner steps make of it, on each of its two sides; 0 is
            plain momentum. Stable while twice of it is below 1 + momentum (a little less for several inner steps), and
            refused above; so a low `momentum` needs a low `inner_lr`.
        inner_steps: gradient steps on the regression per gradient, in closed form; 1 to 6.
        hidden_dim: hidden features of the memory, h. 0, a linear memory, because on the task they were measured on they
            were worth nothing; 16 make it the paper's MLP at little cost.
        hidden_lr: size of the hidden weights' own step, relative to their size; 0 leaves them as they were drawn.
        weight_decay: decoupled, multiplied by `lr` as in AdamW.
        nesterov: read the memory with the same write added `lookahead` times more.
        lookahead: 1 is Nesterov's. More weighs the gradient at hand more, which a memory that is long in its quiet
            directions needs.
        output: "newton_schulz", "adam" or "identity". Under the first two, vectors and scalars are stepped by AdamW;
            under "identity" they have a memory like everything else.
        ns_steps: Newton-Schulz iterations. One less than Muon's, which was worth nothing where it was measured.
        ns_coefficients: "muon" or "polar_express".
        adamw_betas: AdamW's decay rates, for what is no matrix; the second is also that of `output="adam"`.
        adamw_eps: AdamW's term in the denominator; likewise.
        nonfinite: what a gradient with a NaN or an infinity does, or one too large to be summed in the state's dtype:
            "raise" before anything has been stepped, or "skip" that parameter in this step. Either way its weights and
            memory do not change. Both wait for one answer from the device per group, so that on a GPU nothing of the
            step's host time hides behind the backward pass; inside a CUDA graph or torch.compile nothing can wait.
            "ignore" does not look, as the other optimizers do not: the NaN shows in the weights, and stays in the
            memory.
        foreach: use torch's foreach AdamW for what is no matrix.
        maximize: ascend instead.
        capturable: keep counters on the device, so that a CUDA graph can capture the step.
        differentiable: refused; the memories are written in place.
        fused: use torch's fused AdamW for what is no matrix; by default wherever torch has one.
        kahan_sum: keep what rounding takes from bfloat16 and float16 weights, so that small updates are not lost, at
            2 bytes per parameter.
        backend: "auto", "reference" or "triton", for the step of the memory.

    Raises:
        ValueError: for a value out of range, in the constructor or in any group.
        RuntimeError: for `differentiable`, for `fused` with `foreach`, for complex parameters or sparse gradients,
            and at a step, before anything is stepped, for parameters that `backend="triton"` cannot take, for another
            `hidden_dim` than the memories have and, under `nonfinite="raise"`, for a gradient that is not finite.

    Example:
        >>> optimizer = DMGD(model.parameters(), lr=1e-3)  # doctest: +SKIP
    """

    in_place: ClassVar[tuple[str, ...]] = _NAMES

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        inner_lr: float = 0.5,
        inner_steps: int = 3,
        hidden_dim: int = 0,
        hidden_lr: float = 0.0,
        weight_decay: float = 1e-2,
        nesterov: bool = True,
        lookahead: float = 2.0,
        output: OutputMap = "newton_schulz",
        ns_steps: int = 4,
        ns_coefficients: Coefficients = "muon",
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        nonfinite: NonFinite = "raise",
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        kahan_sum: bool = False,
        backend: Backend = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "inner_lr": inner_lr,
            "inner_steps": inner_steps,
            "hidden_dim": hidden_dim,
            "hidden_lr": hidden_lr,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "lookahead": lookahead,
            "output": output,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "nonfinite": nonfinite,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "kahan_sum": kahan_sum,
            "backend": backend,
        }
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_at_least(group, 0.0, "inner_lr", "hidden_lr")
        check_count(group, "hidden_dim", minimum=0)
        check_choice(group, "nonfinite", get_args(NonFinite))
        check_choice(group, "backend", get_args(Backend))
        check_read_and_steps(group)
        check_stable(group, sides=2)

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        (split, m, n), h = matrix_shape(param, group), group["hidden_dim"]
        w1 = torch.zeros(split, max(m, n), h, dtype=param.dtype, device=param.device)
        # from one seed for every parameter: the same on all ranks and devices, whoever its neighbours are
        generator = torch.Generator("cpu").manual_seed(_SEED)
        w2 = torch.randn(h, min(m, n), generator=generator, dtype=torch.float64, device="cpu")
        w2 = (w2 / max(min(m, n), 1) ** 0.5).to(w1).repeat(split, 1, 1)
        if m < n:  # a wide memory is kept as the transpose of a tall one
            w1, w2 = w1.mT.contiguous(), w2.mT.contiguous()
        return dict(zip(_NAMES, (torch.zeros_like(param), w1, w2), strict=True))

    def cost(self, param: Tensor, group: dict[str, Any]) -> float:
        _, m, n = matrix_shape(param, group)
        return super().cost(param, group) * (1 + group["hidden_dim"] / min(m, n)) ** 2

    def features(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        return feature_map(grad, "soft_rows")

    def update(self, written: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        memory, direction = deep_momentum(
            MLPMemory(*(state[name] for name in _NAMES)),
            written,
            decay=group["momentum"],
            inner_lr=group["inner_lr"],
            inner_steps=group["inner_steps"],
            hidden_lr=group["hidden_lr"],
            lookahead=read_out(group),
            backend=group["backend"],
        )
        state.update(zip(_NAMES, memory, strict=True))
        return direction

    def writes_in_place(self, group: dict[str, Any]) -> bool:
        return not group["hidden_dim"] and group["inner_lr"] != 0 and group["output"] != "adam"

    def write_in_place(self, grads: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> Tensor:
        """Without hidden features the memory is `DeltaMomentum`'s."""
        linear = {"side": "both", "gram_norm": "eigenvalue", "feature_map": "soft_rows"}
        return write_delta(grads, [state["memory.linear"] for state in states], group | linear)

    @torch.no_grad()
    def memory_report(self) -> dict[str, MemoryReport]:
        """Return how well each memory answers for the gradient at hand, before and after the step it would make.

        Call it between `backward()` and `step()`, on every rank if parameters are sharded. It makes the step beside the
        state, one matrix at a time, at the cost of two to three steps, and changes nothing. Parameters without a
        gradient or a memory are left out. A parameter goes by its name, or by its position among all if the optimizer
        was given no names.
        """
        reports = {}
        position = 0
        for group in self.param_groups:
            super().check_gradients(group)
            for index, param in enumerate(group["params"]):
                name = group["param_names"][index] if "param_names" in group else str(position)
                position += 1
                if param.grad is not None and param.numel() and has_memory(param, group):
                    reports[name] = self._report(param, group)
        return reports

    def _report(self, param: Tensor, group: dict[str, Any]) -> MemoryReport:
        shape = matrix_shape(param, group)
        state = self.state.get(param) or self.new_state(param, group)
        state = {name: as_matrices(value, param, shape) for name, value in state.items()}
        if "step" in state:
            state["step"] = state["step"] + 1
        before = MLPMemory(*(state[name] for name in _NAMES))
        grad = whole(param.grad).to(before.linear.dtype).reshape(shape)  # type: ignore[arg-type]
        ascent = -grad if group["maximize"] else grad
        written = self.features(ascent, state, group)
        direction = self.output(self.update(written, state, group), written, state, group).to(grad.dtype)
        after = MLPMemory(*(state[name] for name in _NAMES))
        return report(before, after, written, ascent, direction, group["inner_lr"])

    def check_gradients(self, group: dict[str, Any]) -> None:
        super().check_gradients(group)
        check_kernels(group)
        self._check_hidden_dim(group)
        if torch.compiler.is_compiling():
            return
        if group["nonfinite"] == "raise" and (refused := _not_finite(group["params"])):
            sizes = ", ".join(str(tuple(param.size())) for param in refused)
            raise RuntimeError(
                f"the gradients of parameters of these sizes are not finite, or too large to be summed: {sizes}; "
                "nothing has been stepped (nonfinite='skip' steps the other parameters)"
            )

    def _check_hidden_dim(self, group: dict[str, Any]) -> None:
        """Refuse another size than the memories have; one of them speaks for all."""
        kept = (param for param in group["params"] if _NAMES[1] in self.state.get(param, ()))
        if (param := next(kept, None)) is not None:
            _, m, n = matrix_shape(param, group)
            if (h := self.state[param][_NAMES[1]].shape[-2 if m < n else -1]) != group["hidden_dim"]:
                raise RuntimeError(
                    f"the memories of this group have hidden_dim={h}, the group says {group['hidden_dim']}; a memory "
                    "keeps its size, so make a new optimizer for another one"
                )

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if group["nonfinite"] == "skip" and not torch.compiler.is_compiling():
            skipped = set(_not_finite(params))
            params = [param for param in params if param not in skipped]
        super()._step_group(group, params)


def _not_finite(params: list[Tensor]) -> list[Tensor]:
    """Return the parameters whose gradient, on any rank, has a NaN or an infinity, or a norm that cannot be summed."""
    having = [param for param in params if param.grad is not None and not capturing(param)]
    grads = [param.grad for param in having if param.grad is not None]
    if not grads:
        return []
    plain = [grad for grad in grads if grad is local(grad)]
    sharded = [grad for grad in grads if grad is not local(grad)]  # torch takes no list of both
    norms = [norm for some in (plain, sharded) if some for norm in torch._foreach_norm(some)]
    if torch.stack([whole(norm).to(grads[0].device, torch.float32) for norm in norms]).isfinite().all():
        return []
    return [param for param, grad in zip(having, grads, strict=True) if not _summable(whole(grad))]


def _summable(grad: Tensor) -> bool:
    """Return whether the norm of `grad` leaves room for the sum of a thousand like it in the dtype of the state."""
    limit = torch.finfo(exact_dtype(grad)).max / 1000
    return bool(frobenius_norm(grad.flatten()[None].to(torch.float64)) < limit)
