"""A tier in a file, for machines where nothing but the disk has room."""

import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqpar.offload.runtime.tiers import Ledger, Region, Space

PAGE = 4096


class FileTier:
    """One file in ``folder``, written and read at offsets that are the same in every step.

    The file has no name: it is gone with the process, whatever ends it. It is enlarged (in the first step, or at once
    to ``capacity_bytes``) before anything is written, so a full disk is an ``OSError`` in forward, never a loss. The
    kernel is told to drop the pages, so they take no memory once they are on the disk. ``checksum`` compares what
    comes back with what left. A write or read that fails or ends early raises. For tensors in CPU memory.
    """

    def __init__(self, folder: str | Path, capacity_bytes: int = 0, *, checksum: bool = False, calls: Any = os) -> None:
        self._folder, self._checksum, self._calls = Path(folder), checksum, calls
        if not self._folder.is_dir():
            raise ValueError(f"the file tier needs a folder that exists, got {str(folder)!r}")
        self._file = tempfile.TemporaryFile(dir=self._folder, prefix="activations-")  # noqa: SIM115
        self._ledger = Ledger([Space(0, PAGE)])
        self._sums: dict[int, int] = {}
        self._written: Region | None = None
        if capacity_bytes:
            self._enlarge(capacity_bytes)

    @property
    def used(self) -> int:
        """Bytes that hold something, rounded up to pages."""
        return self._ledger.used

    @property
    def size(self) -> int:
        """Bytes of the file, used or not."""
        return self._ledger.spaces[0].size

    def _enlarge(self, bytes_: int) -> None:
        space = self._ledger.spaces[0]
        bytes_ = -(-bytes_ // PAGE) * PAGE
        try:
            self._calls.posix_fallocate(self._file.fileno(), space.size, bytes_)
        except OSError as error:
            raise OSError(
                error.errno,
                f"the file tier in {self._folder} cannot grow from {space.size} by {bytes_} bytes: {error.strerror}; "
                "free some room, name another folder, or swap less",
            ) from error
        space.grow(bytes_)

    def reserve(self, bytes_: int) -> Region:
        with self._ledger.lock:
            region = self._ledger.take(bytes_)
            if region is None:
                self._enlarge(self._ledger.spaces[0].missing(bytes_))
                region = self._ledger.take(bytes_)
            assert region is not None, "the file was enlarged to hold it"
            return region

    def release(self, region: Region) -> None:
        self._ledger.give(region)

    def write(self, region: Region, source: Tensor) -> None:
        offset = region.offset
        for row in _rows(source, region):
            self._all(self._calls.pwrite, row, offset, "wrote")
            offset += len(row)
        if self._checksum:
            self._sums[region.offset] = _sum(source, region)
        # The first call starts writing back, the second, after the next region, finds the pages clean and drops them.
        self._drop(region)
        if self._written is not None:
            self._drop(self._written)
        self._written = region

    def read(self, region: Region, target: Tensor) -> None:
        offset = region.offset
        for row in _rows(target, region):
            self._all(lambda fd, part, at: self._calls.preadv(fd, [part], at), row, offset, "read")
            offset += len(row)
        if self._checksum and self._sums.get(region.offset) != _sum(target, region):
            raise OSError(f"the file tier in {self._folder} gave back other bytes than it got (offset {region.offset})")
        self._drop(region)

    def _all(self, call: Any, row: memoryview, offset: int, done: str) -> None:
        """Transfer all of a row: the kernel may do less than it was asked for in one call."""
        moved = 0
        while moved < len(row):
            count = call(self._file.fileno(), row[moved:], offset + moved)
            if count <= 0:
                raise OSError(
                    f"the file tier in {self._folder} {done} {moved} of {len(row)} bytes at offset {offset}: is the "
                    "disk full, or was the file cut?"
                )
            moved += count

    def _drop(self, region: Region) -> None:
        advise = getattr(self._calls, "posix_fadvise", None)
        if advise is not None:
            advise(self._file.fileno(), region.offset, region.bytes_, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        self._file.close()


def _rows(tensor: Tensor, region: Region) -> list[memoryview]:
    """The rows of a tensor as memory that system calls can use."""
    assert tensor.dtype == torch.uint8 and tensor.numel() == region.bytes_, "a region holds what it was reserved for"
    if tensor.device.type != "cpu":
        raise ValueError(f"the file tier holds tensors of the CPU, got one on {tensor.device}: use the host tier")
    rows = [tensor] if tensor.is_contiguous() else list(tensor)
    arrays: list[Any] = [row.view(-1).numpy() for row in rows]
    return [memoryview(array) for array in arrays]


def _sum(tensor: Tensor, region: Region) -> int:
    total = 0
    for row in _rows(tensor, region):
        total = zlib.crc32(row, total)
    return total
