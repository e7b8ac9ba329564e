"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) in absorbed form: one latent head travels."""

import torch
from torch import Tensor, nn

from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import positive
from seqpar.layers.parts.norm import RMSNorm
from seqpar.layers.parts.rope import Rope
from seqpar.sharding.cut import Cut


class LatentAttention(nn.Module):
    """Softmax attention whose keys and values are made of one small latent vector a token.

    What keys are made of is applied to queries instead, and what values are made of to the outputs, so that all heads
    share one key ``[latent, rotated part]`` and one value ``[latent]``: ``2 latent_dim + rope_dim`` numbers a token
    travel, whatever the number of heads. Law: it is the expanded form, up to rounding.

    ``x [b, t, dim]`` my tokens, and so is the result. ``query_rank``: of a bottleneck with a norm for queries (None:
    none). Each head has ``key_dim`` channels without positions, ``rope_dim`` rotated ones (0: no positions, as Kimi
    Linear) that all heads share in keys, and ``value_dim``. ``rope`` turns ``rope_dim`` channels; by default
    interleaved pairs. ``scale``: default ``(key_dim + rope_dim)**-0.5``.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        latent_dim: int,
        key_dim: int,
        rope_dim: int,
        value_dim: int,
        query_rank: int | None = None,
        rope: Rope | None = None,
        scale: float | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        positive(dim=dim, heads=heads, latent_dim=latent_dim, key_dim=key_dim, value_dim=value_dim)
        width = key_dim + rope_dim
        self.q_down = None if query_rank is None else nn.Linear(dim, query_rank, bias=False)
        self.q_norm = None if query_rank is None else RMSNorm(query_rank, eps)
        self.q = nn.Linear(dim if query_rank is None else query_rank, heads * width, bias=False)
        self.kv_down = nn.Linear(dim, latent_dim + rope_dim, bias=False)
        self.kv_norm = RMSNorm(latent_dim, eps)
        self.kv = nn.Linear(latent_dim, heads * (key_dim + value_dim), bias=False)
        self.out = nn.Linear(heads * value_dim, dim, bias=False)
        self.heads, self.latent_dim, self.key_dim, self.value_dim = heads, latent_dim, key_dim, value_dim
        self.rope_dim, self.scale = rope_dim, width**-0.5 if scale is None else scale
        self.rope = rope if rope is not None or not rope_dim else Rope.plain(rope_dim, interleaved=True)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Queries as latent vectors, and the one key and value that all heads share."""
        low = x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x))
        plain, turned = self.q(low).unflatten(-1, (self.heads, -1)).split([self.key_dim, self.rope_dim], -1)
        latent, key = self.kv_down(x).unsqueeze(-2).split([self.latent_dim, self.rope_dim], -1)
        latent = self.kv_norm(latent)
        if self.rope is not None:
            turned, key = self.rope(turned, positions), self.rope(key, positions)
        absorbed = torch.einsum("bthk,hkl->bthl", plain, self._of_heads()[:, : self.key_dim])
        return torch.cat([absorbed, turned], -1), torch.cat([latent, key], -1), latent

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The one call that mixes tokens: latent outputs ``[b, t, h, latent_dim]``."""
        return Here.of(cut, self).attention(*parts, scale=self.scale)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """Values made of latent outputs, and the heads put together, token by token."""
        values = torch.einsum("bthl,hvl->bthv", o, self._of_heads()[:, self.key_dim :])
        return self.out(values.flatten(-2))

    def _of_heads(self) -> Tensor:
        """What makes keys and values of latent vectors, ``[h, key_dim + value_dim, latent_dim]``."""
        return self.kv.weight.unflatten(0, (self.heads, -1))
