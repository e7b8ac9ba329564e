"""Time cut into the few sections that matter for a placement."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from seqpar.offload.placement.buffers import Buffer


@dataclass(frozen=True)
class Sections:
    """Which buffers live together, as small integers.

    A section is a largest set of buffers that live at one moment (a maximal clique of the overlap graph), in order
    of time. Two buffers overlap exactly if they share a section, so nothing is lost when all other moments go.

    ``first`` and ``last`` are the half-open range of sections of each buffer; ``sizes`` are in ``unit`` bytes, the
    greatest common divisor of all sizes; ``members`` are the buffers of each section.
    """

    unit: int
    sizes: tuple[int, ...]
    first: tuple[int, ...]
    last: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]
    durations: tuple[int, ...]

    @property
    def loads(self) -> tuple[int, ...]:
        """Live units in each section."""
        return tuple(sum(self.sizes[buffer] for buffer in members) for members in self.members)


def sections_of(buffers: Sequence[Buffer]) -> Sections:
    """The sections of ``buffers``, which must all have a size above zero."""
    members = _maximal(buffers)
    first, last = [0] * len(buffers), [0] * len(buffers)
    for section in reversed(range(len(members))):
        for buffer in members[section]:
            first[buffer] = section
            last[buffer] = max(last[buffer], section + 1)
    unit = gcd(*(buffer.size for buffer in buffers))
    return Sections(
        unit=unit,
        sizes=tuple(buffer.size // unit for buffer in buffers),
        first=tuple(first),
        last=tuple(last),
        members=members,
        durations=tuple(buffer.death - buffer.birth for buffer in buffers),
    )


def _maximal(buffers: Sequence[Buffer]) -> tuple[tuple[int, ...], ...]:
    """The live sets just before the first death that follows a birth: no other live set holds more."""
    events = [(buffer.birth, 1, index) for index, buffer in enumerate(buffers)]
    events += [(buffer.death, 0, index) for index, buffer in enumerate(buffers)]
    live: set[int] = set()
    grown = False
    found: list[tuple[int, ...]] = []
    for _, born, index in sorted(events):  # at one moment deaths come before births
        if born:
            live.add(index)
        else:
            if grown:
                found.append(tuple(sorted(live)))
            live.remove(index)
        grown = bool(born)
    return tuple(found)
