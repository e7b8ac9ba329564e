"""Attention to another sequence (an encoder's): each query sees all keys of its document there. Integers only.

The document of a query and that of the keys it sees have the same number. Keys that my queries see come at once, once
each, whatever the layouts of the two sequences.
"""

from functools import lru_cache

import numpy as np

from seqpar.collectives import Group
from seqpar.collectives.planned import rows
from seqpar.crossing.meetings import EVERYTHING, Meetings
from seqpar.crossing.tiles import laid
from seqpar.crossing.transports import Gather, GatherPlan, joined
from seqpar.sharding.columns import Column, Columns, counted
from seqpar.sharding.shard import Shard


class Cross(Gather):
    """Blocks of another sequence, gathered where they are seen."""

    def __init__(self, shard: Shard, keys: Shard, group: Group) -> None:
        self._group, self._plan = group, cross_plan(shard, keys)


def check_cross(shard: Shard, keys: Shard, causal: bool, window: object, who: str) -> None:
    """Raise ``ValueError`` unless two shards are those of two sequences that fit."""
    if causal or window is not None:
        raise ValueError(f"{who}: with key_shard a query sees all of its document there: pass causal=False, no window")
    if (keys.size, keys.rank) != (shard.size, shard.rank):
        raise ValueError(f"{who}: the key_shard was cut for rank {keys.rank} of {keys.size}")
    if len(keys.lengths) != len(shard.lengths):
        raise ValueError(
            f"{who}: the two sequences must have the same number of documents, got {len(shard.lengths)} of queries and "
            f"{len(keys.lengths)} of keys"
        )


@lru_cache(maxsize=64)
def cross_plan(shard: Shard, keys: Shard) -> GatherPlan:
    """What of my keys goes to whom, what comes, in which order, and which of my queries see which of it."""
    queries, pieces, rank, size = shard.pieces, keys.pieces, shard.rank, shard.size
    looking = _pairs(queries)
    sends = _sends(looking, pieces.of(rank), size)
    wanted = _held_by(pieces, np.unique(queries.of(rank).document))
    arriving = wanted.at(np.lexsort((wanted.row, wanted.rank)))
    receives = np.bincount(arriving.rank, arriving.count, size).astype(np.int64).tolist()
    place = np.cumsum(arriving.count) - arriving.count
    by_document = np.argsort(arriving.document, kind="stable")
    count = arriving.count[by_document]
    order = np.repeat(place[by_document], count) + counted(count)
    plain = np.array_equal(order, np.arange(len(order)))
    met = _met(queries.of(rank), arriving.document[by_document], count)
    return GatherPlan(
        False, sends, tuple(receives), None if plain else rows(order), laid(met), arriving.at(by_document)
    )


def _pairs(pieces: Columns) -> tuple[Column, Column]:
    """Document and rank of whoever holds a part of it, each pair once, by document."""
    pairs = np.unique(np.stack([pieces.document, pieces.rank]), axis=1)
    return pairs[0], pairs[1]


def _sends(looking: tuple[Column, Column], mine: Columns, size: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """My rows that each rank's queries see."""
    document, rank = looking
    begin, end = (np.searchsorted(document, mine.document, side) for side in ("left", "right"))
    viewers = end - begin
    piece = np.repeat(np.arange(len(mine)), viewers)
    to = rank[np.repeat(begin, viewers) + counted(viewers)]
    order = np.lexsort((mine.row[piece], to))
    piece, to = piece[order], to[order]
    return tuple(joined(to, mine.row[piece], mine.row[piece] + mine.count[piece], size))


def _held_by(pieces: Columns, documents: Column) -> Columns:
    return pieces.at(np.flatnonzero(np.isin(pieces.document, documents)))


def _met(queries: Columns, documents: Column, counts: Column) -> Meetings:
    """Each piece of my queries with all that came of its document."""
    ends = np.cumsum(counts)
    first, last = (np.searchsorted(documents, queries.document, side) for side in ("left", "right"))
    seen = np.flatnonzero((last > first) & (queries.count > 0))
    begin = (ends - counts)[first[seen]] if len(seen) else first[:0]
    end = ends[last[seen] - 1] if len(seen) else first[:0]
    row = queries.row[seen]
    band = tuple(np.full(len(seen), edge, np.int64) for edge in EVERYTHING)
    return Meetings(seen, seen, (row, row + queries.count[seen]), (begin, end), (band[0], band[1]))
