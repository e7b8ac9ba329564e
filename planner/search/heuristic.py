"""Good plans in a moment: batching three ways, packed under deadlines, and then squeezed."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from seqpar.planner.problem.costs import Table
from seqpar.planner.search.balance import improve
from seqpar.planner.search.batching import Chunks, fewest_micro_batches, long_short, time_optimal, token_balanced
from seqpar.planner.search.climb import climb, solve_alone
from seqpar.planner.search.schedule import Schedule, schedule
from seqpar.planner.search.squeeze import shake, squeeze, stretch

Budget = Callable[[], bool]
Relax = Callable[[int, float], Sequence[float]]
_EACH = 40  # packings to squeeze each of the best schedules, before the best of them has the rest
_COUNTS = 4  # numbers of micro-batches that are tried
_FEW = 2  # of them, where trying is slow or promises little
_FULL = 0.99
_SQUEEZED = 3  # schedules that are worth more work


@dataclass(frozen=True)
class Candidate:
    """A schedule and the stage that found it."""

    schedule: Schedule
    stage: str

    @property
    def seconds(self) -> float:
        return self.schedule.step_seconds


@dataclass(frozen=True)
class Budgets:
    """Packings for the first schedules, for squeezing, for shaking, and compositions for climbing."""

    pack: Budget
    squeeze: Budget
    shake: Budget
    climb: Budget


def heuristic(table: Table, budgets: Budgets, seed: int, relax: Relax) -> list[Candidate]:
    """The best schedules found, the shortest first; may be empty.

    ``relax`` gives the seconds of so many micro-batches that are worth a try if a plan of so many seconds is known.
    """
    found = [*_in_runs(table, budgets.pack)]
    for count in _counts(table):
        lasting = relax(count, min((candidate.seconds for candidate in found), default=np.inf))
        packed = stretch(table, lasting, budgets.pack) if lasting else None
        if packed is not None:
            found.append(Candidate(packed, "relaxed batching"))
    found.extend(_chunked(table, budgets.pack))
    found.sort(key=lambda candidate: candidate.seconds)
    chosen = _distinct(found)[:_SQUEEZED]
    better = [
        Candidate(squeeze(table, start.schedule, _some(budgets.squeeze)), f"{start.stage}, squeezed")
        for start in chosen
    ]
    found = sorted(better + found, key=lambda candidate: candidate.seconds)
    if not found:
        return []
    best = found[0]
    squeezed = Candidate(squeeze(table, best.schedule, budgets.squeeze), best.stage)
    shaken = Candidate(shake(table, squeezed.schedule, budgets.shake, seed), f"{best.stage}, shaken")
    polished = Candidate(_polish(table, shaken.schedule, budgets.climb), f"{shaken.stage}, polished")
    return _shorter([polished, shaken, squeezed, *found])


def _some(spend: Budget) -> Budget:
    """So much of a budget that others have some, too."""
    units = iter(range(_EACH))
    return lambda: next(units, None) is not None and spend()


def _counts(table: Table) -> list[int]:
    """Numbers of micro-batches to try, from the fewest in which the documents leave a little room."""
    held = table.devices * table.capacity * _FULL
    fewest = max(fewest_micro_batches(table), math.ceil(int(table.tokens.sum()) / held))
    return [count for count in range(fewest, fewest + _COUNTS) if count <= table.num_documents]


def _in_runs(table: Table, spend: Budget) -> Iterator[Candidate]:
    for _, seconds in time_optimal(table, _counts(table)[:_FEW]):
        packed = stretch(table, seconds, spend)
        if packed is not None:
            yield Candidate(packed, "time-optimal batching")


def _chunked(table: Table, spend: Budget) -> Iterator[Candidate]:
    for count in _counts(table)[:_FEW]:
        ways: tuple[tuple[str, Chunks], ...] = (("token-balanced", token_balanced(table, count)),
                                                ("long-short", long_short(table, count)))  # fmt: skip
        for name, chunks in ways:
            packed = _chunk_by_chunk(table, chunks, spend)
            if packed is not None:
                yield Candidate(packed, f"{name} batching")


def _chunk_by_chunk(table: Table, chunks: Chunks, spend: Budget) -> Schedule | None:
    batches, areas = [], table.area.min(axis=1)
    for chunk in chunks:
        area = float(areas[list(chunk)].sum()) / table.devices
        batch = solve_alone(table, chunk, float(table.fixed.min()) + area, spend)
        if batch is None:
            return None
        batches.append(batch)
    return schedule(table, batches) if batches else None


def _polish(table: Table, start: Schedule, spend: Budget) -> Schedule:
    """Each micro-batch on its own: other compositions where it has few documents, moves and swaps everywhere."""
    batches = [
        climb(table, groups, spend)
        if sum(len(rows) for _, rows in groups) <= 2 * table.devices
        else improve(table, groups)
        for groups in start.micro_batches
    ]
    return schedule(table, batches)


def _distinct(found: Sequence[Candidate]) -> list[Candidate]:
    """The best of each number of micro-batches and way of batching, so that squeezing starts from unlike schedules."""
    kept: dict[tuple[str, int], Candidate] = {}
    for candidate in found:
        kept.setdefault((candidate.stage, len(candidate.schedule.seconds)), candidate)
    return [candidate for candidate in kept.values() if candidate.seconds < found[0].seconds * 1.1]


def _shorter(found: Sequence[Candidate]) -> list[Candidate]:
    """From short to long; of equal ones, that of the simpler stage."""
    return sorted(found, key=lambda candidate: (np.round(candidate.seconds, 9), len(candidate.stage)))
