"""The checker accepts what is right and refuses every way of being wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpar.offload.placement.buffers import Buffer, Placement
from seqpar.offload.placement.check_placement import check_placement
from tests.offload.placement.placements import clash, problems

BUFFERS = [Buffer("a", 4, 0, 3), Buffer("b", 4, 2, 5), Buffer("c", 2, 3, 9)]
RIGHT = {"a": 0, "b": 4, "c": 0}


def placement(offsets=RIGHT, peak=8, low=8, status="optimal"):
    return Placement(offsets, peak, low, status, "by hand", 0.0)


def test_what_is_right_passes():
    check_placement(BUFFERS, placement())
    check_placement(BUFFERS, placement(), capacity=8)
    check_placement([], Placement({}, 0, 0, "optimal", "nothing to place", 0.0))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (placement({"a": 1, "b": 4, "c": 0}), r"buffers a \[1, 5\) and b \[4, 8\) share bytes at event 2"),
        (placement({"a": 0, "b": 4, "c": 5}), r"b \[4, 8\).* share bytes at event 3"),
        (placement({"a": 0, "b": 4}), "buffer c has no offset"),
        (placement({**RIGHT, "d": 0}), "offset for d, which is no buffer"),
        (placement({**RIGHT, "c": -1}), "buffer c has offset -1"),
        (placement({**RIGHT, "c": 0.5}), "buffer c has offset 0.5"),
        (placement(peak=7, low=7), "buffer b ends at 8, above the peak 7"),
        (placement(peak=9, status="feasible"), "no buffer reaches it"),
        (placement(low=7), "lower bound 7; expected between 8 live bytes"),
        (placement(low=9), "lower bound 9"),
        (placement(status="best"), "status 'best'"),
        (placement({"a": 0, "b": 5, "c": 0}, peak=9), "optimal, but peak 9 is not the lower bound 8"),
    ],
)
def test_what_is_wrong_is_refused(wrong, why):
    with pytest.raises(ValueError, match=why):
        check_placement(BUFFERS, wrong)


def test_a_capacity_is_kept():
    with pytest.raises(ValueError, match="peak 8 is above the capacity 7"):
        check_placement(BUFFERS, placement(), capacity=7)


def test_ids_that_come_twice_are_refused():
    with pytest.raises(ValueError, match="same id"):
        check_placement([*BUFFERS, BUFFERS[0]], placement())


@given(problems(), st.data())
def test_it_agrees_with_comparing_all_pairs(buffers, data):
    offsets = {buffer.id: data.draw(st.integers(0, 120)) for buffer in buffers}
    ends = [offsets[buffer.id] + buffer.size for buffer in buffers]
    live = max((sum(b.size for b in buffers if b.birth <= a.birth < b.death) for a in buffers), default=0)
    peak = max(ends, default=0)
    overlap = clash([buffer for buffer in buffers if buffer.size], offsets)
    try:
        check_placement(buffers, Placement(offsets, peak, min(live, peak), "feasible", "drawn", 0.0))
    except ValueError:
        assert overlap is not None or live > peak
    else:
        assert overlap is None and live <= peak
