"""The exact optimum of few documents, by dynamic programs over sets of documents; no solver is needed.

Under a deadline, a set of documents in one micro-batch needs a least number of devices, which follows from those of its
subsets; so one program under one deadline says of every set at once whether a micro-batch of so many seconds holds it.
Deadlines are chosen where the best way to share out all documents, as far as is known, is still in doubt. Memory costs
nothing extra here, where relaxations are weak: it decides which sets a group can hold at all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from seqpar.planner.exact.milp import Outcome
from seqpar.planner.problem.costs import Floats, Ints, Table
from seqpar.planner.search.schedule import Group, MicroBatch, schedule

NAME = "subsets"
Budget = Callable[[], bool]
Values = TypeVar("Values", Floats, Ints)
_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class Splits:
    """Every way to split a set in a part with its first document and the rest, the sets from small to large.

    ``layers`` are the rows of all sets of one size, ``starts`` where the splits of each set begin in its layer.
    """

    part: Ints
    rest: Ints
    sets: tuple[Ints, ...]
    layers: tuple[slice, ...]
    starts: tuple[Ints, ...]


def solve_subsets(table: Table, known_seconds: float, spend: Budget) -> Outcome:
    """The shortest schedule, if it is shorter than the ``known_seconds`` that can be reached, and a bound below all."""
    splits, group_seconds = _splits(table.num_documents), _group_seconds(table)
    everything = len(group_seconds) - 1
    times = np.append(np.unique(group_seconds[group_seconds <= known_seconds]), np.inf)
    # Alone in a micro-batch, a set takes at least times[low] and at most times[high].
    low = np.zeros(len(group_seconds), np.int64)
    high = np.full(len(group_seconds), len(times) - 1)
    while True:
        seconds = times[low]
        shortest = _cheapest(splits, seconds)
        bound = float(shortest[everything])
        if bound >= known_seconds * (1 - _TOLERANCE):
            return Outcome(None, known_seconds, True, NAME, False)
        parts = _cut(splits, seconds, shortest, everything)
        doubtful = max(parts, key=lambda part: int(high[part] - low[part]))
        if low[doubtful] == high[doubtful]:
            batches = [_micro_batch(table, splits, group_seconds, part, float(times[high[part]])) for part in parts]
            return Outcome(schedule(table, batches), bound, True, NAME, False)
        if not spend():
            return Outcome(None, bound, False, NAME, False)
        middle = int(low[doubtful] + high[doubtful]) // 2
        fits = _cheapest(splits, _degrees(table, group_seconds, float(times[middle]))) <= table.devices
        high[fits] = np.minimum(high[fits], middle)
        low[~fits] = np.maximum(low[~fits], middle + 1)


def _splits(documents: int) -> Splits:
    """All of them: each document is in the part, in the rest, or not in the set."""
    part = rest = np.zeros(1, np.int64)
    for bit in (1 << document for document in range(documents)):
        first = part == 0  # the first document of a set is in its part
        part, rest = np.concatenate([part, part + bit, part[~first]]), np.concatenate([rest, rest, rest[~first] + bit])
    members = np.bitwise_count(part | rest)
    order = np.lexsort((part | rest, members))
    part, rest = part[order], rest[order]
    ends = np.cumsum(np.bincount(members, minlength=documents + 1))
    layers = tuple(slice(int(a), int(b)) for a, b in pairwise(ends.tolist()))
    found = [np.unique((part | rest)[layer], return_index=True) for layer in layers]
    return Splits(part, rest, tuple(sets for sets, _ in found), layers, tuple(starts for _, starts in found))


def _group_seconds(table: Table) -> Floats:
    """Seconds [sets, kinds] of a group with these documents; infinite if they do not fit, or leave ranks without."""
    seconds, tokens = table.fixed[None, :], np.zeros(1, np.int64)
    for row in range(table.num_documents):
        seconds = np.concatenate([seconds, seconds + table.seconds[row]])
        tokens = np.concatenate([tokens, tokens + table.tokens[row]])
    held = tokens[:, None]
    return np.where((held >= table.degrees) & (held <= table.degrees * table.capacity), seconds, np.inf)


def _degrees(table: Table, group_seconds: Floats, deadline: float) -> Ints:
    """The smallest group for each set under a deadline; more than all devices if there is none."""
    return np.where(group_seconds <= deadline, table.degrees, table.devices + 1).min(axis=1)


def _cheapest(splits: Splits, costs: Values) -> Values:
    """The smallest cost of each set, cut into as many parts as it takes."""
    found = np.zeros_like(costs)
    for sets, layer, starts in zip(splits.sets, splits.layers, splits.starts):
        found[sets] = np.minimum.reduceat(costs[splits.part[layer]] + found[splits.rest[layer]], starts)
    return found


def _cut(splits: Splits, costs: Values, cheapest: Values, whole: int) -> list[int]:
    """The parts of a set that cost the least."""
    parts = []
    while whole:
        layer = splits.layers[whole.bit_count() - 1]
        first, last = np.searchsorted((splits.part | splits.rest)[layer], [whole, whole + 1]) + layer.start
        part, rest = splits.part[first:last], splits.rest[first:last]
        parts.append(int(part[np.argmin(costs[part] + cheapest[rest])]))
        whole &= ~parts[-1]
    return parts


def _micro_batch(table: Table, splits: Splits, group_seconds: Floats, whole: int, deadline: float) -> MicroBatch:
    degrees = _degrees(table, group_seconds, deadline)
    groups: list[Group] = []
    for part in _cut(splits, degrees, _cheapest(splits, degrees), whole):
        kind = int(np.where(group_seconds[part] <= deadline, table.degrees, table.devices + 1).argmin())
        groups.append((kind, tuple(row for row in range(table.num_documents) if part >> row & 1)))
    return tuple(groups)
