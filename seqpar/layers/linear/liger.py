"""Liger: softmax attention turned into gated linear attention (Lan et al. 2025, arXiv 2503.01496)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.attention.softmax_attention import SoftmaxAttention
from seqpar.layers.parts.checks import positive
from seqpar.layers.parts.rope import rotary
from seqpar.sharding.cut import Cut


class Liger(nn.Module):
    """Half gated linear attention, half softmax attention over a window, with the four projections of the latter only.

    ``out((gla + softmax) / 2)``. Softmax attention sees the last ``window`` tokens, the token itself counted, with
    rotary positions. The linear half has queries and keys through a softmax over the channels of each head, without
    positions, and scale 1; its log decay is ``logsigmoid(k) / temperature`` of the keys as projected, in fp32 (fp64 for
    fp64): the pooling of the published code leaves them as they are. So it needs no weights of its own, and :meth:`of`
    makes it of a trained layer. Fewer ``kv_heads`` serve ``heads / kv_heads`` neighbouring heads each.

    A state per head travels, its decays unless a chain carries it, and the last ``window - 1`` keys and values.
    ``x [b, t, dim]`` my tokens, and so is the result. Dims and ``rope_base`` as in
    :class:`seqpar.layers.SoftmaxAttention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        window: int = 64,
        temperature: float = 16.0,
        rope_base: float | None = 10000.0,
    ) -> None:
        super().__init__()
        positive(window=window)
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        attention = SoftmaxAttention(
            dim, heads, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim, rope_base=rope_base
        )
        self.q, self.k, self.v, self.out = attention.q, attention.k, attention.v, attention.out
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        self.key_dim, self.value_dim = attention.key_dim, attention.value_dim
        self.window, self.temperature, self.rope_base = window, temperature, rope_base

    @staticmethod
    def of(attention: SoftmaxAttention, *, window: int = 64, temperature: float = 16.0) -> "Liger":
        """A layer with the very projections of ``attention``, and its window where that is shorter."""
        if not attention.causal:
            raise ValueError("Liger needs causal attention: a recurrence does not see later tokens")
        if not attention.plain or isinstance(attention.window, tuple):
            raise ValueError(
                "Liger takes attention without biases, norms, gates, caps, sinks, two-sided windows, a scale or a rope "
                "of its own"
            )
        with torch.device("meta"):  # its own weights are not wanted
            liger = Liger(
                attention.q.in_features,
                attention.heads,
                kv_heads=attention.kv_heads,
                key_dim=attention.key_dim,
                value_dim=attention.value_dim,
                window=window if attention.window is None else min(window, attention.window),
                temperature=temperature,
                rope_base=attention.rope_base,
            )
        liger.q, liger.k, liger.v, liger.out = attention.q, attention.k, attention.v, attention.out
        liger.training = attention.training
        return liger

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Queries and keys of the softmax half, values, queries, keys and log decays of the other, token by token."""
        q, k = (project(x).unflatten(-1, (-1, self.key_dim)) for project in (self.q, self.k))
        v = self.v(x).unflatten(-1, (-1, self.value_dim))
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        features = (torch.softmax(y, -1, dtype=exact).to(y.dtype) for y in (q, k))
        log_decay = functional.logsigmoid(k.to(exact)) / self.temperature
        turned = (y if self.rope_base is None else rotary(y, positions, self.rope_base) for y in (q, k))
        return *turned, v, *features, log_decay

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """What mixes tokens, the attention of the window and the recurrence: ``o [b, t, h, v]``."""
        (q, k, v, q_features, *shared), here = parts, Here.of(cut, self)
        near = here.attention(q, k, v, window=self.window)
        share = self.heads // self.kv_heads
        k_features, log_decay, v = (y if share == 1 else y.repeat_interleave(share, 2) for y in (*shared, v))
        return (near + here.linear_attention(q_features, k_features, v, log_decay=log_decay)) / 2

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads put together, token by token."""
        return self.out(o.flatten(-2))
