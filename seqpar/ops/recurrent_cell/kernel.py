"""Recurrent cells in Triton, forwards: a program takes one head of some documents through all their steps.

What the last output adds to the gates is a product by the head's matrix, which stays in registers or in the nearest
cache; states stay in registers, in fp32. An output is written and read again as the left side of the next product: so
it changes threads. A 16-bit matrix meets it as the sum of two 16-bit numbers, or the rounding of states would add up.
(Poeppel, Beck and Hochreiter 2024, "FlashRNN", arXiv 2412.07752.)
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar.ops import launch
from seqpar.ops.recurrent_cell.reference import KINDS
from seqpar.ops.recurrent_cell.tiles import ROWS, tile_of, width_of

WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))  # the interpreter multiplies the bits of bf16 as integers
SLOTS = {"elman": 1, "gru": 4, "lstm": 4, "slstm": 4}  # what backward reads of a step, in numbers per channel


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def product(x, matrix, total, PRECISION: tl.constexpr):
    """``total + x @ matrix``; ``x`` is as exact as its dtype, also beside 16 bits ("split")."""
    if PRECISION == "split":
        high = x.to(matrix.dtype)
        low = (x - high.to(x.dtype)).to(matrix.dtype)
        if WIDEN:
            high, low, matrix = high.to(tl.float32), low.to(tl.float32), matrix.to(tl.float32)
        total = tl.dot(low, matrix, tl.dot(high, matrix, total))
    else:
        total = tl.dot(x, matrix, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def load_parts(x, at, step, mask, dtype: tl.constexpr, COUNT: tl.constexpr):
    """Gates or states, ``step`` apart, as a tuple."""
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tl.load(x + at, mask=mask, other=0.0).to(dtype),)  # type: ignore[assignment]  # noqa: RUF005 (no stars in Triton)
        x += step
    return found


@triton.jit
def load_weights(matrix, low, D, row, gate, WIDTH: tl.constexpr, SLICE: tl.constexpr, GATES: tl.constexpr):
    """``[SLICE, WIDTH]`` of each gate's matrix, from row ``low`` on; ``row``, ``gate``: from one to the next."""
    rows, columns = tl.arange(0, SLICE), tl.arange(0, WIDTH)
    at, mask = rows[:, None] * row + columns[None, :], (low + rows < D)[:, None] & (columns < D)[None, :]
    return load_parts(matrix + low * row, at, gate, mask, matrix.dtype.element_ty, GATES)


@triton.jit
def load_slice(x, step, count, low, D, ROWS: tl.constexpr, SLICE: tl.constexpr):
    """Columns ``low`` on of ``count`` rows."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, SLICE)
    mask = (rows < count)[:, None] & (low + columns < D)[None, :]
    return tl.load(x + low + rows[:, None] * step + columns[None, :], mask=mask, other=0.0)


@triton.jit
def add_products(sums, x, weights, PRECISION: tl.constexpr, GATES: tl.constexpr):
    found = ()
    for gate in tl.static_range(GATES):
        found = found + (product(x, weights[gate], sums[gate], PRECISION),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def advance(gates, driven, h, c, n, m, KIND: tl.constexpr):
    """The state after a step, whose gates are ``driven`` by the token and together ``gates``."""
    if KIND == "elman":
        h = tanh(gates[0])
    elif KIND == "gru":
        keep = tl.sigmoid(gates[1])
        h = keep * h + (1 - keep) * tanh(driven[2] + tl.sigmoid(gates[0]) * gates[2])
    elif KIND == "lstm":
        c = tl.sigmoid(gates[1]) * c + tl.sigmoid(gates[0]) * tanh(gates[2])
        h = tl.sigmoid(gates[3]) * tanh(c)
    else:
        new, faded = n == 0, log_sigmoid(gates[1]) + m
        m = tl.where(new, gates[0], tl.maximum(gates[0], faded))
        add, keep = tl.exp(gates[0] - m), tl.where(new, 0.0, tl.exp(tl.where(new, 0.0, faded - m)))
        c, n = keep * c + add * tanh(gates[2]), tl.maximum(keep * n + add, 1.0)
        h = tl.sigmoid(gates[3]) * c / n
    return h, c, n, m


@triton.jit(do_not_specialize=["n_rows", "steps"])
def forward_kernel(
    driven, matrix, inside, states, notes, n_rows, steps, D, H,
    KIND: tl.constexpr, GATES: tl.constexpr, STATES: tl.constexpr, SLOTS: tl.constexpr, NOTED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``states [states, t + 1, n, h, d]``, of which the first step is given; ``notes [t, n, h, slots * d]``."""
    dtype: tl.constexpr = states.dtype.element_ty
    first, head, rows, columns = tl.program_id(0) * ROWS, tl.program_id(1), tl.arange(0, ROWS), tl.arange(0, WIDTH)
    one, step, count = H * D, n_rows.to(tl.int64) * (H * D), n_rows - first
    every, mask, place = step * (steps + 1), (rows < count)[:, None] & (columns < D)[None, :], first * one + head * D
    state_at, gates_at = rows[:, None] * one + columns[None, :], rows[:, None] * one * GATES + columns[None, :]
    notes_at = rows[:, None] * one * SLOTS + columns[None, :]
    states, driven, notes = states + place, driven + place * GATES, notes + place * SLOTS
    matrix += head * D * D * GATES
    entering = load_parts(states, state_at, every, mask, dtype, STATES)
    h, c, n, m = entering[0], entering[0], entering[0], entering[0]
    if STATES > 1:
        c = entering[1]
    if STATES > 2:
        n, m = entering[2], entering[3]
    if KIND == "gru":
        within = tl.load(inside + head * D + columns, mask=columns < D, other=0.0).to(dtype)[None, :] + tl.zeros_like(h)
    if SLICE >= WIDTH:
        weights = load_weights(matrix, 0, D, D * GATES, D, WIDTH, SLICE, GATES)
    coming = load_parts(driven, gates_at, D, mask & (steps > 0), dtype, GATES)
    for t in range(steps):
        given, sums = coming, coming
        if KIND == "gru":
            sums = (given[0], given[1], within)
        driven += step * GATES
        coming = load_parts(driven, gates_at, D, mask & (t + 1 < steps), dtype, GATES)
        if SLICE >= WIDTH:
            sums = add_products(sums, load_slice(states, one, count, 0, D, ROWS, SLICE), weights, PRECISION, GATES)
        else:
            for low in range(0, D, SLICE):
                part = load_weights(matrix, low, D, D * GATES, D, WIDTH, SLICE, GATES)
                sums = add_products(sums, load_slice(states, one, count, low, D, ROWS, SLICE), part, PRECISION, GATES)
        h, c, n, m = advance(sums, given, h, c, n, m, KIND)
        states += step
        tl.store(states + state_at, h, mask=mask)
        if STATES > 1:
            tl.store(states + every + state_at, c, mask=mask)
        if STATES > 2:
            tl.store(states + 2 * every + state_at, n, mask=mask)
            tl.store(states + 3 * every + state_at, m, mask=mask)
        if NOTED:
            for gate in tl.static_range(GATES):
                tl.store(notes + (3 if KIND == "gru" and gate == 2 else gate) * D + notes_at, sums[gate], mask=mask)
            if KIND == "gru":
                tl.store(notes + 2 * D + notes_at, given[2], mask=mask)
            notes += step * SLOTS
        tl.debug_barrier()  # the output is read by other threads than wrote it


def precision_of(architecture: str, matrix: Tensor) -> str:
    """How a step multiplies: 16 bits on matrix units, fp32 as three products of TF32 where there are such."""
    if matrix.dtype == torch.bfloat16:
        return "split"
    return "tf32x3" if architecture.startswith("sm_") and matrix.dtype == torch.float32 else "ieee"


def constants(kind: str, matrix: Tensor) -> dict[str, Any]:
    """Of both kernels, for matrices ``[h, gates * d, d]``."""
    where, dim = launch.architecture(matrix), matrix.shape[2]
    tile, width = tile_of(where, matrix.element_size(), dim), width_of(dim)
    return {
        "KIND": kind, "GATES": KINDS[kind].gates, "STATES": KINDS[kind].states, "SLOTS": SLOTS[kind], "ROWS": ROWS,
        "WIDTH": width, "SLICE": min(tile.slice, width), "PRECISION": precision_of(where, matrix),
        "num_warps": tile.warps,
    }  # fmt: skip


def grid(rows: int, heads: int) -> tuple[int, int]:
    return triton.cdiv(rows, ROWS), heads


def forward(
    kind: str, driven: Tensor, matrix: Tensor, inside: Tensor | None, entering: Tensor, noted: bool
) -> tuple[Tensor, Tensor | None]:
    """All states ``[states, t + 1, n, h, d]`` from those that enter, ``[states, n, h, d]``, and what backward reads.
    ``driven [t, n, h, gates * d]``: a step after the other, as programs read them."""
    steps, rows, heads, _ = driven.shape
    dim = matrix.shape[2]
    states = entering.new_empty((len(entering), steps + 1, rows, heads, dim))
    states[:, 0] = entering
    notes = entering.new_empty((steps, rows, heads, SLOTS[kind] * dim)) if noted else None
    launch.launch(
        forward_kernel, grid(rows, heads), driven.contiguous(), matrix.mT.contiguous(),
        matrix if inside is None else inside.contiguous(), states, states if notes is None else notes,
        rows, steps, dim, heads, NOTED=noted, **constants(kind, matrix),
    )  # fmt: skip
    return states, notes
