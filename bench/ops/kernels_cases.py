"""Which calls of which ops the compile table looks at: tensors have shapes and no memory (device ``meta``)."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.ops import roofline

BATCH, TOKENS, HEADS = 2, 8192, 16
HALF, FLOAT, BFLOAT = torch.float16, torch.float32, torch.bfloat16
DIMS = {BFLOAT: (64, 128, 256, 60), FLOAT: (64, 256, 60), HALF: (256,)}  # of heads, where tokens have gates
DECAYS = ("none", "constant", "scalar", "vector")
STARTS = (0, 100, 4096)
CHANNELS = 2048
BOTH_DIRECTIONS = ((64, BFLOAT), (256, BFLOAT), (60, BFLOAT), (256, HALF), (64, FLOAT))
CELLS = {BFLOAT: (16, 32, 64, 128, 112), FLOAT: (16, 32, 64, 128, 112)}  # heads of recurrent cells
CELL_KERNELS = ("kernel", "kernel_backward")
Starts = tuple[int, ...]
QUICK = (("none", 64), ("constant", 64), ("scalar", 128), ("vector", 64))


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
    return {BFLOAT: "bf16", HALF: "fp16", FLOAT: "fp32"}[dtype]


def decayed() -> Iterator[Case]:
    for kind in DECAYS:
        for dim, dtype, starts in configurations(kind):

            def run(kind: str = kind, dim: int = dim, dtype: torch.dtype = dtype, starts: Starts = starts) -> None:
                decayed_stages(kind, dim, dtype, starts, reverse=False)

            work = roofline.linear(BATCH, TOKENS, HEADS, dim, dim, dtype.itemsize, gates=kind)
            quick = is_quick(kind, dim, dtype, starts)
            yield Case("decayed_linear_attention", name_of(kind, dim, dtype, starts), run, work, quick)
    for kind in ("scalar", "vector"):
        for dim, dtype in BOTH_DIRECTIONS:

            def both(kind: str = kind, dim: int = dim, dtype: torch.dtype = dtype) -> None:
                decayed_both(kind, dim, dtype)

            work = roofline.linear(BATCH, TOKENS, HEADS, dim, dim, dtype.itemsize, gates=kind, directions=2)
            name = f"{name_of(kind, dim, dtype, ())} both directions"
            yield Case("decayed_linear_attention", name, both, work, (kind, dim, dtype) == ("vector", 64, BFLOAT))

        def back(kind: str = kind) -> None:
            decayed_stages(kind, 64, BFLOAT, STARTS, reverse=True)

        work = roofline.linear(BATCH, TOKENS, HEADS, 64, 64, 2, gates=kind)
        yield Case("decayed_linear_attention", f"{kind} 64 bf16 reverse", back, work, False)


def decayed_stages(kind: str, dim: int, dtype: torch.dtype, starts: Starts, *, reverse: bool) -> None:
    """Also as a run that keeps no states, and with so few heads that the chain is cut into stretches."""
    stages = importlib.import_module("seqpar.ops.decayed_linear_attention.stages")
    q, k, v = (shaped(dtype, BATCH, TOKENS, HEADS, dim) for _ in range(3))
    staged(stages, stages.begin(q, k, v, gates(kind, dim), starts, scale=0.1, reverse=reverse))
    if (kind, dim, dtype, starts) in (("scalar", 64, BFLOAT, ()), ("vector", 64, BFLOAT, ())):
        run = stages.begin(q, k, v, gates(kind, dim), starts, scale=0.1, reverse=reverse, summary_only=True)
        stages.finish(run, stages.intra(run), torch.empty_like(run.outgoing))


def decayed_both(kind: str, dim: int, dtype: torch.dtype) -> None:
    module = importlib.import_module("seqpar.ops.decayed_linear_attention.bidirectional")
    q, k, v = (shaped(dtype, BATCH, TOKENS, HEADS, dim).requires_grad_() for _ in range(3))
    forth, back = gates(kind, dim), gates(kind, dim)
    assert forth is not None and back is not None
    out = module.bidirectional(q, k, v, forth.requires_grad_(), back.requires_grad_(), STARTS, 0.1)
    out.backward(torch.empty_like(out))


def delta() -> Iterator[Case]:
    stages = importlib.import_module("seqpar.ops.delta_rule.stages")
    for kind in ("none", "scalar", "vector"):
        for dim, dtype, starts in configurations(kind):
            if dtype == HALF:
                continue  # it runs the kernels of fp32

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
    for dtype, starts in ((BFLOAT, ()), (BFLOAT, STARTS), (FLOAT, ())):

        def diagonal(dtype: torch.dtype = dtype, starts: Starts = starts) -> None:
            op = DiagonalScan("triton")
            staged(op, op.begin((shaped(FLOAT, *wide), shaped(dtype, *wide)), (), starts))

        work = roofline.diagonal(BATCH, TOKENS, CHANNELS, 1, dtype.itemsize)
        quick, name = dtype == BFLOAT and not starts, name_of("diagonal", 1, dtype, starts)
        yield Case("diagonal_scan", name, diagonal, work, quick)
        for states in (1, 16, 64, 128) if quick else (16,):

            def selective(dtype: torch.dtype = dtype, starts: Starts = starts, states: int = states) -> None:
                narrow, op = shaped(dtype, BATCH, TOKENS, states), SelectiveScan("triton")
                tokens = (shaped(dtype, *wide), shaped(FLOAT, *wide), narrow, narrow)
                staged(op, op.begin(tokens, (shaped(FLOAT, CHANNELS, states),), starts))

            work = roofline.diagonal(BATCH, TOKENS, CHANNELS, states, dtype.itemsize)
            name = name_of("selective", states, dtype, starts)
            yield Case("diagonal_scan", name, selective, work, quick and states == 16)


def configurations(kind: str) -> Iterator[tuple[int, torch.dtype, Starts]]:
    """Head dims, dtypes and documents of recurrences; what differs in numbers of steps alone makes no binary of its
    own, so fewer are enough where gates do not change with tokens, and in fp32 and fp16."""
    if kind not in ("scalar", "vector"):
        yield 64, BFLOAT, ()
        return
    yield 64, BFLOAT, STARTS
    yield from ((dim, dtype, ()) for dtype, dims in DIMS.items() for dim in dims)


def name_of(kind: str, dim: int, dtype: torch.dtype, starts: Starts) -> str:
    return f"{kind} {dim} {label(dtype)}{' documents' if starts else ''}"


def is_quick(kind: str, dim: int, dtype: torch.dtype, starts: Starts) -> bool:
    return (kind, dim) in QUICK and dtype == BFLOAT and not starts


def gates(kind: str, dim: int) -> Tensor | None:
    shape = {"constant": (HEADS,), "scalar": (BATCH, TOKENS, HEADS), "vector": (BATCH, TOKENS, HEADS, dim)}.get(kind)
    return None if shape is None else shaped(FLOAT, *shape)


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
    causal = [("causal", dim, dtype, 1) for dtype, dims in DIMS.items() for dim in dims]
    others = [("causal", 64, BFLOAT, 4), ("window", 64, BFLOAT, 1), ("all", 64, BFLOAT, 1)]
    for kind, dim, dtype, group in (*causal, *others):
        name = f"{kind} {dim} {label(dtype)}{f' {group} queries per key' if group > 1 else ''}"
        quick = kind == "causal" and dim == 64 and dtype == BFLOAT and group == 1
        work = roofline.softmax(BATCH, TOKENS, HEADS, dim, dtype.itemsize, visible=visible(kind))
        yield Case("softmax_block", name, softmax_run(masks[kind], dim, dtype, group), work, quick)


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


def recurrent() -> Iterator[Case]:
    for kind, (gates, states) in {"elman": (1, 1), "gru": (3, 1), "lstm": (4, 2), "slstm": (4, 4)}.items():
        for dtype, dims in CELLS.items():
            for dim in dims:

                def run(kind: str = kind, dim: int = dim, dtype: torch.dtype = dtype) -> None:
                    recurrent_steps(kind, dim, dtype)

                work = roofline.recurrent(BATCH, TOKENS, HEADS, dim, gates, states, dtype.itemsize)
                quick = (dtype, dim) == (BFLOAT, 64) or (kind, dtype, dim) == ("lstm", BFLOAT, 128)
                yield Case("recurrent_cell", name_of(kind, dim, dtype, ()), run, work, quick)


def recurrent_steps(kind: str, dim: int, dtype: torch.dtype) -> None:
    """Also as a run that keeps nothing for backward."""
    forward, back = (importlib.import_module(f"seqpar.ops.recurrent_cell.{name}") for name in CELL_KERNELS)
    cell = forward.KINDS[kind]
    driven, matrix = shaped(FLOAT, TOKENS, BATCH, HEADS, cell.gates * dim), shaped(dtype, HEADS, cell.gates * dim, dim)
    inside, state = shaped(FLOAT, HEADS, dim), shaped(FLOAT, cell.states, BATCH, HEADS, dim)
    forward.forward(kind, driven, matrix, inside, state, False)
    states, notes = forward.forward(kind, driven, matrix, inside, state, True)
    back.backward(kind, notes, matrix, states, torch.empty_like(states[0, 1:]), torch.empty_like(state))


BUILDERS: dict[str, Callable[[], Iterator[Case]]] = {
    "decayed_linear_attention": decayed,
    "delta_rule": delta,
    "diagonal_scan": scans,
    "recurrent_cell": recurrent,
    "softmax_block": softmax,
}
ENTRIES = {
    "decayed_linear_attention": "stages",
    "delta_rule": "stages",
    "diagonal_scan": "kernel_selective",
    "recurrent_cell": "kernel_backward",
    "softmax_block": "kernel_backward",
}
