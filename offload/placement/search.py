"""Exact search for a placement within a capacity.

Every placement can be pushed down until each buffer stands at 0 or on a buffer that it overlaps (a canonical solution,
as in MiniMalloc, ASPLOS 2023), so only those are searched. Where MiniMalloc places buffers in the order of their
offsets, this search fills valleys: it takes a section of a valley of the skyline and asks what stands on its floor
there: one of the few buffers that fit between the valley's walls, or nothing (a gap, which the section must be able
to afford). These cases exclude each other, so no placement is met twice, and a section without bytes to waste and with
one buffer that fits decides itself. Independent stretches of time are solved one by one; a stretch that fails takes
back the move that made it. States that failed are remembered across restarts.

Which section to ask about, and which buffer to try first, is a matter of luck; a portfolio of rules takes turns, each
with a growing number of nodes, until one of them is lucky or proves that there is no placement.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from seqpar.offload.placement.buffers import Buffer
from seqpar.offload.placement.sections import Sections, sections_of
from seqpar.offload.placement.skyline import Skyline
from seqpar.offload.work import Work

_NODE_SECONDS = 40e-6  # of a slow core: so much for a node, and so much for each buffer or section it looks at
_STEP_SECONDS = 0.1e-6
_NODES_AT_ONCE = 64  # between two looks at what is left
_FIRST_NODES_PER_BUFFER = 2
_GROWTH = 1.5
_REMEMBERED = 1_000_000

# A section's rank from (floor, buffers that stand on it, bytes to waste): the lowest is asked about first.
Rule = Callable[[int, int, int], int]


@dataclass(frozen=True)
class Found:
    """``offsets`` in the order of the buffers, or None; ``proved`` if None means that there is no placement.

    ``spent``: the work it took, in the seconds that bought it; ``late``: the guard ended it before the work was done.
    """

    offsets: tuple[int, ...] | None
    proved: bool
    nodes: int
    spent: float = 0.0
    late: bool = False


@dataclass(frozen=True)
class _Stretch:
    """Unplaced buffers of sections [begin, end) that no other unplaced buffer overlaps; fails back to ``parent``."""

    buffers: tuple[int, ...]
    begin: int
    end: int
    parent: int


@dataclass(frozen=True)
class _Agenda:
    """Stretches still to be solved, as a linked list."""

    stretch: _Stretch
    rest: "_Agenda | None"


@dataclass
class _Frame:
    """A question that was asked: the choices left (None is the gap) and what to do after it."""

    stretch: _Stretch
    rest: _Agenda | None
    section: int
    choices: list[int | None]
    mark: int
    state: int


def search(
    buffers: Sequence[Buffer],
    capacity: int,
    seconds: float = 60.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.thread_time,
) -> Found:
    """Offsets with every ``offset + size <= capacity``, a proof that there are none, or neither with the work given.

    ``seconds`` buy work, which is counted: the same buffers, seconds and seed give the same answer on every machine,
    however busy, but where the guard over the processor's time (``clock``) has to end it.
    All buffers need a size above zero. ``progress(nodes, placed)`` is called after every turn with the nodes so far
    and the most buffers that stood at once. A proof rests on 64-bit hashes of states being different for
    different states; a placement that is found rests on nothing.
    """
    work = Work(seconds, clock)
    if not buffers:
        return Found((), False, 0)
    sections = sections_of(buffers)
    units = capacity // sections.unit
    if max(sections.loads) > units:
        return Found(None, True, 0)
    chance = random.Random(seed)
    orders = _orders(sections)
    failed: set[int] = set()
    nodes, limit = 0, float(_FIRST_NODES_PER_BUFFER * len(buffers) + 100)
    going = True
    while going:
        turns = list(product(_rules(units, chance), orders))
        chance.shuffle(turns)
        for rule, order in turns:
            noisy = [rank + 2 * chance.random() for rank in order]
            turn = _Turn(sections, units, rule, noisy, failed)
            over = turn.run(int(limit), work)
            nodes += turn.nodes
            if progress is not None:
                progress(nodes, turn.most)
            if over:
                offsets = turn.offsets()
                return Found(offsets, offsets is None, nodes, work.spent)
            if len(failed) > _REMEMBERED:
                failed.clear()
            going = work.left > 0 and not work.late
            if not going:
                break
        limit *= _GROWTH
    return Found(None, False, nodes, work.spent, work.late)


class _Turn:
    """One depth-first search with its rules, until it ends or has used its nodes."""

    def __init__(self, sections: Sections, capacity: int, rule: Rule, order: Sequence[float], failed: set[int]) -> None:
        self.sky = Skyline(sections, capacity)
        self.sections = sections
        self.rule = rule
        self.order = order
        self.failed = failed
        self.frames: list[_Frame] = []
        self.nodes = 0
        self.looked = 0
        self.priced = 0.0
        self.most = 0
        self.solved = False

    def offsets(self) -> tuple[int, ...] | None:
        """In bytes, if the search found them."""
        return tuple(offset * self.sections.unit for offset in self.sky.offset) if self.solved else None

    def run(self, nodes: int, work: Work) -> bool:
        """Whether the search ended: solved, or nothing left to try."""
        over = self._run(nodes, work)
        self._spend(work)
        return over

    def _spend(self, work: Work) -> bool:
        """Pay for what was done since the last time; False if there is no work left."""
        price = self.nodes * _NODE_SECONDS + (self.sky.steps + self.looked) * _STEP_SECONDS
        paid, self.priced = self.priced, price
        return work.spend(price - paid)

    def _run(self, nodes: int, work: Work) -> bool:
        every = tuple(range(len(self.sections.sizes)))
        agenda = self._split(every, range(1, len(self.sections.members)), 0, len(self.sections.members), -1, None)
        while agenda is not None:
            self.nodes += 1
            if self.nodes > nodes or (self.nodes % _NODES_AT_ONCE == 0 and not self._spend(work)):
                return False
            stretch = agenda.stretch
            self.looked += len(stretch.buffers) + stretch.end - stretch.begin
            state = hash((stretch.buffers, tuple(map(self.sky.low.__getitem__, stretch.buffers))))
            at = stretch.parent
            if state not in self.failed:
                at = len(self.frames)
                section = self._ask(stretch)
                choices = self._choices(section)
                self.frames.append(_Frame(stretch, agenda.rest, section, choices, len(self.sky.trail), state))
            following = self._advance(at)
            if following is None and not self.solved:
                return True
            agenda = following
        self.solved = True
        return True

    def _advance(self, at: int) -> _Agenda | None:
        """The agenda after the next choice of frame ``at`` or, where it has none left, of its parents; None: over."""
        while at >= 0:
            frame = self.frames[at]
            del self.frames[at + 1 :]
            while frame.choices:
                self.sky.undo(frame.mark)
                choice = frame.choices.pop()
                if self._move(choice, frame.section):
                    following = self._after(choice, frame, at)
                    self.solved = following is None
                    return following
            self.sky.undo(frame.mark)
            self.failed.add(frame.state)
            self.frames.pop()
            at = frame.stretch.parent
        return None

    def _move(self, choice: int | None, section: int) -> bool:
        return self.sky.lift(section) if choice is None else self.sky.place(choice)

    def _after(self, choice: int | None, frame: _Frame, at: int) -> _Agenda | None:
        stretch = frame.stretch
        if choice is None:
            return _Agenda(_Stretch(stretch.buffers, stretch.begin, stretch.end, at), frame.rest)
        self.most = max(self.most, len(self.frames))
        left = tuple(buffer for buffer in stretch.buffers if buffer != choice)
        crossed = range(self.sections.first[choice] + 1, self.sections.last[choice])
        return self._split(left, crossed, stretch.begin, stretch.end, at, frame.rest)

    def _split(
        self, buffers: tuple[int, ...], at: Sequence[int], begin: int, end: int, parent: int, rest: _Agenda | None
    ) -> _Agenda | None:
        """The agenda with ``buffers`` cut into stretches wherever nobody lives on both sides of a moment of ``at``."""
        live = self.sky.live
        cuts = [section for section in at if live[section - 1].isdisjoint(live[section])]
        if not cuts:
            return _Agenda(_Stretch(buffers, begin, end, parent), rest) if buffers else rest
        first = self.sections.first
        edges = sorted(zip([begin, *cuts], [*cuts, end]), key=lambda edge: edge[0] - edge[1])
        for low, high in edges:  # the longest comes first here, so that the shortest is solved first
            part = tuple(buffer for buffer in buffers if low <= first[buffer] < high)
            if part:
                rest = _Agenda(_Stretch(part, low, high, parent), rest)
        return rest

    def _ask(self, stretch: _Stretch) -> int:
        """The section with the lowest rank among those whose candidates all stand between the walls of a valley."""
        floor, count, rest, capacity, rule = self.sky.floor, self.sky.count, self.sky.rest, self.sky.capacity, self.rule
        chosen, least = -1, -1
        begin = end = stretch.begin
        for section in range(stretch.begin, stretch.end):
            height = floor[section]
            if section == end:
                begin = section
                while end < stretch.end and floor[end] == height:
                    end += 1
            rank = rule(height, count[section], capacity - height - rest[section])
            if (chosen < 0 or rank < least) and self._walled(section, begin, end):
                chosen, least = section, rank
        return chosen

    def _walled(self, section: int, begin: int, end: int) -> bool:
        """Whether no candidate of ``section`` reaches out of [begin, end), over space that could be filled."""
        low, height = self.sky.low, self.sky.floor[section]
        first, last = self.sections.first, self.sections.last
        for buffer in self.sky.live[section]:
            if low[buffer] == height and (first[buffer] < begin or last[buffer] > end):
                return False
        return True

    def _choices(self, section: int) -> list[int | None]:
        """What may stand on the floor of ``section``, best last; identical buffers once; the gap (None) first."""
        sky, sections = self.sky, self.sections
        height = sky.floor[section]
        different = {
            (sections.sizes[buffer], sections.first[buffer], sections.last[buffer]): buffer
            for buffer in sky.live[section]
            if sky.low[buffer] == height
        }
        gap: list[int | None] = [None] if sky.capacity - height > sky.rest[section] else []
        return gap + sorted(different.values(), key=self.order.__getitem__)


def _rules(capacity: int, chance: random.Random) -> tuple[Rule, ...]:
    """Lowest floor first; few choices first; and few choices first within a band of floors, of three heights.

    The height decides whether a hard problem takes hundreds of nodes or millions, so every round draws new ones.
    """
    above = capacity + 1
    many = 1 << 20  # more than the buffers of a section
    fine, middle, coarse = (1 + int(capacity * 2 ** -chance.uniform(low, low + 2)) for low in (5, 3, 1))
    return (
        lambda floor, count, waste: (floor * many + count) * 2 + (waste > 0),
        lambda floor, count, waste: (count + (waste > 0)) * above + floor,
        lambda floor, count, waste: (count * middle + min(waste, middle - 1)) * above + floor,
        *(partial(_in_bands, band=band, many=many, above=above) for band in (fine, middle, coarse)),
    )


def _in_bands(floor: int, count: int, waste: int, *, band: int, many: int, above: int) -> int:
    return (floor // band * many + count) * above + waste


def _orders(sections: Sections) -> tuple[list[int], ...]:
    """Ranks of the buffers; the highest is tried first."""
    sizes, loads = sections.sizes, sections.loads
    spans = [last - first for first, last in zip(sections.first, sections.last)]
    peaks = [max(loads[first:last]) for first, last in zip(sections.first, sections.last)]
    areas = [size * duration for size, duration in zip(sizes, sections.durations)]
    keys = (
        [(size * span, span) for size, span in zip(sizes, spans)],
        list(zip(peaks, sections.durations, sizes)),
        list(zip(sizes, sections.durations)),
        list(zip(spans, sizes)),
        list(zip(peaks, areas, sections.durations)),
        list(zip(areas, sections.durations)),
        [(-first, size * span) for first, size, span in zip(sections.first, sizes, spans)],
        [(last, size * span) for last, size, span in zip(sections.last, sizes, spans)],
    )
    return tuple(_ranks(key) for key in keys)


def _ranks(key: Sequence[tuple[int, ...]]) -> list[int]:
    ranks = [0] * len(key)
    for rank, buffer in enumerate(sorted(range(len(key)), key=key.__getitem__)):
        ranks[buffer] = rank
    return ranks
