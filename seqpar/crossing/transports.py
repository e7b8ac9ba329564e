"""How keys and values reach the queries that see them: by ring or by gathering.

A transport does two things with my block of keys and values (one tensor, ``[b, t, g, k + v]``): ``visits`` yields the
blocks that reach me with the tiles that my queries see in each, and ``gradients`` brings the gradient of my block home.
Both send only rows that somebody sees; what travels where is planned once per shard from integers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.ring import Hop, ring, ring_gradients
from seqpar.collectives.rows import Ranges, add_rows, all_rows, count, subtract, swap_rows, union, within
from seqpar.crossing.tiles import Mosaic, Tile, mosaics, needed_keys, tiles
from seqpar.sharding.shard import Piece, Shard

Tiles = tuple[Tile | Mosaic, ...]
Visit = Callable[[Tiles, Tensor], Tensor]  # tiles, block -> what my queries add to the gradient of the block


@dataclass(frozen=True)
class View:
    """What a query sees: earlier tokens only (``causal``), the last ``window`` tokens only, of its own document."""

    causal: bool
    window: int | None


# --- ring ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def ring_plan(shard: Shard, view: View) -> tuple[tuple[Hop, Tiles], ...]:
    """My part in every hop of the ring, and the tiles that my queries see in the rows that reach me."""
    size, rank = shard.size, shard.rank
    reach = {source: _reach(shard, source, view) for source in range(size)}
    plan = []
    for index in range(size):
        source = (rank - index) % size
        held = reach[source][index]
        onward = reach[source][index + 1]
        coming = subtract(reach[rank][index], reach[rank][index + 1])
        seen = [_keys_within(tile, held) for tile in _seen(shard, rank, source, view)]
        hop = Hop(
            source,
            count(held),
            within(onward, held),
            within(subtract(held, onward), held) if index else (),
            coming if index else (),
        )
        plan.append((hop, mosaics(seen)))
    return tuple(plan)


def _seen(shard: Shard, rank: int, source: int, view: View) -> list[Tile]:
    return tiles(shard.pieces_of(rank), shard.pieces_of(source), view.causal, view.window)


def _reach(shard: Shard, source: int, view: View) -> list[Ranges]:
    """Which rows of ``source`` arrive at each hop: those that this rank or a later one needs; in the end none."""
    rows = shard.num_of(source)
    reach: list[Ranges] = [()]
    for index in range(shard.size - 1, 0, -1):
        needed = needed_keys(_seen(shard, (source + index) % shard.size, source, view))
        reach.append(union([*needed, *reach[-1]]))
    reach.append(((0, rows),) if rows else ())
    return reach[::-1]


def _keys_within(tile: Tile, held: Ranges) -> Tile:
    """The tile in the rows that were kept."""
    return replace(tile, keys=within((tile.keys,), held)[0])


class Ring:
    """Blocks go round; hops that nobody needs are skipped (arXiv 2105.13120, 2310.01889)."""

    def __init__(self, shard: Shard, group: Group, view: View) -> None:
        plan = ring_plan(shard, view)
        self._group = group
        self._hops = [hop for hop, _ in plan]
        self._tiles = [seen for _, seen in plan]

    def visits(self, block: Tensor) -> Iterator[tuple[Tiles, Tensor]]:
        return zip(self._tiles, ring(block, self._group, self._hops))

    def gradients(self, block: Tensor, visit: Visit) -> Tensor:
        return ring_gradients(block, self._group, self._hops, lambda hop, rows: visit(self._tiles[hop], rows))


# --- all-gather ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GatherPlan:
    """Which of my rows go to whom, how many come from whom, and how the gathered rows are put in order."""

    everything: bool
    sends: tuple[Ranges, ...]
    receives: tuple[int, ...]
    order: tuple[int, ...] | None
    tiles: Tiles


@lru_cache(maxsize=64)
def gather_plan(shard: Shard, view: View) -> GatherPlan:
    """Everyone gets every block if one document and no window couples them all; else each gets the rows it sees."""
    ranks = range(shard.size)
    everything = view.window is None and sum(length > 0 for length in shard.lengths) <= 1
    all_of = [union([(0, shard.num_of(rank))]) for rank in ranks]
    mine = shard.rank
    if everything:
        sends, wanted = [all_of[mine]] * shard.size, all_of
    else:
        sends = [needed_keys(_seen(shard, rank, mine, view)) for rank in ranks]
        wanted = [needed_keys(_seen(shard, mine, source, view)) for source in ranks]
    keys = _gathered(shard, wanted)
    order = None
    if all(piece.step == 1 for piece in keys):
        keys, order = _in_order(keys)
    seen = tiles(shard.pieces_of(mine), keys, view.causal, view.window)
    return GatherPlan(everything, tuple(sends), tuple(count(rows) for rows in wanted), order, mosaics(seen))


def _gathered(shard: Shard, wanted: list[Ranges]) -> list[Piece]:
    """The pieces of the rows ``wanted[source]`` of every source, one source after the other."""
    pieces, row = [], 0
    for source, ranges in enumerate(wanted):
        for piece in shard.pieces_of(source):
            for start, stop in ranges:
                first, end = max(start, piece.row), min(stop, piece.row + piece.count)
                if first < end:
                    position = piece.first + (first - piece.row) * piece.step
                    pieces.append(Piece(piece.document, position, end - first, piece.step, row))
                    row += end - first
    return pieces


def _in_order(keys: list[Piece]) -> tuple[list[Piece], tuple[int, ...] | None]:
    """Put gathered pieces in the order of the sequence and join those that touch."""
    rows: list[int] = []
    joined: list[Piece] = []
    for piece in sorted(keys, key=lambda piece: (piece.document, piece.first)):
        last = joined[-1] if joined else None
        if last and last.document == piece.document and last.first + last.count == piece.first:
            joined[-1] = replace(last, count=last.count + piece.count)
        else:
            joined.append(replace(piece, row=len(rows)))
        rows.extend(range(piece.row, piece.row + piece.count))
    return joined, None if rows == list(range(len(rows))) else tuple(rows)


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
        return gathered if plan.order is None else gathered[:, torch.tensor(plan.order, device=block.device)]

    def visits(self, block: Tensor) -> Iterator[tuple[Tiles, Tensor]]:
        yield self._plan.tiles, self._fetch(block)

    def gradients(self, block: Tensor, visit: Visit) -> Tensor:
        plan = self._plan
        gradient = visit(plan.tiles, self._fetch(block))
        if plan.order is not None:
            order = torch.tensor(plan.order, device=block.device)
            gradient = torch.empty_like(gradient).index_copy_(1, order, gradient)
        parts = [part.contiguous() for part in gradient.split(list(plan.receives), 1)]
        if plan.everything:
            return self._group.reduce_scatter(parts).wait()
        shape = gradient.shape
        arriving = [gradient.new_empty((shape[0], count(ranges), *shape[2:])) for ranges in plan.sends]
        home = gradient.new_zeros((shape[0], block.shape[1], *shape[2:]))
        for ranges, part in zip(plan.sends, self._group.all_to_all(parts, arriving).wait()):
            add_rows(home, ranges, part)
        return home
