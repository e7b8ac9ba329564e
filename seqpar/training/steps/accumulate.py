"""Several sequences to a step, on several replicas: every token counts the same, wherever it stands."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.collectives import Group
from seqpar.training.documents import Batch, Step

Compute = Callable[[], AbstractContextManager[Any]]


def total(number: float | Tensor, replicas: Group, device: torch.device | str = "cpu") -> Tensor:
    """The sum of a number over replicas, in fp64: the same on each. ``replicas``: the ranks that stand where I do in
    the other sequences, so that what the ranks of one sequence share is counted once."""
    mine = torch.as_tensor(number, dtype=torch.float64, device=device).detach().reshape(1)
    return replicas.all_reduce(mine).wait()[0]


def accumulate(model: nn.Module, batches: Sequence[Batch], divisor: float, compute: Compute = nullcontext) -> Tensor:
    """Forward and backward of each batch; the sum of their losses over all targets, of this replica, in fp64.

    Law: with ``divisor`` the number of targets of the whole step, gradients over all batches and replicas add up to
    those of one batch that holds all of them. Where DDP or FSDP2 averages over replicas, that is their number times too
    little: pass ``divisor / replicas``. They communicate in the backward pass of the last batch alone.

    ``model``: from :func:`seqpar.sequence_parallel`, or DDP around it; ``batches``: as many on every replica.
    ``compute``: makes a context for each forward, such as ``torch.autocast``.
    """
    device = next(each.device for each in model.parameters())
    losses = torch.zeros((), dtype=torch.float64, device=device)
    for number, batch in enumerate(batches, start=1):
        with _communicating(model, number == len(batches)):
            with compute():
                output = _called(model, batch, device, divisor)
            output.loss.backward()
        losses += output.loss_sum.detach()
    return losses


@torch.no_grad()
def evaluate(
    model: nn.Module, steps: Iterable[Step], replicas: Group, most: int | None = None, compute: Compute = nullcontext
) -> tuple[float, int]:
    """The mean loss over all targets of (at most ``most``) steps, and how many targets there are; each counts once.

    The same on every rank. Each replica brings its own sequences of the same steps; the model is in evaluation mode
    meanwhile.
    """
    device, training = next(each.device for each in model.parameters()), model.training
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    try:
        for batch in (batch for step in islice(steps, most) for batch in step.batches):
            with compute():
                loss = _called(model, batch, device, 1.0).loss_sum
            sums += torch.stack([loss.double(), torch.tensor(float(batch.num_targets), device=device).double()])
    finally:
        model.train(training)
    losses, targets = replicas.all_reduce(sums).wait().tolist()
    return losses / max(targets, 1.0), int(targets)


def _called(model: nn.Module, batch: Batch, device: torch.device, divisor: float) -> Any:
    tokens, labels = (each.to(device, non_blocking=True) for each in (batch.tokens, batch.labels))
    return model(tokens, labels=labels, lengths=list(batch.lengths), divisor=divisor)


@contextmanager
def _communicating(model: nn.Module, now: bool) -> Iterator[None]:
    """Whether DDP and FSDP2 reduce gradients in the backward passes inside."""
    sharded: Any = next((part for part in model.modules() if hasattr(part, "set_requires_gradient_sync")), None)
    with ExitStack() as stack:
        if sharded is not None:
            sharded.set_requires_gradient_sync(now)
        elif not now and hasattr(model, "no_sync"):
            without: Any = model.no_sync
            stack.enter_context(without())
        yield
