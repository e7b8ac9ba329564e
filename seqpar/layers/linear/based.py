"""Based: linear attention with a Taylor feature map (Arora et al. 2024, arXiv 2402.18668)."""

import torch
from torch import Tensor, nn

from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import head_dim, positive
from seqpar.layers.ssm.state_space import exact_dtype
from seqpar.sharding.cut import Cut

EPS = 1e-12


def taylor_dim(dim: int) -> int:
    """How many features :func:`taylor_features` makes of ``dim`` channels: 153 of 16."""
    return 1 + dim + dim * (dim + 1) // 2


def taylor_features(x: Tensor) -> Tensor:
    """Features whose products are the second-order Taylor series of ``exp``: ``[..., d] -> [..., taylor_dim(d)]``.

    Law: ``phi(q) phi(k) = 1 + s + s^2 / 2`` with ``s = q k / sqrt(d)``, which is at least 1/2. Each pair of channels is
    there once, weighed by ``sqrt(2)`` if they differ. ``phi(0)`` is not 0: what a token must not see is masked after
    the map. Computed in fp32 (fp64 for fp64), rounded once to the dtype of ``x``.
    """
    dim, exact = x.shape[-1], x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    rows, columns = torch.triu_indices(dim, dim, device=x.device)
    weights = (1 + (rows == columns).to(exact.dtype)).rsqrt() * dim**-0.5
    pairs = exact[..., rows] * exact[..., columns] * weights
    return torch.cat([torch.ones_like(exact[..., :1]), exact * dim**-0.25, pairs], -1).to(x.dtype)


class Based(nn.Module):
    """``o_t = sum_s phi(q_t) phi(k_s) v_s / (sum_s phi(q_t) phi(k_s) + 1e-12)`` with :func:`taylor_features`.

    ``x [b, t, dim]`` my tokens, and so is the result. One state per head travels, the normaliser in it; what is added
    to the normaliser is added to the whole sum. The features are scaled, so products are not scaled again. The paper's
    defaults: ``feature_dim=16`` channels of a head's queries and keys (153 features), ``value_dim = dim / heads``. Its
    models put windowed softmax attention and short convolutions into other layers.
    """

    def __init__(self, dim: int, heads: int, *, feature_dim: int = 16, value_dim: int | None = None) -> None:
        super().__init__()
        value_dim = head_dim(dim, heads, value_dim, "value_dim")
        positive(feature_dim=feature_dim)
        self.q = nn.Linear(dim, heads * feature_dim, bias=False)
        self.k = nn.Linear(dim, heads * feature_dim, bias=False)
        self.v = nn.Linear(dim, heads * value_dim, bias=False)
        self.out = nn.Linear(heads * value_dim, dim, bias=False)
        self.heads, self.feature_dim, self.value_dim = heads, feature_dim, value_dim

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Features of queries and keys, and values with a channel of ones, in fp32 (fp64 for fp64), token by token."""
        q, k = (project(x).unflatten(-1, (-1, self.feature_dim)) for project in (self.q, self.k))
        v = self.v(x).unflatten(-1, (-1, self.value_dim))
        q, k, v = (each.to(exact_dtype(x)) for each in (q, k, v))  # a sum of squares outgrows fp16
        return taylor_features(q), taylor_features(k), with_ones(v)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The one call that mixes tokens: ``o [b, t, h, v + 1]``, in fp32 (fp64 for fp64)."""
        q, k, v = parts
        return Here.of(cut, self).linear_attention(q, k, v)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads divided by their normalisers and put together, token by token."""
        return self.out(normalised(o).to(x.dtype).flatten(-2))


def with_ones(v: Tensor) -> Tensor:
    """Values with a channel of ones, which sums up the weights in the same state, in the same message."""
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def normalised(o: Tensor) -> Tensor:
    """What :func:`with_ones` was for: all channels divided by the last one."""
    return o[..., :-1] / (o[..., -1:] + EPS)
