"""How short a step can be at best: bounds below every plan, and which of them is active."""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from seqpar.planner.bounds.fluid import Box, Classes, Relaxed, classes, fluid_seconds, relaxed_step
from seqpar.planner.bounds.lp import lp_available
from seqpar.planner.problem.costs import Table
from seqpar.planner.search.batching import area, fewest_micro_batches

Budget = Callable[[], bool]
_SAFETY = 1e-7  # a share of the bound, for the tolerances of the LP solver
_COUNTS = 6  # numbers of micro-batches that are looked at one by one


@dataclass(frozen=True)
class Bound:
    """No plan takes fewer ``seconds``, because of ``reason``."""

    seconds: float
    reason: str


@dataclass(frozen=True, order=True)
class _Case:
    """Boxes for the micro-batches of a step, and a bound below all steps in them."""

    seconds: float
    number: int
    boxes: tuple[Box, ...]


def closed_form(table: Table) -> Bound:
    """The larger of two bounds that need no solver.

    Longest document: it takes at least its seconds in the fastest kind of group, and every other micro-batch at least a
    fixed cost. Area: all devices work all the time, each document in the group that spends the fewest device-seconds.
    """
    fewest = fewest_micro_batches(table)
    fastest = (table.seconds + table.fixed).min(axis=1)
    longest = int(fastest.argmax())
    by_document = float(fastest[longest]) + (fewest - 1) * float(table.fixed.min())
    by_area = area(table, fewest)
    if by_document >= by_area:
        return Bound(by_document, f"limited by the longest document, {int(table.tokens[longest]):,} tokens")
    batches = f"{fewest} micro-batch{'es' if fewest > 1 else ''}"
    return Bound(by_area, f"limited by the work of all documents, spread evenly in {batches}")


def shortest_with(table: Table, micro_batches: int, step_seconds: float) -> float:
    """The fluid bound of plans of exactly so many micro-batches that are shorter than ``step_seconds``."""
    found = relaxed_step(table, classes(table), micro_batches, step_seconds)
    return min(found.seconds * (1 - _SAFETY), step_seconds)


def relaxable(table: Table) -> bool:
    """Whether relaxations of a whole step can be solved here."""
    return lp_available() and bool(table.fixed.min() > 0)


def whole_step(table: Table, step_seconds: float, spend: Budget, relaxed: Sequence[Relaxed] = ()) -> Bound:
    """The best bound that the budget allows, given a plan of ``step_seconds``.

    On top of the closed forms: the fluid relaxation for each number of micro-batches (``relaxed`` has those
    that were solved already, for a plan of no fewer seconds), branching over how long each micro-batch lasts. Equal to
    ``step_seconds`` if no case is left in which a plan could be shorter. Without an LP solver it is the closed form.
    """
    best = closed_form(table)
    if best.seconds >= step_seconds or not relaxable(table):
        return Bound(min(best.seconds, step_seconds), best.reason)
    seconds, solved = _branch(table, step_seconds, spend, relaxed)
    seconds *= 1 - _SAFETY
    if seconds <= best.seconds:
        return best
    return Bound(seconds, f"limited by time, memory and devices together ({solved} relaxations)")


def _branch(table: Table, step_seconds: float, spend: Budget, relaxed: Sequence[Relaxed]) -> tuple[float, int]:
    """Best-first over cases; the bound is that of the least open one, or the step itself if none is left."""
    documents = classes(table)
    known = {step.micro_batches: step.seconds for step in relaxed}
    cases = _roots(table, documents, step_seconds, spend, known)
    heapq.heapify(cases)
    solved = len(known)
    while cases:
        case = heapq.heappop(cases)
        for boxes in _split(case.boxes, step_seconds):
            if not spend():
                return case.seconds, solved
            solved += 1
            seconds = max(case.seconds, fluid_seconds(table, documents, boxes))
            if seconds < step_seconds:
                heapq.heappush(cases, _Case(seconds, solved, boxes))
        if not case.boxes:
            return case.seconds, solved
    return step_seconds, solved


def _roots(
    table: Table, documents: Classes, step_seconds: float, spend: Budget, known: dict[int, float]
) -> list[_Case]:
    """A case for each number of micro-batches with which a plan might be shorter; the last one is for all above."""
    fixed, fewest = float(table.fixed.min()), fewest_micro_batches(table)
    cases: list[_Case] = []
    for count in range(fewest, fewest + _COUNTS):
        seconds = area(table, count)
        if seconds >= step_seconds:
            return cases
        if count not in known and spend():
            known[count] = relaxed_step(table, documents, count, step_seconds).seconds
        seconds = max(seconds, known.get(count, 0.0))
        if seconds < step_seconds:
            boxes = _fitting((Box(fixed, step_seconds, count),), step_seconds)
            cases.append(_Case(seconds, count, boxes))
    rest = area(table, fewest + _COUNTS)
    return cases if rest >= step_seconds else [*cases, _Case(rest, fewest + _COUNTS, ())]


def _split(boxes: tuple[Box, ...], step_seconds: float) -> Iterator[tuple[Box, ...]]:
    """The widest box cut in two halves, with each way to share out its micro-batches."""
    if not boxes:
        return
    at = max(range(len(boxes)), key=lambda i: boxes[i].high / boxes[i].low)
    wide, others = boxes[at], boxes[:at] + boxes[at + 1 :]
    middle = math.sqrt(wide.low * wide.high)
    for upper in range(wide.count + 1):
        halves = (Box(middle, wide.high, upper), Box(wide.low, middle, wide.count - upper))
        found = _fitting((*others, *(half for half in halves if half.count)), step_seconds)
        if all(box.low <= box.high for box in found):
            yield found


def _fitting(boxes: tuple[Box, ...], step_seconds: float) -> tuple[Box, ...]:
    """No micro-batch can take longer than the step leaves when all others are as short as they can be."""
    shortest = sum(box.low * box.count for box in boxes)
    return tuple(Box(box.low, min(box.high, step_seconds - shortest + box.low), box.count) for box in boxes)
