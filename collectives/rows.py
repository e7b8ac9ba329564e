"""Rows that travel: picking some tokens of a tensor, and moving them between ranks.

Tensors are ``[batch, tokens, ...]``; a *range* is a half-open pair of row numbers.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from seqpar.collectives.group import Group, Later, Pending

Range = tuple[int, int]
Ranges = tuple[Range, ...]


def union(ranges: Iterable[Range]) -> Ranges:
    """The rows in any of ``ranges``: ascending, disjoint, never touching.

    >>> union([(4, 6), (0, 2), (2, 3), (5, 9), (7, 7)])
    ((0, 3), (4, 9))
    """
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if start == stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return tuple(merged)


def subtract(ranges: Ranges, taken: Ranges) -> Ranges:
    """The rows of ``ranges`` that are not in ``taken`` (both as :func:`union` gives them).

    >>> subtract(((0, 9),), ((2, 3), (5, 9)))
    ((0, 2), (3, 5))
    """
    left: list[Range] = []
    for start, stop in ranges:
        place = bisect_right(taken, start, key=_stop)
        while place < len(taken) and taken[place][0] < stop:
            if start < taken[place][0]:
                left.append((start, taken[place][0]))
            start, place = taken[place][1], place + 1
        if start < stop:
            left.append((start, stop))
    return tuple(left)


def _stop(span: Range) -> int:
    return span[1]


def count(ranges: Ranges) -> int:
    """How many rows."""
    return sum(stop - start for start, stop in ranges)


def within(ranges: Ranges, held: Ranges) -> Ranges:
    """Where ``ranges`` lie when only the rows of ``held`` are kept, one after the other.

    >>> within(((2, 3), (6, 8)), ((2, 4), (6, 9)))
    ((0, 1), (2, 4))
    """
    before = (0, *accumulate(stop - start for start, stop in held))
    placed = []
    for start, stop in ranges:
        place = bisect_right(held, start, key=_stop)
        assert place < len(held) and held[place][0] <= start and stop <= held[place][1], "rows that are not held"
        placed.append((before[place] + start - held[place][0], before[place] + stop - held[place][0]))
    return union(placed)


def pick(x: Tensor, ranges: Ranges, dim: int = 1) -> Tensor:
    """The rows of ``ranges`` along ``dim``: a view if it is one range."""
    if len(ranges) == 1:
        return x.narrow(dim, ranges[0][0], ranges[0][1] - ranges[0][0])
    if not ranges:
        return x.narrow(dim, 0, 0)
    return torch.cat([x.narrow(dim, start, stop - start) for start, stop in ranges], dim)


def add_rows(total: Tensor, ranges: Ranges, rows: Tensor, dim: int = 1) -> None:
    """Add ``rows`` to ``total`` in place, where ``ranges`` say."""
    row = 0
    for start, stop in ranges:
        total.narrow(dim, start, stop - start).add_(rows.narrow(dim, row, stop - start))
        row += stop - start


def swap_rows(x: Tensor, sends: Sequence[Ranges], receives: Sequence[int], group: Group) -> Pending[list[Tensor]]:
    """Send rows ``sends[r]`` of ``x`` to each rank ``r``, get ``receives[r]`` rows from it; no rows, no message."""
    leaving = [pick(x, ranges).contiguous() for ranges in sends]
    arriving = [x.new_empty((x.shape[0], rows, *x.shape[2:])) for rows in receives]
    return group.all_to_all(leaving, arriving)


def all_rows(x: Tensor, receives: Sequence[int], group: Group) -> Pending[list[Tensor]]:
    """Every rank's whole ``x``; ``receives[r]`` is the number of rows of rank ``r``."""
    pending = group.all_gather(x.contiguous(), [(x.shape[0], rows, *x.shape[2:]) for rows in receives])
    return Later(pending.wait)
