"""Positions on a grid whose rows are written one after another: MD-LRPE and MD-TPE (arXiv 2405.21022)."""

import math
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from seqpar.collectives import alone
from seqpar.collectives.group import where
from seqpar.crossing.here import Here
from seqpar.crossing.recurrences import linear_attention
from seqpar.layers.parts.checks import head_dim, positive
from seqpar.layers.parts.fp32 import Fp32Parameters
from seqpar.layers.parts.norm import RMSNorm
from seqpar.sharding.cut import Cut
from seqpar.sharding.relayout import relayout
from seqpar.sharding.shard import Run, Shard


def md_lrpe(x: Tensor, positions: Tensor, width: int, base: float = 10000.0) -> Tensor:
    """``[x cos(Theta), x sin(Theta)]`` for a token on a grid of ``width`` columns: twice as many channels.

    The first half of the channels turns with the row, the second with the column, by ``base**(-2 i / k)`` per step for
    the ``i``-th of each. Law: the product of an encoded query and key depends on the rows and columns between them, not
    on where they are. ``x [b, t, h, k]``; ``positions [t]``: those in the document, whose rows have ``width`` tokens.
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    positions, dim = positions.to(x.device), x.shape[-1]
    half = -(-dim // 2)
    theta = base ** (-2 * torch.arange(half, dtype=torch.float64, device=x.device) / dim)
    grid = torch.stack([positions // width, positions % width], -1).double()
    turns = (grid[..., None] * theta).flatten(-2)[..., None, :dim]
    angles = (turns % (2 * math.pi)).to(exact)  # in fp64 until it is less than one turn
    encoded = torch.cat([x.to(exact) * angles.cos(), x.to(exact) * angles.sin()], -1)
    return encoded.to(x.dtype)


class MDTPE(Fp32Parameters):
    """Each token and those before it in its row, and in its column, weighed by a learned kernel of their distance.

    ``y = sum_(s <= t) kernel(t - s) x_s`` along either axis, with ``kernel(n) = sum_j q_j k_j lambda_j^n`` for each
    head and axis and ``lambda = sigmoid(decay)``: linear attention of constant queries and keys. Then a norm and a
    projection of either axis, and their sum.

    ``x [b, t, dim]`` my tokens, and so is the result. Each document is a grid of ``width`` columns whose last row may
    be short. Along rows a state crosses a cut inside a row; for the columns all tokens are re-laid, so that each rank
    has whole columns, and back. ``key_dim`` (default: ``dim / heads``) numbers are summed up in a kernel.
    """

    fp32 = ("decay",)

    def __init__(self, dim: int, heads: int, *, width: int, key_dim: int | None = None) -> None:
        super().__init__()
        value_dim = head_dim(dim, heads, None)
        key_dim = head_dim(dim, heads, key_dim)
        positive(width=width)
        self.q = nn.Parameter(torch.randn(2, heads, key_dim) * key_dim**-0.5)
        self.k = nn.Parameter(torch.randn(2, heads, key_dim))
        self.decay = nn.Parameter(torch.linspace(0, 6, key_dim).expand(2, heads, key_dim).clone())
        self.norms = nn.ModuleList(RMSNorm(heads * value_dim) for _ in range(2))
        self.out = nn.Linear(2 * dim, dim, bias=False)
        self.heads, self.width = heads, width

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        if cut.states is not None:
            raise ValueError(f"{where(cut.group)}: MDTPE keeps no states from one call to the next: pass no states")
        slot = Here.of(cut, self).slot
        along_rows = Here(replace(cut, shard=row_shard(cut.shard, self.width)), self, slot)
        rows = along_rows.linear_attention(*self._constants(x, 0), log_decay=self._log_decay(x, 0))
        columns = column_shard(cut.shard, self.width)
        mine = relayout(x, cut.shard, columns, cut.group, slot)
        along_columns = linear_attention(
            *self._constants(mine, 1),
            log_decay=self._log_decay(mine, 1),
            shard=Shard.of([len(run) for run in columns.runs[columns.rank]], alone()),
            group=alone(),
            impl=cut.impl,
        )
        back = relayout(along_columns.flatten(2), columns, cut.shard, cut.group, slot)
        return self.out(torch.cat([norm(y) for norm, y in zip(self.norms, (rows.flatten(2), back))], -1))

    def _constants(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, the same for all tokens, and the tokens as values."""
        q, k = (y[axis].to(x.dtype).expand(*x.shape[:2], -1, -1) for y in (self.q, self.k))
        return q, k, x.unflatten(-1, (self.heads, -1))

    def _log_decay(self, x: Tensor, axis: int) -> Tensor:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        return nn.functional.logsigmoid(self.decay[axis].to(exact)).expand(*x.shape[:2], -1, -1)


@lru_cache(maxsize=64)
def row_shard(shard: Shard, width: int) -> Shard:
    """The same tokens on the same ranks, each row of ``width`` tokens a document of its own."""
    rows = [min(width, length - start) for length in shard.lengths for start in range(0, length, width)]
    return replace(shard, lengths=tuple(rows))


@lru_cache(maxsize=64)
def column_shard(shard: Shard, width: int) -> Shard:
    """The same tokens, column by column: each rank has whole columns, one after another, of about as many tokens."""
    dealt: list[list[Run]] = [[] for _ in range(shard.size)]
    before = 0
    for start, length in zip(shard.offsets, shard.lengths):
        for column in range(min(width, length)):
            run = Run(start + column, start + length, width)
            dealt[before * shard.size // shard.num_tokens].append(run)
            before += len(run)
    return Shard(shard.lengths, f"columns of {width}", tuple(tuple(runs) for runs in dealt), shard.group, shard.rank)
