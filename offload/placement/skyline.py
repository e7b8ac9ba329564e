"""The state of an exact search: what is placed, and how high every section is already filled.

Buffers are placed on the floors of valleys only, so everything below a section's floor is settled there. That makes
three statements cheap: the lowest offset of each unplaced buffer, the floor of each section (the lowest of those), and
the bytes a section can still afford to waste. See ``offload/placement/search.py`` for the search itself.
"""

from collections.abc import Sequence

from seqpar.offload.placement.sections import Sections


class Skyline:
    """Floors, lowest offsets and the trail to take them back.

    ``low[b]`` is the lowest offset that unplaced buffer ``b`` may still have; ``floor[s]`` the least of them in section
    ``s``; ``count[s]`` how many reach it; ``rest[s]`` the unplaced bytes; ``live[s]`` the unplaced buffers.
    Laws: ``floor[s] + rest[s] <= capacity`` in every section after a move that returned True; ``undo(mark)`` restores
    exactly what was there when ``mark`` was the length of the trail. ``steps`` counts the buffers and sections that
    moves looked at: the work, whatever machine does it.
    """

    def __init__(self, sections: Sections, capacity: int) -> None:
        self.sections = sections
        self.capacity = capacity
        self.low = [0] * len(sections.sizes)
        self.offset = [-1] * len(sections.sizes)
        self.floor = [0] * len(sections.members)
        self.rest = list(sections.loads)
        self.count = [len(members) for members in sections.members]
        self.live = [set(members) for members in sections.members]
        self.trail: list[tuple[list[int] | None, int, int]] = []
        self.steps = sum(self.count)

    def place(self, buffer: int) -> bool:
        """Put ``buffer`` at its lowest offset; returns False if no solution can follow."""
        at, size = self.low[buffer], self.sections.sizes[buffer]
        first, last = self.sections.first[buffer], self.sections.last[buffer]
        top = at + size
        self.offset[buffer] = at
        self.trail.append((None, buffer, 0))
        for section in range(first, last):
            self.live[section].remove(buffer)
            self.rest[section] -= size
            self.steps += len(self.live[section])
        low = self.low
        pushed = [other for other in set().union(*self.live[first:last]) if low[other] < top]
        return self._push(pushed, [top] * len(pushed), first, last)

    def lift(self, section: int) -> bool:
        """Leave a gap above the floor of ``section``; returns False if no solution can follow.

        Whoever could stand on the floor must then stand on a buffer that is yet to be placed beneath it.
        """
        low, sizes = self.low, self.sections.sizes
        first, last = self.sections.first, self.sections.last
        standing = [buffer for buffer in self.live[section] if low[buffer] == self.floor[section]]
        lifted = []
        for buffer in standing:
            around = self.live[first[buffer] : last[buffer]]
            self.steps += sum(map(len, around))
            others = set().union(*around) - {buffer}
            if not others:
                return False
            lifted.append(min(low[other] + sizes[other] for other in others))
        return self._push(standing, lifted, section, section + 1)

    def _push(self, buffers: Sequence[int], lows: Sequence[int], begin: int, end: int) -> bool:
        """Raise the lowest offsets of ``buffers``, then the floors of all sections that this touches."""
        low, trail, capacity = self.low, self.trail, self.capacity
        sizes, first, last = self.sections.sizes, self.sections.first, self.sections.last
        inner = (begin, end)
        before = {low[buffer] for buffer in buffers}
        for buffer, new in zip(buffers, lows):
            trail.append((low, buffer, low[buffer]))
            low[buffer] = new
            if new + sizes[buffer] > capacity:
                return False
            if first[buffer] < begin:
                begin = first[buffer]
            if last[buffer] > end:
                end = last[buffer]
        return self._raise_floors(begin, end, inner, before)

    def _raise_floors(self, begin: int, end: int, inner: tuple[int, int], before: set[int]) -> bool:
        """Outside of ``inner`` only those change whose floor was the lowest offset of a buffer that was raised."""
        low, high = inner
        floor, count, rest, live, trail = self.floor, self.count, self.rest, self.live, self.trail
        lowest = self.low.__getitem__
        for section in range(begin, end):
            members = live[section]
            if not members or (floor[section] not in before and not low <= section < high):
                continue
            self.steps += len(members)
            lows = list(map(lowest, members))
            new = min(lows)
            if new + rest[section] > self.capacity:
                return False
            trail.append((count, section, count[section]))
            count[section] = lows.count(new)
            if new != floor[section]:
                trail.append((floor, section, floor[section]))
                floor[section] = new
        return True

    def undo(self, mark: int) -> None:
        """Take back everything since the trail had length ``mark``."""
        for values, index, old in reversed(self.trail[mark:]):
            if values is not None:
                values[index] = old
                continue
            self.offset[index] = -1
            size = self.sections.sizes[index]
            for section in range(self.sections.first[index], self.sections.last[index]):
                self.live[section].add(index)
                self.rest[section] += size
        del self.trail[mark:]
