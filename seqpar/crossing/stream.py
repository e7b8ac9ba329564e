"""Recurrences that do not compose, over a cut sequence: receive a state, run my stretches, send it on.

A cell (LSTM, a memory that learns while it reads) changes a state in a way that no small map describes, so that the
state itself travels from rank to rank, along the legs of the layout, and its gradient takes the way back. A cut at the
start of a document sends nothing. Between layers that do nothing else together ranks work at the same time: while a
rank is at its first tokens of one layer, the one before it is at the next layer (a wavefront).
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.first_order import first_order
from seqpar.collectives.group import where
from seqpar.crossing.legs import legs_of
from seqpar.crossing.recurrence import relay
from seqpar.crossing.replicated import scale_gradient
from seqpar.crossing.streaming.running import Cell, Kept, Running, packed
from seqpar.crossing.streaming.way import Backward, Forward, Job
from seqpar.ops.precision import exactly
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.relayout import relayout
from seqpar.sharding.shard import Shard


def stream(
    cell: Cell,
    params: Sequence[Tensor],
    tokens: Sequence[Tensor],
    initial: Sequence[Tensor],
    *,
    shard: Shard,
    group: Group,
    backwards: bool = False,
    chunk: int = 0,
    every: int = 0,
    learns: bool = False,
    recompute: bool = True,
    entering: Tensor | None = None,
    position: int = 0,
    return_leaving: bool = False,
    slot: Slot | None = None,
) -> Any:
    """Any ``cell`` over the documents of a cut sequence.

    Law: the ranks' outputs and gradients, put together, are those of one device, for every layout. Every document
    starts from ``initial``.

    ``cell(params, rows, state) -> (out, state)`` is ordinary differentiable torch, over any number of steps of
    documents side by side: ``rows`` are tensors ``[n, steps, ...]``, ``state`` tensors ``[n, ...]``, ``out``
    ``[n, steps, ...]``; it mixes nothing over ``n``, and no step with a later one. All it gets is fp32 (fp64 if
    anything given is). ``params``: tensors that every rank has whole; ``tokens``: tensors ``[b, t, ...]`` of my ``t``
    tokens; ``initial``: the state's tensors of one document. Returns ``[b, t, ...]``, dtype of the first of ``tokens``.
    As for parameters, gradients of ``params`` and ``initial`` on the ranks are parts that sum to the whole.

    ``backwards``: from the last token of each document to its first. ``chunk``: the cell works in chunks of so many
    tokens, counted from the document's start, and is called with a fourth argument: how many tokens of its chunk came
    before its rows (``position``: how many of the first document came before this call). ``every``: a state is kept
    every so many steps, and what lies between is computed again in backward (0: about the square root of the steps).
    ``recompute=False``: what the cell saves for backward is kept instead, as without a cut.
    ``learns``: the cell calls ``torch.autograd.grad(..., create_graph=True)`` itself, so it is always called with
    gradients enabled and with a state that needs them.
    ``entering [b, numbers]``: the state, its tensors one after the other, with which the first document (backwards:
    the last) goes on, the same on every rank; its gradients are parts, too. With ``return_leaving`` the result is
    ``(out, state)``, the state after the last document (backwards: the first), the same on every rank, and what follows
    from it is taken to be the same, too. ``slot`` keeps what crossed the cuts for activation checkpointing.

    A contiguous layout is the fast one. Zigzag goes up and down again, so ranks wait for each other in every layer;
    striped tokens are re-laid. Raises ``ValueError`` before the first message, the same on every rank, for tokens that
    are not those of the shard, or a cell that changes the shape of its state.
    """
    _check(tokens, initial, entering, shard, group, chunk, every)
    slot, given = slot or Slot(), tuple(tokens)
    ends = (entering is not None, return_leaving, backwards)
    legs, target = legs_of(shard, *ends), shard
    if legs is None:
        target = shard.contiguous
        given = tuple(x for x in relay(given, shard, target, group, slot) if x is not None)
        legs = legs_of(target, *ends)
    last = shard.lengths[0 if backwards else -1] if shard.lengths else 0
    before = 0 if entering is None else position
    running = Running(cell, tuple(x.shape for x in initial), chunk, every, learns, recompute, where(group))
    counts = (len(given), len(params), len(initial))
    job = Job(running, legs or (), target, group, counts, backwards, before, return_leaving and last > 0,
              torch.is_grad_enabled())  # fmt: skip
    out, leaving = _Stream.apply(job, slot, entering, *given, *params, *initial)
    if target is not shard:
        out = relayout(out, target, shard, group, slot)
    if not return_leaving or last:
        return (out, leaving) if return_leaving else out
    if entering is not None and len(shard.lengths) == 1:
        return out, scale_gradient(entering, int(group.rank == 0))  # its gradients are parts: one rank has all
    fresh = packed([x.expand(given[0].shape[0], *x.shape) for x in initial]).to(leaving.dtype)
    return out, scale_gradient(fresh, int(group.rank == 0))


def _check(
    tokens: Sequence[Tensor],
    initial: Sequence[Tensor],
    entering: Tensor | None,
    shard: Shard,
    group: Group,
    chunk: int,
    every: int,
) -> None:
    who = where(group)
    if (shard.size, shard.rank) != (group.size, group.rank):
        raise ValueError(f"{who}: the shard was cut for rank {shard.rank} of {shard.size}")
    if not tokens or not initial:
        raise ValueError(f"{who}: a stream takes tensors of tokens and of a state, got {len(tokens)}, {len(initial)}")
    for x in tokens:
        if x.dim() < 2 or x.shape[1] != shard.num_local:
            raise ValueError(f"{who}: tokens must hold my {shard.num_local} tokens, got {list(x.shape)}")
    for name, size in (("chunk", chunk), ("every", every)):
        if size < 0:
            raise ValueError(f"{who}: {name} must be a number of tokens, got {size}")
    numbers = sum(x.numel() for x in initial)
    if entering is not None and entering.shape != (tokens[0].shape[0], numbers):
        raise ValueError(
            f"{who}: entering must be {[tokens[0].shape[0], numbers]}, as the state has {numbers} numbers, "
            f"got {list(entering.shape)}"
        )


@first_order("stream")
class _Stream(torch.autograd.Function):
    """Forward carries a state along the legs, backward carries its gradient back."""

    @staticmethod
    @exactly
    def forward(ctx: Any, job: Job, slot: Slot, entering: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad[3:] if job.training else [False] * len(tensors)
        way, travelled = Forward(job, entering, tensors, needs), []

        def travel() -> tuple[Tensor | None, ...]:
            *incoming, leaving = way.travel()
            travelled.append(True)
            return *incoming, way.everywhere(leaving)

        *incoming, final = slot.keep(travel)
        if not travelled:
            way.travel(incoming)
        ctx.job, ctx.dtype, ctx.kept = job, way.dtype, [(len(each.states), each.graph) for each in way.kept]
        ctx.entering_dtype = None if entering is None else entering.dtype
        ctx.save_for_backward(*tensors, *(state for each in way.kept for state in each.states))
        return way.rows(), final

    @staticmethod
    @exactly
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        job: Job = ctx.job
        number = sum(job.counts)
        saved = ctx.saved_tensors
        tensors, states = saved[:number], iter(saved[number:])
        kept = [Kept(list(islice(states, count)), graph) for count, graph in ctx.kept]
        way = Backward(job, tensors, ctx.needs_input_grad[3:], kept, grads[0], ctx.dtype)
        d_entering = way.travel(grads[1] if job.final and job.legs[-1].last else None)
        wanted = ctx.entering_dtype
        return None, None, None if wanted is None else d_entering.to(wanted), *way.gradients()
