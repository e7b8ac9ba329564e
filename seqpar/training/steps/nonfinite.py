"""Where a number that is none came from: which rank, which layer, in which direction.

The loss and the norm of the gradients are sums over all ranks, so all see in the same step that one of them is not
finite, and good steps pay nothing. Where it began is found by running the step once more, with a look at every layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from seqpar.collectives import Group

_FAR = 1 << 40


class NonFinite(ArithmeticError):  # noqa: N818 - says what happened
    """A loss or a gradient is not finite: the same on every rank."""


def first_nonfinite(model: nn.Module, run: Callable[[], object], group: Group) -> str:
    """Which layer, on which rank, has the first number that is not finite while ``run()`` computes a step again.

    Weights come first, then what layers are given and what they put out in the order in which forward reaches them,
    then, where all of these are finite, the gradients that they get and pass on in the order of backward, then those of
    weights. ``run``: forward and backward, on every rank of ``group`` alike; the gradients that it leaves are to be
    thrown away. The same words on every rank. One small message.
    """
    device = next(each.device for each in model.parameters())
    watch = _Watch(model)
    try:
        run()
        watch.look_at_gradients()
    finally:
        watch.remove()
    found = torch.tensor([watch.at, watch.layer, watch.kind], device=device)
    table = torch.stack(group.all_gather(found).wait()).tolist()
    at, rank = min((row[0], rank) for rank, row in enumerate(table))
    if at == _FAR:
        return "nothing that is not finite was found when the step was computed again"
    _, layer, kind = table[rank]
    return f"rank {rank} of {group.size}, layer {watch.names[layer] or 'the model'}: {_KINDS[kind]}"


_KINDS = (
    "a weight is not finite",
    "what it is given is not finite",
    "its output is not finite",
    "the gradient that it gets is not finite",
    "the gradient that it passes on is not finite",
    "the gradient of a weight is not finite",
)
_WEIGHT, _INPUT, _OUTPUT, _GOT, _PASSED, _GRADIENT = range(len(_KINDS))


class _Watch:
    """The first event of mine: when (``at``), in which layer, of which kind. Gradients come after all outputs."""

    def __init__(self, model: nn.Module) -> None:
        self.parts = list(model.named_modules())
        self.names = [name for name, _ in self.parts]
        self.at, self.layer, self.kind = _FAR, 0, _WEIGHT
        self._events = 0
        self._hooks: list[Any] = []
        for number, (_, part) in enumerate(self.parts):
            if not all(_finite(each) for each in part.parameters(recurse=False)):
                self._seen(0, number, _WEIGHT)
            self._hooks.append(part.register_forward_hook(self._look(number)))

    def look_at_gradients(self) -> None:
        for number, (_, part) in enumerate(self.parts):
            if not all(_finite(each.grad) for each in part.parameters(recurse=False)):
                self._seen(_FAR - 1, number, _GRADIENT)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, number: int) -> Callable[..., None]:
        def look(part: nn.Module, inputs: Any, output: Any) -> None:
            for value, forward, backward in ((inputs, _INPUT, _PASSED), (output, _OUTPUT, _GOT)):
                self._events += 1
                for each in tree_leaves(value):
                    if not _finite(each):
                        self._seen(self._events, number, forward)
                    if isinstance(each, Tensor) and each.requires_grad:
                        each.register_hook(self._look_back(number, backward))

        return look

    def _look_back(self, number: int, kind: int) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            self._events += 1
            if not _finite(gradient):
                self._seen(_FAR // 2 + self._events, number, kind)

        return look

    def _seen(self, at: int, number: int, kind: int) -> None:
        if at < self.at:
            self.at, self.layer, self.kind = at, number, kind


def _finite(value: Any) -> bool:
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return True
    local: Any = value.to_local() if hasattr(value, "to_local") else value
    return bool(local.isfinite().all())
