"""Tensors that are the same on every rank, and their gradients, which are parts of a sum or whole."""

from typing import Any

import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.first_order import first_order


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
