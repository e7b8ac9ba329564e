"""Which pieces meet: queries with the keys of their document that they see. Near-linear in pieces and in what meets."""

from dataclasses import dataclass

import numpy as np

from seqpar.sharding.columns import Column, Columns, counted

FAR = 1 << 60
EVERYTHING = (-FAR, FAR)  # the lowest and the highest key - query of a band that has no edge


@dataclass(frozen=True)
class View:
    """What a query sees of its own document: the last ``window`` tokens up to its own, and, unless ``causal``, the
    next ``right``; None: all."""

    causal: bool
    window: int | None
    right: int | None = None

    @property
    def depth(self) -> int:
        """How many tokens up to its own a query sees at most."""
        return FAR if self.window is None else self.window

    @property
    def ahead(self) -> int:
        """How many tokens after its own a query sees at most."""
        return 0 if self.causal else FAR if self.right is None else self.right

    @property
    def near(self) -> bool:
        """Whether a query sees only tokens that are near, to one side at least."""
        return self.window is not None or 0 < self.ahead < FAR


@dataclass(frozen=True, eq=False)
class Meetings:
    """Pieces of queries and of keys, by their numbers, with the rows and keys that meet and the band among them."""

    query: Column
    key: Column
    rows: tuple[Column, Column]
    keys: tuple[Column, Column]
    band: tuple[Column, Column]

    def at(self, index: Column | slice) -> "Meetings":
        """Some of them."""
        sides = (self.rows, self.keys, self.band)
        rows, keys, band = ((first[index], end[index]) for first, end in sides)
        return Meetings(self.query[index], self.key[index], rows, keys, band)

    def corners(self) -> Column:
        """``[meetings, 6]``: first and end row, first and end key, low and high of each."""
        return np.stack([*self.rows, *self.keys, *self.band], 1)


def meetings(queries: Columns, keys: Columns, view: View) -> Meetings:
    """What each query piece sees, query by query; ``keys`` in the order of the sequence."""
    spans = [_seen_runs(queries, keys, view)] if keys.step == 1 else _seen_stripes(queries, keys, view)
    query, key = _pairs(spans)
    return _met(queries, keys, query, key, view)


def viewers(queries: Columns, keys: Columns, view: View) -> Meetings:
    """The same, found from ``keys``: ``queries`` in the order of the sequence."""
    spans = [_viewing_runs(queries, keys, view)] if queries.step == 1 else _viewing_stripes(queries, keys, view)
    key, query = _pairs(spans)
    return _met(queries, keys, query, key, view)


# --- candidates ------------------------------------------------------------------------------------------------------

Span = tuple[Column, Column]  # for each piece, which of the other pieces: from, to


def _pairs(spans: list[Span]) -> tuple[Column, Column]:
    """Every piece with each of its candidates."""
    mine, others = [], []
    for begin, end in spans:
        size = np.maximum(end - begin, 0)
        mine.append(np.repeat(np.arange(len(size)), size))
        others.append(np.repeat(begin, size) + counted(size))
    return np.concatenate(mine), np.concatenate(others)


def _before(pieces: Columns, tokens: Column) -> Column:
    """How many pieces begin before each of ``tokens``."""
    return np.searchsorted(pieces.token, tokens)


def _seen_runs(queries: Columns, keys: Columns, view: View) -> Span:
    first, last = queries.token, queries.token + queries.count
    oldest = np.maximum(queries.low, first - view.depth + 1)
    begin = np.searchsorted(keys.token + keys.count, oldest, "right")
    return begin, _before(keys, np.minimum(queries.high, last + view.ahead))


def _viewing_runs(queries: Columns, keys: Columns, view: View) -> Span:
    last = keys.token + keys.count
    latest = np.minimum(keys.high, last + view.depth - 1)
    earliest = np.maximum(keys.low, keys.token - view.ahead)
    begin = np.searchsorted(queries.token + queries.count, earliest, "right")
    return begin, _before(queries, latest)


def _seen_stripes(queries: Columns, keys: Columns, view: View) -> list[Span]:
    return _around(queries, keys, min(view.depth, keys.step) - 1, min(view.ahead, keys.step))


def _viewing_stripes(queries: Columns, keys: Columns, view: View) -> list[Span]:
    return _around(keys, queries, min(view.ahead, queries.step), min(view.depth, queries.step) - 1)


def _around(mine: Columns, others: Columns, before: int, after: int) -> list[Span]:
    """Stripes that begin up to ``before`` tokens before mine or ``after`` tokens after it. Pieces stand by the first of
    their positions, or the first that somebody sees: what lies beyond one end of these goes on from the other."""
    step, low, high = others.step, mine.low, mine.high
    first, last = mine.token - before, mine.token + after + 1
    long = high - low > step
    every = long & (last - first >= step)
    over, under = long & ~every & (last > low + step), long & ~every & (first < low)
    spans = [
        (low, np.where(over, last - step, low)),
        (np.where(every, low, np.maximum(first, low)), np.where(every, high, np.minimum(last, high))),
        (np.where(under, first + step, high), high),
    ]
    return [(_before(others, from_), _before(others, to)) for from_, to in spans]


# --- what is visible -------------------------------------------------------------------------------------------------


def _met(queries: Columns, keys: Columns, query: Column, key: Column, view: View) -> Meetings:
    """The part of each two pieces where something is visible."""
    assert queries.step == keys.step > 0, "pieces of one document share their step"
    n, m = queries.count[query], keys.count[key]
    ahead, step = queries.first[query] - keys.first[key], queries.step
    high = np.minimum((ahead + view.ahead) // step, m - 1)
    low = 1 - n if view.window is None else -((view.window - 1 - ahead) // step)
    rows = np.maximum(0, -high), np.minimum(n, m - low)
    keys_ = np.maximum(0, rows[0] + low), np.minimum(m, rows[1] + high)
    shift = rows[0] - keys_[0]
    height, width = rows[1] - rows[0], keys_[1] - keys_[0]
    band = (
        np.where(low + shift > 1 - height, low + shift, EVERYTHING[0]),
        np.where(high + shift < width - 1, high + shift, EVERYTHING[1]),
    )
    row, column = queries.row[query], keys.row[key]
    found = Meetings(query, key, _moved(rows, row), _moved(keys_, column), band)
    return found.at(np.flatnonzero((height > 0) & (width > 0) & (low <= high)))


def _moved(ends: tuple[Column, Column], by: Column) -> tuple[Column, Column]:
    return ends[0] + by, ends[1] + by
