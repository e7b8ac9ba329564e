"""An oracle that knows nothing of the planner's code: every way to plan a few documents, in plain Python."""

from collections.abc import Iterator, Sequence
from itertools import combinations, combinations_with_replacement, pairwise

from seqpar.planner import Cluster, Problem


def shortest_step(problem: Problem) -> float:
    """The best step there is, by trying every partition into micro-batches, and in each every set of groups."""
    lengths = problem.lengths
    best = float("inf")
    alone: dict[frozenset[int], float] = {}
    for batches in partitions(list(range(len(lengths)))):
        total = 0.0
        for batch in batches:
            key = frozenset(batch)
            if key not in alone:
                alone[key] = shortest_micro_batch(problem, batch)
            total += alone[key]
        best = min(best, total)
    return best


def shortest_micro_batch(problem: Problem, documents: Sequence[int]) -> float:
    """The shortest micro-batch of these documents: every partition into groups, every kind for each."""
    best = float("inf")
    for groups in partitions(list(documents)):
        for kinds in kinds_of(problem, len(groups)):
            for order in arrangements(list(kinds)):
                seconds = [group_seconds(problem, kind, group) for kind, group in zip(order, groups)]
                best = min(best, max(seconds))
    return best


def group_seconds(problem: Problem, kind: int, documents: Sequence[int]) -> float:
    """Seconds of a group, straight from the formulas; infinite if it does not fit or leaves a rank without a token."""
    row = problem.costs.kinds[kind]
    tokens = sum(problem.lengths[document] for document in documents)
    if not row.degree <= tokens <= row.degree * problem.capacity:
        return float("inf")
    seconds = row.fixed_seconds + row.latency_seconds
    for document in documents:
        s = problem.lengths[document]
        seconds += row.quadratic_seconds * s * s + row.linear_seconds * s
        seconds += max(0.0, row.message_seconds * s - row.hidden_seconds * s * s)
    return seconds


def kinds_of(problem: Problem, groups: int) -> Iterator[tuple[int, ...]]:
    """All multisets of so many kinds that the devices can hold at once (degrees must divide one another)."""
    for kinds in combinations_with_replacement(range(len(problem.costs.kinds)), groups):
        if sum(problem.costs.kinds[kind].degree for kind in kinds) <= problem.cluster.devices:
            yield kinds


def arrangements(values: list[int]) -> Iterator[tuple[int, ...]]:
    """All different orders of these values."""
    if not values:
        yield ()
        return
    for value in sorted(set(values)):
        rest = list(values)
        rest.remove(value)
        for order in arrangements(rest):
            yield (value, *order)


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """All ways to divide items into sets that are not empty."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for smaller in partitions(rest):
        for index in range(len(smaller)):
            yield [*smaller[:index], [first, *smaller[index]], *smaller[index + 1 :]]
        yield [[first], *smaller]


def runs(documents: int, count: int) -> Iterator[tuple[range, ...]]:
    """All ways to cut so many documents in a row into ``count`` runs that are not empty."""
    for cuts in combinations(range(1, documents), count - 1):
        yield tuple(range(start, end) for start, end in pairwise((0, *cuts, documents)))


def shortest_step_in(problem: Problem, micro_batches: int) -> float:
    """The best step of exactly so many micro-batches."""
    found = float("inf")
    for batches in partitions(list(range(len(problem.lengths)))):
        if len(batches) == micro_batches:
            found = min(found, sum(shortest_micro_batch(problem, batch) for batch in batches))
    return found


def first_ranks(degree: int, cluster: Cluster) -> list[int]:
    """Where a group may stand: multiples of the largest step that meets every place of its kind, inside its node."""
    node, devices = cluster.devices_per_node, cluster.devices
    if degree <= node:
        step = max(step for step in range(1, degree + 1) if degree % step == 0 and node % step == 0)
        return [first + at for first in range(0, devices, node) for at in range(0, node - degree + 1, step)]
    if degree % node:
        return []
    nodes = devices // node
    step = max(step for step in range(1, nodes + 1) if degree // node % step == 0 and nodes % step == 0)
    return list(range(0, devices - degree + 1, step * node))


def goes_side_by_side(degrees: Sequence[int], cluster: Cluster) -> bool:
    """Whether groups of these degrees have a place at once, by trying all places."""

    def rest(index: int, taken: frozenset[int]) -> bool:
        if index == len(degrees):
            return True
        for first in first_ranks(degrees[index], cluster):
            ranks = frozenset(range(first, first + degrees[index]))
            if not ranks & taken and rest(index + 1, taken | ranks):
                return True
        return False

    return rest(0, frozenset())
