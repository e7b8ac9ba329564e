"""One model of transformers: itself, each document alone, against itself cut over 1 to 4 ranks, in fp64."""

import copy
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.models.hf.shrink import built, shrunk
from seqpar.collectives import Group, run_ranks
from seqpar.hf import Exact, adapted
from seqpar.hf.whole import layer_kinds, own_modules, plain
from seqpar.training.wrap import Options, SequenceParallel

LENGTHS = (19, 1, 0, 33, 12)
WORLDS = ((1, "contiguous"), (2, "zigzag"), (3, "striped"), (4, "contiguous"), (4, "zigzag"))
EXACT = 1e-9


@dataclass(frozen=True)
class Measured:
    """``outcome``: exact, wrong, refused, or broken (transformers itself does not run it, or something else failed).
    ``error``: the largest of loss, logits and every gradient over all worlds, relative to the largest number.
    ``modules`` and ``layers``: the classes, and the kinds of layers by their names in configs, that it was made of."""

    model_type: str
    outcome: str
    error: float | None
    why: str
    modules: Sequence[str] = ()
    layers: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """For the result file."""
        return asdict(self)


@dataclass(frozen=True)
class Numbers:
    """What one run gives."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]

    def error(self, other: "Numbers") -> tuple[float, str]:
        """The largest difference, relative to the largest number of mine, and where it is."""
        pairs = {"loss": (self.loss, other.loss, 0.0), "logits": (self.logits, other.logits, 0.0)}
        # A gradient that is 0 but for rounding (of a bias of keys) is measured by the others.
        least = 1e-6 * max(float(each.abs().amax()) for each in self.gradients.values())
        pairs |= {name: (each, other.gradients[name], least) for name, each in self.gradients.items()}
        return max((_relative(*pair), name) for name, pair in pairs.items())


def _relative(whole: Tensor, mine: Tensor, least: float) -> float:
    if not whole.numel():
        return 0.0
    error = (mine - whole).abs().amax() / whole.abs().amax().clamp(min=max(least, 1e-30))
    return float(error.nan_to_num(nan=torch.inf))


def measure(model_type: str, worlds: Sequence[tuple[int, str]] = WORLDS) -> Measured:
    """Everything about one ``model_type``."""
    try:
        config = shrunk(model_type)
        model = built(config)
        tokens = torch.randint(3, config.get_text_config().vocab_size, (2, sum(LENGTHS)))
        with Exact():
            whole = alone(model, tokens)
    except Exception as error:
        return Measured(model_type, "broken", None, f"alone: {_short(error)}")
    seen = sorted({type(each).__name__ for _, each in own_modules(model)}), sorted(layer_kinds(model))
    try:
        numbers = [cut(model, tokens, *world) for world in worlds]
    except ValueError as error:
        return Measured(model_type, "refused", None, _short(error), *seen)
    except Exception as error:
        return Measured(model_type, "broken", None, f"cut: {_short(error)}", *seen)
    if not whole.logits.isfinite().all():
        return Measured(model_type, "broken", None, "alone: logits are not finite", *seen)
    error, name = max(whole.error(each) for each in numbers)
    if error <= EXACT:
        return Measured(model_type, "exact", error, "", *seen)
    if _only_the_loss_differs(whole, numbers):
        why = "logits are exact, but its own loss is not that of the next token"
        return Measured(model_type, "refused", error, why, *seen)
    return Measured(model_type, "wrong", error, name, *seen)


def _only_the_loss_differs(whole: Numbers, numbers: Sequence[Numbers]) -> bool:
    """As where labels are not shifted; gradients then differ as well."""
    logits = max(_relative(whole.logits, each.logits, 0.0) for each in numbers)
    return logits <= EXACT and min(_relative(whole.loss, each.loss, 0.0) for each in numbers) > 1e-4


def _short(error: BaseException) -> str:
    return re.sub(r"^rank \d+ of \d+: ", "", " ".join(str(error).split()))[:240] or type(error).__name__


def alone(model: nn.Module, tokens: Tensor) -> Numbers:
    """transformers itself, one document after the other; the loss is the mean of its own over all targets."""
    twin: Any = copy.deepcopy(model)
    total, count, logits = torch.zeros((), dtype=torch.float64), 0, []
    for part in (each.contiguous() for each in tokens.split(list(LENGTHS), dim=1)):
        if part.shape[1] > 1:
            output = twin(**plain(twin, part), labels=part)
            targets = part.shape[0] * (part.shape[1] - 1)
            total, count = total + output.loss * targets, count + targets
            logits.append(output.logits.detach())
        elif part.shape[1]:
            logits.append(twin(**plain(twin, part)).logits.detach())
    loss = total / count
    loss.backward()
    return Numbers(loss.detach(), torch.cat(logits, 1), gradients(twin))


def cut(model: nn.Module, tokens: Tensor, size: int, layout: str) -> Numbers:
    """The same, cut over ``size`` ranks."""
    numbers: Numbers = run_ranks(size, _rank, model, tokens, layout)[-1]
    return numbers


def _rank(group: Group, model: nn.Module, tokens: Tensor, layout: str) -> Numbers:
    twin = copy.deepcopy(model)
    with Exact():
        wrapped = SequenceParallel(adapted(twin, group, any_type=True), group, Options(layout))
        output = wrapped(tokens, labels=tokens, lengths=LENGTHS)
        output.loss.backward()
        logits = output.shard.gather(output.logits.detach())
    return Numbers(output.loss.detach(), logits, gradients(twin))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(each) if each.grad is None else each.grad
        for name, each in model.named_parameters()
        if each.requires_grad
    }
