"""In bf16 and fp16 every op is as exact as one rounding allows: the output and every gradient, on one rank and three.

The law: with inputs that are rounded to 16 bits, the distance from the loop in fp64 over the same rounded inputs is at
most 1.5 times that of the loop's own result rounded once to those 16 bits. What leaves in fp32 (gradients of decays) is
held to the same distance. Nothing is NaN or infinite where fp32 is not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import seqpar
from seqpar import Shard
from seqpar.collectives import Group, run_ranks
from seqpar.crossing import recurrences
from seqpar.crossing.convolution import causal_conv
from tests.oracles import convolution as taps
from tests.oracles.delta import delta_rule
from tests.oracles.diagonal import diagonal_scan, selective_scan
from tests.oracles.linear_system import linear_system
from tests.oracles.recurrence import decayed_linear_attention
from tests.oracles.softmax import softmax_attention

LENGTHS = (70, 0, 1, 79)
STARTS = tuple(accumulate(LENGTHS, initial=0))[:-1]
TOKENS, HEADS, DIM = sum(LENGTHS), 2, 8
ROUNDINGS = 1.5
HALVES = (torch.bfloat16, torch.float16)
GATES = ("strong", "weak", "mixed", "start")
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """An op: ``call(inputs of my tokens, shard=, group=)``, ``loop(whole inputs)`` in fp64, and its inputs in fp64;
    those in ``wide`` stay fp32 under 16-bit tokens, those in ``shared`` have no tokens."""

    call: Callable[..., Any]
    loop: Callable[..., Tensor]
    inputs: Tensors
    wide: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()

    def rounded(self, dtype: torch.dtype) -> Tensors:
        return {name: x.to(torch.float32 if name in self.wide else dtype) for name, x in self.inputs.items()}


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def gates(which: str, *shape: int) -> Tensor:
    """Logarithms of decays: those of trained layers that forget at once, that never do, and of both side by side."""
    logits = drawn(*shape, 1)[..., 0]
    if which == "strong":
        return -8 - logits.abs()
    if which == "mixed":
        return functional.logsigmoid(10 * logits)
    return functional.logsigmoid(logits) / 16 if which == "start" else -1e-3 * logits.abs()


def heads(seed: int, tiny: bool = False) -> Tensor:
    """q, k or v [b, t, h, dim]; ``tiny``: every third token all but vanishes."""
    x = drawn(1, TOKENS, HEADS, DIM, seed)[..., 0]
    if tiny:
        x[:, ::3] *= 1e-3
    return x


def qkv() -> Tensors:
    return {"q": heads(1), "k": heads(2, tiny=True), "v": heads(3)}


def decayed(kind: str, which: str) -> Case:
    call = partial(recurrences.linear_attention, scale=DIM**-0.5)
    loop = partial(decayed_linear_attention, lengths=LENGTHS, continues=False, scale=DIM**-0.5)
    if kind == "none":
        return Case(call, lambda **x: loop(**x)[0], qkv())
    shape = {"constant": (HEADS,), "scalar": (1, TOKENS, HEADS), "vector": (1, TOKENS, HEADS, DIM)}[kind]
    inputs = {**qkv(), "log_decay": gates(which, *shape)}
    return Case(call, lambda **x: loop(**x)[0], inputs, ("log_decay",), ("log_decay",) if kind == "constant" else ())


def delta(kind: str, which: str) -> Case:
    loop = partial(delta_rule, starts=STARTS, scale=DIM**-0.5)
    inputs = {**qkv(), "beta": drawn(1, TOKENS, HEADS).sigmoid()}
    inputs["k"] = functional.normalize(heads(2), dim=-1)
    inputs["k"][:, ::5] = 0
    if kind != "none":
        shape = (1, TOKENS, HEADS) if kind == "scalar" else (1, TOKENS, HEADS, DIM)
        inputs["log_decay"] = gates(which, *shape)
    call = partial(recurrences.delta_rule, scale=DIM**-0.5)
    return Case(call, lambda **x: loop(**x)[0], inputs, ("log_decay",))


def diagonal(kind: str, which: str) -> Case:
    shape = (DIM,) if kind == "constant" else (1, TOKENS, DIM)
    inputs = {"x": drawn(1, TOKENS, DIM, 4)[..., 0], "log_a": gates(which, *shape)}

    def loop(x: Tensor, log_a: Tensor) -> Tensor:
        return diagonal_scan(log_a, x, starts=STARTS)[0]

    return Case(recurrences.diagonal_scan, loop, inputs, ("log_a",), ("log_a",) if kind == "constant" else ())


def selective(which: str) -> Case:
    steps = {"strong": 8.0, "mixed": 2.0, "weak": 1e-3, "start": 0.05}[which]
    inputs = {
        "u": drawn(1, TOKENS, DIM, 5)[..., 0],
        "delta": steps * drawn(1, TOKENS, DIM, 6)[..., 0].exp(),
        "a": -(drawn(DIM, 3).exp()),
        "b": drawn(1, TOKENS, 3, 7)[..., 0],
        "c": drawn(1, TOKENS, 3, 8)[..., 0],
    }

    def loop(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return selective_scan(u, delta, b, c, a, starts=STARTS)[0]

    return Case(recurrences.selective_scan, loop, inputs, ("delta", "a"), ("a",))


def system() -> Case:
    inputs = {
        "u": heads(4), "a": 0.9 * torch.linalg.qr(drawn(HEADS, 4, 4))[0], "b": drawn(HEADS, 4), "c": drawn(HEADS, 3, 4)
    }  # fmt: skip
    loop = partial(linear_system, starts=STARTS)
    return Case(recurrences.linear_system, lambda **x: loop(**x)[0], inputs, ("a", "b", "c"), ("a", "b", "c"))


def softmax(window: int | None) -> Case:
    loop = partial(softmax_attention, lengths=LENGTHS, window=window)
    return Case(partial(seqpar.attention, window=window), lambda **x: loop(**x), qkv())


def conv() -> Case:
    inputs = {"x": drawn(1, TOKENS, DIM, 4)[..., 0], "weight": drawn(DIM, 4)}
    loop = partial(taps.convolution, lengths=LENGTHS, left=3)
    return Case(lambda x, weight, **place: causal_conv(x, weight, **place), loop, inputs, (), ("weight",))


CASES: dict[str, Callable[[], Case]] = {
    "linear attention": partial(decayed, "none", "weak"),
    **{f"linear attention, {kind}, {which}": partial(decayed, kind, which)
       for kind in ("constant", "scalar", "vector") for which in GATES},
    "delta rule": partial(delta, "none", "weak"),
    **{f"delta rule, {kind}, {which}": partial(delta, kind, which)
       for kind in ("scalar", "vector") for which in GATES},
    **{f"diagonal scan, {kind}, {which}": partial(diagonal, kind, which)
       for kind in ("constant", "per token") for which in GATES},
    **{f"selective scan, {which}": partial(selective, which) for which in GATES},
    "linear system": system,
    "softmax": partial(softmax, None),
    "softmax, window": partial(softmax, 20),
    "convolution": conv,
}  # fmt: skip


@cache
def exact(name: str, dtype: torch.dtype) -> tuple[Tensors, Tensor]:
    """The loop's output and gradients on the rounded inputs, in fp64, and the upstream gradient."""
    case = CASES[name]()
    inputs = {key: x.double().requires_grad_() for key, x in case.rounded(dtype).items()}
    out = case.loop(**inputs)
    upstream = drawn(*out.shape).to(dtype)
    grads = torch.autograd.grad(out, list(inputs.values()), upstream.double())
    return {"output": out.detach(), **dict(zip(inputs, grads))}, upstream


def found(group: Group, name: str, dtype: torch.dtype) -> Tensors:
    """Ours, put together or summed over the ranks."""
    case, (_, upstream), shard = CASES[name](), exact(name, dtype), Shard.of(LENGTHS, group)
    mine = {
        key: (x if key in case.shared else shard.take(x)).clone().requires_grad_()
        for key, x in case.rounded(dtype).items()
    }
    out = case.call(**mine, shard=shard, group=group)
    grads = torch.autograd.grad(out, list(mine.values()), shard.take(upstream))
    whole = {
        key: group.all_reduce(grad.float()).wait() if key in case.shared else shard.gather(grad)
        for key, grad in zip(mine, grads)
    }
    return {"output": shard.gather(out.detach()), **whole}


def roundings(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> float:
    """How many times the error of one rounding to ``dtype`` that of ours is."""
    one = (theirs.to(dtype).double() - theirs).norm()
    return float((ours.double() - theirs).norm() / one) if one else float(not torch.equal(ours.double(), theirs))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_16_bits_cost_one_rounding(name: str, dtype: torch.dtype) -> None:
    expected, _ = exact(name, dtype)
    for size in (1, 3):
        for outcome in run_ranks(size, found, name, dtype):
            errors = {part: roundings(outcome[part], expected[part], dtype) for part in expected}
            assert all(x.isfinite().all() for x in outcome.values())
            assert max(errors.values()) <= ROUNDINGS, (size, errors)
