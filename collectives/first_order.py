"""Functions that can be differentiated once: a second derivative raises, so that no term of a loss is lost.

Backward of a function that crosses cuts sends messages and works on what it saved, outside of autograd. What it returns
has no graph, so a penalty on a gradient would add nothing to a loss, without a word.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=type[torch.autograd.Function])


def first_order(name: str) -> Callable[[F], F]:
    """Decorate an autograd Function that has no second derivatives; ``name`` is what users call it.

    Law: first derivatives are those without it, with ``create_graph=True`` too. Whatever leads through such a gradient
    to an input of the function raises ``ValueError`` with the name, on the rank that asks; so does ``torch.func``.
    """

    def decorate(function: F) -> F:
        plain, backward = function.apply, function.backward

        def apply(cls: Any, *inputs: Any) -> Any:
            if torch._C._are_functorch_transforms_active():
                raise ValueError(f"{name}: transforms of torch.func are not supported; use torch.autograd")
            outputs = plain(*inputs)
            node: Any = next((out.grad_fn for out in _tensors(outputs) if out.grad_fn is not None), None)
            if node is not None:
                node.metadata[_INPUTS] = _Edges.apply(*(x for x in inputs if isinstance(x, Tensor) and x.requires_grad))
            return outputs

        def guarded_backward(ctx: Any, *grads: Any) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                found = backward(ctx, *grads)
            leading = [ctx.metadata[_INPUTS], *(grad for grad in _tensors(grads) if grad.requires_grad)]
            guarded = iter(_Once.apply(name, *_tensors(found), *leading))
            results = [next(guarded) if isinstance(each, Tensor) else each for each in _listed(found)]
            return results[0] if isinstance(found, Tensor) else tuple(results)

        decorated: Any = function
        decorated.apply, decorated.backward = classmethod(apply), staticmethod(guarded_backward)
        return function

    return decorate


_INPUTS = "inputs of a first-order function"


def _listed(found: Any) -> Sequence[Any]:
    return found if isinstance(found, (tuple, list)) else (found,)


def _tensors(found: Any) -> list[Tensor]:
    return [each for each in _listed(found) if isinstance(each, Tensor)]


class _Edges(torch.autograd.Function):
    """Nothing, that leads to all inputs without holding what they hold."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.count = len(inputs)
        return inputs[0].new_empty(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * ctx.count


def once(name: str, gradient: Tensor) -> Tensor:
    """A gradient that backward gives on; if it has a graph, differentiating it raises as for :func:`first_order`."""
    if not gradient.requires_grad:
        return gradient
    (guarded,) = _Once.apply(name, gradient)
    result: Tensor = guarded
    return result


class _Once(torch.autograd.Function):
    """Gradients as they are, which cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(each.detach() for each in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise ValueError(
            f"{ctx.name}: its gradients cannot be differentiated again (a gradient penalty, a Hessian product, any "
            "second derivative): backward crosses the cuts outside of autograd; take it on one device"
        )
