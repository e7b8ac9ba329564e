"""Bounds are below every plan, the better one is never the lower one, and the exact program finds the shortest plan."""

import importlib.util
import itertools
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqpar.planner import Problem
from seqpar.planner.bounds.bounds import area, closed_form, whole_step
from seqpar.planner.bounds.fluid import Box, classes, fluid_seconds
from seqpar.planner.exact.milp import solve_exactly
from seqpar.planner.exact.solver import INFINITY, Limits, Program, solve, solver_name
from seqpar.planner.problem.costs import table
from seqpar.planner.search.schedule import Schedule, busy, schedule
from seqpar.planner.search.static import best_plan, static_plans
from seqpar.planner.work import Work
from tests.planner import oracle
from tests.planner.problems import lognormal, problems, published, small_problem

needs_highs = pytest.mark.skipif(importlib.util.find_spec("highspy") is None, reason="highspy is not installed")
needs_solver = pytest.mark.skipif(solver_name() is None, reason="no MILP solver is installed")


def nested(problem: Problem) -> bool:
    """Whether each degree divides the next, so that any groups that fit go side by side."""
    degrees = sorted({kind.degree for kind in problem.costs.kinds})
    return all(b % a == 0 for a, b in itertools.pairwise([*degrees, problem.cluster.devices_per_node]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems(most=4), st.sampled_from([0, 3, 20]), st.sampled_from([1.0, 1.1, 1.5]))
def test_no_bound_is_above_the_shortest_plan(problem: Problem, relaxations: int, above: float) -> None:
    shortest = oracle.shortest_step(problem)
    if shortest == float("inf"):
        return
    rows = table(problem)
    easy = closed_form(rows).seconds
    bound = whole_step(rows, shortest * above, Work(float("inf")).take(relaxations)).seconds
    assert easy <= shortest * (1 + 1e-9)
    assert bound <= shortest * (1 + 1e-9)
    assert bound >= min(easy, shortest) * (1 - 1e-9)


@needs_highs
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems(most=4))
def test_the_fluid_relaxation_of_one_micro_batch_is_below_the_shortest(problem: Problem) -> None:
    shortest = oracle.shortest_micro_batch(problem, range(len(problem.lengths)))
    if shortest == float("inf"):
        return
    rows = table(problem)
    low = float(rows.fixed.min())
    assert fluid_seconds(rows, classes(rows), (Box(low, shortest * 1.000001, 1),)) <= shortest * (1 + 1e-6)


@needs_highs
def test_more_relaxations_give_a_better_bound() -> None:
    rows = table(published(lognormal(200, 700, 1.8, 3)))
    step = best_plan(static_plans(published(lognormal(200, 700, 1.8, 3)), rows)).schedule.step_seconds
    found = [whole_step(rows, step, Work(float("inf")).take(count)).seconds for count in (0, 8, 40)]
    assert found == sorted(found)
    assert found[-1] > found[0] * 1.005


def test_the_closed_form_says_which_document_is_the_limit() -> None:
    rows = table(small_problem([790, 1, 1], devices=16))
    assert closed_form(rows).reason == "limited by the longest document, 790 tokens"
    many = table(small_problem([50] * 40))
    assert "3 micro-batches" in closed_form(many).reason
    assert closed_form(many).seconds == pytest.approx(area(many, 3))


@needs_solver
@pytest.mark.parametrize("seed", range(6))
def test_the_exact_program_finds_the_shortest_plan(seed: int) -> None:
    draw = random.Random(seed)
    problem = small_problem([draw.randint(20, 390) for _ in range(5)], devices=4)
    rows = table(problem)
    start = best_plan(static_plans(problem, rows)).schedule
    outcome = solve_exactly(rows, start, 5, Limits(100_000))
    shortest = oracle.shortest_step(problem)
    assert outcome.optimal
    assert outcome.schedule is not None
    assert outcome.schedule.step_seconds == pytest.approx(shortest, rel=1e-6)
    assert outcome.bound == pytest.approx(shortest, rel=1e-6)


@needs_solver
@pytest.mark.parametrize("seed", range(4))
def test_the_exact_program_leaves_no_rank_without_a_token(seed: int) -> None:
    draw = random.Random(seed)
    problem = small_problem([draw.randint(1, 6) for _ in range(4)], devices=4)
    rows = table(problem)
    start = schedule(rows, [[(0, [row]) for row in range(4)]])
    outcome = solve_exactly(rows, start, 4, Limits(100_000))
    assert outcome.schedule is not None
    assert outcome.schedule.step_seconds == pytest.approx(oracle.shortest_step(problem), rel=1e-6)
    assert busy(rows, outcome.schedule)


@needs_solver
def test_documents_of_one_length_are_one_variable_and_none_is_lost() -> None:
    problem = small_problem([90, 90, 90, 90, 90, 40, 40])
    rows = table(problem)
    start = best_plan(static_plans(problem, rows)).schedule
    outcome = solve_exactly(rows, start, 1, Limits(10_000))
    assert outcome.schedule is not None
    placed = [row for groups in outcome.schedule.micro_batches for _, members in groups for row in members]
    assert sorted(placed) == list(range(7))


@needs_solver
def test_a_node_limit_stops_the_solver_with_the_start_it_was_given() -> None:
    draw = random.Random(1)
    problem = small_problem([draw.randint(20, 390) for _ in range(10)])
    rows = table(problem)
    start: Schedule = best_plan(static_plans(problem, rows)).schedule
    outcomes = [solve_exactly(rows, start, len(start.seconds), Limits(1)) for _ in range(2)]
    for outcome in outcomes:
        assert not outcome.optimal
        assert not outcome.out_of_time
        assert outcome.schedule is not None
        assert outcome.schedule.step_seconds <= start.step_seconds * (1 + 1e-6)
        assert outcome.bound <= outcome.schedule.step_seconds
    assert outcomes[0] == outcomes[1]


@needs_solver
@pytest.mark.parametrize("name", ["HiGHS", "PULP_CBC_CMD"])
def test_every_solver_gives_the_same_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import pulp

    if name not in pulp.listSolvers(onlyAvailable=True):
        pytest.skip(f"{name} is not installed")
    monkeypatch.setattr("seqpar.planner.exact.solver.solver_name", lambda: name)
    program = Program()
    x, y = program.variable(-1.0, 0.0, 10.0, True), program.variable(-2.0, 0.0, INFINITY, True)
    program.row(-INFINITY, 7.5, {x: 1.0, y: 3.0})
    program.row(0.0, 0.0, {x: 1.0, y: -1.0})
    answer = solve(program, None, Limits(100))
    assert answer.optimal
    assert answer.values == pytest.approx((1.0, 1.0))
    assert answer.bound == pytest.approx(-3.0)
    program.row(5.0, INFINITY, {x: 1.0})
    impossible = solve(program, None, Limits(100))
    assert impossible.values is None
    assert not impossible.optimal
