"""Costs that samples were made from are found again; noise moves them little; what cannot be told apart is refused."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar.planner.problem.fit import Sample, fit, seconds_of
from seqpar.planner.problem.problem import GroupKind

MIXES = ((64,), (128,), (256,), (512,), (1024,), (32,) * 8, (64,) * 16, (700, 30, 30, 1))


def samples(degree: int, transport: str, a2: float, a1: float, b: float, mixes=MIXES) -> list[Sample]:
    return [Sample(degree, transport, mix, a2 * sum(s * s for s in mix) + a1 * sum(mix) + b + 1e-300) for mix in mixes]


def costs(kind: GroupKind) -> tuple[float, float, float]:
    return (
        kind.quadratic_seconds,
        kind.linear_seconds + kind.message_seconds,
        kind.fixed_seconds + kind.latency_seconds,
    )


@pytest.mark.parametrize("a2", [0.0, 3e-9, 1e-7])
@pytest.mark.parametrize("a1", [0.0, 2e-6, 1e-4])
@pytest.mark.parametrize("b", [0.0, 1e-3, 0.5])
def test_exact_costs_are_recovered(a2: float, a1: float, b: float) -> None:
    if a2 == a1 == b == 0:
        return
    found = fit(samples(1, "none", a2, a1, b))
    scale = (a2 * 2**20 + a1 * 2**10 + b) * 1e-9
    got = costs(found.kinds[0])
    assert abs(got[0] - a2) * 2**20 < scale and abs(got[1] - a1) * 2**10 < scale and abs(got[2] - b) < scale
    assert found.largest_error < 1e-9
    assert found.errors[0].num_samples == len(MIXES)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.5, 2.0), min_size=len(MIXES), max_size=len(MIXES)), st.integers(0, 2**32))
def test_no_other_costs_of_at_least_zero_are_nearer(factors: list[float], seed: int) -> None:
    rng = random.Random(seed)
    noisy = [replace(s, seconds=s.seconds * f) for s, f in zip(samples(1, "none", 3e-9, 2e-6, 1e-3), factors)]
    kind = fit(noisy).kinds[0]
    assert min(costs(kind)) >= 0

    def distance(a2: float, a1: float, b: float) -> float:
        made = samples(1, "none", a2, a1, b)
        return sum((other.seconds / sample.seconds - 1) ** 2 for other, sample in zip(made, noisy))

    mine = distance(*costs(kind))
    for scale in (1e-4, 1e-2, 1.0):
        for _ in range(20):
            moved = [
                max(0.0, cost + rng.gauss(0, scale) * typical) for cost, typical in zip(costs(kind), (3e-9, 2e-6, 1e-3))
            ]
            assert distance(*moved) >= mine * (1 - 1e-9) - 1e-12


def test_noise_moves_predictions_little() -> None:
    rng = np.random.default_rng(0)
    truth = samples(1, "none", 3e-9, 2e-6, 1e-3)
    noisy = [replace(s, seconds=s.seconds * float(rng.normal(1, 0.03))) for s in truth * 3]
    found = fit(noisy)
    for mix in ((90,), (400,), (900,), (100,) * 5):
        exact = 3e-9 * sum(s * s for s in mix) + 2e-6 * sum(mix) + 1e-3
        assert seconds_of(found.kinds[0], mix) == pytest.approx(exact, rel=0.05)
    assert 0.005 < found.errors[0].mean < 0.05 and found.errors[0].mean < found.largest_error < 0.15


def test_short_steps_count_as_much_as_long_ones() -> None:
    """One long step that is off by a tenth must not spoil the short ones by many times their time."""
    truth = samples(1, "none", 0.0, 1e-6, 1e-4)
    off = [*truth, Sample(1, "none", (100_000,), 0.11)]
    assert fit(off).largest_error < 0.12


def test_beyond_a_share_of_one_device_is_communication() -> None:
    seen = samples(1, "none", 4e-9, 8e-6, 1e-3)
    seen += samples(4, "ring", 1e-9, 3e-6, 5e-3)
    seen += samples(2, "all_to_all", 2e-9, 3e-6, 4e-4)
    one, two, four = fit(list(reversed(seen))).kinds
    assert (one.degree, one.transport, two.degree, two.transport) == (1, "none", 2, "all_to_all")
    assert (four.degree, four.transport) == (4, "ring")
    close = {"rel": 1e-6, "abs": 1e-15}
    assert (one.message_seconds, one.latency_seconds) == (0.0, 0.0)
    assert four.linear_seconds == pytest.approx(2e-6, **close)
    assert four.message_seconds == pytest.approx(1e-6, **close)
    assert four.fixed_seconds == pytest.approx(1e-3, **close)
    assert four.latency_seconds == pytest.approx(4e-3, **close)
    # Faster than half of one device: all of it is computation.
    assert two.linear_seconds == pytest.approx(3e-6, **close)
    assert two.fixed_seconds == pytest.approx(4e-4, **close)
    assert (two.message_seconds, two.latency_seconds) == (0.0, 0.0)
    for kind in (two, four):
        expected = next(s.seconds for s in seen if s.degree == kind.degree and len(s.lengths) == 4)
        assert seconds_of(kind, MIXES[-1]) == pytest.approx(expected, rel=1e-6)


def test_without_one_device_all_is_computation() -> None:
    (kind,) = fit(samples(3, "ring", 1e-9, 3e-6, 5e-3)).kinds
    assert (kind.message_seconds, kind.latency_seconds) == (0.0, 0.0)
    assert kind.linear_seconds == pytest.approx(3e-6)


def test_the_same_samples_give_the_same_fit() -> None:
    seen = samples(1, "none", 4e-9, 8e-6, 1e-3) + samples(4, "ring", 1e-9, 3e-6, 5e-3)
    assert fit(seen) == fit(seen)


@pytest.mark.parametrize(
    "mixes",
    [
        MIXES[:1],
        MIXES[:2],
        ((128,),) * 9,
        ((128,), (64,), (128,), (64,)),
        ((128,), (64, 64)),
        ((128,), (128,) * 2, (128,) * 3, (128,) * 4),
    ],
)
def test_what_cannot_be_told_apart_is_refused(mixes) -> None:
    with pytest.raises(ValueError, match=r"degree 2 over ring: \d samples cannot tell"):
        fit(samples(1, "none", 4e-9, 8e-6, 1e-3) + samples(2, "ring", 1e-9, 3e-6, 1e-3, mixes))


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_impossible_times_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="finite number above 0"):
        Sample(1, "none", (5,), seconds)


@pytest.mark.parametrize(
    ("degree", "lengths", "says"), [(0, (5,), "degree"), (1, (), "documents"), (1, (5, 0), "at le")]
)
def test_impossible_samples_are_refused(degree: int, lengths: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sample(degree, "none", lengths, 1.0)


def test_no_samples_and_two_transports_of_one_device_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        fit([])
    with pytest.raises(ValueError, match="no transport to choose"):
        fit(samples(1, "none", 0, 1e-6, 0) + samples(1, "ring", 0, 1e-6, 0))
