"""Which module is the first whose output differs: forward passes of the whole and the cut model, side by side."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.collectives import Group
from seqpar.sharding.agreement import text_fingerprint
from seqpar.sharding.cut import Cut
from seqpar.sharding.exchanged import backward_pass
from seqpar.sharding.shard import Shard
from seqpar.training.wrap import SequenceParallel
from seqpar.verification.comparison import Batch
from seqpar.verification.report import FirstModule, Modules

_SKIPPED = -1.0
_Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class _Call:
    """One call of a module: what went in and what came out, as far as it is tensors."""

    name: str
    kind: str
    inputs: _Tensors
    outputs: _Tensors
    shard: Shard


def compare_modules(
    whole_model: SequenceParallel, cut_model: SequenceParallel, data: Batch, tolerance: float
) -> Modules:
    """The first call, in the order in which calls end, whose output differs on any rank; the same on every rank.

    Compared are tensors that hold the tokens in dim 1 or dim 0: a rank's rows with the same rows of the whole run. What
    holds no tokens, and modules that are not called equally often in both runs, are skipped. Runs both models once and
    keeps all that they compute.
    """
    return compared(
        _recorded(whole_model, data), _recorded(cut_model, data), cut_model.group, data.tokens.device, tolerance
    )


def compared(whole: "Calls", cut: "Calls", group: Group, device: torch.device, tolerance: float) -> Modules:
    """The same of calls that were recorded."""
    mine = [[_worst(call, cut.get(key), what) for what in ("outputs", "inputs")] for key, call in whole.items()]
    table = _of_all_ranks(mine, [call.name for call in whole.values()], group, device)
    return _first(list(whole.values()), table, tolerance)


Calls = dict[tuple[str, int], _Call]


def _recorded(model: SequenceParallel, data: Batch) -> Calls:
    """Every call of a module in a forward pass, as they end, by the module's name and how many it had before."""
    with recording(model.module) as calls, torch.no_grad():
        model(data.tokens, lengths=data.lengths)
    return calls


@contextmanager
def recording(module: nn.Module) -> Iterator[Calls]:
    """Within, calls of the module and its parts are kept; those of one pass know how the pass was cut."""
    calls: Calls = {}
    shards: list[Shard] = []

    def begin(part: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        shards[:] = [each.shard for each in (*inputs, *named.values()) if isinstance(each, Cut)] or shards

    handles = [module.register_forward_pre_hook(begin, with_kwargs=True)]
    for name, part in module.named_modules():
        handles.append(part.register_forward_hook(_keeping(name or "the model", calls, shards), with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _keeping(name: str, calls: Calls, shards: list[Shard]) -> Callable[..., None]:
    numbers = count()

    def keep(part: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
        if backward_pass() is not None:
            return
        given = _tensors([*inputs, *named.values()])
        calls[name, next(numbers)] = _Call(name, type(part).__name__, given, _tensors(output), shards[-1])

    return keep


def _tensors(value: Any) -> _Tensors:
    """Copies, since what is written in place later would be blamed on this call."""
    found = value if isinstance(value, list | tuple) else [value]
    return tuple(each.detach().clone() for each in found if isinstance(each, Tensor))


def _worst(whole: _Call, cut: _Call | None, what: str) -> float:
    """The largest relative norm of a difference; ``_SKIPPED`` where nothing can be compared."""
    if cut is None:
        return _SKIPPED
    pairs = zip(getattr(whole, what), getattr(cut, what))
    return max((_difference(mine, of_all, cut.shard) for of_all, mine in pairs), default=_SKIPPED)


def _difference(mine: Tensor, whole: Tensor, shard: Shard) -> float:
    dim = next(_dims_of_tokens(mine, whole, shard), None)
    if dim is None:
        return _SKIPPED
    exact = torch.complex128 if whole.is_complex() else torch.float64
    whole = whole.to(exact)
    error = (mine.to(exact) - shard.take(whole, dim)).norm() / whole.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return float(error.nan_to_num(nan=torch.inf))


def _dims_of_tokens(mine: Tensor, whole: Tensor, shard: Shard) -> Iterator[int]:
    for dim in (1, 0):
        shape = list(whole.shape)
        if dim < len(shape) and shape[dim] == shard.num_tokens:
            shape[dim] = shard.num_local
            if list(mine.shape) == shape:
                yield dim


def _of_all_ranks(mine: list[list[float]], names: list[str], group: Group, device: torch.device) -> Tensor | None:
    """``[ranks, calls, 2]``; None where ranks did not call the same modules."""
    said = torch.tensor([text_fingerprint(" ".join(names))], device=device)
    if len(set(torch.cat(group.all_gather(said).wait()).tolist())) > 1:
        return None
    numbers = torch.tensor(mine, dtype=torch.float64, device=device)
    return torch.stack(group.all_gather(numbers).wait()).cpu()


def _first(calls: list[_Call], table: Tensor | None, tolerance: float) -> Modules:
    if table is None:
        return Modules(0, None)
    # A rank that could not compare a call takes it out for all: its shapes are not those of a cut sequence.
    outputs, inputs = torch.where((table == _SKIPPED).any(0), _SKIPPED, table.amax(0)).unbind(1)
    before = ""
    for number, (call, value) in enumerate(zip(calls, outputs.tolist())):
        if value > tolerance:
            found = FirstModule(call.name, call.kind, value, float(inputs[number]) > tolerance, before)
            return Modules(int((outputs >= 0).sum()), found)
        before = call.name if value >= 0 else before
    return Modules(int((outputs >= 0).sum()), None)
