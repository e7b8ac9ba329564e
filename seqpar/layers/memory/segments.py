"""Models run segment by segment of a document, with a memory that goes from one segment to the next: recurrent memory
tokens (RMT) and the hierarchical memory of HMT, around a layer or around a whole decoder."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from seqpar.layers.memory.mac import segments_of
from seqpar.layers.parts.checks import positive
from seqpar.layers.recurrent.recurrent_layer import RecurrentLayer
from seqpar.sharding.cut import Cut

Tensors = tuple[Tensor, ...]
Run = Callable[[Tensor], Tensor]


class SegmentMemory(Protocol):
    """What goes from one segment to the next, of ``n`` documents side by side.

    ``start()``: the tensors of a document that begins. ``around(state)``: rows ``[n, ., d]`` that stand before those of
    a segment, and after them. ``after(run, state, x, z)``: the state after a whole segment, whose rows were
    ``x [n, segment, d]`` and of which the model made ``z``, with the rows around it; ``run`` is the model.
    """

    def start(self) -> Tensors: ...

    def around(self, state: Tensors) -> tuple[Tensor, Tensor]: ...

    def after(self, run: Run, state: Tensors, x: Tensor, z: Tensor) -> Tensors: ...


class RecurrentTokens(nn.Module):
    """Recurrent memory tokens (Bulatov et al. 2022, arXiv 2207.06881): ``slots`` rows that stand before and after a
    segment; what the model makes of those after it is what stands around the next."""

    def __init__(self, dim: int, slots: int = 16) -> None:
        super().__init__()
        positive(slots=slots)
        self.slots = nn.Parameter(torch.randn(slots, dim))

    def start(self) -> Tensors:
        return (self.slots,)

    def around(self, state: Tensors) -> tuple[Tensor, Tensor]:
        return state[0], state[0]

    def after(self, run: Run, state: Tensors, x: Tensor, z: Tensor) -> Tensors:
        return (z[:, z.shape[1] - len(self.slots) :],)


class HierarchicalMemory(nn.Module):
    """The memory of HMT (He et al. 2024, arXiv 2405.06067): the last ``memories`` segments, a row each, of which every
    segment looks for one.

    A segment's rows are ``[p | last | x | p]``: ``last`` the ``kept`` rows before it (zeros at first), and p the sum of
    the memories by their softmax against a summary (a learned row while there are none). What the model makes of the
    second p is the segment's memory. The summary is what it makes of the last row of ``[m | half a segment | m]``, m
    learned. The paper takes the first half of the same segment, whose tokens then see later ones; here it is the second
    half of the segment before, so that a decoder is causal.
    """

    def __init__(self, dim: int, memories: int = 100, kept: int = 32) -> None:
        super().__init__()
        positive(dim=dim, memories=memories, kept=kept)
        self.memories, self.kept = memories, kept
        self.first = nn.Parameter(torch.randn(1, dim))
        self.query, self.key = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def start(self) -> Tensors:
        """Memories, how many there are, the summary, the last rows."""
        zeros = self.first.new_zeros
        dim = self.first.shape[1]
        return zeros(self.memories, dim), zeros(1), zeros(1, dim), zeros(self.kept, dim)

    def around(self, state: Tensors) -> tuple[Tensor, Tensor]:
        memories, count, summary, last = state
        scores = self.query(summary) @ self.key(memories).mT * memories.shape[-1] ** -0.5
        place = torch.arange(self.memories, 0, -1, device=count.device)  # the newest stands last
        shares = scores.masked_fill((place > count.clamp(min=1))[:, None], -torch.inf).softmax(-1)
        found = torch.where(count[:, None] > 0, shares @ memories, self.first)
        return torch.cat([found, last], 1), found

    def after(self, run: Run, state: Tensors, x: Tensor, z: Tensor) -> Tensors:
        memories, count, _, last = state
        mark = self.first.expand(len(x), 1, -1)
        summary = run(torch.cat([mark, x[:, x.shape[1] // 2 :], mark], 1))[:, -1:]
        memories = torch.cat([memories[:, 1:], z[:, -1:]], 1)
        last = torch.cat([last, x], 1)[:, x.shape[1] :]
        return memories, (count + 1).clamp(max=self.memories), summary, last


class SegmentCell(nn.Module):
    """A cell of :class:`~seqpar.layers.recurrent.recurrent_layer.RecurrentLayer` that is a model of one segment.

    Its state is that of ``memory``, whether a segment came before, and the rows of the segment so far: a segment that
    a cut parts is run again from its beginning.
    """

    def __init__(self, inner: nn.Module, memory: nn.Module, dim: int, segment: int, bptt_depth: int) -> None:
        super().__init__()
        self.inner, self.memory = inner, memory
        self.dim, self.segment, self.bptt_depth = dim, segment, bptt_depth

    def start(self) -> Tensors:
        own: Tensors = self.memory.start()  # type: ignore[operator]
        return own[0].new_zeros(1), own[0].new_zeros(self.segment - 1, self.dim), *own

    def forward(self, x: Tensor, state: Tensors, place: int) -> tuple[Tensor, Tensors]:
        """``x [n, steps, d]``; ``place`` tokens came before since the last segment to which no gradient goes back."""
        outs = []
        for low, high, before in segments_of(x.shape[1], self.segment, place):
            if self.bptt_depth and (place + low) % (self.segment * self.bptt_depth) == 0:
                state = (*state[:2], *(_apart(state[0], each) for each in state[2:]))
            out, state = self._part(x[:, low:high], state, before)
            outs.append(out)
        return torch.cat(outs, 1), state

    def _part(self, x: Tensor, state: Tensors, before: int) -> tuple[Tensor, Tensors]:
        begun, rows, *own = state
        x = torch.cat([rows[:, :before], x], 1)
        front, back = self.memory.around(tuple(own))  # type: ignore[operator]
        z = self._run(torch.cat([front, x, back], 1))
        out = z[:, front.shape[1] + before : front.shape[1] + x.shape[1]]
        if x.shape[1] < self.segment:
            return out, (begun, torch.cat([x, rows[:, x.shape[1] :]], 1), *own)
        own = self.memory.after(self._run, tuple(own), x, z)  # type: ignore[operator]
        return out, (torch.ones_like(begun), torch.zeros_like(rows), *own)

    def _run(self, rows: Tensor) -> Tensor:
        result: Tensor = self.inner(rows, Cut.whole([rows.shape[1]]))
        return result


def _apart(begun: Tensor, state: Tensor) -> Tensor:
    """The same numbers, without a gradient to segments before; what a document begins with keeps its own."""
    return torch.where(begun.view(-1, *[1] * (state.dim() - 1)) > 0, state.detach(), state)


class Stack(nn.Module):
    """Layers ``[b, t, dim] -> [b, t, dim]`` called with the cut, one after the other."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        for layer in self.layers:
            x = layer(x, cut)
        return x


def segment_recurrence(
    inner: nn.Module, memory: nn.Module, dim: int, *, segment: int = 256, bptt_depth: int = 0
) -> RecurrentLayer:
    """``inner``, a causal model ``[b, t, dim] -> [b, t, dim]`` called with a cut, over segments of each document.

    Law: what ranks compute, put together, is what one device computes, gradients through all segments included.
    ``memory``: a :class:`SegmentMemory` such as :class:`RecurrentTokens` or :class:`HierarchicalMemory`. Within a
    segment ``inner`` runs alone, on rows, cut or not. ``bptt_depth``: no gradient goes from one run of so many segments
    of a document to the one before, counted from the document's start, wherever cuts are (0: through all). The first
    layer of a segment waits for the last layer of the one before, so ranks take turns: what is gained is memory.
    """
    positive(dim=dim, segment=segment)
    if not bptt_depth >= 0 or bptt_depth % 1:
        raise ValueError(f"bptt_depth must be a number of segments, or 0 for all, got {bptt_depth}")
    cell = SegmentCell(inner, memory, dim, segment, bptt_depth)
    return RecurrentLayer(cell, chunk=segment * max(1, bptt_depth))
