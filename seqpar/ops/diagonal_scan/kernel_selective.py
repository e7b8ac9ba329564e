"""The selective scan in Triton: the same passes over the tokens as ``selective.py``.

A program takes some channels of one chunk, with all their states in registers, and goes from token to token. Backward
first walks the chunk once to note the state at every few tokens; from there, last ones first, it computes those states
again and keeps them in registers while it walks back. What is summed over channels (gradients of B and C) or tokens
(that of A) is written as parts and summed in torch, so results do not depend on the order in which programs run.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar.ops import launch
from seqpar.ops.diagonal_scan.kernel import both, load_passes, load_rows
from seqpar.ops.diagonal_scan.tiles import Cut, Tile, marks, selective_tile, state_dtype


@triton.jit
def place(T, D, N, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, REVERSE: tl.constexpr):
    """My first row, number of rows, direction, and offsets and masks: of channels, of states, of a matrix of both."""
    batch, row = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64) * CHUNK
    channel, n = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    memory, direction = row, 1
    if REVERSE:
        memory, direction = T - 1 - row, -1
    token = batch * T + memory
    matrix, there = channel[:, None] * N + n[None, :], (channel < D)[:, None] & (n < N)[None, :]
    rows = tl.minimum(T - row, CHUNK)
    return row, rows, direction, token * D + channel, channel < D, token * N + n, n < N, matrix, there


@triton.jit
def state_of(D, N):
    """Where the states of my chunk begin."""
    return (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * D * N


@triton.jit
def decay(rates, delta, passes, STARTS: tl.constexpr):
    a = tl.exp(delta[:, None] * rates)
    if STARTS:
        a = tl.where(passes, a, 0.0)
    return a


@triton.jit
def passing(fresh, first, T, STEPS: tl.constexpr, STARTS: tl.constexpr):
    """Of each row whether a state passes through it; anything, if all do."""
    return load_passes(fresh, first, T, STEPS) if STARTS else (0,) * STEPS


@triton.jit
def summary_kernel(
    rates, u, delta, keys, fresh, left, T, D, N,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr,
    STARTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state that leaves each chunk if none enters it."""
    row, rows, way, wide, channels, narrow, ns, matrix, there = place(T, D, N, CHUNK, BLOCK, STATES, REVERSE)
    dtype: tl.constexpr = left.dtype.element_ty
    a_rates = tl.load(rates + matrix, mask=there, other=0.0).to(dtype)
    h = tl.zeros([BLOCK, STATES], dtype=dtype)
    for i in range(0, rows, STEPS):
        steps = load_rows(delta, wide + i * way * D, way * D, row + i, T, channels, 0.0, dtype, STEPS)
        us = load_rows(u, wide + i * way * D, way * D, row + i, T, channels, 0.0, dtype, STEPS)
        ks = load_rows(keys, narrow + i * way * N, way * N, row + i, T, ns, 0.0, dtype, STEPS)
        passes = passing(fresh, row + i, T, STEPS, STARTS)
        for s in tl.static_range(STEPS):
            h = decay(a_rates, steps[s], passes[s], STARTS) * h + (steps[s] * us[s])[:, None] * ks[s][None, :]
    tl.store(left + state_of(D, N) + matrix, h, mask=there)


@triton.jit
def replay_kernel(
    rates, u, delta, keys, queries, fresh, entering, out, T, D, N,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr,
    STARTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Every output, from the states that enter the chunks."""
    row, rows, way, wide, channels, narrow, ns, matrix, there = place(T, D, N, CHUNK, BLOCK, STATES, REVERSE)
    dtype: tl.constexpr = entering.dtype.element_ty
    a_rates = tl.load(rates + matrix, mask=there, other=0.0).to(dtype)
    h = tl.load(entering + state_of(D, N) + matrix, mask=there, other=0.0)
    for i in range(0, rows, STEPS):
        steps = load_rows(delta, wide + i * way * D, way * D, row + i, T, channels, 0.0, dtype, STEPS)
        us = load_rows(u, wide + i * way * D, way * D, row + i, T, channels, 0.0, dtype, STEPS)
        ks = load_rows(keys, narrow + i * way * N, way * N, row + i, T, ns, 0.0, dtype, STEPS)
        qs = load_rows(queries, narrow + i * way * N, way * N, row + i, T, ns, 0.0, dtype, STEPS)
        passes = passing(fresh, row + i, T, STEPS, STARTS)
        for s in tl.static_range(STEPS):
            h = decay(a_rates, steps[s], passes[s], STARTS) * h + (steps[s] * us[s])[:, None] * ks[s][None, :]
            y = tl.sum(h * qs[s][None, :], 1)
            tl.store(out + wide + (i + s) * way * D, y.to(out.dtype.element_ty), mask=both(channels, row + i + s < T))


@triton.jit
def back_summary_kernel(
    rates, delta, queries, d_out, fresh, entered, T, D, N,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr,
    STARTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The gradient of the state that enters each chunk, if that of the one that leaves it is zero."""
    row, rows, way, wide, channels, narrow, ns, matrix, there = place(T, D, N, CHUNK, BLOCK, STATES, REVERSE)
    dtype: tl.constexpr = entered.dtype.element_ty
    a_rates = tl.load(rates + matrix, mask=there, other=0.0).to(dtype)
    g = tl.zeros([BLOCK, STATES], dtype=dtype)
    for done in range(0, rows, STEPS):
        i = (rows - 1) // STEPS * STEPS - done
        steps = load_rows(delta, wide + i * way * D, way * D, row + i, T, channels, 0.0, dtype, STEPS)
        ds = load_rows(d_out, wide + i * way * D, way * D, row + i, T, channels, 0.0, dtype, STEPS)
        qs = load_rows(queries, narrow + i * way * N, way * N, row + i, T, ns, 0.0, dtype, STEPS)
        passes = passing(fresh, row + i, T, STEPS, STARTS)
        for s in tl.static_range(STEPS - 1, -1, -1):
            g = (g + ds[s][:, None] * qs[s][None, :]) * decay(a_rates, steps[s], passes[s], STARTS)
    tl.store(entered + state_of(D, N) + matrix, g, mask=there)


@triton.jit
def gradient_kernel(
    rates, u, delta, keys, queries, d_out, fresh, entering, leaving, notes,
    d_u, d_delta, d_keys, d_queries, d_rates, T, D, N, NOTES,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr,
    STARTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """All gradients; ``notes`` [b, chunks, NOTES, d, n] has room for a state every STEPS tokens."""
    row, rows, way, wide, channels, narrow, ns, matrix, there = place(T, D, N, CHUNK, BLOCK, STATES, REVERSE)
    dtype: tl.constexpr = entering.dtype.element_ty
    state = state_of(D, N)
    a_rates = tl.load(rates + matrix, mask=there, other=0.0).to(dtype)
    h = tl.load(entering + state + matrix, mask=there, other=0.0)
    for i in range(0, rows, STEPS):
        tl.store(notes + state * NOTES + (i // STEPS) * D * N + matrix, h, mask=there)
        steps = load_rows(delta, wide + i * way * D, way * D, row + i, T, channels, 0.0, dtype, STEPS)
        us = load_rows(u, wide + i * way * D, way * D, row + i, T, channels, 0.0, dtype, STEPS)
        ks = load_rows(keys, narrow + i * way * N, way * N, row + i, T, ns, 0.0, dtype, STEPS)
        passes = passing(fresh, row + i, T, STEPS, STARTS)
        for s in tl.static_range(STEPS):
            h = decay(a_rates, steps[s], passes[s], STARTS) * h + (steps[s] * us[s])[:, None] * ks[s][None, :]
    tl.debug_barrier()  # notes are read by other threads than wrote them
    part = tl.program_id(1).to(tl.int64) * tl.num_programs(2) * T * N + narrow
    g = tl.load(leaving + state + matrix, mask=there, other=0.0)
    rate_sums = tl.zeros([BLOCK, STATES], dtype=dtype)
    for done in range(0, rows, STEPS):
        i = (rows - 1) // STEPS * STEPS - done
        h = tl.load(notes + state * NOTES + (i // STEPS) * D * N + matrix, mask=there, other=0.0)
        steps = load_rows(delta, wide + i * way * D, way * D, row + i, T, channels, 0.0, dtype, STEPS)
        us = load_rows(u, wide + i * way * D, way * D, row + i, T, channels, 0.0, dtype, STEPS)
        ds = load_rows(d_out, wide + i * way * D, way * D, row + i, T, channels, 0.0, dtype, STEPS)
        ks = load_rows(keys, narrow + i * way * N, way * N, row + i, T, ns, 0.0, dtype, STEPS)
        qs = load_rows(queries, narrow + i * way * N, way * N, row + i, T, ns, 0.0, dtype, STEPS)
        passes = passing(fresh, row + i, T, STEPS, STARTS)
        states = (h,)
        for s in tl.static_range(STEPS):
            h = decay(a_rates, steps[s], passes[s], STARTS) * h + (steps[s] * us[s])[:, None] * ks[s][None, :]
            states = states + (h,)  # type: ignore[assignment]  # noqa: RUF005
        for s in tl.static_range(STEPS - 1, -1, -1):
            step, here = steps[s][:, None], row + i + s < T
            d_query = tl.sum(states[s + 1] * ds[s][:, None], 0)
            g += ds[s][:, None] * qs[s][None, :]
            d_key = tl.sum(g * (step * us[s][:, None]), 0)
            through = tl.sum(g * ks[s][None, :], 1)
            g *= decay(a_rates, steps[s], passes[s], STARTS)
            d_log = g * states[s]
            d_step = us[s] * through + tl.sum(d_log * a_rates, 1)
            rate_sums += d_log * step
            wide_at, narrow_at = wide + (i + s) * way * D, part + (i + s) * way * N
            tl.store(d_u + wide_at, (steps[s] * through).to(d_u.dtype.element_ty), mask=both(channels, here))
            tl.store(d_delta + wide_at, d_step.to(d_delta.dtype.element_ty), mask=both(channels, here))
            tl.store(d_keys + narrow_at, d_key, mask=both(ns, here))
            tl.store(d_queries + narrow_at, d_query, mask=both(ns, here))
    tl.store(d_rates + state + matrix, rate_sums, mask=there)


@dataclass(frozen=True)
class Work:
    """What the kernels read, contiguous; ``fresh`` marks rows at which a document starts."""

    u: Tensor
    delta: Tensor
    keys: Tensor
    queries: Tensor
    rates: Tensor
    fresh: Tensor | None
    cut: Cut
    tile: Tile
    dtype: torch.dtype


def chunk_of(rates: Tensor, tokens: int) -> int:
    """How many tokens a chunk has."""
    return selective_tile(launch.architecture(rates), rates.shape[1]).chunk


def prepare(u: Tensor, delta: Tensor, keys: Tensor, queries: Tensor, rates: Tensor, cut: Cut) -> Work:
    """The inputs, ready for the kernels; ``keys`` and ``queries`` are B and C, ``rates`` is A."""
    tile = selective_tile(launch.architecture(u), rates.shape[1])
    u, delta, keys, queries, rates = (x.contiguous() for x in (u, delta, keys, queries, rates))
    return Work(u, delta, keys, queries, rates, marks(cut, u), cut, tile, state_dtype(u))


def summaries(work: Work) -> Tensor:
    """The state that leaves each chunk if none enters it."""
    left = _states(work)
    _launch(summary_kernel, work, work.u, work.delta, work.keys, work.fresh, left)
    return left


def replay(work: Work, entering: Tensor) -> Tensor:
    """Every ``y_t`` [b, t, d], from the states that enter the chunks."""
    out, states = torch.empty_like(work.u), entering.contiguous()
    _launch(replay_kernel, work, work.u, work.delta, work.keys, work.queries, work.fresh, states, out)
    return out


def summaries_back(work: Work, d_out: Tensor) -> Tensor:
    """The gradient of the state that enters each chunk, if that of the one that leaves it is zero."""
    entered = _states(work)
    _launch(back_summary_kernel, work, work.delta, work.queries, d_out.contiguous(), work.fresh, entered)
    return entered


def gradients(
    work: Work, d_out: Tensor, entering: Tensor, d_leaving: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, delta, B, C, in their dtypes, and of A."""
    work = replace(work, tile=selective_tile(launch.architecture(work.u), work.rates.shape[1], gradient=True))
    d_rates, notes = _states(work), triton.cdiv(work.tile.chunk, work.tile.steps)
    room = d_rates.new_empty(*d_rates.shape[:2], notes, *d_rates.shape[2:])
    d_u, d_delta = torch.empty_like(work.u), torch.empty_like(work.delta)
    blocks = triton.cdiv(work.u.shape[2], work.tile.block)
    d_keys, d_queries = (work.keys.new_empty(blocks, *work.keys.shape, dtype=work.dtype) for _ in range(2))
    _launch(
        gradient_kernel, work, work.u, work.delta, work.keys, work.queries, d_out.contiguous(), work.fresh,
        entering.contiguous(), d_leaving.contiguous(), room, d_u, d_delta, d_keys, d_queries, d_rates, notes=(notes,),
    )  # fmt: skip
    d_key, d_query = d_keys.sum(0).to(work.keys.dtype), d_queries.sum(0).to(work.queries.dtype)
    return d_u, d_delta, d_key, d_query, d_rates.sum((0, 1))


def _launch(kernel: Any, work: Work, *tensors: Tensor | None, notes: tuple[int, ...] = ()) -> None:
    """Start ``kernel`` with a program for each chunk, block of channels and batch entry."""
    batch, tokens, channels = work.u.shape
    states, tile = work.rates.shape[1], work.tile
    pointers = (work.rates if x is None else x for x in tensors)  # something must stand where no mark is read
    launch.launch(
        kernel, (work.cut.num_chunks, triton.cdiv(channels, tile.block), batch), work.rates, *pointers,
        tokens, channels, states, *notes, CHUNK=tile.chunk, BLOCK=tile.block, STATES=triton.next_power_of_2(states),
        STEPS=tile.steps, STARTS=work.fresh is not None, REVERSE=work.cut.reverse, num_warps=tile.warps,
    )  # fmt: skip


def _states(work: Work) -> Tensor:
    shape = (work.u.shape[0], work.cut.num_chunks, *work.rates.shape)
    return torch.empty(shape, dtype=work.dtype, device=work.u.device)
