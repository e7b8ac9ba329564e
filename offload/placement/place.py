"""Offsets for buffers with known lives, with a certificate of how good they are."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd

from seqpar.offload.placement.bilevel import place_levels
from seqpar.offload.placement.buffers import Buffer, Placement, check_ids
from seqpar.offload.placement.greedy import greedy_placements
from seqpar.offload.placement.search import search
from seqpar.offload.work import Work

_SEARCHED = 10_000  # above this many buffers the sections alone take too much memory and time
_LEAST_SECONDS = 0.05
_SHARE = 0.8  # of the work left, for one target where several may be tried
_GREEDY_SECONDS = 40e-6  # for each buffer of a greedy order, and so much for each that stands already
_STANDING_SECONDS = 7e-9
_LEVEL_SECONDS = 1.0
_MOST = 2**62  # bytes in all, and events: sums of two of them are int64

# What is being tried, the lowest peak so far, and the lower bound.
Progress = Callable[[str, int, int], None]


def lower_bound(buffers: Iterable[Buffer]) -> int:
    """The most bytes that live at once: no placement has a lower peak."""
    return _busiest(buffers)[0]


def place(
    buffers: Iterable[Buffer],
    capacity: int | None = None,
    seconds: float = 60.0,
    progress: Progress | None = None,
    levels: Sequence[Sequence[str]] | None = None,
    clock: Callable[[], float] = time.thread_time,
) -> Placement:
    """Offsets whose peak is the least possible, or is within ``capacity`` if one is given.

    The stages, each of which ends the work if its placement is good enough: greedy orders; an exact search at the
    lower bound (at ``capacity``), then between what is proved and what is found; and, where ``levels`` names groups of
    buffers such as those of one layer's pass, MEMO's two-level integer programme (SIGMOD 2025, section 4.2).

    Law: ``lower_bound <= optimum <= peak``; status ``"optimal"`` says that they are equal, ``"feasible"`` leaves
    ``gap``. A peak above ``capacity`` means that no placement within it was found; if ``lower_bound`` is above it too,
    there is none. ``progress`` is called with the stage, the lowest peak so far and the lower bound.

    ``seconds`` buy work, which is counted: the same buffers and seconds give the same placement on every machine,
    however busy, but where the guard over the processor's time (``clock``) ends it; ``note`` then says so.

    Raises ``ValueError`` for ids that come twice, a buffer above the capacity, more live bytes than the capacity, a
    level that names no buffer, and ``seconds`` of 0 or less.
    """
    started = time.monotonic()
    listed = tuple(buffers)
    _check(listed, capacity, seconds)
    hunt = _Hunt(tuple(buffer for buffer in listed if buffer.size), capacity, Work(seconds, clock), progress)
    hunt.greedy()
    hunt.exact()
    if levels is not None and not hunt.over:
        hunt.by_levels(levels)
    offsets = dict.fromkeys((buffer.id for buffer in listed), 0) | hunt.offsets
    status = "optimal" if hunt.peak == hunt.low else "feasible"
    return Placement(offsets, hunt.peak, hunt.low, status, hunt.stage, time.monotonic() - started, hunt.note)


@dataclass
class _Hunt:
    """The best placement so far, and what is proved: every placement has a peak of at least ``low``."""

    buffers: tuple[Buffer, ...]
    capacity: int | None
    work: Work
    progress: Progress | None

    def __post_init__(self) -> None:
        self.low = lower_bound(self.buffers)
        self.peak = sum(buffer.size for buffer in self.buffers)
        self.offsets: dict[str, int] = {}
        self.stage = "nothing to place"

    @property
    def note(self) -> str:
        """What the guard ended; empty if nothing."""
        if not self.work.late:
            return ""
        return f"the guard over the processor's time ended placing with {self.work.spent / self.work.seconds:.0%} done"

    @property
    def over(self) -> bool:
        """Whether the placement is good enough."""
        return self.peak <= max(self.low, self.capacity or 0)

    def take(self, offsets: Sequence[int], stage: str) -> None:
        """Keep these offsets if they are the best."""
        peak = max(offset + buffer.size for offset, buffer in zip(offsets, self.buffers))
        if peak < self.peak or not self.offsets:
            self.peak, self.stage = peak, stage
            self.offsets = {buffer.id: offset for buffer, offset in zip(self.buffers, offsets)}
        self.tell(stage)

    def tell(self, stage: str) -> None:
        if self.progress is not None:
            self.progress(stage, self.peak, self.low)

    def greedy(self) -> None:
        """All greedy orders, until one is good enough or, but for the first, the work is done."""
        count = len(self.buffers)
        if not count:
            return
        for found in greedy_placements(self.buffers):
            self.take(found.offsets, found.name)
            if not self.work.spend(count * (_GREEDY_SECONDS + _STANDING_SECONDS * count)) or self.over:
                return

    def exact(self) -> None:
        """Search at the lower bound or the capacity; then halve what is open between proved and found.

        A search that ends without an answer leaves its target open: the next aims higher, with what work is left.
        """
        if len(self.buffers) > _SEARCHED:
            return
        unit = gcd(*(buffer.size for buffer in self.buffers))
        target = max(self.low, (self.capacity or 0) // (unit or 1) * unit)
        unanswered = self.low - unit
        while not self.over and unanswered + unit < self.peak:
            left = self.work.left
            if left < _LEAST_SECONDS or self.work.late:
                return
            asked = left if self.capacity is not None else left * _SHARE
            progress = partial(self._searching, target)
            found = search(self.buffers, target, asked, progress=progress, clock=self.work.clock)
            self.work.spend(found.spent)
            self.work.late |= found.late
            if found.offsets is not None:
                self.take(found.offsets, "search")
            elif found.proved:
                self.low, unanswered = max(self.low, target + unit), target
            else:
                unanswered = target
            target = (unanswered + self.peak) // (2 * unit) * unit

    def _searching(self, target: int, nodes: int, most: int) -> None:
        """``most`` buffers stood at once in the last turn, of all."""
        self.tell(f"search for {target:,} bytes: {nodes:,} nodes, {most} of {len(self.buffers)} placed")

    def by_levels(self, levels: Sequence[Sequence[str]]) -> None:
        """Two levels of integer programmes; these get some work even where the search has done it all."""
        self.tell("bi-level MIP")
        seconds = max(_LEVEL_SECONDS, self.work.left)
        self.take(place_levels(self.buffers, levels, seconds, self.work.clock), "bi-level MIP")


def _busiest(buffers: Iterable[Buffer]) -> tuple[int, int]:
    """The most live bytes, and the event at which they live."""
    changes: dict[int, int] = {}
    for buffer in buffers:
        changes[buffer.birth] = changes.get(buffer.birth, 0) + buffer.size
        changes[buffer.death] = changes.get(buffer.death, 0) - buffer.size
    live = most = when = 0
    for event in sorted(changes):
        live += changes[event]
        if live > most:
            most, when = live, event
    return most, when


def _check(buffers: Sequence[Buffer], capacity: int | None, seconds: float) -> None:
    check_ids(buffers)
    if not seconds > 0:
        raise ValueError(f"seconds {seconds}; expected more than 0")
    total = sum(buffer.size for buffer in buffers)
    if total >= _MOST:
        raise ValueError(f"{total} bytes in all; expected less than {_MOST}")
    for buffer in buffers:
        if not -_MOST < buffer.birth < buffer.death < _MOST:
            raise ValueError(f"buffer {buffer.id} lives from event {buffer.birth} to {buffer.death}; expected events "
                             f"within {_MOST}")  # fmt: skip
    if capacity is None:
        return
    for buffer in buffers:
        if buffer.size > capacity:
            raise ValueError(f"buffer {buffer.id} has {buffer.size} bytes, more than the capacity {capacity}")
    most, when = _busiest(buffers)
    if most > capacity:
        raise ValueError(f"{most} bytes live at event {when}, more than the capacity {capacity}: no placement exists")
