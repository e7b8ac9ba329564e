"""Plans with one kind of group only: what static sequence parallelism would take, and what to fall back on."""

from dataclasses import dataclass

import numpy as np

from seqpar.planner.problem.costs import Table
from seqpar.planner.problem.problem import Problem
from seqpar.planner.search.batching import area, fewest_micro_batches, time_optimal
from seqpar.planner.search.pack import pack
from seqpar.planner.search.schedule import Schedule, schedule
from seqpar.planner.search.squeeze import stretch

_MORE = 3  # micro-batches above the fewest that are tried
_MORE_OF_MANY = 32  # where there are many, one more in so many is the next that is tried
_TRIES = 8  # packings for each number of micro-batches


@dataclass(frozen=True, eq=False)
class StaticPlan:
    """The best schedule found in which every group is of this kind."""

    kind: int
    schedule: Schedule


def static_plans(problem: Problem, table: Table) -> tuple[StaticPlan, ...]:
    """One plan for each kind of group that can hold the longest document."""
    plans = []
    for kind in range(len(table.degrees)):
        if np.isfinite(table.seconds[:, kind]).all():
            found = _static(problem, table, kind)
            if found is not None:
                plans.append(StaticPlan(kind, found))
    return tuple(plans)


def context_plan(problem: Problem, plans: tuple[StaticPlan, ...]) -> StaticPlan:
    """The plan of a fixed choice: the smallest degree that holds the model's context and the longest document."""
    need = max(problem.costs.context_tokens, max(problem.lengths))
    kinds = problem.costs.kinds
    enough = [plan for plan in plans if kinds[plan.kind].degree * problem.capacity >= need]
    if not enough:
        return max(plans, key=lambda plan: kinds[plan.kind].degree)
    return min(enough, key=lambda plan: (kinds[plan.kind].degree, plan.schedule.step_seconds))


def best_plan(plans: tuple[StaticPlan, ...]) -> StaticPlan:
    """The shortest of them."""
    return min(plans, key=lambda plan: plan.schedule.step_seconds)


def _static(problem: Problem, table: Table, kind: int) -> Schedule | None:
    """Sorted runs of documents, then packed, for several numbers of micro-batches; the shortest of all."""
    only = _only(problem, table, kind)
    fewest = fewest_micro_batches(only)
    best: Schedule | None = None
    for chunks, seconds in time_optimal(only, range(fewest, fewest + _MORE)):
        if best is not None and best.step_seconds <= area(only, len(chunks)) * (1 + 1e-9):
            break
        tries = iter(range(_TRIES))
        packed = stretch(only, seconds, lambda tries=tries: next(tries, None) is not None)  # type: ignore[misc]
        best = min(
            (plan for plan in (best, packed) if plan is not None), key=lambda plan: plan.step_seconds, default=None
        )
    best = best or _one_by_one(only, fewest)
    return (
        None
        if best is None
        else schedule(table, [[(kind, rows) for _, rows in groups] for groups in best.micro_batches])
    )


def _only(problem: Problem, table: Table, kind: int) -> Table:
    """The table with one kind of group, on the devices that whole groups of it can use."""
    degree, cluster = int(table.degrees[kind]), problem.cluster
    groups = (cluster.devices // degree if degree > cluster.devices_per_node
              else cluster.devices // cluster.devices_per_node * (cluster.devices_per_node // degree))  # fmt: skip
    return Table(table.order, table.tokens, table.seconds[:, [kind]], table.degrees[[kind]], table.fixed[[kind]],
                 table.capacity, groups * degree)  # fmt: skip


def _one_by_one(only: Table, fewest: int) -> Schedule | None:
    """Packed without deadlines, in more and more micro-batches until it fits: always a plan."""
    longest = float(only.seconds.sum() + only.fixed.max() * 2)
    count, most = fewest, fewest + only.num_documents
    while count <= most:
        batches = pack(only, [longest] * count)
        if batches is not None:
            return schedule(only, batches)
        count += max(1, count // _MORE_OF_MANY)
    return None
