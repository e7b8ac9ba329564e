"""The checker refuses every way in which a plan can be wrong."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from seqpar.planner import Plan, PlannedGroup, PlannedMicroBatch, PlanRefusedError, check, plan_batch
from seqpar.planner.check import faults
from tests.planner.problems import small_problem

PROBLEM = small_problem([350, 120, 90, 60, 40, 30, 20, 700, 5, 80, 90, 70], devices=16)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_batch(PROBLEM)


def with_group(plan: Plan, batch: int, group: int, **changes: object) -> Plan:
    batches = list(plan.micro_batches)
    groups = list(batches[batch].groups)
    groups[group] = replace(groups[group], **changes)  # type: ignore[arg-type]
    batches[batch] = replace(batches[batch], groups=tuple(groups))
    return replace(plan, micro_batches=tuple(batches))


def shared(plan: Plan) -> tuple[int, int, PlannedGroup]:
    """A group of more than one rank, and where it is."""
    return next(
        (i, j, group)
        for i, batch in enumerate(plan.micro_batches)
        for j, group in enumerate(batch.groups)
        if group.degree > 1
    )


def moved(plan: Plan, by: int) -> Plan:
    i, j, group = shared(plan)
    return with_group(plan, i, j, ranks=tuple(rank + by for rank in group.ranks))


def twice(plan: Plan) -> Plan:
    group = plan.micro_batches[0].groups[0]
    return with_group(plan, 0, 0, documents=(*group.documents, group.documents[0]))


def lost(plan: Plan) -> Plan:
    return replace(plan, micro_batches=plan.micro_batches[1:])


def emptied(plan: Plan) -> Plan:
    """An idle rank that is said to be a group."""
    first = plan.micro_batches[0]
    ghost = replace(first.groups[0], documents=(), tokens=0, tokens_per_device=0)
    return replace(plan, micro_batches=(*plan.micro_batches, PlannedMicroBatch((ghost,), ghost.seconds)))


def crowded(plan: Plan) -> Plan:
    """All documents in the first group, with figures to match."""
    documents = tuple(range(len(PROBLEM.lengths)))
    tokens = sum(PROBLEM.lengths)
    _, _, group = shared(plan)
    full = replace(group, documents=documents, tokens=tokens, tokens_per_device=-(-tokens // group.degree),
                   memory_bytes=10 + -(-tokens // group.degree))  # fmt: skip
    return replace(plan, micro_batches=(PlannedMicroBatch((full,), full.seconds),))


def faster(plan: Plan) -> Plan:
    i, j, group = shared(plan)
    return with_group(plan, i, j, compute_seconds=group.compute_seconds * 0.9)


CORRUPTIONS: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "another model": (lambda plan: replace(plan, model="other"), "model is"),
    "another batch": (lambda plan: replace(plan, num_tokens=plan.num_tokens + 1), "num_tokens is"),
    "another capacity": (lambda plan: replace(plan, capacity_tokens=1), "capacity_tokens is"),
    "a document twice": (twice, "placed 2 times"),
    "documents left out": (lost, "placed 0 times"),
    "a document that is not there": (lambda plan: with_group(plan, 0, 0, documents=(99,)), "document 99 does not"),
    "ranks beyond the cluster": (lambda plan: moved(plan, 16), "not all among"),
    "ranks before the first": (lambda plan: moved(plan, -16), "not all among"),
    "ranks out of line": (lambda plan: moved(plan, 1), "aligned|leave their node"),
    "ranks apart": (lambda plan: with_group(plan, *shared(plan)[:2], ranks=(0, 3)), "side by side"),
    "a degree not on offer": (lambda plan: with_group(plan, 0, 0, degree=3, ranks=(0, 1, 2)), "not on offer"),
    "a transport not on offer": (lambda plan: with_group(plan, *shared(plan)[:2], transport="mail"), "not on offer"),
    "a group without documents": (emptied, "without work"),
    "too many tokens": (crowded, r"takes [0-9,]+ bytes a device of"),
    "wrong tokens": (lambda plan: with_group(plan, 0, 0, tokens=1), "holds"),
    "wrong memory": (lambda plan: with_group(plan, 0, 0, memory_bytes=1), "bytes a device, but takes"),
    "wrong compute": (faster, "of compute"),
    "wrong communication": (lambda plan: with_group(plan, *shared(plan)[:2], communication_seconds=0.0), "of comm"),
    "wrong fixed cost": (lambda plan: with_group(plan, 0, 0, fixed_seconds=0.0), "of fixed"),
    "wrong seconds": (lambda plan: with_group(plan, 0, 0, seconds=1e-3), "of all"),
    "a shorter step": (lambda plan: replace(plan, step_seconds=plan.step_seconds * 0.9), "step_seconds is"),
    "a bound above the step": (lambda plan: replace(plan, lower_bound_seconds=plan.step_seconds * 1.1), "not between"),
    "a bound of nothing": (lambda plan: replace(plan, lower_bound_seconds=0.0), "not between"),
    "a bound that is too low": (lambda plan: replace(plan, lower_bound_seconds=1e-3), "easy to see"),
    "a baseline that is faster": (
        lambda plan: replace(plan, baselines=(replace(plan.baselines[0], seconds=plan.step_seconds / 2),)),
        "slower than its own baseline",
    ),
}  # fmt: skip


def test_a_good_plan_passes(plan: Plan) -> None:
    check(PROBLEM, plan)
    assert max(len(batch.groups) for batch in plan.micro_batches) > 1
    assert len(plan.micro_batches) > 1


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupted_plan_is_refused(plan: Plan, name: str) -> None:
    corrupt, expected = CORRUPTIONS[name]
    with pytest.raises(PlanRefusedError) as refused:
        check(PROBLEM, corrupt(plan))
    assert any(re.search(expected, fault) for fault in refused.value.faults), refused.value.faults


def test_two_groups_on_one_rank_are_refused(plan: Plan) -> None:
    first = plan.micro_batches[0]
    assert len(first.groups) > 1
    one, *_, other = first.groups
    start = one.ranks[0]
    clash = replace(other, ranks=tuple(range(start, start + other.degree)))
    batches = (replace(first, groups=(*first.groups[:-1], clash)), *plan.micro_batches[1:])
    assert any("at once" in fault for fault in faults(PROBLEM, replace(plan, micro_batches=batches)))


def test_a_micro_batch_shorter_than_its_slowest_group_is_refused(plan: Plan) -> None:
    first = replace(plan.micro_batches[0], seconds=1e-3)
    found = faults(PROBLEM, replace(plan, micro_batches=(first, *plan.micro_batches[1:])))
    assert any("slowest group" in fault for fault in found)
    empty = replace(plan, micro_batches=(*plan.micro_batches, PlannedMicroBatch((), 0.0)))
    assert any("has no groups" in fault for fault in faults(PROBLEM, empty))


def test_a_group_off_its_grid_is_refused_inside_its_node() -> None:
    problem = small_problem([150, 5], degrees=(1, 2))
    good = plan_batch(problem)
    i, j, group = shared(good)
    assert any("aligned to 2" in fault for fault in faults(problem, with_group(good, i, j, ranks=(1, 2))))
    assert group.degree == 2
