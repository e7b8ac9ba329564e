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
    CHUNK,
    CHUNK_WIDE,
    Cut,
    Scratch,
    Tile,
    add_product_,
    cut_tokens,
    load,
    matmul,
    new_tiles,
    product_into,
    scale_,
    tokens_of,
    wide_matmul,
)
from seqpar.ops.decayed_linear_attention.decay import (
    Decay,
    Factors,
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
    check_inputs(q, k, v, log_decay, starts)
    b, _, h, dim = q.shape
    wide = max(dim, v.shape[-1]) > CHUNK and not q.is_cuda
    cut = cut_tokens(q, max(dim, v.shape[-1]), starts, CHUNK_WIDE if wide else CHUNK)
    decay = build_decay(q, log_decay, starts, cut)
    states = q.new_empty(b, h, cut.num_chunks + 1, dim, v.shape[-1], dtype=decay.dtype)
    states[:, :, 0] = 0
    scratch = Scratch(q)
    for tile in cut.columns:
        keys = load(k, cut, tile, scratch, "k", tile_factors(decay, tile, scratch).out)
        added = wide_matmul(keys.mT, load(v, cut, tile, scratch, "v"), states.dtype, scratch)
        _chain(tile.of(states, extra=1), added, None if decay.across is None else tile.of(decay.across))
    total = None if decay.totals is None else decay.totals.sum(2)
    return Run(states[:, :, -1], total, len(starts) > 0, q, k, v, log_decay, starts, scale, cut, decay, states)


def intra(run: Run) -> Tensor:
    """What pairs of tokens inside chunks give to the output, before ``scale``: [b, h, n, C, v]."""
    partial = new_tiles(run.cut, run.v, run.v.shape[-1], run.v.dtype)
    scratch = Scratch(run.q)
    for tile in run.cut.tiles:
        q, k, v = (load(x, run.cut, tile, scratch, name) for name, x in (("q", run.q), ("k", run.k), ("v", run.v)))
        pairs = tile_pairs(run.decay, tile, scratch)
        product_into(tile.of(partial), _scores(run, tile, q, k, pairs, scratch), v)
    return partial


def finish(run: Run, partial: Tensor, incoming: Tensor | None) -> Tensor:
    """The output o [b, t, h, v], with the incoming state [b, h, k, v] (None is zero).

    Uses ``partial`` up: o is a view of its memory.
    """
    reach, incoming = forward_reach(run.decay), _seen(run, incoming)
    scratch = Scratch(run.q)
    for tile in run.cut.tiles:
        q = load(run.q, run.cut, tile, scratch, "q", tile_factors(run.decay, tile, scratch).into)
        states = _corrected(run.states, reach, incoming, tile, scratch, "states")[:, :, :-1]
        states = scratch.convert("rounded states", states, q.dtype)
        add_product_(tile.of(partial), q, states, scratch, beta=run.scale, alpha=run.scale)
    return tokens_of(partial, run.cut)


def begin_backward(run: Run, d_o: Tensor, incoming: Tensor | None) -> Adjoint:
    """Sum up what my tokens do to the gradient of a state that passes back through them."""
    states = torch.empty_like(run.states)
    states[:, :, -1] = 0
    scratch = Scratch(run.q)
    across = run.decay.across
    for tile in reversed(run.cut.columns):
        q = load(run.q, run.cut, tile, scratch, "q", tile_factors(run.decay, tile, scratch).into)
        d_out = load(d_o, run.cut, tile, scratch, "d_o")
        added = wide_matmul(q.mT, d_out, states.dtype, scratch)
        _chain_back(tile.of(states, extra=1), added, None if across is None else tile.of(across), run.scale)
    unseen = len(run.starts) > 0 and run.starts[0] == 0
    outgoing = states[:, :, 0]
    return Adjoint(torch.zeros_like(outgoing) if unseen else outgoing, d_o, _seen(run, incoming), states)


def intra_backward(run: Run, adjoint: Adjoint) -> IntraGradients:
    """Gradients from pairs of tokens inside chunks; needs neither the incoming state nor the final one's gradient."""
    partial = IntraGradients(*(new_tiles(run.cut, x, x.shape[-1], x.dtype) for x in (run.q, run.k, run.v)))
    scratch = Scratch(run.q)
    for tile in run.cut.tiles:
        q, k, v, d_o = _load_all(run, adjoint, tile, scratch)
        pairs = tile_pairs(run.decay, tile, scratch)
        d_scores = _masked_(matmul(d_o, v.mT, scratch, "d_scores"), pairs, scratch)
        if run.decay.is_vector:
            steps = tile_steps(run.decay, tile, scratch)
            scores, dq, dk = vector_scores_backward(q, k, steps, d_scores.tril_())
            scores = _masked_(scores, pairs, scratch)
            tile.of(partial.dq).copy_(dq)
            tile.of(partial.dk).copy_(dk)
        else:
            product_into(tile.of(partial.dq), d_scores, k)
            product_into(tile.of(partial.dk), d_scores.mT, q)
            scores = _scores(run, tile, q, k, pairs, scratch)
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
    scratch = Scratch(run.q)
    for tile in run.cut.tiles:
        factors = tile_factors(run.decay, tile, scratch)
        entering = _corrected(run.states, reach, adjoint.incoming, tile, scratch, "states")
        d_entering = _corrected(adjoint.states, d_reach, d_final, tile, scratch, "d_states")
        dq, dk, dv = (tile.of(x) for x in (partial.dq, partial.dk, partial.dv))
        states = scratch.convert("rounded states", entering[:, :, :-1], dq.dtype)
        d_states = scratch.convert("rounded d_states", d_entering[:, :, 1:], dq.dtype)
        rows, entries = (factors, Factors()) if not run.decay.is_vector else (Factors(), factors)
        d_o = load(adjoint.d_o, run.cut, tile, scratch, "d_o", rows.into)
        add_product_(dq, d_o, states.mT, scratch, beta=run.scale, alpha=run.scale, factor=entries.into)
        v = load(run.v, run.cut, tile, scratch, "v", rows.out)
        add_product_(dk, v, d_states.mT, scratch, beta=run.scale, alpha=1.0, factor=entries.out)
        k = load(run.k, run.cut, tile, scratch, "k", factors.out)
        add_product_(dv, k, d_states, scratch, beta=run.scale, alpha=1.0)
        if d_gates is not None:
            room = scratch.room("leaving", states.shape, entering.dtype)
            leaving = torch.mul(entering[:, :, 1:], d_entering[:, :, 1:], out=room)
            d_sums = _d_sums(run, tile, dq, dk, scratch)
            tile.of(d_gates).copy_(_d_gates(d_sums, leaving, d_gates.shape[-1]))
    dq, dk, dv = (tokens_of(x, run.cut) for x in (partial.dq, partial.dk, partial.dv))
    return dq, dk, dv, _like_log_decay(d_gates, run)


def _d_sums(run: Run, tile: Tile, dq: Tensor, dk: Tensor, scratch: Scratch) -> Tensor:
    """``q * dq - k * dk`` of a tile, in the dtype of the state."""
    wide = run.decay.dtype
    q, k = (load(x, run.cut, tile, scratch, name, dtype=wide) for name, x in (("q", run.q), ("k", run.k)))
    return q.mul_(scratch.convert("dq", dq, wide)).addcmul_(k, scratch.convert("dk", dk, wide), value=-1)


def _d_gates(d_sums: Tensor, leaving: Tensor, channels: int) -> Tensor:
    """Gradient of the gates of a tile: a gate acts on all that passes it, so sums from its token to the chunk's end.

    ``leaving`` is state times gradient, for the states that leave the chunks.
    """
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


def _load_all(run: Run, adjoint: Adjoint, tile: Tile, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k = load(run.q, run.cut, tile, scratch, "q"), load(run.k, run.cut, tile, scratch, "k")
    return q, k, load(run.v, run.cut, tile, scratch, "v"), load(adjoint.d_o, run.cut, tile, scratch, "d_o")


def _scores(run: Run, tile: Tile, q: Tensor, k: Tensor, pairs: Tensor | None, scratch: Scratch) -> Tensor:
    """``q k'`` with decay, causal and inside documents: [b, h, n, C, C]."""
    if run.decay.is_vector:
        return _masked_(vector_scores(q, k, tile_steps(run.decay, tile, scratch)), pairs, scratch)
    return _masked_(matmul(q, k.mT, scratch, "scores"), pairs, scratch)


def _masked_(scores: Tensor, pairs: Tensor | None, scratch: Scratch) -> Tensor:
    return scores.tril_() if pairs is None else scale_(scores, pairs, scratch)


def _seen(run: Run, incoming: Tensor | None) -> Tensor | None:
    return None if run.starts[:1] == (0,) else incoming


def _corrected(
    states: Tensor, reach: Tensor | None, boundary: Tensor | None, tile: Tile, scratch: Scratch, name: str
) -> Tensor:
    """The full states (or gradients) around the chunks of a tile, of those that a zero ``boundary`` gives."""
    part = tile.of(states, extra=1)
    if boundary is None:
        return part
    boundary = boundary[tile.batch, tile.heads, None]
    room = scratch.room(name, part.shape, part.dtype)
    return (
        torch.add(part, boundary, out=room)
        if reach is None
        else torch.addcmul(part, tile.of(reach, extra=1), boundary, out=room)
    )


def _chain(states: Tensor, added: Tensor, across: Tensor | None) -> None:
    """Fill in what leaves each chunk of a column: ``states[n + 1]``, of ``states[n]`` and of what the chunk adds."""
    steps = list(states.unbind(2))
    for n, new in enumerate(added.unbind(2)):
        if across is None:
            torch.add(new, steps[n], out=steps[n + 1])
        else:
            torch.addcmul(new, steps[n], across[:, :, n], out=steps[n + 1])


def _chain_back(states: Tensor, added: Tensor, across: Tensor | None, scale: float) -> None:
    """Fill in the gradient of what enters each chunk: ``states[n]``, of ``states[n + 1]`` and ``scale * added``."""
    steps = list(states.unbind(2))
    for n, new in reversed(list(enumerate(added.unbind(2)))):
        passed = steps[n + 1] if across is None else torch.mul(steps[n + 1], across[:, :, n], out=steps[n])
        torch.add(passed, new, alpha=scale, out=steps[n])


def check_inputs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, starts: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless the tensors and the starts fit each other."""
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
