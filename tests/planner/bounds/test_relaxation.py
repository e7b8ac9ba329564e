"""Relaxations and the exact program against every plan there is: hundreds of small problems of every kind."""

import importlib.util
import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqpar.planner import Cluster, CostModel, GroupKind, Options, Problem, check, plan_batch
from seqpar.planner.bounds.bounds import area, closed_form, shortest_with, whole_step
from seqpar.planner.bounds.fluid import Box, classes, fluid_seconds, relaxed_step
from seqpar.planner.bounds.lp import INFINITY, LinearProgram
from seqpar.planner.exact.milp import size, solve_exactly
from seqpar.planner.exact.solver import Limits, solver_name
from seqpar.planner.problem.costs import table
from seqpar.planner.search.schedule import Schedule, busy, schedule
from seqpar.planner.search.static import best_plan, static_plans
from seqpar.planner.work import Work
from tests.planner import oracle
from tests.planner.problems import lognormal, problems, published, small_problem

needs_highs = pytest.mark.skipif(importlib.util.find_spec("highspy") is None, reason="highspy is not installed")
needs_solver = pytest.mark.skipif(solver_name() is None, reason="no MILP solver is installed")


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


@st.composite
def hard_problems(draw: st.DrawFn, most: int = 4) -> Problem:
    """Small problems where relaxations could go wrong: documents next to a half or third of a group, costs with and
    without a square, messages that hide behind long documents, latencies, and odd degrees."""
    node, devices = draw(st.sampled_from([(2, 2), (3, 3), (4, 4), (3, 6), (6, 6)]))
    capacity = draw(st.sampled_from([12, 30, 100]))
    places = [degree for degree in range(2, devices + 1) if Cluster("c", devices, node, 1).stride(degree)]
    degrees = draw(st.lists(st.sampled_from(places), unique=True, max_size=2))
    quadratic, linear = draw(st.sampled_from([(0.0, 1e-3), (1e-5, 1e-3), (4e-5, 0.0), (1e-6, 1e-4)]))
    fixed, latency = draw(st.sampled_from([(0.05, 0.0), (0.01, 0.02), (1.0, 0.0), (1e-3, 1e-3)]))
    kinds = [GroupKind(1, "none", quadratic, linear, fixed)]
    for degree in degrees:
        message, hidden = draw(st.sampled_from([(0.0, 0.0), (3e-4, 0.0), (2e-3, 3e-5)]))
        kinds.append(GroupKind(degree, "ring" if hidden else "all_to_all", quadratic / degree, linear / degree, fixed,
                               message / degree, hidden / degree, latency * degree))  # fmt: skip
    largest = max(kind.degree for kind in kinds) * capacity
    near = [max(1, min(largest, degree * capacity // part + off))
            for degree in (1, *degrees) for part in (1, 2, 3) for off in (-1, 0, 1)]  # fmt: skip
    lengths = draw(st.lists(st.sampled_from(near) | st.integers(1, largest), min_size=1, max_size=most))
    cluster = Cluster("hard", devices, node, capacity + 10)
    return Problem(tuple(lengths), cluster, CostModel("hard", tuple(kinds), 1.0, 10.0))


def thrown(problem: Problem, seed: int) -> Schedule | None:
    """A plan that a search would not make: documents one by one into random groups, where they go."""
    rows, draw = table(problem), random.Random(seed)
    batches: list[list[tuple[int, list[int]]]] = []
    for row in range(rows.num_documents):
        kind = draw.choice([k for k in range(len(rows.degrees)) if rows.tokens[row] <= rows.degrees[k] * rows.capacity])
        places = [(batch, None) for batch in batches
                  if sum(int(rows.degrees[k]) for k, _ in batch) + rows.degrees[kind] <= rows.devices]  # fmt: skip
        joined = [(batch, group) for batch in batches for group in batch
                  if rows.tokens[[*group[1], row]].sum() <= rows.degrees[group[0]] * rows.capacity]  # fmt: skip
        batch, group = draw.choice([*places, *joined, (None, None)])
        if group is not None:
            group[1].append(row)
        elif batch is not None:
            batch.append((kind, [row]))
        else:
            batches.append([(kind, [row])])
    found = schedule(rows, batches)
    return found if busy(rows, found) else None


@examples(180)
@given(hard_problems(), st.sampled_from([0, 2, 12, 40]), st.sampled_from([1.0, 1.001, 1.2]))
def test_no_bound_is_above_the_shortest_plan_of_a_hard_problem(
    problem: Problem, relaxations: int, above: float
) -> None:
    shortest = oracle.shortest_step(problem)
    if shortest == INFINITY:
        return
    rows = table(problem)
    easy = closed_form(rows)
    found = whole_step(rows, shortest * above, Work(INFINITY).take(relaxations))
    assert easy.seconds <= shortest * (1 + 1e-9)
    assert min(easy.seconds, shortest) * (1 - 1e-9) <= found.seconds <= shortest * (1 + 1e-9)
    assert found.reason


@needs_highs
@examples(60)
@given(hard_problems(), st.sampled_from([2, 40]), st.sampled_from([1.0001, 1.3]))
def test_no_bound_is_above_the_shortest_plan_where_few_numbers_of_micro_batches_are_looked_at(
    problem: Problem, relaxations: int, above: float
) -> None:
    shortest = oracle.shortest_step(problem)
    if shortest == INFINITY:
        return
    rows, step = table(problem), shortest * above
    known = [relaxed_step(rows, classes(rows), count, step) for count in (1, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seqpar.planner.bounds.bounds._COUNTS", 1)  # all others are one case
        patch.setattr("seqpar.planner.bounds.fluid._ALONE", 1)
        assert whole_step(rows, step, Work(INFINITY).take(relaxations)).seconds <= shortest * (1 + 1e-9)
    assert whole_step(rows, step, Work(INFINITY).take(relaxations), known).seconds <= shortest * (1 + 1e-9)
    for relaxed in known:
        best = oracle.shortest_step_in(problem, relaxed.micro_batches)
        assert relaxed.seconds <= max(best, step) * (1 + 1e-6) or best >= step
        if relaxed.lasting:
            assert len(relaxed.lasting) == relaxed.micro_batches
            assert sum(relaxed.lasting) == pytest.approx(relaxed.seconds, rel=1e-6)


@examples(60)
@given(hard_problems(), st.integers(1, 4))
def test_no_bound_for_a_number_of_micro_batches_is_above_their_shortest_plan(problem: Problem, count: int) -> None:
    shortest = oracle.shortest_step_in(problem, count)
    rows = table(problem)
    more = min((oracle.shortest_step_in(problem, n) for n in range(count, 5)), default=INFINITY)
    assert area(rows, count) <= more * (1 + 1e-9)
    if importlib.util.find_spec("highspy") is None:
        return
    if shortest < INFINITY:
        # A plan of this many that is shorter than the step exists, so the bound must be below it.
        assert shortest_with(rows, count, shortest * 1.01) <= shortest * (1 + 1e-9)
    assert shortest_with(rows, count, 50.0) <= max(shortest, 50.0)


@needs_highs
@examples(150)
@given(hard_problems(most=7), st.integers(0, 100), st.floats(1.00001, 1.6), st.booleans(), st.sampled_from([1, 48]))
def test_any_plan_lies_above_the_relaxation_of_boxes_around_it(
    problem: Problem, seed: int, wide: float, one_box: bool, alone: int
) -> None:
    found = thrown(problem, seed)
    if found is None:
        return
    rows = table(problem)
    boxes = [Box(seconds / wide, seconds * wide, 1) for seconds in found.seconds]
    if one_box:
        boxes = [Box(min(found.seconds) / wide, max(found.seconds) * wide, len(found.seconds))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seqpar.planner.bounds.fluid._ALONE", alone)  # 1: all documents of like length are put together
        assert fluid_seconds(rows, classes(rows), boxes) <= found.step_seconds * (1 + 1e-6)


@needs_highs
@pytest.mark.parametrize("seed", range(4))
def test_plans_of_many_documents_lie_above_the_relaxation_of_boxes_around_them(seed: int) -> None:
    problem = published(lognormal(150, 2500, 1.3, seed))
    rows = table(problem)
    for static in static_plans(problem, rows):
        boxes = [Box(seconds * 0.99, seconds * 1.01, 1) for seconds in static.schedule.seconds]
        assert fluid_seconds(rows, classes(rows), boxes) <= static.schedule.step_seconds * (1 + 1e-6)
        assert whole_step(rows, INFINITY, Work(INFINITY).take(0)).seconds <= static.schedule.step_seconds


def assert_classes_hold(problem: Problem) -> None:
    """Every token in one class, and no document overestimated by its class."""
    rows = table(problem)
    found = classes(rows)
    assert found.tokens.sum() == rows.tokens.sum()
    for row, tokens in enumerate(rows.tokens.tolist()):
        at = [i for i in range(len(found.tokens)) if found.shortest[i] <= tokens <= found.longest[i]]
        assert len(at) == 1
        assert found.longest[at[0]] <= found.shortest[at[0]] * 1.25
        assert row >= 47 or found.longest[at[0]] == found.shortest[at[0]]  # the longest are not put together
        assert (found.rate[at[0]] * tokens <= rows.seconds[row] * (1 + 1e-12)).all()
        assert (found.fewest_seconds[at[0]] <= rows.seconds[row]).all()


@examples(40)
@given(problems(most=60))
def test_classes_hold_every_token_and_never_overestimate_a_document(problem: Problem) -> None:
    assert_classes_hold(problem)


@pytest.mark.parametrize("seed", range(3))
def test_classes_of_many_documents_never_overestimate_one(seed: int) -> None:
    problem = published(lognormal(300, 3000, 1.8, seed))
    assert_classes_hold(problem)
    assert len(classes(table(problem)).tokens) < 120


@needs_highs
@pytest.mark.parametrize("seed", range(20))
def test_a_linear_program_fills_a_knapsack_as_by_hand(seed: int) -> None:
    draw = random.Random(seed)
    items = [(draw.uniform(1, 9), draw.uniform(1, 9)) for _ in range(6)]
    room, program = draw.uniform(5, 30), LinearProgram()
    for value, weight in items:
        column = program.columns(1, -value, 0.0, 1.0)
        assert column.tolist() == [program.num_columns - 1]
        assert weight > 0
    program.row(-INFINITY, room, (program.columns(0), 1.0), *((at, weight) for at, (_, weight) in enumerate(items)))
    best, left = 0.0, room
    for value, weight in sorted(items, key=lambda item: -item[0] / item[1]):
        taken = min(1.0, left / weight)
        best, left = best + taken * value, left - taken * weight
    assert program.solve() == pytest.approx(-best)


@needs_highs
def test_a_linear_program_says_when_there_is_no_answer() -> None:
    impossible, endless = LinearProgram(), LinearProgram()
    columns = impossible.columns(2, 1.0, 0.0, 1.0)
    impossible.row(3.0, INFINITY, (columns, 1.0))
    assert impossible.solve() == INFINITY
    endless.row(0.0, INFINITY, (endless.columns(1, -1.0), 1.0))
    assert endless.solve() == -INFINITY


@needs_solver
@examples(40)
@given(hard_problems())
def test_the_exact_program_is_as_short_as_the_shortest_of_all_plans(problem: Problem) -> None:
    rows = table(problem)
    shortest = oracle.shortest_step(problem)
    found = [static.schedule for static in static_plans(problem, rows) if busy(rows, static.schedule)]
    if not found or size(rows, 4) > 400:
        return
    start = min(found, key=lambda plan: plan.step_seconds)
    outcome = solve_exactly(rows, start, len(problem.lengths), Limits(100_000))
    assert outcome.optimal
    assert not outcome.out_of_time
    assert outcome.schedule is not None
    assert outcome.schedule.step_seconds == pytest.approx(shortest, rel=1e-6)
    assert outcome.bound == pytest.approx(shortest, rel=1e-5)
    assert sorted(row for groups in outcome.schedule.micro_batches for _, rows in groups for row in rows) == list(
        range(rows.num_documents)
    )
    assert busy(rows, outcome.schedule)


@needs_solver
@pytest.mark.parametrize("seed", range(4))
def test_the_exact_program_with_too_few_micro_batches_finds_the_shortest_of_those(seed: int) -> None:
    draw = random.Random(seed)
    problem = small_problem([draw.randint(20, 190) for _ in range(4)], devices=4)
    rows = table(problem)
    for count in (1, 2):
        best = min(oracle.shortest_step_in(problem, n) for n in range(1, count + 1))
        apart = schedule(rows, [[(2, [row])] for row in range(4)])
        outcome = solve_exactly(rows, apart, count, Limits(100_000))
        if best == INFINITY:
            assert outcome.schedule is None
            assert outcome.bound == INFINITY
        else:
            assert outcome.schedule is not None
            assert outcome.schedule.step_seconds == pytest.approx(best, rel=1e-6)
            assert len(outcome.schedule.seconds) <= count


@needs_solver
@pytest.mark.parametrize(
    "lengths", [[74, 71, 69, 63, 45], [74, 70, 56, 56, 48], [65, 61, 60, 58, 49], [73, 71, 48, 44, 41, 73]]
)
def test_where_memory_is_tight_the_exact_program_wins_over_greedy_packing(lengths: list[int]) -> None:
    problem = small_problem(lengths, devices=2, node=2, degrees=(1, 2))
    plan = plan_batch(problem, Options(seconds=3.0))
    check(problem, plan)
    shortest = oracle.shortest_step(problem)
    assert plan.step_seconds == pytest.approx(shortest, rel=1e-6)
    assert plan.gap == 0
    greedy = min(static.schedule.step_seconds for static in static_plans(problem, table(problem)))
    assert greedy > shortest * 1.03


@needs_solver
def test_a_start_with_more_micro_batches_than_allowed_is_no_start() -> None:
    problem = small_problem([50, 40], devices=4)
    rows = table(problem)
    apart = schedule(rows, [[(0, [0])], [(0, [1])]])
    outcome = solve_exactly(rows, apart, 1, Limits(1000))
    assert outcome.schedule is not None
    assert len(outcome.schedule.seconds) == 1


def test_the_closed_form_is_the_longest_document_where_it_fills_the_cluster() -> None:
    problem = published([384_000])
    rows = table(problem)
    bound = closed_form(rows)
    assert "384,000" in bound.reason
    assert bound.seconds == pytest.approx(best_plan(static_plans(problem, rows)).schedule.step_seconds)
    many = replace(problem, lengths=(2000,) * 500)
    assert "spread evenly in 3 micro-batches" in closed_form(table(many)).reason


@needs_solver
@pytest.mark.parametrize("lengths", [[1], [3], [2, 1], [399, 3], [398, 2, 1]])
def test_the_exact_program_gives_every_rank_a_token_where_more_ranks_would_be_faster(lengths: list[int]) -> None:
    problem = small_problem(lengths, devices=4, degrees=(1, 2, 4))
    rows = table(problem)
    start = schedule(rows, [[(2 if length > 100 else 0, [row])] for row, length in enumerate(rows.tokens.tolist())])
    outcome = solve_exactly(rows, start, len(lengths), Limits(10_000))
    assert outcome.optimal
    assert outcome.schedule is not None
    assert busy(rows, outcome.schedule)
    assert outcome.schedule.step_seconds == pytest.approx(oracle.shortest_step(problem), rel=1e-6)
