"""Every public function, called by three ranks of which one differs: what it is called with, and what differs.

A case is a function and a difference. ``attempt`` runs one on a rank: a call before in which all are alike, so that the
place is known and nothing is compared by habit; the call in which ``ODD`` differs; and the step's next two messages.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import seqpar
from seqpar.collectives import Group, GroupError, Span, Summary, Transition, exclusive_scan, halo, ring
from seqpar.collectives.agreed import tell_of_errors
from seqpar.collectives.ring import Hop
from seqpar.crossing.document_memory import document_memories
from seqpar.crossing.document_sum import document_sum
from seqpar.crossing.preceding import preceding
from seqpar.crossing.running_max import document_max, running_max
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.relayout import heads_to_tokens, relayout, split_heads, tokens_to_heads
from seqpar.sharding.shard import Shard
from seqpar.training.loss import tiled_next_token_loss

SIZE, ODD = 3, 1


@dataclass(frozen=True)
class Call:
    """What a function is called with. ``numbers``: of the options that only some functions have."""

    lengths: tuple[int, ...] = (7, 9, 8)
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    batch: int = 1
    heads: int = 2
    dim: int = 4
    transport: str = "ring"
    scan: str = "all_gather"
    backwards: bool = False
    final: bool = False
    causal: bool = True
    window: int | None = None
    scale: float = 1.0
    decay: str = "key"
    width: int = 3
    bias: bool = True
    left: int = 2
    divisor: int | None = 5
    ignore: int = -100
    label: int = 1
    reverse: bool = False
    kind: str = "vector"
    to: str = "striped"

    def shard(self, group: Group) -> Shard:
        return Shard.of(self.lengths, group, self.layout)

    def rows(self, group: Group, *shape: int, tokens: int | None = None) -> Tensor:
        count = self.shard(group).num_local if tokens is None else tokens
        x = torch.randn(self.batch, count, *shape, dtype=torch.float64).to(self.dtype)
        return x.requires_grad_(self.dtype.is_floating_point or self.dtype.is_complex)

    def shared(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(self.dtype).requires_grad_()

    def cut(self, group: Group) -> dict[str, Any]:
        return {"shard": self.shard(group), "group": group}

    def recurrence(self, group: Group) -> dict[str, Any]:
        options = {"scan": self.scan, "backwards": self.backwards, "return_final_state": self.final}
        return {**self.cut(group), **options}


def _decay(call: Call, group: Group) -> Tensor | None:
    shape = {"none": None, "head": (call.heads,), "token": (), "key": ()}[call.decay]
    if call.decay == "none":
        return None
    if call.decay == "head":
        return -call.shared(*shape).abs()
    return -call.rows(group, call.heads, *((call.dim,) if call.decay == "key" else ())).abs()


def _qkv(call: Call, group: Group) -> list[Tensor]:
    return [call.rows(group, call.heads, call.dim) for _ in range(3)]


def attention(call: Call, group: Group) -> Any:
    how = {"causal": call.causal, "window": call.window, "scale": call.scale, "transport": call.transport}
    return seqpar.attention(*_qkv(call, group), **how, **call.cut(group))


def linear_attention(call: Call, group: Group) -> Any:
    how = {"log_decay": _decay(call, group), "scale": call.scale, **call.recurrence(group)}
    return seqpar.linear_attention(*_qkv(call, group), **how)


def delta_rule(call: Call, group: Group) -> Any:
    q, k, v = _qkv(call, group)
    decay = (
        None
        if call.decay == "none"
        else _decay(replace(call, decay="token" if call.decay == "head" else call.decay), group)
    )
    beta = call.rows(group, call.heads).sigmoid()
    k = torch.nn.functional.normalize(k, dim=-1)
    return seqpar.delta_rule(q, k, v, beta, log_decay=decay, scale=call.scale, **call.recurrence(group))


def diagonal_scan(call: Call, group: Group) -> Any:
    x = call.rows(group, call.dim)
    log_a = call.shared(call.dim) if call.decay == "head" else call.rows(group, call.dim)
    return seqpar.diagonal_scan(x, -log_a.abs(), **call.recurrence(group))


def selective_scan(call: Call, group: Group) -> Any:
    u, delta = call.rows(group, call.dim), call.rows(group, call.dim).abs()
    b, c = call.rows(group, call.heads), call.rows(group, call.heads)
    return seqpar.selective_scan(u, delta, -call.shared(call.dim, call.heads).abs(), b, c, **call.recurrence(group))


def linear_system(call: Call, group: Group) -> Any:
    a, b, c = call.shared(call.heads, 4, 4) * 0.1, call.shared(call.heads, 4), call.shared(call.heads, 1, 4)
    return seqpar.linear_system(call.rows(group, call.heads, call.dim), a, b, c, **call.recurrence(group))


def causal_conv(call: Call, group: Group) -> Any:
    bias = call.shared(call.dim) if call.bias else None
    how = {"return_final": call.final, **call.cut(group)}
    return seqpar.causal_conv(call.rows(group, call.dim), call.shared(call.dim, call.width), bias, **how)


def symmetric_conv(call: Call, group: Group) -> Any:
    bias = call.shared(call.dim) if call.bias else None
    return seqpar.symmetric_conv(call.rows(group, call.dim), call.shared(call.dim, call.width), bias, **call.cut(group))


def grid_conv(call: Call, group: Group) -> Any:
    bias = call.shared(call.dim) if call.bias else None
    call = replace(call, lengths=tuple(2 * n for n in call.lengths))
    weight = call.shared(call.dim, 3, call.width)
    return seqpar.grid_conv(call.rows(group, call.dim), weight, bias, width=2 * call.left - 2, **call.cut(group))


def token_shift(call: Call, group: Group) -> Any:
    return seqpar.token_shift(call.rows(group, call.dim), return_final=call.final, **call.cut(group))


def a_document_sum(call: Call, group: Group) -> Any:
    return document_sum(call.rows(group, call.dim), **call.cut(group))


def some_document_memories(call: Call, group: Group) -> Any:
    q, k, v = _qkv(call, group)
    (memory,) = document_memories([(k, v)], **call.cut(group))
    return memory.read(q)


def a_running_max(call: Call, group: Group) -> Any:
    return running_max(call.rows(group, call.dim), return_final=call.final, **call.cut(group))[0]


def a_document_max(call: Call, group: Group) -> Any:
    return document_max(call.rows(group, call.dim), **call.cut(group))


def some_preceding(call: Call, group: Group) -> Any:
    seen = preceding(call.rows(group, call.dim), call.left, return_final=call.final, **call.cut(group))
    return (seen[0] if call.final else seen).rows


def a_relayout(call: Call, group: Group) -> Any:
    return relayout(
        call.rows(group, call.dim), call.shard(group), Shard.of(call.lengths, group, call.to), group, Slot()
    )


def to_heads(call: Call, group: Group) -> Any:
    deal = split_heads(call.heads + 2, call.heads + 2, group.size)
    x = call.rows(group, call.heads + 2, call.dim)
    return tokens_to_heads(x, call.shard(group), group, deal.queries, Slot())


def to_tokens(call: Call, group: Group) -> Any:
    deal = split_heads(call.heads + 2, call.heads + 2, group.size)
    start, stop = deal.queries[group.rank]
    y = call.rows(group, stop - start, call.dim, tokens=sum(call.lengths))
    return heads_to_tokens(y, call.shard(group), group, deal.queries, Slot())


def gather(call: Call, group: Group) -> Any:
    return call.shard(group).gather(call.rows(group, call.dim))


def _labels(call: Call) -> Tensor:
    labels = torch.ones(call.batch, sum(call.lengths), dtype=torch.int64)
    labels[:, 5] = call.label
    return labels


def next_token_loss(call: Call, group: Group) -> Any:
    how = {"divisor": call.divisor, "ignore_index": call.ignore, **call.cut(group)}
    return seqpar.next_token_loss(call.rows(group, call.dim), _labels(call), **how)


def tiled_loss(call: Call, group: Group) -> Any:
    how = {"divisor": call.divisor, "ignore_index": call.ignore, "tokens": 3, **call.cut(group)}
    return tiled_next_token_loss(call.rows(group, call.dim), lambda x: x * 2, _labels(call), **how)


def scan(call: Call, group: Group) -> Any:
    state = call.shared(call.batch, call.heads, call.dim, 3)
    value = -call.shared(call.batch, call.heads, call.dim if call.kind == "vector" else 1, 1).abs()
    transition = None if call.kind == "identity" else Transition(value)
    return exclusive_scan(Summary(state, transition), group, algorithm=call.scan, reverse=call.reverse)


def a_halo(call: Call, group: Group) -> Any:
    spans = call.shard(group).spans
    assert isinstance(spans[0][0], Span)
    return halo(call.rows(group, call.dim), group, spans, left=call.left)


def a_ring(call: Call, group: Group) -> Any:
    block = call.rows(group, call.dim, tokens=4)
    hops = [Hop((group.rank - hop) % SIZE, 4, ((0, 4),) if hop < SIZE - 1 else (), (), ()) for hop in range(SIZE)]
    return torch.stack(list(ring(block, group, hops)))


def exchange(call: Call, group: Group) -> Any:
    x = call.rows(group, call.heads, call.dim, tokens=4)
    return group.exchange(x, (group.rank + 1) % SIZE, torch.empty_like(x), (group.rank - 1) % SIZE).wait()


def all_gather(call: Call, group: Group) -> Any:
    return group.all_gather(call.rows(group, call.heads, call.dim, tokens=4)).wait()[0]


def all_to_all(call: Call, group: Group) -> Any:
    sends = [call.rows(group, call.heads, call.dim, tokens=4) for _ in range(SIZE)]
    return group.all_to_all(sends, [torch.empty_like(x) for x in sends]).wait()[0]


def reduce_scatter(call: Call, group: Group) -> Any:
    return group.reduce_scatter([call.rows(group, call.heads, call.dim, tokens=4) for _ in range(SIZE)]).wait()


def all_reduce(call: Call, group: Group) -> Any:
    return group.all_reduce(call.rows(group, call.heads, call.dim, tokens=4)).wait()


def large_all_reduce(call: Call, group: Group) -> Any:
    return group.all_reduce(call.rows(group, call.heads, call.dim, tokens=4000)).wait()


CUT: dict[str, dict[str, Any]] = {
    "lengths": {"lengths": (9, 7, 8)},
    "more documents": {"lengths": (7, 9, 4, 4)},
    "more tokens": {"lengths": (7, 9, 11)},
    "zigzag": {"layout": "zigzag"},
    "striped": {"layout": "striped"},
}
TENSOR: dict[str, dict[str, Any]] = {
    "fp64": {"dtype": torch.float64},
    "bf16": {"dtype": torch.bfloat16},
    "batch": {"batch": 2},
    "dim": {"dim": 8},
}
BYTES = {"int32": {"dtype": torch.int32}, "int16": {"dtype": torch.int16}, "complex": {"dtype": torch.complex64}}
HEADS = {"heads": {"heads": 4}}
FINAL = {"final state": {"final": True}}
ENDS = {
    "backwards": {"backwards": True},
    "ring": {"scan": "ring"},
    "all_scan": {"scan": "all_scan"},
    "doubling": {"scan": "doubling"},
    **FINAL,
}
DECAY = {"no decay": {"decay": "none"}, "decay of heads": {"decay": "head"}, "decay of tokens": {"decay": "token"}}
CONV = {"width": {"width": 5}, "no bias": {"bias": False}}
LOSS = {
    "divisor": {"divisor": 7},
    "no divisor": {"divisor": None},
    "bad divisor": {"divisor": -1},
    "ignored label": {"ignore": 1},
    "labels": {"label": 2},
}
STEPS = ("skips", "repeats", "raises", "sums instead", "gathers instead")
BACKWARD = ("without gradients", "skips backward", "repeats backward")

FUNCTIONS: dict[Callable[[Call, Group], Any], tuple[dict[str, dict[str, Any]], tuple[str, ...]]] = {
    attention: (
        {
            **CUT, **TENSOR, **HEADS,
            "window": {"window": 4}, "not causal": {"causal": False}, "scale": {"scale": 0.5},
            "gathers keys": {"transport": "all_gather"}, "deals heads": {"transport": "all_to_all"},
            "bad window": {"window": 0},
            "window of nan": {"window": float("nan")}, "scale of inf": {"scale": float("inf")},
        },
        (*STEPS, *BACKWARD),
    ),
    linear_attention: ({**CUT, **TENSOR, **HEADS, **ENDS, **DECAY, "scale": {"scale": 2.0}}, (*STEPS, *BACKWARD)),
    delta_rule: ({**CUT, **TENSOR, **HEADS, **ENDS, **DECAY, "scale": {"scale": 2.0}}, (*STEPS, *BACKWARD)),
    diagonal_scan: ({**CUT, **TENSOR, **ENDS, "one decay": {"decay": "head"}}, (*STEPS, *BACKWARD)),
    selective_scan: ({**CUT, **TENSOR, **HEADS, **ENDS}, (*STEPS, *BACKWARD)),
    linear_system: ({**CUT, **TENSOR, **HEADS, **ENDS}, (*STEPS, *BACKWARD)),
    causal_conv: ({**CUT, **TENSOR, **CONV, **FINAL}, (*STEPS, *BACKWARD)),
    symmetric_conv: ({**CUT, **TENSOR, **CONV}, (*STEPS, *BACKWARD)),
    grid_conv: ({**CUT, **TENSOR, **CONV, "columns": {"left": 3}}, (*STEPS, *BACKWARD)),
    token_shift: ({**CUT, **TENSOR, **FINAL}, (*STEPS, *BACKWARD)),
    a_document_sum: ({**CUT, **TENSOR}, (*STEPS, *BACKWARD)),
    some_document_memories: ({**CUT, **TENSOR, **HEADS}, (*STEPS, *BACKWARD)),
    a_running_max: ({**CUT, **TENSOR, **FINAL}, STEPS),
    a_document_max: ({**CUT, **TENSOR}, STEPS),
    some_preceding: ({**CUT, **TENSOR, **FINAL, "left": {"left": 3}}, (*STEPS, *BACKWARD)),
    a_relayout: ({**CUT, **TENSOR, "to": {"to": "zigzag"}}, (*STEPS, *BACKWARD)),
    to_heads: ({**CUT, **TENSOR, **HEADS}, (*STEPS, *BACKWARD)),
    to_tokens: ({**CUT, **TENSOR, **HEADS}, (*STEPS, *BACKWARD)),
    gather: ({**CUT, **TENSOR}, STEPS),
    next_token_loss: ({**CUT, **TENSOR, **LOSS}, STEPS),
    tiled_loss: ({**CUT, **TENSOR, **LOSS}, STEPS),
    scan: (
        {
            **TENSOR, **HEADS, "ring": {"scan": "ring"}, "all_scan": {"scan": "all_scan"},
            "doubling": {"scan": "doubling"}, "reverse": {"reverse": True}, "scalar": {"kind": "scalar"},
            "identity": {"kind": "identity"},
        },
        (*STEPS, *BACKWARD),
    ),
    a_halo: ({**CUT, **TENSOR, "left": {"left": 3}}, (*STEPS, *BACKWARD)),
    a_ring: (TENSOR, STEPS),
    exchange: ({**TENSOR, **HEADS, **BYTES}, STEPS),
    all_gather: ({**TENSOR, **HEADS, **BYTES}, STEPS),
    all_to_all: ({**TENSOR, **HEADS, **BYTES}, STEPS),
    reduce_scatter: ({**TENSOR, **HEADS, **BYTES}, STEPS),
    all_reduce: ({**TENSOR, **HEADS, **BYTES}, STEPS),
    large_all_reduce: ({**TENSOR, **HEADS, **BYTES}, STEPS),
}  # fmt: skip

CASES: dict[str, tuple[Callable[[Call, Group], Any], str]] = {
    f"{function.__name__}: {difference}": (function, difference)
    for function, (options, steps) in FUNCTIONS.items()
    for difference in (*options, *steps)
}


def step(function: Callable[[Call, Group], Any], call: Call, group: Group, how: str = "") -> None:
    """One call, its backward, and the next messages; ``how`` this rank goes another way."""
    others = {"skips": 0, "raises": 0, "sums instead": 0, "gathers instead": 0, "repeats": 2}
    if how == "raises":
        with tell_of_errors(
            group, "the step"
        ):  # as in a wrapped model; elsewhere the process ends, and its connections
            raise KeyError("raised between two messages")
    if how == "sums instead":
        group.all_reduce(torch.zeros(3)).wait()
    if how == "gathers instead":
        group.all_gather(torch.zeros(3)).wait()
    for _ in range(others.get(how, 1)):
        with torch.no_grad() if how == "without gradients" else contextlib.nullcontext():
            result = function(call, group)
        out = result[0] if isinstance(result, tuple) else result
        if out.requires_grad:
            times = {"skips backward": 0, "repeats backward": 2}.get(how, 1)
            for _ in range(times):
                out.real.double().square().sum().backward(retain_graph=True)
    for _ in range(2):  # a rank that already has what it needs of the first is told by the second
        group.all_reduce(torch.zeros(2)).wait()


def attempt(group: Group, case: str) -> str:
    """What comes of a case on this rank: the name of the error, or nothing."""
    function, difference = CASES[case]
    options, _ = FUNCTIONS[function]
    odd = group.rank == ODD
    step(function, Call(), group)
    try:
        changed = replace(Call(), **options.get(difference, {})) if odd else Call()
        step(function, changed, group, difference if odd and difference not in options else "")
    except (GroupError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    except KeyError as error:
        return f"own: {error}" if odd and difference == "raises" else f"unexpected KeyError: {error}"
    except Exception as error:
        return f"unexpected {type(error).__name__}: {error}"
    return ""


def verdict(outcomes: list[str]) -> str:
    """What is wrong with the outcomes of a case; empty if every rank has said an error."""
    bad = [f"rank {rank}: {text or 'silent'}" for rank, text in enumerate(outcomes) if not text or "unexpected" in text]
    return "; ".join(bad)
