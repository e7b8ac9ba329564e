"""Greedy placements: one buffer after the other, each into a hole between those that are already placed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from seqpar.offload.placement.buffers import Buffer

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Greedy:
    """Offsets in the order of the buffers, and the order and fit that gave them."""

    offsets: tuple[int, ...]
    peak: int
    name: str


def greedy_placements(buffers: Sequence[Buffer]) -> Iterator[Greedy]:
    """One placement per order (size, area, duration, start) and fit (first, best), the most promising first.

    ``size`` with first fit is what TensorFlow Lite does, ``size`` with best fit what XLA does, and ``start`` with best
    fit stands for an allocator that cannot see ahead.
    """
    for best_fit in (False, True):
        for name, order in _orders(buffers):
            offsets = _place_in_order(buffers, order, best_fit)
            peak = max((offset + buffer.size for offset, buffer in zip(offsets, buffers)), default=0)
            yield Greedy(offsets, peak, f"greedy by {name}, {'best' if best_fit else 'first'} fit")


def _orders(buffers: Sequence[Buffer]) -> list[tuple[str, list[int]]]:
    def order(key: list[tuple[int, ...]]) -> list[int]:
        return sorted(range(len(buffers)), key=key.__getitem__)

    durations = [buffer.death - buffer.birth for buffer in buffers]
    return [
        ("size", order([(-b.size, -d, b.birth) for b, d in zip(buffers, durations)])),
        ("area", order([(-b.size * d, -b.size, b.birth) for b, d in zip(buffers, durations)])),
        ("duration", order([(-d, -b.size, b.birth) for b, d in zip(buffers, durations)])),
        ("start", order([(b.birth, -b.size, -d) for b, d in zip(buffers, durations)])),
    ]


def _place_in_order(buffers: Sequence[Buffer], order: Sequence[int], best_fit: bool) -> tuple[int, ...]:
    """The offsets if ``order`` is the order of placing. Placed buffers are kept in order of offset."""
    offsets = [0] * len(buffers)
    births, deaths, begins, ends = (np.empty(len(buffers), dtype=np.int64) for _ in range(4))
    for num_placed, index in enumerate(order):
        buffer = buffers[index]
        here = (births[:num_placed] < buffer.death) & (deaths[:num_placed] > buffer.birth)
        offset = _hole(begins[:num_placed][here], ends[:num_placed][here], buffer.size, best_fit)
        offsets[index] = offset
        at = int(np.searchsorted(begins[:num_placed], offset, side="right"))
        values = (buffer.birth, buffer.death, offset, offset + buffer.size)
        for column, value in zip((births, deaths, begins, ends), values):
            column[at + 1 : num_placed + 1] = column[at:num_placed].copy()
            column[at] = value
    return tuple(offsets)


def _hole(begins: Integers, ends: Integers, size: int, best_fit: bool) -> int:
    """Where ``size`` bytes fit between intervals in order of ``begins``, which may overlap each other."""
    if size == 0 or not len(begins):
        return 0
    floors = np.concatenate(([0], np.maximum.accumulate(ends)))
    holes = begins - floors[:-1]
    fits = np.flatnonzero(holes >= size)
    if not len(fits):
        return int(floors[-1])
    return int(floors[fits[np.argmin(holes[fits])] if best_fit else fits[0]])
