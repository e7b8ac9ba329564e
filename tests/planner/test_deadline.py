"""The deadline is kept, work is counted in units, and a plan says what stage found it and what stopped it."""

import time

import pytest

from seqpar.planner import Options, check, plan_batch
from seqpar.planner.bounds.bounds import closed_form
from seqpar.planner.exact.milp import Outcome
from seqpar.planner.problem.costs import table
from seqpar.planner.search.static import best_plan, static_plans
from seqpar.planner.work import Work, packings, relaxations
from tests.planner.problems import lognormal, published, small_problem


@pytest.mark.parametrize("seconds", [0.05, 0.3])
def test_two_thousand_documents_are_planned_in_a_small_multiple_of_the_time(seconds: float) -> None:
    problem = published(lognormal(2000, 700, 1.8, 1))
    started = time.process_time()
    plan = plan_batch(problem, Options(seconds=seconds))
    assert time.process_time() - started < 1.0 + 3 * seconds  # of this process alone: others may be at work
    check(problem, plan)
    assert plan.stopped_by in ("work", "deadline")
    assert plan.stage
    assert plan.planning_seconds > 0
    static = best_plan(static_plans(problem, table(problem))).schedule.step_seconds
    assert plan.step_seconds <= static * (1 + 1e-9)


def test_more_time_is_never_worse_by_much_and_mostly_better() -> None:
    problem = published(lognormal(400, 900, 1.8, 9))
    short, long = (plan_batch(problem, Options(seconds=seconds)) for seconds in (0.01, 1.0))
    assert long.step_seconds <= short.step_seconds * (1 + 1e-9)
    assert long.gap < short.gap


def test_no_time_at_all_gives_a_static_plan_or_better_and_says_deadline() -> None:
    problem = published(lognormal(100, 900, 1.8, 9))
    plan = plan_batch(problem, Options(seconds=1e-9))
    check(problem, plan)
    assert plan.stopped_by == "deadline"
    assert plan.step_seconds <= min(row.seconds for row in plan.baselines) * (1 + 1e-9)


@pytest.mark.parametrize(("exact", "stage"), [(True, "exact"), (False, "")])
def test_the_exact_program_is_used_only_where_it_may_be(exact: bool, stage: str) -> None:
    pytest.importorskip("highspy")
    pytest.importorskip("pulp")
    # Greedy packing loses here: see test_relaxation.
    problem = small_problem([74, 71, 69, 63, 45], devices=2, node=2, degrees=(1, 2))
    plan = plan_batch(problem, Options(seconds=5.0, exact=exact))
    check(problem, plan)
    assert ("exact" in plan.stage or "exact" in plan.active_bound) == exact
    assert stage in f"{plan.stage} {plan.active_bound}"


def test_shares_count_units_and_the_clock_ends_them() -> None:
    work = Work(time.monotonic() + 60)
    share = work.take(3)
    assert [share() for _ in range(5)] == [True, True, True, False, False]
    assert not work.late
    early = work.take(3, before_end=120)
    assert not early()
    assert work.late
    assert work.take(-5).units == 0
    assert 0 < work.seconds_left <= 60
    assert Work(time.monotonic() - 1).seconds_left == 0


def test_seconds_buy_units_in_proportion_and_fewer_of_larger_ones() -> None:
    assert packings(2.0, 100, 64) == pytest.approx(2 * packings(1.0, 100, 64), abs=1)
    assert packings(1.0, 100, 64) > packings(1.0, 1000, 64) > packings(1.0, 1000, 1024) > 0
    assert packings(0.0, 1, 1) == relaxations(0.0, 1, 1) == 0
    assert relaxations(1.0, 7, 1) > relaxations(1.0, 14, 1) > relaxations(1.0, 14, 4) > 0
    assert relaxations(2.0, 7, 4) == pytest.approx(2 * relaxations(1.0, 7, 4), abs=1)


def test_plans_by_another_seed_are_marked_with_it() -> None:
    plans = [plan_batch(published(lognormal(60, 2000, 1.5, 1)), Options(seconds=0.2, seed=seed)) for seed in (0, 9)]
    assert [plan.seed for plan in plans] == [0, 9]
    assert plans[0].digest != plans[1].digest


@pytest.mark.parametrize(("late", "stopped_by"), [(True, "deadline"), (False, "work")])
def test_an_exact_program_that_runs_out_of_time_is_a_deadline(
    monkeypatch: pytest.MonkeyPatch, late: bool, stopped_by: str
) -> None:
    pytest.importorskip("highspy")
    pytest.importorskip("pulp")
    problem = small_problem([74, 71, 69, 63, 45], devices=2, node=2, degrees=(1, 2))
    nothing = Outcome(None, float("-inf"), False, "none", late)
    monkeypatch.setattr("seqpar.planner.solve.whole_step", lambda rows, *_: closed_form(rows))  # leaves a gap
    monkeypatch.setattr("seqpar.planner.solve.subset_programs", lambda *_: 0)
    monkeypatch.setattr("seqpar.planner.solve.solve_exactly", lambda *_: nothing)
    plan = plan_batch(problem, Options(seconds=20.0))
    check(problem, plan)
    assert plan.stopped_by == stopped_by
    assert plan.gap > 0
