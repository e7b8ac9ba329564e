"""The tokens of my documents that come before mine, for what looks back in its own way: windows over keys of two kinds,
gathers, comparisons.

They come as a convolution gets them: only rows that are missing travel, each once to every rank that needs it, and lie
with mine in stretches of consecutive tokens. In backward the gradients of rows that came go back where they came from.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.first_order import first_order
from seqpar.collectives.group import where
from seqpar.crossing.convolution import assemble, final_rows, swap
from seqpar.crossing.convolution_plan import Plan, Reach, plan_of, put_rows, rows_at
from seqpar.sharding.called import called
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.shard import Shard


class Preceding(NamedTuple):
    """``rows [b, rows, d]``: token ``i`` of mine lies at ``places[i]``, and the one ``j <= left`` tokens before it in
    its document at ``places[i] - j``, if there is one (or the initial state has it). What lies there if there is none
    is of another document: how many there are, the position of the token says."""

    rows: Tensor
    places: Tensor


def preceding(
    x: Tensor,
    left: int,
    *,
    shard: Shard,
    group: Group,
    slot: Slot | None = None,
    initial: Tensor | None = None,
    return_final: bool = False,
) -> Any:
    """My tokens ``x [b, t, d]`` with the ``left`` before each of them: :class:`Preceding`.

    Law: what any function of each token and those before it gives, and its gradients, are those of one device, for
    every layout, however short the shards. Gradients are summed in fp32 (fp64) where their token lives.

    ``initial [b, left, d]``, ``return_final`` (then the result is ``(preceding, final)``) and ``slot`` are those of
    :func:`seqpar.crossing.convolution.causal_conv`. Raises ``ValueError`` before the first message if shapes do not
    fit.
    """
    called("preceding", group, shard, (left, return_final), x, shared=(initial,))
    _check(x, left, initial, shard, group)
    plan = plan_of(shard, Reach(left, 0, beyond=False), initial is not None, return_final, x.device)
    rows, final = _Preceding.apply(x, initial, plan, group, slot or Slot())
    found = Preceding(rows, torch.arange(plan.num_rows, device=x.device)[plan.mine])
    return (found, final) if return_final else found


def _check(x: Tensor, left: int, initial: Tensor | None, shard: Shard, group: Group) -> None:
    who = where(group)
    if left < 0:
        raise ValueError(f"{who}: left must be at least 0 tokens, got {left}")
    if (shard.size, shard.rank) != (group.size, group.rank):
        raise ValueError(f"{who}: the shard was cut for rank {shard.rank} of {shard.size}")
    if x.dim() != 3 or x.shape[1] != shard.num_local:
        raise ValueError(f"{who}: x must be [b, t, d] with my {shard.num_local} tokens, got {list(x.shape)}")
    expected = (x.shape[0], left, x.shape[2])
    if initial is not None and initial.shape != expected:
        raise ValueError(f"{who}: initial must be {list(expected)}, got {list(initial.shape)}")


@first_order("preceding")
class _Preceding(torch.autograd.Function):
    """Rows forward; their gradients the other way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, initial: Tensor | None, plan: Plan, group: Group, slot: Slot
    ) -> tuple[Tensor, Tensor]:
        received = slot.keep(lambda: (swap(x, plan, group).wait(),))[0]
        ctx.call, ctx.dtype, ctx.shape = (plan, group), x.dtype, None if initial is None else initial.shape
        return assemble(plan, x, received, initial), final_rows(plan, x, received, initial)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (plan, group), dtype = ctx.call, torch.float64 if ctx.dtype == torch.float64 else torch.float32
        d_rows, d_final = (grad.to(dtype) for grad in grads)
        d_x = rows_at(d_rows, plan.mine).clone()
        _add_returned(d_x, d_rows, plan, group)
        d_x[:, plan.final_mine.source] += d_final[:, plan.final_mine.target]
        d_initial = None if ctx.shape is None else _initial_gradient(d_rows, d_final, plan, group)
        return d_x.to(ctx.dtype), None if d_initial is None else d_initial.to(ctx.dtype), None, None, None


def _add_returned(d_x: Tensor, d_rows: Tensor, plan: Plan, group: Group) -> None:
    """Send home the gradients of rows that came, and add those of mine that went."""
    d_received = d_rows.new_zeros((d_rows.shape[0], sum(plan.receives), d_rows.shape[2]))
    put_rows(d_received, plan.arrived.source, rows_at(d_rows, plan.arrived.target))
    leaving = [part.contiguous() for part in d_received.split(list(plan.receives), 1)]
    arriving = [d_rows.new_empty((d_rows.shape[0], len(index), d_rows.shape[2])) for index in plan.sends]
    for index, part in zip(plan.sends, group.all_to_all(leaving, arriving).wait()):
        if len(index):
            d_x.index_add_(1, index, part)


def _initial_gradient(d_rows: Tensor, d_final: Tensor, plan: Plan, group: Group) -> Tensor:
    """My part: of the rows that came of it, and, on one rank, of those that left again."""
    depth, found = plan.reach.left, torch.zeros_like(d_final)
    if plan.entering:
        found[:, depth - plan.entering :] += d_rows[:, : plan.entering]
    if group.rank == 0:  # what follows from the final state is the same on every rank: count it once
        found[:, depth - plan.carried :] += d_final[:, : plan.carried]
    return found
