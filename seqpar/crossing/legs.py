"""The way of a state through a cut sequence: in legs, each from rank to rank. Integers only.

A contiguous layout is one leg, from the first rank to the last. Zigzag is two: up through the first halves of the
shards, and down again through the second. Where a layout would need more (striped: one per token), the tokens are
re-laid instead.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from seqpar.sharding.shard import Run, Shard, part


@dataclass(frozen=True)
class Leg:
    """One sweep over all ranks, and my part in it.

    ``reverse``: from the last rank to the first. ``rows``: my rows. ``starts``: which of those start a document,
    counted from the first that is travelled. For every rank: ``tokens``, and ``resets``: whether a document starts
    there. ``crosses``: for each cut between ranks, whether a document (or a state that enters or leaves the sequence)
    crosses it.
    """

    reverse: bool
    rows: tuple[int, int]
    starts: tuple[int, ...]
    tokens: tuple[int, ...]
    resets: tuple[bool, ...]
    crosses: tuple[bool, ...]
    rank: int

    @property
    def first(self) -> bool:
        """Whether the leg begins at my rank."""
        return self.rank == (len(self.tokens) - 1 if self.reverse else 0)

    @property
    def last(self) -> bool:
        """Whether the leg ends at my rank."""
        return self.rank == (0 if self.reverse else len(self.tokens) - 1)


Legs = tuple[Leg, ...]


@lru_cache(maxsize=64)
def legs_of(shard: Shard, enters: bool = False, leaves: bool = False, backwards: bool = False) -> Legs | None:
    """The legs of a layout in the order of travel, or None if it has more than two.

    ``enters``: a state enters with the first document; ``leaves``: the state after the last document is wanted.
    ``backwards``: from the last token of the sequence to the first, so that "first", "last", "start" mean the reverse.
    """
    sweeps = _sweeps(shard)
    if sweeps is None:
        return None
    legs, row, begins = [], 0, _begins(shard, enters, backwards)
    for reverse, runs in sweeps:
        mine = runs[shard.rank]
        starts = [_starts(run, begins, backwards) for run in runs]
        cuts = [(low.start if reverse else high.start) for low, high in pairwise(runs)]
        ends = (leaves, enters) if backwards else (enters, leaves)
        legs.append(
            Leg(
                reverse != backwards,
                (row, row + len(mine)),
                starts[shard.rank],
                tuple(len(run) for run in runs),
                tuple(bool(found) for found in starts),
                tuple(_crosses(shard, cut, *ends) for cut in cuts),
                shard.rank,
            )
        )
        row += len(mine)
    return tuple(reversed(legs) if backwards else legs)


def _sweeps(shard: Shard) -> list[tuple[bool, list[Run]]] | None:
    """Each leg's direction and runs, one per rank, empty ones in their place."""
    size, tokens = shard.size, shard.num_tokens
    if shard.layout == "zigzag":
        up = [part(rank, 2 * size, tokens) for rank in range(size)]
        down = [part(2 * size - 1 - rank, 2 * size, tokens) for rank in range(size)]
        return [(False, up), (True, down)]
    if shard.layout == "striped" and size > 1:
        return None
    return _one_sweep(shard)


def _one_sweep(shard: Shard) -> list[tuple[bool, list[Run]]] | None:
    """One leg, if every rank follows the one before it."""
    runs, reached = [], 0
    for of_rank in shard.runs:
        start = reached
        for run in of_rank:
            if run.start != reached:
                return None
            reached = run.stop
        runs.append(Run(start, reached))
    return [(False, runs)]


def _begins(shard: Shard, enters: bool, backwards: bool) -> list[int]:
    """The bounds at which documents begin (backwards: their ends), without that of one that continues a given state."""
    bounds = zip(pairwise(shard.offsets), shard.lengths)
    begins = [end if backwards else start for (start, end), length in bounds if length]
    if not (enters and shard.lengths and shard.lengths[-1 if backwards else 0]):
        return begins
    return begins[:-1] if backwards else begins[1:]


def _starts(run: Run, begins: list[int], backwards: bool) -> tuple[int, ...]:
    """Where documents start in ``run``, counted from its first token travelled."""
    if backwards:
        inside = begins[bisect_right(begins, run.start) : bisect_right(begins, run.stop)]
        return tuple(run.stop - end for end in reversed(inside))
    inside = begins[bisect_left(begins, run.start) : bisect_left(begins, run.stop)]
    return tuple(begin - run.start for begin in inside)


def _crosses(shard: Shard, cut: int, at_first: bool, at_last: bool) -> bool:
    """Whether a state is carried over the bound before token ``cut``; ``at_first``, ``at_last``: over the outermost."""
    if cut == 0:
        return at_first and shard.lengths[0] > 0
    if cut == shard.num_tokens:
        return at_last and shard.lengths[-1] > 0
    place = bisect_left(shard.offsets, cut)
    return shard.offsets[place] != cut
