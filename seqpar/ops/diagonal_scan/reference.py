"""The diagonal scan ``h_t = exp(log_a_t) h_(t-1) + x_t`` in chunks, in torch: its meaning, and the fast path on CPU.

All chunks take a step at a time together, first from zero states, to see what they do to a state that passes through;
then, when what enters each chunk is known, to give every ``h_t``. Nothing but products of decays and sums of states is
formed: no quotient, no difference of logarithms, so decays may be zero. Tensors are [b, t, d], states [b, chunks, d].
Blelloch, Prefix sums and their applications, CMU-CS-90-190, 1990.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqpar.ops.diagonal_scan.tiles import Cut, state_dtype, torch_chunk


@dataclass(frozen=True)
class Work:
    """What the passes over the tokens read: ``decays`` and ``x`` [b or 1, chunks, tokens of a chunk, d]."""

    decays: Tensor
    x: Tensor
    cut: Cut
    dtype: torch.dtype


def chunk_of(x: Tensor, tokens: int) -> int:
    """How many tokens a chunk has."""
    return torch_chunk(tokens)


def prepare(log_a: Tensor, x: Tensor, cut: Cut) -> Work:
    """``log_a`` [b or 1, t, d] (real or complex) and ``x`` [b, t, d], ready for the passes."""
    dtype = state_dtype(x)
    decays = _decays(log_a, cut, dtype if log_a.is_complex() else dtype.to_real())
    if cut.zeros:
        decays.flatten(1, 2)[:, list(cut.zeros)] = 0
    return Work(decays, load(x, cut, dtype), cut, x.dtype)


def _decays(log_a: Tensor, cut: Cut, dtype: torch.dtype) -> Tensor:
    if log_a.stride(1) > 0 or cut.tokens < 2:
        return load(log_a, cut, dtype).exp()
    one_for_all = log_a[:, :1, None].to(dtype).exp()
    decays = one_for_all.repeat(1, cut.num_chunks, cut.chunk, 1)
    decays.flatten(1, 2)[:, cut.tokens :] = 1
    return decays


def summaries(work: Work) -> Tensor:
    """The state that leaves each chunk if none enters it."""
    state = torch.zeros_like(work.x[:, :, 0])
    for a, x in zip(work.decays.unbind(2), work.x.unbind(2)):
        state = torch.addcmul(x, a, state)
    return state


def replay(work: Work, entering: Tensor) -> Tensor:
    """Every ``h_t`` [b, t, d], from the states that enter the chunks."""
    return store(_states(work, entering), work.cut, work.dtype)


def summaries_back(work: Work, d_out: Tensor) -> Tensor:
    """The gradient of the state that enters each chunk, if that of the one that leaves it is zero."""
    d_outs = load(d_out, work.cut, work.x.dtype)
    d_state = torch.zeros_like(work.x[:, :, 0])
    for a, d in zip(reversed(work.decays.unbind(2)), reversed(d_outs.unbind(2))):
        d_state = a.conj() * (d_state + d)
    return d_state


def gradients(work: Work, d_out: Tensor, entering: Tensor, d_leaving: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``log_a`` (in the dtype of states, for each batch entry) and ``x``, [b, t, d]."""
    states, d_states = _states(work, entering), load(d_out, work.cut, work.x.dtype).clone()
    d_state = d_leaving
    for a, d in zip(reversed(work.decays.unbind(2)), reversed(d_states.unbind(2))):
        d += d_state
        d_state = a.conj() * d
    before = torch.cat([entering[:, :, None], states[:, :, :-1]], 2)
    d_log_a = before.mul_(work.decays).conj() * d_states
    return store(d_log_a, work.cut, d_log_a.dtype), store(d_states, work.cut, work.dtype)


def _states(work: Work, entering: Tensor) -> Tensor:
    states, state = torch.empty_like(work.x), entering
    for a, x, place in zip(work.decays.unbind(2), work.x.unbind(2), states.unbind(2)):
        state = torch.addcmul(x, a, state, out=place)
    return states


def load(x: Tensor, cut: Cut, dtype: torch.dtype) -> Tensor:
    """``x`` [b, t, d] as [b, chunks, tokens of a chunk, d] in the order of travel; zero beyond the last token."""
    x = (x.flip(1) if cut.reverse else x).to(dtype)
    padding = cut.num_chunks * cut.chunk - cut.tokens
    if padding:
        x = pad(x, (0, 0, 0, padding))
    return x.reshape(x.shape[0], cut.num_chunks, cut.chunk, x.shape[2])


def store(x: Tensor, cut: Cut, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`load`."""
    tokens = x.flatten(1, 2)[:, : cut.tokens]
    return (tokens.flip(1) if cut.reverse else tokens).to(dtype)
