"""Tensors that are the same on every rank, and their gradients, which are parts of a sum or whole."""

from typing import Any, Protocol

import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.first_order import first_order, once
from seqpar.collectives.group import where


@first_order("sequence_parallel(sync_gradients=False), scale_gradient")
class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: int) -> Tensor:
    """``x`` itself, with ``factor`` times its gradient."""
    result: Tensor = _ScaleGradient.apply(x, factor)
    return result


@first_order("whole_gradient")
class _WholeGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        part = grads[0]
        real = torch.view_as_real(part) if part.is_complex() else part
        whole = ctx.group.all_reduce(real.contiguous()).wait()
        return torch.view_as_complex(whole) if part.is_complex() else whole, None


def whole_gradient(x: Tensor, group: Group) -> Tensor:
    """``x``, the same on every rank, whose gradients on the ranks are parts of a sum: before it, each has the sum."""
    result: Tensor = x if group.size == 1 else _WholeGradient.apply(x, group)
    return result


class Shared(Protocol):
    """What ranks share a sequence by: a :class:`seqpar.Cut`, a :class:`seqpar.Shard`."""

    @property
    def group(self) -> Group: ...


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks. Every rank computes the same from it, so a part's gradient is the sum's, not ``n`` times."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group, name: str) -> Tensor:
        ctx.name = name
        return group.all_reduce(part.contiguous()).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return once(ctx.name, grads[0]), None, None


def summed(part: Tensor, group: Group, name: str) -> Tensor:
    """The sum over ranks of what ``name`` computes."""
    total: Tensor = _SumOverRanks.apply(part, group, name)
    return total


def sum_over_ranks(part: Tensor, cut: Shared) -> Tensor:
    """What ranks have of a sum over tokens, added up: the same number on every rank.

    Law: a loss of such sums, computed alike on every rank, is that of one device, and so are its gradients. A mean over
    the batch is a sum over my tokens, summed over ranks, and divided by the number of all tokens: a mean over mine has
    the wrong divisor wherever ranks hold different numbers of tokens.

    ``part``: floating point, of any shape, the same on every rank; ``cut``: a :class:`seqpar.Cut` in a layer,
    ``output.shard`` beside a model. Its gradient is the gradient of the sum: what follows is counted once. One message,
    none at size 1. Raises ``ValueError`` for other dtypes.
    """
    if not isinstance(part, Tensor) or not (part.is_floating_point() or part.is_complex()):
        kind = part.dtype if isinstance(part, Tensor) else type(part).__name__
        raise ValueError(f"{where(cut.group)}: sum_over_ranks takes a floating-point tensor, got {kind}")
    if cut.group.size == 1:
        return part
    if part.is_complex():
        return torch.view_as_complex(sum_over_ranks(torch.view_as_real(part), cut))
    return summed(part, cut.group, "sum_over_ranks")
