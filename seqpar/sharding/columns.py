"""The pieces of all ranks as columns of integers: who holds which tokens of a document, without a walk over ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Columns:
    """Pieces by their places in the sequence, ascending: each ``count`` tokens from position ``first`` of its document
    (tokens ``low`` to ``high`` of the sequence) on, every ``step``-th, in ``rank`` from its ``row`` on."""

    rank: Column
    document: Column
    low: Column
    high: Column
    first: Column
    count: Column
    row: Column
    step: int

    def __len__(self) -> int:
        return len(self.rank)

    @property
    def token(self) -> Column:
        """Where each piece begins in the sequence."""
        return self.low + self.first

    def at(self, index: Column) -> "Columns":
        """Some of the pieces."""
        rank, document, low, high, first, count, row = (
            column[index]
            for column in (self.rank, self.document, self.low, self.high, self.first, self.count, self.row)
        )
        return Columns(rank, document, low, high, first, count, row, self.step)

    def of(self, rank: int) -> "Columns":
        """Those of ``rank``, in the order of its rows."""
        mine = np.flatnonzero(self.rank == rank)
        return self.at(mine[np.argsort(self.row[mine], kind="stable")])


def numbers(values: Sequence[int] | chain[int]) -> Column:
    """A column."""
    return np.fromiter(values, np.int64)


def counted(sizes: Column) -> Column:
    """``0, 1, ... size - 1`` for each of ``sizes``, one after the other."""
    return np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def consecutive(bounds: Sequence[tuple[int, int, int]], offsets: Sequence[int]) -> Columns:
    """The pieces of runs ``(start, stop, rank)`` of consecutive tokens, listed in the order of each rank's rows; they
    hold every token once. ``offsets``: where the documents start, and the end of the last."""
    table = np.array(bounds, np.int64).reshape(-1, 3)
    start, size = table[:, 0], table[:, 1] - table[:, 0]
    row = np.cumsum(size) - size
    rank, first = np.unique(table[:, 2], return_index=True)
    row = row - row[first][np.searchsorted(rank, table[:, 2])]
    order = np.argsort(start, kind="stable")
    begins, documents = start[order], numbers(offsets)
    cuts = np.unique(np.concatenate([begins, documents]))
    cuts = cuts[cuts < documents[-1]]
    count = np.diff(cuts, append=documents[-1])
    run = order[np.searchsorted(begins, cuts, "right") - 1]
    document = np.searchsorted(documents, cuts, "right") - 1
    low, high = documents[document], documents[document + 1] if len(document) else documents[:0]
    return Columns(table[run, 2], document, low, high, cuts - low, count, row[run] + cuts - start[run], 1)


def striped(size: int, offsets: Sequence[int]) -> Columns:
    """The pieces of every ``size``-th token to each rank in turn."""
    documents = numbers(offsets)
    lengths = np.diff(documents)
    held = np.minimum(lengths, size)
    document, first = np.repeat(np.arange(len(lengths)), held), counted(held)
    low, high = documents[:-1][document], documents[1:][document]
    token = low + first
    count = (high - token + size - 1) // size
    return Columns(token % size, document, low, high, first, count, token // size, size)


def listed(pieces: Sequence[Sequence[Any]], offsets: Sequence[int]) -> Columns:
    """The pieces of each rank as they are listed; of no one step."""
    table = [(r, p.document, p.first, p.count, p.row) for r, of_rank in enumerate(pieces) for p in of_rank]
    rank, document, first, count, row = np.array(table, np.int64).reshape(-1, 5).T
    documents = numbers(offsets)
    low, high = documents[document], documents[document + 1] if len(document) else documents[:0]
    return Columns(rank, document, low, high, first, count, row, 0).at(np.lexsort((first, document)))
