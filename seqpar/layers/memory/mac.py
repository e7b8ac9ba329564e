"""Titans' memory as a context (Behrouz et al. 2024, arXiv 2501.00663): attention within segments, which also sees what
the memory of all segments before says to their tokens."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here, streamed
from seqpar.layers.memory.deep import through
from seqpar.layers.memory.neural_memory import NeuralMemory, titans
from seqpar.layers.memory.titans import Met, PersistentAttention
from seqpar.layers.parts.rope import rotary
from seqpar.sharding.cut import Cut
from seqpar.training.extras import rms_norm

Tensors = tuple[Tensor, ...]


class Weights(NamedTuple):
    """What a segment needs of the layer besides its state: the learned tokens' keys and values ``[p, h, d]``, and
    matrices."""

    keys: Tensor
    values: Tensor
    of_reads: Tensor
    mixed: Tensor
    qkv: Tensor
    conv: Tensor
    gates: Tensor
    bias: Tensor
    norm: Tensor


class Held(NamedTuple):
    """The state: the memory's own, its weights when the segment began, keys and values ``[n, segment - 1, h, d]`` of
    the segment's reads and tokens so far, and what the memory's convolution still sees ``[n, width - 1, 3 dim]``."""

    memory: Tensors
    first: Tensors
    rows: Tensors
    conv: Tensor

    @staticmethod
    def of(state: Tensors, depth: int) -> "Held":
        """From the tensors that travel."""
        own = len(state) - depth - 5
        return Held(state[:own], state[own : own + depth], state[own + depth : -1], state[-1])

    def state(self) -> Tensors:
        """The tensors that travel."""
        return *self.memory, *self.first, *self.rows, self.conv


class MAC(nn.Module):
    """Memory as a context: in segments of ``segment`` tokens, attention over learned tokens, over what the memory says
    to each token of the segment, and over the tokens; the memory then learns from what attention gave.

    Of each token, ``h = M(W; q)`` with the weights W at the segment's start, ``Y = attention([learned | h | x])``, the
    memory reads keys and values of Y token by token, and the result is ``out(met(Y, m))``, m what the memory says to Y
    after that token. The paper prints all h of a segment before all its tokens, so that a token sees later ones through
    them; here h of token j, like token j, is seen by tokens i >= j only. Ours, where the paper is silent: h is normed
    head by head before attention reads it, and positions count from the segment's start, for h and x alike.

    ``memory``: a :class:`~seqpar.layers.memory.neural_memory.NeuralMemory` (default: Titans'), whose chunk divides the
    segment. ``x [b, t, dim]`` my tokens, and so is the result. Every document starts with learned weights, and so do
    its segments. The memory's state travels, its weights at the segment's start, and the rows of the segment so far.
    """

    def __init__(
        self, dim: int, heads: int, *, segment: int = 128, persistent: int = 16, memory: NeuralMemory | None = None
    ) -> None:
        super().__init__()
        self.memory = titans(dim, heads) if memory is None else memory
        self.attention = PersistentAttention(dim, heads, window=segment, persistent=persistent)
        if not isinstance(self.memory.gates, nn.Linear):
            raise ValueError("the memory of a context has one gate of each head: no channel_gates here")
        if segment % self.memory.rule.chunk:
            raise ValueError(f"the memory's chunk, {self.memory.rule.chunk}, must divide segment, got {segment}")
        self.met, self.segment = Met(dim), segment
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values ``[b, t, h, d]``, and what the memory is asked, before its convolution."""
        q, k, v = self.attention.qkv(x).unflatten(-1, (3, self.attention.heads, -1)).unbind(-3)
        q, k = (rotary(y, positions % self.segment, self.attention.rope_base) for y in (q, k))
        return q, k, v, functional.linear(x, self.memory.qkv.weight[: x.shape[-1]])

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """What mixes tokens: attention's rows beside what the memory says to them, ``[b, t, 2 dim]``."""
        (*rows, asked), here, memory = parts, Here.of(cut, self), self.memory
        asked = here.causal_conv(asked, memory.conv_weight[: asked.shape[-1]])
        dim, out, gates = asked.shape[-1], self.attention.out, memory.gates
        assert isinstance(gates, nn.Linear)
        weights = Weights(
            *self.attention.rows(), self.attention.qkv.weight[dim:], out.weight, memory.qkv.weight, memory.conv_weight,
            gates.weight, gates.bias, memory.norm.weight,
        )  # fmt: skip
        return streamed(here, self._cell, weights, (*rows, asked), self._start(), chunk=self.segment)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """Attention and memory met, token by token."""
        y, read = o.chunk(2, -1)
        said = self.memory.finish(read.unflatten(-1, (self.memory.heads, -1)), y)
        return self.out(self.met(y, said))

    def _start(self) -> Tensors:
        own, heads = self.memory, self.attention.heads
        weights, dim = tuple(own.weights), self.out.in_features
        rows = [weights[0].new_zeros(self.segment - 1, heads, dim // heads)] * 4
        before = weights[0].new_zeros(own.conv_weight.shape[1] - 1, 3 * dim)
        first = tuple(torch.zeros_like(matrix) for matrix in weights)
        return Held(own.rule.start(weights), first, tuple(rows), before).state()

    def _cell(self, params: Tensors, rows: Tensors, state: Tensors, place: int) -> tuple[Tensor, Tensors]:
        weights, held, outs = Weights(*params), Held.of(state, len(self.memory.weights)), []
        for low, high, before in segments_of(rows[0].shape[1], self.segment, place):
            part = tuple(x[:, low:high] for x in rows)
            out, held = self._part(weights, part, held, before)
            outs.append(out)
        return torch.cat(outs, 1), held.state()

    def _part(self, of: Weights, rows: Tensors, held: Held, before: int) -> tuple[Tensor, Held]:
        """Some tokens of one segment, ``before`` of which came already."""
        (q, k, v, asked), own = rows, self.memory
        if not before:
            held = held._replace(first=held.memory[: len(held.first)])
        k_read, v_read = self._said(of, asked, held.first, before)
        seen = [torch.cat([x[:, :before], y], 1) for x, y in zip(held.rows, (k_read, v_read, k, v))]
        y = functional.linear(_attended(q, seen, of.keys, of.values).flatten(-2), of.mixed)
        inputs = torch.cat([held.conv, functional.linear(y, of.qkv)], 1)
        convolved = functional.conv1d(inputs.mT, of.conv[:, None], groups=len(of.conv)).mT
        gates = functional.linear(y, of.gates, of.bias).unflatten(-1, (own.heads, -1))
        read, memory = own.rule(own.tokens(convolved, gates), held.memory, before)
        kept = tuple(_filled(x, self.segment - 1) for x in seen)
        conv = inputs[:, inputs.shape[1] - held.conv.shape[1] :]
        return torch.cat([y, read.flatten(-2)], -1), Held(memory, held.first, kept, conv)

    def _said(self, of: Weights, asked: Tensor, first: Tensors, before: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[n, steps, h, d]`` of what the memory of the segment's start says to its tokens."""
        q = functional.silu(asked).unflatten(-1, (self.memory.heads, -1)).transpose(1, 2)
        h = through(first, functional.normalize(q, dim=-1, eps=1e-6), self.memory.rule.form).transpose(1, 2)
        h = rms_norm(h, of.norm, self.memory.norm.eps).flatten(-2)
        k, v = functional.linear(h, of.of_reads).unflatten(-1, (2, self.attention.heads, -1)).unbind(-3)
        places = torch.arange(before, before + q.shape[2], device=q.device)
        return rotary(k, places, self.attention.rope_base), v


def segments_of(steps: int, segment: int, place: int) -> Iterator[tuple[int, int, int]]:
    """Where the tokens of each segment begin and end, and how many of the segment came before."""
    low = 0
    while low < steps:
        before = (place + low) % segment
        high = min(steps, low + segment - before)
        yield low, high, before
        low = high


def _attended(q: Tensor, seen: list[Tensor], keys: Tensor, values: Tensor) -> Tensor:
    """``q [n, steps, h, d]`` over learned rows, reads and tokens of the segment."""
    k_read, v_read, k, v = seen
    k = torch.cat([keys.expand(len(k), *keys.shape), k_read, k], 1)
    v = torch.cat([values.expand(len(v), *values.shape), v_read, v], 1)
    mask = visible(q.shape[1], k_read.shape[1], len(keys), q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def visible(steps: int, tokens: int, persistent: int, device: torch.device) -> Tensor:
    """``[steps, persistent + 2 tokens]``: which rows the last ``steps`` tokens of a segment see."""
    place = torch.arange(tokens, device=device)
    before = place <= place[tokens - steps :, None]
    return torch.cat([before.new_ones(steps, persistent), before, before], 1)


def _filled(x: Tensor, rows: int) -> Tensor:
    """The first ``rows`` rows, zeros where there are none."""
    return functional.pad(x[:, :rows], (0, 0, 0, 0, 0, rows - min(rows, x.shape[1])))
