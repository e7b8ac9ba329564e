"""One training step as a plan says: micro-batches of groups of ranks, with the gradients of one device."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from seqpar.collectives import Group
from seqpar.collectives.group import where
from seqpar.crossing.attention import TRANSPORTS
from seqpar.crossing.replicated import scale_gradient
from seqpar.planner import Plan, PlannedGroup
from seqpar.sharding.agreement import text_fingerprint
from seqpar.training.aliases import Trained, leaves, standing_in, trained
from seqpar.training.alike import is_distributed, tensor_parallel
from seqpar.training.classes import wrapper_of
from seqpar.training.gradients import check_whole_mesh, sum_over_ranks
from seqpar.training.inputs import Call, batch_of
from seqpar.training.loss import num_targets
from seqpar.training.output import opened
from seqpar.training.passes import Given, Leave, Pass, Wanted, as_it_is
from seqpar.training.wrap import SequenceParallel


def run_plan(model: nn.Module, plan: Plan, tokens: Tensor, *, labels: Tensor, lengths: Sequence[int]) -> Tensor:
    """Forward and backward of one batch, every document by the ranks that the plan gives it to; returns the loss.

    Law: the loss, and what is added to every ``.grad``, are those of one device, for every plan: each group's loss is
    summed over its targets and divided by those of the whole batch, and gradients are summed over all ranks once, at
    the end, in fp32 (fp64). They reach parameters in one backward pass of their own, so hooks and optimizers that step
    in them see what they would on one device. A rank without a group in a micro-batch goes on to the next one. Where
    gradients are off or nothing is trainable, the loss is all.

    ``model``: what :func:`seqpar.sequence_parallel` returned, wrapped over the group of ranks that the plan is for; its
    layout and scan are used, the transport is the plan's. ``tokens``, ``labels`` ``[b, s]`` and ``lengths`` are the
    global batch, the same on every rank, as for calling the model; the plan's documents are places in ``lengths``.
    Groups are made when they are first needed, by their ranks alone, and kept.

    Under FSDP2 (``sync_gradients=False``, sharded over the ranks that the plan is for, in any mesh of these) each
    micro-batch's gradients are summed by FSDP2 as its backward pass goes; a rank without a group takes part with no
    tokens, in evaluation too. The model is then run by every rank once for each micro-batch.

    Raises ``ValueError``, the same on every rank, before any document is worked on, if ranks have other plans, batches
    or weights, or if the plan is not one of this batch for these ranks.
    """
    model = wrapper_of(model)
    if not isinstance(model, SequenceParallel):
        why = ""
        if isinstance(model, DistributedDataParallel):
            why = ": a rank that a micro-batch leaves out would miss DDP's messages; sums over ranks are run_plan's own"
        raise ValueError(f"run_plan takes a model from sequence_parallel(...), got {type(model).__name__}{why}")
    model.check(tokens, labels, lengths, {"the plan": (text_fingerprint(plan.digest), f"hash {plan.digest[:16]}")})
    _check_plan(model, plan, lengths)
    if is_distributed(model.module):
        loss = _run_sharded(model, plan, (tokens, labels), lengths)
        return model.group.all_reduce(loss).wait()
    parameters = trained(model.module) if torch.is_grad_enabled() else []
    parts = leaves(parameters)
    with standing_in(parameters, parts):
        loss, mine = _run_micro_batches(model, plan, (tokens, labels), lengths, parts)
    total = model.group.all_reduce(loss).wait()
    if parameters:
        _hand_over(parameters, mine, model.group)
    return total


def _hand_over(parameters: Sequence[Trained], mine: list[Tensor | None], group: Group) -> None:
    """Parameters get the sums of gradients as from a backward pass: once, and with all that users have hooked there."""
    tensors = [each.tensor for each in parameters]
    whole = sum_over_ranks(mine, tensors, group, [each.name for each in parameters], [True] * len(mine))
    used = [(tensor, gradient) for tensor, gradient in zip(tensors, whole) if gradient is not None]
    if used:
        torch.autograd.backward([tensor for tensor, _ in used], [gradient for _, gradient in used])


def _run_sharded(model: SequenceParallel, plan: Plan, batch: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """Every micro-batch on every rank, since all of them hold parts of the weights; my part of the loss.

    FSDP2 averages over its mesh, which is all ranks of the plan; what leaves the module is scaled to make that a sum.
    """
    divisor, size = num_targets(batch[1], lengths), model.group.size
    loss = torch.zeros((), dtype=torch.float64, device=batch[0].device)

    def leave(run: Callable[[], Any]) -> Any:
        outputs, rebuild = opened(run())
        trained = [isinstance(each, Tensor) and each.requires_grad for each in outputs]
        return rebuild([scale_gradient(x, size) if counts else x for x, counts in zip(outputs, trained)])

    nothing = planned_nothing(model.group.rank)
    for group in plan.groups_of(model.group.rank):
        mine = nothing if group is None else group
        part = _run_group(model, mine, batch, lengths, divisor, leave)
        loss += part if model.group.rank == mine.ranks[0] else 0.0
    return loss


def planned_nothing(rank: int) -> PlannedGroup:
    """What a rank without a group does: it runs the model alone, on no document."""
    return PlannedGroup((rank,), 1, "none", (), 0, 0, 0, 0.0, 0.0, 0.0, 0.0)


def _run_micro_batches(
    model: SequenceParallel, plan: Plan, batch: Sequence[Tensor], lengths: Sequence[int], parts: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """My groups one after another: my part of the loss, and my part of the gradients in fp32 (fp64)."""
    divisor = num_targets(batch[1], lengths)
    device = next((each.device for each in model.parameters()), batch[0].device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    sums: list[Tensor | None] = [None] * len(parts)
    for group in plan.groups_of(model.group.rank):
        if group is not None:
            part = _run_group(model, group, batch, lengths, divisor)
            sums = _added(sums, _exactly(_take_gradients(parts)))
            loss += part if model.group.rank == group.ranks[0] else 0.0
    return loss, sums


def _run_group(
    model: SequenceParallel,
    mine: PlannedGroup,
    batch: Sequence[Tensor],
    lengths: Sequence[int],
    divisor: int,
    leave: Leave = as_it_is,
) -> Tensor:
    """Forward and, where anything is trained, backward of my group's documents; its part of the loss."""
    tokens, labels = (_documents(tensor, mine.documents, lengths) for tensor in batch)
    group = subgroup(model.group, mine.ranks)
    plain = model.options.cut([lengths[document] for document in mine.documents], group)
    cut = plain if group.size == 1 else replace(plain, transport=mine.transport)
    with model.swapping(cut) as cut:
        given = batch_of(Call(tokens, labels, cut.shard.lengths, divisor=divisor), {}, where(group))
        wanted = Wanted.of(given, cut, tokens.device)
        found = Pass(model.module, model.options.loss_tokens, model.loss, leave)(Given.of(given, cut), cut, wanted)
    loss = found.loss
    assert loss is not None
    if found.auxiliary is not None:
        raise ValueError(f"{where(group)}: run_plan has no losses of layers (add_loss): groups see some documents each")
    if loss.requires_grad:
        loss.backward()
    return loss.detach()


def subgroup(group: Group, ranks: Sequence[int]) -> Group:
    """The group of these ranks: ``group`` itself where they are all of its ranks, in order."""
    return group if tuple(ranks) == tuple(range(group.size)) else group.subgroup(ranks)


def _documents(tensor: Tensor, documents: Iterable[int], lengths: Sequence[int]) -> Tensor:
    """These documents of a packed ``[b, s]``, one after the other."""
    ends = list(accumulate(lengths))
    return torch.cat(
        [tensor[:, :0]] + [tensor[:, ends[document] - lengths[document] : ends[document]] for document in documents],
        dim=1,
    )


def _take_gradients(parts: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients, which the tensors no longer have."""
    taken = [part.grad for part in parts]
    for part in parts:
        part.grad = None
    return taken


def _added(sums: Sequence[Tensor | None], more: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [b if a is None else a if b is None else a.add_(b) for a, b in zip(sums, more)]


def _exactly(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """In fp32 (fp64): sums over micro-batches are rounded once, at the end."""
    return [None if g is None else g.to(torch.promote_types(g.dtype, torch.float32)) for g in gradients]


def _check_plan(model: SequenceParallel, plan: Plan, lengths: Sequence[int]) -> None:
    """Raise ``ValueError`` unless the plan places these documents, once each, on groups of these ranks."""
    who, group = where(model.group), model.group
    if tensor_parallel(model.module):
        raise ValueError(f"{who}: plans are for whole weights or those of FSDP2, and these are tensor-parallel")
    if is_distributed(model.module):
        check_whole_mesh(model.module, group)
    elif not model.options.sync_gradients:
        raise ValueError(f"{who}: run_plan sums the gradients itself: wrap the model without sync_gradients=False")
    if plan.devices != group.size:
        raise ValueError(f"{who}: the plan is for {plan.devices} ranks, the model is wrapped over {group.size}")
    if (plan.num_documents, plan.num_tokens) != (len(lengths), sum(lengths)):
        raise ValueError(
            f"{who}: the plan is for {plan.num_documents} documents of {plan.num_tokens} tokens together, the batch "
            f"has {len(lengths)} of {sum(lengths)}"
        )
    groups = [each for batch in plan.micro_batches for each in batch.groups]
    placed = sorted(document for each in groups for document in each.documents)
    if placed != list(range(len(lengths))):
        raise ValueError(f"{who}: the plan does not place each of {len(lengths)} documents once; was it checked?")
    for number, batch in enumerate(plan.micro_batches):
        ranks = [rank for each in batch.groups for rank in each.ranks]
        if len(set(ranks)) < len(ranks) or not set(ranks) <= set(range(group.size)):
            raise ValueError(f"{who}: micro-batch {number} of the plan has a rank twice, or one that does not exist")
        for each in batch.groups:
            if each.degree > 1 and each.transport not in TRANSPORTS:
                raise ValueError(
                    f"{who}: the plan's transport {each.transport!r} is not one of {', '.join(TRANSPORTS)}"
                )
