"""Liger: softmax attention turned into gated linear attention (Lan et al. 2025, arXiv 2503.01496)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.attention.softmax_attention import SoftmaxAttention
from seqpar.layers.parts.checks import one_of, positive
from seqpar.layers.parts.rope import rotary
from seqpar.sharding.cut import Cut

FORMS = ("gla", "hgrn2", "gsa")


class Liger(nn.Module):
    """Half gated linear attention, half softmax attention over a window, with the four projections of the latter only.

    ``out((gla + softmax) / 2)``. Softmax attention sees the last ``window`` tokens, the token itself counted, with
    rotary positions. The linear half has queries and keys through a softmax over the channels of each head, without
    positions, and scale 1; its log decay is ``logsigmoid(k) / temperature`` of the keys as projected, in fp32 (fp64 for
    fp64): the pooling of the published code leaves them as they are. So it needs no weights of its own, and :meth:`of`
    makes it of a trained layer. Fewer ``kv_heads`` serve ``heads / kv_heads`` neighbouring heads each.

    ``form``: the linear half is gated linear attention (``"gla"``); HGRN2, whose keys are 1 minus the decay
    (``"hgrn2"``); or gated slots (``"gsa"``): ``key_dim`` slots of keys and of values, of which a token overwrites the
    share ``1 - decay`` with its own, and a query reads the values by a softmax over the keys. Its slots of keys are
    there for every token at once, ``key_dim`` times as many numbers as keys.

    A state per head travels (of slots two), its decays unless a chain carries it, and the last ``window - 1`` keys and
    values.
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
        form: str = "gla",
    ) -> None:
        super().__init__()
        self.form = one_of("form", form, FORMS)
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
    def of(attention: SoftmaxAttention, *, window: int = 64, temperature: float = 16.0, form: str = "gla") -> "Liger":
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
                form=form,
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
        log_decay = functional.logsigmoid(k.to(exact)) / self.temperature
        turned = (y if self.rope_base is None else rotary(y, positions, self.rope_base) for y in (q, k))
        if self.form == "gsa":
            return *turned, v, q, k, log_decay
        q_features, k_features = (torch.softmax(y, -1, dtype=exact).to(y.dtype) for y in (q, k))
        if self.form == "hgrn2":
            k_features = -torch.expm1(log_decay)
        return *turned, v, q_features, k_features.to(k.dtype), log_decay

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """What mixes tokens, the attention of the window and the recurrence: ``o [b, t, h, v]``."""
        (q, k, v, far_q, *shared), here = parts, Here.of(cut, self)
        near = here.attention(q, k, v, window=self.window)
        share = self.heads // self.kv_heads
        far_k, log_decay, v = (y if share == 1 else y.repeat_interleave(share, 2) for y in (*shared, v))
        if self.form == "gsa":
            far_q, far_k = self._slots(here, far_q, far_k, log_decay)
        return (near + here.linear_attention(far_q, far_k, v, log_decay=log_decay)) / 2

    def _slots(self, here: Here, q: Tensor, k: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
        """How much of each slot's value a query reads, and how much of it a token overwrites: ``[b, t, h, slots]``."""
        wide, exact = (*log_decay.shape, self.key_dim), log_decay.dtype
        written = -torch.expm1(log_decay)
        rows = (written[..., None] * k[..., None, :].to(exact)).flatten(2)
        decays = log_decay[..., None].expand(wide).flatten(2)
        slots = here.diagonal_scan(rows, decays, state="slots").view(wide)
        scores = (slots * q[..., None, :].to(exact)).sum(-1) * self.key_dim**-0.5
        return scores.softmax(-1).to(k.dtype), written.to(k.dtype)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads put together, token by token."""
        return self.out(o.flatten(-2))
