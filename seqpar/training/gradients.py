"""Summing parameter gradients over the ranks that share a sequence.

Every rank holds all parameters and some of the tokens, so its gradients are parts of a sum. The model runs on aliases
of its parameters, all made by one autograd node; in backward that node, last of all, sums all gradients in a few large
messages, in the order of the parameters. Whatever accumulates a gradient (micro-batches, an outer
DistributedDataParallel, ``torch.autograd.grad``) comes after it and sees the whole.

A gradient that reaches a parameter by another way (reentrant checkpointing runs on the parameters themselves) is summed
by a hook on the parameter.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.collectives import Group, GroupError, alone
from seqpar.collectives.group import where
from seqpar.sharding.exchanged import backward_pass

BUCKET = 1 << 24  # numbers in one message


class GradientSum:
    """Sums the gradients of one module's parameters over a group, once each, in fp32 (fp64), rounded once."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._group = alone()
        self._summed: dict[tuple[int, int], Tensor] = {}  # by backward pass and parameter: what is whole already

    def parameters(self, group: Group) -> dict[str, Tensor]:
        """Aliases of the trainable parameters, by name, to run the module with on the ranks of ``group``."""
        named = [(name, parameter) for name, parameter in self._module.named_parameters() if parameter.requires_grad]
        if group.size == 1 or not named or not torch.is_grad_enabled():
            return {}
        self._group = group
        if backward_pass() is None:
            self._summed.clear()
        for number, (_, parameter) in enumerate(named):
            if not any(isinstance(hook, _Otherwise) for hook in (parameter._backward_hooks or {}).values()):
                parameter.register_hook(_Otherwise(self, number))
        aliases = _Aliases.apply(self, *(parameter for _, parameter in named))
        return dict(zip((name for name, _ in named), aliases))

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Within, gradients that reach parameters stay what this rank's tokens gave, for the caller to sum."""
        group, self._group = self._group, alone()
        try:
            yield
        finally:
            self._group = group

    def together(self, gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """Each gradient summed over the ranks; None where no rank has one."""
        summed = sum_over_ranks(gradients, like, self._group)
        for number, whole in enumerate(summed):
            if whole is not None:
                key = (backward_pass() or 0, number)
                self._summed[key] = self._summed[key] + whole if key in self._summed else whole
        return summed

    def otherwise(self, number: int, gradient: Tensor | None) -> Tensor | None:
        """The gradient of one parameter as its hook returns it: None leaves what is whole already as it is."""
        if gradient is None or self._group.size == 1:
            return None
        whole = self._summed.pop((backward_pass() or 0, number), None)
        if whole is not None:
            if whole is not gradient and not torch.allclose(whole, gradient, rtol=0, atol=0, equal_nan=True):
                raise GroupError(
                    f"{where(self._group)}: parameter {number} gets gradients from the model and from elsewhere in one "
                    "backward pass: use it through the wrapped model only, or sync_gradients=False"
                )
            return None
        dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        # The parameter's number travels along: ranks that sum different parameters together must not go unnoticed.
        message = torch.cat([gradient.flatten().to(dtype), gradient.new_tensor([number], dtype=dtype)])
        total = self._group.all_reduce(message).wait()
        if total[-1].item() != number * self._group.size:
            raise GroupError(f"{where(self._group)}: ranks summed different parameters; did their graphs differ?")
        return total[:-1].view(gradient.shape).to(gradient.dtype)


def sum_over_ranks(gradients: Sequence[Tensor | None], like: Sequence[Tensor], group: Group) -> list[Tensor | None]:
    """Each gradient summed over the ranks in fp32 (fp64), with the dtype of ``like``; None where no rank has one."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in like) else torch.float32
    used = torch.tensor([float(g is not None) for g in gradients], dtype=dtype, device=like[0].device)
    parts = [
        torch.zeros(tensor.numel(), dtype=dtype, device=tensor.device) if g is None else g.flatten().to(dtype)
        for g, tensor in zip(gradients, like)
    ]
    pending = [group.all_reduce(torch.cat(bucket)) for bucket in _buckets([used, *parts])]
    counts, *totals = torch.cat([arriving.wait() for arriving in pending]).split(
        [len(used), *(tensor.numel() for tensor in like)]
    )
    return [
        total.view(tensor.shape).to(tensor.dtype) if count else None
        for tensor, total, count in zip(like, totals, counts.tolist())
    ]


class _Otherwise:
    """The hook of a parameter."""

    def __init__(self, gradient_sum: GradientSum, number: int) -> None:
        self._gradient_sum = gradient_sum
        self._number = number

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        return self._gradient_sum.otherwise(self._number, gradient)


class _Aliases(torch.autograd.Function):
    """The parameters themselves; in backward, their gradients summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, gradient_sum: GradientSum, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.gradient_sum, ctx.parameters = gradient_sum, parameters
        ctx.set_materialize_grads(False)
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradient_sum.together(grads, ctx.parameters)


def _buckets(parts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of parts of at most ``BUCKET`` numbers together (or one part that is larger)."""
    bucket: list[Tensor] = []
    for part in parts:
        if bucket and sum(len(other) for other in bucket) + len(part) > BUCKET:
            yield bucket
            bucket = []
        bucket.append(part)
    yield bucket
