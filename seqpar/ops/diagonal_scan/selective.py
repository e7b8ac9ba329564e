"""The selective scan of Mamba in chunks, in torch: its meaning, and the fast path on CPU.

``h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t`` and ``y_t = sum over n of C_t h_t``, with a state [d, n] for each
sequence. As in ``reference.py`` all chunks take a step at a time together; here in tiles of some chunks, so that
what has a state for each token is never there for more than the tokens of one tile. Tensors are u, delta [b, t, d],
B, C [b, t, n], A [d, n], states [b, chunks, d, n]. Gu and Dao, Mamba, 2023, arXiv:2312.00752.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.ops.diagonal_scan.reference import load, store
from seqpar.ops.diagonal_scan.tiles import Cut, state_dtype, torch_chunk

TILE_BYTES = 1 << 20  # of states


@dataclass(frozen=True)
class Work:
    """What the passes over the tokens read: [b, chunks, tokens of a chunk, d or n], and ``rates`` [d, n]."""

    u: Tensor
    delta: Tensor
    keys: Tensor
    queries: Tensor
    rates: Tensor
    cut: Cut
    dtypes: tuple[torch.dtype, ...]

    def decays(self, chunks: slice, step: int) -> Tensor:
        """What multiplies the states of ``chunks`` at a step, [b, chunks, d, n]."""
        decays = (self.delta[:, chunks, step, :, None] * self.rates).exp_()
        rows = range(chunks.start * self.cut.chunk + step, chunks.stop * self.cut.chunk, self.cut.chunk)
        starting = [rows.index(row) for row in self.cut.zeros if row in rows]
        if starting:
            decays[:, starting] = 0
        return decays

    def added(self, chunks: slice, step: int) -> Tensor:
        """What ``u`` adds to the states, before the keys multiply it: [b, chunks, d, 1]."""
        return (self.delta[:, chunks, step] * self.u[:, chunks, step])[..., None]


def chunk_of(u: Tensor, tokens: int) -> int:
    """How many tokens a chunk has."""
    return torch_chunk(tokens)


def prepare(u: Tensor, delta: Tensor, keys: Tensor, queries: Tensor, rates: Tensor, cut: Cut) -> Work:
    """The inputs, ready for the passes; ``keys`` and ``queries`` are B and C, ``rates`` is A."""
    dtype = state_dtype(u)
    inputs = (u, delta, keys, queries)
    u, delta, keys, queries = (load(x, cut, dtype) for x in inputs)
    return Work(u, delta, keys, queries, rates.to(dtype), cut, tuple(x.dtype for x in inputs))


def summaries(work: Work) -> Tensor:
    """The state that leaves each chunk if none enters it."""
    left = _zero_states(work)
    for chunks in _tiles(work):
        state = left[:, chunks]
        for step in range(work.cut.chunk):
            _step_(state, work, chunks, step)
    return left


def replay(work: Work, entering: Tensor) -> Tensor:
    """Every ``y_t`` [b, t, d], from the states that enter the chunks."""
    out = torch.empty_like(work.u)
    for chunks in _tiles(work):
        state = entering[:, chunks].clone()
        for step in range(work.cut.chunk):
            _step_(state, work, chunks, step)
            out[:, chunks, step] = (state * work.queries[:, chunks, step, None]).sum(-1)
    return store(out, work.cut, work.dtypes[0])


def summaries_back(work: Work, d_out: Tensor) -> Tensor:
    """The gradient of the state that enters each chunk, if that of the one that leaves it is zero."""
    d_outs = load(d_out, work.cut, work.u.dtype)
    d_left = _zero_states(work)
    for chunks in _tiles(work):
        d_state = d_left[:, chunks]
        for step in reversed(range(work.cut.chunk)):
            d_state.addcmul_(d_outs[:, chunks, step, :, None], work.queries[:, chunks, step, None])
            d_state.mul_(work.decays(chunks, step))
    return d_left


def gradients(
    work: Work, d_out: Tensor, entering: Tensor, d_leaving: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, delta, B, C, in their dtypes, and of A."""
    d_outs = load(d_out, work.cut, work.u.dtype)
    grads = [torch.empty_like(x) for x in (work.u, work.delta, work.keys, work.queries)]
    d_rates = torch.zeros_like(work.rates)
    for chunks in _tiles(work):
        tile = [x[:, chunks] for x in grads]
        _tile_gradients(work, chunks, d_outs[:, chunks], entering[:, chunks], d_leaving[:, chunks], tile, d_rates)
    d_u, d_delta, d_keys, d_queries = (store(x, work.cut, dtype) for x, dtype in zip(grads, work.dtypes))
    return d_u, d_delta, d_keys, d_queries, d_rates


def _tile_gradients(
    work: Work,
    chunks: slice,
    d_outs: Tensor,
    entering: Tensor,
    d_state: Tensor,
    grads: list[Tensor],
    d_rates: Tensor,
) -> None:
    """Fill in the gradients of a tile, [b, chunks, tokens of a chunk, d or n], and add to that of the rates."""
    states = _states(work, chunks, entering)
    d_u, d_delta, d_keys, d_queries = grads
    for step in reversed(range(work.cut.chunk)):
        u, delta = work.u[:, chunks, step], work.delta[:, chunks, step]
        d_y, keys = d_outs[:, :, step, :, None], work.keys[:, chunks, step, None]
        d_queries[:, :, step] = (states[step + 1] * d_y).sum(-2)
        d_state = torch.addcmul(d_state, d_y, work.queries[:, chunks, step, None])
        d_keys[:, :, step] = (d_state * work.added(chunks, step)).sum(-2)
        through_keys = (d_state * keys).sum(-1)
        d_u[:, :, step] = delta * through_keys
        d_state = d_state * work.decays(chunks, step)
        d_log = d_state * states[step]
        d_delta[:, :, step] = (d_log * work.rates).sum(-1).addcmul_(u, through_keys)
        d_rates += (d_log * delta[..., None]).sum((0, 1))


def _states(work: Work, chunks: slice, entering: Tensor) -> list[Tensor]:
    """What enters the chunks, and what leaves each of their steps."""
    states = [entering]
    for step in range(work.cut.chunk):
        states.append(states[-1].clone())
        _step_(states[-1], work, chunks, step)
    return states


def _step_(state: Tensor, work: Work, chunks: slice, step: int) -> None:
    state.mul_(work.decays(chunks, step))
    state.addcmul_(work.added(chunks, step), work.keys[:, chunks, step, None])


def _zero_states(work: Work) -> Tensor:
    return work.u.new_zeros(work.u.shape[0], work.cut.num_chunks, *work.rates.shape)


def _tiles(work: Work) -> Iterator[slice]:
    """Some chunks each, whose states fit into a cache."""
    bytes_ = work.u.shape[0] * work.rates.numel() * work.u.element_size()
    size = max(1, TILE_BYTES // max(bytes_, 1))
    return (slice(n, min(n + size, work.cut.num_chunks)) for n in range(0, work.cut.num_chunks, size))
