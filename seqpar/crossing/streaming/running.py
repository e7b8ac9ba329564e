"""A cell over one stretch: forward keeps a state every so many steps, backward computes what lies between once more.

What a stretch of n steps needs besides its rows is then n / c states and what c steps save for backward, least for c
about the square root of n, whatever the cell saves.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Cell = Callable[..., tuple[Tensor, Tensors]]
Sizes = tuple[torch.Size, ...]


def packed(state: Sequence[Tensor]) -> Tensor:
    """The tensors ``[n, ...]`` of a state as one, ``[n, numbers]``: what travels, and what is kept."""
    return torch.cat([each.reshape(each.shape[0], -1) for each in state], 1)


def unpacked(state: Tensor, sizes: Sizes) -> Tensors:
    """The reverse of :func:`packed`."""
    parts = state.split([size.numel() for size in sizes], 1)
    return tuple(part.reshape(state.shape[0], *size) for part, size in zip(parts, sizes))


@dataclass(frozen=True)
class Running:
    """How a cell is run: ``sizes`` of its state's tensors, on which grid, and how many steps it is from one state that
    is kept to the next (0: about the square root of all). ``learns``: it takes gradients itself. ``recompute``:
    backward computes again what lies between states, else what the cell saves for backward is kept."""

    cell: Cell
    sizes: Sizes
    chunk: int
    every: int
    learns: bool
    recompute: bool
    who: str

    def call(self, params: Tensors, rows: Tensors, state: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """The cell's rows and its state, checked; where it goes on, in a chunk of its document, it is told."""
        entering = unpacked(state, self.sizes)
        told = (position % self.chunk,) if self.chunk else ()
        out, leaving = self.cell(params, rows, entering, *told)
        self._check(out, rows[0], leaving, state)
        return out, packed(leaving)

    def _check(self, out: Tensor, rows: Tensor, leaving: Tensors, state: Tensor) -> None:
        expected = [[state.shape[0], *size] for size in self.sizes]
        got = [list(each.shape) for each in leaving]
        if got != expected:
            raise ValueError(f"{self.who}: the cell got a state of {expected} and must give one, but gave {got}")
        if any(each.dtype != state.dtype for each in leaving):
            raise ValueError(f"{self.who}: the cell got a state in {state.dtype}, but gave {leaving[0].dtype}")
        if out.shape[:2] != rows.shape[:2]:
            raise ValueError(
                f"{self.who}: the cell got rows {list(rows.shape)} and must give as many, but gave {list(out.shape)}"
            )

    def bounds(self, steps: int, position: int) -> list[tuple[int, int]]:
        """From one kept state to the next; on a grid, where chunks of the document begin."""
        every = self.every or isqrt(max(0, steps - 1)) + 1
        if self.chunk:
            every = -(-every // self.chunk) * self.chunk
        edges = [0, *range(every - position % every if self.chunk else every, steps, every), steps]
        return list(pairwise(edges))

    def forward(self, params: Tensors, rows: Tensors, state: Tensor, position: int) -> tuple[Tensor, Tensor, "Kept"]:
        """Rows ``[n, steps, ...]``, the state after them, and the states kept on the way."""
        outs, kept = [], []
        for low, high in self.bounds(rows[0].shape[1], position):
            kept.append(state)
            taken = [x[:, low:high].to(state.dtype) for x in rows]
            with self._mode():
                out, state = self.call(*self._begun(params, taken, state), position + low)
            out, state = out.detach(), state.detach()
            outs.append(out)
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1), state, Kept(kept)

    def forward_once(
        self, params: Tensors, rows: Tensors, needs: Sequence[bool], state: Tensor, position: int
    ) -> tuple[Tensor, Tensor, "Kept"]:
        """The same, when what the cell saves for backward is kept."""
        taken = tuple(_leaf(x.to(state.dtype), need) for x, need in zip(rows, needs))
        entering = _leaf(state, True)
        with torch.enable_grad():
            out, leaving = self.call(params, taken, entering, position)
        return out.detach(), leaving.detach(), Kept([], Graph((out, leaving), (entering, *taken, *params)))

    def _begun(self, params: Tensors, rows: list[Tensor], state: Tensor) -> tuple[Tensors, Tensors, Tensor]:
        if not self.learns:
            return params, tuple(rows), state
        params, taken = tuple(_leaf(x, True) for x in params), tuple(_leaf(x, False) for x in rows)
        return params, taken, _leaf(state, True)

    @contextmanager
    def _mode(self) -> Iterator[None]:
        if self.learns:
            with torch.inference_mode(False), torch.enable_grad():
                yield
        else:
            with torch.no_grad():
                yield

    def backward(
        self, params: "Shared", ran: "Ran", d_out: Tensor, d_state: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The gradients of the state that entered and of the rows; those of ``params`` are added there."""
        if ran.kept.graph is not None:
            return self._backward_of(ran.kept.graph, params, d_out, d_state)
        parts: list[list[Tensor | None]] = []
        bounds = self.bounds(d_out.shape[1], ran.position)
        for (low, high), state in zip(reversed(bounds), reversed(ran.kept.states)):
            given = tuple(x[:, low:high] for x in ran.rows)
            _, _, kept = self.forward_once(params.leaves, given, ran.needs, state, ran.position + low)
            assert kept.graph is not None
            d_state, found = self._backward_of(kept.graph, params, d_out[:, low:high], d_state)
            parts.append(found)
        assert d_state is not None
        return d_state, [_joined(of_tensor) for of_tensor in zip(*reversed(parts))]

    def _backward_of(
        self, graph: "Graph", params: "Shared", d_out: Tensor, d_state: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        entering, number = graph.inputs[0], len(graph.inputs) - len(params.leaves)
        d_entering, *found = _gradients(graph.ends, (d_out.to(entering.dtype), d_state), graph.inputs)
        params.add(found[number - 1 :])
        rows = [_there(grad, x) for grad, x in zip(found, graph.inputs[1:number])]
        return torch.zeros_like(entering) if d_entering is None else d_entering, rows


class Graph(NamedTuple):
    """What a cell gave, rows and state, and the leaves it was given: the state, rows, parameters."""

    ends: tuple[Tensor, Tensor]
    inputs: Tensors


class Kept(NamedTuple):
    """What forward keeps of a run: states that backward begins from again, or a graph to go back through."""

    states: list[Tensor]
    graph: Graph | None = None


@dataclass(frozen=True)
class Ran:
    """A stretch (or some side by side) as it was run: its rows, whose gradients it needs, and the states kept."""

    rows: Tensors
    needs: tuple[bool, ...]
    position: int
    kept: Kept


class Shared:
    """Tensors that all steps use, and their gradients so far."""

    def __init__(self, tensors: Sequence[Tensor], needs: Sequence[bool], dtype: torch.dtype) -> None:
        self.leaves = tuple(_leaf(x.to(dtype), need) for x, need in zip(tensors, needs))
        self.gradients: list[Tensor | None] = [None] * len(self.leaves)

    def add(self, found: Sequence[Tensor | None]) -> None:
        """One more part of each gradient."""
        for place, part in enumerate(found):
            before = self.gradients[place]
            if part is not None:
                self.gradients[place] = part if before is None else before + part


def _leaf(x: Tensor, needs: bool) -> Tensor:
    x = x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x
    return x.detach().requires_grad_(needs)


def _gradients(
    graph_ends: Sequence[Tensor], upstream: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Of each input, None where it needs none or has none."""
    given = [(end, d_end) for end, d_end in zip(graph_ends, upstream) if d_end is not None and end.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    if not given or not wanted:
        return [None] * len(inputs)
    d_ends = [d_end for _, d_end in given]
    ends = [end for end, _ in given]
    found = iter(torch.autograd.grad(ends, wanted, d_ends, allow_unused=True, retain_graph=True))
    return [next(found) if x.requires_grad else None for x in inputs]


def _there(grad: Tensor | None, x: Tensor) -> Tensor | None:
    """A gradient of zeros where none reached what needs one."""
    return torch.zeros_like(x) if grad is None and x.requires_grad else grad


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The gradient of a tensor of rows from those of its steps; None if it needs none."""
    there = [part for part in parts if part is not None]
    return None if not there else there[0] if len(there) == 1 else torch.cat(there, 1)
