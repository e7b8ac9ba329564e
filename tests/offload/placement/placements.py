"""Placement problems for tests, and an oracle that tries everything."""

import random

from hypothesis import strategies as st

from seqpar.offload.placement.buffers import Buffer


def planted(seed, num_buffers, capacity=1 << 20, events=24):
    """A perfect packing, cut at random out of a rectangle of time and addresses: its lower bound is ``capacity``.

    Every cut halves a box in time or in address, so at every event the buffers fill the capacity without a hole.
    """
    chance = random.Random(seed)
    boxes = [(0, events, capacity)]
    while len(boxes) < num_buffers:
        begin, end, size = boxes.pop(chance.randrange(len(boxes)))
        if end - begin > 1 and chance.random() < 0.5:
            cut = chance.randrange(begin + 1, end)
            boxes += [(begin, cut, size), (cut, end, size)]
        elif size > 1:
            cut = chance.randrange(1, size)
            boxes += [(begin, end, cut), (begin, end, size - cut)]
        else:
            boxes.append((begin, end, size))
    chance.shuffle(boxes)
    return [Buffer(f"b{index}", size, begin, end) for index, (begin, end, size) in enumerate(boxes)]


def endless():
    """A perfect packing of so many buffers that a tenth of a second is never enough."""
    return planted(7, 1500, events=700)


def scattered(seed, num_buffers, events=12, most=9):
    """Buffers with random sizes and lives."""
    chance = random.Random(seed)
    found = []
    for index in range(num_buffers):
        birth = chance.randrange(events)
        found.append(Buffer(f"b{index}", chance.randint(1, most), birth, birth + chance.randint(1, events // 2)))
    return found


def filled(seed, num_buffers, capacity=5, events=7, most=3):
    """Random buffers dropped in while the live bytes stay within ``capacity``: hard for their size."""
    chance = random.Random(seed)
    found, live = [], [0] * events
    while len(found) < num_buffers and sum(live) < events * capacity - 1:
        size, birth = chance.randint(1, most), chance.randrange(events)
        death = chance.randrange(birth + 1, min(events, birth + 1 + events * 2 // 3) + 1)
        if all(live[event] + size <= capacity for event in range(birth, death)):
            live[birth:death] = [load + size for load in live[birth:death]]
            found.append(Buffer(f"b{len(found)}", size, birth, death))
    return found


# Sizes and lives whose least peak is one above the most live bytes: no search finds those, it must prove it.
_GAPPED = (
    ((3, 1, 4), (2, 0, 3), (2, 5, 7), (2, 4, 6), (3, 6, 7), (1, 3, 6), (2, 0, 1), (1, 3, 5), (1, 4, 5)),
    ((1, 2, 5), (1, 3, 6), (3, 1, 3), (2, 0, 2), (3, 5, 7), (1, 2, 6), (2, 6, 7), (1, 3, 5), (2, 0, 1)),
    ((3, 6, 7), (2, 4, 7), (2, 1, 3), (1, 3, 5), (1, 0, 5), (2, 0, 1), (1, 2, 5), (2, 0, 2), (1, 2, 4)),
    ((1, 1, 5), (1, 4, 6), (3, 0, 1), (1, 3, 4), (2, 5, 7), (3, 6, 7), (2, 1, 6), (1, 4, 5), (2, 0, 3)),
    ((3, 0, 3), (2, 2, 4), (3, 0, 1), (3, 5, 6), (3, 4, 6), (2, 1, 5), (1, 4, 6), (1, 3, 5)),
)


def gapped():
    """Small problems whose least peak is above their most live bytes."""
    return [[Buffer(f"b{i}", *buffer) for i, buffer in enumerate(problem)] for problem in _GAPPED]


def least_peak(buffers):
    """The optimum by trying every order: each placement can be pushed down into one that an order gives.

    A buffer stands on the highest placed one that it overlaps; an order that is no better already is given up.
    """

    def least(placed, left, peak, best):
        if not left or peak >= best:
            return min(peak, best)
        for buffer in left:
            tops = [top for other, top in placed if other.birth < buffer.death and buffer.birth < other.death]
            top = max(tops, default=0) + buffer.size
            others = [other for other in left if other is not buffer]
            best = least([*placed, (buffer, top)], others, max(peak, top), best)
        return best

    return least([], list(buffers), 0, sum(buffer.size for buffer in buffers))


def clash(buffers, offsets):
    """The first pair that shares bytes while both live, by comparing all pairs; None if there is none."""
    for index, one in enumerate(buffers):
        for other in buffers[:index]:
            together = one.birth < other.death and other.birth < one.death
            below = offsets[one.id] + one.size <= offsets[other.id]
            if together and not below and not offsets[other.id] + other.size <= offsets[one.id]:
                return one.id, other.id
    return None


@st.composite
def problems(draw, most=14):
    """Any buffers, zero-size ones too."""
    lives = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(-5, 20), st.integers(1, 12)), max_size=most))
    return [Buffer(f"b{index}", size, birth, birth + life) for index, (size, birth, life) in enumerate(lives)]
