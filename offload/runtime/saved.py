"""What autograd saves, by storage: which bytes stay, which are in a tier, which are computed again, and the way back.

A storage whose bytes are laid out as ``[batch, tokens, width]`` is cut by tokens: the first go to the tier, the next
are kept, the last are computed again. Any saved view of it (transposed, split into heads, a half of the channels) is a
view of the same bytes when they are back, with the same strides, so kernels compute the same bits.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqpar.offload.runtime.streams import Done, Lane
from seqpar.offload.runtime.tiers import Region, Tier

Tail = Callable[[], Tensor]  # the bytes [batch, recomputed tokens, width] of a storage, computed again


def bytes_of(tensor: Tensor) -> Tensor:
    """All bytes of the storage of a tensor, as uint8 ``[bytes]``, in the same memory."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


@dataclass(frozen=True)
class View:
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: Tensor) -> "View":
        return View(tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def on(self, base: Tensor) -> Tensor:
        """The tensor, in the bytes ``base`` of a whole storage."""
        return base.view(self.dtype).as_strided(self.shape, self.strides, self.offset)

    def token_dim(self, batch: int, tokens: int, width_bytes: int) -> int | None:
        """The dim of the tokens (or of batch and tokens together) if the storage is ``[batch, tokens, width]``.

        None if it is not, or if there is any doubt: another dim of the same size could be the tokens too.
        """
        alike = [dim for dim, size in enumerate(self.shape) if size in (tokens, batch * tokens)]
        if len(alike) != 1 or self.strides[alike[0]] * self.dtype.itemsize != width_bytes:
            return None
        return alike[0]

    def shortened(self, dim: int, tokens: int, fewer: int) -> tuple[tuple[int, ...], int]:
        """The shape with ``fewer`` instead of ``tokens`` tokens, and the offset: what a tail must look like."""
        return (*self.shape[:dim], self.shape[dim] // tokens * fewer, *self.shape[dim + 1 :]), self.offset


@dataclass(frozen=True)
class Rows:
    """A storage as ``[batch, tokens, width]`` bytes."""

    batch: int
    tokens: int
    width: int

    def of(self, base: Tensor) -> Tensor:
        """``base [bytes]`` in this shape."""
        return base.view(self.batch, self.tokens, self.width)


@dataclass(frozen=True)
class Cut:
    """Where the tokens of a storage are cut: swapped before ``swapped``, kept before ``kept``, computed after."""

    swapped: int
    kept: int


class Buffers:
    """Device memory for what comes back: used again as soon as nobody else has a view of it.

    Holds at most what was once needed at the same time, and nothing after :meth:`clear`.
    """

    def __init__(self) -> None:
        self._idle: list[Tensor] = []

    def take(self, bytes_: int, device: torch.device) -> Tensor:
        """``[bytes_]`` uint8, with any content."""
        for number, base in enumerate(self._idle):
            if base.numel() == bytes_ and base.device == device:
                return self._idle.pop(number)
        room = bytes_
        while self._idle and room > 0:
            room -= self._idle.pop(0).numel()
        return torch.empty(bytes_, dtype=torch.uint8, device=device)

    def give(self, base: Tensor) -> None:
        """Take back what :meth:`take` gave, unless somebody still has a view: then it is theirs."""
        if users(base) == 1:
            self._idle.append(base)

    def clear(self) -> None:
        """Give all memory back."""
        self._idle.clear()


def users(base: Tensor) -> int:
    """How many tensors share the storage of ``base``, itself included."""
    storage = base.untyped_storage()  # which counts as one more
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count - 1


@dataclass(frozen=True)
class Machinery:
    """What all entries of one rank share."""

    tier: Tier
    leaving: Lane
    returning: Lane
    buffers: Buffers


class Entry:
    """One storage that has left the device, in part or whole; lives as long as a saved tensor needs it."""

    def __init__(self, tensor: Tensor, rows: Rows, cut: Cut, machinery: Machinery, tail: Tail | None) -> None:
        self.rows, self.cut = rows, cut
        self._machinery, self._tail = machinery, tail
        self._bytes, self._device = rows.batch * rows.tokens * rows.width, tensor.device
        self._base: Tensor | None = None
        self._arriving: Done | None = None
        self._joined = False
        self._fault: list[RuntimeError] = []
        source = rows.of(bytes_of(tensor))
        self._left: Done | None = None
        self._region: Region | None = None
        if cut.swapped:
            self._leave(tensor, source[:, : cut.swapped])
        # A part that stays is copied, for a view of it would keep all of the storage.
        self._kept = source[:, cut.swapped : cut.kept].clone() if cut.kept > cut.swapped else None

    def _leave(self, tensor: Tensor, part: Tensor) -> None:
        tier, version, fault = self._machinery.tier, tensor._version, self._fault
        region = self._region = tier.reserve(part.numel())
        weakref.finalize(self, tier.release, region)
        held = [tensor.detach()]

        def finished() -> None:
            if held[0]._version != version:
                fault.append(changed(held[0], version))
            held.clear()

        self._left = self._machinery.leaving.submit(lambda: tier.write(region, part), [part], finished=finished)

    @property
    def loaded(self) -> bool:
        """Whether its bytes are on the device, or on their way."""
        return self._base is not None

    @property
    def left(self) -> Done | None:
        """Done when the bytes have left."""
        return self._left

    def load(self) -> None:
        """Start to bring the bytes back, unless that has been started."""
        if self._base is not None:
            return
        base = self._machinery.buffers.take(self._bytes, self._device)
        if self._region is not None and self._left is not None:
            region, part = self._region, self.rows.of(base)[:, : self.cut.swapped]
            tier = self._machinery.tier
            # The bytes have to have left before they can come back, however soon that is asked for.
            self._arriving = self._machinery.returning.submit(lambda: tier.read(region, part), [part], [self._left])
        self._base, self._joined = base, False

    def get(self) -> Tensor:
        """The bytes of the storage, all there for what follows on the current stream."""
        self.load()
        assert self._base is not None
        if not self._joined:
            self._join(self.rows.of(self._base))
            self._joined = True
        return self._base

    def _join(self, base: Tensor) -> None:
        if self._left is not None:
            self._left.wait()  # over since long ago, but this is who finds out whether all went well
        if self._arriving is not None:
            self._arriving.wait()
        if self._fault:
            raise self._fault[0]
        if self._kept is not None:
            base[:, self.cut.swapped : self.cut.kept] = self._kept
        if self.cut.kept < self.rows.tokens:
            assert self._tail is not None, "tokens that are computed again need somebody who does it"
            base[:, self.cut.kept :] = self._tail()

    def evict(self) -> None:
        """Let the device memory go; the bytes can come back again.

        A copy may still be under way: its lane holds the memory until it is over, so nobody else gets it before.
        """
        base, self._base, self._arriving = self._base, None, None
        if base is not None:
            self._machinery.buffers.give(base)

    def __del__(self) -> None:
        if getattr(self, "_base", None) is not None:
            self.evict()


def changed(tensor: Tensor, version: int) -> RuntimeError:
    """The error for a saved tensor that somebody changed in place, in autograd's words."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: a saved "
        f"{list(tensor.shape)} {tensor.dtype} is at version {tensor._version}; expected version {version} instead"
    )


class Kept:
    """A saved tensor that stays where it is; like autograd, it notices changes in place."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version

    def get(self) -> Tensor:
        """The tensor."""
        if self._tensor._version != self._version:
            raise changed(self._tensor, self._version)
        return self._tensor


@dataclass(frozen=True)
class Away:
    """A saved tensor in an entry."""

    entry: Entry
    view: View
    run: Any

    def get(self) -> Tensor:
        """The tensor, back on the device."""
        self.run.used()
        return self.view.on(self.entry.get())
