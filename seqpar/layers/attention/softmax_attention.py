"""Softmax attention (Vaswani et al. 2017, arXiv 1706.03762) with grouped queries (arXiv 2305.13245) and rotary
positions."""

from torch import Tensor, nn

from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import head_dim, positive
from seqpar.layers.parts.rope import rotary
from seqpar.sharding.cut import Cut


class SoftmaxAttention(nn.Module):
    """Each token looks at the tokens of its document: keys and values travel over the cuts.

    ``x [b, t, dim]`` my tokens, and so is the result. ``kv_heads`` (default: ``heads``) must divide ``heads``; fewer of
    them means less to send. ``key_dim`` and ``value_dim`` are those of one head (default: ``dim / heads``).
    ``window``: a token sees the last ``window`` tokens up to and including itself. ``rope_base=None``: no positions.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        causal: bool = True,
        window: int | None = None,
        rope_base: float | None = 10000.0,
    ) -> None:
        super().__init__()
        key_dim = head_dim(dim, heads, key_dim)
        value_dim = head_dim(dim, heads, value_dim, "value_dim")
        kv_heads = heads if kv_heads is None else kv_heads
        positive(kv_heads=kv_heads)
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads, got heads={heads} and kv_heads={kv_heads}")
        if window is not None:
            positive(window=window)
        if rope_base is not None and key_dim % 2:
            raise ValueError(f"rotary positions need an even key_dim, got {key_dim}: change it, or rope_base=None")
        self.q = nn.Linear(dim, heads * key_dim, bias=False)
        self.k = nn.Linear(dim, kv_heads * key_dim, bias=False)
        self.v = nn.Linear(dim, kv_heads * value_dim, bias=False)
        self.out = nn.Linear(heads * value_dim, dim, bias=False)
        self.heads, self.kv_heads, self.key_dim, self.value_dim = heads, kv_heads, key_dim, value_dim
        self.causal, self.window, self.rope_base = causal, window, rope_base

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, token by token."""
        q, k = (project(x).unflatten(-1, (-1, self.key_dim)) for project in (self.q, self.k))
        v = self.v(x).unflatten(-1, (-1, self.value_dim))
        if self.rope_base is not None:
            q, k = (rotary(y, positions, self.rope_base) for y in (q, k))
        return q, k, v

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The one call that mixes tokens: ``o [b, t, h, v]``."""
        return Here.of(cut, self).attention(*parts, causal=self.causal, window=self.window)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads put together, token by token."""
        return self.out(o.flatten(-2))
