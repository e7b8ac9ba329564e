"""Batching, packing, balancing and climbing: each keeps every document once, and does what it says."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqpar.planner import CostModel, GroupKind, Problem
from seqpar.planner.problem.costs import table
from seqpar.planner.search.balance import KEYS, assign, improve, makespan
from seqpar.planner.search.batching import fewest_micro_batches, long_short, time_optimal, token_balanced
from seqpar.planner.search.climb import climb
from seqpar.planner.search.pack import pack
from seqpar.planner.search.schedule import MicroBatch, schedule
from seqpar.planner.search.squeeze import shake, squeeze, stretch
from seqpar.planner.search.static import static_plans
from seqpar.planner.work import Work
from tests.planner.problems import lognormal, problems, published, small_cluster, small_problem

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def everything(batches: "tuple[MicroBatch, ...]") -> list[int]:
    return sorted(row for groups in batches for _, rows in groups for row in rows)


def assert_fits(problem: Problem, groups: MicroBatch) -> None:
    rows = table(problem)
    assert sum(int(rows.degrees[kind]) for kind, _ in groups) <= rows.devices
    for kind, members in groups:
        assert rows.tokens[list(members)].sum() <= rows.degrees[kind] * rows.capacity


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_token_balanced_batching_is_as_balanced_as_can_be(count: int) -> None:
    draw = random.Random(count)
    rows = table(small_problem([draw.randint(1, 300) for _ in range(9)]))
    largest = max(int(rows.tokens[list(chunk)].sum()) for chunk in token_balanced(rows, count))
    cuts = itertools.combinations(range(1, 9), count - 1)
    best = min(max(rows.tokens[a:b].sum() for a, b in itertools.pairwise((0, *cut, 9))) for cut in cuts)
    assert largest == best


@quick
@given(problems(most=20), st.integers(1, 4))
def test_batching_takes_every_document_once(problem: Problem, count: int) -> None:
    rows = table(problem)
    everyone = list(range(rows.num_documents))
    if count <= rows.num_documents:
        assert sorted(itertools.chain(*token_balanced(rows, count))) == everyone
        assert sorted(itertools.chain(*long_short(rows, count))) == everyone
    for chunks, seconds in time_optimal(rows, [count]):
        assert sorted(itertools.chain(*chunks)) == everyone
        assert len(seconds) == len(chunks) == count


@quick
@given(problems(most=20), st.lists(st.floats(0.06, 3.0), min_size=1, max_size=4), st.booleans())
def test_packing_keeps_deadlines_memory_and_devices(problem: Problem, deadlines: list[float], biased: bool) -> None:
    rows = table(problem)
    bias = np.random.default_rng(0).uniform(0.5, 2.0, (len(deadlines), len(rows.degrees))) if biased else None
    batches = pack(rows, deadlines, bias)
    if batches is None:
        return
    assert everything(batches) == list(range(rows.num_documents))
    for groups, deadline in zip(batches, deadlines):
        assert_fits(problem, groups)
        assert not groups or makespan(rows, groups) <= deadline * (1 + 1e-9)


def test_packing_pours_short_documents_without_losing_any() -> None:
    problem = published([60_000, 30_000, *([200] * 900), *range(1, 400)])
    rows = table(problem)
    batches = pack(rows, [4.0, 2.0])
    assert batches is not None
    assert everything(batches) == list(range(rows.num_documents))
    for groups, deadline in zip(batches, [4.0, 2.0]):
        assert_fits(problem, groups)
        assert makespan(rows, groups) <= deadline
    assert pack(rows, [0.7]) is None


@quick
@given(problems(most=14), st.sampled_from(KEYS))
def test_moves_and_swaps_never_make_it_slower(problem: Problem, key: str) -> None:
    rows = table(problem)
    kinds = [0] * max(1, rows.devices // int(rows.degrees[0]))
    groups = assign(rows, kinds, range(rows.num_documents), key)
    if groups is None:
        return
    better = improve(rows, groups)
    assert everything((better,)) == list(range(rows.num_documents))
    assert_fits(problem, better)
    assert makespan(rows, better) <= makespan(rows, groups) * (1 + 1e-9)


def test_moves_and_swaps_balance_what_was_piled_up() -> None:
    rows = table(small_problem([60, 50, 40, 30], devices=2, node=2, degrees=(1,)))
    piled: MicroBatch = ((0, (1, 3)), (0, (0, 2)))
    assert makespan(rows, improve(rows, piled)) == pytest.approx(makespan(rows, ((0, (0, 3)), (0, (1, 2)))))


def test_moves_and_swaps_keep_to_memory() -> None:
    fast, slow = (GroupKind(1, name, 0.0, seconds, 0.0) for name, seconds in (("fast", 1e-3), ("slow", 1e-2)))
    problem = Problem((60, 50, 45, 30), small_cluster(2, 2), CostModel("two", (fast, slow), 1.0, 10.0))
    full: MicroBatch = ((0, (1, 2)), (1, (0, 3)))  # each swap that would help puts more than 100 tokens on a device
    assert improve(table(problem), full) == full


@quick
@given(problems(most=14))
def test_climbing_and_squeezing_never_make_it_slower(problem: Problem) -> None:
    rows = table(problem)
    work = Work(float("inf"))
    for static in static_plans(problem, rows)[:1]:
        start = static.schedule
        for better in (squeeze(rows, start, work.take(20)), shake(rows, start, work.take(20), 0)):
            assert better.step_seconds <= start.step_seconds * (1 + 1e-9)
            assert everything(better.micro_batches) == list(range(rows.num_documents))
        climbed = schedule(rows, [climb(rows, groups, work.take(20)) for groups in start.micro_batches])
        assert climbed.step_seconds <= start.step_seconds * (1 + 1e-9)
        assert everything(climbed.micro_batches) == list(range(rows.num_documents))


def test_shaking_is_random_by_its_seed_alone() -> None:
    problem = published(lognormal(400, 900, 1.7, 2))
    rows = table(problem)
    start = static_plans(problem, rows)[0].schedule
    found = [shake(rows, start, Work(float("inf")).take(60), seed) for seed in (1, 1, 2, 3, 4)]
    assert found[0] == found[1]
    assert len({other.micro_batches for other in found}) > 1
    assert found[0].step_seconds < start.step_seconds


def test_climbing_finds_the_published_shape() -> None:
    rows = table(published([100_000, 48_000, 48_000, 48_000, 48_000]))
    halves: MicroBatch = ((5, (0,)), (5, (1, 2, 3, 4)))
    climbed = climb(rows, halves, Work(float("inf")).take(500))
    assert sorted(int(rows.degrees[kind]) for kind, _ in climbed) == [8, 8, 8, 8, 32]


def test_time_optimal_predictions_can_nearly_be_kept() -> None:
    rows = table(published(lognormal(300, 700, 1.5, 1)))
    fewest = fewest_micro_batches(rows)
    for _, seconds in time_optimal(rows, [fewest, fewest + 1]):
        packed = stretch(rows, seconds, Work(float("inf")).take(30))
        assert packed is not None
        assert packed.step_seconds == pytest.approx(sum(seconds), rel=0.15)


def test_static_plans_have_one_kind_each() -> None:
    problem = small_problem([350, 120, 90, 60, 40])
    rows = table(problem)
    found = static_plans(problem, rows)
    assert [int(rows.degrees[static.kind]) for static in found] == [4, 8]
    for static in found:
        assert {kind for groups in static.schedule.micro_batches for kind, _ in groups} == {static.kind}
        assert everything(static.schedule.micro_batches) == list(range(5))


def test_work_ends_by_units_and_by_the_clock() -> None:
    work = Work(float("inf"))
    share = work.take(2)
    assert [share(), share(), share()] == [True, True, False]
    assert not work.late
    over = Work(0.0, itertools.count().__next__)
    assert not over.take(5)()
    assert over.late
    assert not work.take(-1)()
