"""Convolutions over a cut sequence: each token sees a few neighbours of its own document, whoever holds them.

Only rows that are missing travel, each once to every rank that needs it. The adjoint of a convolution is the mirrored
convolution of the upstream gradient, so backward is forward in the mirror: the same messages the other way round, in
the same dtype, and every gradient of the input is summed where its token lives, as one device does.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional, grad

from seqpar.collectives import Group
from seqpar.collectives.first_order import first_order
from seqpar.collectives.group import Later, Pending, where
from seqpar.crossing import taps
from seqpar.crossing.convolution_plan import Plan, Reach, outside, plan_of, put_rows, rows_at
from seqpar.sharding.called import called
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.shard import Shard


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    shard: Shard,
    group: Group,
    slot: Slot | None = None,
    initial: Tensor | None = None,
    return_final: bool = False,
) -> Any:
    """Causal depthwise convolution: ``y_t = bias + sum_i weight[:, i] x_(t - w + 1 + i)``.

    Law: the ranks' outputs and gradients, put together, are those of one device, for every layout, however short the
    shards. Before the start of a document there are zeros; ``w - 1`` rows cross a cut inside of one, nothing else does.

    Shapes: ``x [b, t, d]`` with ``t`` my tokens, ``weight [d, w]``, ``bias [d]``; returns ``[b, t, d]``, in the dtype
    of ``x``, which weights are cast to. ``initial`` ``[b, w - 1, d]``, the same on every rank: the inputs before the
    first document, which so continues an earlier one; as for the weights, its gradients on the ranks are parts that sum
    to the whole. With ``return_final`` the result is ``(y, final)``: the last ``w - 1`` inputs of the last document,
    zeros (or ``initial``) before its start, the same on every rank; what follows from it is taken to be the same, too.
    ``slot`` keeps what crossed the cuts for activation checkpointing; layers pass it.
    Raises ``ValueError`` before the first message if shapes do not fit.
    """
    called("causal_conv", group, shard, return_final, x, shared=(weight, bias, initial))
    _check(x, weight, bias, 2, "[d, w]", shard, group)
    depth = weight.shape[-1] - 1
    _check_initial(initial, x, depth, group)
    return _run(x, weight, bias, Reach(depth, 0), shard, group, slot, initial, return_final)


def symmetric_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    shard: Shard,
    group: Group,
    slot: Slot | None = None,
) -> Tensor:
    """Centred convolution: ``y_t = bias + sum_i weight[..., i] x_(t - w // 2 + i)``, zeros beyond a document's ends.

    Law: as :func:`causal_conv`; ``w // 2`` rows cross a cut, either way.

    Shapes: ``x [b, t, d]``, ``bias [d']``, and ``weight`` of odd width: ``[d, w]`` (depthwise, ``d' = d``) or
    ``[d', d, w]``; returns ``[b, t, d']``. In backward the upstream gradient travels: ``d'`` numbers per row.
    """
    called("symmetric_conv", group, shard, (), x, shared=(weight, bias))
    _check(x, weight, bias, 2 if weight.dim() == 2 else 3, "[d, w] or [d', d, w]", shard, group)
    _check_odd(weight.shape[-1:], group)
    half = weight.shape[-1] // 2
    result: Tensor = _run(x, weight, bias, Reach(half, half), shard, group, slot)
    return result


def grid_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    width: int,
    shard: Shard,
    group: Group,
    slot: Slot | None = None,
) -> Tensor:
    """Centred depthwise convolution in two dims: each document is a grid of ``width`` columns, row after row.

    Law: as :func:`causal_conv`, with zeros around every grid; at most ``(kh // 2) * width + kw // 2`` rows cross a cut,
    either way.

    Shapes: ``x [b, t, d]``, ``weight [d, kh, kw]`` with odd ``kh`` and ``kw``, ``bias [d]``; returns ``[b, t, d]``.
    Raises ``ValueError``, too, unless every document fills its last row. Vision layers put such a convolution beside
    their recurrence (ViG, arXiv 2405.18425).
    """
    called("grid_conv", group, shard, width, x, shared=(weight, bias))
    _check(x, weight, bias, 3, "[d, kh, kw]", shard, group)
    _check_odd(weight.shape[-2:], group)
    if width < 1:
        raise ValueError(f"{where(group)}: width must be at least 1 column, got {width}")
    ragged = [length for length in shard.lengths if length % width]
    if ragged:
        raise ValueError(f"{where(group)}: every document must fill rows of {width} tokens, one has {ragged[0]} tokens")
    rows, columns = (size // 2 for size in weight.shape[-2:])
    result: Tensor = _run(x, weight, bias, Reach(columns, columns, rows, width), shard, group, slot)
    return result


def token_shift(
    x: Tensor,
    *,
    shard: Shard,
    group: Group,
    slot: Slot | None = None,
    initial: Tensor | None = None,
    return_final: bool = False,
) -> Any:
    """For each token the one before it in its document; zeros for the first.

    Law: as :func:`causal_conv`, of which this is the one with weights 1, 0; one row crosses a cut inside of a document.
    Shapes: ``x [b, t, d]``, and so is the result; ``initial`` and the final state are ``[b, 1, d]``.
    """
    called("token_shift", group, shard, return_final, x, shared=(initial,))
    _check(x, None, None, 0, "", shard, group)
    _check_initial(initial, x, 1, group)
    return _run(x, None, None, Reach(1, 0), shard, group, slot, initial, return_final)


# --- what fits -------------------------------------------------------------------------------------------------------


def _check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, dim: int, shape: str, shard: Shard, group: Group
) -> None:
    who = where(group)
    if (shard.size, shard.rank) != (group.size, group.rank):
        raise ValueError(f"{who}: the shard was cut for rank {shard.rank} of {shard.size}")
    if x.dim() != 3 or x.shape[1] != shard.num_local:
        raise ValueError(f"{who}: x must be [b, t, d] with my {shard.num_local} tokens, got {list(x.shape)}")
    if weight is None:
        return
    inputs = weight.shape[1] if weight.dim() == dim == 3 and "d'" in shape else weight.shape[0]
    if weight.dim() != dim or inputs != x.shape[2] or 0 in weight.shape:
        raise ValueError(f"{who}: weight must be {shape} with d = {x.shape[2]}, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{who}: bias must be {list(weight.shape[:1])}, got {list(bias.shape)}")


def _check_odd(sizes: torch.Size, group: Group) -> None:
    if any(size % 2 == 0 for size in sizes):
        raise ValueError(f"{where(group)}: a centred window has an odd size, got {list(sizes)}: add a zero weight")


def _check_initial(initial: Tensor | None, x: Tensor, depth: int, group: Group) -> None:
    expected = (x.shape[0], depth, x.shape[2])
    if initial is not None and initial.shape != expected:
        raise ValueError(f"{where(group)}: initial must be {list(expected)}, got {list(initial.shape)}")


# --- forward and backward --------------------------------------------------------------------------------------------


class _Job(NamedTuple):
    """What a call needs to know besides tensors."""

    plan: Plan
    mirror: Plan
    group: Group
    outside: tuple[Tensor, ...] = ()  # of both plans, where documents lie side by side: tap by tap
    mirror_outside: tuple[Tensor, ...] = ()


def _run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    reach: Reach,
    shard: Shard,
    group: Group,
    slot: Slot | None,
    initial: Tensor | None = None,
    return_final: bool = False,
) -> Any:
    weight, bias, initial = (None if each is None else each.to(x.dtype) for each in (weight, bias, initial))
    job = _job_of(shard, replace(reach, beyond=not taps.fits(weight, reach)), group, initial, return_final, x.device)
    with torch.autocast(x.device.type, enabled=False):  # backward knows of none, and both work in one dtype
        out, final = _Convolution.apply(x, weight, bias, initial, job, slot or Slot())
    return (out, final) if return_final else out


def _job_of(
    shard: Shard, reach: Reach, group: Group, initial: Tensor | None, return_final: bool, device: torch.device
) -> _Job:
    continued, mirrored = initial is not None, reach.mirrored
    plan = plan_of(shard, reach, continued, return_final, device)
    mirror = plan_of(shard, mirrored, False, False, device)
    if reach.beyond:
        return _Job(plan, mirror, group)
    hidden = outside(shard, reach, continued, device), outside(shard, mirrored, False, device)
    return _Job(plan, mirror, group, *hidden)


@first_order("causal_conv, symmetric_conv, grid_conv or token_shift")
class _Convolution(torch.autograd.Function):
    """The windows of my tokens in one piece, and one local convolution; without weights, the tokens before mine."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        initial: Tensor | None,
        job: _Job,
        slot: Slot,
    ) -> tuple[Tensor, Tensor]:
        plan = job.plan
        received = slot.keep(lambda: (swap(x, plan, job.group).wait(),))[0]
        ctx.job = job
        ctx.save_for_backward(x, weight, initial, received)
        rows = _assembled(plan, x, received, initial)
        return _outputs(rows, weight, bias, plan, job.outside), final_rows(plan, x, received, initial)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, initial, received = ctx.saved_tensors
        (plan, mirror, group, hidden, mirror_hidden), (upstream, d_final) = ctx.job, grads
        needs_x, needs_weight, needs_bias, needs_initial = ctx.needs_input_grad[:4]
        pending = swap(upstream, mirror, group) if needs_x else None
        d_weight = d_bias = d_initial = d_x = None
        if needs_weight:
            rows = _assembled(plan, x, received, initial)
            d_weight = _weight_gradient(rows, weight, _spread(upstream, plan), plan.reach, hidden)
        if needs_bias:
            d_bias = upstream.sum((0, 1))
        if needs_initial:
            d_initial = _initial_gradient(_spread(upstream, plan), _mirrored(weight, plan.reach), initial, plan)
            if group.rank == 0:  # what follows from the final state is the same on every rank: count it once
                d_initial[:, plan.reach.left - plan.carried :] += d_final[:, : plan.carried]
        if pending is not None:
            rows = _assembled(mirror, upstream, pending.wait(), None)
            d_x = _outputs(rows, _mirrored(weight, plan.reach), None, mirror, mirror_hidden)
            d_x[:, plan.final_mine.source] += d_final[:, plan.final_mine.target]
        return d_x, d_weight, d_bias, d_initial, None, None


def swap(x: Tensor, plan: Plan, group: Group) -> Pending[Tensor]:
    """Send what others miss; the result holds what I miss ``[b, rows, d]``."""
    leaving = [x.index_select(1, index) for index in plan.sends]
    arriving = [x.new_empty((x.shape[0], rows, x.shape[2])) for rows in plan.receives]
    pending = group.all_to_all(leaving, arriving)
    return Later(lambda: torch.cat(pending.wait(), 1))


def assemble(plan: Plan, x: Tensor, received: Tensor, initial: Tensor | None) -> Tensor:
    """All stretches, zeros where a document has no tokens."""
    rows = x.new_zeros((x.shape[0], plan.num_rows, x.shape[2]))
    put_rows(rows, plan.mine, x)
    put_rows(rows, plan.arrived.target, rows_at(received, plan.arrived.source))
    if initial is not None and plan.entering:
        rows[:, : plan.entering] = initial[:, -plan.entering :]
    return rows


def _assembled(plan: Plan, x: Tensor, received: Tensor, initial: Tensor | None) -> Tensor:
    """The same, to be read only: ``x`` itself where that is all."""
    return x if plan.mine == slice(0, plan.num_rows) else assemble(plan, x, received, initial)


def final_rows(plan: Plan, x: Tensor, received: Tensor, initial: Tensor | None) -> Tensor:
    """The last inputs of the last document ``[b, left, d]``."""
    final = x.new_zeros((x.shape[0], plan.reach.left, x.shape[2]))
    if initial is not None and plan.carried:
        final[:, : plan.carried] = initial[:, -plan.carried :]
    for source, moves in ((x, plan.final_mine), (received, plan.final_arrived)):
        put_rows(final, moves.target, rows_at(source, moves.source))
    return final


# --- the local convolution -------------------------------------------------------------------------------------------


def _outputs(
    rows: Tensor, weight: Tensor | None, bias: Tensor | None, plan: Plan, hidden: tuple[Tensor, ...]
) -> Tensor:
    """The outputs of my tokens, in the order of my rows."""
    if not plan.num_rows:
        return rows.new_zeros((rows.shape[0], 0, rows.shape[2] if weight is None else weight.shape[0]))
    if plan.reach.beyond:
        return rows_at(_convolve(rows, weight, bias, plan.reach), plan.outputs).contiguous()
    if weight is None:
        return rows_at(taps.moved(rows, plan.reach, hidden), plan.mine).contiguous()
    return rows_at(taps.outputs(rows, weight, bias, plan.reach, hidden), plan.mine).contiguous()


def _convolve(rows: Tensor, weight: Tensor | None, bias: Tensor | None, reach: Reach) -> Tensor:
    """The output of every window that lies within the rows."""
    if weight is None:
        return rows[:, reach.right : rows.shape[1] - reach.left]
    if _slow_in_16_bits(rows):
        return _convolve(rows.float(), weight.float(), None if bias is None else bias.float(), reach).half()
    kernel, channels = _kernel(weight, reach), rows.transpose(1, 2)
    groups = rows.shape[2] // kernel.shape[1]
    if reach.width is None:
        return functional.conv1d(channels, kernel, bias, groups=groups).transpose(1, 2)
    image = channels.unflatten(2, (-1, reach.width))
    return functional.conv2d(image, kernel, bias, padding=(0, reach.left), groups=groups).flatten(2).transpose(1, 2)


def _slow_in_16_bits(x: Tensor) -> bool:
    """oneDNN takes minutes to make a wide depthwise kernel for fp16; fp32 takes a moment and is rounded once, too."""
    return x.dtype == torch.float16 and x.device.type == "cpu"


def _kernel(weight: Tensor, reach: Reach) -> Tensor:
    """The weight as torch wants it, ``[d', d / groups, ...]``."""
    return weight[:, None] if weight.dim() == 2 or reach.width is not None else weight


def _mirrored(weight: Tensor | None, reach: Reach) -> Tensor | None:
    """The weight of the adjoint."""
    if weight is None:
        return None
    if reach.width is not None:
        return weight.flip(-2, -1)
    return weight.flip(-1) if weight.dim() == 2 else weight.transpose(0, 1).flip(-1)


def _spread(upstream: Tensor, plan: Plan) -> Tensor:
    """The upstream gradient of every window within the rows (tap by tap: of every row): zeros for those that are not
    of my tokens."""
    reach = plan.reach
    edges = 0 if not reach.beyond else reach.left + reach.right if reach.width is None else 2 * reach.offset
    windows, mine = max(0, plan.num_rows - edges), plan.outputs if reach.beyond else plan.mine
    if mine == slice(0, windows):
        return upstream
    whole = upstream.new_zeros((upstream.shape[0], windows, upstream.shape[2]))
    put_rows(whole, mine, upstream)
    return whole


def _weight_gradient(
    rows: Tensor, weight: Tensor, upstream: Tensor, reach: Reach, hidden: tuple[Tensor, ...]
) -> Tensor:
    if not rows.shape[1]:
        return torch.zeros_like(weight)
    if not reach.beyond:
        return taps.weight_gradient(rows, upstream, weight, reach, hidden)
    if _slow_in_16_bits(rows):
        return _weight_gradient(rows.float(), weight.float(), upstream.float(), reach, hidden).half()
    kernel, channels, upstream = _kernel(weight, reach), rows.transpose(1, 2), upstream.transpose(1, 2)
    groups = rows.shape[2] // kernel.shape[1]
    if reach.width is None:
        found = grad.conv1d_weight(channels, kernel.shape, upstream, groups=groups)
    else:
        image, upstream = (each.unflatten(2, (-1, reach.width)) for each in (channels, upstream))
        found = grad.conv2d_weight(image, kernel.shape, upstream, padding=(0, reach.left), groups=groups)
    return found.reshape(weight.shape)


def _initial_gradient(upstream: Tensor, weight: Tensor | None, initial: Tensor, plan: Plan) -> Tensor:
    """My part of the gradient of the initial state, through outputs: the windows that hold its rows, mirrored."""
    found, depth, entering = torch.zeros_like(initial), plan.reach.left, plan.entering
    if entering:
        upstream = upstream if plan.reach.beyond else upstream[:, depth:]
        windows = min(entering, plan.opening - depth)
        first = upstream.new_zeros((upstream.shape[0], depth + entering, upstream.shape[2]))
        first[:, depth : depth + windows] = upstream[:, :windows]
        found[:, depth - entering :] = _convolve(first, weight, None, plan.reach.mirrored)
    return found
