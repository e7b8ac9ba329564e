"""Decayed linear attention over the tokens of one run, in chunks: matmuls inside a chunk, a state between chunks.

For each batch and head ``S_t = exp(log_decay_t) S_{t-1} + k_t v_t'`` and ``o_t = scale q_t S_t``; the state is zero
before the first token of a document. q, k [b, t, h, k], v [b, t, h, v], state [b, h, k, v]; the decay multiplies rows of
the state. ``log_decay`` is None, [h], [b, t, h] or [b, t, h, k]. States and gates are fp32 (fp64 for fp64 inputs).

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
    Masks,
    Segment,
    build_masks,
    cut_tokens,
    load,
    same_document,
    store,
)
from seqpar.ops.decayed_linear_attention.intra import (
    decay_matrix,
    suffix_sum_,
    vector_scores,
    vector_scores_backward,
    whole_chunk,
)


@dataclass(frozen=True)
class Factors:
    """What decay and document bounds do in some chunks; None where they do nothing. Channels c is 1 or the key dim.

    ``steps`` [n, b, h, C, c]: the decay of each token. ``into`` (same shape): of the entering state on its way to the
    token. ``out``: of the token on its way to the leaving state. ``across`` [n, b, h, c, 1]: from entering to leaving.
    """

    steps: Tensor | None
    into: Tensor | None
    out: Tensor | None
    across: Tensor | None

    def of(self, chunks: slice) -> "Factors":
        return Factors(*(None if x is None else x[chunks] for x in (self.steps, self.into, self.out, self.across)))


@dataclass(frozen=True)
class Run:
    """The tokens of one run, and what they do to a state that passes through them: see the laws of this module.

    ``outgoing`` [b, h, k, v]: the state after the last token if the incoming one is zero. ``log_decay_total``: the sum
    of log_decay over the tokens; None, [1, h, 1, 1], [b, h, 1, 1] or [b, h, k, 1]. ``reset``: a document starts here.
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
    gates: Tensor | None  # log_decay as [b or 1, t, h, 1 or k]
    masks: Masks | None
    shared: Factors | None  # of all chunks, where all key channels decay alike
    matrix: Tensor | None  # [h, C, C], where all chunks decay alike
    states: Tensor  # [n + 1, b, h, k, v]: what enters each chunk, and leaves the last, from a zero incoming state
    log_totals: Tensor | None  # [n, b or 1, h, 1 or k, 1]


@dataclass(frozen=True)
class Adjoint:
    """The mirror of :class:`Run`: ``outgoing`` [b, h, k, v] is the gradient of the incoming state if that of the final
    state is zero. ``states`` [n + 1, b, h, k, v]: gradients of the states that enter each chunk, and leave the last."""

    outgoing: Tensor
    d_o: Tensor
    incoming: Tensor | None
    states: Tensor


@dataclass(frozen=True)
class IntraGradients:
    """What the pairs of tokens inside chunks give to the gradients of q, k and v, before ``scale``."""

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

    ``starts``: the tokens, in ascending order, at which a document starts. Without any, all tokens continue the document
    that the incoming state comes from; with 0 among them the incoming state is never used.
    """
    _check(q, k, v, log_decay, starts)
    b, t, h, dim = q.shape
    cut = cut_tokens(t, b * h * max(dim, v.shape[-1]), starts, q.device)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    like = q.new_empty(0, dtype=dtype)
    masks = build_masks(cut, starts, like) if any(starts) else None
    gates = _gates(log_decay, t)
    shared = _factors_of(gates, masks, cut, Segment(0, cut.num_chunks, True), dtype) if _is_shared(gates) else None
    matrix = None
    if log_decay is not None and log_decay.dim() == 1:
        matrix = decay_matrix(log_decay.to(dtype).exp()[:, None, None].expand(-1, cut.chunk, 1))
    states = like.new_zeros(1, 1, 1, 1, 1).new_empty(cut.num_chunks + 1, b, h, dim, v.shape[-1])
    states[0] = 0
    totals = []
    for segment in cut.segments:
        factors = _factors(gates, masks, shared, cut, segment, dtype)
        keys = scaled(load(k, cut, segment), factors.out)
        _chain(states, product(keys.mT, load(v, cut, segment), dtype), factors.across, segment)
        if gates is not None:
            totals.append(load(gates, cut, segment).to(dtype).sum(-2).unsqueeze(-1))
    total = None if gates is None else gates.to(dtype).sum(1).unsqueeze(-1)
    log_totals = torch.cat(totals) if totals else None
    return Run(
        states[-1], total, len(starts) > 0, q, k, v, log_decay, starts, scale,
        cut, gates, masks, shared, matrix, states, log_totals,
    )  # fmt: skip


def intra(run: Run) -> Tensor:
    """What the pairs of tokens inside chunks give to the output, before ``scale``: [b, t, h, v]."""
    partial = torch.empty_like(run.v)
    for segment in run.cut.segments:
        q, k, v = (load(x, run.cut, segment) for x in (run.q, run.k, run.v))
        store(partial, torch.matmul(_scores(run, segment, q, k), v), run.cut, segment)
    return partial


def finish(run: Run, partial: Tensor, incoming: Tensor | None) -> Tensor:
    """The output o [b, t, h, v], with the incoming state [b, h, k, v] (None is zero). Uses ``partial`` up: o lies there."""
    for segment in run.cut.segments:
        states = _entering(run, segment, incoming)
        q = scaled(load(run.q, run.cut, segment), _run_factors(run, segment).into)
        o = load(partial, run.cut, segment)
        add_product_(o, q, states[:-1].to(q.dtype), beta=run.scale, alpha=run.scale)
        store(partial, o, run.cut, segment)
    return partial


def begin_backward(run: Run, d_o: Tensor, incoming: Tensor | None) -> Adjoint:
    """Sum up what my tokens do to the gradient of a state that passes back through them."""
    states = torch.empty_like(run.states)
    states[-1] = 0
    for segment in reversed(run.cut.segments):
        factors = _run_factors(run, segment)
        q = scaled(load(run.q, run.cut, segment), factors.into)
        grads = product(q.mT, load(d_o, run.cut, segment), states.dtype).mul_(run.scale)
        _chain_back(states, grads, factors.across, segment)
    unseen = len(run.starts) > 0 and run.starts[0] == 0
    return Adjoint(torch.zeros_like(states[0]) if unseen else states[0], d_o, incoming, states)


def intra_backward(run: Run, adjoint: Adjoint) -> IntraGradients:
    """Gradients from the pairs of tokens inside chunks; needs neither the incoming state nor the final one's gradient."""
    partial = IntraGradients(torch.empty_like(run.q), torch.empty_like(run.k), torch.empty_like(run.v))
    for segment in run.cut.segments:
        q, k, v, d_o = (load(x, run.cut, segment) for x in (run.q, run.k, run.v, adjoint.d_o))
        scores, dq, dk = _scores_backward(run, segment, q, k, torch.matmul(d_o, v.mT))
        store(partial.dq, dq, run.cut, segment)
        store(partial.dk, dk, run.cut, segment)
        store(partial.dv, torch.matmul(scores.mT, d_o), run.cut, segment)
    return partial


def finish_backward(
    run: Run, adjoint: Adjoint, partial: IntraGradients, d_final: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and the gradient of log_decay, from the total gradient ``d_final`` [b, h, k, v] of the state after my
    last token (None is zero). Uses ``partial`` up: the gradients lie there."""
    dtype = run.states.dtype
    d_gates = None if run.gates is None else run.q.new_empty(*run.q.shape[:3], run.gates.shape[-1], dtype=dtype)
    for segment in run.cut.segments:
        factors = _run_factors(run, segment)
        entering = _entering(run, segment, adjoint.incoming)
        d_entering = _d_entering(run, adjoint, segment, d_final)
        q, k, v, d_o = (load(x, run.cut, segment) for x in (run.q, run.k, run.v, adjoint.d_o))
        dq, dk, dv = (load(x, run.cut, segment) for x in (partial.dq, partial.dk, partial.dv))
        d_leaving = d_entering[1:].to(q.dtype)
        dq = add_scaled_product(dq, factors.into, d_o, entering[:-1].to(q.dtype).mT, run.scale, run.scale)
        dk = add_scaled_product(dk, factors.out, v, d_leaving.mT, run.scale, 1.0)
        add_product_(dv, scaled(k, factors.out), d_leaving, beta=run.scale, alpha=1.0)
        for target, tile in ((partial.dq, dq), (partial.dk, dk), (partial.dv, dv)):
            store(target, tile, run.cut, segment)
        if d_gates is not None:
            store(d_gates, _d_gates(q, dq, k, dk, entering[1:] * d_entering[1:], d_gates), run.cut, segment)
    return partial.dq, partial.dk, partial.dv, _like_log_decay(d_gates, run.log_decay)


def _d_gates(q: Tensor, dq: Tensor, k: Tensor, dk: Tensor, leaving: Tensor, like: Tensor) -> Tensor:
    """Gradient of the gates of a tile: a gate acts on all that passes it, so sums from the token to the chunk's end.

    ``leaving`` is state times gradient, for the states that leave the chunks.
    """
    d_sums = (q.to(like.dtype) * dq).sub_(k.to(like.dtype) * dk)
    d_last = leaving.sum(-1)
    if like.shape[-1] == 1:
        d_sums, d_last = d_sums.sum(-1, keepdim=True), d_last.sum(-1, keepdim=True)
    d_sums[..., -1, :] += d_last
    return suffix_sum_(d_sums)


def _like_log_decay(d_gates: Tensor | None, log_decay: Tensor | None) -> Tensor | None:
    if d_gates is None or log_decay is None:
        return None
    if log_decay.dim() == 1:
        return d_gates.sum((0, 1, 3)).to(log_decay.dtype)
    return d_gates.view(log_decay.shape).to(log_decay.dtype)


def _gates(log_decay: Tensor | None, tokens: int) -> Tensor | None:
    if log_decay is None:
        return None
    if log_decay.dim() == 1:
        return log_decay[None, None, :, None].expand(1, tokens, -1, 1)
    return log_decay.unsqueeze(-1) if log_decay.dim() == 3 else log_decay


def _is_shared(gates: Tensor | None) -> bool:
    return gates is not None and gates.shape[-1] == 1


def _scores(run: Run, segment: Segment, q: Tensor, k: Tensor) -> Tensor:
    """``q k'`` with decay, causal and inside documents: [n, b, h, C, C]."""
    pairs = _pairs(run, segment)
    if _is_vector(run):
        steps = _steps(run, segment)
        scores = vector_scores(q, k, steps)
        return scores if pairs is None else scores.mul_(pairs)
    scores = torch.matmul(q, k.mT)
    return scores.tril_() if pairs is None else scores.mul_(pairs)


def _scores_backward(run: Run, segment: Segment, q: Tensor, k: Tensor, d_scores: Tensor) -> tuple[Tensor, ...]:
    """The scores again, dq and dk from the gradient of the scores, which is changed in place."""
    pairs = _pairs(run, segment)
    d_scores = d_scores.tril_() if pairs is None else d_scores.mul_(pairs)
    if _is_vector(run):
        if pairs is not None:
            d_scores.tril_()
        scores, dq, dk = vector_scores_backward(q, k, _steps(run, segment), d_scores)
        return scores if pairs is None else scores.mul_(pairs), dq, dk
    scores = torch.matmul(q, k.mT)
    scores = scores.tril_() if pairs is None else scores.mul_(pairs)
    return scores, torch.matmul(d_scores, k), torch.matmul(d_scores.mT, q)


def _is_vector(run: Run) -> bool:
    return run.gates is not None and run.shared is None


def _steps(run: Run, segment: Segment) -> Tensor:
    assert run.gates is not None
    return load(run.gates, run.cut, segment).to(run.states.dtype).exp_()


def _pairs(run: Run, segment: Segment) -> Tensor | None:
    """What multiplies the scores, [n or 1, b or 1, h or 1, C, C]; None: only the causal mask."""
    pairs = run.matrix
    if run.shared is not None and pairs is None and run.shared.steps is not None:
        pairs = decay_matrix(run.shared.steps[segment.chunks])
    if not segment.masked or run.masks is None:
        return pairs
    same = same_document(run.masks, segment)
    return same.tril_() if pairs is None else same * pairs


def _run_factors(run: Run, segment: Segment) -> Factors:
    return _factors(run.gates, run.masks, run.shared, run.cut, segment, run.states.dtype)


def _factors(
    gates: Tensor | None, masks: Masks | None, shared: Factors | None, cut: Cut, segment: Segment, dtype: torch.dtype
) -> Factors:
    return _factors_of(gates, masks, cut, segment, dtype) if shared is None else shared.of(segment.chunks)


def _factors_of(gates: Tensor | None, masks: Masks | None, cut: Cut, segment: Segment, dtype: torch.dtype) -> Factors:
    masked = masks if segment.masked else None
    if gates is None:
        if masked is None:
            return Factors(None, None, None, None)
        return Factors(None, masked.into, masked.out, masked.across).of(segment.chunks)
    steps = load(gates, cut, segment).to(dtype).exp()
    into, out = whole_chunk(steps)
    across = into[..., -1:, :].mT.clone()
    if masked is not None:
        into.mul_(masked.into[segment.chunks])
        out.mul_(masked.out[segment.chunks])
        across.mul_(masked.across[segment.chunks])
    return Factors(steps, into, out, across)


def _entering(run: Run, segment: Segment, incoming: Tensor | None) -> Tensor:
    """The full states that enter the chunks of a segment, and leave its last: [n + 1, b, h, k, v]."""
    states = run.states[segment.first : segment.stop + 1]
    if incoming is None:
        return states
    reach = run.starts[0] // run.cut.chunk if run.starts else run.cut.num_chunks
    if run.starts and run.starts[0] == 0 or reach < segment.first:
        return states
    seen = states[: reach - segment.first + 1]
    if run.log_totals is None:
        added = seen + incoming
    else:
        before = _sums_before(run.log_totals)[segment.first : segment.stop + 1]
        added = torch.addcmul(seen, before[: len(seen)].exp(), incoming)
    return torch.cat([added, states[len(seen) :]])


def _sums_before(log_totals: Tensor) -> Tensor:
    """Sums over the chunks before each, and over all: one more than there are chunks."""
    return torch.cat([torch.zeros_like(log_totals[:1]), log_totals.cumsum(0)])


def _d_entering(run: Run, adjoint: Adjoint, segment: Segment, d_final: Tensor | None) -> Tensor:
    """The full gradients of the states that enter the chunks of a segment, and leave its last: [n + 1, b, h, k, v]."""
    states = adjoint.states[segment.first : segment.stop + 1]
    if d_final is None:
        return states
    first = run.starts[-1] // run.cut.chunk + 1 if run.starts and run.starts[-1] > 0 else 0
    cut_off = max(0, first - segment.first)
    if cut_off >= len(states):
        return states
    seen = states[cut_off:]
    if run.log_totals is None:
        added = seen + d_final
    else:
        after = _sums_before(run.log_totals.flip(0)).flip(0)[segment.first : segment.stop + 1]
        added = torch.addcmul(seen, after[cut_off:].exp(), d_final)
    return torch.cat([states[:cut_off], added])


def _chain(states: Tensor, contributions: Tensor, across: Tensor | None, segment: Segment) -> None:
    for i, n in enumerate(range(segment.first, segment.stop)):
        if across is None:
            torch.add(states[n], contributions[i], out=states[n + 1])
        else:
            torch.addcmul(contributions[i], states[n], across[i], out=states[n + 1])


def _chain_back(states: Tensor, contributions: Tensor, across: Tensor | None, segment: Segment) -> None:
    for i, n in reversed(list(enumerate(range(segment.first, segment.stop)))):
        if across is None:
            torch.add(states[n + 1], contributions[i], out=states[n])
        else:
            torch.addcmul(contributions[i], states[n + 1], across[i], out=states[n])


def scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    """``x * factor``, multiplied in the dtype of the factor and rounded once to that of x."""
    return x if factor is None else (x * factor).to(x.dtype)


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` in ``dtype``."""
    if left.dtype != dtype and left.is_cuda:
        flat = torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out_dtype=dtype)
        return flat.unflatten(0, left.shape[:-2])
    return torch.matmul(left, right).to(dtype)


def add_product_(total: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float) -> Tensor:
    """``beta * total + alpha * left @ right`` in the memory of ``total``."""
    total.flatten(0, -3).baddbmm_(left.flatten(0, -3), right.flatten(0, -3), beta=beta, alpha=alpha)
    return total


def add_scaled_product(
    total: Tensor, factor: Tensor | None, left: Tensor, right: Tensor, beta: float, alpha: float
) -> Tensor:
    """``beta * total + alpha * factor * (left @ right)``, where ``factor`` belongs to rows or to entries."""
    if factor is None or factor.shape[-1] == 1:
        return add_product_(total, scaled(left, factor), right, beta=beta, alpha=alpha)
    return torch.addcmul(beta * total, factor, product(left, right, factor.dtype), value=alpha)


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
