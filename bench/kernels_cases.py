"""Which calls of which ops the compile table looks at: tensors have shapes and no memory (device ``meta``)."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import roofline

BATCH, TOKENS, HEADS = 2, 8192, 16
DIMS = (64, 128, 256, 60)
DTYPES = (torch.bfloat16, torch.float32)
DECAYS = ("none", "constant", "scalar", "vector")
STARTS = (0, 100, 4096)
CHANNELS = 2048
Starts = tuple[int, ...]
QUICK = (("scalar", 64), ("scalar", 128), ("vector", 64), ("vector", 128))


@dataclass(frozen=True)
class Case:
    """One call, forward and backward, of one op; ``work`` is what it has to do. ``quick`` ones stand for all."""

    op: str
    name: str
    run: Callable[[], Any]
    work: roofline.Work
    quick: bool


def cases() -> Iterator[Case]:
    """All that there is to compile; an op without kernels has no cases."""
    for op, build in BUILDERS.items():
        if importlib.util.find_spec(f"seqpar.ops.{op}.{ENTRIES[op]}") is not None:
            yield from build()


def shaped(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def label(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def decayed() -> Iterator[Case]:
    stages = importlib.import_module("seqpar.ops.decayed_linear_attention.stages")
    for kind in DECAYS:
        for dim, dtype, starts in configurations():

            def run(kind: str = kind, dim: int = dim, dtype: torch.dtype = dtype, starts: Starts = starts) -> None:
                q, k, v = (shaped(dtype, BATCH, TOKENS, HEADS, dim) for _ in range(3))
                staged(stages, stages.begin(q, k, v, gates(kind, dim), starts, scale=0.1))

            work = roofline.linear(BATCH, TOKENS, HEADS, dim, dim, dtype.itemsize, gates=kind)
            quick = is_quick(kind, dim, dtype, starts)
            yield Case("decayed_linear_attention", name_of(kind, dim, dtype, starts), run, work, quick)


def delta() -> Iterator[Case]:
    stages = importlib.import_module("seqpar.ops.delta_rule.stages")
    for kind in ("none", "scalar", "vector"):
        for dim, dtype, starts in configurations():

            def run(kind: str = kind, dim: int = dim, dtype: torch.dtype = dtype, starts: Starts = starts) -> None:
                q, k, v = (shaped(dtype, BATCH, TOKENS, HEADS, dim) for _ in range(3))
                beta = shaped(dtype, BATCH, TOKENS, HEADS)
                mine = stages.begin(q, k, v, beta, gates(kind, dim), starts, scale=0.1)
                stages.transition(mine)
                staged(stages, mine)

            work = roofline.delta(BATCH, TOKENS, HEADS, dim, dim, dtype.itemsize, gates=kind)
            quick = is_quick(kind, dim, dtype, starts)
            yield Case("delta_rule", name_of(kind, dim, dtype, starts), run, work, quick)


def scans() -> Iterator[Case]:
    from seqpar.ops.diagonal_scan import DiagonalScan, SelectiveScan

    wide = (BATCH, TOKENS, CHANNELS)
    for dtype in DTYPES:
        for starts in ((), STARTS):

            def diagonal(dtype: torch.dtype = dtype, starts: Starts = starts) -> None:
                op = DiagonalScan("triton")
                staged(op, op.begin((shaped(torch.float32, *wide), shaped(dtype, *wide)), (), starts))

            work = roofline.diagonal(BATCH, TOKENS, CHANNELS, 1, dtype.itemsize)
            quick, name = dtype == torch.bfloat16 and not starts, name_of("diagonal", 1, dtype, starts)
            yield Case("diagonal_scan", name, diagonal, work, quick)
            for states in (1, 16, 64, 128):

                def selective(dtype: torch.dtype = dtype, starts: Starts = starts, states: int = states) -> None:
                    narrow, op = shaped(dtype, BATCH, TOKENS, states), SelectiveScan("triton")
                    tokens = (shaped(dtype, *wide), shaped(torch.float32, *wide), narrow, narrow)
                    staged(op, op.begin(tokens, (shaped(torch.float32, CHANNELS, states),), starts))

                work = roofline.diagonal(BATCH, TOKENS, CHANNELS, states, dtype.itemsize)
                name = name_of("selective", states, dtype, starts)
                yield Case("diagonal_scan", name, selective, work, quick and states == 16)


def configurations() -> Iterator[tuple[int, torch.dtype, Starts]]:
    """Head dims, dtypes and documents of recurrences."""
    for dim in DIMS:
        for dtype in DTYPES:
            yield from ((dim, dtype, starts) for starts in (((), STARTS) if dim == 64 else ((),)))


def name_of(kind: str, dim: int, dtype: torch.dtype, starts: Starts) -> str:
    return f"{kind} {dim} {label(dtype)}{' documents' if starts else ''}"


def is_quick(kind: str, dim: int, dtype: torch.dtype, starts: Starts) -> bool:
    return (kind, dim) in QUICK and dtype == torch.bfloat16 and not starts


def gates(kind: str, dim: int) -> Tensor | None:
    shape = {"constant": (HEADS,), "scalar": (BATCH, TOKENS, HEADS), "vector": (BATCH, TOKENS, HEADS, dim)}.get(kind)
    return None if shape is None else shaped(torch.float32, *shape)


def staged(stages: Any, run: Any) -> None:
    """All stages after the first, with an incoming state and a gradient of the final one."""
    state, d_final = torch.empty_like(run.outgoing), torch.empty_like(run.outgoing)
    out = stages.finish(run, stages.intra(run), state)
    adjoint = stages.begin_backward(run, torch.empty_like(out), state)
    adjoint.outgoing  # some ops compute it when it is asked for  # noqa: B018
    stages.finish_backward(run, adjoint, stages.intra_backward(run, adjoint), d_final)


def softmax() -> Iterator[Case]:
    from seqpar.ops.softmax_block.bands import Band

    masks = {"causal": Band(high=0), "window": Band(low=-512, high=0), "all": Band()}
    for kind, mask in masks.items():
        for dim in DIMS if kind == "causal" else (64,):
            for dtype in DTYPES:
                for group in (1, 4) if dim == 64 and kind == "causal" else (1,):
                    name = f"{kind} {dim} {label(dtype)}{f' {group} queries per key' if group > 1 else ''}"
                    quick = kind == "causal" and dim in (64, 128) and dtype == torch.bfloat16 and group == 1
                    work = roofline.softmax(BATCH, TOKENS, HEADS, dim, dtype.itemsize, visible=visible(kind))
                    yield Case("softmax_block", name, softmax_run(mask, dim, dtype, group), work, quick)


def visible(kind: str) -> float:
    return {"causal": (TOKENS + 1) / 2, "window": 513 - 512 * 513 / 2 / TOKENS, "all": TOKENS}[kind]


def softmax_run(mask: Any, dim: int, dtype: torch.dtype, group: int) -> Callable[[], Any]:
    forward = importlib.import_module("seqpar.ops.softmax_block.kernel")
    name = "seqpar.ops.softmax_block.kernel_backward"
    backward = importlib.import_module(name) if importlib.util.find_spec(name) else None

    def run() -> None:
        q, d_out = (shaped(dtype, BATCH, TOKENS, HEADS, dim) for _ in range(2))
        k, v = (shaped(dtype, BATCH, TOKENS, HEADS // group, dim) for _ in range(2))
        out, lse = forward.attend(q, k, v, mask, 0.1)
        if backward is not None:
            backward.attend_backward(d_out, q, k, v, out, lse, mask, 0.1)

    return run


BUILDERS: dict[str, Callable[[], Iterator[Case]]] = {
    "decayed_linear_attention": decayed,
    "delta_rule": delta,
    "diagonal_scan": scans,
    "softmax_block": softmax,
}
ENTRIES = {
    "decayed_linear_attention": "stages",
    "delta_rule": "stages",
    "diagonal_scan": "kernel_selective",
    "softmax_block": "kernel_backward",
}
