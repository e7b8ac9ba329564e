"""Rows that no window hides: tokens that all of their document sees, or that see all of it, and learned keys.

The few travel, never the many: a token that is seen sends its key and value to the ranks where a window would hide it;
one that sees all sends its query, and gets back what each rank makes of it, to be merged by log-sum-exp.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.first_order import first_order
from seqpar.collectives.planned import Planned, rows
from seqpar.collectives.rows import Range, Ranges, add_rows, count, swap_rows
from seqpar.crossing.meetings import EVERYTHING, Meetings, View
from seqpar.crossing.tiles import Mosaic, Tile, laid
from seqpar.crossing.transports import Gather, GatherPlan, Ring, Visit, joined
from seqpar.sharding.columns import Column, Columns, counted, numbers
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.shard import Shard, holders


@dataclass(frozen=True, eq=False)
class Always:
    """What windows do not hide.

    ``seen``: tokens (places in the packed sequence) that every token of their document sees, if it sees tokens of
    their side at all; ``seeing``: tokens that see every token of their document, likewise (Longformer's global tokens,
    arXiv 2004.05150, are both). ``keys [p, g, k]`` and ``values [p, g, v]``: learned rows that every token sees
    (persistent memory, arXiv 1907.01470); they have no position, so no bias by distance. They are parameters: the same
    on every rank, and a rank's gradient is a part of a sum over ranks.
    """

    seen: tuple[int, ...] = ()
    seeing: tuple[int, ...] = ()
    keys: Tensor | None = field(default=None, repr=False)
    values: Tensor | None = field(default=None, repr=False)

    @property
    def any(self) -> bool:
        """Whether there is anything that windows do not hide."""
        return bool(self.seen or self.seeing) or self.keys is not None

    def check(self, k: Tensor, v: Tensor, shard: Shard) -> None:
        """Raise ``ValueError`` unless it fits the sequence and its keys and values."""
        for name, tokens in (("seen", self.seen), ("seeing", self.seeing)):
            if list(tokens) != sorted(set(tokens)) or not all(0 <= t < shard.num_tokens for t in tokens):
                raise ValueError(
                    f"{name} must be places among {shard.num_tokens} tokens, ascending, got {list(tokens)}"
                )
        if (self.keys is None) != (self.values is None):
            raise ValueError("learned keys need values, and values keys")
        if self.keys is not None and self.values is not None:
            shapes = list(self.keys.shape), list(self.values.shape)
            wanted = [len(self.keys), *k.shape[2:]], [len(self.keys), *v.shape[2:]]
            if shapes != wanted:
                raise ValueError(f"learned keys and values must be {wanted[0]} and {wanted[1]}, got {shapes}")

    def of_heads(self, chosen: Callable[[Tensor], Tensor]) -> "Always":
        """Those of some key/value heads."""
        return replace(
            self,
            keys=None if self.keys is None else chosen(self.keys),
            values=None if self.values is None else chosen(self.values),
        )


# --- plans -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Unhidden:
    """A tile of which is seen what a window hides (``beyond``), or all, by the positions of its rows and keys."""

    tile: Tile | Mosaic
    places: tuple[Planned, Planned]
    view: View
    beyond: bool

    @property
    def rows(self) -> Range:
        return self.tile.rows

    @property
    def keys(self) -> Range:
        return self.tile.keys

    def mask(self, device: torch.device) -> Tensor:
        """``[rows, keys]`` bool: what is visible."""
        mine, keys = (each.on(device)[slice(*of)] for each, of in zip(self.places, (self.rows, self.keys)))
        distance = keys - mine.unsqueeze(1)
        seen = distance <= 0 if self.view.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.beyond:
            seen &= (distance <= -self.view.depth) | (distance > self.view.ahead)
        return seen & self.tile.mask(device) if isinstance(self.tile, Mosaic) else seen


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Some tokens: where they are."""

    token: Column
    document: Column
    position: Column
    rank: Column
    row: Column

    @staticmethod
    def of(shard: Shard, tokens: Sequence[int]) -> "_Chosen":
        token, offsets = np.array(tokens, np.int64), numbers(shard.offsets)
        document = np.searchsorted(offsets, token, "right") - 1
        return _Chosen(token, document, token - offsets[document], *holders(shard, token))

    def at(self, index: Column) -> "_Chosen":
        return _Chosen(*(getattr(self, name)[index] for name in ("token", "document", "position", "rank", "row")))

    def columns(self) -> Columns:
        """As pieces of one token each."""
        one = np.ones_like(self.token)
        low = self.token - self.position
        return Columns(self.rank, self.document, low, low + 1, self.position, one, self.row, 1)


def _meeting(chosen: _Chosen, pieces: Columns, view: View, beyond: bool) -> tuple[Column, Column]:
    """Pairs of chosen tokens and pieces of their documents, by number, where something is visible."""
    begin = np.searchsorted(pieces.document, chosen.document)
    size = np.searchsorted(pieces.document, chosen.document, "right") - begin
    one, piece = np.repeat(np.arange(len(size)), size), np.repeat(begin, size) + counted(size)
    position, first = chosen.position[one], pieces.first[piece]
    last = first + (pieces.count[piece] - 1) * pieces.step
    if beyond:  # pieces of queries, chosen keys
        met = (last >= position + view.depth) | (first < position - view.ahead)
    else:  # chosen queries, pieces of keys
        met = first <= position if view.causal else first == first
    return one[met], piece[met]


@lru_cache(maxsize=64)
def unhidden_plan(shard: Shard, view: View, tokens: tuple[int, ...], beyond: bool) -> GatherPlan:
    """How chosen tokens travel to the ranks where they meet something, and the tiles of what meets there.

    ``beyond``: chosen keys go to queries beyond the window; otherwise chosen queries go to keys.
    """
    chosen, size = _Chosen.of(shard, tokens), shard.size
    mine = chosen.at(np.flatnonzero(chosen.rank == shard.rank))
    one, piece = _meeting(mine, shard.pieces, view, beyond)
    to, row = np.unique(np.stack([shard.pieces.rank[piece], mine.row[one]], 1), axis=0).reshape(-1, 2).T
    own = shard.pieces.of(shard.rank)
    own = own.at(np.lexsort((own.row, own.document)))
    one, _ = _meeting(chosen, own, view, beyond)
    come = chosen.at(np.unique(one))
    arriving = np.lexsort((come.row, come.rank))
    order = np.argsort(arriving)
    receives = np.bincount(come.rank, minlength=size).tolist()
    keys = come.columns()
    places = (shard.planned_positions, rows(come.position))
    tiles = tuple(
        Unhidden(each, places if beyond else places[::-1], view, beyond) for each in _tiles(own, come, beyond)
    )
    return GatherPlan(False, tuple(joined(to, row, row + 1, size)), tuple(receives), rows(order), tiles, keys)


def _tiles(own: Columns, come: _Chosen, beyond: bool) -> tuple[Tile | Mosaic, ...]:
    """My pieces against the tokens of their documents that came."""
    begin, end = (np.searchsorted(come.document, own.document, side) for side in ("left", "right"))
    piece = np.flatnonzero(end > begin)
    spans = (own.row[piece], (own.row + own.count)[piece]), (begin[piece], end[piece])
    mine, others = spans if beyond else spans[::-1]
    band = np.full_like(piece, EVERYTHING[0]), np.full_like(piece, EVERYTHING[1])
    met = Meetings(piece, piece, mine, others, band)
    return laid(met.at(np.lexsort((others[0], mine[0]))))


# --- how they travel -------------------------------------------------------------------------------------------------


class Both:
    """The blocks of a transport, then those of another, as one: each row that is seen, once."""

    def __init__(self, first: Ring | Gather, second: Gather) -> None:
        self._parts = (first, second)
        self.num = first.num + second.num

    def tiles(self, number: int) -> Any:
        first, second = self._parts
        return first.tiles(number) if number < first.num else second.tiles(number - first.num)

    def positions(self, number: int) -> Planned:
        first, second = self._parts
        return first.positions(number) if number < first.num else second.positions(number - first.num)

    def visits(self, block: Tensor) -> Iterator[Tensor]:
        for part in self._parts:
            yield from part.visits(block)

    def gradients(self, block: Tensor, visit: Visit) -> Tensor:
        first, second = self._parts
        home = first.gradients(block, visit)
        return home + second.gradients(block, lambda number, rows: visit(first.num + number, rows))


class Resident:
    """My own block, met by what came: nothing travels."""

    num = 1

    def __init__(self, tiles: Any, places: Planned) -> None:
        self._tiles, self._places = tiles, places

    def tiles(self, number: int) -> Any:
        return self._tiles

    def positions(self, number: int) -> Planned:
        return self._places

    def visits(self, block: Tensor) -> Iterator[Tensor]:
        yield block

    def gradients(self, block: Tensor, visit: Visit) -> Tensor:
        return visit(0, block)


@dataclass(frozen=True)
class Ways:
    """Which of my rows go to each rank, how many come from each; ``back`` says the same of their way back."""

    sends: tuple[Ranges, ...]
    receives: tuple[int, ...]
    num_local: int
    order: Planned
    group: Group

    def there(self, x: Tensor) -> Tensor:
        """The rows that come, by token."""
        parts = swap_rows(x, self.sends, self.receives, self.group).wait()
        return torch.cat(parts, 1)[:, self.order.on(x.device)]

    def back(self, y: Tensor) -> list[Tensor]:
        """Of each rank, what it made of my rows that it got."""
        by_rank = torch.empty_like(y).index_copy_(1, self.order.on(y.device), y)
        leaving = [part.contiguous() for part in by_rank.split(list(self.receives), 1)]
        arriving = [y.new_empty((y.shape[0], count(ranges), *y.shape[2:])) for ranges in self.sends]
        return self.group.all_to_all(leaving, arriving).wait()


@first_order("attention")
class Go(torch.autograd.Function):
    """My chosen rows to where they meet something; the gradients of all copies come home."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ways: Ways, slot: Slot) -> Tensor:
        ctx.ways, ctx.dtype = ways, x.dtype
        return slot.keep(lambda: (ways.there(x),))[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ways, wide = ctx.ways, torch.promote_types(ctx.dtype, torch.float32)
        grad = grads[0].to(wide)
        home = grad.new_zeros((grad.shape[0], ways.num_local, *grad.shape[2:]))
        for ranges, part in zip(ways.sends, ways.back(grad)):
            add_rows(home, ranges, part)
        return home.to(ctx.dtype), None, None


@first_order("attention")
class Return(torch.autograd.Function):
    """What was made of rows that came, back to their ranks: one after the other by rank, then by row."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, ways: Ways, slot: Slot) -> Tensor:
        ctx.ways = ways
        return slot.keep(lambda: (torch.cat(ways.back(y), 1),))[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ways, whole = ctx.ways, grads[0]
        sizes = [count(ranges) for ranges in ways.sends]
        leaving = [part.contiguous() for part in whole.split(sizes, 1)]
        arriving = [whole.new_empty((whole.shape[0], size, *whole.shape[2:])) for size in ways.receives]
        return torch.cat(ways.group.all_to_all(leaving, arriving).wait(), 1)[:, ways.order.on(whole.device)], None, None


def merged(outs: Tensor, lses: Tensor, into: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Parts ``[b, parts, h, v]`` and their log-sum-exps merged, row ``into[i]`` of ``num`` from part i; differentiable.

    Rows without any part are 0, and their log-sum-exp -inf.
    """
    spread = into.view(1, -1, 1).expand_as(lses)
    top = lses.new_full((lses.shape[0], num, lses.shape[2]), torch.finfo(lses.dtype).min)
    top = top.scatter_reduce(1, spread, lses.detach(), "amax")
    weights = (lses - top.gather(1, spread)).exp()
    norm = torch.zeros_like(top).index_add(1, into, weights)
    total = outs.new_zeros((outs.shape[0], num, *outs.shape[2:])).index_add(1, into, weights.unsqueeze(-1) * outs)
    return total / norm.unsqueeze(-1).clamp(min=torch.finfo(norm.dtype).tiny), top + norm.log()
