"""Buffers refuse lives and sizes that make no sense; a placement is a value that tells its gap."""

import dataclasses

import pytest

from seqpar.offload.placement.buffers import Buffer, Placement, check_ids


def placement(peak, low):
    return Placement({"a": 0}, peak, low, "feasible", "greedy", 0.0)


@pytest.mark.parametrize(("birth", "death"), [(3, 3), (4, 3)])
def test_a_life_holds_at_least_one_event(birth, death):
    with pytest.raises(ValueError, match=f"buffer a: upper {death} is not above lower {birth}"):
        Buffer("a", 1, birth, death)


def test_a_size_is_not_negative():
    with pytest.raises(ValueError, match="buffer a: size -1"):
        Buffer("a", -1, 0, 1)
    assert Buffer("a", 0, 0, 1).size == 0


@pytest.mark.parametrize(
    ("other", "overlap"), [((0, 2), False), ((0, 3), True), ((2, 5), True), ((4, 9), True), ((5, 9), False)]
)
def test_lives_are_half_open(other, overlap):
    one, two = Buffer("a", 1, 2, 5), Buffer("b", 1, *other)
    assert one.overlaps(two) is two.overlaps(one) is overlap


def test_the_gap_is_relative_to_the_lower_bound():
    assert placement(12, 10).gap == pytest.approx(0.2)
    assert placement(10, 10).gap == 0.0
    assert Placement({}, 0, 0, "optimal", "nothing to place", 0.0).gap == 0.0


def test_a_placement_cannot_be_changed():
    offsets = {"a": 0}
    found = Placement(offsets, 1, 1, "optimal", "greedy", 0.0)
    offsets["a"] = 7
    assert found.offsets["a"] == 0
    with pytest.raises(TypeError):
        found.offsets["a"] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.peak = 3


def test_an_id_comes_once():
    check_ids([Buffer("a", 1, 0, 1), Buffer("b", 1, 0, 1)])
    with pytest.raises(ValueError, match="buffer a comes twice"):
        check_ids([Buffer("a", 1, 0, 1), Buffer("a", 1, 5, 6)])
