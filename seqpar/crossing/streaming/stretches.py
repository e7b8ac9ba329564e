"""The stretches of one leg: each is what one rank has of one document, in the order of travel.

The first may go on from a state that another rank sends, the last may leave one that another rank waits for; both are
run on their own. All between them begin and end here, so they are run side by side, those of about the same length at
once: ten thousand documents cost what one of as many tokens costs.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from seqpar.crossing.legs import Leg
from seqpar.crossing.segments import Batches, batches_of
from seqpar.ops.kept import kept
from seqpar.sharding.shard import Shard


@dataclass(frozen=True)
class Stretch:
    """Rows ``start`` to ``stop``, counted along the way, of one ``document``; ``position``: how many of its tokens came
    before."""

    start: int
    stop: int
    document: int = -1
    position: int = 0


@dataclass(frozen=True, eq=False)
class Stretches:
    """Those of a leg: ``first`` goes on from what comes in, ``last`` leaves something, ``inner`` are between.

    One that does both is ``first`` and ``last``. ``rows``: my rows of the leg; ``num_inner``: how many rows the inner
    ones have, from ``inner_start`` on. Side by side they are filled up with zeros (``inner``) or, as a cell may not
    like rows of zeros, with the last row of each (``repeated``).
    """

    rows: tuple[int, int]
    backwards: bool
    first: Stretch | None
    last: Stretch | None
    inner_start: int
    num_inner: int
    inner: Batches | None
    repeated: Batches | None

    @property
    def empty(self) -> bool:
        """Whether I have no rows of the leg: what comes in goes out."""
        return self.rows[0] == self.rows[1]

    def rows_of(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Rows ``[b, stop - start, ...]`` of ``x [b, t, ...]``, counted and ordered along the way."""
        if self.backwards:
            return x[:, self.rows[1] - stop : self.rows[1] - start].flip(1)
        return x[:, self.rows[0] + start : self.rows[0] + stop]

    def put(self, x: Tensor, start: int, stop: int, part: Tensor) -> None:
        """The reverse of :meth:`rows_of`: write ``part`` into ``x``."""
        if self.backwards:
            x[:, self.rows[1] - stop : self.rows[1] - start] = part.flip(1)
        else:
            x[:, self.rows[0] + start : self.rows[0] + stop] = part

    def side_by_side(self, x: Tensor, repeated: bool) -> list[Tensor]:
        """The inner stretches of ``x`` as ``[b * stretches, rows, ...]`` for each batch; short ones repeat their last
        row, or end in zeros."""
        batches = self.repeated if repeated else self.inner
        assert batches is not None
        part = self.rows_of(x, self.inner_start, self.inner_start + self.num_inner)
        return [each.flatten(0, 1) for each in batches.apart(part)]

    def put_side_by_side(self, x: Tensor, parts: list[Tensor]) -> None:
        """The reverse of :meth:`side_by_side`."""
        assert self.inner is not None
        apart = [part.unflatten(0, (-1, shape[0])) for part, shape in zip(parts, self.inner.shapes)]
        self.put(x, self.inner_start, self.inner_start + self.num_inner, self.inner.joined(apart))


@kept()
def stretches_of(shard: Shard, leg: Leg, backwards: bool, leaves: bool, device: torch.device) -> Stretches:
    """The stretches of my rows of ``leg``; ``leaves``: the state after the last one is wanted."""
    count = leg.rows[1] - leg.rows[0]
    bounds = sorted({0, *leg.starts, count})
    edges = list(pairwise(bounds))
    continues = bool(edges) and 0 not in leg.starts
    first = last = None
    if continues:
        first = Stretch(*edges[0], *_place(shard, leg, backwards))
    if leaves and edges:
        last = first if first is not None and len(edges) == 1 else Stretch(*edges[-1])
    inner = edges[int(continues) : len(edges) - int(last is not None and last is not first)]
    start, stop = (inner[0][0], inner[-1][1]) if inner else (0, 0)
    batches = None
    if inner:
        lows, counts = [low - start for low, _ in inner], [high - low for low, high in inner]
        batches = batches_of(lows, counts, [0] * len(inner), device)
    return Stretches(leg.rows, backwards, first, last, start, stop - start, batches, _repeated(batches, stop - start))


def _repeated(batches: Batches | None, total: int) -> Batches | None:
    """The same, filled up with the last row of each."""
    if batches is None or batches.rows is None:
        return batches
    sizes, rows = [number * longest for number, longest in batches.shapes], []
    for part, shape in zip(batches.rows.split(sizes), batches.shapes):
        there = torch.where(part < total, part, -1).view(shape)
        rows.append(there.cummax(1).values.flatten())
    return replace(batches, rows=torch.cat(rows))


def _place(shard: Shard, leg: Leg, backwards: bool) -> tuple[int, int]:
    """Of my first row of ``leg``, along the way: its document, and how many tokens of that came before."""
    row = leg.rows[1] - 1 if backwards else leg.rows[0]
    piece = next(p for p in shard.pieces_of(shard.rank) if p.row <= row < p.row + p.count)
    place = piece.first + row - piece.row
    return piece.document, shard.lengths[piece.document] - 1 - place if backwards else place
