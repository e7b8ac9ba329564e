"""The exact problem as a mixed-integer program, in a form whose relaxation is tight.

FlexSP's program (arXiv 2412.01523, Eq. 5-14) with the memory row multiplied by the group's indicator, which replaces
its big-M; groups of one kind and micro-batches ordered, so that plans that differ in names only are seen once; and
all device-seconds of a micro-batch together. Documents of the same length are one integer variable, so nothing is
rounded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from seqpar.planner.exact.solver import INFINITY, Answer, Limits, Program, solve
from seqpar.planner.problem.costs import Table
from seqpar.planner.search.schedule import Group, Schedule, schedule

_ROOM = 1 + 1e-9


@dataclass(frozen=True)
class Slot:
    """A group that may exist: its kind, micro-batch, indicator, and a variable for each class of documents."""

    kind: int
    micro_batch: int
    used: int
    taken: dict[int, int]


@dataclass(frozen=True)
class Model:
    """The program, its slots, and the rows of the table in each class of documents of the same length."""

    program: Program
    slots: tuple[Slot, ...]
    classes: tuple[tuple[int, ...], ...]
    seconds: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """A schedule, if one was found; a bound below every schedule of at most so many micro-batches; and how it ended."""

    schedule: Schedule | None
    bound: float
    optimal: bool
    solver: str
    out_of_time: bool
    looks: int = 0


def size(table: Table, micro_batches: int) -> int:
    """How many variables the program has, about: what decides whether it is worth a try."""
    return len(_classes(table)) * sum(_num_slots(table, kind) for kind in range(len(table.degrees))) * micro_batches


def solve_exactly(table: Table, start: Schedule, micro_batches: int, limits: Limits) -> Outcome:
    """The shortest schedule of at most so many micro-batches, from a schedule that is known."""
    model = _model(table, micro_batches, start.step_seconds)
    answer = solve(model.program, _values(table, model, start), limits)
    found = _schedule(table, model, answer)
    return Outcome(found, answer.bound, answer.optimal, answer.solver, answer.out_of_time, answer.looks)


def _classes(table: Table) -> tuple[tuple[int, ...], ...]:
    starts = [0, *(np.flatnonzero(np.diff(table.tokens)) + 1).tolist(), table.num_documents]
    return tuple(tuple(range(a, b)) for a, b in pairwise(starts))


def _num_slots(table: Table, kind: int) -> int:
    """Groups of a kind that can be of use: no more than devices allow, and no more than documents that fit."""
    fitting = int(np.isfinite(table.seconds[:, kind]).sum())
    return min(int(table.devices // table.degrees[kind]), fitting)


def _model(table: Table, micro_batches: int, step_seconds: float) -> Model:
    program, classes = Program(), _classes(table)
    seconds = tuple(program.variable(1.0, 0.0, step_seconds * _ROOM, False) for _ in range(micro_batches))
    slots: list[Slot] = []
    for batch in range(micro_batches):
        mine = [
            _slot(program, table, classes, kind, batch, step_seconds)
            for kind in range(len(table.degrees)) for _ in range(_num_slots(table, kind))
        ]  # fmt: skip
        for slot in mine:
            _limit_slot(program, table, classes, slot, seconds[batch])
        _limit_devices(program, table, classes, mine, seconds[batch])
        slots.extend(mine)
    for number, members in enumerate(classes):
        program.row(len(members), len(members), {slot.taken[number]: 1.0 for slot in slots if number in slot.taken})
    for first, second in pairwise(seconds):
        program.row(0.0, INFINITY, {first: 1.0, second: -1.0})
    program.row(-INFINITY, step_seconds * _ROOM, dict.fromkeys(seconds, 1.0))
    return Model(program, tuple(slots), classes, seconds)


def _slot(
    program: Program, table: Table, classes: Sequence[tuple[int, ...]], kind: int, batch: int, step_seconds: float
) -> Slot:
    room, fixed = int(table.degrees[kind]) * table.capacity, float(table.fixed[kind])
    taken = {}
    for number, members in enumerate(classes):
        seconds = float(table.seconds[members[0], kind])
        if fixed + seconds <= step_seconds * _ROOM:
            most = min(len(members), room // int(table.tokens[members[0]]))
            taken[number] = program.variable(0.0, 0.0, float(most), True)
    return Slot(kind, batch, program.variable(0.0, 0.0, 1.0, True), taken)


def _limit_slot(program: Program, table: Table, classes: Sequence[tuple[int, ...]], slot: Slot, seconds: int) -> None:
    """A group takes no longer than its micro-batch, holds its tokens if it exists, and has a token for every rank."""
    degree = float(table.degrees[slot.kind])
    tokens = {variable: float(table.tokens[classes[number][0]]) for number, variable in slot.taken.items()}
    program.row(-INFINITY, 0.0, {**_seconds(table, classes, slot), seconds: -1.0})
    program.row(-INFINITY, 0.0, {**tokens, slot.used: -degree * table.capacity})
    program.row(0.0, INFINITY, {**tokens, slot.used: -degree})
    for variable in slot.taken.values():
        program.row(-INFINITY, 0.0, {variable: 1.0, slot.used: -program.high[variable]})


def _limit_devices(
    program: Program, table: Table, classes: Sequence[tuple[int, ...]], slots: Sequence[Slot], seconds: int
) -> None:
    """Groups share the devices, at every moment and in device-seconds; those of one kind go from slow to fast."""
    devices = float(table.devices)
    program.row(-INFINITY, devices, {slot.used: float(table.degrees[slot.kind]) for slot in slots})
    spent: dict[int, float] = {seconds: -devices}
    for slot in slots:
        degree = float(table.degrees[slot.kind])
        spent.update({variable: degree * value for variable, value in _seconds(table, classes, slot).items()})
    program.row(-INFINITY, 0.0, spent)
    for first, second in pairwise(slots):
        if first.kind == second.kind:
            program.row(0.0, INFINITY, {first.used: 1.0, second.used: -1.0})
            order = _seconds(table, classes, first)
            order.update({variable: -value for variable, value in _seconds(table, classes, second).items()})
            program.row(0.0, INFINITY, order)


def _seconds(table: Table, classes: Sequence[tuple[int, ...]], slot: Slot) -> dict[int, float]:
    terms = {variable: float(table.seconds[classes[number][0], slot.kind]) for number, variable in slot.taken.items()}
    return {slot.used: float(table.fixed[slot.kind]), **terms}


def _values(table: Table, model: Model, start: Schedule) -> list[float] | None:
    """The start as values of all variables: groups of a kind from slow to fast; None if it has more micro-batches."""
    if len(start.micro_batches) > len(model.seconds):
        return None
    values = [0.0] * len(model.program.cost)
    free = list(model.slots)
    place = {row: number for number, members in enumerate(model.classes) for row in members}
    for batch, groups in enumerate(start.micro_batches):
        values[model.seconds[batch]] = start.seconds[batch]
        for kind, rows in sorted(
            groups, key=lambda group: (group[0], -float(table.seconds[list(group[1]), group[0]].sum()))
        ):
            slot = next((slot for slot in free if slot.kind == kind and slot.micro_batch == batch), None)
            if slot is None or any(place[row] not in slot.taken for row in rows):
                return None
            free.remove(slot)
            values[slot.used] = 1.0
            for row in rows:
                values[slot.taken[place[row]]] += 1.0
    return values


def _schedule(table: Table, model: Model, answer: Answer) -> Schedule | None:
    if answer.values is None:
        return None
    left = [list(members) for members in model.classes]
    batches: list[list[Group]] = [[] for _ in model.seconds]
    for slot in model.slots:
        rows: list[int] = []
        for number, variable in slot.taken.items():
            for _ in range(round(answer.values[variable])):
                rows.append(left[number].pop(0))
        if rows:
            batches[slot.micro_batch].append((slot.kind, tuple(rows)))
    assert not any(left), "the solver lost documents"
    return schedule(table, batches)
