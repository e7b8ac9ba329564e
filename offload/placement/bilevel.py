"""MEMO's two-level integer programme for placements (SIGMOD 2025, section 4.2), in PuLP.

One programme for a whole iteration has a binary variable for every pair of buffers that overlap and cannot be solved.
A model repeats its layers: level 1 places the buffers of each different layer pass by themselves, and level 2 places
the passes as if each were one buffer, together with whatever belongs to no pass.
"""

import importlib.util
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from math import gcd
from typing import Any

from seqpar.offload.placement.buffers import Buffer
from seqpar.offload.placement.greedy import Greedy, greedy_placements
from seqpar.offload.quiet_highs import quiet_highs
from seqpar.offload.work import Work

_LOOK_SECONDS = 0.4e-3  # between two moments when HiGHS asks whether to go on: so much, and so much for each variable
_LOOK_VARIABLE_SECONDS = 1e-5
_HANG_SECONDS = 3600.0  # of the wall: what nothing here takes, so that a solver that hangs ends all the same
_PAIRS = 20_000  # a larger programme would only take the work that it is given
_Shape = tuple[tuple[int, int, int], ...]


def place_levels(
    buffers: Sequence[Buffer],
    levels: Sequence[Sequence[str]],
    seconds: float = 60.0,
    clock: Callable[[], float] = time.thread_time,
) -> tuple[int, ...]:
    """Offsets in the order of ``buffers``; the ids of one level are placed together.

    Passes that look the same after a shift in time are solved once; each programme gets the same part of the work that
    the seconds buy, which is counted and does not depend on the machine. Raises ``ValueError`` for an id in two levels
    or without a buffer.
    """
    groups = _groups(buffers, levels)
    grouped = {index for group in groups for index in group}
    items = [[index] for index in range(len(buffers)) if index not in grouped] + groups
    shapes = [_shape([buffers[index] for index in item]) for item in items]
    each = seconds / (len(set(shapes)) + 1)
    solved: dict[_Shape, tuple[int, ...]] = {}
    for shape, item in zip(shapes, items):
        if shape not in solved:
            solved[shape] = place_by_mip([buffers[index] for index in item], each, clock)
    inner = [solved[shape] for shape in shapes]
    outer = place_by_mip([_pseudo(buffers, item, at) for item, at in zip(items, inner)], each, clock)
    offsets = [0] * len(buffers)
    for item, base, within in zip(items, outer, inner):
        for index, offset in zip(item, within):
            offsets[index] = base + offset
    return tuple(offsets)


def _shape(members: Sequence[Buffer]) -> _Shape:
    """What two passes have in common that look the same after a shift in time."""
    start = min(member.birth for member in members)
    return tuple((member.size, member.birth - start, member.death - start) for member in members)


def place_by_mip(
    buffers: Sequence[Buffer], seconds: float, clock: Callable[[], float] = time.thread_time
) -> tuple[int, ...]:
    """One programme: the least peak M with A_i + S_i <= M, and one of each overlapping pair below the other.

    Where a greedy placement is at the lower bound already, or PuLP is missing, or there are too many pairs, that is
    the answer. The order of the solver's offsets is kept and its rounding is not: buffers are stacked again in whole
    bytes.
    """
    best = min(greedy_placements(buffers), key=lambda found: found.peak)
    pairs = [pair for pair in combinations(range(len(buffers)), 2) if buffers[pair[0]].overlaps(buffers[pair[1]])]
    least = max((sum(b.size for b in buffers if b.birth <= a.birth < b.death) for a in buffers), default=0)
    if best.peak == least or len(pairs) > _PAIRS or seconds <= 0 or importlib.util.find_spec("pulp") is None:
        return best.offsets
    values = _solve(buffers, pairs, least, best, Work(seconds, clock))
    if values is None:
        return best.offsets
    offsets = _stack(buffers, values)
    peak = max(offset + buffer.size for offset, buffer in zip(offsets, buffers))
    return offsets if peak < best.peak else best.offsets


def _solve(
    buffers: Sequence[Buffer], pairs: Sequence[tuple[int, int]], least: int, best: Greedy, work: Work
) -> list[float] | None:
    """The offsets of the programme as the solver sees them, if it found any."""
    import pulp

    unit = gcd(*(buffer.size for buffer in buffers)) or 1
    most = best.peak / unit
    problem = pulp.LpProblem("placement", pulp.LpMinimize)
    peak = problem.add_variable("peak", least / unit, most)
    offsets = [
        problem.add_variable(f"a{index:06d}", 0, most - buffer.size / unit) for index, buffer in enumerate(buffers)
    ]
    problem += peak
    for offset, buffer in zip(offsets, buffers):
        problem += offset + buffer.size / unit <= peak
    for low, high in pairs:
        above = problem.add_variable(f"z{low:06d}_{high:06d}", 0, 1, pulp.LpInteger)
        problem += offsets[low] + buffers[low].size / unit <= offsets[high] + most * above
        problem += offsets[high] + buffers[high].size / unit <= offsets[low] + most * (1 - above)
    return [float(offset.varValue or 0.0) for offset in offsets] if _solved(problem, work) else None


def _solved(problem: Any, work: Work) -> bool:
    """Run HiGHS, or what else PuLP has; whether the variables hold a solution."""
    import pulp

    if importlib.util.find_spec("highspy") is not None:
        solver = quiet_highs({"threads": 1, "time_limit": _HANG_SECONDS})
        solver.callSolver = partial(_run_highs, work=work)
    else:
        available = pulp.listSolvers(onlyAvailable=True)
        if not available:
            return False
        solver = pulp.getSolver(
            available[0], msg=False, timeLimit=work.seconds
        )  # others count no work that it can read
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = problem.solve(solver)
    if hasattr(result, "has_solution"):  # PuLP 4
        return bool(result.has_solution)
    return problem.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)


def _run_highs(problem: Any, work: Work) -> None:
    """Run HiGHS for as many of the moments when it asks whether to go on as the work is worth."""
    model = problem.solverModel
    price = _LOOK_SECONDS + _LOOK_VARIABLE_SECONDS * model.getNumCol()

    def look(event: Any) -> None:
        if not work.spend(price):
            event.interrupt()

    model.cbMipInterrupt.subscribe(look)
    model.run()


def _stack(buffers: Sequence[Buffer], values: Sequence[float]) -> tuple[int, ...]:
    """Put the buffers on each other in the order of ``values``, each as low as it goes."""
    offsets = [0] * len(buffers)
    placed: list[int] = []
    for index in sorted(range(len(buffers)), key=values.__getitem__):
        below = [other for other in placed if buffers[other].overlaps(buffers[index])]
        offsets[index] = max((offsets[other] + buffers[other].size for other in below), default=0)
        placed.append(index)
    return tuple(offsets)


def _groups(buffers: Sequence[Buffer], levels: Sequence[Sequence[str]]) -> list[list[int]]:
    places: Mapping[str, int] = {buffer.id: index for index, buffer in enumerate(buffers)}
    seen: set[str] = set()
    for level in levels:
        for name in level:
            if name in seen:
                raise ValueError(f"buffer {name} is in two levels; expected at most one")
            if name not in places:
                raise ValueError(f"level with {name}: there is no buffer of that id")
            seen.add(name)
    return [[places[name] for name in level] for level in levels if level]


def _pseudo(buffers: Sequence[Buffer], group: Sequence[int], offsets: Sequence[int]) -> Buffer:
    """The one buffer that stands for a whole pass."""
    members = [buffers[index] for index in group]
    return Buffer(
        id=members[0].id,
        size=max(offset + member.size for offset, member in zip(offsets, members)),
        birth=min(member.birth for member in members),
        death=max(member.death for member in members),
    )
