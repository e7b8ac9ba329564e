"""Recurrent cells in Triton, backwards: the gradient of the state goes back through the steps of one head.

Gates are not computed again: forward noted them. What is left is the gradient of every gate, whose product with the
outputs of the step before is the gradient of the matrix, one product for all steps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar.ops import launch
from seqpar.ops.recurrent_cell.kernel import (
    constants,
    grid,
    load_parts,
    load_slice,
    load_weights,
    log_sigmoid,
    product,
    tanh,
)


@triton.jit
def retreat_slstm(notes, before, c, n, m, dh, dc, dn, dm):
    """Gradients of the gates and of ``c``, ``n`` and ``m`` before a step: as autograd takes them, through ``m``."""
    i, f, z, o = notes
    n = tl.maximum(n, 1.0)  # as it is, but where there is no channel
    new, faded, so, tz = before[2] == 0, log_sigmoid(f) + before[3], tl.sigmoid(o), tanh(z)
    add, keep = tl.exp(i - m), tl.where(new, 0.0, tl.exp(tl.where(new, 0.0, faded - m)))
    d_o = dh * c / n * so * (1 - so)
    dc += dh * so / n
    dn = tl.where(keep * before[2] + add >= 1, dn - dh * so * c / (n * n), 0.0)
    d_z = dc * add * (1 - tz * tz)
    d_add, d_keep = (dc * tz + dn) * add, (dc * before[1] + dn * before[2]) * keep
    dm = dm - d_add - d_keep
    share = tl.where(new | (i > faded), 1.0, tl.where(i == faded, 0.5, 0.0)).to(i.dtype)  # of a maximum's gradient
    d_faded = tl.where(new, 0.0, d_keep + (1 - share) * dm)
    return (d_add + share * dm, d_faded * tl.sigmoid(-f), d_z, d_o), dc * keep, dn * keep, d_faded


@triton.jit
def retreat(notes, before, h, c, n, m, dh, dc, dn, dm, KIND: tl.constexpr):
    """Gradients of the gates (of a GRU also of its driven candidate), and those of the state before the step, without
    what the gates add to that of ``h``."""
    straight = tl.zeros_like(dh)
    if KIND == "elman":
        grads = (dh * (1 - h * h),)
    elif KIND == "gru":
        r, u = tl.sigmoid(notes[0]), tl.sigmoid(notes[1])
        new = tanh(notes[2] + r * notes[3])
        d_new = dh * (1 - u) * (1 - new * new)
        grads = (d_new * notes[3] * r * (1 - r), dh * (before[0] - new) * u * (1 - u), d_new * r, d_new)  # type: ignore[assignment]
        straight = dh * u
    elif KIND == "lstm":
        i, f, z, o, tc = tl.sigmoid(notes[0]), tl.sigmoid(notes[1]), tanh(notes[2]), tl.sigmoid(notes[3]), tanh(c)
        dc += dh * o * (1 - tc * tc)
        grads = (dc * z * i * (1 - i), dc * before[1] * f * (1 - f), dc * i * (1 - z * z), dh * tc * o * (1 - o))  # type: ignore[assignment]
        dc *= f
    else:
        grads, dc, dn, dm = retreat_slstm(notes, before, c, n, m, dh, dc, dn, dm)
    return grads, straight, dc, dn, dm


@triton.jit
def gather_products(
    dh, grads, step, count, low, D, weights,
    ROWS: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """What all gates add to the gradient of the output that they read."""
    for gate in tl.static_range(GATES):
        dh = product(load_slice(grads, step, count, low, D, ROWS, SLICE), weights[gate], dh, PRECISION)
        grads += D
    return dh


@triton.jit(do_not_specialize=["n_rows", "steps"])
def backward_kernel(
    notes, matrix, states, d_out, d_final, d_gates, d_initial, n_rows, steps, D, H,
    KIND: tl.constexpr, GATES: tl.constexpr, STATES: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``d_gates`` like ``notes``, ``d_final`` and ``d_initial [states, n, h, d]``, the rest as forwards."""
    dtype: tl.constexpr = states.dtype.element_ty
    first, head, rows, columns = tl.program_id(0) * ROWS, tl.program_id(1), tl.arange(0, ROWS), tl.arange(0, WIDTH)
    one, step, count = H * D, n_rows.to(tl.int64) * (H * D), n_rows - first
    every, mask, place = step * (steps + 1), (rows < count)[:, None] & (columns < D)[None, :], first * one + head * D
    state_at, notes_at = rows[:, None] * one + columns[None, :], rows[:, None] * one * SLOTS + columns[None, :]
    states, d_out, matrix = states + place + step * steps, d_out + place + step * steps, matrix + head * D * D * GATES
    notes, d_gates = notes + (place + step * steps) * SLOTS, d_gates + (place + step * steps) * SLOTS
    leaving = load_parts(states, state_at, every, mask, dtype, STATES)
    given = load_parts(d_final + place, state_at, step, mask, dtype, STATES)
    h, c, n, m, dh, dc, dn, dm = leaving[0], leaving[0], leaving[0], leaving[0], given[0], given[0], given[0], given[0]
    if STATES > 1:
        c, dc = leaving[1], given[1]
    if STATES > 2:
        n, m, dn, dm = leaving[2], leaving[3], given[2], given[3]
    if SLICE >= WIDTH:
        weights = load_weights(matrix, 0, D, D, D * D, WIDTH, SLICE, GATES)
    for _ in range(steps):
        states, d_out, notes, d_gates = states - step, d_out - step, notes - step * SLOTS, d_gates - step * SLOTS
        noted = load_parts(notes, notes_at, D, mask, dtype, SLOTS)
        before = load_parts(states, state_at, every, mask, dtype, STATES)
        dh += tl.load(d_out + state_at, mask=mask, other=0.0).to(dtype)
        grads, dh, dc, dn, dm = retreat(noted, before, h, c, n, m, dh, dc, dn, dm, KIND)
        for slot in tl.static_range(SLOTS):
            tl.store(d_gates + slot * D + notes_at, grads[slot], mask=mask)
        tl.debug_barrier()  # gradients are read by other threads than wrote them
        if SLICE >= WIDTH:
            dh = gather_products(dh, d_gates, one * SLOTS, count, 0, D, weights, ROWS, SLICE, PRECISION, GATES)
        else:
            for low in range(0, D, SLICE):
                part = load_weights(matrix, low, D, D, D * D, WIDTH, SLICE, GATES)
                dh = gather_products(dh, d_gates, one * SLOTS, count, low, D, part, ROWS, SLICE, PRECISION, GATES)
        h = before[0]
        if STATES > 1:
            c = before[1]
        if STATES > 2:
            n, m = before[2], before[3]
    initial = d_initial + place + state_at
    tl.store(initial, dh, mask=mask)
    if STATES > 1:
        tl.store(initial + step, dc, mask=mask)
    if STATES > 2:
        tl.store(initial + 2 * step, dn, mask=mask)
        tl.store(initial + 3 * step, dm, mask=mask)


def backward(
    kind: str, notes: Tensor, matrix: Tensor, states: Tensor, d_out: Tensor, d_final: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of what forward noted, ``[t, n, h, slots * d]``, and of the states that entered; ``d_out [t, n, h,
    d]``."""
    steps, rows, heads, dim = d_out.shape
    d_gates, d_initial = torch.empty_like(notes), torch.empty_like(d_final)
    launch.launch(
        backward_kernel, grid(rows, heads), notes, matrix.contiguous(), states, d_out.contiguous(),
        d_final.contiguous(), d_gates, d_initial, rows, steps, dim, heads, **constants(kind, matrix),
    )  # fmt: skip
    return d_gates, d_initial
