"""Who needs whose tokens for a convolution over a cut sequence, and where every row lies. Integers only.

Three words: a *segment* is a run of consecutive tokens of one document held by one rank; what its tokens see of other
ranks is *missing*; and a *stretch* is the piece of a document, with zeros beyond its ends, that one local convolution
runs over. Segments whose stretches touch share one, so all stretches together hold every row at most once.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seqpar.ops.kept import kept
from seqpar.sharding.columns import Column, numbers
from seqpar.sharding.shard import Run, Shard

Index = slice | Tensor


def rows_at(x: Tensor, index: Index) -> Tensor:
    """The rows of ``x [b, rows, ...]`` at ``index``."""
    return x[:, index] if isinstance(index, slice) else x.index_select(1, index)


def put_rows(x: Tensor, index: Index, rows: Tensor) -> None:
    """Write ``rows`` to those of ``x`` at ``index``."""
    if isinstance(index, slice):
        x[:, index] = rows
    else:
        x.index_copy_(1, index, rows)


@dataclass(frozen=True)
class Reach:
    """What a token sees of its document: from ``left`` tokens before it to ``right`` tokens after it.

    With ``width`` the document is a grid of so many columns, row after row: a token sees ``left`` columns to the left
    and ``right`` to the right in its own row and in ``rows`` rows above and below. ``beyond``: whether there are zeros
    beyond the ends of documents, for who does not ask how many tokens come before (or which of them are ``outside``).
    """

    left: int
    right: int
    rows: int = 0
    width: int | None = None
    beyond: bool = True

    @property
    def mirrored(self) -> "Reach":
        """Which tokens see me."""
        return Reach(self.right, self.left, self.rows, self.width, self.beyond)

    @property
    def offset(self) -> int:
        """How many rows of a stretch lie before the one whose output comes first."""
        return self.left if self.width is None else self.rows * self.width


@dataclass(frozen=True)
class Moves:
    """Rows ``source`` of one tensor belong in rows ``target`` of another."""

    source: Index
    target: Index


@dataclass(frozen=True)
class Plan:
    """What one rank sends, receives and puts together.

    ``sends[r]``: my rows for rank ``r``; ``receives[r]``: how many come from it. The stretches have ``num_rows`` rows,
    the first of them ``opening``: mine lie at ``mine``, those received (in rank order) as ``arrived`` says, and the
    first ``entering`` are the last rows of the initial state. The final state: its first ``carried`` rows are the last
    of the initial state, the others are mine (``final_mine``) or received (``final_arrived``).
    """

    reach: Reach
    sends: tuple[Tensor, ...]
    receives: tuple[int, ...]
    num_rows: int
    mine: Index
    outputs: Index
    arrived: Moves
    entering: int
    opening: int
    carried: int
    final_mine: Moves
    final_arrived: Moves


@dataclass(frozen=True)
class _Segments:
    """Tokens ``start`` to ``stop`` of the packed sequence, in a document from ``low`` to ``high``; ascending."""

    start: Tensor
    stop: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class _Stretches:
    """Tokens ``begin`` to ``end``; ``first`` and ``last`` are the same without what is beyond the document's ends."""

    begin: Tensor
    end: Tensor
    first: Tensor
    last: Tensor

    def places(self, tokens: Tensor) -> Tensor:
        """The row of each token in all stretches, one after the other; -1 for a token in none."""
        if not len(self.begin):
            return torch.full_like(tokens, -1)
        sizes = self.end - self.begin
        which = torch.searchsorted(self.first, tokens, right=True) - 1
        found = (which >= 0) & (tokens < self.last[which])
        return torch.where(found, (sizes.cumsum(0) - sizes)[which] + tokens - self.begin[which], -1)


@kept()
def plan_of(shard: Shard, reach: Reach, continued: bool, final: bool, device: torch.device) -> Plan:
    """The plan of my rank. ``continued``: an initial state stands before the first document; ``final``: the last
    ``reach.left`` tokens of the last document are wanted on every rank."""
    me = shard.rank
    missing = [_missing(shard, rank, reach, final) for rank in range(shard.size)]
    sends = [_rows_of(shard, me, tokens)[1] for tokens in missing]
    sends[me] = torch.empty(0, dtype=torch.int64)
    found = [missing[me][_rows_of(shard, rank, missing[me])[0]] for rank in range(shard.size)]
    arrived, mine = torch.cat(found), shard.indices_of(me)
    assert len(arrived) == len(missing[me]), "a token that nobody holds"
    stretches = _stretches(_segments(shard, me), reach, continued and shard.lengths[0] > 0)
    places, rows = stretches.places(arrived), stretches.places(mine)
    inside = (places >= 0).nonzero().flatten()
    return Plan(
        reach,
        tuple(index.to(device) for index in sends),
        tuple(len(tokens) for tokens in found),
        int((stretches.end - stretches.begin).sum()),
        _index(rows, device),
        _index(rows - reach.offset, device),
        Moves(_index(inside, device), _index(places[inside], device)),
        _entering(shard, stretches) if continued else 0,
        int((stretches.end - stretches.begin)[:1].sum()),
        _carried(shard, reach.left) if final and continued else 0,
        _final_moves(shard, mine, reach.left if final else 0, device),
        _final_moves(shard, arrived, reach.left if final else 0, device),
    )


def _index(rows: Tensor, device: torch.device) -> Index:
    """Rows as a slice where they follow each other: no index to move, and views instead of copies."""
    if not len(rows):
        return slice(0, 0)
    first, last = int(rows[0]), int(rows[-1])
    if last - first == len(rows) - 1 and bool((rows.diff() == 1).all()):
        return slice(first, last + 1)
    return rows.to(device)


def rows_apart(rows: int, shift: int) -> tuple[slice, slice]:
    """Those of ``rows`` rows that have one ``shift`` rows further on, and those ones."""
    before, after = min(rows, max(0, -shift)), min(rows, max(0, shift))
    return slice(before, rows - after), slice(after, rows - before)


@kept()
def outside(shard: Shard, reach: Reach, continued: bool, device: torch.device) -> tuple[Tensor, ...]:
    """Of each place in a window, from ``reach.left`` rows before to ``reach.right`` after: which rows, of those that
    have one there (:func:`rows_apart`), have one of another stretch. With these, stretches need no zeros between."""
    stretches = _stretches(_segments(shard, shard.rank), reach, continued and shard.lengths[0] > 0)
    sizes = stretches.end - stretches.begin
    begin, found = sizes.cumsum(0) - sizes, []
    for shift in range(-reach.left, reach.right + 1):
        count = sizes.clamp(max=abs(shift))
        row = (begin if shift < 0 else begin + sizes - count).repeat_interleave(count) + _counted(count)
        here, _ = rows_apart(int(sizes.sum()), shift)
        found.append((row[(row >= here.start) & (row < here.stop)] - here.start).to(device))
    return tuple(found)


# --- segments and stretches ------------------------------------------------------------------------------------------


@kept(most=256)
def _segments(shard: Shard, rank: int) -> _Segments:
    offsets = numbers(shard.offsets)
    parts = [_cut(run, offsets) for run in shard.runs[rank]]
    start, stop = np.concatenate([np.empty((2, 0), np.int64), *parts], 1)
    order = start.argsort(kind="stable")
    start, stop = start[order], stop[order]
    document = np.searchsorted(offsets, start, "right") - 1
    edges = (start, stop, offsets[document], offsets[document + 1] if len(start) else start)
    return _Segments(*(torch.from_numpy(each) for each in edges))


def _cut(run: Run, offsets: Column) -> Column:
    """``[2, segments]``: where those of a run start and stop; every token is one where a run takes steps."""
    if run.step > 1:
        tokens = np.arange(run.start, run.stop, run.step)
        return np.stack([tokens, tokens + 1])
    between = offsets[np.searchsorted(offsets, run.start, "right") : np.searchsorted(offsets, run.stop)]
    edges = np.concatenate([[run.start], between, [run.stop]])
    return np.stack([edges[:-1], edges[1:]])[:, edges[1:] > edges[:-1]]


def _counted(numbers: Tensor) -> Tensor:
    """``0, 1, ... number - 1`` for each of ``numbers``, one after the other."""
    before = numbers.cumsum(0) - numbers
    return torch.arange(int(numbers.sum())) - before.repeat_interleave(numbers)


def _stretches(segments: _Segments, reach: Reach, entered: bool) -> _Stretches:
    """What a local convolution runs over: windows of segments, merged where they touch; whole rows of a grid.
    ``entered``: rows of an initial state stand before the first document, whatever is beyond others."""
    low, high, width = segments.low, segments.high, reach.width
    if width is None:
        begin, end = segments.start - reach.left, segments.stop + reach.right
        if not reach.beyond:
            begin, end = torch.maximum(begin, torch.where(low == 0, begin, low) if entered else low), end.minimum(high)
    else:
        begin = low + ((segments.start - low) // width - reach.rows) * width
        end = low + ((segments.stop - 1 - low) // width + 1 + reach.rows) * width
    fresh = torch.ones(len(begin), dtype=torch.bool)
    fresh[1:] = (low[1:] != low[:-1]) | (begin[1:] > end[:-1])
    ending = fresh.roll(-1)
    begin, end, low, high = begin[fresh], end[ending], low[fresh], high[fresh]
    return _Stretches(begin, end, torch.maximum(begin, low), torch.minimum(end, high))


# --- who needs what --------------------------------------------------------------------------------------------------


def _missing(shard: Shard, rank: int, reach: Reach, final: bool) -> Tensor:
    """The tokens that ``rank`` needs and does not hold, ascending, each once."""
    segments = _segments(shard, rank)
    wanted = _wanted(segments, reach)
    if final and shard.lengths:
        stop = shard.offsets[-1]
        wanted.append((torch.tensor([max(stop - reach.left, shard.offsets[-2])]), torch.tensor([stop])))
    starts, stops = (torch.cat(each) for each in zip(*wanted))
    start, stop_ = _subtract(starts, stops, segments.start, segments.stop)
    lengths = stop_ - start
    return start.repeat_interleave(lengths) + _counted(lengths)


def _wanted(segments: _Segments, reach: Reach) -> list[tuple[Tensor, Tensor]]:
    """What the tokens of each segment see, as ranges of tokens: exactly, in every row of a grid."""
    start, stop, low, high, width = segments.start, segments.stop, segments.low, segments.high, reach.width
    if width is None:
        ranges = [(start - reach.left, stop + reach.right)]
    else:
        left = ((start - low) % width).clamp(max=reach.left)
        right = (width - 1 - (stop - 1 - low) % width).clamp(max=reach.right)
        shifts = [row * width for row in range(-reach.rows, reach.rows + 1)]
        ranges = [(start + shift - left, stop + shift + right) for shift in shifts]
    return [tuple(edge.clamp(low, high) for edge in each) for each in ranges]  # type: ignore[misc]


def _subtract(starts: Tensor, stops: Tensor, held_starts: Tensor, held_stops: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens in any of the ranges ``starts`` to ``stops``, but in none of the held ones: disjoint ranges."""
    points, order = torch.cat([starts, stops, held_starts, held_stops]).sort()
    one, none = torch.ones_like, torch.zeros_like
    wanted = torch.cat([one(starts), -one(stops), none(held_starts), none(held_stops)])[order].cumsum(0)
    held = torch.cat([none(starts), none(stops), one(held_starts), -one(held_stops)])[order].cumsum(0)
    left = ((wanted > 0) & (held == 0)).nonzero().flatten()
    return points[left], points[left + 1]


def _rows_of(shard: Shard, rank: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Which of ``tokens`` lie in ``rank``, and the rows of those."""
    rows, row = torch.full_like(tokens, -1), 0
    for run in shard.runs[rank]:
        inside = (tokens >= run.start) & (tokens < run.stop) & ((tokens - run.start) % run.step == 0)
        rows = torch.where(inside, row + (tokens - run.start) // run.step, rows)
        row += len(run)
    return rows >= 0, rows[rows >= 0]


# --- initial and final state -----------------------------------------------------------------------------------------


def _entering(shard: Shard, stretches: _Stretches) -> int:
    """How many rows of the initial state my stretches begin with: those of the first document, if I hold its start."""
    mine = len(stretches.begin) and shard.lengths[0] > 0 and int(stretches.first[0]) == 0
    return max(0, -int(stretches.begin[0])) if mine else 0


def _carried(shard: Shard, depth: int) -> int:
    """How many rows of the initial state are still among the last ``depth`` inputs of the last document."""
    return max(0, depth - sum(shard.lengths)) if len(shard.lengths) <= 1 else 0


def _final_moves(shard: Shard, tokens: Tensor, depth: int, device: torch.device) -> Moves:
    """From ``tokens`` to the last ``depth`` inputs of the last document."""
    stop = shard.num_tokens
    first = max(stop - depth, shard.offsets[-2]) if shard.lengths else stop
    source = (tokens >= first).nonzero().flatten()
    return Moves(_index(source, device), _index(tokens[source] - stop + depth, device))
