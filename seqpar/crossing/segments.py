"""Runs of rows of any lengths, worked on in a few batches of about the same length: what documents cost then depends on
their tokens, not on how many they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SPREAD = 4 / 3  # how much longer the longest of a batch may be than the shortest


@dataclass(frozen=True, eq=False)
class Batches:
    """Segments in batches: ``shapes``, how many segments a batch has, and how many rows each, filled up; ``kinds`` of
    segments of each batch.

    ``rows``: the row at each place of all batches, ``t`` where there is none; None: the rows as they are.
    ``places [t]``: the reverse. ``order [segments]``: which segment each one of the batches is.
    """

    shapes: tuple[tuple[int, int], ...]
    kinds: tuple[int, ...]
    rows: Tensor | None
    places: Tensor | None
    order: Tensor

    def apart(self, x: Tensor, fill: float = 0.0) -> list[Tensor]:
        """``x [b, t, ...]`` as ``[b, segments, rows, ...]`` for each batch, ``fill`` where there is no row."""
        x = x if self.rows is None else _Moved.apply(x, self.rows, self.places, fill)
        parts = x.split([segments * longest for segments, longest in self.shapes], 1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes)]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """What :meth:`apart` took apart."""
        flat = [part.flatten(1, 2) for part in parts]
        whole = flat[0] if len(flat) == 1 else torch.cat(flat, 1)
        moved: Tensor = whole if self.places is None else _Moved.apply(whole, self.places, self.rows, None)
        return moved


class _Moved(torch.autograd.Function):
    """Rows of ``x [b, t, ...]`` by their numbers, ``fill`` for row ``t``. Each is taken once, so that the way back is a
    look-up as well, which costs a fifth of adding them up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, back: Tensor, fill: float | None) -> Tensor:
        ctx.rows, ctx.back, ctx.fill_back = rows, back, 0.0 if fill is None else None
        if fill is not None:
            x = torch.cat([x, x.new_full((x.shape[0], 1, *x.shape[2:]), fill)], 1)
        return x.index_select(1, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Moved.apply(grads[0], ctx.back, ctx.rows, ctx.fill_back), None, None, None


def batches_of(starts: Sequence[int], counts: Sequence[int], kinds: Sequence[int], device: torch.device) -> Batches:
    """Batches of segments that hold all rows ``0 .. t - 1``: ``counts`` (at least 1) from ``starts`` on; those of other
    ``kinds`` (0, 1, ...) are in other batches, whose order is that of kinds."""
    begin, count, kind = (torch.tensor(each, dtype=torch.int64) for each in (starts, counts, kinds))
    total = int(count.sum())
    order = (kind * (total + 1) + count).argsort(stable=True)
    begin, count, kind = begin[order], count[order], kind[order]
    shapes, rows, done = [], [], 0
    for number in _numbers(count.tolist(), kind.tolist()):
        batch = slice(done, done + number)
        place = torch.arange(int(count[batch][-1]))
        rows.append(torch.where(place < count[batch, None], begin[batch, None] + place, total).flatten())
        shapes.append((number, len(place)))
        done += number
    of_batches = tuple(kind[torch.tensor([number for number, _ in shapes], dtype=torch.int64).cumsum(0) - 1].tolist())
    places = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
    if torch.equal(places, torch.arange(total)):
        return Batches(tuple(shapes), of_batches, None, None, order.to(device))
    there = (places < total).nonzero().flatten()
    back = torch.empty(total, dtype=torch.int64)
    back[places[there]] = there
    return Batches(tuple(shapes), of_batches, places.to(device), back.to(device), order.to(device))


def _numbers(counts: Sequence[int], kinds: Sequence[int]) -> list[int]:
    """How many of the segments, which ascend, are in each batch."""
    numbers: list[int] = []
    shortest, of = 0, -1
    for count, kind in zip(counts, kinds):
        if kind != of or count > SPREAD * shortest:
            shortest, of = count, kind
            numbers.append(0)
        numbers[-1] += 1
    return numbers
