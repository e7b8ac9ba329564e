"""Recurrent layers with heads: Elman, GRU, LSTM and sLSTM (arXiv 2412.07752, 2405.04517)."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from seqpar.crossing.here import Here, streamed
from seqpar.layers.parts.checks import head_dim, one_of
from seqpar.layers.parts.norm import RMSNorm
from seqpar.layers.recurrent.cells import KINDS
from seqpar.sharding.cut import Cut

TRANSPORTS = ("stream", "all_to_all")


class Recurrent(nn.Module):
    """A recurrent cell of ``heads`` heads, each of which reads its own last output only; then a norm and ``out``.

    Each class below is one kind of cell, see :mod:`seqpar.layers.recurrent.cells`; with one head the first three
    compute what ``torch.nn.RNN``, ``GRU`` and ``LSTM`` do. What the cell gives is divided by its root mean square head
    by head (not without ``norm``). ``bidirectional``: a second cell goes from the last token of each document to its
    first, and ``out`` reads both. ``x [b, t, dim]`` my tokens, and so is the result.

    The state travels: 1, 1, 2 or 4 times ``dim`` numbers. Every document starts with zeros. ``recompute``: what a cell
    saves for backward is computed again there, from states kept about every square root of the steps (default: not for
    torch's fused cells). ``transport="all_to_all"``: every rank goes over all tokens of some heads instead, so that
    none waits for another.
    """

    kind_name: ClassVar[str] = ""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        bidirectional: bool = False,
        norm: bool = True,
        recompute: bool | None = None,
        transport: str = "stream",
    ) -> None:
        super().__init__()
        self.over_heads = one_of("transport", transport, TRANSPORTS) == "all_to_all"
        self.kind = KINDS[one_of("kind", self.kind_name, KINDS)]
        self.heads, self.bidirectional = heads, bidirectional
        self.recompute = self.kind.by_torch is None if recompute is None else recompute
        one, ways = head_dim(dim, heads, None), 2 if bidirectional else 1
        gates, biases = self.kind.gates, self.kind.biases
        self.inner = nn.Parameter(torch.empty(ways, heads, gates * one, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.matrix = nn.Parameter(torch.empty(ways, heads, gates * one, one).uniform_(-(one**-0.5), one**-0.5))
        self.bias = nn.Parameter(torch.zeros(ways, heads, biases * one))
        self.norm = RMSNorm(one) if norm else None
        self.out = nn.Linear(ways * dim, dim, bias=False)
        self._open_forget_gates(one)

    def _open_forget_gates(self, one: int) -> None:
        """So that a state lasts at first: 1 in an LSTM, from 3 to 6 over the channels in an sLSTM."""
        if self.kind_name in ("lstm", "slstm"):
            start = torch.ones(one) if self.kind_name == "lstm" else torch.linspace(3, 6, one)
            self.bias.data[..., one : 2 * one] = start

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """The tokens themselves, as a cell reads them with its own weights; or, over heads, what it reads, of each way
        ``[b, t, h, gates * d]``."""
        return tuple(torch.einsum("btd,hgd->bthg", x, inner) for inner in self.inner) if self.over_heads else (x,)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """What mixes tokens, the recurrence: ``[b, t, h, d]``, with both directions ``[b, t, 2 h, d]``."""
        here, one = Here.of(cut, self), self.matrix.shape[-1]
        start = [self.matrix.new_zeros(self.heads, one)] * self.kind.states

        def way(backwards: bool) -> Tensor:
            inner, matrix, bias = (each[int(backwards)] for each in (self.inner, self.matrix, self.bias))
            tokens = parts
            if self.over_heads:
                tokens = (parts[int(backwards)],)
                inner = torch.eye(inner.shape[1], dtype=inner.dtype, device=inner.device).expand(self.heads, -1, -1)
            cell = partial(self.kind.cell, impl=cut.impl, narrow=self.matrix.dtype == torch.bfloat16)
            run = partial(streamed, here, cell, (inner, matrix, bias), tokens, start)
            return run(backwards=backwards, recompute=self.recompute, over_heads=self.over_heads)

        return torch.cat(both_ways(way, self._backwards_first(cut)), 2) if self.bidirectional else way(False)

    def _backwards_first(self, cut: Cut) -> bool:
        """Ranks in the second half of a contiguous cut go backwards first: that state begins at the last rank, while
        the other one has yet to come. Messages of the two streams never go the same way over a cut, so their order may
        differ; those of all-to-alls do."""
        return not self.over_heads and cut.shard.layout == "contiguous" and 2 * cut.group.rank >= cut.group.size

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads normed and put together, token by token."""
        return self.out((o if self.norm is None else self.norm(o)).flatten(-2))


def both_ways(way: Callable[[bool], Tensor], backwards_first: bool) -> list[Tensor]:
    """What ``way(backwards)`` gives forwards and backwards."""
    found = {backwards: way(backwards) for backwards in (backwards_first, not backwards_first)}
    return [found[False], found[True]]


class Elman(Recurrent):
    """``h_t = tanh(inner x_t + matrix h_{t-1} + bias)`` head by head: see :class:`Recurrent`."""

    kind_name = "elman"


class GRU(Recurrent):
    """``h_t = u h_{t-1} + (1 - u) tanh(.. + r (.. h_{t-1}))``, torch's form, head by head: see :class:`Recurrent`."""

    kind_name = "gru"


class LSTM(Recurrent):
    """``c_t = f c_{t-1} + i tanh(z)``, ``h_t = o tanh(c_t)`` head by head: see :class:`Recurrent`."""

    kind_name = "lstm"


class SLSTM(Recurrent):
    """xLSTM's scalar LSTM, with exponential gates and a normaliser, head by head: see :class:`Recurrent`."""

    kind_name = "slstm"
