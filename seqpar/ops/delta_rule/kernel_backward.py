"""Triton kernels of the delta rule, backward; layout and words as in ``kernel.py``."""

import triton
import triton.language as tl

from seqpar.ops.delta_rule.kernel import (
    decay_pairs,
    load_across,
    load_beta,
    load_chunk,
    load_factor,
    load_state,
    load_tokens,
    product,
    store_chunk,
    store_state,
    store_tokens,
)


@triton.jit
def d_states_kernel(
    q, k, beta, into, out, across, erase, weights, d_out, d_final, d_states, d_written, d_incoming, scale,
    N, T, H, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VECTOR: tl.constexpr, ENTERS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state back through all chunks of a sequence: what enters each, and that of what it wrote."""
    sequence, column = tl.program_id(0), tl.program_id(1) * BV
    work: tl.constexpr = erase.dtype.element_ty
    d_state = tl.zeros([BK, BV], tl.float32)
    if ENTERS:
        d_state += load_state(d_final, sequence, 0, column, K, V, BK, BV)
    for back in range(N):
        n = N - 1 - back
        first, chunk = n * C, sequence.to(tl.int64) * N + n
        store_state(d_states, d_state, chunk, 0, column, K, V, BK, BV)
        d_o = (load_tokens(d_out, sequence, first, T, H, column, V, C, BV) * scale).to(work)
        x_k = load_tokens(k, sequence, first, T, H, 0, K, C, BK) * load_factor(out, chunk, 0, K, C, BK, VECTOR)
        d_write = product(tl.trans(load_chunk(weights, chunk, 0, C, C, C).to(work)), d_o, PRECISION)
        d_write += product(x_k.to(work), d_state.to(work), PRECISION)
        store_chunk(d_written, d_write, chunk, column, V, C, BV)
        x_q = load_tokens(q, sequence, first, T, H, 0, K, C, BK) * load_factor(into, chunk, 0, K, C, BK, VECTOR)
        d_error = (load_beta(beta, sequence, first, T, H, C)[:, None] * d_write).to(work)
        d_state *= load_across(across, chunk, 0, K, BK, VECTOR)
        d_state += product(tl.trans(x_q.to(work)), d_o, PRECISION)
        d_state -= product(tl.trans(load_chunk(erase, chunk, 0, K, C, BK).to(work)), d_error, PRECISION)
    store_state(d_incoming, d_state, sequence, 0, column, K, V, BK, BV)


@triton.jit
def pair_gates(d_pairs, d_in, d_out, C: tl.constexpr):
    """Gradients of a chunk's gates [C], from those of the decays (times decay) between pairs, into and out of tokens.

    A gate gets what passes it. Terms are added and never taken away again: each carries its own decay, and the sum of
    those that passed may be far smaller than that of the others.
    """
    row = tl.arange(0, C)
    passing = tl.cumsum(d_pairs, 0, reverse=True) + d_out[None, :]
    passed = tl.sum(tl.where(row[:, None] > row[None, :], passing, 0.0), 1)
    return passed + tl.sum(tl.where(row[:, None] <= row[None, :], d_in[None, :], 0.0), 1)


@triton.jit
def gradients_kernel(
    q, k, beta, gates, documents, into, out, across, inverse, errors, states, d_out, d_states, d_written,
    dq, dk, dv, d_beta, d_gates, scale, T, H, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens of a chunk, for some key channels; those of beta and gates are sums over programs."""
    n, sequence, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, chunk, column = n * C, sequence.to(tl.int64) * tl.num_programs(0) + n, block * BK
    work: tl.constexpr = errors.dtype.element_ty
    row = tl.arange(0, C)
    strength = load_beta(beta, sequence, first, T, H, C)
    solved = tl.trans(load_chunk(inverse, chunk, 0, C, C, C).to(work))
    d_weights, d_lower = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    d_q, d_k = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    d_k_out, d_strength = tl.zeros([C, BK], tl.float32), tl.zeros([C], tl.float32)
    d_across = tl.zeros([BK], tl.float32)
    for value in range(0, V, BV):
        d_o = (load_tokens(d_out, sequence, first, T, H, value, V, C, BV) * scale).to(work)
        error = load_chunk(errors, chunk, value, V, C, BV)
        d_write = load_chunk(d_written, chunk, value, V, C, BV)
        written = (error * strength[:, None]).to(work)
        x_dv = product(solved, (d_write * strength[:, None]).to(work), PRECISION)
        if block == 0:
            store_tokens(dv, x_dv, sequence, first, T, H, value, V, C, BV)
            d_strength += tl.sum(d_write * error, 1)
        x_dv = x_dv.to(work)
        state = load_state(states, chunk, column, value, K, V, BK, BV)
        d_state = load_state(d_states, chunk, column, value, K, V, BK, BV)
        d_weights += product(d_o, tl.trans(written), PRECISION)
        d_lower -= product(x_dv, tl.trans(error.to(work)), PRECISION)
        d_q += product(d_o, tl.trans(state.to(work)), PRECISION)
        d_k -= product(x_dv, tl.trans(state.to(work)), PRECISION)
        d_k_out += product(written, tl.trans(d_state.to(work)), PRECISION)
        d_across += tl.sum(state * d_state, 1)
    d_q *= load_factor(into, chunk, column, K, C, BK, False)
    d_k *= load_factor(into, chunk, column, K, C, BK, False)
    d_k_out *= load_factor(out, chunk, column, K, C, BK, False)
    x_q = load_tokens(q, sequence, first, T, H, column, K, C, BK)
    x_k = load_tokens(k, sequence, first, T, H, column, K, C, BK)
    d_in, d_end = tl.sum(x_q * d_q + x_k * d_k, 1), tl.sum(x_k * d_k_out, 1)
    x_q, x_k = x_q.to(work), x_k.to(work)
    decay = decay_pairs(gates, documents, chunk, first, C, GATED)
    d_weights *= decay
    d_lower *= tl.where(row[:, None] > row[None, :], decay, 0.0)
    weights = product(x_q, tl.trans(x_k), PRECISION)
    lower = product(x_k, tl.trans(x_k), PRECISION)
    d_strength += tl.sum(d_lower * lower, 0)
    d_lower *= strength[None, :]
    at = (block.to(tl.int64) * tl.num_programs(1) * tl.num_programs(0) + chunk) * C + row
    tl.store(d_beta + at, d_strength)
    if GATED:
        d_gate = pair_gates(d_weights * weights + d_lower * lower, d_in, d_end, C)
        d_gate += tl.sum(load_across(across, chunk, 0, K, BK, False) * tl.sum(d_across, 0))
        tl.store(d_gates + at, d_gate)
    d_weights, d_lower = d_weights.to(work), d_lower.to(work)
    d_q += product(d_weights, x_k, PRECISION)
    store_tokens(dq, d_q, sequence, first, T, H, column, K, C, BK)
    d_k += d_k_out + product(tl.trans(d_weights), x_q, PRECISION)
    d_k += product(d_lower, x_k, PRECISION) + product(tl.trans(d_lower), x_k, PRECISION)
    store_tokens(dk, d_k, sequence, first, T, H, column, K, C, BK)
