"""Linear attention without decay (Katharopoulos et al. 2020, arXiv 2006.16236; LASP-2, arXiv 2502.07563)."""

from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import head_dim, one_of
from seqpar.layers.parts.norm import RMSNorm
from seqpar.layers.ssm.state_space import exact_dtype
from seqpar.sharding.cut import Cut


def _elu_plus_one(x: Tensor) -> Tensor:
    exact = x.to(exact_dtype(x))  # elu(x) is rounded to -1 long before elu(x) + 1 is 0
    return (exact.clamp(max=0).exp() + exact.relu()).to(x.dtype)


def _identity(x: Tensor) -> Tensor:
    return x


FEATURE_MAPS: MappingProxyType[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"elu_plus_one": _elu_plus_one, "silu": functional.silu, "identity": _identity}
)


class LinearAttention(nn.Module):
    """``S_t = S_{t-1} + phi(k_t) v_t'`` and ``o_t = phi(q_t) S_t``: one state per head travels over the cuts.

    ``x [b, t, dim]`` my tokens, and so is the result. ``feature_map`` is ``phi``: ``"elu_plus_one"``, ``"silu"`` or
    ``"identity"``. Each head's output is divided by its root mean square, as in LASP-2; ``normaliser=True`` divides it
    by ``sum_s phi(q_t) phi(k_s)`` before that, as Katharopoulos et al. do, and needs the positive map. ``key_dim`` and
    ``value_dim`` are those of one head (default: ``dim / heads``).

    With a map that is not positive the output of a document's first token, ``phi(q) phi(k) v`` divided by its size, is
    ``v`` or ``-v``, whichever sign the product has: its gradient has no bound, and training magnifies rounding errors.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        feature_map: str = "elu_plus_one",
        normaliser: bool = False,
        key_dim: int | None = None,
        value_dim: int | None = None,
    ) -> None:
        super().__init__()
        key_dim = head_dim(dim, heads, key_dim)
        value_dim = head_dim(dim, heads, value_dim, "value_dim")
        self.feature_map = one_of("feature_map", feature_map, FEATURE_MAPS)
        if normaliser and feature_map != "elu_plus_one":
            raise ValueError(f"normaliser needs a positive feature map, elu_plus_one, got {feature_map!r}")
        self.q = nn.Linear(dim, heads * key_dim, bias=False)
        self.k = nn.Linear(dim, heads * key_dim, bias=False)
        self.v = nn.Linear(dim, heads * value_dim, bias=False)
        self.out = nn.Linear(heads * value_dim, dim, bias=False)
        self.norm = RMSNorm(value_dim)
        self.heads, self.key_dim, self.value_dim = heads, key_dim, value_dim
        self.normaliser = normaliser

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Features of queries and keys, and values, token by token."""
        q, k = (project(x).unflatten(-1, (-1, self.key_dim)) for project in (self.q, self.k))
        v = self.v(x).unflatten(-1, (-1, self.value_dim))
        phi = FEATURE_MAPS[self.feature_map]
        if self.normaliser:
            # A channel of ones sums up the keys in the same state, in the same message.
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        return phi(q), phi(k), v

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The one call that mixes tokens: ``o [b, t, h, v]``, in fp32 (fp64 for fp64): sums outgrow fp16."""
        q, k, v = parts
        here, scale = Here.of(cut, self), q.shape[-1] ** -0.5
        return here.linear_attention(q, k, v, scale=scale, out_dtype=exact_dtype(q))

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads normed and put together, token by token."""
        if self.normaliser:
            o = o[..., :-1] / (o[..., -1:] + self.norm.eps)
        return self.out(self.norm(o).to(x.dtype).flatten(-2))
