"""Which pieces meet: queries with the keys of their document that they see. Near-linear in pieces and in what meets."""

from dataclasses import dataclass

import numpy as np

from seqpar.sharding.columns import Column, Columns, counted

FAR = 1 << 60
EVERYTHING = (-FAR, FAR)  # the lowest and the highest key - query of a band that has no edge


@dataclass(frozen=True)
class View:
    """What a query sees: earlier tokens only (``causal``), the last ``window`` tokens only, of its own document."""

    causal: bool
    window: int | None

    @property
    def depth(self) -> int:
        """How many tokens up to its own a query sees at most."""
        return FAR if self.window is None else self.window


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
    return begin, _before(keys, last if view.causal else queries.high)


def _viewing_runs(queries: Columns, keys: Columns, view: View) -> Span:
    last = keys.token + keys.count
    latest = np.minimum(keys.high, last + view.depth - 1)
    begin = np.searchsorted(queries.token + queries.count, keys.token if view.causal else keys.low, "right")
    return begin, _before(queries, latest)


def _seen_stripes(queries: Columns, keys: Columns, view: View) -> list[Span]:
    """Pieces stand by the first of their positions, so a window that reaches below 0 goes on from the last piece."""
    step, reach = keys.step, min(view.depth, keys.step)
    short = queries.high - queries.low <= step
    own, oldest = queries.token, queries.token - reach + 1
    whole = ~short if view.causal and reach < step else np.zeros_like(short)
    if not view.causal:
        begin = np.where(short, np.maximum(oldest, queries.low), queries.low)
        return [(_before(keys, begin), _before(keys, queries.high))]
    begin = _before(keys, np.maximum(oldest, queries.low))
    end = _before(keys, np.where(short | whole, own + 1, queries.high))
    begin = np.where(short | whole, begin, _before(keys, queries.low))
    around = np.where(whole, np.maximum(own + 1, oldest + step), queries.high)
    around = np.where(oldest < queries.low, around, queries.high)
    return [(begin, end), (_before(keys, around), _before(keys, queries.high))]


def _viewing_stripes(queries: Columns, keys: Columns, view: View) -> list[Span]:
    step, reach = queries.step, min(view.depth, queries.step)
    short = keys.high - keys.low <= step
    own, latest = keys.token, keys.token + reach
    if not view.causal:
        end = np.where(short, np.minimum(latest, keys.high), keys.high)
        return [(_before(queries, keys.low), _before(queries, end))]
    whole = ~short if reach < step else np.zeros_like(short)
    begin = _before(queries, np.where(short | whole, own, keys.low))
    end = _before(queries, np.where(short | whole, np.minimum(latest, keys.high), keys.high))
    around = np.where(whole, np.minimum(own, latest - step), keys.low)
    return [(begin, end), (_before(queries, keys.low), _before(queries, around))]


# --- what is visible -------------------------------------------------------------------------------------------------


def _met(queries: Columns, keys: Columns, query: Column, key: Column, view: View) -> Meetings:
    """The part of each two pieces where something is visible."""
    assert queries.step == keys.step > 0, "pieces of one document share their step"
    n, m = queries.count[query], keys.count[key]
    ahead, step = queries.first[query] - keys.first[key], queries.step
    high = ahead // step if view.causal else m - 1
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
