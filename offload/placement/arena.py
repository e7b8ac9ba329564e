"""Planned buffers at their addresses: views into one allocation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch

from seqpar.offload.placement.buffers import Buffer, Placement

ALIGNMENT_BYTES = 512  # what the CUDA allocator promises; every dtype and vector load is happy with it


def aligned(buffers: Iterable[Buffer]) -> tuple[Buffer, ...]:
    """The buffers with sizes rounded up so that every offset that ``place`` finds for them is aligned."""
    return tuple(replace(buffer, size=-(-buffer.size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES) for buffer in buffers)


class Arena:
    """One allocation of ``placement.peak`` bytes, and a view into it for each planned buffer.

    For swap buffers, gathered keys and values, and the scratch of tiled layers: addresses are the same in every step
    and nothing is allocated or freed in between. Buffers whose lives do not overlap share bytes, so a view is only
    valid between its buffer's birth and death; ``poison`` makes breaking that rule visible in tests.

    Raises ``ValueError`` for a buffer without an offset, an offset that is not a multiple of 512 bytes (plan with
    ``aligned(buffers)``), a buffer beyond the peak, and buffers that share bytes while both live.
    """

    def __init__(self, placement: Placement, buffers: Iterable[Buffer], device: torch.device | str = "cpu") -> None:
        self._buffers: Mapping[str, Buffer] = {buffer.id: buffer for buffer in buffers}
        self._offsets = placement.offsets
        for buffer in self._buffers.values():
            _check(buffer, placement)
        _check_shared(list(self._buffers.values()), placement)
        # The CPU allocator aligns to 64 bytes only: the slack moves the first byte to a multiple of 512.
        self._memory = torch.empty(placement.peak + ALIGNMENT_BYTES, dtype=torch.uint8, device=device)
        self._start = -self._memory.data_ptr() % ALIGNMENT_BYTES

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return self._memory.numel()

    def bytes_of(self, name: str) -> torch.Tensor:
        """All bytes of the buffer ``name``, as uint8."""
        if name not in self._buffers:
            raise ValueError(f"the arena has no buffer {name}; it has {', '.join(sorted(self._buffers)[:8])}")
        begin = self._start + self._offsets[name]
        return self._memory[begin : begin + self._buffers[name].size]

    def view(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor at the address of the buffer ``name``; it may be smaller than the buffer.

        Raises ``ValueError`` if shape and dtype need more bytes than were planned.
        """
        needed = prod(shape) * dtype.itemsize
        memory = self.bytes_of(name)
        if needed > memory.numel() or any(length < 0 for length in shape):
            raise ValueError(
                f"buffer {name} has {memory.numel()} bytes; {tuple(shape)} of {dtype} needs {needed}: plan a larger one"
            )
        return memory[:needed].view(dtype).view(tuple(shape))

    def poison(self, name: str) -> None:
        """Fill a dead buffer with 0xFF bytes, which are NaN in every floating dtype: late readers are found."""
        self.bytes_of(name).fill_(0xFF)


def _check(buffer: Buffer, placement: Placement) -> None:
    if buffer.id not in placement.offsets:
        raise ValueError(f"the placement has no offset for buffer {buffer.id}")
    offset = placement.offsets[buffer.id]
    if offset % ALIGNMENT_BYTES:
        raise ValueError(
            f"buffer {buffer.id} is at {offset}, no multiple of {ALIGNMENT_BYTES} bytes: plan with aligned(buffers)"
        )
    if offset < 0 or offset + buffer.size > placement.peak:
        raise ValueError(
            f"buffer {buffer.id} takes [{offset}, {offset + buffer.size}), not inside the peak {placement.peak}"
        )


def _check_shared(buffers: Sequence[Buffer], placement: Placement) -> None:
    """Raise if two live buffers share bytes; in order of address only neighbours have to be compared."""
    ordered = sorted((buffer for buffer in buffers if buffer.size), key=lambda buffer: placement.offsets[buffer.id])
    for index, buffer in enumerate(ordered):
        end = placement.offsets[buffer.id] + buffer.size
        for other in ordered[index + 1 :]:
            if placement.offsets[other.id] >= end:
                break
            if buffer.overlaps(other):
                raise ValueError(f"buffers {buffer.id} and {other.id} live at once and share bytes of the arena")
