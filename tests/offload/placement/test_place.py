"""The cascade: certified where it can be, honest where it cannot."""

from itertools import count

import pytest
from hypothesis import given, settings

from seqpar.offload.placement.buffers import Buffer
from seqpar.offload.placement.check_placement import check_placement
from seqpar.offload.placement.place import lower_bound, place
from tests.offload.placement.placements import clash, endless, filled, gapped, least_peak, planted, problems, scattered


@settings(deadline=None, max_examples=80)
@given(problems())
def test_no_two_live_buffers_share_bytes_and_the_peak_is_what_it_says(buffers):
    found = place(buffers, seconds=2)
    assert clash([buffer for buffer in buffers if buffer.size], found.offsets) is None
    assert found.peak == max((found.offsets[b.id] + b.size for b in buffers), default=0)
    assert found.lower_bound <= found.peak
    check_placement(buffers, found)


@pytest.mark.parametrize("seed", range(40))
def test_the_optimum_is_that_of_trying_every_order(seed):
    buffers = filled(seed, 8) if seed % 2 else scattered(seed, 7)
    found = place(buffers, seconds=10)
    assert found.status == "optimal"
    assert found.peak == found.lower_bound == least_peak(buffers)


def test_a_bound_above_the_live_bytes_is_proved():
    buffers = gapped()[0]
    found = place(buffers, seconds=10)
    assert found.lower_bound == found.peak > lower_bound(buffers)
    assert (found.status, found.gap) == ("optimal", 0.0)


@pytest.mark.parametrize("num_buffers", [10, 25, 40, 60])
def test_planted_perfect_packings_are_certified(num_buffers):
    buffers = planted(11, num_buffers)
    found = place(buffers, seconds=30)
    assert (found.peak, found.status) == (1 << 20, "optimal")
    check_placement(buffers, found, 1 << 20)


def test_greedy_is_enough_where_it_meets_the_bound():
    found = place([Buffer("a", 4, 0, 2), Buffer("b", 4, 2, 4), Buffer("c", 2, 0, 4)])
    assert (found.peak, found.status) == (6, "optimal")
    assert found.stage.startswith("greedy")


def test_a_capacity_ends_the_work():
    buffers = planted(3, 60)
    easy = place(buffers, capacity=1 << 21)
    assert easy.stage.startswith("greedy") and easy.peak <= 1 << 21
    tight = place(buffers, capacity=1 << 20, seconds=30)
    assert tight.peak == 1 << 20


def test_a_capacity_that_cannot_be_is_proved_too_small():
    buffers = gapped()[0]
    found = place(buffers, capacity=least_peak(buffers) - 1, seconds=10)
    assert found.lower_bound > least_peak(buffers) - 1
    assert found.peak == least_peak(buffers)


def test_without_work_enough_the_gap_is_told():
    buffers = endless()
    found = place(buffers, seconds=0.1)
    assert found.status == "feasible" and not found.note
    assert found.lower_bound == 1 << 20 < found.peak
    assert found.gap == pytest.approx(found.peak / (1 << 20) - 1)
    check_placement(buffers, found)


def test_the_clock_of_a_busy_machine_changes_nothing():
    """Clocks by which the processor takes nothing at all, or some time at every look: the same placement."""
    buffers = endless()
    ticks = count(0.0, 0.1)
    found = [place(buffers, seconds=0.5, clock=clock) for clock in (lambda: 0.0, lambda: next(ticks))]
    assert found[0].offsets == found[1].offsets and found[0].stage == found[1].stage
    assert next(ticks) > 0.5, "the guard did look at its clock"


def test_the_guard_ends_the_work_and_says_how_much_was_done():
    buffers = endless()
    found = place(buffers, seconds=60.0, clock=count(0.0, 100.0).__next__)
    assert found.note.startswith("the guard over the processor's time ended placing with ")
    assert found.status == "feasible"
    check_placement(buffers, found)


def test_levels_are_tried_when_the_search_gives_up():
    pytest.importorskip("pulp")
    buffers = endless()
    told = []
    halves = [[b.id for b in buffers if b.death <= 350], [b.id for b in buffers if b.birth >= 350]]
    found = place(buffers, seconds=0.1, levels=halves, progress=lambda stage, peak, low: told.append(stage))
    assert "bi-level MIP" in told
    check_placement(buffers, found)


def test_progress_names_the_stages_and_the_peak_never_rises():
    told = []
    place(planted(3, 60), seconds=20, progress=lambda *step: told.append(step))
    peaks = [peak for _, peak, _ in told]
    assert told[0][0].startswith("greedy by size") and any("search" in stage for stage, *_ in told)
    assert peaks == sorted(peaks, reverse=True)
    assert all(low == 1 << 20 for *_, low in told)


def test_the_lower_bound_is_the_most_live_bytes():
    assert lower_bound([]) == 0
    assert lower_bound([Buffer("a", 3, 0, 2), Buffer("b", 4, 2, 5), Buffer("c", 2, 1, 3)]) == 6


def test_buffers_of_no_size_get_an_offset():
    found = place([Buffer("a", 0, 0, 5), Buffer("b", 7, 1, 2)])
    assert dict(found.offsets) == {"a": 0, "b": 0}
    assert place([]).status == "optimal"
    assert place([Buffer("a", 0, 0, 5)]).peak == 0


@pytest.mark.parametrize(
    ("buffers", "capacity", "why"),
    [
        ([Buffer("a", 9, 0, 1)], 8, "buffer a has 9 bytes, more than the capacity 8"),
        ([Buffer("a", 5, 0, 4), Buffer("b", 5, 3, 6)], 8, "10 bytes live at event 3, more than the capacity 8"),
        ([Buffer("a", 1, 0, 1), Buffer("a", 1, 2, 3)], None, "buffer a comes twice"),
    ],
)
def test_what_cannot_be_placed_is_refused(buffers, capacity, why):
    with pytest.raises(ValueError, match=why):
        place(buffers, capacity)


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_time_is_needed(seconds):
    with pytest.raises(ValueError, match="expected more than 0"):
        place([Buffer("a", 1, 0, 1)], seconds=seconds)
