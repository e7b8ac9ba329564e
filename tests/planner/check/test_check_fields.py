"""The checker looks at every field of a plan, and names what is wrong; field by field, and rule by rule."""

import itertools
import math
import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from seqpar.planner import (
    Cluster,
    CostModel,
    GroupKind,
    Options,
    Plan,
    PlannedGroup,
    PlannedMicroBatch,
    PlanRefusedError,
    Problem,
    check,
    plan_batch,
)
from seqpar.planner.check import faults
from tests.planner import oracle
from tests.planner.check.damage import changed_plans, field_names, with_batch
from tests.planner.problems import kind, problems, small_cluster, small_problem

PROBLEM = small_problem([350, 120, 90, 60, 40, 30, 20, 700, 5, 80, 90, 70], devices=16)

# What a fault says of a field; the fields of the last row are remarks on how the plan came about.
NAMED = {
    "Plan.model": "model is 'small\\?'", "Plan.cluster": "cluster is", "Plan.devices": "devices is 17, expected 16",
    "Plan.capacity_tokens": "capacity_tokens is 101", "Plan.memory_budget_bytes": "memory_budget_bytes is 111",
    "Plan.num_documents": "num_documents is 13", "Plan.num_tokens": "num_tokens is",
    "Plan.step_seconds": "step_seconds is", "Plan.lower_bound_seconds": "lower_bound_seconds is",
    "Plan.micro_batches": "is placed 2 times", "PlannedMicroBatch.groups": "is placed 2 times",
    "PlannedMicroBatch.seconds": "micro-batch 0: takes .* but its slowest group",
    "PlannedGroup.ranks": "micro-batch 0: group 0: ranks .* side by side",
    "PlannedGroup.degree": "group 0: degree .* is not on offer",
    "PlannedGroup.transport": "group 0: degree .*\\? is not on offer",
    "PlannedGroup.documents": "document .* is placed 2 times|does not exist",
    "PlannedGroup.tokens": "group 0: holds", "PlannedGroup.tokens_per_device": "group 0: holds",
    "PlannedGroup.compute_seconds": "of compute", "PlannedGroup.communication_seconds": "of communication",
    "PlannedGroup.fixed_seconds": "of fixed", "PlannedGroup.seconds": "of all",
}  # fmt: skip
REMARKS = {"Plan.active_bound", "Plan.stage", "Plan.seed", "Plan.stopped_by", "Plan.note", "Plan.planning_seconds"}
BASELINES = {"Plan.baselines", *(name for name in field_names() if name.startswith("Baseline."))}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_batch(PROBLEM, Options(seconds=0.2))


def test_every_field_is_known_here() -> None:
    assert {*NAMED, *REMARKS, *BASELINES, "PlannedGroup.memory_bytes"} == set(field_names())


@pytest.mark.parametrize("name", NAMED)
def test_a_change_of_any_field_is_refused_with_its_name(plan: Plan, name: str) -> None:
    with pytest.raises(PlanRefusedError) as refused:
        check(PROBLEM, dict(changed_plans(plan))[name])
    assert any(re.search(NAMED[name], fault) for fault in refused.value.faults), refused.value.faults
    assert str(refused.value).startswith(f"plan refused: {refused.value.faults[0]}")


@pytest.mark.parametrize("name", sorted(REMARKS))
def test_remarks_on_how_a_plan_came_about_are_free(plan: Plan, name: str) -> None:
    check(PROBLEM, dict(changed_plans(plan))[name])


@pytest.mark.parametrize("by", [3, -3, 100])
def test_memory_that_is_bytes_off_is_refused(plan: Plan, by: int) -> None:
    batch = plan.micro_batches[0]
    group = replace(batch.groups[0], memory_bytes=batch.groups[0].memory_bytes + by)
    found = faults(PROBLEM, with_batch(plan, replace(batch, groups=(group, *batch.groups[1:]))))
    assert any("bytes a device" in fault for fault in found)


SECONDS = [*(f"Plan.{name}" for name in ("step_seconds", "lower_bound_seconds")), "PlannedMicroBatch.seconds",
           *(f"PlannedGroup.{part}seconds" for part in ("compute_", "communication_", "fixed_", ""))]  # fmt: skip


@pytest.mark.parametrize("number", [math.nan, -1.0, math.inf])
def test_seconds_that_are_no_seconds_are_refused(plan: Plan, number: float) -> None:
    batch = plan.micro_batches[0]
    for row, name in (place.split(".") for place in SECONDS):
        change = {name: number}
        if row == "Plan":
            wrong = replace(plan, **change)  # type: ignore[arg-type]
        elif row == "PlannedMicroBatch":
            wrong = with_batch(plan, replace(batch, **change))  # type: ignore[arg-type]
        else:
            group = replace(batch.groups[0], **change)  # type: ignore[arg-type]
            wrong = with_batch(plan, replace(batch, groups=(group, *batch.groups[1:])))
        assert faults(PROBLEM, wrong), (row, name)


@pytest.mark.parametrize(
    "change", [{"seconds": math.nan}, {"seconds": math.inf}, {"degree": 3}, {"transport": "mail"},
               {"num_micro_batches": 0}], ids=str
)  # fmt: skip
def test_a_baseline_that_cannot_be_is_refused(plan: Plan, change: dict[str, object]) -> None:
    row = replace(plan.baselines[0], **change)  # type: ignore[arg-type]
    assert any("baseline" in fault for fault in faults(PROBLEM, replace(plan, baselines=(row, *plan.baselines[1:]))))


def test_a_baseline_faster_than_the_plan_or_the_bound_is_refused(plan: Plan) -> None:
    row = replace(plan.baselines[0], seconds=plan.lower_bound_seconds * 0.9)
    found = faults(PROBLEM, replace(plan, baselines=(row, *plan.baselines[1:])))
    assert [fault.split(" ")[0] for fault in found] == ["is", "baseline"]


def hand_made(problem: Problem, groups: "list[tuple[int, int, tuple[int, ...]]]") -> Plan:
    """A plan of one micro-batch of (first rank, kind, documents), its figures from the oracle's formulas."""
    rows = []
    for first, number, documents in groups:
        row = problem.costs.kinds[number]
        lengths = [problem.lengths[document] for document in documents]
        tokens, fixed = sum(lengths), row.fixed_seconds + row.latency_seconds
        compute = sum(row.quadratic_seconds * s * s + row.linear_seconds * s for s in lengths)
        message = sum(max(0.0, row.message_seconds * s - row.hidden_seconds * s * s) for s in lengths)
        held = -(-tokens // row.degree)
        rows.append(
            PlannedGroup(tuple(range(first, first + row.degree)), row.degree, row.transport, documents, tokens, held,
                         math.ceil(problem.reserved_bytes + held * problem.costs.bytes_per_token), compute, message,
                         fixed, compute + message + fixed)
        )  # fmt: skip
    seconds = max(group.seconds for group in rows)
    batch = PlannedMicroBatch(tuple(rows), seconds)
    return Plan(problem.costs.name, problem.cluster.name, problem.cluster.devices, problem.capacity,
                problem.cluster.memory_bytes, len(problem.lengths), sum(problem.lengths), seconds, seconds, "", (),
                "by hand", 0, "work", "", (batch,))  # fmt: skip


def test_a_plan_made_by_hand_passes() -> None:
    problem = small_problem([150, 90, 80], degrees=(1, 2))
    check(problem, hand_made(problem, [(0, 1, (0,)), (2, 0, (1,)), (7, 0, (2,))]))


@pytest.mark.parametrize(
    ("first", "expected"),
    [(1, "aligned to 2"), (3, "leave their node of 4"), (7, "not all among the 8"), (-2, "not all among the 8")],
)
def test_ranks_out_of_place_are_refused(first: int, expected: str) -> None:
    problem = small_problem([150], degrees=(1, 2))
    assert any(expected in fault for fault in faults(problem, hand_made(problem, [(first, 1, (0,))])))


@pytest.mark.parametrize("shape", [(8, 4), (12, 6), (12, 4), (9, 3), (24, 8), (12, 12)])
def test_the_checker_accepts_the_places_there_are_and_no_others(shape: tuple[int, int]) -> None:
    cluster = Cluster("c", *shape, 110)
    for degree in range(1, cluster.devices + 1):
        if not cluster.stride(degree):
            continue
        problem = Problem((degree,), cluster, CostModel("c", (kind(degree),), 1.0, 10.0))
        accepted = [
            first for first in range(cluster.devices) if not faults(problem, hand_made(problem, [(first, 0, (0,))]))
        ]
        assert accepted == [first for first in oracle.first_ranks(degree, cluster) if first + degree <= cluster.devices]


@pytest.mark.parametrize(("tokens", "refused"), [(1, True), (3, True), (4, False), (5, False)])
def test_a_group_with_fewer_tokens_than_ranks_is_refused(tokens: int, refused: bool) -> None:
    problem = small_problem([tokens], degrees=(4,))
    found = faults(problem, hand_made(problem, [(0, 0, (0,))]))
    assert any(f"{tokens} tokens leave some of its 4 ranks without work" in fault for fault in found) == refused
    assert bool(found) == refused


def test_groups_on_one_rank_are_refused_wherever_they_overlap() -> None:
    problem = small_problem([300, 150], degrees=(2, 4))
    for start, clash in ((0, True), (2, True), (4, False), (6, False)):
        found = faults(problem, hand_made(problem, [(0, 1, (0,)), (start, 0, (1,))]))
        assert any("at once" in fault for fault in found) == clash


def test_ranks_in_another_order_are_refused(plan: Plan) -> None:
    at = next(i for i, group in enumerate(plan.micro_batches[0].groups) if group.degree > 1)
    groups = list(plan.micro_batches[0].groups)
    groups[at] = replace(groups[at], ranks=groups[at].ranks[::-1])
    found = faults(PROBLEM, with_batch(plan, replace(plan.micro_batches[0], groups=tuple(groups))))
    assert any("side by side" in fault for fault in found)
    for ranks in ((), groups[at].ranks[:-1], (*groups[at].ranks, 15)):
        groups[at] = replace(groups[at], ranks=ranks)
        found = faults(PROBLEM, with_batch(plan, replace(plan.micro_batches[0], groups=tuple(groups))))
        assert any("side by side" in fault for fault in found)


def test_documents_that_change_groups_are_noticed_by_their_figures(plan: Plan) -> None:
    one, two, *rest = plan.micro_batches[0].groups
    assert sum(PROBLEM.lengths[i] for i in one.documents) != sum(PROBLEM.lengths[i] for i in two.documents)
    swapped = (replace(one, documents=two.documents), replace(two, documents=one.documents), *rest)
    found = faults(PROBLEM, with_batch(plan, replace(plan.micro_batches[0], groups=swapped)))
    assert any("group 0: holds" in fault for fault in found)
    assert any("group 1: holds" in fault for fault in found)


@pytest.mark.parametrize("documents", [(0, 1), (0, 1, 2, 2), (0, 1, 2, 3), (0, 1, 2, -1), ()])
def test_documents_missing_twice_or_unknown_are_refused_before_anything_else(documents: tuple[int, ...]) -> None:
    problem = small_problem([100, 90, 80], degrees=(1, 4))
    good = hand_made(problem, [(0, 1, (0, 1, 2))])
    group = replace(good.micro_batches[0].groups[0], documents=documents)
    found = faults(problem, replace(good, micro_batches=(PlannedMicroBatch((group,), group.seconds),)))
    assert found
    assert all("document" in fault for fault in found)


def test_every_plan_is_checked_before_anyone_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Plan] = []

    def refuse(problem: Problem, planned: Plan) -> None:
        seen.append(planned)
        raise PlanRefusedError(("by the test",))

    monkeypatch.setattr("seqpar.planner.solve.check", refuse)
    with pytest.raises(PlanRefusedError, match="by the test"):
        plan_batch(PROBLEM, Options(seconds=0.05, exact=False))
    assert seen[0].num_documents == len(PROBLEM.lengths)


def test_a_plan_of_no_micro_batches_is_refused(plan: Plan) -> None:
    with pytest.raises(PlanRefusedError, match="placed 0 times") as refused:
        check(PROBLEM, replace(plan, micro_batches=()))
    assert len(refused.value.faults) == 1


def test_a_refusal_counts_the_other_faults(plan: Plan) -> None:
    with pytest.raises(PlanRefusedError, match="and 1 more faults"):
        check(PROBLEM, replace(plan, model="a", cluster="b"))


@pytest.mark.parametrize("memory", [110, 10])
def test_a_plan_of_what_cannot_be_planned_is_refused_and_no_accident(memory: int) -> None:
    problem = Problem((300, 5), Cluster("c", 2, 2, memory), CostModel("small", (kind(1), kind(2)), 1.0, 10.0))
    with pytest.raises(PlanRefusedError):
        check(problem, hand_made(problem, [(0, 1, (0, 1))]))


def test_a_bound_may_be_anything_between_what_is_easy_to_see_and_the_step() -> None:
    problem = small_problem([190, 10, 10], degrees=(1, 2))
    good = hand_made(problem, [(0, 1, (0,)), (2, 0, (1, 2))])
    longest = oracle.group_seconds(problem, 1, [0])
    assert good.step_seconds == pytest.approx(longest)
    assert not faults(problem, replace(good, lower_bound_seconds=longest * (1 - 1e-7)))
    assert faults(problem, replace(good, lower_bound_seconds=longest * (1 - 1e-5)))
    assert faults(problem, replace(good, lower_bound_seconds=longest * (1 + 1e-5)))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(problems(most=10))
def test_the_figures_of_a_plan_are_those_of_the_formulas(problem: Problem) -> None:
    plan = plan_batch(problem, Options(seconds=0.05, exact=False))
    numbers = {(row.degree, row.transport): number for number, row in enumerate(problem.costs.kinds)}
    for group in itertools.chain(*(batch.groups for batch in plan.micro_batches)):
        seconds = oracle.group_seconds(problem, numbers[group.degree, group.transport], group.documents)
        assert group.seconds == pytest.approx(seconds)
        assert group.tokens == sum(problem.lengths[document] for document in group.documents)
        assert list(group.documents) == sorted(group.documents)
        assert group.memory_bytes <= problem.cluster.memory_bytes
    for batch in plan.micro_batches:
        assert list(batch.groups) == sorted(batch.groups, key=lambda group: group.ranks)
    assert [batch.seconds for batch in plan.micro_batches] == sorted(
        (batch.seconds for batch in plan.micro_batches), reverse=True
    )


def test_a_message_that_hides_is_recomputed_document_by_document() -> None:
    ring = GroupKind(2, "ring", 1e-6, 1e-4, 0.05, 2e-4, 4e-6)
    problem = Problem((180, 20), small_cluster(8, 4), CostModel("ring", (ring,), 1.0, 10.0))
    good = hand_made(problem, [(0, 0, (0, 1))])
    check(problem, good)
    group = good.micro_batches[0].groups[0]
    assert group.communication_seconds == pytest.approx(2e-4 * 20 - 4e-6 * 400)
    netted = max(0.0, 2e-4 * 200 - 4e-6 * (180**2 + 20**2))
    wrong = replace(group, communication_seconds=netted)
    assert any(
        "of communication" in fault
        for fault in faults(problem, with_batch(good, PlannedMicroBatch((wrong,), group.seconds)))
    )
