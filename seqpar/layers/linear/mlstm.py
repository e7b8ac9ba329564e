"""mLSTM, the matrix memory of xLSTM (Beck et al. 2024, arXiv 2405.04517), gates bounded as in arXiv 2503.13427."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.linear.based import with_ones
from seqpar.layers.parts.checks import head_dim
from seqpar.layers.parts.norm import RMSNorm
from seqpar.layers.ssm.state_space import exact_dtype
from seqpar.sharding.cut import Cut


class MLSTM(nn.Module):
    """``C_t = f_t C_{t-1} + i_t k_t v_t'``, ``n_t = f_t n_{t-1} + i_t k_t`` and ``o_t = q_t C_t / max(|q_t n_t|, 1)``,
    head by head, with ``i = exp(cap(.))`` and ``f = sigmoid(cap(.))``; then ``out(norm(o) sigmoid(gate(x)))``.

    ``cap(y) = 15 tanh(y / 15)`` keeps exponents so small that none needs to be taken out: no running maximum travels,
    and the numbers are those of the form that has one. ``x [b, t, dim]`` my tokens, and so is the result. The state
    travels with its normaliser in it, and its decays unless a chain carries it. Defaults are the paper's: ``key_dim =
    dim / heads / 2``, ``value_dim = dim / heads`` (of one head); gates start nearly shut (``i``) and open (``f``).
    """

    def __init__(
        self, dim: int, heads: int, *, key_dim: int | None = None, value_dim: int | None = None, cap: float = 15.0
    ) -> None:
        super().__init__()
        value_dim = head_dim(dim, heads, value_dim, "value_dim")
        key_dim = max(1, head_dim(dim, heads, None) // 2) if key_dim is None else head_dim(dim, heads, key_dim)
        if not 0 < cap <= 30:
            raise ValueError(f"cap must be above 0 and at most 30, as exp(cap) is a weight of a sum, got {cap}")
        self.q = nn.Linear(dim, heads * key_dim, bias=False)
        self.k = nn.Linear(dim, heads * key_dim, bias=False)
        self.v = nn.Linear(dim, heads * value_dim, bias=False)
        self.gates = nn.Linear(dim, 2 * heads)
        self.gate = nn.Linear(dim, heads * value_dim, bias=False)
        self.norm = RMSNorm(value_dim)
        self.out = nn.Linear(heads * value_dim, dim, bias=False)
        self.heads, self.key_dim, self.value_dim, self.cap = heads, key_dim, value_dim, cap
        self.gates.bias.data = torch.cat([torch.full((heads,), -10.0), torch.linspace(3, 6, heads)])

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys times their input gates, values with a channel of ones, log decays; in fp32 (fp64 for fp64)."""
        q, k = (project(x).unflatten(-1, (-1, self.key_dim)) for project in (self.q, self.k))
        v, gates = self.v(x).unflatten(-1, (-1, self.value_dim)), self.gates(x)
        q, k, v, gates = (each.to(exact_dtype(x)) for each in (q, k, v, gates))
        add, keep = (self.cap * torch.tanh(gates / self.cap)).chunk(2, -1)
        return q, k * add.exp()[..., None], with_ones(v), functional.logsigmoid(keep)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The one call that mixes tokens: ``o [b, t, h, v + 1]``, in fp32 (fp64 for fp64)."""
        q, k, v, log_decay = parts
        return Here.of(cut, self).linear_attention(q, k, v, log_decay=log_decay, scale=self.key_dim**-0.5)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads divided by their normalisers, normed, gated and put together, token by token."""
        o = o[..., :-1] / o[..., -1:].abs().clamp(min=1)
        return self.out(self.norm(o).to(x.dtype).flatten(-2) * torch.sigmoid(self.gate(x)))
