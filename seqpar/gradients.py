"""Summing parameter gradients over the ranks that share a sequence.

Every rank holds all parameters and some of the tokens, so its gradients are parts of a sum. A hook on each parameter
adds the parts up before anything accumulates them: accumulation over micro-batches, an outer DistributedDataParallel
and ``torch.autograd.grad`` all see the whole gradient.
"""

import torch
from torch import Tensor, nn

from collectives import Group, GroupError
from collectives.group import where


class SumOverRanks:
    """The hook of one parameter: its gradient, summed in fp32 (fp64) over the group and rounded once.

    The parameter's number travels along: if ranks ever summed different parameters together, this would say so.
    """

    def __init__(self, group: Group, number: int) -> None:
        self.group = group
        self.number = number

    def __call__(self, gradient: Tensor) -> Tensor:
        dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        message = torch.cat([gradient.flatten().to(dtype), gradient.new_tensor([self.number], dtype=dtype)])
        total = self.group.all_reduce(message).wait()
        if not gradient.is_cuda and total[-1].item() != self.number * self.group.size:
            raise GroupError(f"{where(self.group)}: ranks summed different parameters; did their graphs differ?")
        return total[:-1].view(gradient.shape).to(gradient.dtype)


def sum_gradients(module: nn.Module, group: Group) -> None:
    """Hook every trainable parameter that has no hook yet (a copied module has none)."""
    if group.size == 1:
        return
    for number, parameter in enumerate(module.parameters()):
        hooks = (parameter._backward_hooks or {}).values()
        if parameter.requires_grad and not any(isinstance(hook, SumOverRanks) for hook in hooks):
            parameter.register_hook(SumOverRanks(group, number))


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None  # type: ignore[attr-defined]


def scale_gradient(x: Tensor, factor: int) -> Tensor:
    """``x`` itself, with ``factor`` times its gradient."""
    result: Tensor = _ScaleGradient.apply(x, factor)
    return result
