"""What is measured on a GPU: each op at given shapes, beside whatever else computes the same from the same inputs."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bench.ops import roofline
from seqpar import Cut, linear_attention
from seqpar.crossing.recurrence import recur
from seqpar.ops.delta_rule import DeltaRule
from seqpar.ops.diagonal_scan import SelectiveScan
from seqpar.ops.softmax_block import Band, block_attention
from seqpar.ops.stages import Op, Tensors

OURS, REFERENCE, PEER, TORCH = "seqpar", "seqpar, torch reference", "flash-linear-attention", "torch"


class Shape(NamedTuple):
    """Batch, tokens, heads, head dim."""

    batch: int
    tokens: int
    heads: int
    dim: int


SHAPES = (
    Shape(1, 8192, 96, 128),
    Shape(2, 16384, 16, 128),
    Shape(4, 2048, 16, 128),
    Shape(4, 4096, 64, 128),
    Shape(8, 1024, 8, 64),
    Shape(8, 2048, 32, 256),
)
SMOKE = (Shape(1, 17, 1, 16),)
STATES = 16  # of a channel of the selective scan


@dataclass(frozen=True)
class Contest:
    """One op at one shape: ``contenders`` map names to functions of the same ``inputs``, which want gradients."""

    op: str
    shape: Shape
    inputs: tuple[Tensor, ...]
    contenders: dict[str, Callable[..., Tensor]]
    work: roofline.Work


def contests(shape: Shape, device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Contest]:
    """All ops at one shape."""
    for build in (decayed, delta, selective, softmax):
        yield from build(shape, device, dtype, impl)


def normal(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, device=device, generator=generator).to(dtype) for shape in shapes]


def wanted(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() for x in inputs)


def peer(module: str, name: str) -> Callable[..., Any] | None:
    """A function of another library, if it is installed and has it."""
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None
    return found


def decayed(shape: Shape, device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Contest]:
    b, t, h, d = shape
    scale = d**-0.5
    q, k, v, logits = normal(device, dtype, *[tuple(shape)] * 4)
    gates = functional.logsigmoid(logits.float() + 3)
    kinds = {
        "none": (None, ("fla.ops.linear_attn", "chunk_linear_attn")),
        "constant": (gates[0, 0, :, 0].contiguous(), ("fla.ops.simple_gla", "chunk_simple_gla")),
        "scalar": (gates[..., 0].contiguous(), ("fla.ops.simple_gla", "chunk_simple_gla")),
        "vector": (gates, ("fla.ops.gla", "chunk_gla")),
    }
    for kind, (log_decay, place) in kinds.items():
        other, given = peer(*place), (q, k, v) if log_decay is None else (q, k, v, log_decay)

        def theirs(*inputs: Tensor, kind: str = kind, other: Any = other) -> Tensor:
            named = {"none": {"normalize": False}, "constant": {"g_gamma": inputs[-1]}}.get(kind, {"g": inputs[-1]})
            out: Tensor = other(*inputs[:3], scale=scale, **named)[0]
            return out

        mine = {OURS: partial(linear, impl, scale), REFERENCE: partial(linear, "reference", scale)}
        contenders = mine | ({PEER: theirs} if other else {})
        work = roofline.linear(b, t, h, d, d, dtype.itemsize, gates=kind)
        yield Contest(f"linear attention, {kind} decay", shape, wanted(*given), contenders, work)


def linear(impl: str, scale: float, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """Our linear attention, uncut."""
    whole = Cut.whole([q.shape[1]])
    out: Tensor = linear_attention(
        q, k, v, shard=whole.shard, group=whole.group, log_decay=log_decay, scale=scale, impl=impl
    )
    return out


def delta(shape: Shape, device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Contest]:
    b, t, h, d = shape
    scale = d**-0.5
    q, k, v, logits = normal(device, dtype, *[tuple(shape)] * 4)
    k, beta = functional.normalize(k.float(), dim=-1).to(dtype), logits[..., 0].sigmoid()
    gates = functional.logsigmoid(logits.float() + 3)
    kinds = {
        "none": (None, ("fla.ops.delta_rule", "chunk_delta_rule")),
        "scalar": (gates[..., 1].contiguous(), ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")),
        "vector": (gates, ("fla.ops.kda", "chunk_kda")),
    }
    for kind, (log_decay, place) in kinds.items():
        other, given = peer(*place), (q, k, v, beta) if log_decay is None else (q, k, v, beta, log_decay)

        def theirs(*inputs: Tensor, other: Any = other) -> Tensor:
            q, k, v, beta, *gate = inputs
            named = {"g": gate[0]} if gate else {}
            out: Tensor = other(q, k, v, beta=beta, scale=scale, **named)[0]
            return out

        mine = {OURS: partial(uncut, DeltaRule(scale, impl)), REFERENCE: partial(uncut, DeltaRule(scale, "reference"))}
        contenders = mine | ({PEER: theirs} if other else {})
        work = roofline.delta(b, t, h, d, d, dtype.itemsize, gates=kind)
        yield Contest(f"delta rule, {kind} gate", shape, wanted(*given), contenders, work)


def uncut(op: Op, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """Our delta rule."""
    whole = Cut.whole([q.shape[1]])
    out: Tensor = recur(op, (q, k, v, beta, log_decay), shard=whole.shard, group=whole.group)
    return out


def selective(shape: Shape, device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Contest]:
    b, t, h, d = shape
    wide, narrow = (b, t, h * d), (b, t, STATES)
    whole = Cut.whole([t])
    u, steps, keys, queries = normal(device, dtype, wide, wide, narrow, narrow)
    rates = -torch.arange(1, STATES + 1, device=device, dtype=torch.float32).repeat(h * d, 1)

    def ours(impl: str) -> Callable[..., Tensor]:
        def call(*inputs: Tensor) -> Tensor:
            *tokens, rates = inputs
            out: Tensor = recur(SelectiveScan(impl), tuple(tokens), (rates,), shard=whole.shard, group=whole.group)
            return out

        return call

    contenders = {OURS: ours(impl), REFERENCE: ours("reference")}
    work = roofline.diagonal(b, t, h * d, STATES, dtype.itemsize)
    inputs = wanted(u, functional.softplus(steps - 4), keys, queries, rates)
    yield Contest("selective scan", shape, inputs, contenders, work)


def softmax(shape: Shape, device: torch.device, dtype: torch.dtype, impl: str) -> Iterator[Contest]:
    b, t, h, d = shape
    q, k, v = normal(device, dtype, *[tuple(shape)] * 3)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_attention(q, k, v, Band(high=0), d**-0.5, impl=impl)[0].to(q.dtype)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)

    work = roofline.softmax(b, t, h, d, dtype.itemsize, visible=(t + 1) / 2)
    yield Contest("softmax attention, causal", shape, wanted(q, k, v), {OURS: ours, TORCH: theirs}, work)


# An op whose sequence is cut, on one device: what cutting itself costs.


def cut_pass(op: Op, tokens: Tensors, shared: Tensors, d_out: Tensor, ranks: int) -> tuple[Tensor, list[Tensor]]:
    """Forward and backward over ``ranks`` parts: summaries, their fold, the correction, and the same in mirror."""
    parts = [_part(tokens, rank, ranks) for rank in range(ranks)]
    runs = [op.begin(part, shared, ()) for part in parts]
    incoming = _fold(runs, [op.transition(run) for run in runs])
    outs = [op.finish(run, op.intra(run), state) for run, state in zip(runs, incoming)]
    adjoints = [op.begin_backward(run, d, state) for run, d, state in zip(runs, _part((d_out,), None, ranks), incoming)]
    transitions = [op.transition(run) for run in reversed(runs)]
    back = [None if each is None else each.adjoint() for each in transitions]
    leaving = _fold(adjoints[::-1], back)[::-1]
    gradients = [
        op.finish_backward(run, adjoint, op.intra_backward(run, adjoint), state)[0]
        for run, adjoint, state in zip(runs, adjoints, leaving)
    ]
    joined = [torch.cat(list(found), 1) for found in zip(*gradients) if found[0] is not None]
    return torch.cat(outs, 1), joined


def _part(tensors: Tensors, rank: int | None, ranks: int) -> Any:
    """The rows of a rank; of the only tensor, those of all ranks."""
    cut = [[None] * ranks if x is None else x.tensor_split(ranks, 1) for x in tensors]
    return cut[0] if rank is None else tuple(x[rank] for x in cut)


def _fold(runs: list[Any], transitions: list[Any]) -> list[Tensor | None]:
    """What enters each run, if nothing enters the first."""
    states: list[Tensor | None] = [None]
    for run, transition in zip(runs[:-1], transitions):
        passed = states[-1] if transition is None or states[-1] is None else transition.apply(states[-1])
        states.append(run.outgoing if passed is None else run.outgoing + passed)
    return states
