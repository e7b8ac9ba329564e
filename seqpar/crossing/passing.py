"""How far rows go round a ring: to the last rank, counted from their own, that still sees them. Integers only."""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from seqpar.crossing.meetings import FAR, View
from seqpar.sharding.columns import Column, Columns, counted
from seqpar.sharding.shard import Run, Shard

FEW = 8  # a document in at most this many pieces is planned by their pairs


class Passing(NamedTuple):
    """Rows ``start`` to ``stop`` of ``source`` are seen ``far`` ranks further on (round the ring), and no further."""

    source: Column
    start: Column
    stop: Column
    far: Column

    def at(self, index: Column) -> "Passing":
        return Passing(*(column[index] for column in self))


def passing(shard: Shard, view: View) -> Passing:
    """All rows that leave their rank, by source and row."""
    return _passing(shard.runs, shard.lengths, view)


@lru_cache(maxsize=8)
def _passing(runs: tuple[tuple[Run, ...], ...], lengths: tuple[int, ...], view: View) -> Passing:
    pieces, size = Shard(lengths, "", runs, None).pieces, len(runs)  # type: ignore[arg-type]
    found = _consecutive(pieces, view, size) if pieces.step == 1 else _stripes(pieces, view)
    found = found.at(np.flatnonzero((found.far > 0) & (found.start < found.stop)))
    return found.at(np.lexsort((found.start, found.source)))


def _stripes(pieces: Columns, view: View) -> Passing:
    """Token ``p`` and what sees it ``d`` tokens later are ``d`` ranks apart."""
    assert pieces.step, "pieces of one document share their step"
    size, depth = pieces.step, view.depth
    last = pieces.token + (pieces.count - 1) * size
    most = min(depth, size) - 1
    first_end = np.where(pieces.count > 0, 1, 0)
    if not view.ahead:  # the last row of a piece has fewer than `size` tokens after it
        far = np.minimum(pieces.high - last, most + 1) - 1
        ends = [(0 * last, pieces.count - 1, np.full_like(last, most)), (pieces.count - 1, pieces.count, far)]
    else:  # all but a document's first token are seen by the one before them, a whole round away
        far = np.where(pieces.first > 0, size - 1, np.minimum(pieces.high - pieces.low, most + 1) - 1)
        ends = [(0 * last, first_end, far), (first_end, pieces.count, np.full_like(last, size - 1))]
    columns = [(pieces.rank, pieces.row + start, pieces.row + stop, far) for start, stop, far in ends]
    return Passing(*(np.concatenate(each) for each in zip(*columns)))


def _consecutive(pieces: Columns, view: View, size: int) -> Passing:
    """Document by document, those that lie in one piece left out; those in few pieces all at once."""
    begins = np.flatnonzero(np.diff(pieces.document, prepend=-1))
    sizes = np.diff(begins, append=len(pieces))
    few = (sizes > 1) & (sizes <= (1 if 0 < view.ahead < FAR else FEW))
    many = (sizes > 1) & ~few
    parts = [
        _pairwise(pieces, begins[few], sizes[few], view, size),
        _one_by_one(pieces, begins[many], sizes[many], view, size),
    ]
    piece, start, stop, far = np.concatenate(parts, 1)
    row = pieces.row[piece] - pieces.first[piece]
    return Passing(pieces.rank[piece], row + start, row + stop, far)


def _pairwise(pieces: Columns, begins: Column, sizes: Column, view: View, size: int) -> Column:
    """Piece, first and end position, how far: of documents in so few pieces that each may be held against each, where
    later tokens are all seen or none."""
    key = np.repeat(begins, sizes) + counted(sizes)
    end = np.repeat(begins + sizes, sizes)
    begin = np.repeat(begins, sizes) if view.ahead else key
    group = np.repeat(np.arange(len(key)), end - begin)
    key, seeing = key[group], begin[group] + counted(end - begin)
    far = np.maximum.accumulate((pieces.rank[seeing] - pieces.rank[key]) % size + group * size) - group * size
    last = pieces.first[key] + pieces.count[key]
    since = np.clip(pieces.first[seeing] - view.depth + 1, pieces.first[key], last)  # seen from this position on
    until = np.where(np.diff(group, append=-1) != 0, last, np.append(since, 0)[1:])
    found = np.flatnonzero((since < until) & (far > 0))
    return np.stack([key, since, until, far])[:, found]


def _one_by_one(pieces: Columns, begins: Column, sizes: Column, view: View, size: int) -> Column:
    """The same of documents in many pieces."""
    found = []
    for begin, end in zip(begins.tolist(), (begins + sizes).tolist()):
        ranks, firsts, counts = (each[begin:end].tolist() for each in (pieces.rank, pieces.first, pieces.count))
        document = _document(ranks, firsts, counts, view, size)
        found += [(begin + place, start, stop, far) for place, start, stop, far in document if far]
    return np.array(found, np.int64).reshape(-1, 4).T


class _Seeing:
    """The ranks that hold some pieces, ascending, each once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._ranks: list[int] = []
        self._pieces: Counter[int] = Counter()

    def add(self, rank: int) -> None:
        self._pieces[rank] += 1
        if self._pieces[rank] == 1:
            insort(self._ranks, rank)

    def remove(self, rank: int) -> None:
        self._pieces[rank] -= 1
        if not self._pieces[rank]:
            self._ranks.pop(bisect_left(self._ranks, rank))

    def far(self, rank: int) -> int:
        """How many ranks further on, round the ring, is the last of them: it is the nearest one before."""
        return (self._ranks[bisect_left(self._ranks, rank) - 1] - rank) % self._size


def _document(
    ranks: list[int], firsts: list[int], counts: list[int], view: View, size: int
) -> Iterator[tuple[int, int, int, int]]:
    """Of each piece of a document, by position: which positions go how far.

    A position is seen by the pieces from the first that still sees it (its own, if causal) to the last that begins
    within the window after it: both only move on from one position to the next.
    """
    seeing, reached, left = _Seeing(size), 0, 0
    blind = [first + count + view.ahead for first, count in zip(firsts, counts)]  # from here on a piece sees nothing
    for place, (rank, first, count) in enumerate(zip(ranks, firsts, counts)):
        position, end = first, first + count
        while position < end:
            while reached < len(ranks) and firsts[reached] < position + view.depth:
                seeing.add(ranks[reached])
                reached += 1
            while blind[left] <= position:
                seeing.remove(ranks[left])
                left += 1
            stop = min(end, blind[left], firsts[reached] - view.depth + 1 if reached < len(ranks) else end)
            yield place, position, stop, seeing.far(rank)
            position = stop
