"""Titans' three ways to put a memory beside attention (Behrouz et al. 2024, arXiv 2501.00663): MAG and MAL; MAC is
:mod:`seqpar.layers.memory.mac`."""

import torch
from torch import Tensor, nn

from seqpar.crossing.attending.always import Always
from seqpar.crossing.here import Here
from seqpar.layers.memory.neural_memory import titans
from seqpar.layers.parts.checks import head_dim, positive
from seqpar.layers.parts.norm import RMSNorm
from seqpar.layers.parts.rope import rotary
from seqpar.sharding.cut import Cut


class PersistentAttention(nn.Module):
    """Softmax attention over the last ``window`` tokens and over ``persistent`` learned ones, which all tokens see.

    The learned tokens go through the same projections as the others, and have no position. ``x [b, t, dim]`` my tokens,
    and so is the result. Keys and values of a window travel.
    """

    def __init__(
        self, dim: int, heads: int, *, window: int = 512, persistent: int = 16, rope_base: float = 10000.0
    ) -> None:
        super().__init__()
        size = head_dim(dim, heads, None)
        positive(window=window, persistent=persistent)
        if size % 2:
            raise ValueError(f"rotary positions need an even dim / heads, got {size}")
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.persistent = nn.Parameter(torch.randn(persistent, dim))
        self.out = nn.Linear(dim, dim, bias=False)
        self.heads, self.window, self.rope_base = heads, window, rope_base

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k = (rotary(y, cut.positions, self.rope_base) for y in (q, k))
        keys, values = self.rows()
        o = Here.of(cut, self).attention(q, k, v, window=self.window, always=Always(keys=keys, values=values))
        return self.out(o.flatten(-2))

    def rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[persistent, h, d]`` of the learned tokens."""
        _, keys, values = self.qkv(self.persistent).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return keys, values


class Met(nn.Module):
    """``norm(a) * sigmoid(norm(b))``, both norms with learned weights: how attention and memory meet (ours: the paper
    says that both are normed by learned vectors, and then a nonlinearity)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.left, self.right = RMSNorm(dim), RMSNorm(dim)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        met: Tensor = self.left(a) * self.right(b).sigmoid()
        return met


class MAG(nn.Module):
    """Memory as a gate: attention over a window and a memory read the same tokens, ``out(met(attention, memory))``.

    ``memory``: any layer ``[b, t, dim] -> [b, t, dim]`` called with the cut (default: Titans' memory with as many
    heads). ``x [b, t, dim]`` my tokens, and so is the result. What the memory sends travels, and keys and values of a
    window.
    """

    def __init__(
        self, dim: int, heads: int, *, window: int = 512, persistent: int = 16, memory: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.attention = PersistentAttention(dim, heads, window=window, persistent=persistent)
        self.memory = titans(dim, heads) if memory is None else memory
        self.met = Met(dim)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.out(self.met(self.attention(x, cut), self.memory(x, cut)))


class MAL(nn.Module):
    """Memory as a layer: a memory reads the tokens, and attention over a window reads what it gives.

    The arguments are those of :class:`MAG`. ``x [b, t, dim]`` my tokens, and so is the result.
    """

    def __init__(
        self, dim: int, heads: int, *, window: int = 512, persistent: int = 16, memory: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.memory = titans(dim, heads) if memory is None else memory
        self.attention = PersistentAttention(dim, heads, window=window, persistent=persistent)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.attention(self.memory(x, cut), cut)
