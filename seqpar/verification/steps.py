"""A user's own step, run whole and cut, under whatever wraps the model: what is compared, and what differs first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.collectives import Group, alone
from seqpar.collectives.group import where
from seqpar.training.classes import wrapper_of
from seqpar.training.wrap import SequenceParallel
from seqpar.verification.cause import AFTER, BEFORE, EVERYWHERE, RUNS
from seqpar.verification.comparison import Finding, difference, of_gradients, together
from seqpar.verification.modules import Calls, compared, recording
from seqpar.verification.report import Modules, Row

Make = Callable[[Group], nn.Module]
Step = Callable[[Any, Any], Any]
Numbers = dict[str, Tensor]


@dataclass(frozen=True)
class Stepped:
    """What one step left: the loss, gradients, weights before and after, and what modules computed on the way."""

    loss: Tensor
    gradients: Numbers
    before: Numbers
    after: Numbers
    calls: Calls


def run_step(make: Make, step: Step, batch: Any, group: Group, seed: int, drawing: int) -> Stepped:
    """One step of a model made for ``group``; its backward pass is run if the step has not done so.

    ``seed``: what the model is made with; ``drawing``: what the step draws with.
    """
    torch.manual_seed(seed)
    model = make(group)
    torch.manual_seed(drawing)
    inner = innermost(model)
    before = _whole_numbers(dict(inner.named_parameters()))
    with recording(inner) as calls:
        loss = step(model, batch)
        if not isinstance(loss, Tensor) or loss.dim():
            raise ValueError(f"{where(group)}: step(model, batch) must return its loss, a tensor of one number")
        if loss.requires_grad and all(each.grad is None for each in inner.parameters()):
            loss.backward()
    trained = {name: each.grad for name, each in inner.named_parameters() if each.requires_grad}
    gradients = {n: torch.zeros_like(before[n]) if g is None else _whole_number(g) for n, g in trained.items()}
    return Stepped(loss.detach(), gradients, before, _whole_numbers(dict(inner.named_parameters())), calls)


def compare_steps(
    make: Make, step: Step, batch: Any, group: Group, tolerance: float | None, seed: int = 0
) -> tuple[tuple[Row, ...], Modules | None, torch.dtype]:
    """The rows and, where one failed, the first module that differs; the same on every rank."""
    whole, again = (run_step(make, step, batch, alone(), seed, drawing) for drawing in (1, 2))
    cut = run_step(make, step, batch, group, seed, 1)
    dtype = min((each.dtype for each in whole.before.values()), key=lambda each: torch.finfo(each).bits)
    allowed = _ALLOWED[dtype] if tolerance is None else tolerance
    device = whole.loss.device
    changes = [difference(again.gradients[name], each) for name, each in whole.gradients.items()]
    random = max(difference(again.loss, whole.loss), *changes)
    ratio = float(cut.loss.double() / whole.loss.double())
    times = "{:.6g} times that of one device".format
    findings = [
        Finding(RUNS, "random numbers that no cut can repeat", random, allowed),
        _of_weights(BEFORE, cut.before, whole.before, allowed),
        Finding("loss", "S4, S6, S10", difference(cut.loss, whole.loss), allowed, ratio, times),
        _same_loss(cut, group, allowed),
        _same_gradients(cut, group, allowed),
        *of_gradients(whole.gradients, cut.gradients, allowed),
        _of_weights(AFTER, cut.after, whole.after, allowed),
    ]
    rows = together(findings, group, device)
    if all(row.ok for row in rows):
        return rows, None, dtype
    same = rows[0].ok
    return rows, compared(whole.calls, (cut if same else again).calls, group, device, allowed), dtype


_ALLOWED: Mapping[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


def innermost(model: Any) -> nn.Module:
    """The user's module, out of what wraps it."""
    while True:
        model = wrapper_of(model)
        if isinstance(model, SequenceParallel | nn.parallel.DistributedDataParallel):
            inner: Any = model.module
            if inner is model or wrapper_of(inner) is model:
                return inner
            model = inner
        else:
            return model


def _whole_number(x: Tensor) -> Tensor:
    """All of a tensor that is sharded."""
    full = getattr(x, "full_tensor", None)
    return (x if full is None else full()).detach().clone()


def _whole_numbers(named: Mapping[str, Tensor]) -> Numbers:
    return {name: _whole_number(each) for name, each in named.items()}


def _same_loss(cut: Stepped, group: Group, allowed: float) -> Finding:
    everyone = torch.stack(group.all_gather(cut.loss.double()[None]).wait()).flatten()
    apart = (everyone - everyone[0]).abs() > allowed * everyone[0].abs()
    return Finding(EVERYWHERE, "S7, S8", float(apart.sum()), 0.0)


def _same_gradients(cut: Stepped, group: Group, allowed: float) -> Finding:
    """How many parameters' gradients are not those that the other ranks have."""
    apart = [
        difference(mine, group.all_reduce(mine.contiguous()).wait() / group.size, 1e-300) > allowed
        for mine in cut.gradients.values()
    ]
    return Finding("gradients on every rank", "gradients not summed over ranks: weights drift apart", sum(apart), 0.0)


def _of_weights(name: str, cut: Numbers, whole: Numbers, allowed: float) -> Finding:
    apart = [difference(cut[key], each) for key, each in whole.items()]
    names = list(whole)
    worst = apart.index(max(apart))
    said = "{} differs".format
    return Finding(name, "ranks that stand elsewhere", apart[worst], allowed, worst, lambda n: said(names[int(n)]))
