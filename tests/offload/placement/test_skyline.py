"""The skyline: moves keep its laws, and taking them back restores it exactly."""

import copy
import random

import pytest

from seqpar.offload.placement.buffers import Buffer
from seqpar.offload.placement.sections import sections_of
from seqpar.offload.placement.skyline import Skyline
from tests.offload.placement.placements import planted, scattered


def picture(sky):
    return copy.deepcopy((sky.low, sky.offset, sky.floor, sky.rest, sky.count, sky.live))


def check_laws(sky):
    sections = sky.sections
    for section, live in enumerate(sky.live):
        assert live == {b for b in sections.members[section] if sky.offset[b] < 0}
        assert sky.rest[section] == sum(sections.sizes[b] for b in live)
        if live:
            lows = [sky.low[b] for b in live]
            assert sky.floor[section] == min(lows)
            assert sky.count[section] == lows.count(min(lows))
            assert sky.floor[section] + sky.rest[section] <= sky.capacity
            placed = [sky.offset[b] + sections.sizes[b] for b in sections.members[section] if sky.offset[b] >= 0]
            assert sky.floor[section] >= max(placed, default=0)


def moves(sky):
    """All moves of a section with the lowest floor."""
    section = min((s for s, live in enumerate(sky.live) if live), key=sky.floor.__getitem__)
    return [b for b in sky.live[section] if sky.low[b] == sky.floor[section]], section


@pytest.mark.parametrize("seed", range(12))
def test_moves_keep_the_laws_and_undo_restores_everything(seed):
    chance = random.Random(seed)
    buffers = planted(seed, 18) if seed % 2 else scattered(seed, 18)
    sections = sections_of(buffers)
    sky = Skyline(sections, max(sections.loads) * 5 // 4)
    check_laws(sky)
    history = []
    while any(sky.live):
        standing, section = moves(sky)
        history.append((len(sky.trail), picture(sky)))
        choice = chance.choice([*standing, None])
        if not (sky.lift(section) if choice is None else sky.place(choice)):
            break
        check_laws(sky)
    for mark, before in reversed(history):
        sky.undo(mark)
        assert picture(sky) == before


def test_a_buffer_pushes_up_all_that_it_overlaps():
    sky = Skyline(sections_of([Buffer("a", 2, 0, 4), Buffer("b", 3, 2, 6), Buffer("c", 5, 5, 8)]), 20)
    assert sky.place(0)
    assert sky.low == [0, 2, 0]
    assert sky.floor[:2] == [2, 0]


def test_a_move_that_leaves_too_little_room_is_refused():
    sky = Skyline(sections_of([Buffer("a", 2, 0, 2), Buffer("b", 2, 1, 4), Buffer("c", 3, 3, 5)]), 6)
    assert sky.place(0) and not sky.lift(1)  # above a gap c would stand on b, and b on a: 7


def test_a_gap_needs_something_to_stand_on():
    assert not Skyline(sections_of([Buffer("a", 1, 0, 2)]), 100).lift(0)
    sky = Skyline(sections_of([Buffer("a", 2, 0, 2), Buffer("b", 3, 0, 2)]), 100)
    assert sky.lift(0) and sky.low == [3, 2]


def test_above_a_gap_stands_nothing_lower_than_the_smallest_neighbour():
    buffers = [Buffer("a", 4, 0, 9), Buffer("small", 1, 0, 3), Buffer("large", 7, 3, 6), Buffer("b", 2, 6, 9)]
    sky = Skyline(sections_of(buffers), 30)
    others_go = [sky.low[1], sky.low[2]]
    section = sections_of(buffers).first[0]
    assert sky.lift(section)
    # In that section "a" and "small" may not stand at 0: "a" stands on "small" at the least, "small" on "a".
    assert (sky.low[0], sky.low[1]) == (1, 4) and others_go == [0, 0]
