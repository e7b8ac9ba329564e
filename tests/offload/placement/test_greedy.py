"""Greedy placements are placements, and are never below the lower bound."""

import itertools
import sys

import pytest
from hypothesis import given

from seqpar.offload.placement.buffers import Buffer
from seqpar.offload.placement.greedy import greedy_placements
from seqpar.offload.placement.place import lower_bound
from tests.offload.placement.placements import clash, least_peak, planted, problems, scattered


def offsets_of(buffers, found):
    return {buffer.id: offset for buffer, offset in zip(buffers, found.offsets)}


@given(problems())
def test_every_order_gives_a_placement(buffers):
    for found in greedy_placements(buffers):
        offsets = offsets_of(buffers, found)
        assert clash([buffer for buffer in buffers if buffer.size], offsets) is None
        assert found.peak == max((offsets[b.id] + b.size for b in buffers), default=0)
        assert found.peak >= lower_bound(buffers)


@pytest.mark.parametrize("seed", range(20))
def test_no_order_is_below_the_optimum(seed):
    buffers = scattered(seed, 6)
    assert all(found.peak >= least_peak(buffers) for found in greedy_placements(buffers))


def test_there_are_four_orders_with_two_fits():
    names = [found.name for found in greedy_placements(planted(0, 12))]
    assert names[0] == "greedy by size, first fit"
    assert names == [
        f"greedy by {order}, {fit} fit" for fit in ("first", "best") for order in ("size", "area", "duration", "start")
    ]


def test_first_fit_takes_the_lowest_hole_and_best_fit_the_narrowest():
    # By size: wall, floor, lid; then two holes are left above event 5: one of 4 below the lid, one of 3 above it.
    buffers = [
        Buffer("base", 90, 0, 9),
        Buffer("wide", 5, 0, 2),
        Buffer("lid", 80, 0, 9),
        Buffer("narrow", 3, 0, 2),
        Buffer("roof", 70, 0, 9),
        Buffer("small", 3, 4, 9),
    ]
    firsts = {found.name: offsets_of(buffers, found) for found in greedy_placements(buffers)}
    assert firsts["greedy by size, first fit"]["small"] == firsts["greedy by size, best fit"]["small"] == 240
    holes = [
        Buffer("a", 9, 0, 1),
        Buffer("b", 8, 0, 3),
        Buffer("c", 5, 0, 1),
        Buffer("d", 4, 0, 3),
        Buffer("e", 3, 2, 3),
    ]
    by_fit = {found.name: offsets_of(holes, found)["e"] for found in greedy_placements(holes)}
    assert by_fit["greedy by size, first fit"] == 0
    assert by_fit["greedy by size, best fit"] == 17


def test_buffers_of_no_size_are_nobodys_neighbours():
    buffers = [Buffer("a", 4, 0, 3), Buffer("none", 0, 0, 3), Buffer("b", 4, 1, 2)]
    assert all(found.peak == 8 for found in greedy_placements(buffers))


def test_nothing_is_placed_at_peak_zero():
    assert all(found.peak == 0 and found.offsets == () for found in greedy_placements([]))


def test_two_thousand_buffers_take_so_many_calls_a_buffer():
    """Of functions of Python and of C, which no clock changes: near-linear."""
    few, many = (calls_of(buffers) for buffers in (500, 2000))
    assert many < 4.5 * few and many < 100 * 2000


def calls_of(buffers):
    some = scattered(0, buffers, events=1000, most=10**9)
    count = itertools.count()

    def counting(frame, event, what):
        if event in ("call", "c_call"):
            next(count)

    sys.setprofile(counting)
    try:
        found = next(greedy_placements(some))
    finally:
        sys.setprofile(None)
    assert len(found.offsets) == buffers
    return next(count)
