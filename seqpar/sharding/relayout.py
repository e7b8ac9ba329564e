"""Activations that change places: from one layout to another, and from tokens to heads and back.

Every row goes to one place, so gradients go back the same way; only a key/value head that several ranks hold has its
gradients summed, in fp32.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.first_order import first_order
from seqpar.collectives.group import sum_in_order
from seqpar.collectives.planned import Planned, rows
from seqpar.sharding.called import called
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.shard import Shard, dealt, digest_of, holders, in_sequence, tokens_of

HeadRanges = tuple[tuple[int, int], ...]


# --- layouts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Moves:
    """For one rank: its rows by where they go, how many go to each rank and come from each, and the order of those."""

    leaving: Planned
    sends: tuple[int, ...]
    receives: tuple[int, ...]
    order: Planned


@lru_cache(maxsize=32)
def _moves(old: Shard, new: Shard) -> _Moves:
    to, _ = holders(new, tokens_of(old.runs[old.rank]))
    source, row = holders(old, tokens_of(new.runs[new.rank]))
    arriving = np.lexsort((row, source))
    order = np.empty_like(arriving)
    order[arriving] = np.arange(len(arriving))
    sends, receives = (np.bincount(ranks, minlength=old.size).tolist() for ranks in (to, source))
    return _Moves(rows(np.argsort(to, kind="stable")), tuple(sends), tuple(receives), rows(order))


def _move(x: Tensor, old: Shard, new: Shard, group: Group) -> Tensor:
    moves = _moves(old, new)
    leaving = [part.contiguous() for part in x[:, moves.leaving.on(x.device)].split(list(moves.sends), 1)]
    arriving = [x.new_empty((x.shape[0], count, *x.shape[2:])) for count in moves.receives]
    return torch.cat(group.all_to_all(leaving, arriving).wait(), 1)[:, moves.order.on(x.device)]


@first_order("relayout")
class _Relayout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, old: Shard, new: Shard, group: Group, slot: Slot) -> Tensor:
        ctx.call = (new, old, group)
        return slot.keep(lambda: (_move(x, old, new, group),))[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _move(grads[0], *ctx.call), None, None, None, None


def relayout(x: Tensor, old: Shard, new: Shard, group: Group, slot: Slot) -> Tensor:
    """My rows of ``x`` ``[b, t, ...]`` under the layout of ``new`` instead of ``old``. Differentiable.

    Law: ``relayout(old.take(x), old, new) == new.take(x)``, bit for bit. Sends each row that moves once.
    """
    if x.is_complex():
        return torch.view_as_complex(relayout(torch.view_as_real(x.resolve_conj()), old, new, group, slot))
    called("relayout", group, old, digest_of(new) if group.size > 1 else "", x)
    result: Tensor = _Relayout.apply(x, old, new, group, slot)
    return result


# --- heads -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadDeal:
    """Which query heads, and which key/value heads for them, each rank gets; ``ratio`` query heads share one."""

    queries: HeadRanges
    keys: HeadRanges
    ratio: int

    def match(self, rank: int, device: torch.device) -> Tensor | slice:
        """For each query head of ``rank``, its key/value head among those there; a slice if the kernel sees to it."""
        (start, stop), first = self.queries[rank], self.keys[rank][0]
        num_keys = self.keys[rank][1] - first
        if num_keys and start % self.ratio == 0 and stop - start == num_keys * self.ratio:
            return slice(None)
        return torch.arange(start, stop, device=device) // self.ratio - first


def split_heads(num_queries: int, num_keys: int, size: int) -> HeadDeal:
    """Deal heads to ranks as evenly as they go; a rank also gets the key/value heads that its query heads read.

    >>> split_heads(4, 2, 3)
    HeadDeal(queries=((0, 1), (1, 2), (2, 4)), keys=((0, 1), (0, 1), (1, 2)), ratio=2)
    """
    ratio = num_queries // num_keys
    queries = tuple((num_queries * r // size, num_queries * (r + 1) // size) for r in range(size))
    keys = tuple((start // ratio, -(-stop // ratio)) if start < stop else (0, 0) for start, stop in queries)
    return HeadDeal(queries, keys, ratio)


def _to_heads(x: Tensor, shard: Shard, group: Group, heads: HeadRanges) -> Tensor:
    mine = heads[group.rank][1] - heads[group.rank][0]
    leaving = [x[:, :, start:stop].contiguous() for start, stop in heads]
    arriving = [x.new_empty((x.shape[0], count, mine, x.shape[3])) for count in shard.counts]
    whole = torch.cat(group.all_to_all(leaving, arriving).wait(), 1)
    return whole if shard.layout == "contiguous" else whole[:, in_sequence(shard).on(x.device)]


def _to_tokens(y: Tensor, shard: Shard, group: Group, heads: HeadRanges) -> Tensor:
    """The inverse; the parts of a head that several ranks hold are summed, in fp32."""
    shared = sum(stop - start for start, stop in heads) > max(stop for _, stop in heads)
    if shared and y.dtype != torch.float64:
        y = y.float()
    by_rank = y if shard.layout == "contiguous" else y[:, dealt(shard).on(y.device)]
    leaving = [part.contiguous() for part in by_rank.split(list(shard.counts), 1)]
    num_local = shard.num_local
    arriving = [y.new_empty((y.shape[0], num_local, stop - start, y.shape[3])) for start, stop in heads]
    parts = group.all_to_all(leaving, arriving).wait()
    if not shared:
        return torch.cat(parts, 2)
    num_heads = max(stop for _, stop in heads)
    placed = []
    for (start, stop), part in zip(heads, parts):
        whole = y.new_zeros((y.shape[0], num_local, num_heads, y.shape[3]))
        whole[:, :, start:stop] = part
        placed.append(whole)
    return sum_in_order(placed)


@first_order("tokens_to_heads")
class _TokensToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard, group: Group, heads: HeadRanges, slot: Slot) -> Tensor:
        ctx.call, ctx.dtype = (shard, group, heads), x.dtype
        return slot.keep(lambda: (_to_heads(x, shard, group, heads),))[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _to_tokens(grads[0], *ctx.call).to(ctx.dtype), None, None, None, None


@first_order("heads_to_tokens")
class _HeadsToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, shard: Shard, group: Group, heads: HeadRanges, slot: Slot) -> Tensor:
        ctx.call = (shard, group, heads)
        return slot.keep(lambda: (_to_tokens(y, shard, group, heads),))[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _to_heads(grads[0], *ctx.call), None, None, None, None


def tokens_to_heads(x: Tensor, shard: Shard, group: Group, heads: HeadRanges, slot: Slot) -> Tensor:
    """From my tokens of all heads ``[b, t, h, d]`` to all tokens of my heads ``[b, s, h', d]``, in sequence order."""
    called("tokens_to_heads", group, shard, heads, x)
    result: Tensor = _TokensToHeads.apply(x, shard, group, heads, slot)
    return result


def heads_to_tokens(y: Tensor, shard: Shard, group: Group, heads: HeadRanges, slot: Slot) -> Tensor:
    """From all tokens of my heads ``[b, s, h', d]`` back to my tokens of all heads ``[b, t, h, d]``."""
    called("heads_to_tokens", group, shard, (heads, y.dtype, y.shape[0], *y.shape[3:]))
    result: Tensor = _HeadsToTokens.apply(y, shard, group, heads, slot)
    return result
