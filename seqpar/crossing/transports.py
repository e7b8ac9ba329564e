"""How keys and values reach the queries that see them: by ring or by gathering.

A transport does two things with my block of keys and values (one tensor, ``[b, t, g, k + v]``): ``visits`` yields the
blocks that reach me with the tiles that my queries see in each, and ``gradients`` brings the gradient of my block home.
Both send only rows that somebody sees; what travels where is planned once per shard from integers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.planned import Planned, rows
from seqpar.collectives.ring import Hop, ring, ring_gradients
from seqpar.collectives.rows import Ranges, add_rows, all_rows, count, swap_rows
from seqpar.crossing.meetings import Meetings, View, meetings, viewers
from seqpar.crossing.passing import Passing, passing
from seqpar.crossing.tiles import Tiles, laid
from seqpar.sharding.columns import Column, Columns, counted
from seqpar.sharding.shard import Shard

Visit = Callable[[Tiles, Tensor], Tensor]  # tiles, block -> what my queries add to the gradient of the block


def _merged(group: Column, start: Column, stop: Column) -> tuple[Column, Column, Column]:
    """Ranges by group and start, none of them empty: those of a group that touch as one, and where each begins."""
    apart = group * (int(stop.max(initial=0)) + 1)
    reach = np.maximum.accumulate(stop + apart)
    first = np.flatnonzero(np.append(True, (np.diff(group) > 0) | (start[1:] + apart[1:] > reach[:-1]))[: len(start)])
    last = np.append(first, len(start))[1:] - 1
    return first, start[first], (reach - apart)[last]


def _joined(group: Column, start: Column, stop: Column, groups: int) -> list[Ranges]:
    """The merged ranges of each group."""
    first, start, stop = _merged(group, start, stop)
    ranges = list(zip(start.tolist(), stop.tolist()))
    bounds = np.searchsorted(group[first], np.arange(groups + 1)).tolist()
    return [tuple(ranges[begin:end]) for begin, end in pairwise(bounds)]


def _blocks(met: Meetings, block: Column, blocks: int) -> list[Tiles]:
    """The tiles of each block, by pieces of queries, then by the rows of keys."""
    order = np.lexsort((met.keys[0], met.query, block))
    met, block = met.at(order), block[order]
    bounds = np.searchsorted(block, np.arange(blocks + 1)).tolist()
    return [laid(met.at(slice(begin, end))) if begin < end else () for begin, end in pairwise(bounds)]


# --- ring ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RingPlan:
    """My part in every hop of the ring, and the tiles that my queries see in the rows that reach me."""

    hops: tuple[Hop, ...]
    tiles: tuple[Tiles, ...]


@lru_cache(maxsize=64)
def ring_plan(shard: Shard, view: View) -> RingPlan:
    """What reaches me in a hop are the rows that this rank or a later one sees."""
    size, rank = shard.size, shard.rank
    every = passing(shard, view)
    hop = (rank - every.source) % size
    mine, held = every.at(np.flatnonzero(hop == 0)), every.at(np.flatnonzero((hop > 0) & (every.far >= hop)))
    held, place = _packed(held, (rank - held.source) % size)
    hop = (rank - held.source) % size
    stop = place + held.stop - held.start
    sizes = np.bincount(hop, held.stop - held.start, size).astype(np.int64).tolist()
    further, ends = (np.flatnonzero(chosen) for chosen in (held.far > hop, held.far == hop))
    onward = _joined(hop[further], place[further], stop[further], size)
    ending = _joined(hop[ends], place[ends], stop[ends], size)
    by_far = mine.at(np.lexsort((mine.start, mine.far)))
    returning = _joined(by_far.far, by_far.start, by_far.stop, size)
    (leaving,) = _joined(mine.source * 0, mine.start, mine.stop, 1)
    hops = [Hop(rank, shard.num_local, leaving, (), ())]
    for index in range(1, size):
        hops.append(Hop((rank - index) % size, sizes[index], onward[index], ending[index], returning[index]))
    return RingPlan(tuple(hops), tuple(_ring_tiles(shard, view, held, place)))


def _packed(held: Passing, hop: Column) -> tuple[Passing, Column]:
    """By hop; and where each row lies in its hop when only what is held is kept, one row after the other."""
    order = np.argsort(hop, kind="stable")
    held, hop = held.at(order), hop[order]
    size = held.stop - held.start
    before = np.cumsum(size) - size
    return held, before - before[np.searchsorted(hop, hop)] if len(hop) else before


def _ring_tiles(shard: Shard, view: View, held: Passing, place: Column) -> list[Tiles]:
    pieces, rank, size = shard.pieces, shard.rank, shard.size
    met = meetings(pieces.of(rank), pieces, view)
    hop = (rank - pieces.rank[met.key]) % size
    begins = ((rank - held.source) % size) * (shard.num_tokens + 1) + held.start
    which = np.searchsorted(begins, hop * (shard.num_tokens + 1) + met.keys[0], "right") - 1
    shift = np.where(hop > 0, (place - held.start)[which], 0) if len(begins) else 0 * hop
    moved = Meetings(met.query, met.key, met.rows, (met.keys[0] + shift, met.keys[1] + shift), met.band)
    return _blocks(moved, hop, size)


class Ring:
    """Blocks go round; hops that nobody needs are skipped (arXiv 2105.13120, 2310.01889)."""

    def __init__(self, shard: Shard, group: Group, view: View) -> None:
        self._plan = ring_plan(shard, view)
        self._group = group

    def visits(self, block: Tensor) -> Iterator[tuple[Tiles, Tensor]]:
        return zip(self._plan.tiles, ring(block, self._group, self._plan.hops))

    def gradients(self, block: Tensor, visit: Visit) -> Tensor:
        plan = self._plan
        return ring_gradients(block, self._group, plan.hops, lambda hop, rows: visit(plan.tiles[hop], rows))


# --- all-gather ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GatherPlan:
    """Which of my rows go to whom, how many come from whom, and how the gathered rows are put in order."""

    everything: bool
    sends: tuple[Ranges, ...]
    receives: tuple[int, ...]
    order: Planned | None
    tiles: Tiles


@lru_cache(maxsize=64)
def gather_plan(shard: Shard, view: View) -> GatherPlan:
    """Everyone gets every block if one document and no window couples them all; else each gets the rows it sees."""
    everything = not view.near and sum(length > 0 for length in shard.lengths) <= 1
    pieces, rank, size = shard.pieces, shard.rank, shard.size
    mine = pieces.of(rank)
    if everything:
        all_of_mine: Ranges = ((0, shard.num_local),) if shard.num_local else ()
        sends, keys = [all_of_mine] * size, pieces.at(np.lexsort((pieces.row, pieces.rank)))
    else:
        sends, keys = _sends(pieces, mine, view, size), _wanted(pieces, meetings(mine, pieces, view))
    receives = np.bincount(keys.rank, keys.count, size).astype(np.int64).tolist()
    gathered, order = _in_order(keys)
    met = meetings(mine, gathered, view)
    (tiles,) = _blocks(met, np.zeros(len(met.key), np.int64), 1)
    return GatherPlan(everything, tuple(sends), tuple(receives), order, tiles)


def _sends(pieces: Columns, mine: Columns, view: View, size: int) -> list[Ranges]:
    """My rows that each rank sees."""
    seen = viewers(pieces, mine, view)
    to = pieces.rank[seen.query]
    order = np.lexsort((seen.keys[0], to))
    return _joined(to[order], seen.keys[0][order], seen.keys[1][order], size)


def _wanted(pieces: Columns, met: Meetings) -> Columns:
    """The parts of pieces that are seen, by rank and row."""
    order = np.lexsort((met.keys[0], pieces.rank[met.key]))
    key = met.key[order]
    first, start, stop = _merged(np.cumsum(np.diff(key, prepend=-1) != 0), met.keys[0][order], met.keys[1][order])
    parts = pieces.at(key[first])
    return replace(parts, first=parts.first + (start - parts.row) * parts.step, count=stop - start)


def _in_order(keys: Columns) -> tuple[Columns, Planned | None]:
    """Gathered pieces in the order of the sequence, stripes one after the other; consecutive tokens are joined where
    they touch."""
    row = np.cumsum(keys.count) - keys.count
    order = np.argsort(keys.token, kind="stable")
    keys, row = keys.at(order), row[order]
    come = np.repeat(row, keys.count) + counted(keys.count)
    if keys.step == 1:
        ends = keys.token + keys.count
        fresh = np.append(True, (np.diff(keys.document) > 0) | (keys.token[1:] > ends[:-1]))
        first = np.flatnonzero(fresh[: len(keys)])
        keys = replace(keys.at(first), count=ends[np.append(first, len(keys))[1:] - 1] - keys.token[first])
    placed = replace(keys, row=np.cumsum(keys.count) - keys.count)
    return placed, None if np.array_equal(come, np.arange(len(come))) else rows(come)


class Gather:
    """All blocks at once: LASP-2H (arXiv 2502.07563) and Llama 3 (arXiv 2407.21783); backward gathers again."""

    def __init__(self, shard: Shard, group: Group, view: View) -> None:
        self._group = group
        self._plan = gather_plan(shard, view)
        self._mine = shard.rank

    def _fetch(self, block: Tensor) -> Tensor:
        plan = self._plan
        if plan.everything:
            parts = all_rows(block, plan.receives, self._group).wait()
        else:
            parts = swap_rows(block, plan.sends, plan.receives, self._group).wait()
        gathered = torch.cat(parts, 1)
        return gathered if plan.order is None else gathered[:, plan.order.on(block.device)]

    def visits(self, block: Tensor) -> Iterator[tuple[Tiles, Tensor]]:
        yield self._plan.tiles, self._fetch(block)

    def gradients(self, block: Tensor, visit: Visit) -> Tensor:
        plan = self._plan
        gradient = visit(plan.tiles, self._fetch(block))
        if plan.order is not None:
            gradient = torch.empty_like(gradient).index_copy_(1, plan.order.on(block.device), gradient)
        parts = [part.contiguous() for part in gradient.split(list(plan.receives), 1)]
        if plan.everything:
            return self._group.reduce_scatter(parts).wait()
        shape = gradient.shape
        arriving = [gradient.new_empty((shape[0], count(ranges), *shape[2:])) for ranges in plan.sends]
        home = gradient.new_zeros((shape[0], block.shape[1], *shape[2:]))
        for ranges, part in zip(plan.sends, self._group.all_to_all(parts, arriving).wait()):
            add_rows(home, ranges, part)
        return home
