"""Retention (Sun et al. 2023, arXiv 2307.08621)."""

import math

from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.linear.lightning_attention import constant_decay
from seqpar.layers.parts.checks import head_dim
from seqpar.layers.parts.rope import rotary
from seqpar.layers.ssm.state_space import exact_dtype
from seqpar.sharding.cut import Cut


def retention_log_decay(heads: int) -> tuple[float, ...]:
    """``log(1 - 2^(-5 - h))`` for each head: from a memory of some 32 tokens up, doubling."""
    return tuple(math.log1p(-(2.0 ** (-5 - head))) for head in range(heads))


class Retention(nn.Module):
    """Linear attention with a constant decay per head, rotated queries and keys, a norm per head and a swish gate.

    ``x [b, t, dim]`` my tokens, and so is the result. One state per head travels, the decay does not. The norm is the
    paper's group norm, with the heads as groups and without weights. ``key_dim`` (default: ``dim / heads``) and
    ``value_dim`` (default: twice as much, as in the paper) are those of one head.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        rope_base: float = 10000.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        key_dim = head_dim(dim, heads, key_dim)
        value_dim = head_dim(dim, heads, 2 * key_dim if value_dim is None else value_dim, "value_dim")
        if key_dim % 2:
            raise ValueError(f"rotary positions need an even key_dim, got {key_dim}")
        self.q = nn.Linear(dim, heads * key_dim, bias=False)
        self.k = nn.Linear(dim, heads * key_dim, bias=False)
        self.v = nn.Linear(dim, heads * value_dim, bias=False)
        self.gate = nn.Linear(dim, heads * value_dim, bias=False)
        self.out = nn.Linear(heads * value_dim, dim, bias=False)
        self.heads, self.key_dim, self.value_dim = heads, key_dim, value_dim
        self.rope_base, self.eps = rope_base, eps
        self.log_decay = retention_log_decay(heads)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Rotated queries and keys, and values, token by token."""
        q, k = (project(x).unflatten(-1, (-1, self.key_dim)) for project in (self.q, self.k))
        v = self.v(x).unflatten(-1, (-1, self.value_dim))
        q, k = (rotary(y, positions, self.rope_base) for y in (q, k))
        return q, k, v

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The one call that mixes tokens: ``o [b, t, h, v]``, in fp32 (fp64 for fp64): sums outgrow fp16."""
        q, k, v = parts
        here, decay, scale = Here.of(cut, self), constant_decay(self.log_decay, q), k.shape[-1] ** -0.5
        return here.linear_attention(q, k, v, log_decay=decay, scale=scale, out_dtype=exact_dtype(q))

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads normed, gated and put together, token by token."""
        normed = functional.layer_norm(o, o.shape[-1:], eps=self.eps).to(x.dtype)
        return self.out(normed.flatten(-2) * functional.silu(self.gate(x)))
