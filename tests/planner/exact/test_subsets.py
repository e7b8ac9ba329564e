"""The program over subsets finds the shortest step of few documents, proves it, and says how far it got."""

import random

import pytest
from hypothesis import HealthCheck, given, settings

from seqpar.planner import Problem
from seqpar.planner.bounds.bounds import closed_form
from seqpar.planner.exact.subsets import solve_subsets
from seqpar.planner.problem.costs import table
from seqpar.planner.search.schedule import busy
from seqpar.planner.search.static import best_plan, static_plans
from seqpar.planner.work import Work, subset_programs
from tests.planner import oracle
from tests.planner.problems import problems, published, small_problem

ENDLESS = Work(float("inf"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems(most=5))
def test_no_schedule_is_shorter(problem: Problem) -> None:
    shortest = oracle.shortest_step(problem)
    if shortest == float("inf"):
        return
    found = solve_subsets(table(problem), shortest * 1.5, ENDLESS.take(10_000))
    assert found.optimal
    assert found.bound <= shortest * (1 + 1e-9)  # without places for the groups it may be shorter still
    assert found.schedule is not None and found.schedule.step_seconds == pytest.approx(found.bound)
    assert busy(table(problem), found.schedule)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_shortest_step_where_degrees_are_nested(seed: int) -> None:
    draw = random.Random(seed)
    problem = small_problem([draw.randint(1, 380) for _ in range(5)], devices=4)
    rows = table(problem)
    known = best_plan(static_plans(problem, rows)).schedule.step_seconds
    found = solve_subsets(rows, known, ENDLESS.take(10_000))
    best = known if found.schedule is None else found.schedule.step_seconds
    assert best == pytest.approx(oracle.shortest_step(problem), rel=1e-6)
    assert solve_subsets(rows, best, ENDLESS.take(10_000)).schedule is None


def test_little_work_still_gives_a_bound() -> None:
    rows = table(published([90_000, 70_000, 52_000, 41_000, 33_000, 30_000, 21_000, 18_000, 9_000]))
    bounds = [solve_subsets(rows, 60.0, ENDLESS.take(programs)) for programs in (0, 5, 15, 10_000)]
    assert [found.optimal for found in bounds] == [False, False, False, True]
    assert [found.bound for found in bounds] == sorted(found.bound for found in bounds)
    assert bounds[-1].bound >= closed_form(rows).seconds * (1 - 1e-9)


def test_many_documents_are_not_tried() -> None:
    assert subset_programs(1.0, 12) > 0
    assert subset_programs(1.0, 15) == subset_programs(1.0, 5000) == subset_programs(0.1, 13) == 0
