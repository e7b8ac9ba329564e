"""Work is counted in units, a guard stands behind it, and a plan says what stage found it and what stopped it."""

import itertools
import sys
from collections.abc import Sequence
from types import FrameType

import pytest

from seqpar.planner import Options, Problem, check, plan_batch
from seqpar.planner.bounds.bounds import closed_form
from seqpar.planner.exact.milp import Outcome
from seqpar.planner.problem.costs import Floats, Table, table
from seqpar.planner.search.batching import fewest_micro_batches, time_optimal
from seqpar.planner.search.pack import pack
from seqpar.planner.search.schedule import MicroBatch
from seqpar.planner.search.static import best_plan, static_plans
from seqpar.planner.work import Work, packings, relaxations
from tests.planner.problems import lognormal, published, small_problem


@pytest.mark.parametrize("seconds", [0.05, 0.3])
def test_two_thousand_documents_are_planned_with_the_work_that_the_seconds_buy(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    problem = published(lognormal(2000, 700, 1.8, 1))
    packed = counted(monkeypatch)
    plan = plan_batch(problem, Options(seconds=seconds))
    rows = table(problem)
    groups = rows.devices * fewest_micro_batches(rows)
    individual = int((rows.tokens > rows.capacity / 6).sum())
    sure, of_static_plans = 20, 8 * 3 * len(rows.degrees)
    assert len(packed) <= packings(seconds, individual, groups) + sure + of_static_plans
    check(problem, plan)
    assert plan.stopped_by == "work"
    assert plan.stage
    assert plan.planning_seconds > 0
    static = best_plan(static_plans(problem, table(problem))).schedule.step_seconds
    assert plan.step_seconds <= static * (1 + 1e-9)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets an entry for every packing from now on."""
    packed: list[int] = []

    def counting(rows: Table, deadlines: Sequence[float], bias: Floats | None = None) -> tuple[MicroBatch, ...] | None:
        packed.append(len(deadlines))
        return pack(rows, deadlines, bias)

    monkeypatch.setattr("seqpar.planner.search.squeeze.pack", counting)
    return packed


def test_the_clock_of_a_busy_machine_changes_nothing() -> None:
    """Twice as much of the processor's time at every look, as where threads share a core: the same plan."""
    problem = published(lognormal(400, 900, 1.8, 9))
    clocks = [itertools.count(0.0, step) for step in (0.01, 0.02)]
    plans = [plan_batch(problem, Options(seconds=0.3), clock.__next__) for clock in clocks]
    assert plans[0].to_json() == plans[1].to_json()
    assert plans[0].stopped_by == "work" and not plans[0].note
    assert all(next(clock) > 0.1 for clock in clocks), "the guard did look at its clock"


def test_the_guard_ends_planning_and_says_how_much_was_done() -> None:
    """A clock by which everything takes for ever: packings that are sure, and nothing else."""
    problem = published(lognormal(400, 900, 1.8, 9))
    plan = plan_batch(problem, Options(seconds=1.0), itertools.count(0.0, 100.0).__next__)
    check(problem, plan)
    assert plan.stopped_by == "deadline"
    assert plan.note.startswith("the guard of 40 s of the processor's time ended planning: ")
    assert ", 20 of 54 packings, 0 of 109 packings to squeeze, 0 of 36 packings to shake, " in plan.note
    assert plan.note.endswith(" done")


def test_more_time_is_never_worse_by_much_and_mostly_better() -> None:
    problem = published(lognormal(400, 900, 1.8, 9))
    short, long = (plan_batch(problem, Options(seconds=seconds)) for seconds in (0.01, 1.0))
    assert long.step_seconds <= short.step_seconds * (1 + 1e-9)
    assert long.gap < short.gap


def test_no_work_at_all_gives_a_static_plan_or_better() -> None:
    problem = published(lognormal(100, 900, 1.8, 9))
    plan = plan_batch(problem, Options(seconds=1e-9))
    check(problem, plan)
    assert plan.stopped_by == "work"
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


def test_shares_count_units_and_the_guard_ends_them() -> None:
    now = [0.0]
    work = Work(60.0, lambda: now[0])
    share = work.take(3)
    assert [share() for _ in range(5)] == [True, True, True, False, False]
    assert not work.late and not work.note
    early, last = work.take(9, "tries", keep=0.5), work.take(9, "more")
    assert early() and last()
    now[0] = 31.0
    assert not early() and not early()
    assert work.late and work.note == ("the guard of 60 s of the processor's time ended planning: 1 of 9 tries done")
    assert last() and work.seconds_left == pytest.approx(29)
    now[0] = 61.0
    sure = work.take(5, "tries", sure=2)
    assert [sure() for _ in range(4)] == [True, True, False, False]
    assert work.take(-5).units == 0
    assert work.seconds_left == 0


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
    nothing = Outcome(None, float("-inf"), False, "none", late, 7)
    monkeypatch.setattr("seqpar.planner.solve.whole_step", lambda rows, *_: closed_form(rows))  # leaves a gap
    monkeypatch.setattr("seqpar.planner.solve.subset_programs", lambda *_: 0)
    monkeypatch.setattr("seqpar.planner.solve.solve_exactly", lambda *_: nothing)
    plan = plan_batch(problem, Options(seconds=20.0))
    check(problem, plan)
    assert plan.stopped_by == stopped_by
    assert ("7 of " in plan.note and "looks at the exact program done" in plan.note) == late
    assert plan.gap > 0


def calls(problem: Problem, seconds: float) -> int:
    """How many functions of Python are called to plan this, which no clock changes."""
    count = itertools.count()

    def counting(frame: FrameType, event: str, what: object) -> None:
        if event == "call":
            next(count)

    sys.setprofile(counting)
    try:
        plan_batch(problem, Options(seconds=seconds, exact=False), lambda: 0.0)
    finally:
        sys.setprofile(None)
    return next(count)


def test_devices_that_nobody_needs_cost_nothing() -> None:
    few, many = (calls(published((100, 50), devices=devices), 0.05) for devices in (1024, 102_400))
    assert many <= 1.3 * few


def test_ten_times_the_documents_are_at_most_thirteen_times_the_work_where_seconds_buy_none() -> None:
    plan_batch(published((5, 6)))  # what is imported at first use does not count
    few, many = (calls(published(lognormal(count, 2000, 1.5, 3)), 1e-6) for count in (600, 6000))
    assert many <= 13 * few


def test_neighbours_in_runs_predict_nearly_what_they_predict_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(published(lognormal(3000, 200, 1.5, 3)))
    counts = [fewest_micro_batches(rows) + more for more in range(3)]
    alone = [sum(seconds) for _, seconds in time_optimal(rows, counts)]
    monkeypatch.setattr("seqpar.planner.search.batching._RUNS", 400)
    assert alone and [sum(seconds) for _, seconds in time_optimal(rows, counts)] == pytest.approx(alone, rel=0.02)
