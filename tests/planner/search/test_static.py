"""Static plans: one degree for all, compared with the best that one degree can do; and the baselines of a plan."""

import random

import pytest

from seqpar.planner import CostModel, Options, Problem, plan_batch
from seqpar.planner.problem.costs import table
from seqpar.planner.search.static import StaticPlan, best_plan, context_plan, static_plans
from tests.planner import oracle
from tests.planner.problems import kind, lognormal, published, small_cluster, small_problem


@pytest.mark.parametrize("seed", range(8))
def test_no_static_plan_is_shorter_than_the_best_of_its_degree(seed: int) -> None:
    draw = random.Random(seed)
    problem = small_problem([draw.randint(5, 150) for _ in range(5)], devices=4, degrees=(1, 2, 4))
    rows = table(problem)
    for static in static_plans(problem, rows):
        degree = int(rows.degrees[static.kind])
        only = small_problem(list(problem.lengths), devices=4, degrees=(degree,))
        shortest = oracle.shortest_step(only)
        assert shortest * (1 - 1e-9) <= static.schedule.step_seconds <= shortest * 1.25


def test_there_is_a_static_plan_for_each_degree_that_holds_the_longest_document() -> None:
    for longest, expected in ((90, [1, 2, 4, 8]), (101, [2, 4, 8]), (400, [4, 8]), (401, [8])):
        problem = small_problem([longest, 20])
        rows = table(problem)
        assert [int(rows.degrees[static.kind]) for static in static_plans(problem, rows)] == expected


@pytest.mark.parametrize(("degree", "groups"), [(3, 2), (2, 4), (1, 8), (8, 1)])
def test_a_degree_uses_the_devices_that_its_whole_groups_fill(degree: int, groups: int) -> None:
    # Four ranks a node: a node has room for one group of 3, and two nodes for two.
    problem = small_problem([80 * degree] * (2 * groups), degrees=(degree,))
    rows = table(problem)
    (static,) = static_plans(problem, rows)
    assert [len(batch) for batch in static.schedule.micro_batches] == [groups, groups]


@pytest.mark.parametrize(
    ("context", "longest", "expected"),
    [(0, 90, 1), (0, 150, 2), (150, 90, 2), (300, 90, 4), (500, 90, 8), (9000, 90, 8)],
)
def test_the_fixed_choice_holds_the_context_and_the_longest_document(context: int, longest: int, expected: int) -> None:
    costs = CostModel("c", tuple(kind(degree) for degree in (1, 2, 4, 8)), 1.0, 10.0, context)
    problem = Problem((longest, 20), small_cluster(), costs)
    rows = table(problem)
    plans = static_plans(problem, rows)
    chosen = context_plan(problem, plans)
    assert int(rows.degrees[chosen.kind]) == expected
    assert best_plan(plans).schedule.step_seconds <= chosen.schedule.step_seconds


def test_the_best_static_plan_is_the_shortest() -> None:
    problem = published(lognormal(80, 2000, 1.0, 1))
    plans: tuple[StaticPlan, ...] = static_plans(problem, table(problem))
    assert best_plan(plans).schedule.step_seconds == min(plan.schedule.step_seconds for plan in plans)
    assert best_plan(plans[::-1]) is best_plan(plans)


def test_baselines_name_the_fixed_choice_the_best_and_every_degree() -> None:
    problem = published(lognormal(80, 2000, 1.0, 1))
    plan = plan_batch(problem, Options(seconds=0.2))
    by_name = {row.name: row for row in plan.baselines}
    degrees = [row for row in plan.baselines if row.name == "degree"]
    assert list(by_name) == ["static", "best_static", "degree"]
    assert by_name["static"].degree == 64  # 384,000 tokens of context
    assert by_name["best_static"].seconds == min(row.seconds for row in degrees)
    assert [row.degree for row in degrees] == sorted({row.degree for row in degrees})
    assert plan.step_seconds <= by_name["best_static"].seconds
    rows = table(problem)
    for static, row in zip(static_plans(problem, rows), degrees):
        assert row.seconds == pytest.approx(static.schedule.step_seconds)
        assert row.num_micro_batches == len(static.schedule.seconds)


def test_groups_of_a_plan_go_from_the_first_rank_to_the_last_also_where_they_were_placed_otherwise() -> None:
    # Two groups of 7 leave the last rank of each node of 8 to the short documents.
    costs = CostModel("c", (kind(1), kind(7)), 1.0, 10.0)
    problem = Problem((690, 690, 90, 90), small_cluster(16, 8), costs)
    (batch,) = plan_batch(problem, Options(seconds=0.2)).micro_batches
    assert [group.ranks[0] for group in batch.groups] == [0, 7, 8, 15]
