"""Streams whose copies happen as late as they may, and go wrong if nothing keeps them from it.

:class:`LateCuda` stands for ``torch.cuda``. Computation is done at once; a copy is done when somebody waits for it, and
reads what is there by then. It gives poison (bytes 255: NaN) if it was not made to wait for the computation before it
(it would have run too early), if its source is gone by then, or if it reads a region whose own write it was not made to
wait for. A copy into memory that was given back is noted as a violation.
"""

import weakref
from dataclasses import dataclass, field

import torch

from seqpar.offload.runtime.saved import Buffers
from seqpar.offload.runtime.tiers import Region

POISON = 255


class LateCuda:
    """The part of ``torch.cuda`` that lanes use."""

    def __init__(self):
        self.violations = []
        self._current = [LateStream(self)]

    def Stream(self):  # noqa: N802
        return LateStream(self)

    def current_stream(self):
        return self._current[-1]

    def stream(self, stream):
        return _Current(self._current, stream)

    def enqueue(self, copy):
        """A copy on the current stream, which is a lane; below it is the stream that computes."""
        lane, computing = self._current[-1], self._current[-2]
        copy.early = lane.clock.get(computing, 0) < computing.kernels
        computing.kernels += 1  # the user goes on computing
        lane.copies.append(copy)
        copy.clock = {**lane.clock, lane: len(lane.copies)}


class _Current:
    def __init__(self, stack, stream):
        self._stack, self._stream = stack, stream

    def __enter__(self):
        self._stack.append(self._stream)

    def __exit__(self, *error):
        self._stack.pop()


class LateStream:
    """``clock``: how far other streams have come, as far as this one has waited for them."""

    def __init__(self, cuda):
        self.cuda, self.kernels = cuda, 1
        self.clock, self.copies = {}, []

    def record_event(self):
        return LateEvent({**self.clock, self: len(self.copies) or self.kernels})

    def wait_event(self, event):
        for stream, reached in event.clock.items():
            if stream is not self:  # to wait for oneself means nothing
                self.clock[stream] = max(self.clock.get(stream, 0), reached)
        if not self.copies:  # the stream that computes goes on at once, so what it waited for has happened
            event.happen()

    def synchronize(self):
        self.record_event().happen()


@dataclass
class LateEvent:
    clock: dict

    def query(self):
        return False

    def happen(self):
        for stream, reached in self.clock.items():
            for copy in stream.copies[:reached]:
                copy.happen()


@dataclass
class LateCopy:
    """Between a tensor, which it does not hold, and a region of the tier."""

    cuda: LateCuda
    tensor: torch.Tensor
    region: Region
    store: dict
    writes: bool
    early: bool = False
    done: bool = False
    clock: dict = field(default_factory=dict)

    def __post_init__(self):
        self._storage = weakref.ref(self.tensor.untyped_storage())
        self._view = (self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset())
        if not self.writes:
            self.tensor.fill_(POISON)
        self.tensor = None

    def happen(self):
        if self.done:
            return
        self.done = True
        storage = self._storage()
        if storage is None:
            self.cuda.violations.append(f"{'source' if self.writes else 'target'} was freed before it was copied")
        memory = None
        if storage is not None:
            memory = torch.empty(0, dtype=torch.uint8).set_(storage).as_strided(*self._view)
        if self.writes:
            self.store[self.region.offset] = (self, None if memory is None or self.early else memory.clone())
        elif memory is not None:
            memory.fill_(POISON)
            data = self._data()
            if data is not None:
                memory.copy_(data.view(memory.shape))

    def _data(self):
        write, data = self.store.get(self.region.offset, (None, None))
        ordered = write is not None and all(
            self.clock.get(s, 0) >= n for s, n in write.clock.items() if write in s.copies
        )
        return data if ordered and not self.early else None


class LateTier:
    """Regions are given out again at once, last in, first out."""

    def __init__(self, cuda):
        self.cuda, self.store, self._free, self._next, self.used = cuda, {}, [], 0, 0

    def reserve(self, bytes_):
        self.used += bytes_
        if self._free:
            return Region(self._free.pop(), bytes_)
        self._next += 1
        return Region(self._next, bytes_)

    def release(self, region):
        self.used -= region.bytes_
        self._free.append(region.offset)

    def write(self, region, source):
        self.cuda.enqueue(LateCopy(self.cuda, source, region, self.store, writes=True))

    def read(self, region, target):
        self.cuda.enqueue(LateCopy(self.cuda, target, region, self.store, writes=False))

    def close(self): ...


class PoisonedBuffers(Buffers):
    """What is free to be used again holds poison."""

    def give(self, base):
        before = len(self._idle)
        super().give(base)
        for idle in self._idle[before:]:
            idle.fill_(POISON)
