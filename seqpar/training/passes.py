"""One forward pass of a model over my tokens, and its loss: what all ways of training have in common."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.collectives import Group
from seqpar.collectives.group import where
from seqpar.crossing.replicated import summed
from seqpar.sharding.cut import Cut
from seqpar.training.alike import is_distributed
from seqpar.training.inputs import Batch
from seqpar.training.output import opened
from seqpar.training.tiled import tiled
from seqpar.training.vocabulary import HEADS, NOTHING

Loss = Callable[[Any, Tensor, Tensor], Tensor]  # outputs, targets, weights of my tokens -> a sum over them
_SAME = 1e-6  # how far terms of a loss may be apart, relatively: they are made of the same sums
Leave = Callable[[Callable[[], Any]], Any]  # runs a module; what it returns leaves the module changed in some way


def as_it_is(run: Callable[[], Any]) -> Any:
    """What a module returns."""
    return run()


@dataclass(frozen=True)
class Wanted:
    """What the loss is made of: my targets ``[b, t, ...]`` and weights ``[b, t]`` (or whether there is a target),
    and what the sum is divided by."""

    targets: Tensor
    weights: Tensor
    num_targets: Tensor
    divisor: Tensor | float

    @staticmethod
    def of(batch: Batch, cut: Cut, device: torch.device) -> "Wanted | None":
        """None without targets. The divisor is that of the batch, or the number of all targets, at least 1."""
        targets = batch.all_targets()
        if targets is None:
            return None
        valid, weights = _valid(targets), batch.all_weights()
        counted = valid if weights is None else torch.where(valid, weights, 0)
        num = counted.sum().to(device)
        divisor = torch.where(num > 0, num, 1) if batch.divisor is None else batch.divisor
        mine = cut.shard.take(targets).to(device), cut.shard.take(counted).to(device)
        return Wanted(*mine, num, divisor)

    @property
    def weighted(self) -> bool:
        """Whether weights are more than whether there is a target."""
        return self.weights.dtype != torch.bool

    def weights_for(self, outputs: Any) -> Tensor:
        """As numbers that keep the precision of outputs, fp32 or more."""
        found = (each.dtype for each in opened(outputs)[0] if isinstance(each, Tensor) and each.is_floating_point())
        dtype = torch.promote_types(next(found, torch.float32), torch.float32)
        return self.weights if self.weighted else self.weights.to(dtype)


def _valid(targets: Tensor) -> Tensor:
    """``[b, s]``: where there is something to predict; everywhere, if targets are no classes."""
    if targets.dtype == torch.bool or targets.is_floating_point():
        return torch.ones(targets.shape[:2], dtype=torch.bool, device=targets.device)
    found = targets != NOTHING
    return found if found.dim() == 2 else found.flatten(2).any(-1)


@dataclass(frozen=True)
class Given:
    """What the module is called with: my tokens and the cut by place, the rest by name."""

    args: tuple[Any, ...]
    named: Mapping[str, Any]

    @staticmethod
    def of(batch: Batch, cut: Cut) -> "Given":
        """Without tokens the cut goes by its name, too."""
        tokens, named = batch.mine(cut)
        return Given((*tokens, cut), named) if tokens else Given((), {"cut": cut, **named})


@dataclass(frozen=True)
class Found:
    """What a pass gave: outputs of my tokens, and everyone's loss, the same on every rank."""

    outputs: Any
    loss: Tensor | None = None
    loss_sum: Tensor | None = None
    auxiliary: Tensor | None = None


@dataclass(frozen=True)
class Pass:
    """One forward pass of ``module``, whose loss is ``loss`` (cross-entropy, if None), ``loss_tokens`` at a time.

    ``leave`` runs what uses the model's parameters, and says what becomes of its outputs. The loss is made of these.
    """

    module: nn.Module
    loss_tokens: int = 0
    loss: Loss | None = None
    leave: Leave = as_it_is

    def __call__(self, given: Given, cut: Cut, wanted: Wanted | None) -> Found:
        """Outputs for my tokens and, if one is wanted, the loss of everyone's."""
        if wanted is None or not self.loss_tokens:
            outputs, terms = self.leave(lambda: (self.module(*given.args, **given.named), _terms(cut)))
            part = None if wanted is None else self._part(outputs, wanted, cut)
        else:
            part, terms = self.leave(lambda: (self._tiled(given, wanted, cut), _terms(cut)))
            outputs = None
        auxiliary = _checked_terms(terms, cut)
        if part is None or wanted is None:
            return Found(outputs, auxiliary=auxiliary)
        total = summed(part, cut.group, "next_token_loss" if self.loss is None else "sequence_parallel(loss=)")
        loss = total / wanted.divisor
        return Found(outputs, loss if auxiliary is None else loss + auxiliary, total, auxiliary)

    def _part(self, outputs: Any, wanted: Wanted, cut: Cut) -> Tensor:
        """The sum over my tokens."""
        if self.loss is None:
            return cross_entropy(
                _logits(outputs, wanted, cut), wanted.targets, wanted.weights if wanted.weighted else None
            )
        return _one_number(self.loss(outputs, wanted.targets, wanted.weights_for(outputs)), cut.group)

    def _tiled(self, given: Given, wanted: Wanted, cut: Cut) -> Tensor:
        """The same without ever holding the logits of more than ``loss_tokens`` tokens."""
        model: Any = self.module
        if hasattr(model, "hidden") and not is_distributed(model):
            return self._in_tiles(model.head, model.hidden(*given.args, **given.named), wanted, cut)
        with _loss_in_head(model, lambda head, x: self._in_tiles(head, x, wanted, cut)) as made:
            left = model(*given.args, **given.named)
        if len(made) != 1 or left is not made[0]:
            raise ValueError(
                f"{where(cut.group)}: loss_tokens needs a model whose forward returns what its head gives, as it is (a "
                "scale or cap of logits belongs into the head; output_dtype of FSDP2 must be None)"
            )
        return made[0]

    def _in_tiles(self, head: Callable[[Tensor], Tensor], x: Tensor, wanted: Wanted, cut: Cut) -> Tensor:
        def part(x: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            mine = Wanted(targets, weights, wanted.num_targets, wanted.divisor)
            return self._part(head(x), mine, cut)

        tiles = tiled(part, x, wanted.targets, wanted.weights, tokens=self.loss_tokens)
        return torch.stack(tiles).sum()


@contextmanager
def _loss_in_head(model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Within, the model's head gives the loss: so all of the model runs as it is called, as FSDP2 needs it."""
    name = head_of(model)
    assert name is not None
    head, made = model.get_submodule(name), list[Tensor]()

    class _LossHead(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            made.append(loss(head, x))
            return made[-1]

    model._modules[name] = _LossHead()
    try:
        yield made
    finally:
        model._modules[name] = head


def head_of(model: nn.Module) -> str | None:
    """What the model's head is called, by one of the usual names."""
    return next((name for name in HEADS if isinstance(model._modules.get(name), nn.Module)), None)


def _logits(outputs: Any, wanted: Wanted, cut: Cut) -> Tensor:
    """Those among the outputs, if they are logits of my tokens."""
    found = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
    found = found if isinstance(found, Tensor) else getattr(found, "logits", None)
    expected = list(wanted.targets.shape)
    if not isinstance(found, Tensor) or list(found.shape[:-1]) != expected or len(expected) != 2:
        given = list(found.shape) if isinstance(found, Tensor) else type(outputs).__name__
        raise ValueError(
            f"{where(cut.group)}: logits must be [batch, {cut.shard.num_local}, vocabulary], got {given}: a model that "
            "returns something else needs sequence_parallel(loss=...)"
        )
    return found


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Of classes, summed over tokens (times ``weights``), in fp32 (fp64 for fp64 logits)."""
    exact = logits.flatten(0, 1) if logits.dtype == torch.float64 else logits.flatten(0, 1).float()
    if weights is None:
        return functional.cross_entropy(exact, targets.flatten(), ignore_index=NOTHING, reduction="sum")
    each = functional.cross_entropy(exact, targets.flatten(), ignore_index=NOTHING, reduction="none")
    return (each * weights.flatten()).sum()


def _one_number(part: Any, group: Group) -> Tensor:
    if not isinstance(part, Tensor) or part.dim() or not part.is_floating_point():
        given = f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
        raise ValueError(f"{where(group)}: loss(outputs, targets, weights) must return a sum, one number, got {given}")
    return part


def _terms(cut: Cut) -> list[Tensor]:
    return [term for _, term in cut.added.terms]


def _checked_terms(terms: list[Tensor], cut: Cut) -> Tensor | None:
    """The sum of what layers added; raises ``ValueError`` unless ranks have the same numbers."""
    if cut.group.size > 1 and (terms or cut.added.terms):
        _check_terms(terms, cut)
    return torch.stack([term.to(terms[0]) for term in terms]).sum() if terms else None


def _check_terms(terms: list[Tensor], cut: Cut) -> None:
    mine = torch.stack([term.detach().double() for term in terms])
    table = torch.stack(cut.group.all_gather(mine).wait())
    apart = (table - table[0]).abs() > _SAME * table[0].abs()
    odd = apart.any(0).nonzero().flatten().tolist()
    if odd:
        name, column = cut.added.terms[odd[0]][0], table[:, odd[0]].tolist()
        raise ValueError(
            f"{where(cut.group)}: add_loss({name!r}) got other numbers on other ranks, {column[0]:.6g} on rank 0 and "
            f"{next(x for x in column if x != column[0]):.6g} elsewhere: make it of sums over all tokens, with "
            "seqpar.sum_over_ranks(part, cut), not of means over mine"
        )
