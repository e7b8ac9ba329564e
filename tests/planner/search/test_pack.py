"""Packing under deadlines: what it promises, and when it may say that nothing was found."""

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqpar.planner import CostModel, GroupKind, Problem
from seqpar.planner.problem.costs import Table, table
from seqpar.planner.search.pack import pack
from seqpar.planner.search.schedule import MicroBatch, Schedule, busy, group_seconds, schedule
from seqpar.planner.search.squeeze import shake, squeeze, stretch
from seqpar.planner.work import Share, Work
from tests.planner import oracle
from tests.planner.problems import lognormal, problems, published, small_cluster, small_problem

quick = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
LONG = 1e4


def documents_of(batches: "tuple[MicroBatch, ...]") -> list[int]:
    return sorted(row for groups in batches for _, rows in groups for row in rows)


def assert_holds(rows: Table, found: Schedule) -> None:
    """Every document once, tokens within capacity, groups within the devices, and the seconds those of the formulas."""
    assert documents_of(found.micro_batches) == list(range(rows.num_documents))
    for groups, seconds in zip(found.micro_batches, found.seconds):
        assert sum(int(rows.degrees[kind]) for kind, _ in groups) <= rows.devices
        assert seconds == pytest.approx(max(group_seconds(rows, group) for group in groups))
        for kind, members in groups:
            assert rows.tokens[list(members)].sum() <= rows.degrees[kind] * rows.capacity


@quick
@given(problems(most=20))
def test_with_a_micro_batch_for_every_document_and_time_enough_there_is_always_a_packing(problem: Problem) -> None:
    rows = table(problem)
    batches = pack(rows, [LONG] * rows.num_documents)
    assert batches is not None
    assert len(batches) == rows.num_documents
    assert documents_of(batches) == list(range(rows.num_documents))


@quick
@given(problems(most=20), st.integers(1, 5))
def test_no_deadline_below_the_fastest_group_of_the_longest_document_is_kept(problem: Problem, count: int) -> None:
    rows = table(problem)
    fastest = float((rows.seconds + rows.fixed).min(axis=1).max())
    assert pack(rows, [fastest * (1 - 1e-6)] * count) is None


@quick
@given(problems(most=4), st.floats(1.0, 3.0))
def test_a_packing_is_never_shorter_than_the_shortest_there_is(problem: Problem, above: float) -> None:
    shortest = oracle.shortest_micro_batch(problem, range(len(problem.lengths)))
    rows = table(problem)
    batches = pack(rows, [shortest * (1 - 1e-6)]) if np.isfinite(shortest) else None
    # Groups with fewer tokens than ranks are mended later; the oracle does not know them.
    assert batches is None or not busy(rows, schedule(rows, batches))
    longer = pack(rows, [shortest * above]) if np.isfinite(shortest) else None
    if longer is not None and busy(rows, schedule(rows, longer)):
        assert schedule(rows, longer).step_seconds >= shortest * (1 - 1e-9)


def test_each_document_takes_the_kind_that_spends_the_fewest_device_seconds_and_keeps_the_deadline() -> None:
    rows = table(small_problem([80], devices=8))
    alone, pair = (float(rows.seconds[0, kind] + rows.fixed[kind]) for kind in (0, 1))
    assert pair < alone
    assert pack(rows, [alone * (1 + 1e-9)]) == (((0, (0,)),),)
    assert pack(rows, [(alone + pair) / 2]) == (((1, (0,)),),)


def test_the_deadlines_belong_to_micro_batches_in_their_order() -> None:
    rows = table(small_problem([90, 90], devices=1, node=1, degrees=(1,)))
    seconds = float(rows.seconds[0, 0] + rows.fixed[0])
    both = pack(rows, [seconds / 2, seconds * 1.01, seconds / 2, seconds * 1.01])
    assert both is not None
    assert [len(groups) for groups in both] == [0, 1, 0, 1]


def test_a_bias_makes_a_micro_batch_look_dearer() -> None:
    rows = table(small_problem([90], devices=1, node=1, degrees=(1,)))
    first = pack(rows, [1.0, 1.0], np.asarray([[1.0], [2.0]]))
    second = pack(rows, [1.0, 1.0], np.asarray([[2.0], [1.0]]))
    assert first == (((0, (0,)),), ())
    assert second == ((), ((0, (0,)),))


@pytest.mark.parametrize(("length", "most"), [(16, 6), (17, 5)])
def test_short_documents_are_poured_and_longer_ones_placed_and_both_fill_the_devices(length: int, most: int) -> None:
    # 16 is below a sixth of the capacity of 100, and 17 above.
    rows = table(small_problem([length] * most * 4, devices=4, degrees=(1,)))
    batches = pack(rows, [LONG])
    assert batches is not None
    assert_holds(rows, schedule(rows, batches))
    assert pack(table(small_problem([length] * (most * 4 + 1), devices=4, degrees=(1,))), [LONG]) is None


@quick
@given(problems(most=14), st.lists(st.floats(0.05, 2.0), min_size=1, max_size=3), st.integers(0, 12))
def test_stretching_spends_what_it_is_given_and_gives_a_schedule(
    problem: Problem, seconds: list[float], units: int
) -> None:
    rows = table(problem)
    share = Work(float("inf")).take(units)
    found = stretch(rows, seconds, share)
    assert share.units >= 0
    if units == 0:
        assert found is None
    if found is not None:
        assert_holds(rows, found)


def test_stretching_comes_within_a_hundredth_of_the_factor_it_finds() -> None:
    # One document: the least factor that packs it is known.
    rows = table(small_problem([90], devices=1, node=1, degrees=(1,)))
    needed = float(rows.seconds[0, 0] + rows.fixed[0])
    for factor in (0.95, 1.02, 1.5, 4.0, 8.7):
        found = stretch(rows, [needed / factor], Work(float("inf")).take(30))
        assert found is not None
        assert found.step_seconds == pytest.approx(needed)
    assert stretch(rows, [needed / 9.5], Work(float("inf")).take(30)) is None


@pytest.mark.parametrize("seed", range(3))
def test_squeezing_and_shaking_shorten_a_careless_schedule(seed: int) -> None:
    rows = table(published(lognormal(120, 3000, 1.3, seed)))
    batches = pack(rows, [60.0] * 4)
    assert batches is not None
    start = schedule(rows, batches)
    nothing = Work(float("inf")).take(0)
    assert squeeze(rows, start, nothing) == start
    assert shake(rows, start, nothing, seed) == start
    squeezed = squeeze(rows, start, Work(float("inf")).take(80))
    shaken = shake(rows, squeezed, Work(float("inf")).take(80), seed)
    assert squeezed.step_seconds < start.step_seconds * 0.99
    assert shaken.step_seconds <= squeezed.step_seconds
    for found in (squeezed, shaken):
        assert_holds(rows, found)


@pytest.mark.parametrize("seed", range(3))
def test_one_packing_more_is_never_worse(seed: int) -> None:
    rows = table(published(lognormal(50, 4000, 1.2, seed)))
    batches = pack(rows, [60.0] * 4)
    assert batches is not None
    start = schedule(rows, batches)

    def steps(search: Callable[[Share], Schedule | None]) -> list[float]:
        found = [search(Work(float("inf")).take(units)) for units in range(1, 40, 3)]
        return [np.inf if plan is None else plan.step_seconds for plan in found]

    predicted = [value * 0.7 for value in start.seconds]
    for found in (
        steps(lambda share: squeeze(rows, start, share)),
        steps(lambda share: shake(rows, start, share, seed)),
        steps(lambda share: stretch(rows, predicted, share)),
    ):
        assert found == sorted(found, reverse=True)
    assert squeeze(rows, start, Work(float("inf")).take(40)).step_seconds < start.step_seconds


@pytest.mark.parametrize("seed", range(6))
def test_stretching_finds_nearly_the_least_factor_that_packs(seed: int) -> None:
    rows = table(published(lognormal(80, 3000, 1.0, seed)))
    least = float((rows.seconds + rows.fixed).min(axis=1).max())
    found = stretch(rows, [least, least], Work(float("inf")).take(40))
    assert found is not None
    grid = (schedule(rows, batches) for factor in np.arange(0.9, 9.0, 0.02)
            if (batches := pack(rows, [least * factor] * 2)) is not None)  # fmt: skip
    assert found.step_seconds <= next(grid).step_seconds * 1.04


def test_stretching_goes_on_below_a_deadline_that_does_not_pack() -> None:
    # 4 ranks are cheaper and 8 faster; between the factors 1.2 and 1.35 only those above 1.3 pack at all.
    four, eight = GroupKind(4, "a", 0.0, 1e-3 / 4, 1.0), GroupKind(8, "a", 0.0, 1e-3 / 8, 1.0, 2.885e-5)
    rows = table(Problem((390,), small_cluster(8, 8), CostModel("two", (four, eight), 1.0, 10.0)))
    slow, fast = (rows.seconds + rows.fixed)[0].tolist()
    assert fast < slow < fast * 1.35 / 1.3
    found = stretch(rows, [fast / 1.3], Work(float("inf")).take(40))
    assert found is not None
    assert found.step_seconds == pytest.approx(fast)


@pytest.mark.parametrize("seed", range(3))
def test_what_was_squeezed_and_shaken_does_not_get_worse_again(seed: int) -> None:
    rows = table(published(lognormal(50, 4000, 1.2, seed)))
    batches = pack(rows, [60.0] * 4)
    assert batches is not None
    best = squeeze(rows, schedule(rows, batches), Work(float("inf")).take(400))
    for units in (1, 2, 5, 20):
        assert squeeze(rows, best, Work(float("inf")).take(units)).step_seconds <= best.step_seconds
        assert shake(rows, best, Work(float("inf")).take(units), seed).step_seconds <= best.step_seconds


def test_only_a_shorter_schedule_takes_the_place_of_one_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(small_problem([90, 50]))

    def packed(*seconds: float) -> None:
        """Packings from now on take so many seconds, the last of these again and again."""
        coming = [*seconds]
        monkeypatch.setattr(
            "seqpar.planner.search.squeeze._packed",
            lambda *_: Schedule((), (coming.pop(0) if len(coming) > 1 else coming[0],)),
        )

    start = Schedule((), (10.0,))
    for search in (lambda share: squeeze(rows, start, share), lambda share: shake(rows, start, share, 0)):
        packed(10.05)
        assert search(Work(float("inf")).take(9)) == start
        packed(11.0, 9.0, 9.5, 8.0, 8.1)
        assert search(Work(float("inf")).take(9)).step_seconds == 8.0
    packed(10.0, 12.0, 9.0, 11.0)
    assert stretch(rows, [7.0], Work(float("inf")).take(9)) == Schedule((), (9.0,))


def test_a_schedule_leaves_out_what_is_empty_and_begins_with_the_longest() -> None:
    rows = table(small_problem([90, 50, 20, 10]))
    found = schedule(rows, [[(0, [2]), (0, [])], [], [(0, [0]), (1, [3])], [(0, ())], [(0, [1])]])
    assert [sorted(row for _, members in groups for row in members) for groups in found.micro_batches] == [
        [0, 3], [1], [2]
    ]  # fmt: skip
    assert list(found.seconds) == sorted(found.seconds, reverse=True)
    assert found.step_seconds == pytest.approx(sum(group_seconds(rows, (0, (row,))) for row in (0, 1, 2)))


def test_a_rank_without_a_token_makes_a_schedule_unusable() -> None:
    rows = table(small_problem([4, 3], degrees=(1, 4)))
    assert busy(rows, schedule(rows, [[(1, [0])], [(0, [1])]]))
    assert not busy(rows, schedule(rows, [[(1, [1])], [(0, [0])]]))


@pytest.mark.parametrize("seed", range(4))
def test_packing_two_transports_takes_the_cheaper_for_each_document(seed: int) -> None:
    # The ring hides its message behind a long document, and the all-to-all is cheaper for a short one.
    ring = GroupKind(2, "ring", 1e-6, 1e-4, 0.05, 2e-4, 4e-6)
    spread = GroupKind(2, "all_to_all", 1e-6, 1e-4, 0.05, 1e-4)
    problem = Problem((180, 20), small_cluster(8, 4), CostModel("two", (ring, spread), 1.0, 10.0))
    rows = table(problem)
    kinds = {kind.transport: number for number, kind in enumerate(problem.costs.kinds)}
    assert rows.seconds[0, kinds["ring"]] < rows.seconds[0, kinds["all_to_all"]]
    assert rows.seconds[1, kinds["all_to_all"]] < rows.seconds[1, kinds["ring"]]
    draw = random.Random(seed)
    deadline = float((rows.seconds + rows.fixed).min(axis=1).max()) * draw.uniform(1.0, 1.05)
    batches = pack(rows, [deadline])
    assert batches is not None
    placed = {row: kind for kind, members in itertools.chain(*batches) for row in members}
    assert placed[0] == kinds["ring"]


@quick
@given(problems(most=30), st.lists(st.floats(0.5, 4.0), min_size=1, max_size=4))
def test_bisection_finds_the_groups_that_looking_through_all_finds(problem: Problem, above: list[float]) -> None:
    """A bias of one changes no price, but has all groups looked through for every document."""
    rows = table(problem)
    fastest = float((rows.seconds + rows.fixed).min(axis=1).max())
    deadlines = [fastest * factor for factor in above]
    assert pack(rows, deadlines) == pack(rows, deadlines, np.ones((len(deadlines), len(rows.degrees))))


@pytest.mark.parametrize("seed", range(3))
def test_bisection_finds_the_same_groups_for_many_documents(seed: int) -> None:
    rows = table(published(lognormal(600, 2000, 1.6, seed)))
    deadlines = np.random.default_rng(seed).uniform(1.0, 3.0, 30) * float((rows.seconds + rows.fixed).min(axis=1).max())
    found = pack(rows, deadlines.tolist())
    assert found is not None
    assert found == pack(rows, deadlines.tolist(), np.ones((30, len(rows.degrees))))
