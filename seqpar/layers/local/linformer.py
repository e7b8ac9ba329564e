"""Linformer: attention over projected keys and values (Wang et al. 2020, arXiv 2006.04768), cut along the sequence as
by Li et al. (2021, arXiv 2105.13120)."""

import torch
from torch import Tensor, nn

from seqpar.collectives.group import where
from seqpar.crossing.document_memory import DocumentMemory
from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import head_dim, positive
from seqpar.sharding.cut import Cut


class Linformer(nn.Module):
    """Softmax attention over ``projected`` weighted sums of a document's keys and values instead of all of them.

    ``softmax(q (E' K)' / sqrt(d)) (F' V)``, where each position of a document has its own learned row of ``E`` and
    ``F [max_tokens, projected]``, the same for all heads; with ``shared`` they are one. So everything whose size grows
    with the length is cut: each rank weighs its own tokens with its own rows, and one sum over ranks, of a size that
    does not depend on the length, makes the projected keys and values whole.

    ``x [b, t, dim]`` my tokens, and so is the result. Sums and softmax are fp32 (fp64 for fp64). Every token sees its
    whole document, so there are no states between calls. ``projected`` is 256 as in the paper, and ``E`` and ``F``
    start as there, normal with variance ``1 / projected``. Raises ``ValueError`` for documents of more than
    ``max_tokens`` tokens.
    """

    def __init__(
        self, dim: int, heads: int, *, max_tokens: int = 8192, projected: int = 256, shared: bool = False
    ) -> None:
        super().__init__()
        head_dim(dim, heads, None)
        positive(max_tokens=max_tokens, projected=projected)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.key_weight = nn.Parameter(torch.randn(max_tokens, projected) * projected**-0.5)
        self.value_weight = None if shared else nn.Parameter(torch.randn(max_tokens, projected) * projected**-0.5)
        self.heads, self.max_tokens = heads, max_tokens

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values ``[b, t, dim]``, token by token."""
        return self.q(x), self.k(x), self.v(x)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The one sum that mixes tokens, and the attention over it: ``o [b, t, h, d]``."""
        self._check(cut)
        (q, k, v), here = (x.unflatten(-1, (self.heads, -1)) for x in parts), Here.of(cut, self)
        keys, values = self._projected(here, k, v)
        scores = keys.read(q) * q.shape[-1] ** -0.5
        return values.read(torch.softmax(scores, -1)).to(q.dtype)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads put together, token by token."""
        return self.out(o.flatten(-2))

    def _projected(self, here: Here, k: Tensor, v: Tensor) -> list[DocumentMemory]:
        """The keys and values of each document, projected, of one message; all heads have the same weights."""
        weights = [weight for weight in (self.key_weight, self.value_weight) if weight is not None]
        rows = (weight.index_select(0, here.positions.to(k.device)).to(k.dtype) for weight in weights)
        mine = [each[None, :, None].expand(len(k), -1, -1, -1) for each in rows]
        return here.document_memories((k, mine[0]), (mine[-1], v))

    def _check(self, cut: Cut) -> None:
        longest = max(cut.shard.lengths, default=0)
        if longest > self.max_tokens:
            raise ValueError(
                f"{where(cut.group)}: a document has {longest} tokens, but Linformer has weights for "
                f"{self.max_tokens} positions: build it with max_tokens={longest}"
            )
