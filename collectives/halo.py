"""The halo: a few neighbouring tokens of my own documents, from whichever ranks hold them.

What short convolutions, token shifts and sliding windows need. It may reach over several ranks (short shards, deep
halos), never into another document, and costs only the rows that are missing here.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqpar.collectives.agreed import agree
from seqpar.collectives.first_order import first_order
from seqpar.collectives.group import Group, where
from seqpar.collectives.planned import Planned, rows
from seqpar.collectives.rows import Range, add_rows, count, swap_rows


@dataclass(frozen=True)
class Span:
    """``count`` consecutive tokens of a document, from position ``first``, held by one rank in consecutive rows."""

    document: int
    first: int
    count: int


Spans = tuple[tuple[Span, ...], ...]  # of every rank, in the order of its rows


@dataclass(frozen=True)
class _Plan:
    """``sends[r]``: row ranges for rank r, in the order it expects. ``index``: where each row of the result comes from,
    counted over my rows, the rows received from rank 0, 1, ..., and one row of zeros."""

    sends: tuple[tuple[Range, ...], ...]
    receives: tuple[int, ...]
    index: Planned


Held = list[tuple[int, int, int, int]]  # (first position, end, rank, row) of the spans of a document, by position
Side = list[tuple[int, Range]]  # where tokens lie: (rank, rows)


def _owners(spans: Spans) -> dict[int, Held]:
    """Every span, by document."""
    owners: dict[int, Held] = defaultdict(list)
    for rank, of_rank in enumerate(spans):
        row = 0
        for span in of_rank:
            owners[span.document].append((span.first, span.first + span.count, rank, row))
            row += span.count
    return {document: sorted(held) for document, held in owners.items()}


def _wanted(span: Span, left: int, right: int, held: Held) -> tuple[Side, Side]:
    """Where the tokens on either side of a span lie."""
    end = span.first + span.count
    return _between(span.first - left, span.first, held), _between(end, end + right, held)


def _between(low: int, high: int, held: Held) -> Side:
    found: Side = []
    place = bisect_right(held, low, key=_end)
    while place < len(held) and held[place][0] < high:
        first, stop, rank, row = held[place]
        start, finish = max(low, first), min(high, stop)
        if start < finish:
            found.append((rank, (row + start - first, row + finish - first)))
        place += 1
    return found


def _end(span: tuple[int, int, int, int]) -> int:
    return span[1]


@lru_cache(maxsize=64)
def _plan(spans: Spans, rank: int, left: int, right: int) -> _Plan:
    owners = _owners(spans)
    sends: list[list[Range]] = [[] for _ in spans]
    for other, of_rank in enumerate(spans):
        for span in of_rank:
            for side in _wanted(span, left, right, owners[span.document]):
                sends[other].extend(part for source, part in side if source == rank and other != rank)
    receives = [0] * len(spans)
    mine = [(span, *_wanted(span, left, right, owners[span.document])) for span in spans[rank]]
    for _, before, after in mine:
        for source, (start, stop) in (*before, *after):
            receives[source] += stop - start if source != rank else 0
    index = _index(mine, rank, receives, left, right)
    return _Plan(tuple(tuple(ranges) for ranges in sends), tuple(receives), rows(index))


def _index(
    mine: list[tuple[Span, Side, Side]], rank: int, receives: list[int], left: int, right: int
) -> NDArray[np.int64]:
    num_rows = sum(span.count for span, _, _ in mine)
    *arrived, nothing = accumulate(receives, initial=num_rows)
    parts, row = [np.empty(0, np.int64)], 0

    def come(side: Side) -> list[NDArray[np.int64]]:
        found = []
        for source, (start, stop) in side:
            base = start if source == rank else arrived[source]
            arrived[source] += 0 if source == rank else stop - start
            found.append(np.arange(base, base + stop - start))
        return found

    for span, *sides in mine:
        before, after = (come(side) for side in sides)
        parts += [np.full(left - sum(map(len, before)), nothing), *before, np.arange(row, row + span.count)]
        parts += [*after, np.full(right - sum(map(len, after)), nothing)]
        row += span.count
    return np.concatenate(parts)


@first_order("halo")
class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, group: Group) -> Tensor:
        ctx.plan, ctx.group, ctx.rows, ctx.dtype = plan, group, x.shape[1], x.dtype
        parts = swap_rows(x, plan.sends, plan.receives, group).wait()
        parts[group.rank] = x[:, :0]
        pool = torch.cat([x, *parts, x.new_zeros((x.shape[0], 1, *x.shape[2:]))], 1)
        return pool[:, plan.index.on(x.device)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, group, upstream = ctx.plan, ctx.group, grads[0]
        dtype = torch.float64 if ctx.dtype == torch.float64 else torch.float32
        shape = upstream.shape
        rows = ctx.rows + sum(plan.receives) + 1
        pool = torch.zeros((shape[0], rows, *shape[2:]), dtype=dtype, device=upstream.device)
        pool.index_add_(1, plan.index.on(upstream.device), upstream.to(dtype))
        home, received, _ = pool.split([ctx.rows, sum(plan.receives), 1], 1)
        leaving = [part.contiguous() for part in received.split(list(plan.receives), 1)]
        arriving = [pool.new_empty((shape[0], count(ranges), *shape[2:])) for ranges in plan.sends]
        home = home.clone()
        for ranges, part in zip(plan.sends, group.all_to_all(leaving, arriving).wait()):
            add_rows(home, ranges, part)
        return home.to(ctx.dtype), None, None


def halo(x: Tensor, group: Group, spans: Sequence[Sequence[Span]], *, left: int = 0, right: int = 0) -> Tensor:
    """Each of my spans with the ``left`` tokens before and the ``right`` tokens after it in its document.

    Law: the result is what one device would cut out of the padded documents; its gradient, summed in fp32, goes back to
    the ranks that own the tokens.

    Shapes: ``x [b, t, ...]`` in; ``[b, sum of (left + count + right) over my spans, ...]`` out, zeros beyond the ends
    of a document. ``spans[r]`` are those of rank ``r`` (:attr:`seqpar.Shard.spans`), the same table on every rank.
    Raises ``ValueError`` before the first message for a negative width or spans that do not hold ``t`` tokens.
    """
    spans = tuple(tuple(of_rank) for of_rank in spans)
    grad = torch.is_grad_enabled() and x.requires_grad
    agree(group, "halo", (left, right, hash(spans), x.dtype, (*x.shape[:1], *x.shape[2:]), grad))
    if left < 0 or right < 0:
        raise ValueError(f"{where(group)}: a halo is not negative, got left={left}, right={right}")
    if len(spans) != group.size:
        raise ValueError(f"{where(group)}: spans must list {group.size} ranks, got {len(spans)}")
    mine = sum(span.count for span in spans[group.rank])
    if x.shape[1] != mine:
        raise ValueError(f"{where(group)}: my spans hold {mine} tokens, x has shape {list(x.shape)}")
    plan = _plan(spans, group.rank, left, right)
    result: Tensor = _Halo.apply(x, plan, group)
    return result
