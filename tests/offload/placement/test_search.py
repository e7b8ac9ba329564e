"""The exact search finds what exists and proves what does not, against an oracle that tries every order."""

from itertools import count, pairwise

import pytest
from hypothesis import given, settings

from seqpar.offload.placement.buffers import Buffer
from seqpar.offload.placement.place import lower_bound
from seqpar.offload.placement.search import search
from tests.offload.placement.placements import clash, endless, filled, gapped, least_peak, planted, problems, scattered


def offsets_of(buffers, found):
    return {buffer.id: offset for buffer, offset in zip(buffers, found.offsets)}


def check(buffers, found, capacity):
    assert found.offsets is not None and not found.proved
    offsets = offsets_of(buffers, found)
    assert clash(buffers, offsets) is None
    assert all(0 <= offsets[buffer.id] <= capacity - buffer.size for buffer in buffers)


@pytest.mark.parametrize("seed", range(60))
def test_it_agrees_with_trying_every_order(seed):
    buffers = scattered(seed, 3 + seed % 5, events=6 + seed % 7)
    best = least_peak(buffers)
    check(buffers, search(buffers, best), best)
    below = search(buffers, best - 1)
    assert below.offsets is None and below.proved


@pytest.mark.parametrize("seed", range(40))
def test_it_agrees_where_little_is_free(seed):
    buffers = filled(seed, 8, capacity=5 + seed % 3)
    best = least_peak(buffers)
    check(buffers, search(buffers, best), best)
    assert search(buffers, best - 1).proved


@pytest.mark.sampled(4)
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("seed", range(4))
def test_it_proves_that_the_lower_bound_is_out_of_reach(number, seed):
    buffers = gapped()[number]
    best = least_peak(buffers)
    assert best == lower_bound(buffers) + 1
    none = search(buffers, best - 1, seed=seed)
    assert none.proved and none.nodes > 0
    check(buffers, search(buffers, best, seed=seed), best)


@settings(deadline=None, max_examples=60)
@given(problems(most=6))
def test_any_small_problem_is_answered(buffers):
    buffers = [buffer for buffer in buffers if buffer.size]
    best = least_peak(buffers)
    if buffers:
        check(buffers, search(buffers, best), best)
        assert search(buffers, best - 1).proved


@pytest.mark.parametrize("num_buffers", [10, 20, 30, 40, 50, 60])
@pytest.mark.parametrize("seed", [1, 2])
def test_planted_perfect_packings_are_found(num_buffers, seed):
    buffers = planted(seed, num_buffers)
    assert lower_bound(buffers) == 1 << 20
    check(buffers, search(buffers, 1 << 20, seconds=30), 1 << 20)


@pytest.mark.parametrize("seed", range(16))
def test_what_is_left_of_a_perfect_packing_is_not_proved_impossible(seed):
    """Gaps are needed here, and a state that failed with some gaps may succeed with others."""
    whole = planted(seed, 16, capacity=12, events=8)
    some = whole[: 10 + seed % 5]
    found = search(some, 12, seconds=20)
    assert found.offsets is not None, f"a placement exists; proved that there is none: {found.proved}"
    check(some, found, 12)


def test_separate_stretches_of_time_are_solved_apart():
    # Fifteen copies one after the other: together they would be 135 buffers with all their combinations.
    shape = gapped()[0]
    copies = [Buffer(f"{b.id}.{k}", b.size, b.birth + 100 * k, b.death + 100 * k) for k in range(15) for b in shape]
    check(copies, search(copies, least_peak(shape)), least_peak(shape))
    none = search(copies, least_peak(shape) - 1)
    assert none.proved and none.nodes < 5000


def test_a_stretch_that_fails_takes_back_the_move_that_made_it():
    shape = gapped()[1]
    best, early = least_peak(shape), min(buffer.birth for buffer in shape)
    late = max(buffer.death for buffer in shape)
    lid = Buffer("lid", 3, early - 1, late + 1)  # joins everything until it is placed
    buffers = [*shape, lid, Buffer("before", best, early - 1, early), Buffer("after", best, late, late + 1)]
    check(buffers, search(buffers, best + 3), best + 3)
    assert search(buffers, best + 2).proved


def test_it_stops_without_an_answer_when_its_work_is_done_and_not_before():
    found = [search(endless(), 1 << 20, seconds=seconds, clock=lambda: 0.0) for seconds in (0.1, 0.4)]
    for one, seconds in zip(found, (0.1, 0.4)):
        assert one.offsets is None and not one.proved and not one.late
        assert seconds <= one.spent < seconds + 0.1
    assert 2 * found[0].nodes < found[1].nodes < 8 * found[0].nodes


def test_the_guard_ends_it_and_the_answer_says_so():
    ticks = count(0.0, 1.0)
    found = search(endless(), 1 << 20, seconds=1.0, clock=lambda: next(ticks))
    assert found.late and found.offsets is None and not found.proved
    assert next(ticks) < 20 and found.spent < 1.0


def test_the_same_seed_gives_the_same_placement():
    buffers = planted(5, 30)
    assert search(buffers, 1 << 20, seed=3) == search(buffers, 1 << 20, seed=3)


def test_progress_is_told_after_every_turn():
    told = []
    search(planted(4, 60), 1 << 20, seconds=20, progress=lambda nodes, most: told.append((nodes, most)))
    assert told and all(one[0] < other[0] for one, other in pairwise(told))
    assert all(0 <= most <= 60 for _, most in told)


def test_nothing_is_placed_at_once():
    assert search([], 10).offsets == ()


def test_a_capacity_below_the_live_bytes_is_refused_without_a_node():
    found = search([Buffer("a", 5, 0, 2), Buffer("b", 6, 1, 3)], 10)
    assert found.proved and found.nodes == 0


def test_sizes_far_beyond_32_bits():
    buffers = [Buffer(b.id, b.size * (2**33 + 1), b.birth, b.death) for b in planted(9, 16)]
    check(buffers, search(buffers, lower_bound(buffers)), lower_bound(buffers))
