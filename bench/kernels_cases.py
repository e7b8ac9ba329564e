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
QUICK = (("none", 64), ("scalar", 64), ("scalar", 128), ("vector", 64), ("vector", 128))


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
        for dim in DIMS:
            for dtype in DTYPES:
                for starts in ((), STARTS) if dim == 64 else ((),):
                    name = f"{kind} {dim} {label(dtype)}{' documents' if starts else ''}"
                    quick = (kind, dim) in QUICK and dtype == torch.bfloat16 and not starts
                    work = roofline.linear(BATCH, TOKENS, HEADS, dim, dim, dtype.itemsize, gates=kind)
                    yield Case("decayed_linear_attention", name, decayed_run(stages, kind, dim, dtype, starts), work, quick)


def log_decay_of(kind: str, dim: int) -> Tensor | None:
    shape = {"constant": (HEADS,), "scalar": (BATCH, TOKENS, HEADS), "vector": (BATCH, TOKENS, HEADS, dim)}.get(kind)
    return None if shape is None else shaped(torch.float32, *shape)


def decayed_run(stages: Any, kind: str, dim: int, dtype: torch.dtype, starts: tuple[int, ...]) -> Callable[[], Any]:
    def run() -> None:
        q, k, v, d_o = (shaped(dtype, BATCH, TOKENS, HEADS, dim) for _ in range(4))
        state, d_final = (shaped(torch.float32, BATCH, HEADS, dim, dim) for _ in range(2))
        mine = stages.begin(q, k, v, log_decay_of(kind, dim), starts, scale=0.1)
        stages.finish(mine, stages.intra(mine), state)
        adjoint = stages.begin_backward(mine, d_o, state)
        stages.finish_backward(mine, adjoint, stages.intra_backward(mine, adjoint), d_final)

    return run


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


BUILDERS: dict[str, Callable[[], Iterator[Case]]] = {"decayed_linear_attention": decayed, "softmax_block": softmax}
ENTRIES = {"decayed_linear_attention": "stages", "softmax_block": "kernel_backward"}
