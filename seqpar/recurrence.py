"""Linear recurrences over a cut sequence: local work, scan, correction.

My tokens change a state that passes through them in one affine way, so three lines are the heart of it: my summary, the
scan, my output. Forward and backward are mirror images: what enters my first token in forward leaves it in backward.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from collectives import Group
from collectives.group import Pending, where
from collectives.scan import ALGORITHMS, Summary, pass_through, start_scan
from seqpar.exchanged import Slot
from seqpar.legs import Leg, legs_of
from seqpar.ops import decayed_linear_attention as op
from seqpar.relayout import relayout
from seqpar.shard import Shard


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shard: Shard,
    group: Group,
    log_decay: Tensor | None = None,
    scan: str = "all_gather",
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    scale: float = 1.0,
    slot: Slot | None = None,
) -> Any:
    """Linear attention with decay: ``S_t = exp(log_decay_t) S_(t-1) + k_t v_t'``, ``o_t = scale q_t S_t``.

    Law: the ranks' outputs and gradients, put together, are those of one device, for every layout and scan. The state
    starts at zero in every document.

    Shapes: ``q, k [b, t, h, k]``, ``v [b, t, h, v]`` with ``t`` my tokens; returns ``[b, t, h, v]``, dtype of ``q``.
    ``log_decay``: None, ``[h]`` (retention, Lightning), ``[b, t, h]`` or ``[b, t, h, k]`` (GLA), at most 0.
    ``scan``: ``"all_gather"`` (LASP-2, arXiv 2502.07563), ``"all_scan"`` (ZeCO, arXiv 2507.01004), ``"ring"`` (LASP-1,
    arXiv 2404.02882) or ``"doubling"``. States are fp32 (fp64 for fp64).
    ``initial_state`` ``[b, h, k, v]``, the same on every rank, enters with the first document; as for a parameter, its
    gradients on the ranks are parts that sum to the whole. With ``return_final_state`` the result is ``(o, state)``:
    the state after the last document, the same on every rank; what follows from it is taken to be the same, too.
    ``slot`` keeps what crossed the cuts for activation checkpointing; layers pass it.
    Raises ``ValueError`` before the first message if shapes, dtypes or options do not fit.
    """
    _check(q, k, v, log_decay, initial_state, shard, group, scan)
    slot = slot or Slot()
    ends = (initial_state is not None, return_final_state)
    legs = legs_of(shard, *ends)
    if legs is None:
        target = Shard.of(shard.lengths, group)
        q, k, v, log_decay = _relay(q, k, v, log_decay, shard, target, group, slot)
        legs = legs_of(target, *ends)
    job = _Job(legs or (), group, scan, scale, return_final_state and bool(shard.lengths) and shard.lengths[-1] > 0)
    out, final = _LinearAttention.apply(q, k, v, log_decay, initial_state, job, slot)
    if legs_of(shard, *ends) is None:
        out = relayout(out, Shard.of(shard.lengths, group), shard, group, slot)
    if not return_final_state:
        return out
    untouched = len(shard.lengths) == 1 and initial_state is not None and shard.num_tokens == 0
    return out, initial_state if untouched else final


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    shard: Shard,
    group: Group,
    scan: str,
) -> None:
    who = where(group)
    if scan not in ALGORITHMS:
        raise ValueError(f"{who}: scan must be one of {', '.join(ALGORITHMS)}, got {scan!r}")
    if (shard.size, shard.rank) != (group.size, group.rank):
        raise ValueError(f"{who}: the shard was cut for rank {shard.rank} of {shard.size}")
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(f"{who}: q and k must be [b, t, h, k] and v [b, t, h, v], got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{who}: q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[1] != shard.num_local:
        raise ValueError(f"{who}: q, k and v must hold my {shard.num_local} tokens, got {shapes}")
    if log_decay is not None and log_decay.shape not in (q.shape[2:3], q.shape[:3], q.shape):
        raise ValueError(f"{who}: log_decay must be [h], [b, t, h] or [b, t, h, k], got {list(log_decay.shape)}")
    state = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != state:
        raise ValueError(f"{who}: initial_state must be {list(state)}, got {list(initial_state.shape)}")


def _relay(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, old: Shard, new: Shard, group: Group, slot: Slot
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Everything that has tokens, under the new layout, in as few messages as dtypes allow."""
    moved = relayout(torch.cat([q, k, v], -1), old, new, group, slot)
    q, k, v = moved.split([q.shape[-1], k.shape[-1], v.shape[-1]], -1)
    if log_decay is not None and log_decay.dim() > 1:
        log_decay = relayout(log_decay, old, new, group, slot)
    return q, k, v, log_decay


class _Job(NamedTuple):
    """What a call needs to know besides tensors."""

    legs: tuple[Leg, ...]
    group: Group
    scan: str
    scale: float
    final: bool


class _LinearAttention(torch.autograd.Function):
    """Forward carries states up the legs, backward carries their gradients down again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        job: _Job,
        slot: Slot,
    ) -> tuple[Tensor, Tensor]:
        runs = [_begin(q, k, v, log_decay, leg, job) for leg in job.legs]
        partials: list[Any] = []

        def overlap() -> None:
            if not partials:
                partials.extend(op.intra(run) for run in runs)

        *incoming, final = slot.keep(lambda: _carry(runs, log_decay, initial_state, job, overlap))
        overlap()
        ctx.job = job
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        ctx.save_for_backward(q, k, v, log_decay, *incoming)
        outs = [op.finish(run, part, state) for run, part, state in zip(runs, partials, incoming)]
        return _join(outs), final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, log_decay, *incoming = ctx.saved_tensors
        job: _Job = ctx.job
        d_out, d_final = grads
        runs = [_begin(q, k, v, log_decay, leg, job) for leg in job.legs]
        adjoints = [
            op.begin_backward(run, _rows(d_out, leg), state) for run, leg, state in zip(runs, job.legs, incoming)
        ]
        partials: list[Any] = []

        def overlap() -> None:
            if not partials:
                partials.extend(op.intra_backward(run, adjoint) for run, adjoint in zip(runs, adjoints))

        ending = d_final.to(adjoints[0].outgoing.dtype) if job.final and job.legs[-1].last else None
        *leaving, d_initial = _carry_back(runs, adjoints, log_decay, ending, job, overlap)
        overlap()
        parts = [op.finish_backward(*together) for together in zip(runs, adjoints, partials, leaving)]
        dq, dk, dv = (_join(list(gradients)) for gradients in list(zip(*parts))[:3])
        d_decay = None
        if log_decay is not None:
            decays = [decay for _, _, _, decay in parts if decay is not None]
            d_decay = _join(decays) if log_decay.dim() > 1 else torch.stack(decays).sum(0)
        needs_initial = ctx.state_dtype is not None
        return dq, dk, dv, d_decay, d_initial.to(ctx.state_dtype) if needs_initial else None, None, None


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _rows(x: Tensor, leg: Leg) -> Tensor:
    return x[:, leg.rows[0] : leg.rows[1]]


def _begin(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, leg: Leg, job: _Job) -> op.Run:
    """My run of one leg, summarised as if its incoming state were zero."""
    decay = log_decay if log_decay is None or log_decay.dim() == 1 else _rows(log_decay, leg)
    return op.begin(_rows(q, leg), _rows(k, leg), _rows(v, leg), decay, leg.starts, scale=job.scale)


def _scan(state: Tensor, run: op.Run, log_decay: Tensor | None, leg: Leg, job: _Job, backward: bool) -> Pending[Tensor]:
    """Start the scan of one leg; a constant decay is known to all and does not travel."""
    decay: Any = run.log_decay_total
    if log_decay is not None and log_decay.dim() == 1:
        per_token = log_decay.to(state.dtype).view(1, -1, 1, 1)
        decay = [per_token * tokens for tokens in leg.tokens]
    summary = Summary(state, decay, leg.resets, leg.crosses)
    return start_scan(summary, job.group, algorithm=job.scan, reverse=leg.reverse != backward)


def _carry(
    runs: list[op.Run], log_decay: Tensor | None, initial_state: Tensor | None, job: _Job, overlap: Any
) -> tuple[Tensor, ...]:
    """The state that enters my run of each leg; last, the state after the last document (zero if not wanted)."""
    like = runs[0].outgoing
    handed = None if initial_state is None else initial_state.to(like.dtype)
    incoming = []
    for leg, run in zip(job.legs, runs):
        entering = handed if leg.first else None
        pending = _scan(_pass(run.outgoing, run, entering), run, log_decay, leg, job, backward=False)
        overlap()
        state = pending.wait()
        if leg.first and handed is not None:
            state = handed
        incoming.append(state)
        handed = _pass(run.outgoing, run, state)
    if not job.final:
        return *incoming, like.new_zeros(())
    assert handed is not None
    return *incoming, job.group.all_reduce(handed if job.legs[-1].last else torch.zeros_like(handed)).wait()


def _carry_back(
    runs: list[op.Run],
    adjoints: list[op.Adjoint],
    log_decay: Tensor | None,
    ending: Tensor | None,
    job: _Job,
    overlap: Any,
) -> tuple[Tensor, ...]:
    """The gradient of the state that leaves my run of each leg; last, that of the initial state (my part of it)."""
    handed, leaving = ending, []
    for leg, run, adjoint in zip(reversed(job.legs), reversed(runs), reversed(adjoints)):
        entering = handed if leg.last else None
        pending = _scan(_pass(adjoint.outgoing, run, entering), run, log_decay, leg, job, backward=True)
        overlap()
        state = pending.wait()
        if leg.last and handed is not None:
            state = handed
        leaving.append(state)
        handed = _pass(adjoint.outgoing, run, state)
    assert handed is not None
    return *reversed(leaving), handed if job.legs[0].first else torch.zeros_like(handed)


def _pass(outgoing: Tensor, run: op.Run, state: Tensor | None) -> Tensor:
    return pass_through(outgoing, run.log_decay_total, run.reset, state)
