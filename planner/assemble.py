"""From a schedule to a plan: ranks for every group, and its predicted seconds and memory by part."""

import math
from collections.abc import Sequence

from seqpar.planner.placement import place
from seqpar.planner.plan import PlannedGroup, PlannedMicroBatch
from seqpar.planner.problem.costs import Table
from seqpar.planner.problem.problem import GroupKind, Problem
from seqpar.planner.search.schedule import Group, Schedule


def placeable(problem: Problem, schedule: Schedule) -> bool:
    """Whether every micro-batch goes side by side on the cluster."""
    kinds = problem.costs.kinds
    degrees = ([kinds[kind].degree for kind, _ in groups] for groups in schedule.micro_batches)
    return all(place(row, problem.cluster) is not None for row in degrees)


def micro_batches(problem: Problem, table: Table, schedule: Schedule) -> tuple[PlannedMicroBatch, ...]:
    """The micro-batches of a plan, with groups from the first rank to the last."""
    return tuple(_micro_batch(problem, table, groups) for groups in schedule.micro_batches)


def _micro_batch(problem: Problem, table: Table, groups: Sequence[Group]) -> PlannedMicroBatch:
    groups = sorted(groups, key=lambda group: (-problem.costs.kinds[group[0]].degree, group[1]))
    starts = place([problem.costs.kinds[kind].degree for kind, _ in groups], problem.cluster)
    assert starts is not None, "schedules that have no place are refused before"
    planned = [_group(problem, table, group, start) for group, start in zip(groups, starts)]
    planned.sort(key=lambda group: group.ranks)
    return PlannedMicroBatch(tuple(planned), max(group.seconds for group in planned))


def _group(problem: Problem, table: Table, group: Group, start: int) -> PlannedGroup:
    kind = problem.costs.kinds[group[0]]
    documents = tuple(sorted(int(table.order[row]) for row in group[1]))
    lengths = [problem.lengths[document] for document in documents]
    tokens_per_device = -(-sum(lengths) // kind.degree)
    compute, communication = _seconds(kind, lengths)
    fixed = kind.fixed_seconds + kind.latency_seconds
    return PlannedGroup(
        ranks=tuple(range(start, start + kind.degree)),
        degree=kind.degree,
        transport=kind.transport,
        documents=documents,
        tokens=sum(lengths),
        tokens_per_device=tokens_per_device,
        memory_bytes=math.ceil(problem.reserved_bytes + tokens_per_device * problem.costs.bytes_per_token),
        compute_seconds=compute,
        communication_seconds=communication,
        fixed_seconds=fixed,
        seconds=compute + communication + fixed,
    )


def _seconds(kind: GroupKind, lengths: Sequence[int]) -> tuple[float, float]:
    compute = math.fsum(kind.quadratic_seconds * s * s + kind.linear_seconds * s for s in lengths)
    exposed = math.fsum(max(0.0, kind.message_seconds * s - kind.hidden_seconds * s * s) for s in lengths)
    return compute, exposed
