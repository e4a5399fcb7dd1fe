"""The MLP block of every model here: SwiGLU, which a continuum level can also write into.

    f(x) = D (silu(G x) ⊙ U x)

SwiGLU (arXiv:2002.05202) without biases, as in Llama. Its equations and the gradients of a write are in
`deep_optim.ops.swiglu`.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from ..ops.swiglu import SwiGLU, read_swiglu, swiglu_gradients


class MLP(nn.Module):
    """f(x) = D (silu(G x) ⊙ U x), with the weights of the layers or with others.

    Args:
        dim: inputs and outputs, D.
        hidden_dim: hidden features, H.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)
        for layer in (self.gate, self.up, self.down):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)  # keeps the size of what passes through

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that a memory starts from."""
        return {"gate": self.gate.weight, "up": self.up.weight, "down": self.down.weight}

    def read(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:  # [B, n, D] -> [B, n, D]
        """Return f(x) under the given weights, one set or one per sample."""
        return read_swiglu(SwiGLU(**weights), x)

    def gradients(
        self, weights: Mapping[str, Tensor], key: Tensor, value: Tensor, rate: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return f(key), and the gradients of ½ Σ_t rate_t ‖f(key_t) − value_t‖², for every sample's own weights."""
        answer, gradients = swiglu_gradients(SwiGLU(**weights), key, value, rate)
        return answer, gradients._asdict()
