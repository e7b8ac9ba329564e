"""Performer: softmax attention by positive random features (Choromanski et al. 2020, arXiv 2009.14794)."""

import math

import torch
from torch import Tensor, nn

from seqpar.crossing.here import Here
from seqpar.layers.linear.based import normalised, with_ones
from seqpar.layers.parts.checks import head_dim, positive
from seqpar.layers.ssm.state_space import exact_dtype
from seqpar.sharding.cut import Cut

EPS = 1e-4  # so that no key is quite invisible


class Performer(nn.Module):
    """Causal linear attention with ``phi(x) = (exp(W x - |x|^2 / 2) + 1e-4) / sqrt(features)``, of ``x`` divided by the
    fourth root of ``key_dim``: ``phi(q) phi(k)`` is about ``exp(q k / sqrt(key_dim))``, and the output is normalised.

    The rows of ``W``, the same for all heads, are random and orthogonal in blocks of ``key_dim``, as long as Gaussian
    ones; they are drawn once and are part of the state dict. ``features`` is ``key_dim log(key_dim)`` by default, as in
    the published code. That also divides by the largest exponent of all keys, which sees later tokens; here exponents
    of keys stay, at most half of ``|w|^2``, about ``key_dim / 2``: heads of up to 128 are safe. ``x [b, t, dim]`` my
    tokens, and so is the result. One state per head travels, the normaliser in it.
    """

    directions: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        features: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
    ) -> None:
        super().__init__()
        key_dim, value_dim = head_dim(dim, heads, key_dim), head_dim(dim, heads, value_dim, "value_dim")
        features = default_features(key_dim) if features is None else features
        positive(features=features)
        self.q = nn.Linear(dim, heads * key_dim, bias=False)
        self.k = nn.Linear(dim, heads * key_dim, bias=False)
        self.v = nn.Linear(dim, heads * value_dim, bias=False)
        self.out = nn.Linear(heads * value_dim, dim, bias=False)
        self.register_buffer("directions", orthogonal_directions(features, key_dim))
        self.heads, self.key_dim, self.value_dim = heads, key_dim, value_dim

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Features of queries and keys, and values with a channel of ones, in fp32 (fp64 for fp64), token by token."""
        q, k = (self._features(project(x), project is self.q) for project in (self.q, self.k))
        return q, k, with_ones(self.v(x).unflatten(-1, (-1, self.value_dim)).to(exact_dtype(x)))

    def _features(self, x: Tensor, query: bool) -> Tensor:
        """A query's own largest exponent is taken out: the normaliser cancels it."""
        x = x.unflatten(-1, (-1, self.key_dim)).to(exact_dtype(x)) * self.key_dim**-0.25
        exponents = x @ self.directions.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2
        if query:
            exponents = exponents - exponents.detach().amax(-1, keepdim=True)
        return (exponents.exp() + EPS) * len(self.directions) ** -0.5

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The one call that mixes tokens: ``o [b, t, h, v + 1]``, in fp32 (fp64 for fp64)."""
        q, k, v = parts
        return Here.of(cut, self).linear_attention(q, k, v)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads divided by their normalisers and put together, token by token."""
        return self.out(normalised(o).to(x.dtype).flatten(-2))


def default_features(key_dim: int) -> int:
    """Of the published code."""
    return max(1, int(key_dim * math.log(key_dim)))


def orthogonal_directions(count: int, dim: int) -> Tensor:
    """``[count, dim]``: orthogonal rows in blocks of ``dim``, each as long as a Gaussian vector."""
    blocks = [torch.linalg.qr(torch.randn(dim, dim))[0] for _ in range(-(-count // dim))]
    return torch.cat(blocks)[:count] * torch.randn(count, dim).norm(dim=1, keepdim=True)
