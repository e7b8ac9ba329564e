"""MEMO's programme: one level is exact on small problems, two levels repeat what repeats."""

import pytest

from seqpar.offload.placement.bilevel import place_by_mip, place_levels
from seqpar.offload.placement.buffers import Buffer
from seqpar.offload.placement.place import lower_bound
from tests.offload.placement.placements import clash, least_peak, scattered

pytest.importorskip("pulp")


def check(buffers, offsets):
    found = {buffer.id: offset for buffer, offset in zip(buffers, offsets)}
    assert clash(buffers, found) is None and min(offsets) >= 0
    return max(offset + buffer.size for buffer, offset in zip(buffers, offsets))


def shifted(buffers, by, name):
    return [Buffer(f"{name}.{b.id}", b.size, b.birth + by, b.death + by) for b in buffers]


def layers(num_layers, seed=8, num_buffers=6, events=12):
    """The same transient buffers once per layer, and one activation of every layer that lives to the end."""
    passes = [shifted(scattered(seed, num_buffers, events), 40 * layer, f"l{layer}") for layer in range(num_layers)]
    kept = [Buffer(f"kept{layer}", 5, 40 * layer, 40 * num_layers) for layer in range(num_layers)]
    return [buffer for one in passes for buffer in one] + kept, [[buffer.id for buffer in one] for one in passes]


@pytest.mark.parametrize("seed", range(25))
def test_one_level_finds_the_optimum(seed):
    buffers = scattered(seed, 6)
    assert check(buffers, place_by_mip(buffers, 20)) == least_peak(buffers)


def test_sizes_of_gigabytes_are_stacked_in_whole_bytes():
    buffers = [Buffer(b.id, b.size * (2**31 - 1), b.birth, b.death) for b in scattered(4, 6)]
    assert check(buffers, place_by_mip(buffers, 20)) == least_peak(buffers)


def test_the_programme_improves_on_greedy():
    from seqpar.offload.placement.greedy import greedy_placements

    better = 0
    for seed in range(200):
        buffers = scattered(seed, 7)
        greedy = min(found.peak for found in greedy_placements(buffers))
        if greedy > (best := least_peak(buffers)):
            assert check(buffers, place_by_mip(buffers, 20)) == best
            better += 1
        if better == 3:
            return
    pytest.fail("no problem on which greedy is not the best")


@pytest.mark.parametrize("num_layers", [1, 2, 8])
def test_two_levels_give_a_placement_with_the_passes_alike(num_layers):
    buffers, levels = layers(num_layers)
    offsets = place_levels(buffers, levels, 20)
    assert check(buffers, offsets) >= lower_bound(buffers)
    found = {buffer.id: offset for buffer, offset in zip(buffers, offsets)}
    within = [[found[name] - min(found[i] for i in level) for name in level] for level in levels]
    assert all(one == within[0] for one in within)


def test_equal_passes_are_solved_once(monkeypatch):
    import seqpar.offload.placement.bilevel as bilevel

    calls = []
    real = bilevel.place_by_mip
    monkeypatch.setattr(bilevel, "place_by_mip", lambda *args: calls.append(1) or real(*args))
    buffers, levels = layers(8)
    place_levels(buffers, levels, 20)
    assert len(calls) == 1 + 8 + 1  # the pass, eight activations of different lives, and the outer level


def test_the_whole_is_at_the_bound_where_the_passes_are():
    buffers, levels = layers(4)
    peak = check(buffers, place_levels(buffers, levels, 20))
    inner = least_peak([buffer for buffer in buffers if buffer.id in levels[0]])
    assert peak == inner + 4 * 5


@pytest.mark.parametrize(
    ("levels", "why"),
    [([["a"], ["a"]], "buffer a is in two levels"), ([["x"]], "level with x: there is no buffer of that id")],
)
def test_levels_that_make_no_sense_are_refused(levels, why):
    with pytest.raises(ValueError, match=why):
        place_levels([Buffer("a", 1, 0, 1)], levels, 1)


def test_without_pulp_greedy_answers(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    buffers = scattered(1, 7)
    check(buffers, place_by_mip(buffers, 20))
