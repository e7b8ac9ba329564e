"""Decayed linear attention over the tokens of one run, in chunks: matmuls inside a chunk, a state between chunks.

For each batch and head ``S_t = exp(log_decay_t) S_{t-1} + k_t v_t'`` and ``o_t = scale q_t S_t``; the state is zero
before the first token of a document. q, k [b, t, h, k], v [b, t, h, v], state [b, h, k, v]; the decay multiplies rows
of the state. ``log_decay`` is None, [h], [b, t, h] or [b, t, h, k]. Everything is computed in fp32 (fp64 for fp64) and
rounded once, where it leaves.

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
    tokens_of,
)
from seqpar.ops.decayed_linear_attention.decay import (
    Decay,
    Factors,
    backward_reach,
    build_decay,
    forward_reach,
    passing_sums,
    per_gate,
    prefix_sums,
    suffix_sums,
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
    """What pairs of tokens inside chunks give to the gradients of q, k, v and the gates, before ``scale``:
    [b, h, n, C, dim]."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    d_gates: Tensor | None


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
        keys = load(k, cut, tile, scratch, "k", tile_factors(decay, tile, scratch).out, states.dtype)
        added = matmul(keys.mT, load(v, cut, tile, scratch, "v", dtype=states.dtype), scratch)
        _chain(tile.of(states, extra=1), added, None if decay.across is None else tile.of(decay.across))
    total = None if decay.totals is None else decay.totals.sum(2)
    return Run(states[:, :, -1], total, len(starts) > 0, q, k, v, log_decay, starts, scale, cut, decay, states)


def intra(run: Run) -> Tensor:
    """What pairs of tokens inside chunks give to the output, before ``scale``: [b, h, n, C, v]."""
    wide = run.decay.dtype
    partial = new_tiles(run.cut, run.v, run.v.shape[-1], wide)
    scratch = Scratch(run.q)
    for tile in run.cut.tiles:
        inputs = (("q", run.q), ("k", run.k), ("v", run.v))
        q, k, v = (load(x, run.cut, tile, scratch, name, dtype=wide) for name, x in inputs)
        pairs = tile_pairs(run.decay, tile, scratch)
        product_into(tile.of(partial), _scores(run, tile, q, k, pairs, scratch), v)
    return partial


def finish(run: Run, partial: Tensor, incoming: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """The output o [b, t, h, v] in ``dtype`` (None: that of v), with the incoming state [b, h, k, v] (None is zero).

    Uses ``partial`` up: o is a view of its memory, unless it is rounded.
    """
    reach, incoming = forward_reach(run.decay), _seen(run, incoming)
    scratch = Scratch(run.q)
    for tile in run.cut.tiles:
        q = load(run.q, run.cut, tile, scratch, "q", tile_factors(run.decay, tile, scratch).into, run.decay.dtype)
        states = _corrected(run.states, reach, incoming, tile, scratch, "states")[:, :, :-1]
        add_product_(tile.of(partial), q, states, beta=run.scale, alpha=run.scale)
    return tokens_of(partial, run.cut).to(dtype or run.v.dtype)


def begin_backward(run: Run, d_o: Tensor, incoming: Tensor | None) -> Adjoint:
    """Sum up what my tokens do to the gradient of a state that passes back through them."""
    states = torch.empty_like(run.states)
    states[:, :, -1] = 0
    scratch = Scratch(run.q)
    across = run.decay.across
    for tile in reversed(run.cut.columns):
        q = load(run.q, run.cut, tile, scratch, "q", tile_factors(run.decay, tile, scratch).into, states.dtype)
        added = matmul(q.mT, load(d_o, run.cut, tile, scratch, "d_o", dtype=states.dtype), scratch)
        _chain_back(tile.of(states, extra=1), added, None if across is None else tile.of(across), run.scale)
    unseen = len(run.starts) > 0 and run.starts[0] == 0
    outgoing = states[:, :, 0]
    return Adjoint(torch.zeros_like(outgoing) if unseen else outgoing, d_o, _seen(run, incoming), states)


def intra_backward(run: Run, adjoint: Adjoint) -> IntraGradients:
    """Gradients from pairs of tokens inside chunks; needs neither the incoming state nor the final one's gradient."""
    wide, gates = run.decay.dtype, run.decay.gates
    d_gates = None if gates is None else new_tiles(run.cut, run.q, gates.shape[-1], wide)
    dq, dk, dv = (new_tiles(run.cut, x, x.shape[-1], wide) for x in (run.q, run.k, run.v))
    partial = IntraGradients(dq, dk, dv, d_gates)
    scratch = Scratch(run.q)
    for tile in run.cut.tiles:
        q, k, v, d_o = _load_all(run, adjoint, tile, scratch)
        pairs = tile_pairs(run.decay, tile, scratch)
        d_scores = _masked_(matmul(d_o, v.mT, scratch, "d_scores"), pairs)
        if run.decay.is_vector:
            scores, *grads = vector_scores_backward(q, k, tile_steps(run.decay, tile, scratch), d_scores.tril_())
            scores = _masked_(scores, pairs)
            for part, grad in zip((partial.dq, partial.dk, partial.d_gates), grads):
                assert part is not None
                tile.of(part).copy_(grad)
        else:
            product_into(tile.of(partial.dq), d_scores, k)
            product_into(tile.of(partial.dk), d_scores.mT, q)
            scores = matmul(q, k.mT, scratch, "scores")
            if partial.d_gates is not None:
                tile.of(partial.d_gates).copy_(passing_sums(d_scores.mul_(scores)))
            scores = _masked_(scores, pairs)
        product_into(tile.of(partial.dv), scores.mT, d_o)
    return partial


def finish_backward(
    run: Run, adjoint: Adjoint, partial: IntraGradients, d_final: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and the gradient of log_decay, in the shapes and dtypes of the inputs.

    ``d_final`` [b, h, k, v]: the total gradient of the state after my last token, from later ranks and from a final
    state that was returned; None is zero. Uses ``partial`` up: dq, dk and dv are views of its memory, unless they are
    rounded.
    """
    reach, d_reach = forward_reach(run.decay), backward_reach(run.decay)
    scratch = Scratch(run.q)
    for tile in run.cut.tiles:
        states = _corrected(run.states, reach, adjoint.incoming, tile, scratch, "states")[:, :, :-1]
        d_states = _corrected(adjoint.states, d_reach, d_final, tile, scratch, "d_states")[:, :, 1:]
        _add_gradients(run, adjoint, partial, tile, states, d_states, scratch)
    dq, dk, dv = (tokens_of(x, run.cut).to(run.q.dtype) for x in (partial.dq, partial.dk, partial.dv))
    return dq, dk, dv, _like_log_decay(partial.d_gates, run)


def _add_gradients(
    run: Run,
    adjoint: Adjoint,
    partial: IntraGradients,
    tile: Tile,
    states: Tensor,
    d_states: Tensor,
    scratch: Scratch,
) -> None:
    """What the states give: ``states`` enter the chunks of a tile, ``d_states`` are gradients of what leaves them."""
    factors, wide = tile_factors(run.decay, tile, scratch), run.decay.dtype
    rows, entries = (factors, Factors()) if not run.decay.is_vector else (Factors(), factors)
    dq, dk, dv = (tile.of(x) for x in (partial.dq, partial.dk, partial.dv))
    d_o = load(adjoint.d_o, run.cut, tile, scratch, "d_o", rows.into, wide)
    v = load(run.v, run.cut, tile, scratch, "v", rows.out, wide)
    if partial.d_gates is None:
        add_product_(dq, d_o, states.mT, beta=run.scale, alpha=run.scale)
        add_product_(dk, v, d_states.mT, beta=run.scale, alpha=1.0)
    else:
        dq_in, dk_out = matmul(d_o, states.mT, scratch, "dq"), matmul(v, d_states.mT, scratch, "dk")
        dq_in, dk_out = (x if f is None else x.mul_(f) for x, f in ((dq_in, entries.into), (dk_out, entries.out)))
        dq.add_(dq_in).mul_(run.scale)
        dk.mul_(run.scale).add_(dk_out)
        d_gates = _passing_gates(run, tile, dq_in, dk_out, states, d_states, scratch)
        tile.of(partial.d_gates).mul_(run.scale).add_(d_gates)
    k = load(run.k, run.cut, tile, scratch, "k", factors.out, wide)
    add_product_(dv, k, d_states, beta=run.scale, alpha=1.0)


def _passing_gates(
    run: Run, tile: Tile, dq_in: Tensor, dk_out: Tensor, states: Tensor, d_states: Tensor, scratch: Scratch
) -> Tensor:
    """What the gates of a tile get from what they fade: the entering state on its way to the tokens from theirs on and
    through the chunk, and the tokens before theirs on the way to the leaving state. Uses dq_in and dk_out up.

    Each term carries its own decay: a sum less another would leave rounding errors where strong gates leave nothing.
    """
    assert run.decay.across is not None and run.decay.gates is not None
    channels = run.decay.gates.shape[-1]
    q, k = (load(x, run.cut, tile, scratch, name, dtype=dq_in.dtype) for name, x in (("q", run.q), ("k", run.k)))
    d_gates = suffix_sums(per_gate(dq_in.mul_(q), channels).mul_(run.scale))
    d_gates += prefix_sums(per_gate(dk_out.mul_(k), channels))
    through = (states * d_states).sum(-1, keepdim=True).mul_(tile.of(run.decay.across))
    return d_gates.add_(per_gate(through.mT, channels))


def _like_log_decay(d_gates: Tensor | None, run: Run) -> Tensor | None:
    if d_gates is None or run.log_decay is None:
        return None
    d_tokens = tokens_of(d_gates, run.cut)
    if run.log_decay.dim() == 1:
        return d_tokens.sum((0, 1, 3)).to(run.log_decay.dtype)
    return d_tokens.reshape(run.log_decay.shape).to(run.log_decay.dtype)


def _load_all(run: Run, adjoint: Adjoint, tile: Tile, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (("q", run.q), ("k", run.k), ("v", run.v), ("d_o", adjoint.d_o))
    q, k, v, d_o = (load(x, run.cut, tile, scratch, name, dtype=run.decay.dtype) for name, x in inputs)
    return q, k, v, d_o


def _scores(run: Run, tile: Tile, q: Tensor, k: Tensor, pairs: Tensor | None, scratch: Scratch) -> Tensor:
    """``q k'`` with decay, causal and inside documents: [b, h, n, C, C]."""
    if run.decay.is_vector:
        return _masked_(vector_scores(q, k, tile_steps(run.decay, tile, scratch)), pairs)
    return _masked_(matmul(q, k.mT, scratch, "scores"), pairs)


def _masked_(scores: Tensor, pairs: Tensor | None) -> Tensor:
    return scores.tril_() if pairs is None else scores.mul_(pairs)


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
