"""The diagonal scan in Triton: the same passes over the tokens as ``reference.py``.

A program takes some channels of one chunk and goes from token to token with the state in registers, so no quotient and
no difference of logarithms is formed. It loads some tokens at once before it needs the first: that hides the latency.
Complex numbers lie as pairs of real ones; their decays come ready made, as sine and cosine are precise in torch only.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar.ops import launch
from seqpar.ops.diagonal_scan.tiles import Cut, Tile, diagonal_tile, marks, state_dtype


@triton.jit
def both(mask, here):
    """A mask, where ``here`` is true; ``mask & here`` is a number in the interpreter of Triton 3.9."""
    return tl.where(here, mask, False)


@triton.jit
def load_rows(rows, at, step, first, T, mask, other, dtype: tl.constexpr, STEPS: tl.constexpr):
    """Consecutive rows from ``first`` on, as a tuple; ``other`` beyond the last token."""
    found = ()
    for u in tl.static_range(STEPS):
        row = tl.load(rows + at + u * step, mask=both(mask, first + u < T), other=other)
        found = found + (row.to(dtype),)  # type: ignore[assignment]  # noqa: RUF005 (no stars in Triton)
    return found


@triton.jit
def load_passes(fresh, first, T, STEPS: tl.constexpr):
    """Of each row whether a state passes through it: not where a document starts."""
    found = ()
    for u in tl.static_range(STEPS):
        passes = tl.load(fresh + first + u, mask=first + u < T, other=0) == 0
        found = found + (passes,)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def load_decays(
    gates, fresh, at, step, first, T, mask, dtype: tl.constexpr,
    STEPS: tl.constexpr, COMPLEX: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """What multiplies the state at each row, real and imaginary parts."""
    real = load_rows(gates, at, step, first, T, mask, 1.0 if COMPLEX else 0.0, dtype, STEPS)
    imag = real
    if COMPLEX:
        imag = load_rows(gates, at + 1, step, first, T, mask, 0.0, dtype, STEPS)
    if STARTS:
        passes = load_passes(fresh, first, T, STEPS)
    reals, imags = (), ()
    for u in tl.static_range(STEPS):
        a, a_imag = real[u], imag[u]
        if not COMPLEX:
            a = tl.exp(a)
        if STARTS:
            a, a_imag = tl.where(passes[u], a, 0.0), tl.where(passes[u], a_imag, 0.0)
        reals, imags = reals + (a,), imags + (a_imag,)  # type: ignore[assignment]  # noqa: RUF005
    return reals, imags


@triton.jit
def load_numbers(
    x, at, step, first, T, mask, dtype: tl.constexpr, STEPS: tl.constexpr, COMPLEX: tl.constexpr
):  # fmt: skip
    """Rows of ``x``, real and imaginary parts (real parts twice, if it is real)."""
    real = load_rows(x, at, step, first, T, mask, 0.0, dtype, STEPS)
    imag = real
    if COMPLEX:
        imag = load_rows(x, at + 1, step, first, T, mask, 0.0, dtype, STEPS)
    return real, imag


@triton.jit
def multiply(a, a_imag, h, h_imag, COMPLEX: tl.constexpr):
    """``a h``; imaginary parts mean nothing if numbers are real."""
    if COMPLEX:
        real, imag = a * h - a_imag * h_imag, a * h_imag + a_imag * h
    else:
        real, imag = a * h, h_imag
    return real, imag


@triton.jit
def store_number(out, at, real, imag, mask, COMPLEX: tl.constexpr):
    tl.store(out + at, real.to(out.dtype.element_ty), mask=mask)
    if COMPLEX:
        tl.store(out + at + 1, imag.to(out.dtype.element_ty), mask=mask)


@triton.jit
def place(T, D, CHUNK: tl.constexpr, BLOCK: tl.constexpr, COMPLEX: tl.constexpr, REVERSE: tl.constexpr):
    """My batch entry, first row, number of rows, first row in memory, direction, channels, their mask, my states."""
    batch, row = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64) * CHUNK
    channel = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    numbers: tl.constexpr = 2 if COMPLEX else 1
    state = ((batch * tl.num_programs(0) + tl.program_id(0)) * D + channel) * numbers
    memory, direction = row, 1
    if REVERSE:
        memory, direction = T - 1 - row, -1
    rows = tl.minimum(T - row, CHUNK)
    return batch, row, rows, memory, direction, channel * numbers, channel < D, state


@triton.jit
def summary_kernel(
    gates, x, fresh, left, T, D, gates_batch, gates_row, x_batch, x_row,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    COMPLEX: tl.constexpr, STARTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state that leaves each chunk if none enters it."""
    batch, row, rows, memory, way, channel, mask, state = place(T, D, CHUNK, BLOCK, COMPLEX, REVERSE)
    dtype: tl.constexpr = left.dtype.element_ty
    gates_at, x_at = batch * gates_batch + memory * gates_row + channel, batch * x_batch + memory * x_row + channel
    h = tl.zeros([BLOCK], dtype=dtype)
    h_imag = h
    for i in range(0, rows, STEPS):
        a, a_imag = load_decays(
            gates, fresh, gates_at + i * way * gates_row, way * gates_row, row + i, T, mask, dtype,
            STEPS, COMPLEX, STARTS,
        )  # fmt: skip
        v, v_imag = load_numbers(x, x_at + i * way * x_row, way * x_row, row + i, T, mask, dtype, STEPS, COMPLEX)
        for u in tl.static_range(STEPS):
            h, h_imag = multiply(a[u], a_imag[u], h, h_imag, COMPLEX)
            h, h_imag = h + v[u], h_imag + v_imag[u]
    store_number(left, state, h, h_imag, mask, COMPLEX)


@triton.jit
def replay_kernel(
    gates, x, fresh, entering, out, T, D, gates_batch, gates_row, x_batch, x_row, out_batch, out_row,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    COMPLEX: tl.constexpr, STARTS: tl.constexpr, REVERSE: tl.constexpr, DECAYED: tl.constexpr,
):  # fmt: skip
    """Every state, from those that enter the chunks; DECAYED: without what its own token adds."""
    batch, row, rows, memory, way, channel, mask, state = place(T, D, CHUNK, BLOCK, COMPLEX, REVERSE)
    dtype: tl.constexpr = entering.dtype.element_ty
    gates_at, x_at = batch * gates_batch + memory * gates_row + channel, batch * x_batch + memory * x_row + channel
    out_at = batch * out_batch + memory * out_row + channel
    h = tl.load(entering + state, mask=mask, other=0.0)
    h_imag = h
    if COMPLEX:
        h_imag = tl.load(entering + state + 1, mask=mask, other=0.0)
    for i in range(0, rows, STEPS):
        a, a_imag = load_decays(
            gates, fresh, gates_at + i * way * gates_row, way * gates_row, row + i, T, mask, dtype,
            STEPS, COMPLEX, STARTS,
        )  # fmt: skip
        v, v_imag = load_numbers(x, x_at + i * way * x_row, way * x_row, row + i, T, mask, dtype, STEPS, COMPLEX)
        for u in tl.static_range(STEPS):
            there, at = both(mask, row + i + u < T), out_at + (i + u) * way * out_row
            h, h_imag = multiply(a[u], a_imag[u], h, h_imag, COMPLEX)
            if DECAYED:
                store_number(out, at, h, h_imag, there, COMPLEX)
            h, h_imag = h + v[u], h_imag + v_imag[u]
            if not DECAYED:
                store_number(out, at, h, h_imag, there, COMPLEX)


@triton.jit
def back_summary_kernel(
    gates, d_out, fresh, entered, T, D, gates_batch, gates_row, d_batch, d_row,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    COMPLEX: tl.constexpr, STARTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The gradient of the state that enters each chunk, if that of the one that leaves it is zero."""
    batch, row, rows, memory, way, channel, mask, state = place(T, D, CHUNK, BLOCK, COMPLEX, REVERSE)
    dtype: tl.constexpr = entered.dtype.element_ty
    gates_at, d_at = batch * gates_batch + memory * gates_row + channel, batch * d_batch + memory * d_row + channel
    g = tl.zeros([BLOCK], dtype=dtype)
    g_imag = g
    for done in range(0, rows, STEPS):
        i = (rows - 1) // STEPS * STEPS - done
        a, a_imag = load_decays(
            gates, fresh, gates_at + i * way * gates_row, way * gates_row, row + i, T, mask, dtype,
            STEPS, COMPLEX, STARTS,
        )  # fmt: skip
        d, d_imag = load_numbers(d_out, d_at + i * way * d_row, way * d_row, row + i, T, mask, dtype, STEPS, COMPLEX)
        for u in tl.static_range(STEPS - 1, -1, -1):
            g, g_imag = multiply(a[u], -a_imag[u], g + d[u], g_imag + d_imag[u], COMPLEX)
    store_number(entered, state, g, g_imag, mask, COMPLEX)


@triton.jit
def gradient_kernel(
    gates, d_out, fresh, leaving, d_gates, d_x, T, D, gates_batch, gates_row, d_batch, d_row, out_batch, out_row,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    COMPLEX: tl.constexpr, STARTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The gradient of every state, which is that of x, and of log_a; there the decayed states lie on entry."""
    batch, row, rows, memory, way, channel, mask, state = place(T, D, CHUNK, BLOCK, COMPLEX, REVERSE)
    dtype: tl.constexpr = leaving.dtype.element_ty
    gates_at, d_at = batch * gates_batch + memory * gates_row + channel, batch * d_batch + memory * d_row + channel
    out_at = batch * out_batch + memory * out_row + channel
    g = tl.load(leaving + state, mask=mask, other=0.0)
    g_imag = g
    if COMPLEX:
        g_imag = tl.load(leaving + state + 1, mask=mask, other=0.0)
    for done in range(0, rows, STEPS):
        i = (rows - 1) // STEPS * STEPS - done
        out_step, first = way * out_row, out_at + i * way * out_row
        a, a_imag = load_decays(
            gates, fresh, gates_at + i * way * gates_row, way * gates_row, row + i, T, mask, dtype,
            STEPS, COMPLEX, STARTS,
        )  # fmt: skip
        d, d_imag = load_numbers(d_out, d_at + i * way * d_row, way * d_row, row + i, T, mask, dtype, STEPS, COMPLEX)
        h, h_imag = load_numbers(d_gates, first, out_step, row + i, T, mask, dtype, STEPS, COMPLEX)
        for u in tl.static_range(STEPS - 1, -1, -1):
            there, at = both(mask, row + i + u < T), first + u * out_step
            g, g_imag = g + d[u], g_imag + d_imag[u]
            store_number(d_x, at, g, g_imag, there, COMPLEX)
            d_gate, d_gate_imag = multiply(h[u], -h_imag[u], g, g_imag, COMPLEX)
            store_number(d_gates, at, d_gate, d_gate_imag, there, COMPLEX)
            g, g_imag = multiply(a[u], -a_imag[u], g, g_imag, COMPLEX)


@dataclass(frozen=True)
class Work:
    """What the kernels read: ``gates`` [b or 1, t, d] (logarithms; the decays themselves, if complex), ``x``
    [b, t, d], both as real numbers; ``fresh`` marks rows at which a document starts."""

    gates: Tensor
    x: Tensor
    fresh: Tensor | None
    cut: Cut
    tile: Tile
    dtype: torch.dtype
    complex: bool


def chunk_of(x: Tensor, tokens: int) -> int:
    """How many tokens a chunk has."""
    return diagonal_tile(launch.architecture(x)).chunk


def prepare(log_a: Tensor, x: Tensor, cut: Cut) -> Work:
    """``log_a`` [b or 1, t, d] (real or complex) and ``x`` [b, t, d], ready for the kernels."""
    gates, tile = log_a, diagonal_tile(launch.architecture(x), x.is_complex())
    if x.is_complex():
        gates = log_a[:, :1] if log_a.stride(1) == 0 else log_a  # one for all tokens
        gates = torch.exp(gates.to(x.dtype)).expand_as(log_a)
    return Work(_real(gates), _real(x), marks(cut, x), cut, tile, state_dtype(x), x.is_complex())


def summaries(work: Work) -> Tensor:
    """The state that leaves each chunk if none enters it."""
    left = _states(work)
    _launch(summary_kernel, work, (work.x, work.fresh, left), (work.x,), {})
    return _whole(left, work)


def replay(work: Work, entering: Tensor) -> Tensor:
    """Every ``h_t`` [b, t, d], from the states that enter the chunks."""
    out = torch.empty_like(work.x, memory_format=torch.contiguous_format)
    _replay(work, entering, out, decayed=False)
    return _whole(out, work)


def summaries_back(work: Work, d_out: Tensor) -> Tensor:
    """The gradient of the state that enters each chunk, if that of the one that leaves it is zero."""
    entered, d_out = _states(work), _real(d_out)
    _launch(back_summary_kernel, work, (d_out, work.fresh, entered), (d_out,), {})
    return _whole(entered, work)


def gradients(work: Work, d_out: Tensor, entering: Tensor, d_leaving: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``log_a`` (in the dtype of states, for each batch entry) and ``x``, [b, t, d]."""
    d_x = torch.empty_like(work.x, memory_format=torch.contiguous_format)
    d_gates = torch.empty_like(d_x, dtype=work.dtype.to_real())
    _replay(work, entering, d_gates, decayed=True)
    d_out, leaving = _real(d_out), _real(d_leaving.contiguous())
    _launch(gradient_kernel, work, (d_out, work.fresh, leaving, d_gates, d_x), (d_out, d_x), {})
    return _whole(d_gates, work), _whole(d_x, work)


def _replay(work: Work, entering: Tensor, out: Tensor, decayed: bool) -> None:
    states = _real(entering.contiguous())
    _launch(replay_kernel, work, (work.x, work.fresh, states, out), (work.x, out), {"DECAYED": decayed})


def _launch(
    kernel: Any, work: Work, tensors: tuple[Tensor | None, ...], strided: tuple[Tensor, ...], constants: dict[str, bool]
) -> None:
    """Start ``kernel`` with a program for each chunk, block of channels and batch entry; strides are passed on."""
    batch, tokens, channels = work.x.shape[:3]
    strides = [0 if work.gates.shape[0] == 1 else work.gates.stride(0), work.gates.stride(1)]
    for x in strided:
        strides += [x.stride(0), x.stride(1)]
    pointers = (work.gates if x is None else x for x in tensors)  # something must stand where no mark is read
    tile = work.tile
    launch.launch(
        kernel, (work.cut.num_chunks, triton.cdiv(channels, tile.block), batch), work.gates, *pointers,
        tokens, channels, *strides, CHUNK=tile.chunk, BLOCK=tile.block, STEPS=tile.steps, COMPLEX=work.complex,
        STARTS=work.fresh is not None, REVERSE=work.cut.reverse, num_warps=tile.warps, **constants,
    )  # fmt: skip


def _states(work: Work) -> Tensor:
    shape = (work.x.shape[0], work.cut.num_chunks, *work.x.shape[2:])
    return torch.empty(shape, dtype=work.dtype.to_real(), device=work.x.device)


def _real(x: Tensor) -> Tensor:
    """With neighbouring channels next to each other; complex numbers as pairs."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _whole(x: Tensor, work: Work) -> Tensor:
    return torch.view_as_complex(x) if work.complex else x
