"""Softmax attention (Vaswani et al. 2017, arXiv 1706.03762) with grouped queries (arXiv 2305.13245) and rotary
positions."""

import torch
from torch import Tensor, nn

from seqpar.crossing.attention import Window
from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import head_dim, one_of, positive
from seqpar.layers.parts.norm import norm_of
from seqpar.layers.parts.rope import Rope
from seqpar.ops.softmax_block.scores import Scores
from seqpar.sharding.cut import Cut

QK_NORMS = ("none", "head", "all")


class SoftmaxAttention(nn.Module):
    """Each token looks at the tokens of its document: keys and values travel over the cuts.

    ``x [b, t, dim]`` my tokens, and so is the result. ``kv_heads`` (default: ``heads``) must divide ``heads``; fewer of
    them means less to send. ``key_dim`` and ``value_dim`` are those of one head (default: ``dim / heads``).
    ``window``: a token sees the last ``window`` tokens up to and including itself, or as many as a pair ``(left,
    right)`` says. ``rope_base=None``: no positions; ``rope``: others than the plain ones. ``bias``: of queries, keys
    and values; ``out_bias``: of the output. ``qk_norm``, of queries and keys before rotation: ``"none"``, ``"head"``
    (each by itself: Qwen3) or ``"all"`` (over all heads: OLMo 2), of a kind of ``norm`` (:func:`norm_of`) and ``eps``.
    ``gated``: the output of each head times the sigmoid of a projection (Qwen3-Next; arXiv 2505.06708). ``scale``:
    default ``key_dim**-0.5``. ``softcap`` and ``sinks`` as in :class:`seqpar.Scores`.
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
        window: Window = None,
        rope_base: float | None = 10000.0,
        rope: Rope | None = None,
        bias: bool = False,
        out_bias: bool = False,
        qk_norm: str = "none",
        norm: str = "rms",
        eps: float = 1e-6,
        gated: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
    ) -> None:
        super().__init__()
        key_dim = head_dim(dim, heads, key_dim)
        value_dim = head_dim(dim, heads, value_dim, "value_dim")
        kv_heads = heads if kv_heads is None else kv_heads
        positive(kv_heads=kv_heads)
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads, got heads={heads} and kv_heads={kv_heads}")
        if isinstance(window, int):
            positive(window=window)
        more = (bias, out_bias, gated, sinks, qk_norm != "none", isinstance(window, tuple))
        self.plain = not any(more) and rope is scale is softcap is None  # whether dims, rope_base and window say all
        self.q = nn.Linear(dim, heads * key_dim, bias=bias)
        self.k = nn.Linear(dim, kv_heads * key_dim, bias=bias)
        self.v = nn.Linear(dim, kv_heads * value_dim, bias=bias)
        self.out = nn.Linear(heads * value_dim, dim, bias=out_bias)
        self.gate = nn.Linear(dim, heads * value_dim, bias=bias) if gated else None
        self.per_head = one_of("qk_norm", qk_norm, QK_NORMS) != "all"
        sizes = (key_dim, key_dim) if self.per_head else (heads * key_dim, kv_heads * key_dim)
        self.q_norm, self.k_norm = (None if qk_norm == "none" else norm_of(norm, size, eps) for size in sizes)
        self.sinks = nn.Parameter(torch.zeros(heads)) if sinks else None
        self.heads, self.kv_heads, self.key_dim, self.value_dim = heads, kv_heads, key_dim, value_dim
        self.causal, self.window, self.scale, self.softcap = causal, window, scale, softcap
        self.rope_base, self.rope = rope_base, _rope(rope, rope_base, key_dim)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, token by token."""
        q, k = self._normed(self.q(x), self.q_norm), self._normed(self.k(x), self.k_norm)
        v = self.v(x).unflatten(-1, (-1, self.value_dim))
        if self.rope is not None:
            q, k = (self.rope(y, positions) for y in (q, k))
        return q, k, v

    def _normed(self, y: Tensor, norm: nn.Module | None) -> Tensor:
        """By heads, each normalised by itself or with all others."""
        if norm is not None and not self.per_head:
            y = norm(y)
        y = y.unflatten(-1, (-1, self.key_dim))
        return norm(y) if norm is not None and self.per_head else y

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The one call that mixes tokens: ``o [b, t, h, v]``."""
        special = self.softcap is not None or self.sinks is not None
        scores = Scores(softcap=self.softcap, sinks=self.sinks) if special else None
        here = Here.of(cut, self)
        return here.attention(*parts, causal=self.causal, window=self.window, scale=self.scale, scores=scores)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads put together, token by token."""
        o = o.flatten(-2)
        return self.out(o if self.gate is None else o * self.gate(x).sigmoid())


def _rope(rope: Rope | None, base: float | None, key_dim: int) -> Rope | None:
    """The given positions, or the plain ones of ``base``, or none."""
    if rope is not None or base is None:
        return rope
    if key_dim % 2:
        raise ValueError(f"rotary positions need an even key_dim, got {key_dim}: change it, or rope_base=None")
    return Rope.plain(key_dim, base)
