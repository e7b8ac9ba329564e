"""Shortening the step: lower the deadlines of micro-batches as far as the documents can still be packed."""

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations

import numpy as np

from seqpar.planner.problem.costs import Floats, Table
from seqpar.planner.search.pack import pack
from seqpar.planner.search.schedule import Schedule, schedule

Budget = Callable[[], bool]  # takes one unit of work; False when there is none left
_LEAST = 0.9
_FACTORS = (1.0, 1.03, 1.07, 1.12, 1.2, 1.35, 1.6, 2.0, 3.0, 5.0, 9.0)
_SHAKES = (np.log(0.002), np.log(0.08))
_STEPS = (0.08, 0.04, 0.02, 0.01, 0.005)


def stretch(table: Table, seconds: Sequence[float], spend: Budget) -> Schedule | None:
    """The shortest schedule found whose micro-batches take these predicted seconds times one common factor.

    Longer deadlines do not always pack better, so factors are tried upwards first; then bisection goes below the first
    that fits.
    """
    low, best = _LEAST, None
    for high in _FACTORS:
        best = _packed(table, [high * value for value in seconds]) if spend() else None
        if best is not None:
            break
        low = high
    while best is not None and high - low > 0.01 and spend():
        middle = (low + high) / 2
        found = _packed(table, [middle * value for value in seconds])
        if found is None:
            low = middle
            continue
        high = middle
        best = min(best, found, key=lambda schedule: schedule.step_seconds)
    return best


def _packed(table: Table, deadlines: Sequence[float], bias: Floats | None = None) -> Schedule | None:
    batches = pack(table, deadlines, bias)
    return None if batches is None else schedule(table, batches)


def squeeze(table: Table, start: Schedule, spend: Budget) -> Schedule:
    """Lower one deadline at a time, or one by much while another grows by less, in steps that get smaller."""
    best = start
    for step in _STEPS:
        moved = True
        while moved:
            moved = False
            for change in _changes(len(best.seconds), step * best.step_seconds / len(best.seconds)):
                if not spend():
                    return best
                deadlines = [value + delta for value, delta in zip(best.seconds, change)]
                found = _packed(table, deadlines)
                if found is not None and found.step_seconds < best.step_seconds * (1 - 1e-6):
                    best, moved = found, True
                    break
    return best


def _changes(count: int, step: float) -> Iterator[list[float]]:
    yield [-step / count] * count
    for down in range(count):
        yield [-step if i == down else 0.0 for i in range(count)]
    for down, up in permutations(range(count), 2):
        yield [-step if i == down else step / 2 if i == up else 0.0 for i in range(count)]


def shake(table: Table, start: Schedule, spend: Budget, seed: int) -> Schedule:
    """Random changes of deadlines, and of what device-seconds seem to cost where; the shortest schedule is kept."""
    random, best = np.random.default_rng(seed), start
    while spend():
        count = len(best.seconds)
        deadlines = np.asarray(best.seconds)
        step = deadlines.mean() * np.exp(random.uniform(*_SHAKES))
        down, up = int(random.integers(count)), int(random.integers(count))
        deadlines[up] += step * random.random()
        deadlines[down] -= step
        bias = np.exp(random.normal(0.0, 0.1, (count, len(table.degrees)))) if random.random() < 0.5 else None
        found = _packed(table, deadlines.tolist(), bias)
        if found is not None and found.step_seconds < best.step_seconds * (1 - 1e-7):
            best = found
    return best
