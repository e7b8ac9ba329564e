"""JRT-RNN: prefix linear attention (Arora et al. 2024, arXiv 2407.05483)."""

import torch
from torch import Tensor, nn

from seqpar.crossing.here import Here
from seqpar.layers.linear.based import normalised, taylor_features, with_ones
from seqpar.layers.parts.checks import head_dim, positive
from seqpar.layers.ssm.state_space import exact_dtype
from seqpar.sharding.cut import Cut


class JRT(nn.Module):
    """Causal linear attention (the decoder), plus linear attention of every token to the whole prefix (the encoder).

    ``o_t = phi(q_t) (S_t + E) / phi(q_t) (z_t + e)`` with ``S_t, z_t`` the sums of ``phi(k_s) v_s'`` and ``phi(k_s)``
    over the tokens so far, and ``E, e`` those of keys and values of the encoder over the first ``prefix`` tokens of the
    document (None: over all). The encoder's sums are added for every token, those of the prefix too, which so see
    later tokens of it: the layer is not causal. ``phi`` is :func:`seqpar.layers.linear.based.taylor_features`;
    ``phi(0)`` is not 0, so tokens beyond the prefix are masked after it.

    ``x [b, t, dim]`` my tokens, and so is the result. One state per head travels, and those of documents that cross a
    cut are summed over ranks. The paper's defaults: ``prefix=1024``, ``feature_dim=16``, separate projections
    for the encoder; ``tied=True`` uses the decoder's.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        prefix: int | None = 1024,
        tied: bool = False,
        feature_dim: int = 16,
        value_dim: int | None = None,
    ) -> None:
        super().__init__()
        value_dim = head_dim(dim, heads, value_dim, "value_dim")
        positive(feature_dim=feature_dim, prefix=1 if prefix is None else prefix)
        self.q = nn.Linear(dim, heads * feature_dim, bias=False)
        self.k = nn.Linear(dim, heads * feature_dim, bias=False)
        self.v = nn.Linear(dim, heads * value_dim, bias=False)
        self.k_encoder = None if tied else nn.Linear(dim, heads * feature_dim, bias=False)
        self.v_encoder = None if tied else nn.Linear(dim, heads * value_dim, bias=False)
        self.out = nn.Linear(heads * value_dim, dim, bias=False)
        self.heads, self.prefix = heads, prefix
        self.feature_dim, self.value_dim = feature_dim, value_dim

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Features of queries and keys, and values with ones; last, keys and values of the encoder, zero beyond the
        prefix; in fp32 (fp64 for fp64)."""
        q, k = (taylor_features(self._heads(project(x), self.feature_dim)) for project in (self.q, self.k))
        v = with_ones(self._heads(self.v(x), self.value_dim))
        k_encoder, v_encoder = k, v
        if self.k_encoder is not None and self.v_encoder is not None:
            k_encoder = taylor_features(self._heads(self.k_encoder(x), self.feature_dim))
            v_encoder = with_ones(self._heads(self.v_encoder(x), self.value_dim))
        if self.prefix is not None:
            inside = (positions < self.prefix).to(x.device)[:, None, None]
            k_encoder, v_encoder = torch.where(inside, k_encoder, 0), torch.where(inside, v_encoder, 0)
        return q, k, v, k_encoder, v_encoder

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """All that mixes tokens: ``o [b, t, h, v + 1]``, numerator and denominator of decoder and encoder summed."""
        q, k, v, k_encoder, v_encoder = parts
        here = Here.of(cut, self)
        (encoded,) = here.document_memories((k_encoder, v_encoder))
        decoded = here.linear_attention(q, k, v)
        return decoded + encoded.read(q)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads divided by their normalisers and put together, token by token."""
        return self.out(normalised(o).to(x.dtype).flatten(-2))

    def _heads(self, x: Tensor, dim: int) -> Tensor:
        """``[b, t, h, dim]`` in fp32 (fp64 for fp64): a sum of squares outgrows fp16."""
        return x.to(exact_dtype(x)).unflatten(-1, (-1, dim))
