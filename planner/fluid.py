"""The fluid relaxation of a whole step: documents may be cut and spread, and groups be fractions.

A box says how long so many micro-batches last, from ``low`` to ``high`` seconds. Inside a box a group of a kind lasts
as long as its micro-batch, so its documents must fit in its seconds and its tokens at once, and documents that no
deadline of the box lets finish are kept out (Lenstra, Shmoys, Tardos). The smallest sum of seconds is below that of
every plan whose micro-batches lie in the boxes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.costs import Floats, Ints, Table
from planner.lp import INFINITY, LinearProgram

_ALONE = 48  # the longest documents are rows of their own; the others are put together with those of like length
_ALIKE = 1.25
_SHARES = (1, 2, 3)


@dataclass(frozen=True)
class Box:
    """``count`` micro-batches that last between ``low`` and ``high`` seconds, fixed costs included."""

    low: float
    high: float
    count: int


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
    starts = [0]
    for row in range(1, len(tokens)):
        first = tokens[starts[-1]]
        if tokens[row] != first and (row < _ALONE or tokens[row] * _ALIKE < first):
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
    placed: list[list[tuple[Ints, Ints]]] = [[] for _ in boxes]
    for number, box in enumerate(boxes):
        placed[number] = _add_box(program, table, documents, box)
    members: list[list[int]] = [[] for _ in documents.tokens]
    for document, column in (pair for parts in placed for part in parts for pair in zip(*part)):
        members[document].append(int(column))
    for tokens, columns in zip(documents.tokens, members):
        if not columns:
            return INFINITY
        share = tokens / table.capacity
        program.row(share, share, (np.asarray(columns), 1.0))
    return program.solve()


def _add_box(program: LinearProgram, table: Table, documents: Classes, box: Box) -> list[tuple[Ints, Ints]]:
    """The variables and rows of one box; returns, for each kind, the classes it can take and their variables."""
    seconds = int(program.columns(1, 1.0, box.low * box.count, box.high * box.count)[0])
    groups = program.columns(len(table.degrees))
    lasting = program.columns(len(table.degrees))  # groups times their seconds
    degrees = table.degrees.astype(np.float64)
    all_devices = float(table.devices)
    program.row(-INFINITY, all_devices * box.count, (groups, degrees))
    # Idle devices last as long as their micro-batches, too.
    for limit, low, high in ((box.low, 0.0, INFINITY), (box.high, -INFINITY, 0.0)):
        shift = limit * all_devices * box.count
        program.row(low + shift, high + shift, (seconds, all_devices), (lasting, -degrees), (groups, limit * degrees))
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
