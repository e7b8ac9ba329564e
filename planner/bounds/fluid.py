"""The fluid relaxation of a whole step: documents may be cut and spread, and groups be fractions.

A box says how long so many micro-batches last, from ``low`` to ``high`` seconds; or, with one box for each of many
ranges of seconds, the program itself says how many last how long. Inside a box a group of a kind lasts
as long as its micro-batch, so its documents must fit in its seconds and its tokens at once, and documents that no
deadline of the box lets finish are kept out (Lenstra, Shmoys, Tardos). The smallest sum of seconds is below that of
every plan whose micro-batches lie in the boxes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from seqpar.planner.bounds.lp import INFINITY, LinearProgram
from seqpar.planner.problem.costs import Floats, Ints, Table

_ALONE = 48  # the longest documents are rows of their own; the others are put together with those of like length
_ALIKE = 1.25  # in tokens
_AS_DEAR = 1.04  # in device-seconds a token
_SHARES = (1, 2, 3)
_RANGES = 8


@dataclass(frozen=True)
class Box:
    """``count`` micro-batches that last between ``low`` and ``high`` seconds, fixed costs included."""

    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Relaxed:
    """A bound below all steps of so many micro-batches, and how long each of them would last, from long to short."""

    seconds: float
    micro_batches: int
    lasting: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Classes:
    """Documents of like length. Rates are the smallest seconds per token in the class, so nothing is overestimated."""

    tokens: Floats
    rate: Floats
    fewest_seconds: Floats
    shortest: Floats
    longest: Floats


def classes(table: Table) -> Classes:
    """The documents of a table by classes: the longest alone, the others with those at most a quarter shorter."""
    tokens = table.tokens.astype(np.float64)
    price = table.area.min(axis=1) / tokens
    starts = [0]
    for row in range(1, len(tokens)):
        first = tokens[starts[-1]]
        unlike = tokens[row] * _ALIKE < first or price[row] * _AS_DEAR < price[starts[-1]]
        if tokens[row] != first and (row < _ALONE or unlike):
            starts.append(row)
    at = np.asarray(starts)
    ends = np.append(at[1:], len(tokens))
    return Classes(
        tokens=np.add.reduceat(tokens, at),
        rate=np.minimum.reduceat(table.seconds / tokens[:, None], at, axis=0),
        fewest_seconds=np.minimum.reduceat(table.seconds, at, axis=0),
        shortest=tokens[ends - 1],
        longest=tokens[at],
    )


def fluid_seconds(table: Table, documents: Classes, boxes: Sequence[Box]) -> float:
    """A lower bound of the step over all plans whose micro-batches lie in these boxes; infinite if there is none."""
    program = LinearProgram()
    counts = [int(program.columns(1, 0.0, box.count, box.count)[0]) for box in boxes]
    if not _fill(program, table, documents, boxes, counts):
        return INFINITY
    return program.solve()


def relaxed_step(table: Table, documents: Classes, micro_batches: int, step_seconds: float) -> Relaxed:
    """The same over all plans of exactly so many micro-batches that are shorter than ``step_seconds``."""
    fixed = float(table.fixed.min())
    longest = step_seconds - (micro_batches - 1) * fixed
    slowest = float((table.seconds + table.fixed).min(axis=1).max()) * (1 - 1e-9)
    if longest <= max(fixed, slowest):
        return Relaxed(INFINITY, micro_batches, ())
    edges = _edges(fixed, slowest, longest)
    program = LinearProgram()
    counts = program.columns(_RANGES)
    boxes = [Box(low, high, micro_batches) for low, high in pairwise(edges.tolist())]
    program.row(micro_batches, micro_batches, (counts, 1.0))
    if not _fill(program, table, documents, boxes, counts.tolist()):
        return Relaxed(INFINITY, micro_batches, ())
    cost = program.solve()
    lasting: tuple[float, ...] = ()
    if program.solution is not None:
        found, seconds = program.solution[: 2 * _RANGES].reshape(2, _RANGES)[:, ::-1]
        lasting = _whole(found, seconds, micro_batches)
    return Relaxed(cost, micro_batches, lasting)


def _edges(low: float, middle: float, high: float) -> Floats:
    """Ranges of seconds in like proportions; one starts at those that the slowest document takes at least."""
    share = np.log(max(middle, low) / low) / np.log(high / low)
    below = int(np.clip(round(_RANGES * share), 1, _RANGES - 1))
    if middle <= low * (1 + 1e-6):
        return np.geomspace(low, high, _RANGES + 1)
    return np.concatenate([np.geomspace(low, middle, below + 1)[:-1], np.geomspace(middle, high, _RANGES - below + 1)])


def _whole(counts: Floats, seconds: Floats, micro_batches: int) -> tuple[float, ...]:
    """Fractions of micro-batches, with their seconds, put together to whole ones."""
    ends, total = np.concatenate([[0.0], np.cumsum(counts)]), np.concatenate([[0.0], np.cumsum(seconds)])
    return tuple(np.diff(np.interp(np.arange(micro_batches + 1), ends, total)).tolist())


def _fill(
    program: LinearProgram, table: Table, documents: Classes, boxes: Sequence[Box], counts: Sequence[int]
) -> bool:
    """Add boxes to a program that has a variable for the number of micro-batches in each; False if a document fits
    none of them."""
    seconds = program.columns(len(boxes), 1.0)
    members: list[list[int]] = [[] for _ in documents.tokens]
    for box, count, lasts in zip(boxes, counts, seconds.tolist()):
        mine: dict[int, list[int]] = {}
        for fits, columns in _add_box(program, table, documents, box, (count, lasts)):
            for document, column in zip(fits.tolist(), columns.tolist()):
                mine.setdefault(document, []).append(column)
        for document, parts in mine.items():
            members[document].extend(parts)
            if documents.tokens[document] == documents.longest[document]:  # one document is in one micro-batch
                share = table.capacity / float(documents.tokens[document])
                program.row(-INFINITY, 0.0, (np.asarray(parts), share), (count, -1.0))
    for tokens, placed in zip(documents.tokens, members):
        if not placed:
            return False
        share = tokens / table.capacity
        program.row(share, share, (np.asarray(placed), 1.0))
    return True


def _add_box(
    program: LinearProgram, table: Table, documents: Classes, box: Box, variables: tuple[int, int]
) -> list[tuple[Ints, Ints]]:
    """The variables and rows of one box, whose number and seconds of micro-batches are variables already; returns, for
    each kind, the classes it can take and their variables."""
    count, seconds = variables
    program.row(0.0, INFINITY, (seconds, 1.0), (count, -box.low))
    program.row(-INFINITY, 0.0, (seconds, 1.0), (count, -box.high))
    groups = program.columns(len(table.degrees))
    lasting = program.columns(len(table.degrees))  # groups times their seconds
    degrees = table.degrees.astype(np.float64)
    all_devices = float(table.devices)
    program.row(-INFINITY, 0.0, (groups, degrees), (count, -all_devices))
    # Idle devices last as long as their micro-batches, too.
    for limit, low, high in ((box.low, 0.0, INFINITY), (box.high, -INFINITY, 0.0)):
        idle = ((seconds, all_devices), (count, -limit * all_devices), (lasting, -degrees), (groups, limit * degrees))
        program.row(low, high, *idle)
    return [
        _add_kind(program, table, documents, box, kind, (int(groups[kind]), int(lasting[kind])))
        for kind in range(len(degrees))
    ]


def _add_kind(
    program: LinearProgram, table: Table, documents: Classes, box: Box, kind: int, variables: tuple[int, int]
) -> tuple[Ints, Ints]:
    groups, lasting = variables
    degree, room = float(table.degrees[kind]), box.high - float(table.fixed[kind])
    fits = np.flatnonzero(documents.fewest_seconds[:, kind] <= room)
    if not len(fits):
        program.row(0.0, 0.0, (groups, 1.0))
        return fits, fits
    columns = program.columns(len(fits))  # tokens of each class, in units of a device's capacity
    program.row(0.0, INFINITY, (lasting, 1.0), (groups, -box.low))
    program.row(-INFINITY, 0.0, (lasting, 1.0), (groups, -box.high))
    rate = documents.rate[fits, kind] * table.capacity
    program.row(-INFINITY, 0.0, (columns, rate), (groups, float(table.fixed[kind])), (lasting, -1.0))
    program.row(-INFINITY, 0.0, (columns, 1.0), (groups, -degree))
    whole = table.capacity / documents.longest[fits]
    by_tokens = documents.shortest[fits] / (degree * table.capacity)
    by_seconds = documents.fewest_seconds[fits, kind] / max(room, 1e-12)
    for share in (by_tokens, by_seconds):
        for most in _SHARES:  # at most so many documents above 1 / (most + 1) of a group go into it
            large = np.flatnonzero(share > 1 / (most + 1) * (1 + 1e-9))
            if len(large):
                program.row(-INFINITY, 0.0, (columns[large], whole[large]), (groups, -float(most)))
    return fits, columns
