"""LightNet: linear attention with an additive decay (Qin et al. 2024, arXiv 2405.21022)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.document_sum import document_index
from seqpar.crossing.here import Here
from seqpar.layers.linear.aaren import shift_down
from seqpar.layers.linear.md_position import md_lrpe
from seqpar.layers.parts.checks import head_dim, one_of, positive
from seqpar.layers.parts.norm import RMSNorm
from seqpar.layers.ssm.state_space import exact_dtype
from seqpar.sharding.cut import Cut

STARTS = ("empty", "one")


class LightNet(nn.Module):
    """Linear attention whose keys are a softmax over the tokens so far, channel by channel: no decay to be learned.

    ``z_t = log(exp(z_(t-1)) + exp(k_t))``, ``S_t = exp(z_(t-1) - z_t) S_(t-1) + exp(k_t - z_t) v_t'`` and ``o_t =
    silu(q_t) S_t``. ``start``: ``z`` before a document is ``-inf`` (``"empty"``: the keys of the first token are 1) or
    0 (``"one"``). It is computed with the running maximum ``m`` of ``k`` (:mod:`seqpar.crossing.running_max`): sums of
    ``exp(k_s - m_t) v_s'``, read by ``silu(q_t) / sum_s exp(k_s - m_t)``. The result does not depend on ``m``, which
    has no gradient, and no exponent is above 0. ``causal=False``: every token reads ``softmax(k)' v`` over its
    document, whatever the order of tokens, which the paper proposes for images.

    ``x [b, t, dim]`` my tokens, and so is the result. One state per head travels, a sum and a maximum for each of its
    rows. Then come a norm over all channels and a swish gate of rank ``gate_rank`` (default: ``key_dim``).
    ``key_dim`` and ``value_dim`` are those of one head (default: ``dim / heads``; the paper's are 128). ``width``: each
    document is a grid of so many columns, and queries and keys get their places on it by
    :func:`seqpar.layers.linear.md_position.md_lrpe`; then the state is twice as high.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = True,
        start: str = "empty",
        key_dim: int | None = None,
        value_dim: int | None = None,
        gate_rank: int | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__()
        key_dim = head_dim(dim, heads, key_dim)
        value_dim = head_dim(dim, heads, value_dim, "value_dim")
        gate_rank = key_dim if gate_rank is None else gate_rank
        positive(gate_rank=gate_rank, width=1 if width is None else width)
        self.start = one_of("start", start, STARTS)
        self.q = nn.Linear(dim, heads * key_dim, bias=False)
        self.k = nn.Linear(dim, heads * key_dim, bias=False)
        self.v = nn.Linear(dim, heads * value_dim, bias=False)
        self.gate = nn.Sequential(
            nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, heads * value_dim, bias=False)
        )
        self.out = nn.Linear(heads * value_dim, dim, bias=False)
        self.norm = RMSNorm(heads * value_dim)
        self.heads, self.key_dim, self.value_dim = heads, key_dim, value_dim
        self.causal, self.width = causal, width

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys (in fp32, fp64 for fp64: they become exponents) and values, token by token."""
        q, k = (project(x).unflatten(-1, (-1, self.key_dim)) for project in (self.q, self.k))
        v = self.v(x).unflatten(-1, (-1, self.value_dim))
        return functional.silu(q), k.to(exact_dtype(k)), v

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """All that mixes tokens: ``o [b, t, h, v]``, in fp32 (fp64 for fp64): queries are divided by sums of keys."""
        here = Here.of(cut, self)
        return self._so_far(here, *parts) if self.causal else self._of_documents(here, *parts)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads put together, normed and gated, token by token."""
        return self.out(self.norm(o.flatten(-2)).to(x.dtype) * functional.silu(self.gate(x)))

    def _so_far(self, here: Here, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shifted, log_decay, largest = shift_down(k, here, 0.0 if self.start == "one" else None)
        keys = shifted.exp()
        sums = here.diagonal_scan(keys.flatten(2), log_decay.flatten(2), state="sums").view_as(k)
        if self.start == "one":
            sums = sums + (-largest).exp()
        q, keys = self._placed(q.to(k.dtype) / sums, here), self._placed(keys, here)
        if self.width is not None:
            log_decay = torch.cat([log_decay, log_decay], -1)
        return here.linear_attention(q, keys, v.to(k.dtype), log_decay=log_decay)

    def _of_documents(self, here: Here, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        largest = here.document_max(k)
        if self.start == "one":
            largest = largest.clamp(min=0)
        index = document_index(here.cut.shard, k.device)
        keys = (k - largest.index_select(1, index)).exp()
        sums = here.document_sum(keys)
        if self.start == "one":
            sums = sums + (-largest).exp()
        (memory,) = here.document_memories((self._placed(keys, here), v))
        q = self._placed(q.to(k.dtype) / sums.index_select(1, index), here)
        return memory.read(q)

    def _placed(self, x: Tensor, here: Here) -> Tensor:
        """``x`` with its place on the grid, if there is one."""
        return x if self.width is None else md_lrpe(x, here.positions, self.width)
