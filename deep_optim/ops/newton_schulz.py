"""Newton-Schulz: the nearest semi-orthogonal matrix, by matrix products alone.

    X   ← M / ‖M‖_F                                    singular values in [0, 1]
    X   ← a X + (b A + c A²) X,   A = X Xᵀ             `steps` times: σ ← a σ + b σ³ + c σ⁵

A matrix with one side twice as long as the other is not multiplied at every step of Muon's polynomial. A and its
polynomials commute, so that two steps are gathered in small products first (the Gram form):

    Z   = a I + b A + c A²,   A ← Z A Z,   Z′ = a I + b A + c A²,   X ← Z′ Z X

Gathering more saves more, but the rounding of Z′ Z, which is large for small singular values, then reaches the large
ones, and Muon's polynomial diverges from 1.3 on. Polar Express, whose first steps are steeper, bears none.

It drives every singular value towards 1 and leaves the singular vectors alone: M = U S Vᵀ becomes about U Vᵀ.
Nested Learning, arXiv:2512.24695, Eq. 42, where it is the output map of a momentum memory (= Muon). It does not
compute U Vᵀ exactly: with Muon's coefficients those that start above about 0.01 end between 0.7 and 1.2, smaller ones
on their way, which costs nothing in training. After five of the paper's cubic steps (Eq. 44) the singular values of a
Gaussian 256 × 1024 matrix lie between 0.24 and 0.63; five of these reach 0.68 to 1.13.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import Parameter

from .frobenius import frobenius_norm
from .one_stack import one_stack
from .symmetric_product import symmetric_product

Coefficients = Literal["muon", "polar_express"]

# Keller Jordan, Muon (2024): steepest slope at zero, the same polynomial at every step.
_MUON = (3.4445, -4.7750, 2.0315)

# Amsel, Persson, Musco and Gower, The Polar Express (arXiv:2505.16932), Algorithm 1: the minimax polynomial of each
# step for singular values in [1e-3, 1]. All but the last are damped by 1.01, as there, against rounding in bfloat16.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_DAMPING = 1.01

_EASY = (2.0**-8, 2.0**10)  # scales that float16 bears: the optimizers' is 0.2 √max(m, n)

_GATHERED: dict[str, int] = {"muon": 2, "polar_express": 1}  # steps in Gram form
_LONG = 2  # ratio of the sides from which gathering pays; by counting products, 1.5


def _cpu_has_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16 natively, at about twice the rate of float32: AVX512-BF16 and AMX do.

    torch promises neither question to stay; a torch without one is taken to say no.
    """
    questions = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask() for ask in questions if ask is not None)


_CPU_HAS_BFLOAT16 = _cpu_has_bfloat16()


def newton_schulz(
    matrix: Tensor,  # [..., m, n]
    *,
    steps: int = 5,
    coefficients: Coefficients = "muon",
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    cast: bool = True,
) -> Tensor:  # [..., m, n], the dtype of `matrix`
    """Return the nearest semi-orthogonal matrix, approximately; see the module docstring for the iteration.

    Scale-free, and exactly so in powers of two up to 2^±40; an all-zero matrix gives zero, a NaN or an infinity NaN.
    For m ≤ n a step costs 4 m² n + 2 m³ FLOPs, two of Muon's with n ≥ 2 m only 4 m² n + 10 m³, and all of them three
    matrices of working memory. A tall matrix costs what its transpose does, and is not copied.

    Args:
        matrix: any stack of matrices, tall or wide.
        steps: iterations; 5 is Muon's choice.
        coefficients: "muon" (one polynomial, fast and loose) or "polar_express" (the best polynomial of each step,
            which converges: 7 steps bring all above 1e-3 within 1e-5 of 1, in float32).
        scale: of the result; it rides on the last iteration and costs nothing. Beyond 2^-8 to 2^10 float16 takes one
            pass more for it, and returns the dtype of `matrix`.
        dtype: working precision; by default float16 on accelerators, bfloat16 on CPUs that multiply it natively,
            float32 on other CPUs, float64 for float64 matrices. A norm of 1 needs none of bfloat16's range, and float16
            has 3 bits more.
        cast: bring the result back to the dtype of `matrix`; without, it stays in the working precision.

    Raises:
        ValueError: for an unknown set of coefficients, fewer than 1 step, or a tensor that is no matrix.
    """
    if matrix.ndim < 2:
        raise ValueError(f"newton_schulz takes matrices [..., m, n], got a tensor of shape {tuple(matrix.shape)}")
    dtype = dtype or _working_dtype(matrix)
    early = scale if _EASY[0] <= abs(scale) <= _EASY[1] or dtype != torch.float16 else 1.0
    *polynomials, (a, b, c) = _polynomials(coefficients, steps)
    polynomials.append((early * a, early * b, early * c))
    if matrix.numel() == 0:
        return matrix.clone() if cast else matrix.to(dtype)
    m, n = matrix.shape[-2:]
    x = one_stack(_unit(matrix, dtype))
    gathered = _GATHERED[coefficients] if max(m, n) >= _LONG * min(m, n) else 1
    for start in range(0, steps, gathered):
        x = _iterate(x, polynomials[start : start + gathered])
    x = x.reshape(matrix.shape)
    if early != scale:
        return x.to(matrix.dtype) * scale
    return x.to(matrix.dtype) if cast else x


def _iterate(x: Tensor, polynomials: list[tuple[float, float, float]]) -> Tensor:  # [B, m, n] -> [B, m, n]
    """Apply one polynomial, or two in Gram form."""
    tall = x.shape[-2] > x.shape[-1]  # X Z with A = XᵀX, so that nothing is transposed
    gram = symmetric_product(x.mT if tall else x)  # A [B, p, p]
    part, a = _polynomial(gram, polynomials[0])
    if len(polynomials) == 1:
        return _right(x, part, a) if tall else _left(part, a, x)
    gram = _right(_left(part, a, gram), part, a)  # Z A Z
    second, b = _polynomial(gram, polynomials[1])
    if a:
        part = part.clone()  # autograd still needs the part
        part.diagonal(dim1=-2, dim2=-1).add_(a)
    product = _left(second, b, part)  # Z′ Z
    return torch.bmm(x, product) if tall else torch.bmm(product, x)


def _polynomial(gram: Tensor, coefficients: tuple[float, float, float]) -> tuple[Tensor, float]:
    """Return P [B, p, p] and α for Z = α I + P = a I + b A + c A², by A = Aᵀ.

    In bfloat16, of whose 8 bits it would take 2 from the rest, a stays out of P. Elsewhere it is in: α = 0.
    """
    a, b, c = coefficients
    apart = a if gram.dtype == torch.bfloat16 else 0.0
    return symmetric_product(gram, add=gram, alpha=c, beta=b, diagonal=a - apart), apart


def _left(part: Tensor, a: float, y: Tensor) -> Tensor:
    """Return (a I + P) Y; baddbmm copies Y first."""
    return torch.baddbmm(y, part, y, beta=a) if a else torch.bmm(part, y)


def _right(y: Tensor, part: Tensor, a: float) -> Tensor:
    """Return Y (a I + P)."""
    return torch.baddbmm(y, y, part, beta=a) if a else torch.bmm(y, part)


def _unit(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return M / ‖M‖_F in `dtype`; on a GPU rounded in the same pass, where no derivative is asked for."""
    norm = frobenius_norm(matrix)
    if matrix.is_cuda and type(matrix) in (Tensor, Parameter) and not torch.is_grad_enabled():
        return torch.div(matrix, norm, out=torch.empty(matrix.shape, dtype=dtype, device=matrix.device))
    return (matrix / norm).to(dtype)


def _working_dtype(matrix: Tensor) -> torch.dtype:
    if matrix.is_cpu or matrix.dtype == torch.float64:
        return working_dtype(matrix)
    return torch.float16


def working_dtype(matrix: Tensor) -> torch.dtype:
    """Return what matrices of any size are multiplied in by default: bfloat16 where it is faster than float32."""
    if matrix.dtype == torch.float64:
        return torch.float64
    return torch.float32 if matrix.is_cpu and not _CPU_HAS_BFLOAT16 else torch.bfloat16


def _polynomials(coefficients: Coefficients, steps: int) -> list[tuple[float, float, float]]:
    if steps < 1:
        raise ValueError(f"Invalid ns_steps value: {steps}")
    if coefficients == "muon":
        return [_MUON] * steps
    if coefficients == "polar_express":
        damped = [(a / _DAMPING, b / _DAMPING**3, c / _DAMPING**5) for a, b, c in _POLAR_EXPRESS[:-1]]
        return [*damped[:steps], *[_POLAR_EXPRESS[-1]] * (steps - len(damped))]
    raise ValueError(f"Invalid ns_coefficients: {coefficients!r}, expected one of {get_args(Coefficients)}")
