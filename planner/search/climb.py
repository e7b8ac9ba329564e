"""One micro-batch on its own: a hill-climb over compositions, that is, over how many groups there are of each kind."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from seqpar.planner.problem.costs import Table
from seqpar.planner.search.balance import KEYS, assign, improve, makespan
from seqpar.planner.search.schedule import MicroBatch
from seqpar.planner.search.squeeze import stretch

Budget = Callable[[], bool]
Composition = tuple[int, ...]


def solve_alone(table: Table, rows: Sequence[int], least: float, spend: Budget) -> MicroBatch | None:
    """Pack these documents under the shortest deadline above ``least`` seconds that is found."""
    chosen = sorted(rows)
    packed = stretch(table.rows(np.asarray(chosen)), [least], spend)
    if packed is None:
        return None
    assert len(packed.micro_batches) == 1, "one deadline makes one micro-batch"
    return tuple((kind, tuple(chosen[row] for row in members)) for kind, members in packed.micro_batches[0])


def climb(table: Table, groups: MicroBatch, spend: Budget) -> MicroBatch:
    """Change one or two groups at a time into other kinds while the micro-batch gets shorter."""
    rows = sorted(row for _, members in groups for row in members)
    best = improve(table, groups)
    seconds = makespan(table, best)
    moved = True
    while moved:
        moved = False
        for kinds in _neighbours(table, tuple(sorted(kind for kind, _ in best))):
            if not spend():
                return best
            found = compose(table, kinds, rows, seconds)
            if found is not None and makespan(table, found) < seconds * (1 - 1e-9):
                best, seconds, moved = found, makespan(table, found), True
                break
    return best


def compose(table: Table, kinds: Composition, rows: Sequence[int], worth: float) -> MicroBatch | None:
    """The best of the three keys with this composition, improved if it is not far above ``worth`` seconds."""
    tried = [assign(table, kinds, rows, key) for key in KEYS]
    found = [groups for groups in tried if groups is not None]
    if not found:
        return None
    best = min(found, key=lambda groups: makespan(table, groups))
    return improve(table, best) if makespan(table, best) < worth * 1.25 else best


def _neighbours(table: Table, kinds: Composition) -> Iterator[Composition]:
    """Compositions that differ in one group made smaller groups, several made one larger, one more, or one less."""
    seen = {kinds}
    free = table.devices - sum(int(table.degrees[kind]) for kind in kinds)
    present = sorted(set(kinds))
    changes: list[tuple[Composition, Composition]] = [((), (new,)) for new in range(len(table.degrees))]
    for old in present:
        for new in range(len(table.degrees)):
            changes.extend(_exchanges(table, kinds, old, new))
        changes.append(((old,), ()))
    for gone, come in changes:
        if sum(int(table.degrees[k]) for k in come) - sum(int(table.degrees[k]) for k in gone) > free:
            continue
        left = list(kinds)
        for kind in gone:
            left.remove(kind)
        after = tuple(sorted((*left, *come)))
        if after and after not in seen:
            seen.add(after)
            yield after


def _exchanges(table: Table, kinds: Composition, old: int, new: int) -> Iterator[tuple[Composition, Composition]]:
    """Groups of one kind for groups of another on the same devices; one for one where that is fewer devices."""
    if old == new:
        return
    few, many = int(table.degrees[old]), int(table.degrees[new])
    if few >= many:
        yield (old,), (new,) * (few // many)
        yield (old,), (new,)
        return
    needed = -(-many // few)
    for count in range(1, min(needed, kinds.count(old)) + 1):
        yield (old,) * count, (new,)
