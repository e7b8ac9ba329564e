"""Bands: which keys of a block a query sees, and how to cut them into rectangles for a fused kernel.

A fused kernel knows two shapes: everything is seen, or the lower triangle of an aligned square is. A band (a causal
edge, a left window, or both, at any offset between queries and keys) is cut into such pieces; only tiles along the
lower edge, where a left window cuts a diagonal, need a mask. The work is that of the band's area, not of the
whole block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

TILE = 256  # tokens; where masks are needed, their tiles are at most this wide


@dataclass(frozen=True)
class Band:
    """The pairs of a block with ``low <= key - query <= high``; ``None`` is unbounded."""

    low: int | None = None
    high: int | None = None

    def within(self, rows: slice, keys: slice) -> "Band":
        """The same band in the coordinates of a rectangle that starts at ``rows.start``, ``keys.start``."""
        shift = keys.start - rows.start
        return Band(
            None if self.low is None else self.low - shift,
            None if self.high is None else self.high - shift,
        )

    def keys_of(self, rows: slice, m: int) -> slice:
        """The smallest run of the ``m`` keys that holds every key the queries ``rows`` see; may be empty."""
        start = 0 if self.low is None else min(m, max(0, rows.start + self.low))
        stop = m if self.high is None else min(m, max(0, rows.stop + self.high))
        return slice(start, max(start, stop))

    def mask(self, n: int, m: int, device: torch.device | None = None) -> Tensor:
        """The band as a boolean matrix ``[n, m]``, True where seen."""
        offset = torch.arange(m, device=device) - torch.arange(n, device=device).unsqueeze(1)
        seen = torch.ones(n, m, dtype=torch.bool, device=device)
        if self.low is not None:
            seen &= offset >= self.low
        if self.high is not None:
            seen &= offset <= self.high
        return seen


@dataclass(frozen=True)
class Rectangle:
    """Some rows and keys of a block, and what is seen among them.

    ``"full"``: all of it. ``"causal"``: the lower triangle with its diagonal, of a square. A :class:`Band`: that band,
    in the coordinates of the rectangle.
    """

    rows: slice
    keys: slice
    mask: Literal["full", "causal"] | Band


def area(n: int, m: int, band: Band) -> int:
    """How many of the ``n * m`` pairs the band sees, in closed form."""
    low = 1 - n if band.low is None else max(band.low, 1 - n)
    high = m - 1 if band.high is None else min(band.high, m - 1)
    if n == 0 or m == 0 or low > high:
        return 0
    return _area_below(n, m, high) - _area_below(n, m, low - 1)


def _area_below(n: int, m: int, high: int) -> int:
    """Pairs with ``key - query <= high``: row i sees ``clamp(i + high + 1, 0, m)`` keys."""

    def seen_up_to(x: int) -> int:
        inside = min(max(x, 0), m)
        return inside * (inside + 1) // 2 + max(x - m, 0) * m

    return seen_up_to(high + n) - seen_up_to(high)


def rectangles(n: int, m: int, band: Band, tile: int = TILE) -> list[Rectangle]:
    """Cut a banded block of ``n`` queries and ``m`` keys into rectangles: each seen pair in exactly one, no other.

    Rows that see no key are in no rectangle. A block that is seen whole is one ``"full"`` rectangle, a causal square
    one ``"causal"``. ``tile`` bounds the side of the masked tiles along the lower edge of a left window.
    """
    low = 1 - n if band.low is None else max(band.low, 1 - n)
    high = m - 1 if band.high is None else min(band.high, m - 1)
    first, last = max(0, -high), min(n, m - low)  # the rows that see a key
    if m == 0 or low > high or first >= last:
        return []
    # The lower edge cuts rows from `lower` on, the upper edge rows before `upper`. Each edge takes in the one row where
    # it only touches the block's corner, so that an aligned square stays whole.
    lower = max(first, -low) if last - 1 + low > 0 else last
    upper = min(last, m - high) if first + high < m - 1 else first
    marks = sorted({first, last, lower, upper})
    pieces: list[Rectangle] = []
    for start, stop in pairwise(marks):
        edges = (low if start >= lower else None, high if start < upper else None)
        pieces += _section(slice(start, stop), m, edges, tile)
    return pieces


def _section(rows: slice, m: int, edges: tuple[int | None, int | None], tile: int) -> Iterator[Rectangle]:
    """The rectangles of rows that the same edges cut: ``edges`` are low and high, ``None`` where it does not cut."""
    low, high = edges
    if low is None:
        yield from _right(rows, 0, m, high)
    elif high is not None and high - low < tile:
        yield from _narrow(rows, low, high, tile)
    else:
        for start in range(rows.start, rows.stop, tile):
            yield from _left(slice(start, min(start + tile, rows.stop)), m, low, high)


def _right(rows: slice, start: int, m: int, high: int | None) -> Iterator[Rectangle]:
    """All keys from ``start`` that ``rows`` see: full up to the upper edge, then a causal square."""
    stop = m if high is None else rows.start + high
    if stop > start:
        yield Rectangle(rows, slice(start, stop), "full")
    if high is not None:
        yield Rectangle(rows, slice(stop, rows.stop + high), "causal")


def _left(rows: slice, m: int, low: int, high: int | None) -> Iterator[Rectangle]:
    """At most a tile of rows that the lower edge cuts: one masked square along the edge, then the rest."""
    body = rows.stop + low
    yield Rectangle(rows, slice(rows.start + low, body), Band(0, None))
    yield from _right(rows, body, m, high)


def _narrow(rows: slice, low: int, high: int, tile: int) -> Iterator[Rectangle]:
    """A band narrower than a tile: masked tiles about as long as the band is wide."""
    step = max(1, tile // 4, high - low + 1)
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        yield Rectangle(slice(start, stop), slice(start + low, stop + high), Band(0, high - low))
