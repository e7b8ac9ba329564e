"""Linear recurrences over a cut sequence: local work, scan, correction.

My tokens change a state that passes through them in one affine way, so three lines are the heart of it: my summary, the
scan, my output. Forward and backward are mirror images: what enters my first token in forward leaves it in backward.
Which recurrence it is, the op says (:mod:`seqpar.ops.stages`); which way the state takes, the legs.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.first_order import first_order
from seqpar.collectives.group import Pending, where
from seqpar.collectives.scan import ALGORITHMS, Summary, pass_through, start_scan
from seqpar.collectives.transition import Transition
from seqpar.crossing.legs import Leg, legs_of
from seqpar.crossing.replicated import scale_gradient
from seqpar.ops.choice import check_impl
from seqpar.ops.precision import exactly
from seqpar.ops.stages import Adjoint, Op, Run, Tensors
from seqpar.sharding.called import called
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.relayout import relayout
from seqpar.sharding.shard import Shard


def recur(
    op: Op,
    tokens: Tensors,
    shared: Tensors = (),
    *,
    shard: Shard,
    group: Group,
    scan: str = "all_gather",
    backwards: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    slot: Slot | None = None,
) -> Any:
    """A recurrence ``op`` over the documents of a cut sequence.

    Law: the ranks' outputs and gradients, put together, are those of one device, for every layout and scan. The state
    starts at zero in every document.

    ``tokens``: tensors ``[b, t, ...]`` of my ``t`` tokens (or None), ``shared``: tensors that every rank has whole; as
    for parameters, their gradients on the ranks are parts that sum to the whole. Returns ``[b, t, ...]``.
    ``backwards``: from the last token of each document to its first. ``initial_state``, the same on every rank, enters
    with the first document (backwards: the last); its gradients are parts, too. With ``return_final_state`` the result
    is ``(o, state)``: the state after the last document (backwards: the first), the same on every rank; what follows
    from it is taken to be the same, too. ``slot`` keeps what crossed the cuts for activation checkpointing.
    Raises ``ValueError`` before the first message for an unknown scan, or tokens that are not those of the shard.
    """
    options = (type(op).__name__, scan, backwards, return_final_state)
    called("recur", group, shard, options, *tokens, shared=(*shared, initial_state))
    _check(op, tokens, shard, group, scan)
    slot = slot or Slot()
    ends = (initial_state is not None, return_final_state, backwards)
    legs, target = legs_of(shard, *ends), shard
    if legs is None:
        target = shard.contiguous
        tokens = relay(tokens, shard, target, group, slot)
        legs = legs_of(target, *ends)
    last = shard.lengths[0 if backwards else -1] if shard.lengths else 0
    job = _Job(op, legs or (), group, scan, len(tokens), backwards, return_final_state and last > 0)
    out, final = _Recurrence.apply(job, slot, initial_state, *tokens, *shared)
    if target is not shard:
        out = relayout(out, target, shard, group, slot)
    if not return_final_state:
        return out
    if initial_state is not None and len(shard.lengths) == 1 and shard.num_tokens == 0:
        return out, scale_gradient(initial_state, int(group.rank == 0))  # its gradients are parts: one rank has all
    return out, final


def _check(op: Op, tokens: Tensors, shard: Shard, group: Group, scan: str) -> None:
    if scan not in ALGORITHMS:
        raise ValueError(f"{where(group)}: scan must be one of {', '.join(ALGORITHMS)}, got {scan!r}")
    if (shard.size, shard.rank) != (group.size, group.rank):
        raise ValueError(f"{where(group)}: the shard was cut for rank {shard.rank} of {shard.size}")
    for x in tokens:
        if x is not None and (x.dim() < 2 or x.shape[1] != shard.num_local):
            raise ValueError(f"{where(group)}: tensors must hold my {shard.num_local} tokens, got {list(x.shape)}")
        if x is not None:
            check_impl(op.impl, x)


def relay(tokens: Tensors, old: Shard, new: Shard, group: Group, slot: Slot) -> Tensors:
    """Everything that has tokens, under the new layout, in as few messages as dtypes allow."""
    moved: list[Tensor | None] = [None] * len(tokens)
    given = sorted((str(x.dtype), place) for place, x in enumerate(tokens) if x is not None)
    for _, places in groupby(given, key=lambda pair: pair[0]):
        together = [(place, x) for _, place in places if (x := tokens[place]) is not None]
        flat = relayout(torch.cat([x.flatten(2) for _, x in together], -1), old, new, group, slot)
        widths = [x[0, 0].numel() if x.numel() else x.shape[2:].numel() for _, x in together]
        for (place, x), part in zip(together, flat.split(widths, -1)):
            moved[place] = part.unflatten(-1, x.shape[2:])
    return tuple(moved)


class _Job(NamedTuple):
    """What a call needs to know besides tensors."""

    op: Op
    legs: tuple[Leg, ...]
    group: Group
    scan: str
    num_tokens: int  # how many of the tensors have tokens
    backwards: bool
    final: bool

    def rows(self, x: Tensor, leg: Leg) -> Tensor:
        """The rows of a leg, in the order of travel."""
        piece = x[:, leg.rows[0] : leg.rows[1]]
        return piece.flip(1) if self.backwards else piece

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """What :meth:`rows` took apart."""
        if self.backwards:
            parts = [part.flip(1) for part in reversed(parts)]
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)

    def begin(self, tensors: Sequence[Tensor | None]) -> list[Run]:
        """My run of every leg, summarised as if its incoming state were zero."""
        tokens, shared = tensors[: self.num_tokens], tuple(tensors[self.num_tokens :])
        return [
            self.op.begin(tuple(None if x is None else self.rows(x, leg) for x in tokens), shared, leg.starts)
            for leg in self.legs
        ]


@first_order("linear_attention, delta_rule, diagonal_scan, selective_scan or linear_system")
class _Recurrence(torch.autograd.Function):
    """Forward carries states up the legs, backward carries their gradients down again."""

    @staticmethod
    @exactly
    def forward(
        ctx: Any, job: _Job, slot: Slot, initial_state: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        runs = job.begin(tensors)
        intra = _Once(lambda: [job.op.intra(run) for run in runs])
        shared = tensors[job.num_tokens :]
        *incoming, final = slot.keep(lambda: _carry(_Way(job, runs, shared, intra), initial_state))
        ctx.job, ctx.num_tensors = job, len(tensors)
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        ctx.save_for_backward(*tensors, *incoming)
        return job.join([job.op.finish(*of_run) for of_run in zip(runs, intra(), incoming)]), final

    @staticmethod
    @exactly
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        job: _Job = ctx.job
        saved = ctx.saved_tensors
        tensors, incoming = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
        d_out, d_final = grads
        runs = job.begin(tensors)
        d_rows = [job.rows(d_out, leg) for leg in job.legs]
        adjoints: list[Adjoint] = [job.op.begin_backward(*of_run) for of_run in zip(runs, d_rows, incoming)]
        intra = _Once(lambda: [job.op.intra_backward(run, adjoint) for run, adjoint in zip(runs, adjoints)])
        ending = d_final.to(adjoints[0].outgoing.dtype) if job.final and job.legs[-1].last else None
        way = _Way(job, runs, tensors[job.num_tokens :], intra)
        needs_initial = ctx.state_dtype is not None
        *leaving, d_initial = _carry_back(way, adjoints, ending, needs_initial)
        assert d_initial is not None
        parts = [job.op.finish_backward(*of_run) for of_run in zip(runs, adjoints, intra(), leaving)]
        d_tokens = [_joined(job.join, of_tensor) for of_tensor in zip(*(tokens for tokens, _ in parts))]
        d_shared = [_joined(_summed, of_tensor) for of_tensor in zip(*(shared for _, shared in parts))]
        return None, None, d_initial.to(ctx.state_dtype) if needs_initial else None, *d_tokens, *d_shared


def _joined(join: Callable[[list[Tensor]], Tensor], parts: Sequence[Tensor | None]) -> Tensor | None:
    """The gradient of one tensor from those of its legs; None if the tensor is not there."""
    there = [part for part in parts if part is not None]
    return join(there) if there else None


def _summed(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


class _Once:
    """Work that is done when it is first asked for: while the first scan travels, or else after it."""

    def __init__(self, work: Callable[[], list[Any]]) -> None:
        self._work = work
        self._result: list[Any] | None = None

    def __call__(self) -> list[Any]:
        if self._result is None:
            self._result = self._work()
        return self._result


class _Way(NamedTuple):
    """The legs with my runs on them, and the work that is done while a state travels."""

    job: _Job
    runs: list[Run]
    shared: Sequence[Tensor | None]
    overlap: _Once

    def scan(self, state: Tensor, run: Run, leg: Leg, backward: bool) -> Pending[Tensor]:
        """Start the scan of one leg; a transition that all ranks know does not travel."""
        op, transition = self.job.op, None
        if self.job.group.size > 1:
            transition = op.known(tuple(self.shared), state, leg.tokens) or op.transition(run)
        if backward:
            transition = _adjoint(transition)
        summary = Summary(state, transition, leg.resets, leg.crosses)
        return start_scan(summary, self.job.group, algorithm=self.job.scan, reverse=leg.reverse != backward)

    def leave(self, outgoing: Tensor, run: Run, state: Tensor | None, backward: bool) -> Tensor:
        """The state that leaves a run which ``state`` enters."""
        if run.reset or state is None:
            return outgoing
        transition = self.job.op.transition(run)
        through = transition.adjoint() if backward and transition is not None else transition
        return pass_through(outgoing, through, False, state)


def _adjoint(transition: Transition | Sequence[Transition] | None) -> Transition | Sequence[Transition] | None:
    if transition is None or isinstance(transition, Transition):
        return None if transition is None else transition.adjoint()
    return [each.adjoint() for each in transition]


def _carry(way: _Way, initial_state: Tensor | None) -> Tensors:
    """The state that enters my run of each leg (None: zero); last, the state after the last document, or zero."""
    job, like = way.job, way.runs[0].outgoing
    handed = None if initial_state is None else initial_state.to(like.dtype)
    incoming = []
    for leg, run in zip(job.legs, way.runs):
        entering = handed if leg.first else None
        pending = way.scan(way.leave(run.outgoing, run, entering, False), run, leg, backward=False)
        if job.group.size > 1:
            way.overlap()
        arrived = pending.wait()  # at the first rank nothing does, but it sends
        state = handed if leg.first else arrived
        incoming.append(state)
        if job.final or leg is not job.legs[-1]:
            handed = way.leave(run.outgoing, run, state, False)
    if not job.final:
        return *incoming, like.new_zeros(()).expand(like.shape)
    assert handed is not None
    return *incoming, _sum(handed if job.legs[-1].last else torch.zeros_like(handed), job.group)


def _sum(state: Tensor, group: Group) -> Tensor:
    if state.is_complex():
        return torch.view_as_complex(group.all_reduce(torch.view_as_real(state).contiguous()).wait())
    return group.all_reduce(state).wait()


def _carry_back(way: _Way, adjoints: list[Adjoint], ending: Tensor | None, needs_initial: bool) -> Tensors:
    """The gradient of the state that leaves my run of each leg; last, my part of the initial state's (if wanted)."""
    job, handed = way.job, ending
    leaving: list[Tensor | None] = []
    for leg, run, adjoint in zip(reversed(job.legs), reversed(way.runs), reversed(adjoints)):
        entering = handed if leg.last else None
        pending = way.scan(way.leave(adjoint.outgoing, run, entering, True), run, leg, backward=True)
        if job.group.size > 1:
            way.overlap()
        arrived = pending.wait()
        state = handed if leg.last else arrived
        leaving.append(state)
        if needs_initial or leg is not job.legs[0]:
            handed = way.leave(adjoint.outgoing, run, state, True)
    if handed is None or not (needs_initial and job.legs[0].first):
        handed = torch.zeros_like(adjoints[0].outgoing)
    result: Tensors = (*reversed(leaving), handed)
    return result
