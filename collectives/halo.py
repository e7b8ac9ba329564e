"""The halo: a few neighbouring tokens of my own documents, from whichever ranks hold them.

What short convolutions, token shifts and sliding windows need. It may reach over several ranks (short shards, deep
halos), never into another document, and costs only the rows that are missing here.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from seqpar.collectives.group import Group, where
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
    index: tuple[int, ...]


def _owners(spans: Spans) -> dict[int, list[tuple[int, int, int, int]]]:
    """For each document: (first position, end, rank, row) of every span, by position."""
    owners: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
    for rank, of_rank in enumerate(spans):
        row = 0
        for span in of_rank:
            owners[span.document].append((span.first, span.first + span.count, rank, row))
            row += span.count
    return {document: sorted(held) for document, held in owners.items()}


def _wanted(span: Span, left: int, right: int, held: list[tuple[int, int, int, int]]) -> list[list[tuple[int, Range]]]:
    """Where the tokens on either side of a span lie: (rank, rows) for the left, then for the right."""
    end = span.first + span.count
    sides = []
    for low, high in ((span.first - left, span.first), (end, end + right)):
        found = []
        for first, stop, rank, row in held:
            start, finish = max(low, first), min(high, stop)
            if start < finish:
                found.append((rank, (row + start - first, row + finish - first)))
        sides.append(found)
    return sides


@lru_cache(maxsize=64)
def _plan(spans: Spans, rank: int, left: int, right: int) -> _Plan:
    owners = _owners(spans)
    sends: list[list[Range]] = [[] for _ in spans]
    for other, of_rank in enumerate(spans):
        for span in of_rank:
            for side in _wanted(span, left, right, owners[span.document]):
                sends[other].extend(rows for source, rows in side if source == rank and other != rank)
    receives = [0] * len(spans)
    mine = [(span, _wanted(span, left, right, owners[span.document])) for span in spans[rank]]
    for _, sides in mine:
        for source, (start, stop) in (found for side in sides for found in side):
            receives[source] += stop - start if source != rank else 0
    index = _index(mine, rank, receives, left, right)
    return _Plan(tuple(tuple(ranges) for ranges in sends), tuple(receives), tuple(index))


def _index(
    mine: list[tuple[Span, list[list[tuple[int, Range]]]]], rank: int, receives: list[int], left: int, right: int
) -> list[int]:
    num_rows = sum(span.count for span, _ in mine)
    arrived = [num_rows + sum(receives[:source]) for source in range(len(receives))]
    nothing = num_rows + sum(receives)
    index, row = [], 0
    for span, sides in mine:
        found: list[list[int]] = []
        for side in sides:
            places: list[int] = []
            for source, (start, stop) in side:
                base = start if source == rank else arrived[source]
                places.extend(range(base, base + stop - start))
                arrived[source] += 0 if source == rank else stop - start
            found.append(places)
        before, after = found
        index += [nothing] * (left - len(before)) + before
        index += range(row, row + span.count)
        index += after + [nothing] * (right - len(after))
        row += span.count
    return index


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, group: Group) -> Tensor:
        ctx.plan, ctx.group, ctx.rows, ctx.dtype = plan, group, x.shape[1], x.dtype
        parts = swap_rows(x, plan.sends, plan.receives, group).wait()
        parts[group.rank] = x[:, :0]
        pool = torch.cat([x, *parts, x.new_zeros((x.shape[0], 1, *x.shape[2:]))], 1)
        return pool[:, torch.tensor(plan.index, dtype=torch.int64, device=x.device)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, group, upstream = ctx.plan, ctx.group, grads[0]
        dtype = torch.float64 if ctx.dtype == torch.float64 else torch.float32
        shape = upstream.shape
        rows = ctx.rows + sum(plan.receives) + 1
        pool = torch.zeros((shape[0], rows, *shape[2:]), dtype=dtype, device=upstream.device)
        index = torch.tensor(plan.index, dtype=torch.int64, device=upstream.device)
        pool.index_add_(1, index, upstream.to(dtype))
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
    if left < 0 or right < 0:
        raise ValueError(f"{where(group)}: a halo is not negative, got left={left}, right={right}")
    if len(spans) != group.size:
        raise ValueError(f"{where(group)}: spans must list {group.size} ranks, got {len(spans)}")
    mine = sum(span.count for span in spans[group.rank])
    if x.shape[1] != mine:
        raise ValueError(f"{where(group)}: my spans hold {mine} tokens, x has shape {list(x.shape)}")
    plan = _plan(tuple(tuple(of_rank) for of_rank in spans), group.rank, left, right)
    result: Tensor = _Halo.apply(x, plan, group)
    return result
