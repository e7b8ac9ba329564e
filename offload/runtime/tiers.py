"""Tiers: where bytes go that leave the device, and come back from unchanged."""

import threading
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from seqpar.offload.runtime.host_memory import Slab

ALIGNMENT = 64


@dataclass(frozen=True)
class Region:
    """``bytes_`` from ``offset`` on in part ``part`` of a tier."""

    offset: int
    bytes_: int
    part: int = 0


class Tier(Protocol):
    """A store of bytes. ``write`` and ``read`` may run on other threads or streams than ``reserve``."""

    def reserve(self, bytes_: int) -> Region:
        """Room for so many bytes, which stays the caller's until released; raises where there is none."""
        ...

    def release(self, region: Region) -> None:
        """Give room back. Never blocks and takes no lock: the garbage collector may call it anywhere."""
        ...

    def write(self, region: Region, source: Tensor) -> None:
        """Store the bytes of ``source`` (uint8, ``[rows, bytes]``, each row contiguous); all of them, or raise."""
        ...

    def read(self, region: Region, target: Tensor) -> None:
        """Bring back what was written, into ``target`` of the same shape; all of it, or raise."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Space:
    """Which ranges of ``[0, size)`` are free: first fit, neighbours joined. Grows at its end."""

    def __init__(self, size: int, alignment: int = ALIGNMENT) -> None:
        self._alignment = alignment
        self.size = size
        self._free: list[tuple[int, int]] = [(0, size)] if size else []

    def take(self, bytes_: int) -> int | None:
        """The offset of a free range, which is now taken; None if no free range is large enough."""
        wanted = self._rounded(bytes_)
        for number, (offset, size) in enumerate(self._free):
            if size >= wanted:
                self._free[number : number + 1] = [(offset + wanted, size - wanted)] if size > wanted else []
                return offset
        return None

    def give(self, offset: int, bytes_: int) -> None:
        """Free a range again."""
        insort(self._free, (offset, self._rounded(bytes_)))
        joined: list[tuple[int, int]] = []
        for start, size in self._free:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((start, size))
        self._free = joined

    def missing(self, bytes_: int) -> int:
        """How much the space must grow at its end for a range of so many bytes."""
        tail = next((size for offset, size in self._free[-1:] if offset + size == self.size), 0)
        return max(0, self._rounded(bytes_) - tail)

    def grow(self, bytes_: int) -> None:
        """Make the space larger."""
        self.size += bytes_
        self.give(self.size - bytes_, bytes_)

    def _rounded(self, bytes_: int) -> int:
        return -(-max(1, bytes_) // self._alignment) * self._alignment

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return self.size - sum(size for _, size in self._free)


class Ledger:
    """Ranges of several spaces, taken under a lock and given back without one."""

    def __init__(self, spaces: Sequence[Space]) -> None:
        self.spaces = list(spaces)
        self.lock = threading.Lock()
        self._returned: deque[Region] = deque()

    def give(self, region: Region) -> None:
        """Give back; free from the next :meth:`take` on."""
        self._returned.append(region)

    def take(self, bytes_: int) -> Region | None:
        """A free range of the first space that has one. Call it under the lock."""
        self.collect()
        for part, space in enumerate(self.spaces):
            offset = space.take(bytes_)
            if offset is not None:
                return Region(offset, bytes_, part)
        return None

    def collect(self) -> None:
        """Free what was given back. Call it under the lock."""
        while self._returned:
            region = self._returned.popleft()
            self.spaces[region.part].give(region.offset, region.bytes_)

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        with self.lock:
            self.collect()
            return sum(space.used for space in self.spaces)


class HostTier:
    """Host memory: slabs of exact size, made in the first step and used again in every other.

    ``capacity_bytes`` (of a plan) makes one slab at once; more than that is refused. Without it, slabs are added as
    the first step needs them. ``pinned`` registers them with CUDA.
    """

    def __init__(self, capacity_bytes: int | None = None, *, pinned: bool = False) -> None:
        self._capacity, self._pinned = capacity_bytes, pinned
        self._slabs: list[Slab] = []
        self._ledger = Ledger([])
        self._closed = False
        if capacity_bytes:
            self._add(capacity_bytes)

    def _add(self, bytes_: int) -> None:
        self._slabs.append(Slab(bytes_, pinned=self._pinned))
        self._ledger.spaces.append(Space(bytes_))

    @property
    def used(self) -> int:
        """Bytes that hold something."""
        return self._ledger.used

    @property
    def size(self) -> int:
        """Bytes of host memory, used or not."""
        return sum(slab.data.numel() for slab in self._slabs)

    def reserve(self, bytes_: int) -> Region:
        with self._ledger.lock:
            if self._closed:
                raise ValueError("the host tier is closed")
            region = self._ledger.take(bytes_)
            if region is not None:
                return region
            if self._capacity is not None:
                raise MemoryError(
                    f"the host tier is full: {bytes_} bytes asked for, {self._capacity} planned in all; "
                    "plan for longer sequences, or swap less"
                )
            self._add(-(-max(1, bytes_) // ALIGNMENT) * ALIGNMENT)
            found = self._ledger.take(bytes_)
            assert found is not None, "a new slab holds what it was made for"
            return found

    def release(self, region: Region) -> None:
        self._ledger.give(region)

    def write(self, region: Region, source: Tensor) -> None:
        self._rows(region, source).copy_(source, non_blocking=True)

    def read(self, region: Region, target: Tensor) -> None:
        target.copy_(self._rows(region, target), non_blocking=True)

    def _rows(self, region: Region, like: Tensor) -> Tensor:
        assert like.dtype == torch.uint8 and like.numel() == region.bytes_, "a region holds what it was reserved for"
        return self._slabs[region.part].data[region.offset : region.offset + region.bytes_].view(like.shape)

    def close(self) -> None:
        self._closed = True
        for slab in self._slabs:
            slab.close()
        self._slabs.clear()
