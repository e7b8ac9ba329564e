"""Aaren: attention as a recurrence (Feng et al. 2024, arXiv 2405.13956)."""

import torch
from torch import Tensor, nn

from seqpar.crossing.here import Here
from seqpar.layers.linear.based import with_ones
from seqpar.layers.parts.checks import head_dim
from seqpar.layers.ssm.state_space import exact_dtype
from seqpar.sharding.cut import Cut


class Aaren(nn.Module):
    """Softmax attention of one learned query per head to all tokens so far: ``o_t = sum_s softmax_s(q k_s) v_s``.

    ``x [b, t, dim]`` my tokens, and so is the result. The query is a parameter, not a projection of the token, so a
    score depends on one token only and the sums are a recurrence: ``S_t = exp(m_(t-1) - m_t) S_(t-1) + exp(s_t - m_t)
    [v_t, 1]`` with ``m`` the running maximum of the scores. The result does not depend on ``m``, so ``m`` has no
    gradient; with it no exponent is above 0, and the sum of the weights is at least 1. One row of values, one sum and
    one maximum per head travel. ``key_dim`` and ``value_dim`` are those of one head (default: ``dim / heads``).
    """

    def __init__(self, dim: int, heads: int, *, key_dim: int | None = None, value_dim: int | None = None) -> None:
        super().__init__()
        key_dim = head_dim(dim, heads, key_dim)
        value_dim = head_dim(dim, heads, value_dim, "value_dim")
        self.query = nn.Parameter(torch.randn(heads, key_dim))
        self.k = nn.Linear(dim, heads * key_dim, bias=False)
        self.v = nn.Linear(dim, heads * value_dim, bias=False)
        self.out = nn.Linear(heads * value_dim, dim, bias=False)
        self.heads, self.key_dim, self.value_dim = heads, key_dim, value_dim

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Scores ``[b, t, h]`` and values with a channel of ones, in fp32 (fp64 for fp64), token by token."""
        exact = exact_dtype(x)
        k, v = self.k(x).unflatten(-1, (-1, self.key_dim)), self.v(x).unflatten(-1, (-1, self.value_dim))
        scores = (k.to(exact) * self.query.to(exact)).sum(-1) * self.key_dim**-0.5
        return scores, with_ones(v.to(exact))

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """All that mixes tokens: ``o [b, t, h, v + 1]``, in fp32 (fp64 for fp64)."""
        scores, v = parts
        here = Here.of(cut, self)
        shifted, log_decay, _ = shift_down(scores, here)
        weights = shifted.exp()[..., None]
        return here.linear_attention(torch.ones_like(weights), weights, v, log_decay=log_decay)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads divided by the sums of their weights and put together, token by token."""
        return self.out((o[..., :-1] / o[..., -1:]).to(x.dtype).flatten(-2))


def shift_down(scores: Tensor, here: Here, floor: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``scores`` less their running maximum, and what that does to the sums so far: ``m_(t-1) - m_t``, a log decay;
    last, the maximum ``m``, which has no gradient.

    The first two are at most 0. ``floor``: the running maximum is not below it. The decay of a document's first token,
    before which there is nothing, is 0.
    """
    before, upto = here.running_max(scores)
    if floor is not None:
        before, upto = before.clamp(min=floor), upto.clamp(min=floor)
    return scores - upto, torch.where(before == -torch.inf, 0, before - upto), upto
