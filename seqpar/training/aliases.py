"""Which gradients are summed: those, and only those, that one cut forward pass gives a module's parameters.

The module runs on aliases of its trainable parameters, put into their places for the time of the call. All aliases come
from one autograd node, which in backward has its turn after all else in that forward pass, and sums what it got, once.
What reaches a parameter by another way (a regulariser, an uncut call, another wrapper) does not pass through the node
and is left alone; whatever accumulates gradients, steps on them or looks at them comes after it and sees sums. Nothing
is hooked on parameters, so nothing is left behind.

Reentrant checkpointing runs layers again inside backward, on what stands in the parameters' places then. So backward,
where it enters what the module returned, puts leaves there, and the node takes what these have gathered along.
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.collectives import Group
from seqpar.collectives.first_order import first_order
from seqpar.collectives.group import where
from seqpar.sharding.exchanged import backward_pass
from seqpar.training.gradients import sum_over_ranks
from seqpar.training.output import opened


@dataclass(frozen=True)
class Place:
    """Where a module keeps a parameter."""

    module: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor | None:
        """What is there."""
        return self.module._parameters[self.name]

    def put(self, tensor: Tensor | None) -> None:
        """Keep ``tensor`` there, parameter or not."""
        module: Any = self.module
        module._parameters[self.name] = tensor
        flat = module.__dict__.get("_flat_weights_names", ())  # torch's recurrent modules keep a second list
        if self.name in flat:
            module._flat_weights[flat.index(self.name)] = tensor


@dataclass(frozen=True)
class Trained:
    """One trainable parameter, by its first name, and all places where it is."""

    name: str
    tensor: Tensor
    places: list[Place]


def trained(module: nn.Module) -> list[Trained]:
    """The trainable parameters of a module, once each: by identity, wherever and however often they are there."""
    found: dict[int, Trained] = {}
    for prefix, owner in module.named_modules():
        for name, tensor in owner._parameters.items():
            if tensor is not None and tensor.requires_grad:
                first = Trained(f"{prefix}.{name}" if prefix else name, tensor, [])
                found.setdefault(id(tensor), first).places.append(Place(owner, name))
    return list(found.values())


@contextmanager
def standing_in(parameters: Sequence[Trained], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within, these tensors stand in all places of the parameters."""
    before = _exchange(parameters, tensors)
    try:
        yield
    finally:
        _put_back(before)


Before = list[tuple[Place, Tensor | None]]


def _exchange(parameters: Sequence[Trained], tensors: Sequence[Tensor]) -> Before:
    before = [(place, place.tensor) for each in parameters for place in each.places]
    for each, tensor in zip(parameters, tensors):
        for place in each.places:
            place.put(tensor)
    return before


def _put_back(before: Before) -> None:
    for place, tensor in before:
        place.put(tensor)


def leaves(parameters: Sequence[Trained]) -> list[Tensor]:
    """The parameters' numbers as tensors that gather gradients of their own."""
    return [each.tensor.detach().requires_grad_() for each in parameters]


class GradientSum:
    """Sums the gradients of one module's parameters over a group, once each, in fp32 (fp64), rounded once."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._known: frozenset[int] = frozenset()

    def of(self, group: Group, run: Callable[[], Any]) -> Any:
        """``run()``, which calls the module on the ranks of ``group``; its tensors' gradients will be summed.

        Raises ``ValueError`` if the module uses a parameter that it keeps where its ``named_parameters`` do not say.
        """
        parameters = trained(self._module) if group.size > 1 and torch.is_grad_enabled() else []
        if not parameters:
            return run()
        forward = _Forward(self._module, parameters, group)
        anchor, *aliases = _Aliases.apply(forward, *(each.tensor for each in parameters))
        with standing_in(parameters, aliases):
            outputs, rebuild = opened(run())
        leaving = [number for number, out in enumerate(outputs) if isinstance(out, Tensor) and out.requires_grad]
        if leaving:
            self._check_ways([outputs[number] for number in leaving], parameters, group)
            for number, out in zip(leaving, _Boundary.apply(forward, anchor, *(outputs[number] for number in leaving))):
                outputs[number] = out
        return rebuild(outputs)

    def _check_ways(self, outputs: Sequence[Tensor], parameters: Sequence[Trained], group: Group) -> None:
        """Once for each set of parameters: no output leads to one of them but by its alias."""
        wanted = {id(each.tensor): each.name for each in parameters}
        if self._known == wanted.keys():
            return
        for variable in _leaves_behind(outputs):
            if id(variable) in wanted:
                raise ValueError(
                    f"{where(group)}: the model uses {wanted[id(variable)]} by another way than its place in the "
                    "module (a closure, a list), so its gradient would not be summed: read it there in forward"
                )
        self._known = frozenset(wanted)


def _leaves_behind(outputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """The leaves that outputs lead to, aliases apart."""
    todo = [out.grad_fn for out in outputs]
    seen = set(todo)
    while todo:
        node: Any = todo.pop()
        if node is None or isinstance(node, _Aliases._backward_cls):
            continue
        if hasattr(node, "variable"):
            yield node.variable
        following = [each for each, _ in node.next_functions if each not in seen]
        seen.update(following)
        todo += following


class _Forward:
    """One forward pass on aliases."""

    def __init__(self, module: nn.Module, parameters: Sequence[Trained], group: Group) -> None:
        self.module, self.parameters, self.group = module, parameters, group
        self._gathering: weakref.ref[_Gathering] | None = None

    def begin_backward(self) -> None:
        """Leaves stand in the parameters' places until the aliases' turn, or until this backward pass ends anyhow."""
        gathering = _Gathering([*self.parameters, *self._unfrozen_since()])
        self._gathering = weakref.ref(gathering)
        # The engine holds it, calls it at the end, and lets go of it after an error, too.
        torch.autograd.Variable._execution_engine.queue_callback(gathering)

    def _unfrozen_since(self) -> list[Trained]:
        """What recomputation would train though the forward pass did not."""
        known = {(id(place.module), place.name) for each in self.parameters for place in each.places}
        now = trained(self.module)
        return [each for each in now if known.isdisjoint((id(place.module), place.name) for place in each.places)]

    def gathered(self) -> list[Tensor | None]:
        """What recomputation inside backward gave the parameters."""
        gathering = None if self._gathering is None else self._gathering()
        if gathering is None or gathering.task != backward_pass():
            return [None] * len(self.parameters)
        if not gathering.end():
            raise ValueError(
                f"{where(self.group)}: two cut forward passes of one module run backward into each other, so gradients "
                "of recomputed layers cannot be told apart: call backward for one after the other"
            )
        found = [leaf.grad for leaf in gathering.leaves]
        if any(each is not None for each in found[len(self.parameters) :]):
            raise ValueError(
                f"{where(self.group)}: a parameter of a layer that is computed again (reentrant checkpoint) was frozen "
                "in forward and is trainable in backward: unfreeze before forward"
            )
        return found[: len(self.parameters)]


class _Gathering:
    """Leaves in the places of parameters for a part of one backward pass."""

    def __init__(self, parameters: Sequence[Trained]) -> None:
        self._before: Before = []
        self.task = backward_pass()
        self.leaves = leaves(parameters)
        self._mine = {id(leaf) for leaf in self.leaves}
        self._before = _exchange(parameters, self.leaves)

    def end(self) -> bool:
        """Put back what was there; False if another put something there since."""
        before, self._before = self._before, []
        alone = [id(place.tensor) in self._mine for place, _ in before]
        _put_back([each for each, mine in zip(before, alone) if mine])
        return all(alone)

    def __call__(self) -> None:
        self.end()

    def __del__(self) -> None:
        self.end()


@first_order("sequence_parallel")
class _Aliases(torch.autograd.Function):
    """The parameters themselves; in backward, their gradients summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, forward: _Forward, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.forward_pass = forward
        ctx.set_materialize_grads(False)
        return parameters[0].new_empty(0), *(parameter.detach() for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        forward: _Forward = ctx.forward_pass
        alone = _held_here_only(grads)
        again = forward.gathered()
        parts = [_added(*each) for each in zip(grads[1:], again)]
        overwrite = [more is not None or mine for more, mine in zip(again, alone)]
        tensors = [each.tensor for each in forward.parameters]
        names = [each.name for each in forward.parameters]
        mine = [_mine(*each) for each in zip(parts, tensors)]
        sums = sum_over_ranks(mine, [held(each) for each in tensors], forward.group, names, overwrite)
        whole = (None if each is None else _like(each, tensor) for each, tensor in zip(sums, tensors))
        return None, *(_for_hooks(each, tensor) for each, tensor in zip(whole, tensors))


def held(tensor: Any) -> Tensor:
    """My part of what tensor parallelism splits; the rest as it is."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _mine(gradient: Any, parameter: Any) -> Tensor | None:
    """My part of a gradient, split as its parameter is."""
    if hasattr(gradient, "placements") and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return None if gradient is None else held(gradient)


def _like(local: Tensor, parameter: Any) -> Tensor:
    """A gradient of my part as that of the parameter."""
    if not hasattr(parameter, "placements"):
        return local
    where = (parameter.device_mesh, parameter.placements)
    whole: Tensor = type(parameter.detach()).from_local(
        local, *where, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return whole


def _for_hooks(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Torch calls hooks with None for a parameter that this pass did not reach, where one device would call none: they
    get zeros, and where there was no gradient none is left behind, which an optimizer would step by."""
    if gradient is not None or not parameter._backward_hooks:
        return gradient
    if parameter.grad is None:
        torch.autograd.Variable._execution_engine.queue_callback(partial(_forget_zeros, parameter))
    return torch.zeros_like(parameter)


def _forget_zeros(parameter: Tensor) -> None:
    if parameter.grad is not None and not parameter.grad.any():
        parameter.grad = None


def _held_here_only(grads: Sequence[Tensor | None]) -> list[bool]:
    """Which of the gradients behind the first, the anchor's, nobody else holds, so that sums may be written over them.

    The anchor's is nobody else's, so what a gradient of its own has holders tells. Without an anchor, none is.
    """
    anchor, *others = [_holders(each) for each in grads]
    of_view = _holders(torch.zeros(1)[:]) if anchor else ()  # a view of what nobody else holds
    alone = [anchor[:2] + of_view[2:], anchor] if anchor else []
    return [found in alone for found in others]


def _holders(gradient: Tensor | None) -> tuple[int, ...]:
    """How many hold a gradient, in Python and in C++, its storage, and what it is a view of."""
    if gradient is None or gradient.layout != torch.strided or not hasattr(gradient, "_use_count"):
        return ()
    storage = torch._C._storage_Use_Count(gradient.untyped_storage()._cdata)
    found = sys.getrefcount(gradient), gradient._use_count(), storage
    base: Any = gradient._base
    return found if base is None else (*found, sys.getrefcount(base), base._use_count())


def _added(gradient: Tensor | None, again: Tensor | None) -> Tensor | None:
    """Their sum, in place of the second."""
    if again is None or gradient is None:
        return gradient if again is None else again
    return again.add_(gradient)


class _Boundary(torch.autograd.Function):
    """What leaves the module. Backward begins here and leads to the aliases, even where nothing else does."""

    @staticmethod
    def forward(ctx: Any, forward: _Forward, anchor: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.forward_pass, ctx.like = forward, anchor
        ctx.set_materialize_grads(False)
        return tuple(out.detach() for out in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.forward_pass.begin_backward()
        return None, torch.zeros_like(ctx.like), *grads
