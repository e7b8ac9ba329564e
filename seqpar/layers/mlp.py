"""The feed-forward part of a block: SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

from torch import Tensor, nn
from torch.nn import functional

from seqpar.layers.checks import positive


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, token by token: mixes no tokens, so it takes no cut. ``x [b, t, dim]``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        positive(dim=dim, hidden=hidden)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))
