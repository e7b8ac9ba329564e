"""From what each chunk does to what enters each chunk: a diagonal scan over chunks, and the share of what enters a run.

``log_totals`` [b or 1, chunks, m] is the logarithm of what a chunk multiplies a state by, ``zeros`` lists the chunks
that let nothing pass. States are [b, chunks, m].
"""

from typing import Any

import torch
from torch import Tensor

from seqpar.ops.diagonal_scan.tiles import Cut, chunk_sums, wrapped


def fold(passes: Any, log_totals: Tensor, added: Tensor, zeros: tuple[int, ...], reverse: bool = False) -> Tensor:
    """What leaves each chunk if nothing enters the first; ``added``: if nothing enters that chunk."""
    num_chunks = added.shape[1]
    cut = Cut(num_chunks, passes.chunk_of(added, num_chunks), zeros, reverse)
    work = passes.prepare(log_totals, added, cut)
    entered = torch.zeros_like(added[:, : cut.num_chunks])
    if cut.num_chunks > 1:
        left = fold(passes, chunk_sums(log_totals, cut, log_totals.dtype), passes.summaries(work), cut.zero_chunks)
        entered[:, 1:] = left[:, :-1]
    states: Tensor = passes.replay(work, entered)
    return states


def fold_back(passes: Any, log_totals: Tensor, added: Tensor, zeros: tuple[int, ...]) -> Tensor:
    """The gradient of what enters each chunk; ``added``: if that of what leaves it is zero."""
    last = added.shape[1] - 1
    return fold(passes, log_totals.conj(), added, tuple(last - n for n in reversed(zeros)), reverse=True)


def entering(left: Tensor, log_totals: Tensor, cut: Cut, incoming: Tensor | None) -> Tensor:
    """What enters each chunk, of what leaves them if nothing enters the run, and ``incoming`` [b, 1, d, n]."""
    states = torch.zeros_like(left)
    states[:, 1:] = left[:, :-1]
    if incoming is None or cut.zeros[:1] == (0,):
        return states
    seen = cut.zero_chunks[0] + 1 if cut.zeros else cut.num_chunks
    states[:, :seen] += _before(log_totals[:, :seen]).exp() * incoming.reshape(len(incoming), 1, -1)
    return states


def leaving(entered: Tensor, log_totals: Tensor, cut: Cut, d_final: Tensor | None) -> Tensor:
    """The gradient of what leaves each chunk, of that of what enters them if ``d_final`` [b, 1, d, n] is zero."""
    d_states = torch.zeros_like(entered)
    d_states[:, :-1] = entered[:, 1:]
    if d_final is None:
        return d_states
    first = cut.zero_chunks[-1] if cut.zeros else 0
    reach = _before(log_totals[:, first:].flip(1)).flip(1).exp().conj()
    d_states[:, first:] += reach * d_final.reshape(len(d_final), 1, -1)
    return d_states


def _before(log_totals: Tensor) -> Tensor:
    """For each chunk the sum over those before it."""
    sums = torch.zeros_like(log_totals)
    torch.cumsum(log_totals[:, :-1], 1, out=sums[:, 1:])
    return wrapped(sums)
