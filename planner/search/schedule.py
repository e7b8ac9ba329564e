"""A plan in the making: micro-batches of groups of rows of the table, without ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from seqpar.planner.problem.costs import Table

Documents = tuple[int, ...]
Group = tuple[int, Documents]  # the kind of group, and the rows of the table in it
MicroBatch = tuple[Group, ...]


@dataclass(frozen=True)
class Schedule:
    """Micro-batches one after another, and the seconds that each takes."""

    micro_batches: tuple[MicroBatch, ...]
    seconds: tuple[float, ...]

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds)


def group_seconds(table: Table, group: Group) -> float:
    """Seconds of one group, its fixed cost included."""
    kind, documents = group
    return float(table.fixed[kind] + table.seconds[list(documents), kind].sum())


def busy(table: Table, found: Schedule) -> bool:
    """Whether every rank of every group has at least one token."""
    groups = (group for groups in found.micro_batches for group in groups)
    return all(int(table.tokens[list(rows)].sum()) >= table.degrees[kind] for kind, rows in groups)


def schedule(table: Table, micro_batches: Sequence[Sequence[tuple[int, Sequence[int]]]]) -> Schedule:
    """A schedule with its seconds, without empty groups and micro-batches, longest micro-batch first."""
    kept = [tuple((kind, tuple(rows)) for kind, rows in groups if rows) for groups in micro_batches]
    kept = [groups for groups in kept if groups]
    timed = list(zip(_slowest(table, kept), kept))
    timed.sort(key=lambda pair: (-pair[0], pair[1]))
    return Schedule(tuple(groups for _, groups in timed), tuple(seconds for seconds, _ in timed))


def _slowest(table: Table, micro_batches: Sequence[MicroBatch]) -> list[float]:
    """Seconds of the slowest group of each micro-batch."""
    groups = [group for groups in micro_batches for group in groups]
    if not groups:
        return []
    kinds = np.asarray([kind for kind, _ in groups])
    sizes = np.asarray([len(rows) for _, rows in groups])
    each = table.seconds[list(chain.from_iterable(rows for _, rows in groups)), np.repeat(kinds, sizes)]
    seconds = table.fixed[kinds] + np.add.reduceat(each, np.cumsum(sizes) - sizes)
    starts = np.cumsum([0, *(len(groups) for groups in micro_batches[:-1])])
    return [float(slowest) for slowest in np.maximum.reduceat(seconds, starts)]
