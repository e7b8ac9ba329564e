"""Decayed linear attention over the tokens of one run, in chunks: matmuls inside a chunk, a state between chunks.

For each batch and head ``S_t = exp(log_decay_t) S_{t-1} + k_t v_t'`` and ``o_t = scale q_t S_t``; the state is zero
before the first token of a document. q, k [b, t, h, k], v [b, t, h, v], state [b, h, k, v]; the decay multiplies rows
of the state. ``log_decay`` is None, [h], [b, t, h] or [b, t, h, k]. States and gates are fp32 (fp64 for fp64 inputs).

The stages keep two laws, in which the caller's scan over ranks puts the rest:

    final state           = exp(log_decay_total) * incoming * (not reset) + run.outgoing
    gradient of incoming  = exp(log_decay_total) * d_final  * (not reset) + adjoint.outgoing

Every local pass starts from a zero state and is corrected elementwise when the incoming one is there: there is no
second pass. Lightning Attention (Qin et al. 2024, arXiv:2401.04658), GLA (Yang et al. 2023, arXiv:2312.06635), LASP-2
(Sun et al. 2025, arXiv:2502.07563).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.ops.decayed_linear_attention.chunks import (
    Cut,
    Tile,
    add_product_,
    cut_tokens,
    load,
    matmul,
    new_tiles,
    product_into,
    scaled,
    tokens_of,
)
from seqpar.ops.decayed_linear_attention.decay import (
    Decay,
    backward_reach,
    build_decay,
    forward_reach,
    suffix_sum_,
    tile_factors,
    tile_pairs,
    tile_steps,
    vector_scores,
    vector_scores_backward,
)


@dataclass(frozen=True)
class Run:
    """The tokens of one run, and what they do to a state that passes through them: see the laws of this module.

    ``outgoing`` [b, h, k, v]: the state after the last token if the incoming one is zero. ``log_decay_total``: the sum
    of log_decay over the tokens; None, [1, h, 1, 1], [b, h, 1, 1] or [b, h, k, 1]. ``reset``: a document starts here.
    ``states`` [b, h, n + 1, k, v]: what enters each chunk, and leaves the last, if the incoming state is zero.
    """

    outgoing: Tensor
    log_decay_total: Tensor | None
    reset: bool
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    starts: tuple[int, ...]
    scale: float
    cut: Cut
    decay: Decay
    states: Tensor


@dataclass(frozen=True)
class Adjoint:
    """The mirror of :class:`Run`: ``outgoing`` [b, h, k, v] is the gradient of the incoming state if that of the final
    state is zero. ``states`` [b, h, n + 1, k, v]: gradients of the states that enter each chunk, and leave the last."""

    outgoing: Tensor
    d_o: Tensor
    incoming: Tensor | None
    states: Tensor


@dataclass(frozen=True)
class IntraGradients:
    """What pairs of tokens inside chunks give to the gradients of q, k and v, before ``scale``: [b, h, n, C, dim]."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


def begin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    starts: tuple[int, ...],
    *,
    scale: float = 1.0,
) -> Run:
    """Sum up what my tokens do to a state, so that it can be sent.

    ``starts``: the tokens, in ascending order, at which a document starts. Without any, all tokens continue the
    document that the incoming state comes from; with 0 among them the incoming state is never used.
    """
    _check(q, k, v, log_decay, starts)
    b, _, h, dim = q.shape
    cut = cut_tokens(q, max(dim, v.shape[-1]), starts)
    decay = build_decay(q, log_decay, starts, cut)
    states = q.new_empty(b, h, cut.num_chunks + 1, dim, v.shape[-1], dtype=decay.dtype)
    states[:, :, 0] = 0
    for tile in cut.tiles:
        keys = scaled(load(k, cut, tile), tile_factors(decay, tile).out)
        product_into(tile.of(states[:, :, 1:]), keys.mT, load(v, cut, tile))
    _chain(states, decay.across)
    total = None if decay.totals is None else decay.totals.sum(2)
    return Run(states[:, :, -1], total, len(starts) > 0, q, k, v, log_decay, starts, scale, cut, decay, states)


def intra(run: Run) -> Tensor:
    """What pairs of tokens inside chunks give to the output, before ``scale``: [b, h, n, C, v]."""
    partial = new_tiles(run.cut, run.v, run.v.shape[-1], run.v.dtype)
    for tile in run.cut.tiles:
        q, k, v = (load(x, run.cut, tile) for x in (run.q, run.k, run.v))
        product_into(tile.of(partial), _scores(run, tile, q, k), v)
    return partial


def finish(run: Run, partial: Tensor, incoming: Tensor | None) -> Tensor:
    """The output o [b, t, h, v], with the incoming state [b, h, k, v] (None is zero).

    Uses ``partial`` up: o is a view of its memory.
    """
    reach, incoming = forward_reach(run.decay), _seen(run, incoming)
    for tile in run.cut.tiles:
        q = scaled(load(run.q, run.cut, tile), tile_factors(run.decay, tile).into)
        states = _corrected(run.states, reach, incoming, tile)[:, :, :-1].to(q.dtype)
        add_product_(tile.of(partial), q, states, beta=run.scale, alpha=run.scale)
    return tokens_of(partial, run.cut)


def begin_backward(run: Run, d_o: Tensor, incoming: Tensor | None) -> Adjoint:
    """Sum up what my tokens do to the gradient of a state that passes back through them."""
    states = torch.empty_like(run.states)
    states[:, :, -1] = 0
    for tile in run.cut.tiles:
        q = scaled(load(run.q, run.cut, tile), tile_factors(run.decay, tile).into)
        product_into(tile.of(states[:, :, :-1]), q.mT, load(d_o, run.cut, tile), alpha=run.scale)
    _chain_back(states, run.decay.across)
    unseen = len(run.starts) > 0 and run.starts[0] == 0
    outgoing = states[:, :, 0]
    return Adjoint(torch.zeros_like(outgoing) if unseen else outgoing, d_o, _seen(run, incoming), states)


def intra_backward(run: Run, adjoint: Adjoint) -> IntraGradients:
    """Gradients from pairs of tokens inside chunks; needs neither the incoming state nor the final one's gradient."""
    partial = IntraGradients(*(new_tiles(run.cut, x, x.shape[-1], x.dtype) for x in (run.q, run.k, run.v)))
    for tile in run.cut.tiles:
        q, k, v, d_o = (load(x, run.cut, tile) for x in (run.q, run.k, run.v, adjoint.d_o))
        d_scores = _masked_(matmul(d_o, v.mT), tile_pairs(run.decay, tile))
        if run.decay.is_vector:
            scores, dq, dk = vector_scores_backward(q, k, tile_steps(run.decay, tile), d_scores.tril_())
            scores = _masked_(scores, tile_pairs(run.decay, tile))
            tile.of(partial.dq).copy_(dq)
            tile.of(partial.dk).copy_(dk)
        else:
            scores = _scores(run, tile, q, k)
            product_into(tile.of(partial.dq), d_scores, k)
            product_into(tile.of(partial.dk), d_scores.mT, q)
        product_into(tile.of(partial.dv), scores.mT, d_o)
    return partial


def finish_backward(
    run: Run, adjoint: Adjoint, partial: IntraGradients, d_final: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and the gradient of log_decay, in the shapes and dtypes of the inputs.

    ``d_final`` [b, h, k, v]: the total gradient of the state after my last token, from later ranks and from a final
    state that was returned; None is zero. Uses ``partial`` up: dq, dk and dv are views of its memory.
    """
    gates = run.decay.gates
    reach, d_reach, d_gates = forward_reach(run.decay), backward_reach(run.decay), None
    if gates is not None:
        d_gates = new_tiles(run.cut, run.q, gates.shape[-1], run.decay.dtype)
    for tile in run.cut.tiles:
        factors = tile_factors(run.decay, tile)
        entering = _corrected(run.states, reach, adjoint.incoming, tile)
        d_entering = _corrected(adjoint.states, d_reach, d_final, tile)
        q, k, v, d_o = (load(x, run.cut, tile) for x in (run.q, run.k, run.v, adjoint.d_o))
        dq, dk, dv = (tile.of(x) for x in (partial.dq, partial.dk, partial.dv))
        states, d_states = entering[:, :, :-1].to(q.dtype), d_entering[:, :, 1:].to(q.dtype)
        add_product_(dq, d_o, states.mT, beta=run.scale, alpha=run.scale, factor=factors.into)
        add_product_(dk, v, d_states.mT, beta=run.scale, alpha=1.0, factor=factors.out)
        add_product_(dv, scaled(k, factors.out), d_states, beta=run.scale, alpha=1.0)
        if d_gates is not None:
            leaving = entering[:, :, 1:] * d_entering[:, :, 1:]
            tile.of(d_gates).copy_(_d_gates(q, dq, k, dk, leaving, d_gates.shape[-1]))
    dq, dk, dv = (tokens_of(x, run.cut) for x in (partial.dq, partial.dk, partial.dv))
    return dq, dk, dv, _like_log_decay(d_gates, run)


def _d_gates(q: Tensor, dq: Tensor, k: Tensor, dk: Tensor, leaving: Tensor, channels: int) -> Tensor:
    """Gradient of the gates of a tile: a gate acts on all that passes it, so sums from its token to the chunk's end.

    ``leaving`` is state times gradient, for the states that leave the chunks.
    """
    d_sums = (q.to(leaving.dtype) * dq).addcmul_(k.to(leaving.dtype), dk.to(leaving.dtype), value=-1)
    d_last = leaving.sum(-1)
    if channels == 1:
        d_sums, d_last = d_sums.sum(-1, keepdim=True), d_last.sum(-1, keepdim=True)
    d_sums[..., -1, :] += d_last
    return suffix_sum_(d_sums)


def _like_log_decay(d_gates: Tensor | None, run: Run) -> Tensor | None:
    if d_gates is None or run.log_decay is None:
        return None
    d_tokens = tokens_of(d_gates, run.cut)
    if run.log_decay.dim() == 1:
        return d_tokens.sum((0, 1, 3)).to(run.log_decay.dtype)
    return d_tokens.reshape(run.log_decay.shape).to(run.log_decay.dtype)


def _scores(run: Run, tile: Tile, q: Tensor, k: Tensor) -> Tensor:
    """``q k'`` with decay, causal and inside documents: [b, h, n, C, C]."""
    scores = vector_scores(q, k, tile_steps(run.decay, tile)) if run.decay.is_vector else matmul(q, k.mT)
    return _masked_(scores, tile_pairs(run.decay, tile))


def _masked_(scores: Tensor, pairs: Tensor | None) -> Tensor:
    return scores.tril_() if pairs is None else scores.mul_(pairs)


def _seen(run: Run, incoming: Tensor | None) -> Tensor | None:
    return None if run.starts[:1] == (0,) else incoming


def _corrected(states: Tensor, reach: Tensor | None, boundary: Tensor | None, tile: Tile) -> Tensor:
    """The full states (or gradients) around the chunks of a tile, of those that a zero ``boundary`` gives."""
    part = tile.of(states, extra=1)
    if boundary is None:
        return part
    boundary = boundary[tile.batch, tile.heads, None]
    return part + boundary if reach is None else torch.addcmul(part, tile.of(reach, extra=1), boundary)


def _chain(states: Tensor, across: Tensor | None) -> None:
    """Turn what each chunk adds, ``states[n + 1]``, into what leaves it."""
    steps = list(states.unbind(2))
    for n in range(len(steps) - 1):
        if across is None:
            steps[n + 1].add_(steps[n])
        else:
            steps[n + 1].addcmul_(steps[n], across[:, :, n])


def _chain_back(states: Tensor, across: Tensor | None) -> None:
    """Turn what each chunk adds to the gradient of the state that enters it, ``states[n]``, into all of it."""
    steps = list(states.unbind(2))
    for n in reversed(range(len(steps) - 1)):
        if across is None:
            steps[n].add_(steps[n + 1])
        else:
            steps[n].addcmul_(steps[n + 1], across[:, :, n])


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, starts: tuple[int, ...]) -> None:
    b, t, h, dim = q.shape
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"expected q, k [b, t, h, k], v [b, t, h, v], got {[tuple(x.shape) for x in (q, k, v)]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}: cast them first")
    if log_decay is not None and tuple(log_decay.shape) not in ((h,), (b, t, h), (b, t, h, dim)):
        shape = tuple(log_decay.shape)
        raise ValueError(f"log_decay must be None, {(h,)}, {(b, t, h)} or {(b, t, h, dim)}, got {shape}")
    if list(starts) != sorted(set(starts)) or any(not 0 <= start < t for start in starts):
        raise ValueError(f"starts must ascend within the {t} tokens, got {starts}")
