"""Is a cut model what it was? A few tokens run through transformers itself, each document alone, and through the cut.

Neither an allow-list nor ``verify`` sees what both sides of the cut leave out: a window that only a mask states, a
chunk, positions that depend on tokens. transformers itself does.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.collectives import Group
from seqpar.collectives.group import where
from seqpar.hf.exact import Exact
from seqpar.hf.whole import base_of, each_alone
from seqpar.sharding.cut import Cut
from seqpar.sharding.shard import LAYOUTS, Shard
from seqpar.training.alike import is_distributed

LENGTHS = (7, 1, 0, 9, 5)
_TOLERANCES = ((torch.bfloat16, 5e-2), (torch.float16, 1e-2), (torch.float32, 1e-3), (torch.float64, 1e-6))
_NOT_COMPARED = -1.0
Run = Callable[[nn.Module, Tensor, Cut], Tensor]


@dataclass(frozen=True)
class Difference:
    """What came out: the relative ``error`` of the logits, and the first module whose output differs."""

    error: float
    module: str = ""
    kind: str = ""


def guard(model: nn.Module, run: Run, cut: Cut, device: torch.device) -> None:
    """Raise ``ValueError``, the same on every rank, if the cut model is not the model: called before the first step."""
    shard = Shard.of(
        (*LENGTHS, cut.group.size), cut.group, cut.shard.layout if cut.shard.layout in LAYOUTS else LAYOUTS[0]
    )
    tokens = drawn(model, shard.num_tokens, device)
    found, allowed = compare_with_alone(model, run, tokens, Cut(shard, cut.group, cut.transport, cut.scan))
    if found.error > allowed:
        raise ValueError(
            f"{where(cut.group)}: cut, {type(base_of(model)).__name__} is not what transformers computes for each "
            f"document alone: its logits differ by {found.error:.1e}"
            + (f"; the first module that differs is {found.module} ({found.kind})" if found.module else "")
            + ". Nothing was trained; please report the model's config"
        )


def drawn(model: nn.Module, num_tokens: int, device: torch.device) -> Tensor:
    """Tokens ``[1, s]`` of the model's vocabulary, the same on every rank."""
    vocabulary = base_of(model).get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(vocabulary, (1, num_tokens), generator=generator).to(device)


def compare_with_alone(model: nn.Module, run: Run, tokens: Tensor, cut: Cut) -> tuple[Difference, float]:
    """The difference between the cut model and transformers' own runs, and how large it may be; the same on every rank.

    Runs in fp64 where the model can (its weights are widened as they are used), otherwise in its own precision.
    """
    with _still(model):
        exact, whole = _whole(model, tokens, cut)
        with Exact(weights=True) if exact else nullcontext():
            mine = run(model, tokens_of(tokens, cut), cut)
        error = _over_ranks([_distance(mine, whole, cut)], cut.group)[0]
        lowest = torch.float64 if exact else mine.dtype
        allowed = dict(_TOLERANCES)[lowest]
        if error <= allowed:
            return Difference(error), allowed
        return _first(model, run, tokens, cut, error, allowed, exact), allowed


def tokens_of(tokens: Tensor, cut: Cut) -> Tensor:
    """Mine."""
    return cut.shard.take(tokens)


def _whole(model: nn.Module, tokens: Tensor, cut: Cut) -> tuple[bool, Tensor]:
    """Whether the model runs in fp64, and its logits ``[1, s, vocabulary]``, each document alone."""
    exact = not is_distributed(model)  # FSDP2 gathers weights in the dtype that it sharded them in
    try:
        with Exact(weights=True) if exact else nullcontext():
            whole = _logits(model, tokens, cut)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        if not exact:
            raise
        exact = False  # an error that has nothing to do with fp64 will come again below
    failed = torch.tensor([int(not exact)], device=tokens.device)
    if cut.group.all_reduce(failed).wait().item() and not is_distributed(model):
        exact, whole = False, _logits(model, tokens, cut)
    return exact, whole


def _logits(model: nn.Module, tokens: Tensor, cut: Cut) -> Tensor:
    return torch.cat([each.logits for each in each_alone(model, tokens, cut.shard.lengths)], dim=1)


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Without gradients, in evaluation mode, and with the random numbers that come after as they would have been."""
    training = [part for part in model.modules() if part.training]
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        for part in training:
            part.training = False
        try:
            yield
        finally:
            for part in training:
                part.training = True


# Which module it is.


def _first(
    model: nn.Module, run: Run, tokens: Tensor, cut: Cut, error: float, allowed: float, exact: bool
) -> Difference:
    """The first module, in the order in which calls end, whose output differs."""
    with Exact(weights=True) if exact else nullcontext():
        cut_calls = _recorded(model, lambda: run(model, tokens_of(tokens, cut), cut))
        alone = [
            _recorded(model, partial(each_alone, model, part, [part.shape[1]]))
            for part in tokens.split(list(cut.shard.lengths), dim=1)
            if part.shape[1]
        ]
    names = [name for name in alone[0] if name]
    errors = [_module_distance(name, cut_calls, alone, cut) for name in names]
    for name, each in zip(names, _over_ranks(errors, cut.group)):
        if each > allowed:
            return Difference(error, name, type(model.get_submodule(name)).__name__)
    return Difference(error)


def _module_distance(name: str, cut_calls: dict[str, Tensor], alone: list[dict[str, Tensor]], cut: Cut) -> float:
    parts = [calls.get(name) for calls in alone]
    mine, lengths = cut_calls.get(name), [length for length in cut.shard.lengths if length]
    tensors = [each for each in parts if each is not None]
    if mine is None or len(tensors) < len(parts) or [each.shape[1] for each in tensors] != lengths:
        return _NOT_COMPARED
    return _distance(mine, torch.cat(tensors, dim=1), cut)


def _recorded(model: nn.Module, call: Callable[[], Any]) -> dict[str, Tensor]:
    """The output of every module's last call, ``[1, t, ...]``, in the order in which calls end."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(part: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor) and first.dim() > 2 and first.is_floating_point():
                found[name] = first.clone()

        return hook

    with ExitStack() as hooks:
        for name, part in model.named_modules():
            hooks.callback(part.register_forward_hook(keep(name)).remove)
        call()
    return found


def _distance(mine: Tensor, whole: Tensor, cut: Cut) -> float:
    """Of my rows, relative to the largest number; not compared if the shapes are not those of tokens."""
    expected = cut.shard.take(whole).double() if whole.shape[1] == cut.shard.num_tokens else None
    if expected is None or expected.shape != mine.shape:
        return _NOT_COMPARED
    error = (mine.double() - expected).abs().amax() / whole.double().abs().amax().clamp(min=1e-30)
    return float(error.nan_to_num(nan=torch.inf))


def _over_ranks(errors: list[float], group: Group) -> list[float]:
    """The largest of all ranks; not compared where one could not."""
    table = torch.tensor(errors, dtype=torch.float64)
    device = torch.device("cuda") if getattr(group, "backend", "") == "nccl" else torch.device("cpu")
    columns = torch.stack(group.all_gather(table.to(device)).wait()).cpu()
    skipped = (columns == _NOT_COMPARED).any(0)
    return torch.where(skipped, torch.full_like(table, _NOT_COMPARED), columns.amax(0)).tolist()
