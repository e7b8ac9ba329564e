"""Sections keep exactly the overlaps and the loads that matter."""

from hypothesis import given

from seqpar.offload.placement.buffers import Buffer
from seqpar.offload.placement.sections import sections_of
from tests.offload.placement.placements import problems, scattered


@given(problems())
def test_two_buffers_overlap_exactly_if_they_share_a_section(buffers):
    buffers = [buffer for buffer in buffers if buffer.size]
    if not buffers:
        return
    sections = sections_of(buffers)
    ranges = [set(range(*pair)) for pair in zip(sections.first, sections.last)]
    for i, one in enumerate(buffers):
        for j, other in enumerate(buffers):
            assert bool(ranges[i] & ranges[j]) == one.overlaps(other)


@given(problems())
def test_no_section_lies_within_another_and_the_most_live_bytes_are_kept(buffers):
    buffers = [buffer for buffer in buffers if buffer.size]
    if not buffers:
        return
    sections = sections_of(buffers)
    members = [set(section) for section in sections.members]
    assert not any(one <= other for one in members for other in members if one is not other)
    events = {buffer.birth for buffer in buffers}
    live = max(sum(b.size for b in buffers if b.birth <= event < b.death) for event in events)
    assert max(sections.loads) * sections.unit == live


def test_a_buffer_is_in_every_section_of_its_range():
    sections = sections_of(scattered(3, 60))
    for section, members in enumerate(sections.members):
        inside = {b for b in range(60) if sections.first[b] <= section < sections.last[b]}
        assert inside == set(members)


def test_sizes_are_in_units_of_their_greatest_common_divisor():
    sections = sections_of([Buffer("a", 1536, 0, 2), Buffer("b", 1024, 1, 3)])
    assert (sections.unit, sections.sizes) == (512, (3, 2))
