"""Plans are valid, optimal where they say so, never slower than a static plan, and the same for the same input."""

import itertools
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqpar.planner import InfeasibleError, Options, Plan, Problem, check, plan_batch
from seqpar.planner.problem.costs import table
from seqpar.planner.search.static import best_plan, static_plans
from tests.planner import oracle
from tests.planner.problems import lognormal, problems, published, small_problem, wikipedia

QUICK = Options(seconds=0.2)


def examples(count: int) -> settings:
    """So many examples, each of which may take a moment."""
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def shapes(plan: Plan) -> list[list[int]]:
    return [sorted((group.degree for group in batch.groups), reverse=True) for batch in plan.micro_batches]


def test_the_published_case_is_solved_as_published() -> None:
    plan = plan_batch(published([100_000, 48_000, 48_000, 48_000, 48_000]))
    assert shapes(plan) == [[32, 8, 8, 8, 8]]
    assert plan.step_seconds == pytest.approx(3.8589, abs=5e-5)
    assert plan.gap == 0
    assert "proven optimal" in plan.active_bound
    halves = [row.seconds for row in plan.baselines if row.name == "degree" and row.degree == 32]
    assert halves == [pytest.approx(5.0091, abs=5e-5)]


@pytest.mark.parametrize("seed", range(8))
def test_small_plans_are_as_short_as_the_shortest_of_all(seed: int) -> None:
    draw = random.Random(seed)
    problem = small_problem([draw.randint(1, 380) for _ in range(5)], devices=4)
    plan = plan_batch(problem, Options(seconds=3.0))
    assert plan.step_seconds == pytest.approx(oracle.shortest_step(problem), rel=1e-6)
    assert plan.gap == 0


@pytest.mark.parametrize("seed", range(4))
def test_plans_under_tight_memory_are_as_short_as_the_shortest_of_all(seed: int) -> None:
    draw = random.Random(100 + seed)
    lengths = [draw.randint(120, 190) for _ in range(4)]
    problem = small_problem([*lengths, 2 * 400 - 10 - sum(lengths)], devices=4)
    plan = plan_batch(problem, Options(seconds=3.0))
    assert plan.step_seconds == pytest.approx(oracle.shortest_step(problem), rel=1e-6)
    assert plan.gap == 0


@examples(60)
@given(problems())
def test_every_plan_is_valid_and_above_its_bound(problem: Problem) -> None:
    plan = plan_batch(problem, QUICK)
    check(problem, plan)
    documents = sorted(
        document for batch in plan.micro_batches for group in batch.groups for document in group.documents
    )
    assert documents == list(range(len(problem.lengths)))
    assert plan.lower_bound_seconds <= plan.step_seconds
    for rank in range(problem.cluster.devices):
        assert len(plan.groups_of(rank)) == len(plan.micro_batches)


@examples(15)
@given(problems(most=4))
def test_no_bound_is_above_the_shortest_plan(problem: Problem) -> None:
    plan = plan_batch(problem, Options(seconds=0.5))
    nested = sorted({kind.degree for kind in problem.costs.kinds})
    if all(b % a == 0 for a, b in itertools.pairwise([*nested, problem.cluster.devices_per_node])):
        shortest = oracle.shortest_step(problem)
        assert plan.lower_bound_seconds <= shortest * (1 + 1e-6)
        assert plan.step_seconds >= shortest * (1 - 1e-9)


@examples(25)
@given(problems(most=30), st.integers(0, 3))
def test_the_same_problem_and_seed_give_the_same_bytes(problem: Problem, seed: int) -> None:
    options = Options(seconds=0.2, seed=seed)
    hurried = itertools.count(0.0, 1e-4)  # a clock that goes on at every look, and one that stands
    first, second = (plan_batch(problem, options, clock) for clock in (lambda: next(hurried), lambda: 0.0))
    assert first.stopped_by == second.stopped_by == "work"
    assert first.to_json() == second.to_json()
    assert first == second
    assert hash(first) == hash(second)
    assert first.digest == second.digest


def random_batch(seed: int) -> Problem:
    draw = random.Random(seed)
    sigma, median, count = draw.uniform(0.5, 2.2), draw.uniform(200, 4000), draw.choice([1, 3, 9, 20, 60, 150])
    devices = draw.choice([8, 16, 64])
    context = {8: 26_000, 16: 80_000, 64: 384_000}[devices]
    return published(lognormal(count, median, sigma, seed, context), devices=devices)


def slower_than_static(problem: Problem, seconds: float) -> float:
    plan = plan_batch(problem, Options(seconds=seconds, exact=False))
    rows = table(problem)
    return plan.step_seconds / best_plan(static_plans(problem, rows)).schedule.step_seconds


@pytest.mark.sampled(2)
@pytest.mark.parametrize("seed", range(40))
def test_never_slower_than_the_best_static_plan(seed: int) -> None:
    assert slower_than_static(random_batch(seed), 0.1) <= 1 + 1e-9


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_never_slower_than_the_best_static_plan_on_1000_batches() -> None:
    worst = max(slower_than_static(random_batch(seed), 0.1) for seed in range(1000))
    assert worst <= 1 + 1e-9


def test_wikipedia_batches_come_close_to_the_bound() -> None:
    faster = []
    for batch in range(4):
        plan = plan_batch(published(wikipedia(batch)))
        assert plan.gap <= 0.08
        static = next(row for row in plan.baselines if row.name == "static")
        assert static.degree == 64
        faster.append(static.seconds / plan.step_seconds)
    assert sum(faster) / len(faster) >= 1.8


@pytest.mark.parametrize("wrong", [{"seconds": 0.0}, {"seconds": -1.0}, {"seconds": float("nan")}, {"seed": -1}])
def test_options_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Options(**wrong)  # type: ignore[arg-type]


def test_what_does_not_fit_is_explained() -> None:
    with pytest.raises(InfeasibleError, match=r"document 1 has 801 tokens: one device holds 100 tokens"):
        plan_batch(small_problem([10, 801, 900]))


def test_without_solvers_the_heuristic_plans_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seqpar.planner.solve.solver_name", lambda: None)
    monkeypatch.setattr("seqpar.planner.solve.lp_available", lambda: False)
    monkeypatch.setattr("seqpar.planner.bounds.bounds.lp_available", lambda: False)
    monkeypatch.setattr("seqpar.planner.solve.subset_programs", lambda *_: 0)
    problem = published([100_000, 48_000, 48_000, 48_000, 48_000])
    plan = plan_batch(problem)
    check(problem, plan)
    assert plan.step_seconds == pytest.approx(3.8589, abs=5e-5)
    assert 0 < plan.gap < 0.5
    assert "no MILP solver" in plan.note
    assert "closed form" in plan.note


def test_one_verdict_without_solvers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is proven in another way is proven: no note beside it that says the opposite."""
    for name in ("solve.solver_name", "exact.milp.solver_name", "exact.solver.solver_name"):
        monkeypatch.setattr(f"seqpar.planner.{name}", lambda: None, raising=False)
    for name in ("solve", "bounds.bounds"):
        monkeypatch.setattr(f"seqpar.planner.{name}.lp_available", lambda: False)
    proven = plan_batch(published([100_000, 48_000, 48_000, 48_000, 48_000]))
    assert (proven.gap, proven.note) == (0, "") and proven.active_bound.startswith("proven optimal")
    open_ = plan_batch(published(lognormal(120, 700, 1.8, 5)), Options(seconds=0.2))
    assert open_.gap > 0 and "no MILP solver" in open_.note and "proven optimal" not in open_.note + open_.active_bound


def test_a_guard_that_has_passed_still_gives_a_plan() -> None:
    problem = published(lognormal(200, 700, 1.8, 5))
    plan = plan_batch(problem, Options(seconds=1e-4), itertools.count(0.0, 100.0).__next__)
    check(problem, plan)
    assert plan.stopped_by == "deadline"
