"""Token-wise parts of a layer, run again on some of the tokens when backward wants what they saved.

A segment is a function of tensors ``[batch, tokens, ...]`` that treats every token by itself and draws no random
numbers. What it saved for backward, and what it returned, can therefore be built again for a slice of the tokens from
its inputs alone. Saved tensors are told apart by the order in which they are saved, as in non-reentrant checkpointing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from seqpar.offload.runtime.saved import Rows, View, bytes_of

TokenWise = Callable[..., tuple[Tensor, ...]]  # (rows: slice, *inputs) -> outputs


class Source(Protocol):
    """Where an input of a segment can be had again."""

    def tail(self, first: int) -> Tensor:
        """The input from token ``first`` on."""
        ...


@dataclass(frozen=True)
class Whole:
    """An input that is stored as a whole."""

    packed: Any

    def tail(self, first: int) -> Tensor:
        whole: Tensor = self.packed.get()
        return whole[:, first:]


@dataclass(frozen=True)
class Made:
    """An input that another segment returned, and returns again."""

    segment: "Segment"
    output: int

    def tail(self, first: int) -> Tensor:
        return self.segment.returned(self.output, first)


@dataclass(frozen=True)
class Origin:
    """Which tensor of a segment lies in a storage: the ``number``-th saved one, or the ``number``-th output."""

    kind: str  # "saved", "output"
    number: int
    view: View
    dim: int


class Segment:
    """One call of a token-wise function, and what is needed to repeat it for the last tokens."""

    def __init__(
        self, name: str, function: TokenWise, inputs: Sequence[Tensor], sources: Sequence[Source | None]
    ) -> None:
        self.name = name
        self.num_saved = 0
        self.sources = tuple(sources)  # None only until the function has run
        self._function = function
        self._requires_grad = [x.requires_grad for x in inputs]
        self._orders = [_order(x) for x in inputs]
        self._tokens = inputs[0].shape[1]
        self._autocast = _autocast(inputs[0].device.type)
        self._longest = 0
        self._wanted: set[tuple[str, int]] = set()
        self._taken: set[tuple[str, int]] = set()
        self._again: dict[tuple[str, int], Tensor] = {}

    def want(self, origin: Origin, tokens: int) -> None:
        """The last ``tokens`` of this tensor will be asked for."""
        self._wanted.add((origin.kind, origin.number))
        self._lengthen(tokens)

    def _lengthen(self, tokens: int) -> None:
        self._longest = max(self._longest, tokens)
        for source in self.sources:
            if isinstance(source, Made):
                source.segment._lengthen(tokens)

    def tail(self, origin: Origin, rows: Rows, first: int) -> Tensor:
        """The bytes ``[batch, tokens - first, width]`` of a storage, computed again."""
        key = (origin.kind, origin.number)
        if key not in self._again:
            self._run_again()
        found = self._again[key]
        begin = self._tokens - self._longest
        self._check(origin, found)
        again = Rows(rows.batch, self._longest, rows.width).of(bytes_of(found))[:, first - begin :]
        self._taken.add(key)
        if self._taken >= self._wanted:
            self.forget()
        return again

    def returned(self, output: int, first: int) -> Tensor:
        """An output from token ``first`` on, computed again."""
        if ("output", output) not in self._again:
            self._run_again()
        return self._again["output", output][:, first - (self._tokens - self._longest) :]

    def forget(self) -> None:
        """Let what was computed again go."""
        self._again.clear()
        self._taken.clear()

    def _run_again(self) -> None:
        first = self._tokens - self._longest
        inputs = [
            _in_order(source.tail(first), order).detach().requires_grad_(wanted)
            for source, order, wanted in zip(self.sources, self._orders, self._requires_grad)
            if source is not None
        ]
        saved: list[Tensor | None] = []

        def pack(tensor: Tensor) -> None:
            wanted = ("saved", len(saved)) in self._wanted
            saved.append(tensor.detach() if wanted else None)

        with saved_tensors_hooks(pack, _never), torch.enable_grad(), torch.autocast(**self._autocast):
            outputs = self._function(slice(first, self._tokens), *inputs)
        if len(saved) != self.num_saved:
            raise RuntimeError(
                f"segment {self.name!r} saved {self.num_saved} tensors in forward and {len(saved)} when it ran again: "
                "it must do the same for some of the tokens as for all"
            )
        self._again = {("saved", number): tensor for number, tensor in enumerate(saved) if tensor is not None}
        self._again |= {("output", number): output.detach() for number, output in enumerate(outputs)}

    def _check(self, origin: Origin, found: Tensor) -> None:
        wanted = (origin.view.dtype, *origin.view.shortened(origin.dim, self._tokens, self._longest))
        got = (found.dtype, tuple(found.shape), found.storage_offset())
        if got != wanted or found.stride()[origin.dim] != origin.view.strides[origin.dim]:
            raise RuntimeError(
                f"segment {self.name!r}: {origin.kind} tensor {origin.number} came out as {got} when it ran again for "
                f"the last {self._longest} tokens, expected {wanted}: the segment is not token-wise"
            )


def _order(x: Tensor) -> list[int] | None:
    """The dims of a tensor from the slowest to the fastest in memory; None if it leaves gaps between them."""
    strides = [step if size > 1 else math.inf for step, size in zip(x.stride(), x.shape)]
    order = sorted(range(x.dim()), key=lambda dim: -strides[dim])
    return order if x.permute(order).is_contiguous() else None


def _in_order(x: Tensor, order: list[int] | None) -> Tensor:
    """Some rows laid out in memory as all of them were, for kernels look at that: without gaps, or with them."""
    if order is None:
        return x
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(order).contiguous().permute(inverse)


def _never(packed: None) -> Tensor:
    raise AssertionError("nobody goes backward through a segment that ran again")


def _autocast(device_type: str) -> dict[str, Any]:
    """The arguments of ``torch.autocast`` that bring the present state back."""
    return {
        "device_type": device_type,
        "dtype": torch.get_autocast_dtype(device_type),
        "enabled": torch.is_autocast_enabled(device_type),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }
