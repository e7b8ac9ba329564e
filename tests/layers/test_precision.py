"""In bf16 and fp16 every row of the catalog is as exact as rounding what passes between its parts allows.

A layer rounds what its projections, products and ops give to each other, so one rounding at its end is out of reach.
The yardstick is the same layer in fp64, on the same rounded inputs and weights, with just those results of torch's
functions and of our ops rounded to 16 bits (and their gradients) that are in 16 bits when the layer is. The layer's
error against fp64 without any rounding is at most 1.5 times the yardstick's, for the output, the gradient of the input
and those of the parameters, on one rank and on three. On three each rank's part of a parameter's gradient is in the
dtype of the parameter before the parts are summed, so the yardstick knows that rounding, too.
"""

import copy
import math
from collections.abc import Collection
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from seqpar import Cut, Shard
from seqpar.collectives import Group, alone, run_ranks
from seqpar.layers import JRT, Aaren, Based, LinearAttention
from tests.layers.rows import ROWS, listed
from tests.layers.test_battery import inputs_of, layer_of, typical_error, zero_for

LENGTHS = (40, 0, 1, 39)
HALVES = (torch.bfloat16, torch.float16)
ROUNDINGS = 1.5
# Measured: steps and frequencies of S4D and S5 get sums over all tokens that all but cancel.
ALLOWED = {("s4d", "float16"): 1.9, ("s5, one block, few states", "float16"): 1.6}
SIGNS = ("yaad",)  # errors beyond their bound count by their signs alone, which a rounding may change
UNTOUCHED = ("__get__", "__set__", "_set_grad_enabled", "new_empty", "stride", "tensor", "arange", "untyped_storage")
Outcome = dict[str, Tensor]


class _Round(torch.autograd.Function):
    """To 16 bits and back, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype).to(grads[0].dtype), None


def _is_narrow(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in HALVES


def _is_untouched(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name in UNTOUCHED or name.endswith("_")


class Watch(TorchFunctionMode):
    """Notes which arguments and results of torch's functions are in 16 bits, but not inside of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[bool], list[bool]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled() and not _is_untouched(func):
            flat = [[_is_narrow(each) for each in tree_flatten(part)[0]] for part in ((args, kwargs or {}), result)]
            self.calls.append((getattr(func, "__name__", ""), flat[0], flat[1]))
        return result


class Replay(TorchFunctionMode):
    """Rounds what another run had in 16 bits: arguments (results of our ops among them) and results."""

    def __init__(self, watch: Watch, dtype: torch.dtype) -> None:
        super().__init__()
        self.calls, self.dtype = iter(watch.calls), dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or _is_untouched(func):
            return func(*args, **kwargs)
        name, narrow_args, narrow_results = next(self.calls)
        assert name == getattr(func, "__name__", ""), (name, func)
        args, kwargs = self._rounded((args, kwargs), narrow_args)
        return self._rounded(func(*args, **kwargs), narrow_results)

    def _rounded(self, tree: Any, narrow: list[bool]) -> Any:
        flat, spec = tree_flatten(tree)
        assert len(flat) == len(narrow)
        with torch._C.DisableTorchFunction():
            found = [_Round.apply(x, self.dtype) if yes else x for x, yes in zip(flat, narrow)]
        return tree_unflatten(found, spec)


def outcome(
    layer: nn.Module, name: str, dtype: torch.dtype, group: Group, mode: Any = None, narrow: Collection[str] = ()
) -> Outcome:
    """Output and gradients of inputs that are those of 16 bits; under a ``mode`` of torch's functions, if any.

    ``narrow``: the parameters whose gradients' parts are rounded to ``dtype`` before they are summed.
    """
    wide = any(p.dtype == torch.float64 for p in layer.parameters())
    shard = Shard.of(LENGTHS, group)
    whole, upstream = (each.to(dtype).to(torch.float64 if wide else dtype) for each in inputs_of(name, sum(LENGTHS)))
    x = shard.take(whole).clone().requires_grad_()
    with mode or nullcontext():
        y = layer(x, Cut(shard, group))
    y.backward(shard.take(upstream))
    parts = {key: zero_for(p) for key, p in layer.named_parameters()}
    parts |= {key: parts[key].to(dtype) for key in narrow}
    grads = {key: group.all_reduce(part.double()).wait() for key, part in parts.items()}
    return {"output": shard.gather(y.detach()).double(), "input": shard.gather(zero_for(x)).double(), **grads}


@cache
def exact(name: str, dtype: torch.dtype, ranks: int) -> tuple[Outcome, dict[str, float]]:
    """Without any rounding; and how far off the yardstick is."""
    layers, watch = [copy.deepcopy(layer_of(name)).to(dtype) for _ in range(4)], Watch()
    theirs = outcome(layers[0].double(), name, dtype, alone())
    outcome(layers[1], name, dtype, alone(), watch)
    yardstick = outcome(layers[2].double(), name, dtype, alone(), Replay(watch, dtype))
    narrow = {key for key, p in layers[1].named_parameters() if _is_narrow(p)}
    rounded = {key: yardstick[key].to(dtype).double() for key in (*narrow, "output", "input")}
    allowed, layer = errors(yardstick | rounded, theirs), layers[3].double()
    if ranks == 1:
        return theirs, allowed
    parts = run_ranks(ranks, lambda group: outcome(copy.deepcopy(layer), name, dtype, group, narrow=narrow))[0]
    return theirs, {key: math.hypot(allowed[key], error) for key, error in errors(parts, theirs).items()}


def errors(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    """Of the output, of the gradient of the input, and of those of parameters that are not all but zero."""
    scale = max(float(x.norm()) for key, x in theirs.items() if key not in ("output", "input"))
    found = {key: typical_error(ours[key], theirs[key]) for key in ("output", "input")}
    return found | {
        key: max(1e-9, float((ours[key] - x).norm() / x.norm()))
        for key, x in theirs.items()
        if key not in found and x.norm() > 1e-6 * scale
    }


@pytest.mark.sampled(16)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", listed(name for name in ROWS if name not in SIGNS))
def test_rows_are_as_exact_as_their_parts(name: str, dtype: torch.dtype) -> None:
    """Of the parameters the geometric mean: a rounding more or less moves a single one, of few numbers, by more."""
    for size in (1, 3):
        theirs, allowed = exact(name, dtype, size)
        found = run_ranks(size, lambda group: outcome(copy.deepcopy(layer_of(name)).to(dtype), name, dtype, group))
        for each in found:
            assert all(x.isfinite().all() for x in each.values())
            ratios = {part: error / allowed[part] for part, error in errors(each, theirs).items()}
            others = max(ratios.pop("output"), ratios.pop("input"))
            parameters = torch.tensor(list(ratios.values())).log().mean().exp().item()
            bound = ALLOWED.get((name, str(dtype)[6:]), ROUNDINGS)
            assert others <= ROUNDINGS and parameters <= bound, (size, others, parameters, ratios)


def _loud(layer: nn.Module) -> nn.Module:
    """Keys and queries so large that sums over thousands of tokens outgrow fp16."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith(("q.", "k.", "k_encoder.")):
                parameter.mul_(4)
    return layer.half()


SUMS = {
    "based": lambda: Based(16, 2, feature_dim=4),
    "jrt": lambda: JRT(16, 2, prefix=700, feature_dim=4),
    "linear attention": lambda: LinearAttention(16, 2, normaliser=True),
    "linear attention, no normaliser": lambda: LinearAttention(16, 2, feature_map="silu"),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_that_outgrow_fp16_are_normalised_before_they_are_rounded(name: str) -> None:
    """Output and gradient of inputs 5 times as large as others, over 4,000 tokens."""
    torch.manual_seed(0)
    layer, tokens = _loud(SUMS[name]()), 4000
    whole, upstream = (5 * torch.randn(1, tokens, 16)).half(), torch.randn(1, tokens, 16).half()
    found = []
    for dtype in (torch.float16, torch.float64):
        x = whole.to(dtype, copy=True).requires_grad_()
        y = copy.deepcopy(layer).to(dtype)(x, Cut.whole([tokens]))
        y.backward(upstream.to(dtype))
        found.append((y.detach().double(), x))
    (ours, x), (theirs, exact_x) = found
    assert x.grad is not None and exact_x.grad is not None and x.grad.isfinite().all()
    assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_aaren_counts_past_the_largest_number_of_fp16() -> None:
    tokens = 65_504 + 200
    layer, x = Aaren(2, 1).half(), torch.ones(1, tokens, 2).half()
    with torch.no_grad():
        y = layer(x, Cut.whole([tokens]))
    assert torch.equal(y, y[:, :1].expand_as(y))
