"""An oracle that knows nothing of the planner's code: every way to plan a few documents, in plain Python."""

from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement

from planner import Problem


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
